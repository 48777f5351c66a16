//! The front door for engines that keep KV in RAM of their own: blocks go between their memory and the tiers, past RAM.
//!
//! Invariant: nothing here waits for a read. A target is completed exactly once, and the engine's memory is used for as
//! long as the value lives that lends it. Calls that take slices and wait were the alternative: a disk that hangs would
//! hang the engine.

use std::sync::Arc;
use std::time::Duration;

use crate::cache::KvCache;
use crate::chain::Chain;
use crate::config::StoreOptions;
use crate::tier::{Payload, ReadTarget};

impl KvCache {
    /// Offers blocks that an engine keeps to the tiers behind RAM, past RAM, from block `first_block` of a chain on. Each
    /// payload has the bytes of a block, and stays readable until it is dropped. Says how many a tier took.
    pub fn write_lent(
        &self,
        chain: &Chain,
        first_block: usize,
        payloads: Vec<Arc<dyn Payload>>,
        options: &StoreOptions,
    ) -> usize {
        self.store_handle().write_lent(&self.store_handle().own(chain), first_block, payloads, options)
    }

    /// Begins to read blocks from the tiers behind RAM, past RAM, into memory that an engine lends, from block
    /// `first_block` of a chain on. Does not wait: each target is completed exactly once, on any thread. Says how many
    /// blocks in a row a tier has.
    pub fn read_lent(&self, chain: &Chain, first_block: usize, targets: Vec<Box<dyn ReadTarget>>) -> usize {
        self.store_handle().read_lent(&self.store_handle().own(chain), first_block, targets)
    }

    /// The name of the tier that has each of these blocks and would be read for it now: the first one in their order.
    #[must_use]
    pub fn where_lent(&self, chain: &Chain) -> Vec<Option<&str>> {
        self.store_handle().where_lent(&self.store_handle().own(chain))
    }

    /// These blocks were used where no tier saw it, in the engine's own memory: they are kept longer.
    pub fn touch_lent(&self, chain: &Chain) {
        self.store_handle().touch_lent(&self.store_handle().own(chain));
    }

    /// Asks to keep these blocks before all others, for so long or until [`KvCache::release_lent`]. Says how many are
    /// kept; there is a limit to how many. A tier keeps them as what is hot: rather than others, and never over its cap.
    pub fn retain_lent(&self, chain: &Chain, time: Option<Duration>) -> usize {
        self.store_handle().retain_lent(&self.store_handle().own(chain), time)
    }

    /// These blocks are like all others again.
    pub fn release_lent(&self, chain: &Chain) {
        self.store_handle().release_lent(&self.store_handle().own(chain));
    }
}
