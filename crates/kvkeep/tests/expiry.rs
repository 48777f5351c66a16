//! TTLs across restarts, under clocks that are right and wrong.
#![allow(clippy::indexing_slicing, clippy::unwrap_used, clippy::allow_attributes, reason = "a test that panics fails")]

mod common;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use common::{namespace, store};
use kvkeep::{CacheConfig, DType, DiskConfig, KvCache, ManualClock, Outcome, SimpleKvCache, TensorView};

const MIB: u64 = 1 << 20;
const HOUR: Duration = Duration::from_secs(3600);
const TTL: Duration = Duration::from_secs(60);
/// The true time.
const NOW_MS: u64 = 1_700_000_000_000;
const DAY_MS: u64 = 24 * 3_600_000;

fn config(dir: &Path, now_ms: u64) -> (CacheConfig, Arc<ManualClock>) {
    let clock = Arc::new(ManualClock::at(now_ms));
    let config = CacheConfig::new(4 * MIB).ttl(Some(TTL)).disk(DiskConfig::new(dir, 8 * MIB)).clock(clock.clone());
    (config, clock)
}

fn tokens() -> Vec<u32> {
    (0..8).collect()
}

/// Stores a prompt's blocks and a named pair under a clock that stands there.
fn store_at(dir: &Path, now_ms: u64) {
    let cache = KvCache::new(config(dir, now_ms).0).unwrap();
    store(&cache, &namespace("m"), &tokens());
    let named = SimpleKvCache::over(cache.store_handle().clone(), "named");
    let view = TensorView::new(DType::U8, &[4], &[1, 2, 3, 4]).unwrap();
    assert_eq!(named.cache_kv("prefix", 0, view, view).unwrap(), Outcome::Stored);
    drop(named);
    cache.close().unwrap();
}

/// Are the blocks there, and the named pair?
fn found(cache: &KvCache) -> (bool, bool) {
    let named = SimpleKvCache::over(cache.store_handle().clone(), "named");
    let blocks = cache.lookup(&namespace("m"), &tokens()).unwrap().cached_tokens() == 8;
    (blocks, named.get_cached_kv("prefix", 0).unwrap().is_some())
}

/// The clock ran a day ahead when an entry with a TTL of a minute was stored, and was set right before the restart:
/// the entry was served for a day. What is left of a TTL is never more than the TTL.
#[test]
fn an_entry_stored_under_a_clock_that_ran_ahead_lives_no_longer_than_its_ttl() {
    for read_at_once in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        store_at(dir.path(), NOW_MS + DAY_MS);
        let (config, clock) = config(dir.path(), NOW_MS);
        let cache = KvCache::new(config).unwrap();
        if read_at_once {
            // In RAM it must not get its old expiry back from the record.
            assert_eq!(found(&cache), (true, true));
        }
        clock.advance(TTL + Duration::from_secs(1));
        assert_eq!(found(&cache), (false, false), "read at once: {read_at_once}");
        clock.advance(22 * HOUR);
        assert_eq!(found(&cache), (false, false), "read at once: {read_at_once}");
    }
}

/// What opening had cut came back with its old expiry when eviction wrote it again.
#[test]
fn an_expiry_that_was_cut_stays_cut_when_the_record_is_written_again() {
    let dir = tempfile::tempdir().unwrap();
    store_at(dir.path(), NOW_MS + DAY_MS);
    let (config, clock) = config(dir.path(), NOW_MS);
    let cache = KvCache::new(config.ttl(None)).unwrap();
    let held = cache.lookup(&namespace("m"), &tokens()).unwrap();
    assert_eq!(held.cached_tokens(), 8, "hot: read, and in RAM");
    let mut first_token = 1000;
    while cache.stats().tiers[0].reinserted_total == 0 {
        store(&cache, &namespace("m"), &(first_token..first_token + 400).collect::<Vec<_>>());
        cache.flush().unwrap();
        first_token += 400;
        assert!(first_token < 400_000, "nothing was written again");
    }
    drop(held);
    cache.close().unwrap();
    clock.advance(TTL + Duration::from_secs(1));
    let (config, _) = self::config(dir.path(), NOW_MS + 61_000);
    let cache = KvCache::new(config).unwrap();
    assert_eq!(cache.lookup(&namespace("m"), &tokens()).unwrap().cached_tokens(), 0);
}

/// A clock that ran behind and was set right takes time away: that is a miss, never a stale hit.
#[test]
fn an_entry_stored_under_a_clock_that_ran_behind_expires_early() {
    let dir = tempfile::tempdir().unwrap();
    store_at(dir.path(), NOW_MS - DAY_MS);
    let cache = KvCache::new(config(dir.path(), NOW_MS).0).unwrap();
    assert_eq!(found(&cache), (false, false));
}

#[test]
fn under_a_right_clock_the_time_that_a_process_is_down_counts() {
    let dir = tempfile::tempdir().unwrap();
    store_at(dir.path(), NOW_MS);
    {
        let cache = KvCache::new(config(dir.path(), NOW_MS + 59_000).0).unwrap();
        assert_eq!(found(&cache), (true, true));
        cache.close().unwrap();
    }
    let cache = KvCache::new(config(dir.path(), NOW_MS + 60_000).0).unwrap();
    assert_eq!(found(&cache), (false, false));
}

/// A small step back, as time servers make, must not cost the warm restart.
#[test]
fn a_clock_that_steps_back_a_little_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    store_at(dir.path(), NOW_MS + 500);
    let cache = KvCache::new(config(dir.path(), NOW_MS).0).unwrap();
    assert_eq!(found(&cache), (true, true));
}

#[test]
fn what_never_expires_does_not_begin_to() {
    let dir = tempfile::tempdir().unwrap();
    let cache = KvCache::new(config(dir.path(), NOW_MS + DAY_MS).0.ttl(None)).unwrap();
    store(&cache, &namespace("m"), &tokens());
    cache.close().unwrap();
    let (config, clock) = config(dir.path(), NOW_MS);
    let cache = KvCache::new(config).unwrap();
    clock.advance(1000 * HOUR);
    assert_eq!(cache.lookup(&namespace("m"), &tokens()).unwrap().cached_tokens(), 8);
}
