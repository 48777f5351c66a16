//! `QuantizedKvCache`: the calls of `SimpleKvCache`, in fewer bytes and within the codec's error.

#![expect(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test that panics fails")]

use kvkeep::tiers::{Codecs, Side};
use kvkeep::{
    CacheConfig, DType, DiskConfig, Error, LayerKv, Outcome, Prefix, QuantizedKvCache, Quantizer, SimpleKvCache, Store,
    TensorView, TokenOrder,
};
use proptest::prelude::*;

const DIMS: [usize; 4] = [1, 3, 128, 32];
const COUNT: usize = 3 * 128 * 32;

fn values(seed: usize) -> Vec<f32> {
    (0..COUNT).map(|at| ((at + seed * 77) as f32 * 0.7313).sin() + (at % 32) as f32 / 3.0).collect()
}

fn view(values: &[f32]) -> TensorView<'_> {
    TensorView::of(values, &DIMS).unwrap()
}

fn cache(codec: &str) -> QuantizedKvCache {
    QuantizedKvCache::with_max_size_gib(0.01, codec).unwrap()
}

fn difference(one: TensorView<'_>, other: &[f32]) -> f32 {
    assert_eq!(one.shape().dims(), DIMS);
    one.elements::<f32>().unwrap().iter().zip(other).map(|(one, other)| (one - other).abs()).fold(0.0, f32::max)
}

#[test]
fn every_codec_gives_back_what_was_stored_within_its_error_and_in_fewer_bytes() {
    let (k, v) = (values(1), values(2));
    let most = [("raw", 0.0, 0.9), ("lossless", 0.0, 1.0), ("int8", 0.03, 2.0), ("int4", 0.5, 2.5), ("fp8", 0.7, 2.0)];
    for (codec, error, ratio) in most.into_iter().chain([("k8v4", 0.5, 2.3), ("nf4", 1.8, 2.5)]) {
        let cache = cache(codec);
        assert_eq!(cache.cache_kv("a prefix", 3, view(&k), view(&v)).unwrap(), Outcome::Stored);
        let (found_k, found_v) = cache.get_cached_kv("a prefix", 3).unwrap().unwrap();
        let differences = [difference(found_k.view(), &k), difference(found_v.view(), &v)];
        assert!(differences.iter().all(|difference| *difference <= error), "{codec}: {differences:?}");
        let measured = cache.measure_quantization_error(view(&k), view(&v));
        assert!(measured.ratio > ratio, "{codec}: {measured:?}");
        assert_eq!([measured.k.max as f32, measured.v.max as f32], differences, "{codec}");
        assert!(measured.k.mean <= measured.k.max && measured.k.relative < 0.1, "{codec}: {measured:?}");
        let used = cache.get_stats().used_bytes as f64;
        assert!(used < 2.0 * 4.0 * COUNT as f64 / ratio + 8192.0, "{codec}: {used}");
        assert!(cache.get_cached_kv("a prefix", 2).unwrap().is_none());
    }
}

#[test]
fn the_first_and_the_most_recent_tokens_come_back_exactly() {
    let mut k = values(1);
    // As sinks are: far from all others. They must not take the codes of the rest, either.
    k[..32].fill(900.0);
    let cache = cache("int4");
    let _ = cache.cache_kv("p", 0, view(&k), view(&k)).unwrap();
    let (found, _) = cache.get_cached_kv("p", 0).unwrap().unwrap();
    let found = found.view();
    let came = found.elements::<f32>().unwrap();
    for (at, (one, other)) in came.iter().zip(&k).enumerate() {
        let token = at / 32 % 128;
        let most = if (4..96).contains(&token) { 0.5 } else { 0.0 };
        assert!((one - other).abs() <= most, "token {token}: {other} came as {one}");
    }
    let all = Quantizer::named("int4").unwrap().exact_tokens(0, 0).measure_quantization_error(view(&k), view(&k));
    assert!(all.k.max > 1.0, "without it they do: {all:?}");
}

#[test]
fn tokens_and_texts_are_prefixes_and_neither_stands_for_the_other() {
    let cache = cache("int8");
    let (one, other) = (values(1), values(2));
    let tokens = vec![1u32, 22, 333];
    let _ = cache.cache_kv(&tokens, 0, view(&one), view(&one)).unwrap();
    let (found, _) = cache.get_cached_kv(&tokens[..], 0).unwrap().unwrap();
    assert!(difference(found.view(), &one) < 0.1);
    for missing in [vec![1u32, 22, 3333], vec![1, 2, 2, 333], vec![1, 22], vec![122, 333]] {
        assert!(cache.get_cached_kv(&missing, 0).unwrap().is_none(), "{missing:?}");
    }
    let looks_like = Prefix::from(&tokens).text().unwrap().into_owned();
    assert!(cache.get_cached_kv(&looks_like, 0).unwrap().is_none());
    let _ = cache.cache_kv(&looks_like, 0, view(&other), view(&other)).unwrap();
    let (found, _) = cache.get_cached_kv(&tokens, 0).unwrap().unwrap();
    assert!(difference(found.view(), &one) < 0.1);
    assert_eq!(cache.evict(&tokens, None).unwrap().layers, [0]);
    assert!(cache.get_cached_kv(&tokens, 0).unwrap().is_none());
    assert!(matches!(cache.get_cached_kv(&[], 0), Err(Error::EmptyTokens)));
    assert!(matches!(cache.get_cached_kv("", 0), Err(Error::EmptyPrefix)));
}

#[test]
fn all_layers_are_stored_and_found_together() {
    let cache = cache("nf4");
    let all: Vec<Vec<f32>> = (0..4).map(values).collect();
    let layers: Vec<LayerKv<'_>> =
        (0..4).map(|layer| LayerKv { layer, k: view(&all[layer]), v: view(&all[0]) }).collect();
    assert_eq!(cache.cache_all_layers("a prefix", &layers).unwrap(), Outcome::Stored);
    let found = cache.get_all_layers("a prefix", 4).unwrap().unwrap();
    assert!(found.iter().zip(&all).all(|((k, _), all)| difference(k.view(), all) < 1.8));
    assert!(cache.get_all_layers("a prefix", 5).unwrap().is_none());
    assert_eq!(cache.longest_prefix("a prefix of more"), Some("a prefix"));
    assert!(cache.clear().entries == 4 && cache.get_all_layers("a prefix", 4).unwrap().is_none());
    let empty = TensorView::of::<f32>(&[], &[1, 0, 4]).unwrap();
    assert!(matches!(cache.cache_kv("p", 0, empty, empty), Err(Error::EmptyTensor(_))));
    assert!(matches!(QuantizedKvCache::with_max_size_gib(0.1, "zip"), Err(Error::Config(_))));
}

/// A hit of it is bytes, or another codec's numbers.
#[test]
fn no_other_door_over_the_same_store_finds_what_is_quantized() {
    let store = Store::new(CacheConfig::new(16 << 20)).unwrap();
    let over = |codec: &str| QuantizedKvCache::over(store.clone(), "default", Quantizer::named(codec).unwrap());
    let (int4, fp8, simple) = (over("int4"), over("fp8"), SimpleKvCache::over(store.clone(), "default"));
    let (one, other) = (values(1), values(2));
    let _ = int4.cache_kv("p", 0, view(&one), view(&one)).unwrap();
    assert!(simple.get_cached_kv("p", 0).unwrap().is_none() && fp8.get_cached_kv("p", 0).unwrap().is_none());
    let _ = simple.cache_kv("p", 0, view(&other), view(&other)).unwrap();
    let (found, _) = int4.get_cached_kv("p", 0).unwrap().unwrap();
    assert!(difference(found.view(), &one) < 0.5);
    assert!(difference(simple.get_cached_kv("p", 0).unwrap().unwrap().k(), &other) == 0.0);
    assert_eq!(int4.clear().entries, 1);
    assert!(simple.get_cached_kv("p", 0).unwrap().is_some());
}

#[test]
fn it_is_warm_after_a_restart() {
    let home = tempfile::tempdir().unwrap();
    let open = || {
        let disk = DiskConfig::new(home.path(), 16 << 20).codecs(Codecs::named("lossless").unwrap());
        QuantizedKvCache::open(CacheConfig::new(1 << 20).disk(disk), Quantizer::named("int4").unwrap()).unwrap()
    };
    let k = values(5);
    let _ = open().cache_kv(&[1, 2, 3], 0, view(&k), view(&k)).unwrap();
    let (found, _) = open().get_cached_kv(&[1, 2, 3], 0).unwrap().unwrap();
    assert!(difference(found.view(), &k) < 0.5);
}

#[test]
fn tensors_of_any_shape_and_dtype_come_back_and_those_of_integers_exactly() {
    let bytes: Vec<u8> = (0..96u32).flat_map(|at| (at * 3).to_le_bytes()).collect();
    for dtype in DType::ALL {
        let elements = bytes.len() / dtype.size_bytes();
        for dims in [vec![elements], vec![elements / 4, 4], vec![1, elements / 8, 2, 4], vec![2, 1, 1, elements / 4, 2]]
        {
            let tensor = TensorView::new(dtype, &dims, &bytes).unwrap();
            for (codec, order) in
                Codecs::names().into_iter().zip([TokenOrder::TokenHeadDim, TokenOrder::HeadTokenDim].iter().cycle())
            {
                let quantizer = Quantizer::named(codec).unwrap().order(*order).exact_tokens(1, 0);
                let came = quantizer.decode(&quantizer.encode(Side::V, tensor, 9)).unwrap();
                assert_eq!((came.view().dtype(), came.view().shape().dims()), (dtype, &dims[..]));
                let is_float = matches!(dtype, DType::F32 | DType::F16 | DType::BF16);
                assert!(is_float || came.view().bytes() == bytes, "{codec} {dtype} {dims:?}");
            }
        }
    }
}

proptest! {
    #[test]
    fn damaged_entries_are_none_or_another_tensor_and_never_a_panic(
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in any::<prop::sample::Index>(),
    ) {
        let values: Vec<f32> = values(3)[..2048].to_vec();
        for codec in ["lossless", "int4", "nf4", "fp8"] {
            let quantizer = Quantizer::named(codec).unwrap();
            let mut stored = quantizer.encode(Side::K, TensorView::of(&values, &[1, 2, 64, 16]).unwrap(), 0);
            for (at, byte) in &flips {
                let at = at.index(stored.len());
                stored[at] = *byte;
            }
            stored.truncate(cut.index(stored.len() + 1));
            let _ = quantizer.decode(&stored);
        }
    }
}
