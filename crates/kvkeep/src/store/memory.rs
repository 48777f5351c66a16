//! A store's RAM as one piece of memory, for devices that copy from and to it past the processor.
//!
//! Invariant: memory that a device has been told of stays the same memory until it is forgotten: it is not given back to
//! the system meanwhile. Copies through a buffer of the device's were the alternative: every byte is then moved twice,
//! and one thread moves fewer than the bus.

use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use super::{Shared, Store};

/// The memory of a store's RAM tier. It stays mapped while this lives.
#[derive(Clone)]
pub struct Ram {
    shared: Arc<Shared>,
}

impl Store {
    /// The memory that blocks in RAM lie in.
    #[must_use]
    pub fn ram(&self) -> Ram {
        Ram { shared: Arc::clone(&self.shared) }
    }
}

impl Ram {
    /// Where it begins: a multiple of 2 MiB.
    #[must_use]
    pub fn address(&self) -> NonNull<u8> {
        self.shared.arena.span().0
    }

    /// Its size: the capacity, in whole pages.
    #[must_use]
    pub fn capacity_bytes(&self) -> usize {
        self.shared.arena.span().1
    }

    /// The file that it is, from its beginning on: for another process to map. None where the system has no such files.
    #[cfg(unix)]
    #[must_use]
    pub fn file(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        self.shared.arena.file()
    }

    /// Brings memory behind its first `bytes` bytes, and keeps it there until another call says fewer: before a device is
    /// told of them. Takes as long as the system needs to clear so much. Does nothing in a child of the process that made it.
    pub fn keep_until(&self, bytes: usize) {
        if self.shared.check().is_ok() {
            self.shared.arena.keep_until(bytes);
        }
    }
}

impl fmt::Debug for Ram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ram").field("capacity_bytes", &self.capacity_bytes()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use crate::store::Request;
    use crate::{
        CacheConfig, Chain, DType, Error, KvCache, KvLayout, LayerSpec, Namespace, Shape, SimpleKvCache, StoreOptions,
    };

    fn namespace() -> Namespace {
        Namespace::new("m", KvLayout::new(1, 1, 4, DType::F32).unwrap().with_block_tokens(2).unwrap())
    }

    #[test]
    fn blocks_that_a_device_writes_lie_in_the_memory_that_it_is_told_of() {
        let cache = KvCache::new(CacheConfig::new(1 << 20)).unwrap();
        let (ram, chain) = (cache.store_handle().ram(), Chain::of(&namespace(), &[1, 2, 3, 4, 5, 6]).unwrap());
        let begin = ram.address().as_ptr() as usize;
        let report = cache.store_written(&chain, 0, &StoreOptions::default(), |blocks| {
            assert_eq!(blocks.iter().map(|(block, _)| *block).collect::<Vec<_>>(), [0, 1, 2]);
            for (block, pages) in blocks {
                let at = pages.as_ptr() as usize;
                assert!(at >= begin && at + pages.len() <= begin + ram.capacity_bytes());
                pages.fill(u8::try_from(block).unwrap() + 1);
            }
            Ok::<(), Error>(())
        });
        assert_eq!(report.unwrap().stored_blocks, 3);
        let found = cache.lookup_chain(&chain);
        assert_eq!((found.blocks(), found.block(1).unwrap()), (3, [2; 64].as_slice()));
        drop(cache);
        assert_eq!(found.block(2).unwrap(), [3; 64]);
        assert!(ram.capacity_bytes() >= 1 << 20, "its memory outlives the cache");
    }

    #[test]
    fn what_is_behind_a_block_in_its_pages_is_not_kept() {
        let cache = KvCache::new(CacheConfig::new(1 << 20)).unwrap();
        let chain = Chain::of(&namespace(), &[1, 2]).unwrap();
        let mut at = 0;
        let stored = cache.store_written(&chain, 0, &StoreOptions::default(), |blocks| {
            for (_, pages) in blocks {
                at = pages.as_ptr() as usize;
                assert_eq!(pages.len(), 4096);
                pages.fill(9);
            }
            Ok::<(), Error>(())
        });
        assert_eq!(stored.unwrap().stored_blocks, 1);
        let (pin, _) = cache.store_handle().pin_run(chain.namespace().id(), chain.keys(), Request::Uncounted);
        let (block, behind) = pin.bytes(0).split_at(64);
        assert_eq!(block.as_ptr() as usize, at);
        assert!(block.iter().all(|byte| *byte == 9) && behind.iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_write_that_fails_stores_nothing_and_gives_its_pages_back() {
        let tokens = KvCache::new(CacheConfig::new(1 << 20)).unwrap();
        let chain = Chain::of(&namespace(), &[1, 2, 3, 4]).unwrap();
        let failed = tokens.store_written(&chain, 0, &StoreOptions::default(), |_| Err(Error::Stopped));
        assert!(matches!(failed, Err(Error::Stopped)));
        assert_eq!((tokens.stats().used_bytes, tokens.lookup_chain(&chain).blocks()), (0, 0));

        let named = SimpleKvCache::open(CacheConfig::new(1 << 20)).unwrap();
        let spec = (DType::F32, Shape::new(&[3]).unwrap());
        let layers = [LayerSpec { layer: 0, k: spec, v: spec }];
        let failed =
            named.cache_all_layers_written("prefix", &layers, &StoreOptions::default(), |_| Err(Error::Stopped));
        assert!(matches!(failed, Err(Error::Stopped)));
        assert!(named.get_cached_kv("prefix", 0).unwrap().is_none() && named.get_stats().used_bytes == 0);
    }

    #[test]
    fn layers_that_a_device_writes_are_found_as_they_were_written() {
        let cache = SimpleKvCache::open(CacheConfig::new(1 << 20)).unwrap();
        let spec = |dims: &[usize]| (DType::F32, Shape::new(dims).unwrap());
        let layers = [
            LayerSpec { layer: 3, k: spec(&[2, 5]), v: spec(&[7]) },
            LayerSpec { layer: 0, k: spec(&[1]), v: spec(&[2000]) },
        ];
        let stored = cache.cache_all_layers_written("prefix", &layers, &StoreOptions::default(), |pages| {
            let sizes: Vec<_> = pages.iter().map(|(k, v)| (k.len(), v.len())).collect();
            assert_eq!(sizes, [(40, 28), (4, 8000)]);
            for (number, (k, v)) in pages.into_iter().enumerate() {
                k.copy_from_slice(&vec![u8::try_from(number).unwrap(); k.len()]);
                v.copy_from_slice(&vec![u8::try_from(number + 10).unwrap(); v.len()]);
            }
            Ok::<(), Error>(())
        });
        assert!(matches!(stored, Ok(crate::Outcome::Stored)));
        let found = cache.get_cached_kv("prefix", 3).unwrap().unwrap();
        assert_eq!((found.k().bytes(), found.v().bytes()), ([0; 40].as_slice(), [10; 28].as_slice()));
        let found = cache.get_cached_kv("prefix", 0).unwrap().unwrap();
        assert_eq!((found.k().bytes(), found.v().bytes().len()), ([1; 4].as_slice(), 8000));
    }
}
