//! Where blocks live. RAM is the arena; every slower place is a [`Tier`]: the disk, memory for tests, one day a
//! network.
//!
//! Invariants of every tier, which the conformance suite checks:
//! - A read completes exactly once, with the bytes that were offered under that key or as a miss.
//! - What was forgotten does not come back: an offer that is older than the last `forget` of its key is dropped.
//! - No call but `flush`, `close` and a patient `offer` waits for I/O.
//!
//! Tiers never know each other; only the store knows their order. One enum of all tiers was the alternative: each
//! new tier would then touch the store.

pub(crate) mod around;
#[cfg(any(test, feature = "contract"))]
pub mod contract;
#[cfg(feature = "disk")]
pub(crate) mod disk;
mod forgets;
pub(crate) mod memory;
pub(crate) mod ram;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use crate::block::{BlockKey, BlockMeta, Facts};
use crate::clock::Deadline;
use crate::codec::CodecId;
use crate::error::Result;
use crate::event::Reports;
use crate::key::NamespaceId;
use crate::namespaces::Usage;
use crate::stats::TierStats;

pub use forgets::Forgets;

/// Orders what is forgotten and what is offered: the store counts it up with every removal.
pub type Epoch = u64;

/// A place for blocks behind RAM.
pub trait Tier: Send + Sync + fmt::Debug {
    /// Its name in statistics and flags: `disk`, `redis`.
    fn name(&self) -> &str;

    /// Which of these keys of a namespace are there, one answer a key. A tier that cannot answer in time, or is
    /// failing, has none.
    fn locate(&self, namespace: NamespaceId, keys: &[BlockKey], deadline: Deadline) -> Vec<Option<Located>>;

    /// Begins to read; each target is completed exactly once, on any thread, also if it is a miss.
    fn read(&self, reads: Vec<Read>);

    /// Offers blocks; gives back those it does not take. Waits for room until the deadline at most, and not at all
    /// where that is over. A block that is there already is taken and dropped.
    fn offer(&self, offers: Vec<Offer>, deadline: Deadline) -> Vec<Offer>;

    /// Gives up offers that were taken and are not being written yet: their memory is needed, and was waited for so
    /// long. Says how many.
    fn give_up(&self, _waited: Duration) -> usize {
        0
    }

    /// How long a lookup waits for one block, and for memory that a write holds; `None`: as long as the request may.
    fn deadline(&self) -> Option<Duration> {
        None
    }

    /// These are gone, at once for every reader. Says for each key whether it was there, and how many were.
    fn forget(&self, what: &Forget<'_>, epoch: Epoch) -> Forgotten;

    /// Makes durable what was offered and forgotten before, if the tier is a durable one. Ends with an error if it
    /// does not get on once in `patience`.
    ///
    /// # Errors
    /// What kept it from that.
    fn flush(&self, patience: Duration) -> Result<()>;

    /// Flushes and ends: nothing is taken any more.
    ///
    /// # Errors
    /// As [`Tier::flush`].
    fn close(&self) -> Result<()>;

    /// Counters and sizes as of now.
    fn stats(&self) -> TierStats;

    /// These were used where the tier did not see it, in memory before it: they are kept as if they had been read.
    fn touch(&self, _keys: &[BlockKey]) {}

    /// A request has waited for reads until its time was over. A tier that finds that it is silent answers no more
    /// until it is back.
    fn gave_up_waiting(&self) {}

    /// Does a read or a write take longer than anybody waits?
    fn is_stuck(&self) -> bool {
        false
    }

    /// Drops what has expired.
    fn sweep(&self) {}

    /// From now on it reports which blocks can be found in it; first, which are there already. A tier that does not is
    /// one that no listener hears of.
    fn report_to(&self, _reports: Reports) {}

    /// What each namespace takes.
    fn usage(&self) -> Vec<(NamespaceId, Usage)> {
        Vec::new()
    }

    /// The codec by which it writes blocks of this namespace, if that changes them. The store then keeps them under a name
    /// of their own, in every tier.
    fn lossy(&self, _namespace: NamespaceId) -> Option<&'static str> {
        None
    }

    /// Lengths of the prefix texts of a namespace up to `max_bytes`, shortest first.
    fn prefix_lengths(&self, _namespace: NamespaceId, _max_bytes: usize) -> Vec<usize> {
        Vec::new()
    }

    /// One more than the highest layer of a namespace.
    fn layers(&self, _namespace: NamespaceId) -> u32 {
        0
    }
}

/// What a tier knows of a block that it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Located {
    /// What it belongs to.
    pub namespace: NamespaceId,
    /// Bytes of the block itself.
    pub raw_bytes: u64,
    /// Bytes that reading it moves.
    pub stored_bytes: u64,
    /// The codec that decodes them.
    pub codec: CodecId,
    /// What it took to compute, in microseconds; 0 if nobody said.
    pub compute_us: u32,
    /// The mark it was offered with.
    pub mark: u8,
}

impl Located {
    /// A block of so many bytes as it is, which took so long to compute. Its mark is that of none.
    #[must_use]
    pub fn raw(namespace: NamespaceId, raw_bytes: u64, compute_us: u32) -> Self {
        Self { namespace, raw_bytes, stored_bytes: raw_bytes, codec: CodecId::RAW, compute_us, mark: 0 }
    }

    /// As a block was offered: what it is, and the mark it came with.
    #[must_use]
    pub fn of(meta: &BlockMeta, mark: u8) -> Self {
        let Facts { namespace, raw_bytes, stored_bytes, codec, compute_us, .. } = meta.facts;
        Self { namespace, raw_bytes, stored_bytes, codec, compute_us, mark }
    }
}

/// A block to be read.
#[non_exhaustive]
pub struct Read {
    /// Which.
    pub key: BlockKey,
    /// What it must belong to.
    pub namespace: NamespaceId,
    /// Of the block, these bytes; all of them if `None`.
    pub range: Option<Range<usize>>,
    /// How long whoever wants it has waited for this to be located already: a tier with a deadline of its own counts that.
    pub waited: Duration,
    /// Where to.
    pub target: Box<dyn ReadTarget>,
}

/// Memory that is lent for a read, for as long as it takes: pages of the arena, or an engine's own.
///
/// Dropping it without [`ReadTarget::complete`] is a miss.
pub trait ReadTarget: Send {
    /// The memory: at least as many bytes as the range has, or as the block has, which a tier decodes into it. What is
    /// behind them becomes zero. Exactly the block's whole pages of 4 KiB, at the beginning of a page, are read into
    /// without a copy.
    fn bytes_mut(&mut self) -> &mut [u8];
    /// As [`ReadTarget::bytes_mut`], for a tier whose bytes are in memory: `copy` fills the memory at once and says whether it could.
    /// Memory that somebody may want back is lent for a copy, not for a read. `false` if it is wanted no more, or by what `copy` says.
    fn fill(&mut self, copy: &mut dyn FnMut(&mut [u8]) -> bool) -> bool {
        copy(self.bytes_mut())
    }
    /// The end of the read: what the block is if its bytes are there, `None` for a miss.
    fn complete(self: Box<Self>, read: Option<BlockMeta>);
}

/// A block that a tier may have.
#[non_exhaustive]
pub struct Offer {
    /// What it is.
    pub meta: BlockMeta,
    /// When it was offered.
    pub epoch: Epoch,
    /// A mark of the store's own, to be given back by [`Tier::locate`] while the process lives.
    pub mark: u8,
    /// Its bytes. Dropped when the tier needs them no more.
    pub payload: Arc<dyn Payload>,
}

/// Bytes that stay readable until this is dropped.
pub trait Payload: Send + Sync {
    /// All bytes: those of the payload, perhaps followed by zeros up to whole pages.
    fn bytes(&self) -> &[u8];
    /// A tier has them now, by this offer or already before it.
    fn written(&self, _is_new: bool) {}
}

/// What is to be forgotten. A tier handles each kind: one that passed over a new one would bring back what was removed.
#[derive(Debug, Clone, Copy)]
pub enum Forget<'a> {
    /// These keys of a namespace were removed.
    Keys(NamespaceId, &'a [BlockKey]),
    /// These keys of a namespace have a newer value in RAM, which may or may not be offered later. After a crash there may be the
    /// older one; before it nobody finds that.
    Replaced(NamespaceId, &'a [BlockKey]),
    /// A namespace was cleared.
    Namespace(NamespaceId),
    /// Everything was.
    All,
}

/// What was forgotten.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Forgotten {
    /// Of [`Forget::Keys`]: was it there?
    pub found: Vec<bool>,
    /// Blocks that can no longer be found.
    pub entries: u64,
}

impl Forget<'_> {
    /// Is this key of this namespace among it?
    #[must_use]
    pub fn covers(&self, key: &BlockKey, namespace: NamespaceId) -> bool {
        match self {
            Self::Keys(_, keys) | Self::Replaced(_, keys) => keys.contains(key),
            Self::Namespace(id) => *id == namespace,
            Self::All => true,
        }
    }
}

impl fmt::Debug for Read {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Read").field("key", &self.key).field("range", &self.range).finish_non_exhaustive()
    }
}

impl fmt::Debug for Offer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Offer").field("meta", &self.meta).field("epoch", &self.epoch).finish_non_exhaustive()
    }
}
