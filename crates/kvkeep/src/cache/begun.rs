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
use crate::store::{Loaded, Pending, Pin, Terms};

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
        Some(Match { pin, loaded: Loaded::default(), layout: *chain.namespace().layout() })
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crate::{CacheConfig, Chain, DType, KvCache, KvLayout, Namespace, Rejection, StoreOptions};

    /// A cache of so many blocks, each one page.
    fn cache(blocks: u64) -> KvCache {
        KvCache::new(CacheConfig::new(blocks * 4096)).unwrap()
    }

    fn chain(name: u8, blocks: u8) -> Chain {
        let layout = KvLayout::new(1, 1, 1024, DType::U8).unwrap().with_block_tokens(2).unwrap();
        let keys: Vec<[u8; 2]> = (0..blocks).map(|block| [name, block]).collect();
        Chain::external(&Namespace::new("m", layout), &keys).unwrap()
    }

    fn begin(cache: &KvCache, chain: &Chain, first: usize) -> super::Begun {
        cache.begin_store(chain, first, &StoreOptions::default())
    }

    #[test]
    fn what_is_begun_is_found_by_nobody_until_it_has_ended() {
        let (cache, blocks) = (cache(8), chain(1, 3));
        let begun = begin(&cache, &blocks, 0);
        assert_eq!(
            begun.places().map(|(block, offset)| (block, offset % 4096)).collect::<Vec<_>>(),
            [(0, 0), (1, 0), (2, 0)]
        );
        assert!(cache.hold_chain(&blocks).is_none());
        assert_eq!(begun.end().stored_blocks, 3);
        assert_eq!(cache.hold_chain(&blocks).unwrap().blocks(), 3);
        assert!(cache.hold_chain(&chain(1, 4)).is_none(), "all of them or none");
    }

    #[test]
    fn what_is_begun_and_dropped_was_never_there_and_its_pages_are_free() {
        let (cache, blocks) = (cache(3), chain(1, 3));
        drop(begin(&cache, &blocks, 0));
        assert!(cache.hold_chain(&blocks).is_none() && cache.stats().used_bytes == 0);
        assert_eq!(begin(&cache, &chain(2, 3), 0).places().count(), 3);
    }

    #[test]
    fn what_comes_before_need_not_be_there() {
        // An engine stores the end of a prompt whose beginning it has on its device, and RAM has long evicted.
        let (cache, blocks) = (cache(8), chain(1, 5));
        let begun = begin(&cache, &blocks, 3);
        assert_eq!(begun.places().map(|(block, _)| block).collect::<Vec<_>>(), [3, 4]);
        assert_eq!((begun.report().rejected_blocks, begun.end().stored_blocks), (0, 2));
        assert!(cache.hold_chain(&blocks).is_none() && cache.lookup_chain(&blocks).blocks() == 0);
    }

    #[test]
    fn as_much_as_there_is_room_for_is_begun_and_the_rest_refused_at_once() {
        let cache = cache(4);
        let first = begin(&cache, &chain(1, 3), 0);
        let second = begin(&cache, &chain(2, 3), 0);
        assert_eq!((second.places().count(), second.report().rejected_blocks), (1, 2));
        assert!(matches!(second.report().rejection, Some(Rejection::AllPinned { .. })));
        drop(second);
        first.end();
        assert_eq!(begin(&cache, &chain(3, 4), 0).places().count(), 4, "it evicts what is not held");
    }

    #[test]
    fn of_two_that_store_the_same_the_first_to_end_is_kept_and_both_are_right() {
        let (cache, blocks) = (cache(8), chain(1, 2));
        let (one, other) = (begin(&cache, &blocks, 0), begin(&cache, &blocks, 0));
        assert_eq!((one.end().stored_blocks, other.end().stored_blocks), (2, 0));
        assert_eq!(cache.stats().used_bytes, 2 * 4096);
    }

    #[test]
    fn a_request_that_is_noted_counts_and_is_kept_like_one_that_was_looked_up() {
        let cache = KvCache::new(CacheConfig::new(4 * 4096).policy(crate::PolicyKind::Lru)).unwrap();
        for name in 1..=4 {
            begin(&cache, &chain(name, 1), 0).end();
        }
        cache.note_request(&chain(1, 1));
        assert_eq!((cache.stats().hits, cache.stats().cached_tokens_total), (1, 2));
        begin(&cache, &chain(5, 1), 0).end();
        assert!(cache.hold_chain(&chain(1, 1)).is_some() && cache.hold_chain(&chain(2, 1)).is_none());
    }

    #[test]
    fn everything_that_is_not_held_goes_when_all_is_evicted() {
        let (cache, kept, other) = (cache(8), chain(1, 2), chain(2, 3));
        begin(&cache, &kept, 0).end();
        begin(&cache, &other, 0).end();
        let held = cache.hold_chain(&kept).unwrap();
        assert_eq!(cache.evict_all(Duration::from_secs(5)), 2);
        assert!(cache.hold_chain(&other).is_none() && held.block(1).is_ok());
        drop(held);
        assert_eq!(cache.evict_all(Duration::from_secs(5)), 0);
    }
}
