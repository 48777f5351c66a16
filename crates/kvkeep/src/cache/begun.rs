//! For an engine whose device copies from and to the cache's own RAM: stores that begin now and end when the device has
//! written them, and what is in RAM, held without a look at any tier.
//!
//! Invariant: nothing here waits, for a tier or for room, unless it says so. What is begun and not ended is found by nobody, and its pages are
//! given back when it is dropped. [`KvCache::store_written`] was the alternative: it waits in a callback until all is
//! written, and a scheduler has other requests meanwhile.

use std::time::Duration;

use super::{KvCache, Match, StoreReport, request};
use crate::chain::Chain;
use crate::clock::Deadline;
use crate::config::StoreOptions;
use crate::store::{Pending, Pin, Terms};

/// Blocks that a device is writing. Dropped without [`Begun::end`], they were never there.
#[derive(Debug)]
pub struct Begun {
    cache: KvCache,
    chain: Chain,
    /// What was there of the chain: held until the rest is sealed.
    #[expect(dead_code, reason = "held, not read")]
    present: Option<Pin>,
    missing: Vec<(usize, Pending)>,
    options: StoreOptions,
    report: StoreReport,
}

impl KvCache {
    /// Begins to store what is not in RAM of a chain from block `first_block` on, head first and as much as there is room
    /// for without waiting. What comes before need not be in the cache.
    #[must_use]
    pub fn begin_store(&self, chain: &Chain, first_block: usize, options: &StoreOptions) -> Begun {
        let chain = self.store.own(chain).into_owned();
        let (present, missing, report) = if self.store.here().is_ok() {
            let (present, missing, report) = self.reserve_missing(&chain, first_block, options, Terms::AtOnce);
            (Some(present), missing, report)
        } else {
            (None, Vec::new(), StoreReport::default())
        };
        Begun { cache: self.clone(), chain, present, missing, options: *options, report }
    }

    /// Holds all blocks of a chain if they are all in RAM. Asks no tier; not a request.
    #[must_use]
    pub fn hold_chain(&self, chain: &Chain) -> Option<Match> {
        let chain = self.store.own(chain);
        let pin = self.store.pin_in_ram(chain.keys())?;
        Some(Match { pin, loaded: 0..0, layout: *chain.namespace().layout() })
    }

    /// Counts a request for a chain, as [`KvCache::lookup_chain`] does, of what is in RAM of it. Asks no tier and holds
    /// nothing: for an engine that found some of its blocks in memory of its own, or holds them already.
    pub fn note_request(&self, chain: &Chain) {
        let chain = self.store.own(chain);
        self.store.note(chain.keys(), request(chain.namespace().layout(), chain.tokens()));
    }

    /// Evicts everything from RAM that is not held; what may go to a tier goes there, and its writes are waited for, so long at
    /// most. Says how many blocks are left in RAM.
    pub fn evict_all(&self, at_most: Duration) -> usize {
        self.store.evict_all(Deadline::after(at_most))
    }
}

impl Begun {
    /// The number of each block that is to be written, and where it begins in the cache's memory ([`crate::Ram`]), in bytes.
    pub fn places(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.missing.iter().map(|(block, pending)| (*block, pending.offset()))
    }

    /// What is there already, and what was refused.
    #[must_use]
    pub fn report(&self) -> &StoreReport {
        &self.report
    }

    /// All of them are written: from now on they are found.
    pub fn end(self) -> StoreReport {
        self.cache.seal_missing(&self.chain, self.missing, &self.options, self.report)
    }
}
