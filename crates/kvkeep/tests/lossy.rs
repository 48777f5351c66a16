//! What has been through a lossy codec is found only by whoever asked for it, in whatever tier it is.
//!
//! A disk that loses bits brings KV into RAM that is not what the model computes. From there it went on to the next tier
//! under the name of exact KV, and so did what was computed behind it: another process, which had asked for nothing,
//! would have read it as exact.

#![expect(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test that panics fails")]

use std::path::Path;
use std::sync::Arc;

use kvkeep::tiers::{CodecId, Codecs, MemoryTier};
use kvkeep::{
    Archive, CacheConfig, Chain, DType, DiskConfig, KvCache, KvLayout, LayerView, Namespace, SimpleKvCache,
    SystemClock, TensorView, Tier,
};

const BLOCK_TOKENS: usize = 32;
const ROW: usize = 2 * 32;
const LOSSY: [&str; 5] = ["int8", "int4", "k8v4", "fp8", "nf4"];

fn namespace() -> Namespace {
    let layout = KvLayout::new(2, 2, 32, DType::F32).unwrap();
    Namespace::new("m", layout.with_block_tokens(BLOCK_TOKENS as u32).unwrap())
}

fn tokens(blocks: usize) -> Vec<u32> {
    (0..(blocks * BLOCK_TOKENS) as u32).collect()
}

/// K and V of so many tokens: numbers that no codec of fewer bits has.
fn kv(tokens: usize) -> Vec<f32> {
    (0..tokens * ROW).map(|at| (at as f32 * 0.7313).sin() + (at % ROW) as f32 / 9.0).collect()
}

fn store(cache: &KvCache, namespace: &Namespace, tokens: &[u32]) {
    let kv = kv(tokens.len());
    let view = TensorView::of(&kv, &[tokens.len(), 2, 32]).unwrap();
    let report = cache.store(namespace, tokens, &[LayerView { k: view, v: view }; 2]).unwrap();
    assert_eq!(report.rejected_blocks, 0);
}

/// How many tokens are there, and whether every bit of them is the one that was stored.
fn found(cache: &KvCache, namespace: &Namespace, tokens: &[u32]) -> (usize, bool) {
    let found = cache.lookup(namespace, tokens).unwrap();
    let (all, piece) = (kv(tokens.len()), BLOCK_TOKENS * ROW);
    let is_exact = (0..found.blocks()).all(|block| {
        (0..2).all(|layer| {
            let view = found.layer(block, layer).unwrap();
            let expected = all.get(block * piece..(block + 1) * piece).unwrap();
            [view.k, view.v].iter().all(|side| side.elements::<f32>().unwrap() == expected)
        })
    });
    (found.cached_tokens(), is_exact)
}

fn disk(dir: &Path, codecs: Codecs) -> CacheConfig {
    CacheConfig::new(4 << 20).disk(DiskConfig::new(dir, 16 << 20).codecs(codecs))
}

fn named(codec: &str) -> Codecs {
    Codecs::named(codec).unwrap()
}

fn memory() -> Arc<dyn Tier> {
    Arc::new(MemoryTier::new("memory", 64 << 20, Arc::new(SystemClock::default())))
}

#[test]
fn what_comes_back_from_a_lossy_disk_goes_to_no_tier_where_every_bit_is_expected() {
    for codec in LOSSY {
        let home = tempfile::tempdir().unwrap();
        let (namespace, tokens) = (namespace(), tokens(6));
        let (first, longer) = (&tokens[..4 * BLOCK_TOKENS], &tokens[..]);
        store(&KvCache::new(disk(home.path(), named(codec))).unwrap(), &namespace, first);
        let further = memory();
        let lossy = KvCache::new(disk(home.path(), named(codec)).tier(Arc::clone(&further))).unwrap();
        assert_eq!(found(&lossy, &namespace, first), (first.len(), false), "{codec} is lossy, and asked for");
        // What was computed behind it is not what the model computes, either.
        store(&lossy, &namespace, longer);
        lossy.flush().unwrap();
        assert!(further.stats().entries >= 6, "{codec}: the further tier has it");
        let exact = KvCache::new(CacheConfig::new(4 << 20).tier(Arc::clone(&further))).unwrap();
        assert_eq!(found(&exact, &namespace, longer).0, 0, "{codec}");
        // Nor is it taken for what is there when the exact KV comes.
        store(&exact, &namespace, longer);
        drop(exact);
        let exact = KvCache::new(CacheConfig::new(4 << 20).tier(Arc::clone(&further))).unwrap();
        assert_eq!(found(&exact, &namespace, longer), (longer.len(), true), "{codec}");
        drop(lossy);
        // Whoever asks for the same codec has it from there.
        let other = tempfile::tempdir().unwrap();
        let again = KvCache::new(disk(other.path(), named(codec)).tier(further)).unwrap();
        assert_eq!(found(&again, &namespace, longer), (longer.len(), false), "{codec}");
    }
}

#[test]
fn a_directory_that_a_lossy_codec_wrote_is_a_miss_to_whoever_opens_it_without() {
    let home = tempfile::tempdir().unwrap();
    let (namespace, tokens) = (namespace(), tokens(3));
    store(&KvCache::new(disk(home.path(), named("int4"))).unwrap(), &namespace, &tokens);
    for other in ["raw", "lossless", "int8", "nf4"] {
        let cache = KvCache::new(disk(home.path(), named(other))).unwrap();
        assert_eq!(found(&cache, &namespace, &tokens).0, 0, "{other}");
    }
    let cache = KvCache::new(disk(home.path(), named("int4"))).unwrap();
    assert_eq!(found(&cache, &namespace, &tokens), (tokens.len(), false));
}

/// Memory that is shared between caches of one process is a tier, too.
#[test]
fn a_lossy_tier_behind_others_gives_its_blocks_a_name_of_their_own() {
    let (namespace, tokens) = (namespace(), tokens(3));
    let tier =
        |codec| Arc::new(MemoryTier::new("memory", 64 << 20, Arc::new(SystemClock::default())).codecs(named(codec)));
    let (first, second) = (memory(), tier("fp8"));
    let config = || CacheConfig::new(4 << 20).tier(Arc::clone(&first)).tier(second.clone());
    store(&KvCache::new(config()).unwrap(), &namespace, &tokens);
    let exact = KvCache::new(CacheConfig::new(4 << 20).tier(Arc::clone(&first))).unwrap();
    assert_eq!(found(&exact, &namespace, &tokens).0, 0);
    assert_eq!(found(&KvCache::new(config()).unwrap(), &namespace, &tokens).0, tokens.len());
}

#[test]
fn one_namespace_may_ask_for_a_lossy_codec_and_all_others_stay_exact() {
    let home = tempfile::tempdir().unwrap();
    let (asks, other, tokens) = (namespace(), namespace().with_salt("other"), tokens(3));
    let int4 = named("int4").get(CodecId(3)).unwrap().clone();
    let codecs = Codecs::default().namespace(asks.id(), int4);
    let cache = KvCache::new(disk(home.path(), codecs.clone())).unwrap();
    store(&cache, &asks, &tokens);
    store(&cache, &other, &tokens);
    drop(cache);
    let cache = KvCache::new(disk(home.path(), codecs)).unwrap();
    assert_eq!(found(&cache, &asks, &tokens), (tokens.len(), false));
    assert_eq!(found(&cache, &other, &tokens), (tokens.len(), true));
}

/// A name of its own must not be a place where nobody finds what is to be removed, leased or paid for.
#[test]
fn every_call_means_the_same_blocks_by_the_name_of_the_prompt() {
    let home = tempfile::tempdir().unwrap();
    let (namespace, tokens) = (namespace(), tokens(4));
    let config = disk(home.path(), named("int4")).quota(namespace.id(), 0.5).unwrap();
    let cache = KvCache::new(config).unwrap();
    store(&cache, &namespace, &tokens);
    let chain = Chain::of(&namespace, &tokens).unwrap();
    let own = cache.store_handle().own_namespace(&namespace);
    assert_eq!((own.codec(), own.id() == namespace.id()), ("int4", false));
    assert_eq!(cache.store_handle().own(&chain).hashes().collect::<Vec<_>>(), own.block_hashes(&tokens).unwrap());
    assert_eq!(cache.store_handle().usage()[0].id, own.id());
    for chain in [chain.clone(), Chain::of(&own, &tokens).unwrap()] {
        assert_eq!(cache.lookup_chain(&chain).cached_tokens(), tokens.len());
        assert_eq!(cache.look_chain(&chain).ram_tokens, tokens.len());
        assert_eq!(cache.residency_chain(&chain).tokens_in("ram", 0..4), tokens.len());
        let lease = cache.store_handle().lease(&chain, "me", None).unwrap();
        assert_eq!(lease.tokens, tokens.len());
        assert!(cache.store_handle().end_lease(lease.id));
    }
    let computed = cache.get_or_prefill(&namespace, &tokens, |_| -> kvkeep::Result<()> { unreachable!("it is there") });
    assert_eq!(computed.unwrap().cached_tokens(), tokens.len());
    assert_eq!(cache.remove_from(&namespace, &tokens, 3 * BLOCK_TOKENS).unwrap().entries, 1);
    assert_eq!(cache.clear_namespace(&namespace).entries, 3);
    assert_eq!(cache.lookup(&namespace, &tokens).unwrap().cached_tokens(), 0);
}

/// The first tokens have the attention of all others.
#[test]
fn the_first_tokens_of_a_prompt_come_back_exactly() {
    for codec in LOSSY {
        let home = tempfile::tempdir().unwrap();
        let (namespace, tokens) = (namespace(), tokens(3));
        store(&KvCache::new(disk(home.path(), named(codec))).unwrap(), &namespace, &tokens);
        let cache = KvCache::new(disk(home.path(), named(codec))).unwrap();
        let (found, kv) = (cache.lookup(&namespace, &tokens).unwrap(), kv(tokens.len()));
        for layer in 0..2 {
            let view = found.layer(0, layer).unwrap();
            for side in [view.k, view.v] {
                let came = side.elements::<f32>().unwrap();
                assert!(came[..4 * ROW] == kv[..4 * ROW], "{codec}");
                assert!(came[4 * ROW..] != kv[4 * ROW..BLOCK_TOKENS * ROW], "{codec}: and the others do not");
            }
        }
    }
}

/// Of which nobody knows what is K and V: bytes of an engine, and entries by prefix text.
#[test]
fn what_a_lossy_codec_cannot_take_is_written_without_loss_for_everybody() {
    let home = tempfile::tempdir().unwrap();
    let values: Vec<u8> =
        kv(8 * BLOCK_TOKENS).iter().flat_map(|value| half::bf16::from_f32(*value).to_le_bytes()).collect();
    let opaque = Namespace::new("m", KvLayout::opaque(values.len() as u32, 8).unwrap());
    let chain = Chain::external(&opaque, &[[7; 32]]).unwrap();
    let integers = KvLayout::new(1, 1, values.len() as u32 / 16, DType::U8).unwrap().with_block_tokens(8).unwrap();
    let integers = Namespace::new("m", integers);
    let cache = KvCache::new(disk(home.path(), named("int4"))).unwrap();
    let simple = SimpleKvCache::over(cache.store_handle().clone(), "s");
    let view = TensorView::new(DType::BF16, &[1, 2, 8 * BLOCK_TOKENS, 32], &values).unwrap();
    let options = kvkeep::StoreOptions::default();
    assert_eq!(cache.store_blocks(&chain, 0, &[&values], &options).unwrap().stored_blocks, 1);
    let of_integers = Chain::of(&integers, &[1; 8]).unwrap();
    assert_eq!(cache.store_blocks(&of_integers, 0, &[&values], &options).unwrap().stored_blocks, 1);
    assert_eq!(simple.cache_kv("a prefix", 0, view, view).unwrap(), kvkeep::Outcome::Stored);
    cache.flush().unwrap();
    drop((cache, simple));
    let records = Archive::open(home.path(), None, 0).unwrap().records().to_vec();
    assert!(records.len() == 3 && records.iter().all(|record| record.codec == CodecId::LOSSLESS), "{records:?}");
    for codec in ["raw", "fp8"] {
        let cache = KvCache::new(disk(home.path(), named(codec))).unwrap();
        let simple = SimpleKvCache::over(cache.store_handle().clone(), "s");
        assert_eq!(cache.lookup_chain(&chain).cached_tokens(), 8);
        assert_eq!(cache.lookup_chain(&of_integers).cached_tokens(), 8);
        let hit = simple.get_cached_kv("a prefix", 0).unwrap().unwrap();
        assert!(hit.k().bytes() == values && hit.v().bytes() == values, "{codec}");
    }
}
