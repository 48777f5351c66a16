//! RAM over a simulated disk: promises that need one that fails, hangs, or is slow.

#![allow(clippy::cast_possible_truncation, clippy::allow_attributes, reason = "a test that panics fails")]

mod events;
mod failing;
mod leases;
mod lent;
mod million;
mod removed;
mod requests;
mod written;

use std::sync::Arc;
use std::time::Duration;

use super::gate::Gate;
use super::lease::Leases;
use super::ledger::Written;
use super::tiers::{Timeouts, resident_of};
use super::*;
use crate::cache::KvCache;
use crate::clock::ManualClock;
use crate::config::{DiskConfig, StoreOptions, WritePolicy};
use crate::error::Rejection;
use crate::eviction::{Admission, Place};
use crate::index::NEVER;
use crate::key::TokenId;
use crate::layout::{KvLayout, LayerView, LayerViewMut};
use crate::named::{Outcome, SimpleKvCache};
use crate::tensor::{DType, TensorView, TensorViewMut};
use crate::tier::disk::sim::{self, Sim};
use crate::tier::disk::{DiskTier, Options};

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
const BLOCK_TOKENS: usize = 4;
const TOKEN_BYTES: usize = 512;

/// One block is one page.
fn namespace() -> Namespace {
    let layout = KvLayout::new(2, 1, 128, DType::U8).unwrap().with_block_tokens(BLOCK_TOKENS as u32).unwrap();
    Namespace::new("m", layout)
}

struct Lab {
    sim: Sim,
    clock: Arc<ManualClock>,
    config: DiskConfig,
    policy: crate::PolicyKind,
}

impl Lab {
    fn new() -> Self {
        let config = DiskConfig::new("sim", 4 * MIB).read_timeout(Duration::from_secs(2));
        Self { sim: Sim::default(), clock: Arc::new(ManualClock::at(1_000_000)), config, policy: Default::default() }
    }

    fn back(mut self) -> Self {
        self.config = self.config.write_policy(WritePolicy::Back);
        self
    }

    /// What a process finds that comes after this one was killed.
    fn after_a_crash(&self) -> Self {
        Self { sim: self.sim.copy(), clock: self.clock.clone(), config: self.config.clone(), policy: self.policy }
    }

    fn open(&self, ram_pages: u64) -> KvCache {
        self.open_with(ram_pages, None)
    }

    /// With this tier in place of the disk.
    fn open_over(&self, ram_pages: u64, tier: Arc<dyn crate::tier::Tier>) -> KvCache {
        let (arena, pages) = ram::reserve(ram_pages * PAGE).unwrap();
        let ledger = Ledger::new(pages, self.policy, &[]);
        let shared = Arc::new(Shared::new(ledger, arena, self.clock.clone(), None, None, None));
        self.over(shared, tier, ram_pages)
    }

    fn over(&self, shared: Arc<Shared>, tier: Arc<dyn crate::tier::Tier>, ram_pages: u64) -> KvCache {
        let timeouts = Timeouts { request: self.config.read_timeout, flush: self.config.flush_timeout };
        let gate = Gate::new(self.config.admission, self.config.write_policy);
        let tiers = Tiers::over(vec![tier], gate, timeouts, self.config.write_policy, &shared);
        let leases = Arc::new(Leases::new(0, ram_pages * PAGE));
        shared.announcer().into_iter().for_each(Announcer::start);
        KvCache::over(Store { shared, tiers: Some(Arc::new(tiers)), leases })
    }

    fn open_with(&self, ram_pages: u64, sink: Option<Arc<dyn crate::event::EventSink>>) -> KvCache {
        let (arena, pages) = ram::reserve(ram_pages * PAGE).unwrap();
        let clock: Arc<dyn Clock> = self.clock.clone();
        let ledger = Ledger::new(pages, self.policy, &[]);
        let announcer = sink.map(Announcer::new);
        let shared = Arc::new(Shared::new(ledger, arena, Arc::clone(&clock), None, None, announcer));
        let reports = shared.announcer().map(|announcer| announcer.reports("disk"));
        let options = Options { reports, ..DiskTier::options(&self.config, ram_pages * PAGE) };
        let disk = sim::open(&self.sim, &options, None, clock).unwrap();
        let disk = DiskTier::over(disk, self.config.read_timeout);
        disk.set_resident(resident_of(&shared));
        self.over(shared, Arc::new(disk), ram_pages)
    }
}

fn prompt(start: u32, blocks: u32) -> Vec<TokenId> {
    (start..start + blocks * BLOCK_TOKENS as u32).collect()
}

/// KV that depends on every token before.
fn kv(tokens: &[TokenId], layer: usize) -> Vec<u8> {
    let mut state = layer as u32;
    let row = |token: &TokenId| {
        state = state.wrapping_mul(0x0100_0193) ^ token;
        [state as u8; TOKEN_BYTES / 4]
    };
    tokens.iter().flat_map(row).collect()
}

fn store(cache: &KvCache, tokens: &[TokenId], options: &StoreOptions) -> crate::StoreReport {
    let layers = [kv(tokens, 0), kv(tokens, 1)];
    let view = |bytes| TensorView::new(DType::U8, &[tokens.len(), 1, TOKEN_BYTES / 4], bytes).unwrap();
    let views = layers.each_ref().map(|bytes| LayerView { k: view(bytes), v: view(bytes) });
    cache.store_from(&namespace(), tokens, 0, &views, options).unwrap()
}

/// Tokens found; every byte of them is right.
fn look(cache: &KvCache, tokens: &[TokenId]) -> usize {
    let found = cache.lookup(&namespace(), tokens).unwrap();
    for layer in 0..2 {
        let right = kv(tokens, layer);
        for block in 0..found.blocks() {
            let row = BLOCK_TOKENS * TOKEN_BYTES / 4;
            let view = found.layer(block, layer).unwrap();
            assert_eq!(view.k.bytes(), &right[block * row..(block + 1) * row]);
            assert_eq!(view.v.bytes(), view.k.bytes());
        }
    }
    found.cached_tokens()
}

fn plain() -> StoreOptions {
    StoreOptions::default()
}

fn disk(cache: &KvCache) -> crate::TierStats {
    cache.stats().tier("disk").unwrap().clone()
}

#[test]
fn a_run_that_is_partly_in_ram_and_partly_on_the_disk_is_found_as_one() {
    let lab = Lab::new();
    let cache = lab.open(8);
    let tokens = prompt(0, 8);
    store(&cache, &tokens, &plain());
    cache.store_handle().flush().unwrap();
    // Evicts the tail of the chain.
    store(&cache, &prompt(5000, 3), &plain());
    cache.store_handle().flush().unwrap();
    assert_eq!(look(&cache, &tokens), tokens.len());
    // The head is on the disk alone: storing behind it is no gap.
    store(&cache, &prompt(6000, 8), &plain());
    cache.store_handle().flush().unwrap();
    let longer = prompt(0, 9);
    let bytes = kv(&longer, 0)[8 * BLOCK_TOKENS * TOKEN_BYTES / 4..].to_vec();
    let view = TensorView::new(DType::U8, &[4, 1, 128], &bytes).unwrap();
    let layer = LayerView { k: view, v: view };
    let report = cache.store_from(&namespace(), &longer, 32, &[layer, layer], &plain()).unwrap();
    assert_eq!((report.stored_blocks, report.present_blocks, report.rejection), (1, 8, None));
}

#[test]
fn a_prompt_larger_than_ram_is_loaded_as_far_as_it_fits() {
    let lab = Lab::new();
    let cache = lab.open(64);
    let tokens = prompt(0, 32);
    store(&cache, &tokens, &plain());
    drop(cache);
    let cache = lab.open(8);
    assert_eq!(look(&cache, &tokens), 8 * BLOCK_TOKENS);
    // The thread that read the last one lets go of it a little later than who waited for it.
    while cache.stats().held_bytes > 0 {
        std::thread::yield_now();
    }
}

#[test]
fn prefetch_brings_a_prompt_into_ram_without_waiting() {
    let lab = Lab::new();
    let cache = lab.open(64);
    let tokens = prompt(0, 16);
    store(&cache, &tokens, &plain());
    drop(cache);
    let cache = lab.open(64);
    assert_eq!(cache.prefetch(&namespace(), &tokens).unwrap(), 16 * BLOCK_TOKENS);
    while cache.stats().entries < 16 {
        std::thread::yield_now();
    }
    lab.sim.fail_reads(true);
    assert_eq!(look(&cache, &tokens), tokens.len(), "nothing is read any more");
    assert_eq!(cache.prefetch(&namespace(), &tokens).unwrap(), 0);
}

#[test]
fn of_threads_that_want_the_same_blocks_from_the_disk_one_reads() {
    let lab = Lab::new();
    let cache = lab.open(64);
    let tokens = prompt(0, 16);
    store(&cache, &tokens, &plain());
    drop(cache);
    let cache = lab.open(64);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| assert_eq!(look(&cache, &tokens), tokens.len()));
        }
    });
    assert_eq!(disk(&cache).hits, 16);
}

#[test]
fn named_pairs_come_back_from_the_disk_with_shapes_and_are_found_as_prefixes() {
    let lab = Lab::new();
    let open = || SimpleKvCache::over(lab.open(64).store_handle().clone(), "s");
    let simple = open();
    let (k, v) = (vec![1.5f32; 6], vec![7u8; 10]);
    let (k, v) = (TensorView::of(&k, &[1, 2, 3]).unwrap(), TensorView::of(&v, &[10]).unwrap());
    for layer in 0..3 {
        assert_eq!(simple.cache_kv("You are", layer, k, v).unwrap(), Outcome::Stored);
    }
    drop(simple);
    let simple = open();
    assert_eq!(simple.longest_prefix("You are helpful"), Some("You are"));
    assert!(simple.get_all_layers("You are", 4).unwrap().is_none());
    let hit = simple.get_all_layers("You are", 3).unwrap().unwrap();
    let (found_k, found_v) = hit.layer(2).unwrap();
    assert_eq!((found_k.shape(), found_k.bytes(), found_v.bytes()), (k.shape(), k.bytes(), v.bytes()));
    drop(hit);
    let evicted = simple.evict("You are", Some(1)).unwrap();
    assert_eq!(evicted.layers, [1]);
    drop(simple);
    let simple = open();
    assert!(simple.get_cached_kv("You are", 1).unwrap().is_none());
    assert_eq!(simple.evict("You are", None).unwrap().layers, [0, 2]);
    assert_eq!(simple.longest_prefix("You are helpful"), None);
}

// Promise 3: never stuck.

// Promise 7: soft failure.

// Promise 8: worth it.

#[test]
fn a_load_that_takes_longer_than_computing_again_is_not_made() {
    let lab = Lab::new();
    let cache = lab.open(256);
    let (slow, fast) = (prompt(0, 16), prompt(5000, 16));
    // 16 blocks at 1 ms each to compute, and 16 at 100 ms each.
    store(&cache, &slow, &plain().compute_time(Duration::from_millis(16)));
    store(&cache, &fast, &plain().compute_time(Duration::from_millis(1600)));
    drop(cache);
    let cache = lab.open(256);
    // Loading takes 10 ms for each of a record's two pages.
    lab.sim.slow_reads(lab.clock.clone(), 10);
    let found = |tokens: &[TokenId]| cache.look(&namespace(), tokens).unwrap();
    assert_eq!(found(&slow).worth_tokens(), 64, "nothing is measured yet");
    assert_eq!(look(&cache, &fast), fast.len(), "saves more than it costs");
    assert_eq!(found(&slow).worth_tokens(), 0);
    assert_eq!(look(&cache, &slow), 0, "computing is faster");
    assert_eq!(disk(&cache).not_worth_tokens_total, 64);
    assert!(disk(&cache).load_bytes_per_s > 0);
    // The disk gets faster: now and then a block is tried, so that the cache finds out.
    lab.sim.slow_reads(lab.clock.clone(), 0);
    let loaded = (0..400).map(|_| look(&cache, &slow)).max().unwrap();
    assert_eq!(loaded, slow.len());
}

/// Takes the first two blocks out of RAM, not off the disk; then all 16 are worth it, and found.
fn assert_found_behind_a_gap(cache: &KvCache, tokens: &[TokenId]) {
    let head = namespace().block_hashes(&tokens[..8]).unwrap();
    let head: Vec<ObjectKey> = head.into_iter().map(crate::BlockHash::key).collect();
    cache.store_handle().shared.with(|ledger| ledger.remove(&head, 0));
    let found = cache.look(&namespace(), tokens).unwrap();
    assert_eq!((found.ram_tokens, found.load_tokens, found.not_worth_tokens), (0, 64, 0));
    assert_eq!(look(cache, tokens), 64);
}

/// Readers bring up the blocks of a prompt in any order. One that came before its parent did not know it: then
/// the parent was taken for the end of a chain, and went before what needs it.
#[test]
fn blocks_that_come_up_from_the_disk_before_their_parents_go_before_them_too() {
    for order in [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]] {
        let lab = Lab::new();
        let cache = lab.open(4);
        let tokens = prompt(0, 4);
        let keys: Vec<ObjectKey> =
            namespace().block_hashes(&tokens).unwrap().into_iter().map(crate::BlockHash::key).collect();
        let shared = Arc::clone(&cache.store_handle().shared);
        for position in order {
            shared.with(|ledger| {
                let extent = ledger.reserve_one(namespace().id(), PAGE as usize, 0).unwrap();
                let entry = ledger::new_entry(keys[position], extent, PAGE as usize, None, 0);
                let parent = position.checked_sub(1).map(|before| keys[before]);
                let written = Written { entry, expires_at_ms: NEVER, parent, place: Place::of(position, 4, 4) };
                let epoch = ledger.epoch();
                assert!(ledger.seal_promoted(namespace().id(), written, keys.get(position + 1), epoch));
            });
        }
        for left in [3, 2, 1] {
            // It stays taken, so that the next one has to evict.
            while shared.with(|ledger| ledger.reserve_one(namespace().id(), PAGE as usize, 0)).is_err() {
                cache.store_handle().offer();
            }
            let resident = shared.with(|ledger| ledger.resident(&keys));
            let right: Vec<bool> = (0..4).map(|position| position < left).collect();
            assert_eq!(resident, right, "they came in the order {order:?}");
        }
    }
}

/// Behind a few blocks on the disk lie many in RAM: loading the few makes the many useful.
#[test]
fn blocks_in_ram_behind_a_gap_on_the_disk_count_for_the_decision() {
    let lab = Lab::new();
    let cache = lab.open(256);
    let tokens = prompt(0, 16);
    store(&cache, &tokens, &plain().compute_time(Duration::from_millis(80)));
    let measured = prompt(9000, 4);
    store(&cache, &measured, &plain());
    drop(cache);
    let cache = lab.open(256);
    lab.sim.slow_reads(lab.clock.clone(), 5);
    look(&cache, &measured);
    let found = cache.look(&namespace(), &tokens).unwrap();
    assert_eq!((found.ram_tokens, found.load_tokens, found.not_worth_tokens), (0, 0, 64));
    // All but the first two come into RAM by being stored again.
    store(&cache, &tokens, &plain().compute_time(Duration::from_millis(80)));
    assert_found_behind_a_gap(&cache, &tokens);
}

/// Of eight threads that looked up one prompt on the disk, some found only its first half: the
/// rest had just come into RAM for another one, nobody had said what it took to compute, and so the
/// decision ended before it.
#[test]
fn blocks_in_ram_behind_a_gap_are_found_also_if_nobody_said_what_they_took() {
    let lab = Lab::new();
    let cache = lab.open(256);
    let tokens = prompt(0, 16);
    store(&cache, &tokens, &plain());
    cache.flush().unwrap();
    assert_found_behind_a_gap(&cache, &tokens);
}

#[test]
fn a_range_of_layers_is_read_from_ram_and_disk_without_bringing_blocks_up() {
    let lab = Lab::new();
    let cache = lab.open(64);
    let tokens = prompt(0, 16);
    store(&cache, &tokens, &plain());
    drop(cache);
    let cache = lab.open(64);
    assert_eq!(look(&cache, &tokens[..12]), 12, "three blocks are in RAM");
    let load = |layer: usize| {
        let (mut k, mut v) = (vec![0u8; 64 * 128], vec![0u8; 64 * 128]);
        let view = |bytes| TensorViewMut::new(DType::U8, &[64, 1, 128], bytes).unwrap();
        let mut target = [LayerViewMut { k: view(&mut k), v: view(&mut v) }];
        let loaded = cache.load_layers(&namespace(), &tokens, layer..layer + 1, &mut target).unwrap();
        let right = &kv(&tokens, layer)[..loaded * 128];
        assert!(k[..loaded * 128] == *right && v[..loaded * 128] == *right);
        loaded
    };
    assert_eq!((load(1), load(0)), (64, 64));
    assert_eq!(cache.stats().entries, 3);
    lab.sim.hang(true);
    assert_eq!(load(0), 12, "what is in RAM, and no waiting for ever");
    lab.sim.hang(false);
}

#[test]
fn without_a_disk_there_is_nothing_to_flush() {
    let cache = KvCache::new(CacheConfig::new(MIB)).unwrap();
    assert!(matches!(cache.store_handle().flush(), Err(Error::NoDisk)));
    assert_eq!(cache.stats().tiers, []);
}

#[test]
fn a_match_says_what_was_in_ram_and_what_was_loaded() {
    let lab = Lab::new();
    let cache = lab.open(8);
    let tokens = prompt(0, 6);
    assert_eq!(store(&cache, &tokens, &plain()).stored_blocks, 6);
    cache.flush().unwrap();
    assert_eq!(cache.lookup(&namespace(), &tokens).unwrap().ram_tokens(), tokens.len());
    // Another prompt takes the pages of this one's tail.
    assert_eq!(store(&cache, &prompt(1000, 5), &plain()).stored_blocks, 5);
    let in_ram = cache.look(&namespace(), &tokens).unwrap().ram_tokens;
    assert!(in_ram < tokens.len());
    let mut found = cache.lookup(&namespace(), &tokens).unwrap();
    assert_eq!((found.cached_tokens(), found.ram_tokens()), (tokens.len(), in_ram));
    found.truncate(in_ram + BLOCK_TOKENS);
    assert_eq!((found.cached_tokens(), found.ram_tokens()), (in_ram + BLOCK_TOKENS, in_ram));
    assert_eq!(found.tiers(), [("ram".to_owned(), in_ram), ("disk".to_owned(), BLOCK_TOKENS)]);
    found.truncate(0);
    assert_eq!(found.ram_tokens(), 0);
    assert_eq!(cache.lookup(&namespace(), &tokens).unwrap().ram_tokens(), tokens.len());
}

#[test]
fn what_a_miss_computes_behind_what_was_loaded_counts_as_in_ram() {
    let lab = Lab::new();
    let cache = lab.open(16);
    let tokens = prompt(0, 6);
    store(&cache, tokens.get(..4 * BLOCK_TOKENS).unwrap(), &plain());
    cache.close().unwrap();
    let cache = lab.open(16);
    let layers = [kv(&tokens, 0), kv(&tokens, 1)];
    let first = 4 * BLOCK_TOKENS;
    let found = cache.get_or_prefill(&namespace(), &tokens, |missing| {
        assert_eq!((missing.first_token(), missing.cached().ram_tokens()), (first, 0));
        let shape = [tokens.len() - first, 1, TOKEN_BYTES / 4];
        let views = layers.each_ref().map(|bytes| {
            let view = TensorView::new(DType::U8, &shape, &bytes[first * TOKEN_BYTES / 4..]).unwrap();
            LayerView { k: view, v: view }
        });
        missing.store(&views, &plain())?;
        Ok::<(), Error>(())
    });
    let found = found.unwrap();
    assert_eq!((found.cached_tokens(), found.ram_tokens()), (tokens.len(), 2 * BLOCK_TOKENS));
}

/// Entries and bytes of the only namespace.
fn usage(cache: &KvCache) -> [u64; 4] {
    let all = cache.store_handle().usage();
    assert!(all.len() <= 1 && all.iter().all(|usage| usage.id == namespace().id()));
    let Some(NamespaceUsage { tiers, .. }) = all.first() else { return [0; 4] };
    let [(ram, in_ram), (disk, on_disk)] = tiers.as_slice() else { panic!("{tiers:?}") };
    assert_eq!((ram.as_str(), disk.as_str()), ("ram", "disk"));
    [in_ram.entries, in_ram.bytes, on_disk.entries, on_disk.bytes]
}

#[test]
fn usage_counts_what_comes_and_goes_on_both_tiers() {
    let lab = Lab::new();
    let cache = lab.open(8);
    assert_eq!(usage(&cache), [0; 4]);
    store(&cache, &prompt(0, 6), &plain());
    cache.flush().unwrap();
    assert_eq!(usage(&cache), [6, 6 * PAGE, 6, 6 * 2 * PAGE]);
    store(&cache, &prompt(1000, 6), &plain());
    cache.flush().unwrap();
    let stats = cache.stats();
    assert_eq!(usage(&cache), [stats.entries, stats.used_bytes, 12, 12 * 2 * PAGE]);
    assert!(stats.tier("disk").unwrap().used_bytes > 12 * 2 * PAGE);
    cache.remove_from(&namespace(), &prompt(0, 6), 2 * BLOCK_TOKENS).unwrap();
    assert_eq!(usage(&cache)[2..], [8, 8 * 2 * PAGE]);
    drop(cache);
    let cache = lab.open(8);
    assert_eq!(usage(&cache), [0, 0, 8, 8 * 2 * PAGE]);
    // Its id is all that is known of it now.
    assert_eq!(cache.clear_namespace(namespace().id().to_string().parse::<NamespaceId>().unwrap()).entries, 8);
    assert_eq!(usage(&cache), [0; 4]);
}
