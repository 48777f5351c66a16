//! Eviction policies: pure, single-threaded, and knowing nothing but ids and the
//! order of calls. Locks, sizes and payloads are the store's business.
//!
//! Chains need no special care here: the store touches them from tail to head, so
//! recency alone makes leaves older than the prefixes they need.

mod lru;

use std::fmt;

pub(crate) use lru::Lru;

/// The slot of an entry in the index; small and dense, reused after removal.
pub(crate) type EntryId = u32;

/// Decides which entry goes when room is needed.
pub(crate) trait Policy: Send + fmt::Debug {
    /// A new entry, most recent of all.
    fn insert(&mut self, id: EntryId);
    /// An entry is gone.
    fn remove(&mut self, id: EntryId);
    /// An entry is pinned, which every use is: it must not be a victim until it is released.
    fn hold(&mut self, id: EntryId);
    /// A pinned entry is free again, and the most recently used of all.
    fn release(&mut self, id: EntryId);
    /// The entry to evict next; the store then removes it.
    fn victim(&self) -> Option<EntryId>;
    /// Bytes of memory that the policy has reserved.
    fn memory_bytes(&self) -> usize;
}
