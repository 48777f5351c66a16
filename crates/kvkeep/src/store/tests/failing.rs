//! A disk that hangs, fails or is full costs hits, and nothing else.

use super::*;

#[test]
fn a_disk_that_hangs_is_given_up_and_asked_again_when_it_is_back() {
    let lab = Lab::new();
    let cache = lab.open(64);
    let (tokens, other) = (prompt(0, 8), prompt(1000, 4));
    store(&cache, &tokens, &plain());
    store(&cache, &other, &plain());
    drop(cache);
    let cache = lab.open(64);
    lab.sim.hang(true);
    assert_eq!(look(&cache, &tokens), 0, "the request goes on and computes");
    let stats = disk(&cache);
    assert!(stats.failing && stats.timeouts_total == 1, "{stats:?}");
    assert_eq!(look(&cache, &other), 0, "and nobody else waits for it");
    assert_eq!(disk(&cache).timeouts_total, 1);
    store(&cache, &prompt(2000, 2), &plain());
    assert_eq!(look(&cache, &prompt(2000, 2)), 8, "RAM serves on");
    lab.sim.hang(false);
    while disk(&cache).failing {
        std::thread::yield_now();
    }
    assert_eq!(look(&cache, &other), other.len());
    assert_eq!(look(&cache, &tokens), tokens.len());
}

/// Dropping the last handle waited for ever for a disk that began to hang.
#[test]
fn a_cache_can_be_flushed_closed_and_dropped_while_its_disk_hangs() {
    for close in [false, true] {
        let mut lab = Lab::new();
        lab.config = lab.config.flush_timeout(Duration::from_millis(40));
        let cache = lab.open(64);
        store(&cache, &prompt(0, 8), &plain());
        cache.flush().unwrap();
        lab.sim.hang(true);
        store(&cache, &prompt(1000, 8), &plain());
        let error = cache.flush().unwrap_err();
        assert!(error.to_string().contains("flush") && disk(&cache).failing, "{error}");
        assert_eq!(look(&cache, &prompt(1000, 8)), 32, "RAM serves on");
        let store = cache.store_handle().clone();
        drop(cache);
        if close {
            assert!(matches!(store.close(), Err(Error::Disk { .. })));
        } else {
            drop(store);
        }
        lab.sim.hang(false);
    }
}

#[test]
fn a_failing_or_full_disk_turns_into_misses_and_ram_serves_on() {
    let lab = Lab::new();
    let cache = lab.open(16);
    let first = prompt(0, 4);
    store(&cache, &first, &plain());
    cache.store_handle().flush().unwrap();
    lab.sim.fail_writes(true);
    lab.sim.fail_reads(true);
    for number in 1..20 {
        let tokens = prompt(number * 1000, 4);
        assert_eq!(store(&cache, &tokens, &plain()).stored_blocks, 4);
        assert_eq!(look(&cache, &tokens), tokens.len());
    }
    assert_eq!(look(&cache, &first), 0);
    assert!(disk(&cache).failing && cache.store_handle().flush().is_err());
    lab.sim.fail_writes(false);
    lab.sim.fail_reads(false);
    lab.clock.advance(Duration::from_secs(100));
    cache.store_handle().flush().unwrap();
    assert_eq!(look(&cache, &first), first.len());
    store(&cache, &prompt(90_000, 4), &plain());
    cache.store_handle().flush().unwrap();
    assert!(!disk(&cache).failing);
}
