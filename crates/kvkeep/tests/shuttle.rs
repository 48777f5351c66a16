//! The concurrent parts under explored interleavings: `RUSTFLAGS="--cfg shuttle" cargo test -p kvkeep --test shuttle`.
#![cfg(shuttle)]
#![expect(clippy::unwrap_used, reason = "a test that panics fails")]

mod common;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Kv, assert_right, namespace, store};
use kvkeep::tiers::MemoryTier;
use kvkeep::{
    CacheConfig, Chain, Clock, DType, DiskConfig, Error, KvCache, ManualClock, Namespace, Outcome, SimpleKvCache,
    StoreOptions, TensorView, WritePolicy,
};
use shuttle::thread;

const ROUNDS: usize = 300;

fn cache(pages: u64) -> KvCache {
    KvCache::new(CacheConfig::new(pages * 4096)).unwrap()
}

#[test]
fn readers_and_writers_under_pressure_see_right_bytes_and_the_cap() {
    shuttle::check_random(
        || {
            let (cache, namespace) = (cache(3), Arc::new(namespace("m")));
            let threads: Vec<_> = (0..3u32)
                .map(|id| {
                    let (cache, namespace) = (cache.clone(), Arc::clone(&namespace));
                    thread::spawn(move || {
                        for round in 0..2 {
                            let tokens: Vec<u32> = (0..8).map(|i| i + (id + round) % 3 * 100).collect();
                            store(&cache, &namespace, &tokens);
                            let found = cache.lookup(&namespace, &tokens).unwrap();
                            assert!(cache.stats().used_bytes <= 3 * 4096);
                            thread::yield_now();
                            assert_right(&found, &tokens);
                        }
                    })
                })
                .collect();
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            assert_eq!(cache.stats().held_bytes, 0);
            cache.clear();
            assert_eq!(cache.stats().used_bytes, 0);
        },
        ROUNDS,
    );
}

#[test]
fn single_flight_computes_once_also_when_the_first_leader_fails() {
    shuttle::check_random(
        || {
            let (cache, namespace) = (cache(8), Arc::new(namespace("m")));
            let computed = Arc::new(AtomicUsize::new(0));
            let threads: Vec<_> = (0..3)
                .map(|id| {
                    let (cache, namespace, computed) = (cache.clone(), Arc::clone(&namespace), Arc::clone(&computed));
                    thread::spawn(move || {
                        let tokens: Vec<u32> = (0..8).collect();
                        let found = cache.get_or_prefill(&namespace, &tokens, |missing| {
                            thread::yield_now();
                            if id == 0 {
                                return Err(Error::EmptyTokens);
                            }
                            computed.fetch_add(1, Ordering::SeqCst);
                            let kv = Kv::of(&tokens, missing.first_token());
                            missing.store(&kv.views(), &StoreOptions::default()).map(drop)
                        });
                        match found {
                            Ok(found) => assert_eq!(found.cached_tokens(), 8),
                            Err(_) => assert_eq!(id, 0, "only the one that fails gets an error"),
                        }
                    })
                })
                .collect();
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            assert_eq!(computed.load(Ordering::SeqCst), 1);
        },
        ROUNDS,
    );
}

const PAGE: u64 = 4096;

fn prompt(start: u32) -> Vec<u32> {
    (start..start + 8).collect()
}

/// RAM for three blocks over a real directory. A thread that waits for a notification that never comes is found:
/// under shuttle no wait runs out of time.
fn open(home: &Path, write_policy: WritePolicy) -> KvCache {
    let disk = DiskConfig::new(home, 1 << 20).write_policy(write_policy);
    KvCache::new(CacheConfig::new(3 * PAGE).disk(disk)).unwrap()
}

/// A load that had found its record just before that was removed brought it back, once in some thousand runs.
///
/// The writer, the readers and four callers: two look up what comes from the disk, one stores and flushes, one
/// removes what another looks up. Then the cache is closed and opened again.
#[test]
fn a_disk_behind_serves_right_bytes_brings_nothing_back_and_lets_everybody_end() {
    let explore = |write_policy: WritePolicy| {
        // In memory where there is such a place: syncs are not what is explored.
        let home = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let (cache, namespace) = (open(home.path(), write_policy), Arc::new(namespace("m")));
        let (kept, removed, stored) = (prompt(0), prompt(100), prompt(200));
        for tokens in [&kept, &removed] {
            store(&cache, &namespace, tokens);
            cache.flush().unwrap();
        }
        let run = |task: fn(&KvCache, &Namespace, &[u32]), tokens: &[u32]| {
            let (cache, namespace, tokens) = (cache.clone(), Arc::clone(&namespace), tokens.to_vec());
            thread::spawn(move || task(&cache, &namespace, &tokens))
        };
        let look = |cache: &KvCache, namespace: &Namespace, tokens: &[u32]| {
            for _ in 0..2 {
                assert_right(&cache.lookup(namespace, tokens).unwrap(), tokens);
                assert!(cache.stats().used_bytes <= 3 * PAGE);
            }
        };
        let threads = [
            run(look, &kept),
            run(look, &removed),
            run(
                |cache, namespace, tokens| {
                    store(cache, namespace, tokens);
                    cache.flush().unwrap();
                    assert_right(&cache.lookup(namespace, tokens).unwrap(), tokens);
                },
                &stored,
            ),
            run(
                |cache, namespace, tokens| {
                    cache.remove(namespace, tokens).unwrap();
                    assert!(cache.lookup(namespace, tokens).unwrap().is_empty());
                },
                &removed,
            ),
        ];
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        let found = |cache: &KvCache, tokens: &[u32]| {
            let found = cache.lookup(&namespace, tokens).unwrap();
            assert_right(&found, tokens);
            found.cached_tokens()
        };
        assert_eq!((found(&cache, &kept), found(&cache, &removed)), (8, 0));
        cache.close().unwrap();
        let cache = open(home.path(), write_policy);
        assert_eq!((found(&cache, &kept), found(&cache, &removed)), (8, 0));
    };
    shuttle::check_random(move || explore(WritePolicy::Through), ROUNDS);
    shuttle::check_random(move || explore(WritePolicy::Back), ROUNDS);
}

/// A store was refused if the writer was done between its look for pages and its wait for the
/// writer, or if the writer said that it was done before it gave the pages back.
#[test]
fn a_store_gets_the_pages_of_what_is_being_written() {
    let explore = || {
        let home = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let (cache, namespace) = (open(home.path(), WritePolicy::Through), namespace("m"));
        for start in [0u32, 100, 200] {
            // Three blocks: all of RAM, so also what is being written of the prompt before.
            let tokens: Vec<u32> = (start..start + 12).collect();
            let report = store(&cache, &namespace, &tokens);
            assert_eq!((report.rejected_blocks, report.rejection), (0, None));
        }
        cache.close().unwrap();
    };
    shuttle::check_random(explore, ROUNDS);
}

/// A store was refused while a reader had said that something had come from the disk, and had not let go of it yet.
#[test]
fn a_store_gets_the_pages_of_what_has_just_been_read() {
    let explore = || {
        let home = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let (cache, namespace) = (open(home.path(), WritePolicy::Through), namespace("m"));
        let (first, second) = ((0..12).collect::<Vec<u32>>(), (100..112).collect::<Vec<u32>>());
        for tokens in [&first, &second] {
            store(&cache, &namespace, tokens);
            cache.flush().unwrap();
        }
        // All of RAM is read, and then stored anew.
        assert_eq!(cache.lookup(&namespace, &first).unwrap().cached_tokens(), 12);
        let report = store(&cache, &namespace, &(200..212).collect::<Vec<u32>>());
        assert_eq!((report.rejected_blocks, report.rejection), (0, None));
        cache.close().unwrap();
    };
    // By priorities: the reader has to be passed over for long.
    shuttle::check_pct(explore, ROUNDS, 3);
}

/// RAM for three blocks over a tier in memory, which two caches can share one after the other.
fn over_memory() -> (Arc<MemoryTier>, impl Fn(&Arc<MemoryTier>) -> KvCache) {
    let clock: Arc<dyn Clock> = Arc::new(ManualClock::at(1000));
    let tier = Arc::new(MemoryTier::new("memory", 1 << 20, Arc::clone(&clock)));
    let open = move |tier: &Arc<MemoryTier>| {
        let config = CacheConfig::new(3 * PAGE).clock(Arc::clone(&clock)).tier(tier.clone());
        KvCache::new(config).unwrap()
    };
    (tier, open)
}

/// A block that was evicted between two slices of a clearing was offered to the tier after that had forgotten it.
///
/// Loads, offers and evictions on their way while a namespace is cleared: none of them is there afterwards.
#[test]
fn nothing_that_was_removed_or_cleared_comes_back_by_a_load_or_an_offer() {
    let explore = || {
        let (tier, open) = over_memory();
        let (cache, namespace) = (open(&tier), Arc::new(namespace("m")));
        let (one, two) = (prompt(0), prompt(100));
        for tokens in [&one, &two] {
            store(&cache, &namespace, tokens);
        }
        let run = |task: fn(&KvCache, &Namespace, &[u32]), tokens: &[u32]| {
            let (cache, namespace, tokens) = (cache.clone(), Arc::clone(&namespace), tokens.to_vec());
            thread::spawn(move || task(&cache, &namespace, &tokens))
        };
        let look = |cache: &KvCache, namespace: &Namespace, tokens: &[u32]| {
            assert_right(&cache.lookup(namespace, tokens).unwrap(), tokens);
        };
        let threads = [
            run(look, &one),
            run(look, &two),
            run(|cache, namespace, tokens| _ = cache.remove(namespace, tokens).unwrap(), &one),
            run(|cache, namespace, _| _ = cache.clear_namespace(namespace), &two),
        ];
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        for tokens in [&one, &two] {
            assert!(cache.lookup(&namespace, tokens).unwrap().is_empty());
        }
        assert_eq!((cache.stats().entries, cache.stats().held_bytes), (0, 0));
        assert_eq!(cache.stats().tiers[0].entries, 0);
    };
    shuttle::check_random(explore, ROUNDS);
    shuttle::check_pct(explore, ROUNDS, 3);
}

/// Of two values stored at the same time one wins, in RAM and in the tier: whatever is evicted and loaded, nobody
/// sees the other one afterwards.
#[test]
fn the_value_that_ram_has_is_the_one_that_a_tier_gives_back() {
    let explore = || {
        let (tier, open) = over_memory();
        let cache = open(&tier);
        let simple = SimpleKvCache::over(cache.store_handle().clone(), "s");
        let get = |simple: &SimpleKvCache| simple.get_cached_kv("p", 0).unwrap().map(|hit| hit.k().bytes()[0]);
        let threads = [1u8, 2].map(|value| {
            let simple = simple.clone();
            thread::spawn(move || {
                let bytes = vec![value; 100];
                let view = TensorView::new(DType::U8, &[100], &bytes).unwrap();
                assert_eq!(simple.cache_kv("p", 0, view, view).unwrap(), Outcome::Stored);
            })
        });
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        let in_ram = get(&simple);
        // RAM evicts it.
        let namespace = namespace("m");
        store(&cache, &namespace, &(0..12).collect::<Vec<u32>>());
        assert_eq!(get(&simple), in_ram);
        assert!(in_ram.is_some());
    };
    shuttle::check_random(explore, ROUNDS);
    shuttle::check_pct(explore, ROUNDS, 3);
}

/// A removal ended the leases that it saw. One that was on its way then held what nobody could find, for as long as it lasted.
#[test]
fn a_lease_never_outlives_what_it_holds() {
    shuttle::check_random(
        || {
            let (cache, namespace) = (cache(8), Arc::new(namespace("m")));
            let tokens: Vec<u32> = (0..8).collect();
            store(&cache, &namespace, &tokens);
            let leasing = {
                let (cache, namespace, tokens) = (cache.clone(), Arc::clone(&namespace), tokens.clone());
                thread::spawn(move || {
                    let chain = Chain::of(&namespace, &tokens).unwrap();
                    cache.store_handle().lease(&chain, "client", None).unwrap()
                })
            };
            let removing = {
                let (cache, namespace, tokens) = (cache.clone(), Arc::clone(&namespace), tokens.clone());
                let way = shuttle::rand::Rng::gen_range(&mut shuttle::rand::thread_rng(), 0..3);
                thread::spawn(move || {
                    let removed = if way == 0 { cache.clear() } else { cache.remove(&namespace, &tokens).unwrap() };
                    assert_eq!(removed.entries, 2);
                    if way == 2 {
                        // It comes again, as another entry.
                        store(&cache, &namespace, &tokens);
                    }
                })
            };
            let lease = leasing.join().unwrap();
            removing.join().unwrap();
            let (leases, found) = (cache.store_handle().leases(), cache.lookup(&namespace, &tokens).unwrap());
            let held: usize = leases.iter().map(|lease| lease.tokens).sum();
            assert!(held <= found.cached_tokens(), "{lease:?} holds what nobody finds");
            drop(found);
            assert_eq!(cache.stats().held_bytes, cache.store_handle().leased().bytes);
            assert!(cache.stats().used_bytes <= cache.stats().held_bytes.max(2 * PAGE));
        },
        ROUNDS,
    );
}
