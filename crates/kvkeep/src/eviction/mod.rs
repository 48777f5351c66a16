//! Eviction policies: pure, single-threaded, and knowing nothing but ids, sizes, parents and
//! the order of calls. Locks, bytes and clocks are the store's business.
//!
//! Chains need little care in most policies: the store releases and inserts them from tail to
//! head, so recency alone makes leaves older than the prefixes they need.

mod adaptive;
mod admission;
mod arc;
mod ghosts;
mod list;
mod lru;
mod lru2;
#[cfg(test)]
mod oracle;
mod rates;
mod s3fifo;
mod shares;
#[cfg(test)]
mod tests;

use std::fmt;

pub use admission::Admission;
pub(crate) use admission::Admitter;
pub use shares::Priority;
pub(crate) use shares::{ShareId, Shares};

/// The slot of an entry in the index; small and dense, reused after removal.
pub(crate) type EntryId = u32;

/// The eviction policies. docs/eviction.md says what each does and how they compare.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PolicyKind {
    /// The least recently used goes first.
    Lru,
    /// Three queues: newcomers pass through a small one.
    S3Fifo,
    /// Recency and frequency, with a border between them that moves.
    Arc,
    /// The entry whose second to last use is longest ago goes first.
    Lru2,
    /// Keeps what is likely to be used again soonest, by rates of reuse that it learns while
    /// it runs; leaves of a chain go first.
    #[default]
    Adaptive,
}

impl PolicyKind {
    /// All policies.
    pub const ALL: [Self; 5] = [Self::Lru, Self::S3Fifo, Self::Arc, Self::Lru2, Self::Adaptive];

    /// The name in flags and results.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Lru => "lru",
            Self::S3Fifo => "s3fifo",
            Self::Arc => "arc",
            Self::Lru2 => "lru2",
            Self::Adaptive => "adaptive",
        }
    }

    /// The policy of this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    pub(crate) fn make(self) -> Box<dyn Policy> {
        match self {
            Self::Lru => Box::new(lru::Lru::new()),
            Self::S3Fifo => Box::new(s3fifo::S3Fifo::new()),
            Self::Arc => Box::new(arc::Arc::new()),
            Self::Lru2 => Box::new(lru2::Lru2::new()),
            Self::Adaptive => Box::new(adaptive::Adaptive::new()),
        }
    }
}

/// Where an entry stands in the request that stores or uses it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Place {
    /// Blocks before it.
    pub(crate) depth: u32,
    /// Blocks of the whole request.
    pub(crate) blocks: u32,
    /// Blocks at its beginning that were there when it came.
    pub(crate) found: u32,
}

impl Place {
    pub(crate) fn of(depth: usize, blocks: usize, found: usize) -> Self {
        let count = |count| u32::try_from(count).unwrap_or(u32::MAX);
        Self { depth: count(depth), blocks: count(blocks), found: count(found) }
    }
}

/// What a policy is told of a new entry.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arrival {
    /// 64 uniform bits of the key: an entry that comes back is recognised by them.
    pub(crate) fingerprint: u64,
    /// The entry of the block before it, if there is one.
    pub(crate) parent: Option<EntryId>,
    pub(crate) place: Place,
}

/// Why an entry goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Departure {
    /// To make room: it may be missed, and a policy may remember it.
    Evicted,
    /// Removed, replaced or expired: it is not to come back.
    Removed,
}

/// Decides which entry goes when room is needed.
///
/// Every use is hold, touch (if it is a request that counts), release. A held entry is never a
/// victim.
pub(crate) trait Policy: Send + fmt::Debug {
    /// A request begins: the only clock there is.
    fn tick(&mut self) {}
    /// A new entry, most recent of all.
    fn insert(&mut self, _id: EntryId, _arrival: &Arrival) {}
    /// New entries of one request, in the order of their chain; the head is the most recent.
    fn insert_run(&mut self, run: &[(EntryId, Arrival)]) {
        run.iter().rev().for_each(|(id, arrival)| self.insert(*id, arrival));
    }
    /// An entry came before the one that it continues: that one is its parent.
    fn link(&mut self, _id: EntryId, _parent: EntryId) {}
    /// A request used this entry.
    fn touch(&mut self, id: EntryId, place: Place);
    /// An entry is pinned: it must not be a victim until it is released.
    fn hold(&mut self, id: EntryId);
    /// A pinned entry is free again, and the most recently used of all.
    fn release(&mut self, id: EntryId);
    /// An entry is gone, held or not.
    fn remove(&mut self, id: EntryId, why: Departure);
    /// The entry to evict next. Asked again before anything else happens, the answer is the same.
    fn victim(&mut self) -> Option<EntryId>;
    /// Bytes of memory that the policy has reserved.
    fn memory_bytes(&self) -> usize;
}
