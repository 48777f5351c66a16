//! The concurrent parts under explored interleavings: `cargo test -p kvkeep --features shuttle`.
#![cfg(feature = "shuttle")]
#![expect(clippy::unwrap_used, reason = "a test that panics fails")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Kv, assert_right, namespace, store};
use kvkeep::{CacheConfig, Error, KvCache, StoreOptions};
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
