//! All layers of a prefix, against what people write first: a hash map of byte vectors.
//!
//! The baseline keys each layer by the SHA-256 of prefix and layer and copies K and V out, as
//! it must if callers may write into them. It has no lock, no cap and no counters, in its favour.

use std::collections::HashMap;
use std::hint::black_box;

use anyhow::{Context, Result, ensure};
use kvkeep::{CacheConfig, DType, LayerKv, SimpleKvCache, TensorView};
use sha2::{Digest, Sha256};

use super::{Bar, Effort, Figure, alternate, time};
use crate::texts::DOCUMENTS;

const LAYERS: usize = 32;
/// K, and V, of one layer: 128 KiB each, 8 MiB in all.
const DIMS: [usize; 4] = [1, 8, 64, 128];
const BYTES: usize = 64 * 8 * 128 * 2;

type Baseline = HashMap<String, (Vec<u8>, Vec<u8>)>;

pub(super) fn layers(effort: Effort) -> Result<Vec<Figure>> {
    let prefix = DOCUMENTS.first().context("there are documents")?.text;
    let kv = vec![7u8; BYTES];
    let view = TensorView::new(DType::F16, &DIMS, &kv)?;
    let cache = SimpleKvCache::open(CacheConfig::new(64 << 20))?;
    let mut baseline = Baseline::new();
    for layer in 0..LAYERS {
        let _ = cache.cache_all_layers(prefix, &[LayerKv { layer, k: view, v: view }])?;
        baseline.insert(key(prefix, layer), (kv.clone(), kv.clone()));
    }
    let mut out = vec![(vec![1u8; BYTES], vec![1u8; BYTES]); LAYERS];
    let [map, borrowed, copied] = alternate(
        effort.pick(41, 15),
        [
            &mut || time(|| Ok(black_box(copies(&baseline, prefix)?))),
            &mut || {
                time(|| {
                    let hit = cache.get_all_layers(prefix, LAYERS)?.context("what was stored was not found")?;
                    ensure!(hit.iter().all(|(k, v)| black_box(k.bytes()).len() == black_box(v.bytes()).len()));
                    Ok(())
                })
            },
            &mut || time(|| copy_out(&cache, prefix, &mut out)),
        ],
    )?
    .map(|seconds| seconds * 1e6);
    let against = "HashMap, copied out";
    Ok(vec![
        Figure::cost("32 layers by prefix, borrowed", borrowed, "µs", map, against).bar(Bar::AtMost(1.0 / 3.0)),
        Figure::cost("32 layers by prefix, copied out", copied, "µs", map, against),
    ])
}

fn key(prefix: &str, layer: usize) -> String {
    let digest = Sha256::new().chain_update(prefix).chain_update(layer.to_le_bytes()).finalize();
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn copies(baseline: &Baseline, prefix: &str) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    (0..LAYERS)
        .map(|layer| baseline.get(&key(prefix, layer)).cloned().context("what was stored was not found"))
        .collect()
}

/// Into memory that the caller keeps, as an engine does.
fn copy_out(cache: &SimpleKvCache, prefix: &str, out: &mut [(Vec<u8>, Vec<u8>)]) -> Result<()> {
    let hit = cache.get_all_layers(prefix, LAYERS)?.context("what was stored was not found")?;
    for ((k, v), (to_k, to_v)) in hit.iter().zip(out.iter_mut()) {
        to_k.copy_from_slice(k.bytes());
        to_v.copy_from_slice(v.bytes());
    }
    black_box(&out);
    Ok(())
}
