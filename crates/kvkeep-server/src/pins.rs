//! Prefixes that the operator keeps in RAM, whatever else comes.
//!
//! Invariant: together they hold at most half of the RAM tier, each block counted once, so that
//! pins cannot fill the cache and requests always have room.

use std::collections::{HashMap, HashSet};

use kvkeep::{BlockHash, Match, NamespaceId};

/// Pins hold at most this part of RAM.
const LIMIT_DIVISOR: u64 = 2;
/// Memory comes in pages.
const PAGE_BYTES: u64 = 4096;

#[derive(Debug, Default)]
pub(crate) struct Pins {
    held: HashMap<BlockHash, Held>,
}

/// A prefix whose blocks are not evicted while this lives.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) namespace: NamespaceId,
    pub(crate) hashes: Vec<BlockHash>,
    pub(crate) block_tokens: usize,
    pub(crate) block_bytes: usize,
    pub(crate) found: Match,
}

/// Pins would hold more than they may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooMuch {
    pub(crate) needed_bytes: u64,
    pub(crate) limit_bytes: u64,
}

impl Pins {
    /// Keeps a prefix; pinned twice is pinned once.
    pub(crate) fn pin(&mut self, id: BlockHash, held: Held, capacity_bytes: u64) -> Result<(), TooMuch> {
        let mut blocks: HashMap<BlockHash, u64> = self.blocks().map(|(hash, held)| (hash, held.page_bytes())).collect();
        blocks.extend(held.hashes.iter().map(|hash| (*hash, held.page_bytes())));
        let (needed_bytes, limit_bytes) = (blocks.values().sum(), capacity_bytes / LIMIT_DIVISOR);
        if needed_bytes > limit_bytes {
            return Err(TooMuch { needed_bytes, limit_bytes });
        }
        self.held.insert(id, held);
        Ok(())
    }

    /// What is returned is kept until it is dropped; drop it without a lock.
    pub(crate) fn unpin(&mut self, id: BlockHash) -> Option<Held> {
        self.held.remove(&id)
    }

    /// Lets go of a namespace, or of everything.
    pub(crate) fn clear(&mut self, namespace: Option<NamespaceId>) -> Vec<(BlockHash, Held)> {
        self.held.extract_if(|_, held| namespace.is_none_or(|namespace| namespace == held.namespace)).collect()
    }

    /// Tokens of pinned prefixes; what several share counts once.
    pub(crate) fn tokens(&self) -> usize {
        let mut seen = HashSet::new();
        self.blocks().filter(|(hash, _)| seen.insert(*hash)).map(|(_, held)| held.block_tokens).sum()
    }

    fn blocks(&self) -> impl Iterator<Item = (BlockHash, &Held)> {
        self.held.values().flat_map(|held| held.hashes.iter().map(move |hash| (*hash, held)))
    }
}

impl Held {
    pub(crate) fn tokens(&self) -> usize {
        self.found.cached_tokens()
    }

    fn page_bytes(&self) -> u64 {
        (self.block_bytes as u64).next_multiple_of(PAGE_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use kvkeep::{CacheConfig, DType, KvCache, KvLayout, LayerView, Namespace, TensorView};

    use super::*;

    fn held(cache: &KvCache, namespace: &Namespace, tokens: &[u32]) -> (BlockHash, Held) {
        let kv = vec![0u8; tokens.len() * 8];
        let view = TensorView::new(DType::U8, &[tokens.len(), 1, 8], &kv).unwrap();
        cache.store(namespace, tokens, &[LayerView { k: view, v: view }]).unwrap();
        let found = cache.pin(namespace, tokens).unwrap();
        let hashes = namespace.block_hashes(tokens).unwrap();
        let (block_tokens, block_bytes) = (2, namespace.layout().block_bytes());
        (*hashes.last().unwrap(), Held { namespace: namespace.id(), hashes, block_tokens, block_bytes, found })
    }

    #[test]
    fn pins_hold_at_most_half_of_ram_and_what_they_share_counts_once() {
        let layout = KvLayout::new(1, 1, 8, DType::U8).unwrap().with_block_tokens(2).unwrap();
        let namespace = Namespace::new("m", layout);
        let capacity = 10 * PAGE_BYTES;
        let cache = KvCache::new(CacheConfig::new(capacity)).unwrap();
        let mut pins = Pins::default();
        let mut pin = |tokens: &[u32]| {
            let (id, held) = held(&cache, &namespace, tokens);
            (id, pins.pin(id, held, capacity), pins.tokens())
        };
        let (first, pinned, tokens) = pin(&[1, 1, 2, 2, 3, 3]);
        assert_eq!((pinned, tokens), (Ok(()), 6));
        assert_eq!(pin(&[1, 1, 2, 2, 3, 3]).2, 6);
        let (_, pinned, tokens) = pin(&[1, 1, 2, 2, 4, 4, 5, 5]);
        assert_eq!((pinned, tokens), (Ok(()), 10));
        let (_, refused, tokens) = pin(&[9, 9]);
        assert_eq!(refused, Err(TooMuch { needed_bytes: 6 * PAGE_BYTES, limit_bytes: 5 * PAGE_BYTES }));
        assert_eq!((tokens, cache.stats().held_bytes), (10, 5 * PAGE_BYTES));
        drop(pins.unpin(first));
        assert_eq!((pins.tokens(), cache.stats().held_bytes), (8, 4 * PAGE_BYTES));
        assert_eq!(pins.clear(Some(Namespace::new("n", layout).id())).len(), 0);
        assert_eq!(pins.clear(Some(namespace.id())).len(), 1);
        assert_eq!(cache.stats().held_bytes, 0);
    }
}
