//! One test or more for each promise of ARCHITECTURE.md that a RAM-only cache makes.

#![expect(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test that panics fails")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::{BLOCK_TOKENS, Kv, LAYERS, assert_right, layout, namespace, store};
use kvkeep::{
    CacheConfig, DType, Error, KvCache, KvLayout, LayerKv, LayerView, LayerViewMut, ManualClock, Namespace, Outcome,
    PolicyKind, Rejection, SimpleKvCache, Store, StoreOptions, TensorView, TensorViewMut, TokenOrder,
};

const PAGE: u64 = 4096;

fn cache(pages: u64) -> KvCache {
    KvCache::new(CacheConfig::new(pages * PAGE)).unwrap()
}

fn prompt(start: u32, tokens: u32) -> Vec<u32> {
    (start..start + tokens).collect()
}

fn pair(value: u8, bytes: usize) -> Vec<u8> {
    vec![value; bytes]
}

fn tensor(bytes: &[u8]) -> TensorView<'_> {
    TensorView::new(DType::U8, &[bytes.len()], bytes).unwrap()
}

// Promise 1: never wrong.

#[test]
fn a_hit_returns_exactly_the_bytes_stored_borrowed_and_copied() {
    let (cache, namespace) = (cache(64), namespace("m"));
    let tokens = prompt(0, 18);
    store(&cache, &namespace, &tokens);
    let found = cache.lookup(&namespace, &tokens).unwrap();
    assert_eq!(found.cached_tokens(), 16, "the partial block is not cached");
    assert_right(&found, &tokens);

    let mut copies = vec![(vec![0u8; 20 * 64], vec![0u8; 20 * 64]); 2];
    let mut targets: Vec<_> = copies
        .iter_mut()
        .map(|(k, v)| LayerViewMut {
            k: TensorViewMut::of(k, &[20, 2, 32]).unwrap(),
            v: TensorViewMut::of(v, &[20, 2, 32]).unwrap(),
        })
        .collect();
    found.load(1..3, &mut targets).unwrap();
    for (layer, (k, v)) in (1..3).zip(&copies) {
        assert_eq!(k[..16 * 64], common::bytes(&tokens[..16], layer, 0, 64));
        assert_eq!(v[..16 * 64], common::bytes(&tokens[..16], layer, 1, 64));
        assert!(k[16 * 64..].iter().all(|byte| *byte == 0), "what lies behind is left alone");
    }
}

/// `[kv_head][token][dim]` tensors with more tokens than are cached: each head is a run of
/// its own, and K and V differ in `head_dim`.
#[test]
fn head_major_tensors_with_spare_room_come_back_as_stored() {
    let layout = KvLayout::new(2, 3, 4, DType::F32)
        .and_then(|layout| layout.with_v_head_dim(6))
        .and_then(|layout| layout.with_block_tokens(4))
        .unwrap()
        .with_order(TokenOrder::HeadTokenDim);
    let namespace = Namespace::new("m", layout);
    let cache = cache(64);
    let tokens = prompt(0, 11);
    let k: Vec<f32> = (0..3 * 11 * 4).map(|i| i as f32).collect();
    let v: Vec<f32> = (0..3 * 11 * 6).map(|i| -(i as f32)).collect();
    let view = LayerView { k: TensorView::of(&k, &[3, 11, 4]).unwrap(), v: TensorView::of(&v, &[3, 11, 6]).unwrap() };
    cache.store(&namespace, &tokens, &[view, view]).unwrap();

    let found = cache.lookup(&namespace, &tokens).unwrap();
    let (mut k_out, mut v_out) = (vec![0f32; 3 * 9 * 4], vec![0f32; 3 * 9 * 6]);
    let target = LayerViewMut {
        k: TensorViewMut::of(&mut k_out, &[3, 9, 4]).unwrap(),
        v: TensorViewMut::of(&mut v_out, &[3, 9, 6]).unwrap(),
    };
    found.load(1..2, &mut [target]).unwrap();
    for head in 0..3 {
        for token in 0..8 {
            let (at, out) = ((head * 11 + token) * 4, (head * 9 + token) * 4);
            assert_eq!(k_out[out..out + 4], k[at..at + 4]);
            let (at, out) = ((head * 11 + token) * 6, (head * 9 + token) * 6);
            assert_eq!(v_out[out..out + 6], v[at..at + 6]);
        }
    }
}

#[test]
fn a_gap_in_the_chain_ends_the_match() {
    let (cache, namespace) = (cache(64), namespace("m"));
    let tokens = prompt(0, 16);
    store(&cache, &namespace, &tokens);
    cache.remove(&namespace, &tokens[..8]).unwrap();
    assert!(cache.lookup(&namespace, &tokens).unwrap().is_empty());
    // Only what is missing is written again; what lay behind the gap is found again.
    let report = store(&cache, &namespace, &tokens[..8]);
    assert_eq!((report.stored_blocks, report.present_blocks), (2, 0));
    assert_right(&cache.lookup(&namespace, &tokens).unwrap(), &tokens);
}

#[test]
fn a_borrowed_block_keeps_its_bytes_through_removal_reuse_and_the_end_of_the_cache() {
    let namespace = namespace("m");
    let cache = cache(2);
    let tokens = prompt(0, 4);
    store(&cache, &namespace, &tokens);
    let held = cache.lookup(&namespace, &tokens).unwrap();
    cache.clear();
    for start in 0..8 {
        store(&cache, &namespace, &prompt(100 * start, 4));
    }
    drop(cache);
    assert_right(&held, &tokens);
}

// Promise 2: never over.

#[test]
fn ram_stays_under_its_cap_at_every_moment() {
    let (cache, namespace) = (cache(5), namespace("m"));
    let mut pins = Vec::new();
    for start in 0..50 {
        let tokens = prompt(start * 64, 4 * (1 + start % 7));
        store(&cache, &namespace, &tokens);
        if start % 3 == 0 {
            pins.push(cache.lookup(&namespace, &tokens).unwrap());
        }
        if pins.len() > 2 {
            pins.remove(0);
        }
        let stats = cache.stats();
        assert!(stats.used_bytes <= 5 * PAGE, "{stats}");
        assert!(stats.held_bytes <= stats.used_bytes, "{stats}");
    }
    drop(pins);
    cache.clear();
    assert_eq!(cache.stats().used_bytes, 0);
}

/// 128 bytes a block is the bar; what is promised is the index and the policy's list. With a TTL it took 129, and 133 once the
/// cache evicted.
#[test]
fn the_index_takes_less_than_128_bytes_a_block_with_a_ttl_and_without_and_while_it_evicts() {
    let namespace = Namespace::new("m", KvLayout::new(1, 1, 1, DType::U8).unwrap().with_block_tokens(1).unwrap());
    for (blocks, ttl, rounds) in
        [(100_000, None, 1), (100_000, Some(Duration::from_hours(1)), 1), (5_000, None, 3), (30_000, None, 3)]
    {
        let cache = KvCache::new(CacheConfig::new(u64::from(blocks) * PAGE).ttl(ttl)).unwrap();
        let bytes = vec![1u8; 1000];
        let view = TensorView::new(DType::U8, &[1000, 1, 1], &bytes).unwrap();
        for number in 0..blocks / 1000 * rounds {
            let tokens: Vec<u32> = (number * 1000..(number + 1) * 1000).collect();
            cache.store(&namespace, &tokens, &[LayerView { k: view, v: view }]).unwrap();
        }
        let stats = cache.stats();
        assert_eq!((stats.entries, stats.evictions > 0), (u64::from(blocks), rounds > 1));
        let bytes_each = stats.index_bytes / stats.entries;
        assert!(bytes_each < 128, "{bytes_each} bytes a block of {blocks}, TTL {ttl:?}, {rounds} times");
    }
}

// Promise 3: never stuck.

#[test]
fn a_full_cache_evicts_the_least_recently_used_and_admits() {
    let lru = CacheConfig::new(4 * PAGE).policy(PolicyKind::Lru);
    let (cache, namespace) = (KvCache::new(lru).unwrap(), namespace("m"));
    let prompts: Vec<_> = (0..4).map(|i| prompt(100 * i, 4)).collect();
    for tokens in &prompts {
        store(&cache, &namespace, tokens);
    }
    drop(cache.lookup(&namespace, &prompts[0]).unwrap());
    assert_eq!(store(&cache, &namespace, &prompt(900, 4)).stored_blocks, 1);
    assert!(cache.lookup(&namespace, &prompts[1]).unwrap().is_empty(), "the oldest is gone");
    assert!(!cache.lookup(&namespace, &prompts[0]).unwrap().is_empty(), "what was used stays");
    assert_eq!(cache.stats().evictions, 1);
}

/// No policy that knows parents, and recency alone, may leave a leaf without the blocks before it.
#[test]
fn eviction_takes_the_leaves_of_a_chain_before_the_blocks_they_need() {
    let (namespace, tokens) = (namespace("m"), prompt(0, 32));
    for (used_before, policy) in [(false, PolicyKind::Lru), (true, PolicyKind::Lru)] {
        for others in 0..=8u32 {
            let cache = KvCache::new(CacheConfig::new(8 * PAGE).policy(policy)).unwrap();
            store(&cache, &namespace, &tokens);
            if used_before {
                drop(cache.lookup(&namespace, &tokens).unwrap());
            }
            for other in 0..others {
                store(&cache, &namespace, &prompt(1000 + 10 * other, 4));
            }
            let found = cache.lookup(&namespace, &tokens).unwrap();
            assert_eq!(found.blocks(), 8 - others as usize, "each eviction took the last block");
        }
    }
}

#[test]
fn an_entry_larger_than_the_cache_is_a_stated_rejection_and_loses_nothing() {
    let (cache, namespace) = (cache(4), namespace("m"));
    let kept = prompt(0, 4);
    store(&cache, &namespace, &kept);
    let simple = SimpleKvCache::over(cache.store_handle().clone(), "s");
    let large = pair(1, 5 * PAGE as usize);
    let outcome = simple.cache_kv("p", 0, tensor(&large), tensor(&large)).unwrap();
    let Outcome::Rejected(rejection) = outcome else { panic!("admitted") };
    assert!(matches!(rejection, Rejection::LargerThanCapacity { .. }));
    assert!(rejection.to_string().contains("raise the capacity"));
    assert!(!cache.lookup(&namespace, &kept).unwrap().is_empty());
}

#[test]
fn a_prompt_longer_than_the_cache_keeps_its_head() {
    let (cache, namespace) = (cache(4), namespace("m"));
    let tokens = prompt(0, 40);
    let report = store(&cache, &namespace, &tokens);
    assert_eq!((report.stored_blocks, report.rejected_blocks), (4, 6));
    assert!(matches!(report.rejection, Some(Rejection::LargerThanCapacity { .. })));
    let found = cache.lookup(&namespace, &tokens).unwrap();
    assert_eq!(found.blocks(), 4);
    assert_right(&found, &tokens);
}

#[test]
fn a_cache_in_which_all_is_pinned_rejects_and_admits_again_afterwards() {
    let (cache, namespace) = (cache(2), namespace("m"));
    let (kept, other) = (prompt(0, 8), prompt(100, 4));
    store(&cache, &namespace, &kept);
    let pin = cache.pin(&namespace, &kept).unwrap();
    let report = store(&cache, &namespace, &other);
    assert!(matches!(report.rejection, Some(Rejection::AllPinned { .. })), "{report:?}");
    assert_right(&pin, &kept);
    drop(pin);
    assert_eq!(store(&cache, &namespace, &other).stored_blocks, 1);
}

// Promise 4: read your writes.

#[test]
fn what_was_stored_is_found_until_it_is_removed_or_expires() {
    let clock = Arc::new(ManualClock::at(1_000));
    let config = CacheConfig::new(64 * PAGE).ttl(Some(Duration::from_secs(60))).clock(clock.clone());
    let (cache, namespace) = (KvCache::new(config).unwrap(), namespace("m"));
    let (short, long) = (prompt(0, 8), prompt(100, 8));
    let options = StoreOptions::default().ttl(Duration::from_secs(10));
    cache.store_from(&namespace, &short, 0, &Kv::of(&short, 0).views(), &options).unwrap();
    store(&cache, &namespace, &long);
    clock.advance(Duration::from_secs(9));
    assert_eq!(cache.lookup(&namespace, &short).unwrap().cached_tokens(), 8);
    clock.advance(Duration::from_secs(1));
    assert!(cache.lookup(&namespace, &short).unwrap().is_empty());
    assert_eq!(cache.lookup(&namespace, &long).unwrap().cached_tokens(), 8);
    clock.advance(Duration::from_secs(50));
    let stats = cache.stats();
    assert_eq!((stats.entries, stats.used_bytes, stats.expirations), (0, 0, 4), "swept without a read");
}

// Promise 6: private.

#[test]
fn a_namespace_sees_nothing_of_another() {
    let cache = cache(64);
    let tokens = prompt(0, 16);
    let (mine, yours) = (namespace("m").with_salt("mine"), namespace("m").with_salt("yours"));
    store(&cache, &mine, &tokens);
    assert!(cache.lookup(&yours, &tokens).unwrap().is_empty());
    assert_eq!(cache.remove(&yours, &tokens).unwrap().entries, 0);
    assert_eq!(cache.clear_namespace(&yours).entries, 0);
    assert_eq!(store(&cache, &yours, &tokens).present_blocks, 0, "nor by what a store reports");
    assert_eq!(cache.clear_namespace(&mine).entries, 4);
    assert_eq!(cache.lookup(&yours, &tokens).unwrap().blocks(), 4);
}

// Single-flight.

#[test]
fn of_threads_that_miss_the_same_prefix_one_computes() {
    let (cache, namespace) = (cache(64), namespace("m"));
    let computed = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for tail in 0..8u32 {
            let (cache, namespace, computed) = (&cache, &namespace, &computed);
            scope.spawn(move || {
                let tokens = [prompt(0, 16), vec![900 + tail]].concat();
                let found = cache
                    .get_or_prefill(namespace, &tokens, |missing| {
                        computed.fetch_add(1, Ordering::SeqCst);
                        let from = missing.first_token();
                        missing.store(&Kv::of(&tokens, from).views(), &StoreOptions::default()).map(drop)
                    })
                    .unwrap();
                assert_right(&found, &tokens);
                assert_eq!(found.cached_tokens(), 16);
            });
        }
    });
    assert_eq!(computed.into_inner(), 1);
}

#[test]
fn a_leader_that_fails_or_panics_leaves_the_flight_to_the_next() {
    let (cache, namespace) = (cache(64), namespace("m"));
    let tokens = prompt(0, 8);
    let failed = cache.get_or_prefill(&namespace, &tokens, |_| Err(Error::EmptyTokens));
    assert!(failed.is_err());
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        cache.get_or_prefill::<Error>(&namespace, &tokens, |_| panic!("out of memory"))
    }));
    assert!(panicked.is_err());
    let found = cache.get_or_prefill::<Error>(&namespace, &tokens, |missing| {
        missing.store(&Kv::of(&tokens, 0).views(), &StoreOptions::default()).map(drop)
    });
    assert_eq!(found.unwrap().cached_tokens(), 8);
}

#[test]
fn a_closure_that_asks_for_what_it_computes_does_not_wait_for_itself() {
    let (cache, namespace) = (cache(64), namespace("m"));
    let tokens = prompt(0, 8);
    let found = cache.get_or_prefill::<Error>(&namespace, &tokens, |_| {
        let inner = cache.get_or_prefill::<Error>(&namespace, &tokens, |missing| {
            missing.store(&Kv::of(&tokens, 0).views(), &StoreOptions::default()).map(drop)
        });
        inner.map(drop)
    });
    assert_eq!(found.unwrap().cached_tokens(), 8);
}

// The named door.

#[test]
fn all_layers_are_stored_and_found_together_or_not_at_all() {
    let cache = SimpleKvCache::open(CacheConfig::new(8 * PAGE)).unwrap();
    let bytes = pair(3, 100);
    let layers: Vec<_> = (0..4).map(|layer| LayerKv { layer, k: tensor(&bytes), v: tensor(&bytes) }).collect();
    assert_eq!(cache.cache_all_layers("p", &layers).unwrap(), Outcome::Stored);
    assert_eq!(cache.get_all_layers("p", 4).unwrap().unwrap().len(), 4);
    assert!(cache.get_all_layers("p", 5).unwrap().is_none());
    let many: Vec<_> = (0..9).map(|layer| LayerKv { layer, k: tensor(&bytes), v: tensor(&bytes) }).collect();
    assert!(matches!(cache.cache_all_layers("q", &many).unwrap(), Outcome::Rejected(_)));
    assert!(cache.get_cached_kv("q", 0).unwrap().is_none(), "not even one layer of it");
    let evicted = cache.evict("p", Some(2)).unwrap();
    assert_eq!(evicted.layers, [2]);
    assert!(cache.get_all_layers("p", 4).unwrap().is_none());
    assert_eq!(cache.evict("p", None).unwrap().layers, [0, 1, 3]);
    let stats = cache.get_stats();
    assert_eq!((stats.hits, stats.misses, stats.total_requests()), (1, 3, 4));
    assert_eq!(stats.used_bytes, 0);
}

#[test]
fn storing_again_replaces_and_accounting_stays_right() {
    let cache = SimpleKvCache::open(CacheConfig::new(8 * PAGE)).unwrap();
    let (old, new) = (pair(1, PAGE as usize), pair(2, 3 * PAGE as usize));
    cache.cache_kv("p", 0, tensor(&old), tensor(&old)).map(drop).unwrap();
    let held = cache.get_cached_kv("p", 0).unwrap().unwrap();
    cache.cache_kv("p", 0, tensor(&new), tensor(&new)).map(drop).unwrap();
    assert_eq!(held.k().bytes(), old, "a reader keeps what it was given");
    assert_eq!(cache.get_stats().used_bytes, 8 * PAGE);
    drop(held);
    let stats = cache.get_stats();
    assert_eq!((stats.entries, stats.used_bytes), (1, 6 * PAGE));
    assert_eq!(cache.get_cached_kv("p", 0).unwrap().unwrap().v().bytes(), new);
}

#[test]
fn the_longest_stored_prefix_of_a_text_is_found() {
    let cache = SimpleKvCache::open(CacheConfig::new(64 * PAGE)).unwrap();
    let bytes = pair(1, 8);
    for prefix in ["Grüß", "Grüß Gott", "Grüß Gott, Welt", "other"] {
        cache.cache_kv(prefix, 7, tensor(&bytes), tensor(&bytes)).map(drop).unwrap();
    }
    assert_eq!(cache.longest_prefix("Grüß Gott, Wels"), Some("Grüß Gott"));
    assert_eq!(cache.longest_prefix("Grüß Gott, Welt!"), Some("Grüß Gott, Welt"));
    assert_eq!(cache.longest_prefix("Gru"), None);
    assert_eq!(cache.longest_prefix(""), None);
    cache.evict("Grüß Gott", None).unwrap();
    assert_eq!(cache.longest_prefix("Grüß Gott, Wels"), Some("Grüß"));
}

#[test]
fn time_saved_is_what_callers_reported_and_nothing_else() {
    let cache = SimpleKvCache::open(CacheConfig::new(64 * PAGE)).unwrap();
    let bytes = pair(1, 8);
    let layers: Vec<_> = (0..2).map(|layer| LayerKv { layer, k: tensor(&bytes), v: tensor(&bytes) }).collect();
    cache.cache_all_layers("guessed", &layers).map(drop).unwrap();
    cache.get_all_layers("guessed", 2).unwrap();
    assert_eq!(cache.get_stats().time_saved_seconds(), 0.0);
    let options = StoreOptions::default().compute_time(Duration::from_millis(500));
    cache.cache_all_layers_with("timed", &layers, &options).map(drop).unwrap();
    cache.get_all_layers("timed", 2).unwrap();
    cache.get_all_layers("timed", 2).unwrap();
    assert_eq!(cache.get_stats().time_saved_seconds(), 1.0);
}

#[test]
fn every_dtype_comes_back_with_its_shape() {
    let cache = SimpleKvCache::open(CacheConfig::new(64 * PAGE)).unwrap();
    for (layer, dtype) in DType::ALL.into_iter().enumerate() {
        let bytes = pair(layer as u8, 6 * dtype.size_bytes());
        let k = TensorView::new(dtype, &[1, 2, 3], &bytes).unwrap();
        let v = TensorView::new(dtype, &[6], &bytes).unwrap();
        cache.cache_kv("p", layer, k, v).map(drop).unwrap();
        let hit = cache.get_cached_kv("p", layer).unwrap().unwrap();
        assert_eq!((hit.k().dtype(), hit.k().shape().dims()), (dtype, &[1usize, 2, 3][..]));
        assert_eq!((hit.v().shape().dims(), hit.v().bytes()), (&[6usize][..], &bytes[..]));
    }
}

// Bad input.

#[test]
fn bad_input_gets_a_clear_error_and_changes_nothing() {
    for gib in [f64::NAN, f64::INFINITY, -1.0, 0.0, 1e300] {
        let error = SimpleKvCache::with_max_size_gib(gib).unwrap_err();
        assert!(matches!(error, Error::Config(_)), "{gib}: {error}");
    }
    assert!(matches!(KvCache::new(CacheConfig::new(0)), Err(Error::Config(_))));

    let (cache, namespace) = (cache(64), namespace("m"));
    let tokens = prompt(0, 8);
    let kv = Kv::of(&tokens, 0);
    assert!(matches!(cache.lookup(&namespace, &[]), Err(Error::EmptyTokens)));
    assert!(matches!(cache.store(&namespace, &[], &kv.views()), Err(Error::EmptyTokens)));
    assert!(matches!(cache.store(&namespace, &tokens, &[]), Err(Error::ZeroLayers)));
    assert!(matches!(cache.store(&namespace, &tokens, &kv.views()[..2]), Err(Error::LayerCount { .. })));
    let longer = prompt(0, 12);
    assert!(matches!(cache.store(&namespace, &longer, &kv.views()), Err(Error::ShapeMismatch { .. })));
    let floats = vec![0f32; 8 * 64];
    let view = TensorView::of(&floats, &[8, 2, 32]).unwrap();
    let wrong = [LayerView { k: view, v: view }; LAYERS];
    let error = cache.store(&namespace, &tokens, &wrong).unwrap_err();
    assert_eq!(error.to_string(), "k of layer 0 has dtype f32, the layout stores u8: convert it first");
    assert_eq!(cache.stats().entries, 0);

    store(&cache, &namespace, &tokens);
    let found = cache.lookup(&namespace, &tokens).unwrap();
    assert!(matches!(found.layer(0, LAYERS), Err(Error::LayerOutOfRange { .. })));
    assert!(matches!(found.layer(2, 0), Err(Error::BlockOutOfRange { .. })));
    assert!(matches!(found.load(0..4, &mut []), Err(Error::LayerOutOfRange { .. })));
    assert!(matches!(found.load(1..1, &mut []), Err(Error::ZeroLayers)));
    assert!(matches!(found.load(0..1, &mut []), Err(Error::LayerCount { .. })));

    let simple = SimpleKvCache::over(Store::new(CacheConfig::new(PAGE)).unwrap(), "s");
    let bytes = pair(1, 8);
    let empty = TensorView::new(DType::F32, &[0, 4], &[]).unwrap();
    assert!(matches!(simple.cache_kv("", 0, tensor(&bytes), tensor(&bytes)), Err(Error::EmptyPrefix)));
    assert!(matches!(simple.cache_kv("p", 0, empty, tensor(&bytes)), Err(Error::EmptyTensor(_))));
    assert!(matches!(
        simple.cache_kv("p", 1 << 40, tensor(&bytes), tensor(&bytes)),
        Err(Error::LayerOutOfRange { .. })
    ));
    assert!(matches!(simple.get_all_layers("p", 0), Err(Error::ZeroLayers)));
    let layer = LayerKv { layer: 1, k: tensor(&bytes), v: tensor(&bytes) };
    assert!(matches!(simple.cache_all_layers("p", &[layer, layer]), Err(Error::DuplicateLayer(1))));
    assert!(matches!(simple.cache_all_layers("p", &[]), Err(Error::ZeroLayers)));
}

#[test]
fn storing_behind_a_gap_is_a_stated_rejection() {
    let (cache, namespace) = (cache(64), namespace("m"));
    let tokens = prompt(0, 16);
    let kv = Kv::of(&tokens, 8);
    let report = cache.store_from(&namespace, &tokens, 8, &kv.views(), &StoreOptions::default()).unwrap();
    assert_eq!(report.rejection, Some(Rejection::PrefixGone { token: 0 }));
    assert_eq!((report.stored_blocks, report.rejected_blocks), (0, 4));
    assert_eq!(cache.stats().used_bytes, 0);
    store(&cache, &namespace, &tokens[..8]);
    let report = cache.store_from(&namespace, &tokens, 8, &kv.views(), &StoreOptions::default()).unwrap();
    assert_eq!((report.stored_blocks, report.present_blocks), (2, 2));
    assert_right(&cache.lookup(&namespace, &tokens).unwrap(), &tokens);
    assert_eq!(layout().block_tokens(), BLOCK_TOKENS);
}

// Private views: what a hit's holder may write.

/// The bytes that a private tensor shows; `Some(fill)` overwrites them first.
#[expect(unsafe_code, reason = "private tensors are addresses, for tensor libraries")]
fn private_bytes(tensor: &kvkeep::PrivateTensor, fill: Option<u8>) -> Vec<u8> {
    let bytes = tensor.shape.size_bytes(tensor.dtype).unwrap();
    // SAFETY: the test holds the layers that the tensor came from, and uses it on this thread alone.
    let memory = unsafe { std::slice::from_raw_parts_mut(tensor.address.as_ptr(), bytes) };
    if let Some(fill) = fill {
        memory.fill(fill);
    }
    memory.to_vec()
}

#[test]
fn what_a_holder_of_private_layers_writes_reaches_nobody_else() {
    let cache = SimpleKvCache::open(CacheConfig::new(64 * PAGE)).unwrap();
    let (k, v) = (pair(1, 5000), pair(2, 700));
    let layers: Vec<_> = (0..3).map(|layer| LayerKv { layer, k: tensor(&k), v: tensor(&v) }).collect();
    assert_eq!(cache.cache_all_layers_with("p", &layers, &StoreOptions::default().tag(7)).unwrap(), Outcome::Stored);
    let private = || cache.get_all_layers("p", 3).unwrap().unwrap().into_private().unwrap();
    let (one, other) = (private(), private());
    assert!(one.is_one_run() && one.len() == 3 && one.tag(1) == 7);
    for layer in 0..3 {
        let (k, v) = one.layer(layer).unwrap();
        assert_eq!((k.address.as_ptr() as usize % 64, v.address.as_ptr() as usize % 64), (0, 0));
        private_bytes(&k, Some(9));
        private_bytes(&v, Some(8));
    }
    for seen in [&other, &private()] {
        for layer in 0..3 {
            let (seen_k, seen_v) = seen.layer(layer).unwrap();
            assert_eq!((private_bytes(&seen_k, None), private_bytes(&seen_v, None)), (k.clone(), v.clone()));
        }
    }
    assert_eq!(private_bytes(&one.layer(2).unwrap().0, None), pair(9, 5000), "and the holder keeps it");
    let hit = cache.get_cached_kv("p", 1).unwrap().unwrap();
    assert_eq!((hit.k().bytes(), hit.v().bytes()), (&k[..], &v[..]));
    assert!(matches!(one.layer(3), Err(Error::LayerOutOfRange { .. })));
}

#[test]
fn private_layers_stay_valid_after_removal_and_after_the_cache_is_gone_and_hold_their_pages() {
    let cache = SimpleKvCache::open(CacheConfig::new(4 * PAGE)).unwrap();
    let k = pair(1, 4000);
    let store = |prefix: &str| cache.cache_kv(prefix, 0, tensor(&k), tensor(&k)).unwrap();
    assert_eq!(store("a"), Outcome::Stored);
    let held = cache.get_cached_kv("a", 0).unwrap().unwrap().into_private().unwrap();
    cache.evict("a", None).unwrap();
    assert_eq!(cache.get_stats().held_bytes, 2 * PAGE);
    for number in 0..20u8 {
        let other = pair(number + 10, 4000);
        assert_eq!(cache.cache_kv("b", 0, tensor(&other), tensor(&other)).unwrap(), Outcome::Stored, "{number}");
        cache.evict("b", None).unwrap();
    }
    drop(cache);
    assert_eq!(private_bytes(&held.layer(0).unwrap().1, None), k);
}

#[test]
fn layers_stored_together_lie_in_one_run_also_in_a_full_cache() {
    let cache = SimpleKvCache::open(CacheConfig::new(12 * PAGE)).unwrap();
    let k = pair(1, 2000);
    let layers: Vec<_> = (0..4).map(|layer| LayerKv { layer, k: tensor(&k), v: tensor(&k) }).collect();
    for number in 0..10 {
        let prefix = format!("prefix {number}");
        assert_eq!(cache.cache_all_layers(&prefix, &layers).unwrap(), Outcome::Stored);
        let private = cache.get_all_layers(&prefix, 4).unwrap().unwrap().into_private().unwrap();
        assert!(private.is_one_run(), "{prefix}");
    }
    assert_eq!(cache.get_stats().evictions, 7 * 4, "no more than it takes");
}

/// Every other page is held, so no run of two is free: the layers must lie apart, and come back all the same.
#[test]
fn layers_that_find_no_run_are_stored_apart() {
    let cache = SimpleKvCache::open(CacheConfig::new(8 * PAGE)).unwrap();
    let page = pair(1, 1000);
    let held: Vec<_> = (0..8)
        .map(|layer| {
            assert_eq!(cache.cache_kv("p", layer, tensor(&page), tensor(&page)).unwrap(), Outcome::Stored);
            cache.get_cached_kv("p", layer).unwrap().unwrap()
        })
        .enumerate()
        .filter_map(|(layer, hit)| (layer % 2 == 0).then_some(hit))
        .collect();
    cache.evict("p", None).unwrap();
    let layers: Vec<_> = (0..3).map(|layer| LayerKv { layer, k: tensor(&page), v: tensor(&page) }).collect();
    assert_eq!(cache.cache_all_layers("q", &layers).unwrap(), Outcome::Stored);
    let private = cache.get_all_layers("q", 3).unwrap().unwrap().into_private().unwrap();
    assert!(!private.is_one_run());
    for layer in 0..3 {
        assert_eq!(private_bytes(&private.layer(layer).unwrap().1, None), page);
    }
    drop(held);
}

#[test]
fn a_hashed_prefix_finds_what_its_text_finds() {
    let cache = SimpleKvCache::open(CacheConfig::new(8 * PAGE)).unwrap();
    let k = pair(1, 100);
    assert_eq!(cache.cache_kv("p", 0, tensor(&k), tensor(&k)).unwrap(), Outcome::Stored);
    let (hashed, other) = (cache.hashed("p").unwrap(), cache.hashed("q").unwrap());
    assert!(cache.get_hashed(&hashed, 0).unwrap().is_some() && cache.get_all_hashed(&hashed, 1).unwrap().is_some());
    assert!(cache.get_hashed(&other, 0).unwrap().is_none() && cache.get_hashed(&hashed, 1).unwrap().is_none());
    assert!(matches!(cache.hashed(""), Err(Error::EmptyPrefix)));
    assert!(matches!(cache.get_all_hashed(&hashed, 0), Err(Error::ZeroLayers)));
}
