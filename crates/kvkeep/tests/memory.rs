//! What the cache takes of the machine's memory, as the kernel counts it.
#![cfg(target_os = "linux")]
#![allow(clippy::indexing_slicing, clippy::unwrap_used, clippy::allow_attributes, reason = "a test that panics fails")]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use common::{assert_right, namespace, store};
use kvkeep::{CacheConfig, DType, KvCache, Outcome, SimpleKvCache, TensorView};

const MIB: u64 = 1 << 20;

/// The tests of this file look at the whole process.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// KiB of caches' memory that are there, by all mappings of them: `Rss`, and of that `Anonymous`.
fn resident_kib() -> (u64, u64) {
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let (mut ours, mut rss, mut anonymous) = (false, 0, 0);
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if !first.ends_with(':') {
            ours = line.contains("/memfd:kvkeep");
        } else if ours {
            let mut kib = || words.next().unwrap().parse::<u64>().unwrap();
            match first {
                "Rss:" => rss += kib(),
                "Anonymous:" => anonymous += kib(),
                _ => {}
            }
        }
    }
    (rss, anonymous)
}

fn fill(cache: &SimpleKvCache, entries: usize) {
    let bytes = vec![7u8; 1 << 20];
    for entry in 0..entries {
        let view = TensorView::new(DType::U8, &[bytes.len()], &bytes).unwrap();
        assert_eq!(cache.cache_kv(&format!("p{entry}"), 0, view, view).unwrap(), Outcome::Stored);
    }
}

/// After `clear` a cache of 60 GiB still took 60 GiB of the machine, for as long as the process lived.
#[test]
fn clear_gives_memory_back_to_the_system_and_the_cache_works_on() {
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let cache = SimpleKvCache::open(CacheConfig::new(65 * MIB + 8192)).unwrap();
    for round in 0..3 {
        fill(&cache, 32);
        assert!(resident_kib().0 >= 64 << 10, "round {round}: nothing is there to be given back");
        cache.clear();
        assert_eq!(resident_kib().0, 0, "round {round}");
        assert_eq!(cache.get_stats().used_bytes, 0);
    }
    fill(&cache, 32);
    cache.store_handle().clear();
    assert_eq!(resident_kib().0, 0);
}

/// What a pin shows must stay, to the byte, whatever lies around it.
#[test]
fn clear_keeps_the_memory_of_what_is_pinned() {
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let cache = SimpleKvCache::open(CacheConfig::new(64 * MIB)).unwrap();
    fill(&cache, 32);
    let pinned = cache.get_cached_kv("p7", 0).unwrap().unwrap();
    let private = cache.get_cached_kv("p20", 0).unwrap().unwrap().into_private().unwrap();
    cache.clear();
    assert!(pinned.k().bytes().iter().all(|byte| *byte == 7) && pinned.v().bytes().iter().all(|byte| *byte == 7));
    let held = cache.get_stats().used_bytes;
    assert_eq!(held, 4 * MIB);
    // Each of the two pins keeps the pieces that it touches: 2 MiB, or twice that.
    assert!(resident_kib().0 <= 16 << 10, "{} KiB", resident_kib().0);
    drop((pinned, private));
    cache.clear();
    assert_eq!(resident_kib().0, 0);
}

/// What a reader had written into its private view was kept after `clear`, up to 16 MiB of it.
#[test]
#[expect(unsafe_code, reason = "a private view is an address")]
fn clear_gives_back_what_readers_wrote_into_their_views() {
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let cache = SimpleKvCache::open(CacheConfig::new(16 * MIB)).unwrap();
    fill(&cache, 4);
    for entry in 0..4 {
        let private = cache.get_cached_kv(&format!("p{entry}"), 0).unwrap().unwrap().into_private().unwrap();
        let (k, _) = private.layer(0).unwrap();
        // SAFETY: a view of this many bytes, ours alone while `private` lives.
        unsafe { std::ptr::write_bytes(k.address.as_ptr(), 9, 1 << 20) };
    }
    assert!(resident_kib().1 > 0, "nothing was written");
    cache.clear();
    assert_eq!(resident_kib(), (0, 0));
}

/// Giving back takes free pages out for a moment: a store that needs them must not be refused.
#[test]
fn stores_beside_clears_are_never_refused_and_never_wrong() {
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let cache = KvCache::new(CacheConfig::new(4 * MIB)).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                cache.clear();
            }
        });
        for from in (0..16u32).map(|round| round * 10_000) {
            // As large as the cache.
            let tokens: Vec<u32> = (from..from + 4096).collect();
            let report = store(&cache, &namespace("m"), &tokens);
            assert_eq!((report.rejected_blocks, report.rejection), (0, None));
            let found = cache.lookup(&namespace("m"), &tokens).unwrap();
            assert_right(&found, &tokens);
        }
        stop.store(true, Ordering::Relaxed);
    });
}
