//! The store against a plain map: whatever is done in whatever order, a lookup returns the
//! bytes that were stored, never others, and only what the map says may be there.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test that panics fails"
)]

mod common;
#[path = "common/planes.rs"]
mod planes;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use common::{assert_right, namespace, store};
use kvkeep::tiers::Codecs;
use kvkeep::{
    Admission, CacheConfig, Clock, DiskConfig, KvCache, ManualClock, Match, Outcome, SimpleKvCache, StoreOptions,
    TensorView, WritePolicy,
};
use proptest::prelude::*;

const PAGE: u64 = 4096;
const TTL_MS: u64 = 1_000;

#[derive(Debug, Clone)]
enum Op {
    Store { branch: u8, blocks: usize },
    Lookup { branch: u8, blocks: usize },
    Pin { branch: u8, blocks: usize },
    Unpin,
    Remove { branch: u8, blocks: usize },
    Put { prefix: u8, layer: u8, pages: u8 },
    Get { prefix: u8, layer: u8 },
    Evict { prefix: u8 },
    Longest { prefix: u8 },
    Advance { ms: u64 },
    Clear,
}

fn ops() -> impl Strategy<Value = Op> {
    let (branch, blocks) = (0u8..4, 1usize..6);
    prop_oneof![
        4 => (branch.clone(), blocks.clone()).prop_map(|(branch, blocks)| Op::Store { branch, blocks }),
        4 => (branch.clone(), blocks.clone()).prop_map(|(branch, blocks)| Op::Lookup { branch, blocks }),
        1 => (branch.clone(), blocks.clone()).prop_map(|(branch, blocks)| Op::Pin { branch, blocks }),
        1 => Just(Op::Unpin),
        1 => (branch, blocks).prop_map(|(branch, blocks)| Op::Remove { branch, blocks }),
        4 => (0u8..3, 0u8..3, 0u8..4).prop_map(|(prefix, layer, pages)| Op::Put { prefix, layer, pages }),
        4 => (0u8..3, 0u8..3).prop_map(|(prefix, layer)| Op::Get { prefix, layer }),
        1 => (0u8..3).prop_map(|prefix| Op::Evict { prefix }),
        1 => (0u8..3).prop_map(|prefix| Op::Longest { prefix }),
        2 => (1u64..600).prop_map(|ms| Op::Advance { ms }),
        1 => Just(Op::Clear),
    ]
}

/// Prompts that share two blocks and then differ by branch.
fn tokens(branch: u8, blocks: usize) -> Vec<u32> {
    (0..blocks as u32 * 4).map(|i| if i < 8 { i } else { i + 1000 * u32::from(branch) }).collect()
}

fn prefix(number: u8) -> &'static str {
    ["system", "system prompt", "another"][usize::from(number)]
}

/// The cache and what a plain map knows about it.
struct Twin {
    cache: KvCache,
    simple: SimpleKvCache,
    clock: Arc<ManualClock>,
    capacity_pages: u64,
    /// Prefix of tokens (a block) → when it expires.
    blocks: HashMap<Vec<u32>, u64>,
    /// (prefix, layer) → bytes and when they expire.
    pairs: HashMap<(u8, u8), (Vec<u8>, u64)>,
    pins: Vec<(Match, Vec<u32>)>,
    evicted: u64,
}

impl Twin {
    fn new(capacity_pages: u64, disk: Option<DiskConfig>) -> Self {
        let clock = Arc::new(ManualClock::at(5_000));
        let mut config =
            CacheConfig::new(capacity_pages * PAGE).ttl(Some(Duration::from_millis(TTL_MS))).clock(clock.clone());
        if let Some(disk) = disk {
            config = config.disk(disk);
        }
        let cache = KvCache::new(config).unwrap();
        let simple = SimpleKvCache::over(cache.store_handle().clone(), "simple");
        let (blocks, pairs) = (HashMap::new(), HashMap::new());
        Self { cache, simple, clock, capacity_pages, blocks, pairs, pins: Vec::new(), evicted: 0 }
    }

    fn apply(&mut self, op: &Op) {
        let now = self.clock.now_ms();
        let namespace = namespace("m");
        match *op {
            Op::Store { branch, blocks } => {
                let tokens = tokens(branch, blocks);
                let report = store(&self.cache, &namespace, &tokens);
                let admitted = report.stored_blocks + report.present_blocks;
                assert_eq!(admitted + report.rejected_blocks, blocks);
                assert_eq!(report.rejection.is_some(), report.rejected_blocks > 0);
                // Until the first eviction the map knows exactly what was there; from then on it
                // only bounds what may be.
                let exact = self.cache.stats().evictions == 0;
                for block in 1..=admitted {
                    let expires = self.blocks.entry(tokens[..block * 4].to_vec()).or_insert(0);
                    if !exact || *expires <= now {
                        *expires = now + TTL_MS;
                    }
                }
                if report.rejection.is_none() {
                    assert_eq!(self.cache.pin(&namespace, &tokens).unwrap().blocks(), blocks, "read your writes");
                }
            }
            Op::Lookup { branch, blocks } => drop(self.look(&tokens(branch, blocks), now)),
            Op::Pin { branch, blocks } => {
                let tokens = tokens(branch, blocks);
                let found = self.look(&tokens, now);
                self.pins.push((found, tokens));
            }
            Op::Unpin => drop(self.pins.pop()),
            Op::Remove { branch, blocks } => {
                let tokens = tokens(branch, blocks);
                self.cache.remove(&namespace, &tokens).unwrap();
                for block in 1..=blocks {
                    self.blocks.remove(&tokens[..block * 4]);
                }
                assert!(self.cache.pin(&namespace, &tokens).unwrap().is_empty());
            }
            Op::Put { prefix: number, layer, pages } => {
                let bytes = vec![number * 16 + layer + pages; usize::from(pages) * 4096 + 7];
                let view = TensorView::new(kvkeep::DType::U8, &[bytes.len()], &bytes).unwrap();
                let options = StoreOptions::default().ttl(Duration::from_millis(TTL_MS / 2));
                let outcome =
                    self.simple.cache_kv_with(prefix(number), usize::from(layer), view, view, &options).unwrap();
                if outcome == Outcome::Stored {
                    self.pairs.insert((number, layer), (bytes, now + TTL_MS / 2));
                    self.get(number, layer, now).expect("read your writes");
                } else if self.pins.is_empty() {
                    assert!(2 * u64::from(pages) + 1 > self.capacity_pages, "refused while all can be evicted");
                }
            }
            Op::Get { prefix, layer } => drop(self.get(prefix, layer, now)),
            Op::Evict { prefix: number } => {
                self.simple.evict(prefix(number), None).unwrap();
                self.pairs.retain(|(prefix, _), _| *prefix != number);
            }
            Op::Longest { prefix: number } => {
                let text = format!("{} and more", prefix(number));
                if let Some(found) = self.simple.longest_prefix(&text) {
                    let stored = (0..3).find(|number| prefix(*number) == found).unwrap();
                    assert!(self.pairs.iter().any(|((prefix, _), (_, expires))| *prefix == stored && *expires > now));
                }
            }
            Op::Advance { ms } => self.clock.advance(Duration::from_millis(ms)),
            Op::Clear => {
                self.cache.clear();
                self.blocks.clear();
                self.pairs.clear();
                assert_eq!(self.cache.stats().entries, 0);
            }
        }
    }

    /// What is found is right and may be there.
    fn look(&self, tokens: &[u32], now: u64) -> Match {
        let found = self.cache.lookup(&namespace("m"), tokens).unwrap();
        assert_right(&found, tokens);
        for block in 1..=found.blocks() {
            let expires = self.blocks.get(&tokens[..block * 4]).copied();
            assert!(expires.is_some_and(|expires| expires > now), "found what is gone");
        }
        found
    }

    fn get(&self, number: u8, layer: u8, now: u64) -> Option<()> {
        let hit = self.simple.get_cached_kv(prefix(number), usize::from(layer)).unwrap()?;
        let (bytes, expires) = self.pairs.get(&(number, layer)).expect("found what is gone");
        assert!(*expires > now, "found what has expired");
        assert_eq!((hit.k().bytes(), hit.v().bytes()), (&bytes[..], &bytes[..]));
        Some(())
    }

    fn check(&mut self) {
        let stats = self.cache.stats();
        assert!(stats.used_bytes <= self.capacity_pages * PAGE, "over the cap: {stats}");
        assert!(stats.evictions >= self.evicted);
        if stats.evictions == 0 {
            let now = self.clock.now_ms();
            let live = self.blocks.values().filter(|expires| **expires > now).count()
                + self.pairs.values().filter(|(_, expires)| *expires > now).count();
            assert_eq!(stats.entries as usize, live, "nothing is lost while nothing is evicted");
        }
        self.evicted = stats.evictions;
        self.pins.iter().for_each(|(found, tokens)| assert_right(found, tokens));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn agrees_with_a_plain_map_under_pressure(capacity_pages in 1u64..12, ops in prop::collection::vec(ops(), 1..60)) {
        let mut twin = Twin::new(capacity_pages, None);
        for op in &ops {
            twin.apply(op);
            twin.check();
        }
        twin.pins.clear();
        twin.cache.clear();
        prop_assert_eq!(twin.cache.stats().used_bytes, 0);
    }

    #[test]
    fn agrees_with_a_plain_map_without_pressure(ops in prop::collection::vec(ops(), 1..60)) {
        let mut twin = Twin::new(400, None);
        for op in &ops {
            twin.apply(op);
            twin.check();
        }
        prop_assert_eq!(twin.cache.stats().evictions, 0);
    }
}

proptest! {
    // Each case makes a directory and syncs it.
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn agrees_with_a_plain_map_also_with_a_disk_behind(
        capacity_pages in 4u64..12,
        back in any::<bool>(),
        coded in any::<bool>(),
        admission in prop_oneof![Just(Admission::All), Just(Admission::SecondUse), Just(Admission::Worth(0.5))],
        ops in prop::collection::vec(ops(), 1..60),
    ) {
        let home = tempfile::tempdir().unwrap();
        let write_policy = if back { WritePolicy::Back } else { WritePolicy::Through };
        let codecs = if coded { planes::planes() } else { Codecs::default() };
        let disk = DiskConfig::new(home.path(), 2 << 20).write_policy(write_policy).admission(admission).codecs(codecs);
        let mut twin = Twin::new(capacity_pages, Some(disk.clone()));
        for op in &ops {
            twin.apply(op);
            twin.check();
        }
        twin.cache.flush().unwrap();
        twin.pins.clear();
        // What is there after a restart is what may be there.
        let Twin { cache, simple, clock, blocks, pairs, .. } = twin;
        drop((cache, simple));
        let config = CacheConfig::new(400 * PAGE).clock(clock.clone()).disk(disk);
        let cache = KvCache::new(config).unwrap();
        let simple = SimpleKvCache::over(cache.store_handle().clone(), "simple");
        let twin = Twin { cache, simple, clock, blocks, pairs, capacity_pages: 400, pins: Vec::new(), evicted: 0 };
        let now = twin.clock.now_ms();
        (0..4).for_each(|branch| drop(twin.look(&tokens(branch, 5), now)));
        (0..9).for_each(|number| _ = twin.get(number / 3, number % 3, now));
    }
}
