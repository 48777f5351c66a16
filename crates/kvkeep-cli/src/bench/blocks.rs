//! Copies into and out of blocks, with room and under eviction, and what a block costs besides.

use std::hint::black_box;

use anyhow::{Result, ensure};
use kvkeep::{CacheConfig, DType, KvCache, KvLayout, LayerView, Namespace, TensorView};

use super::{Bar, Effort, Figure, Tensors, alternate, namespace, prompt, time};
use crate::stats::float;

const BLOCK_TOKENS: usize = 64;
const GB: f64 = 1e9;

/// 2 MiB a block: 8 layers, 8 heads of 128, 64 tokens.
fn two_mib_blocks() -> Result<Namespace> {
    namespace(8, 8, 128, 64)
}

pub(super) fn copies(effort: Effort) -> Result<Vec<Figure>> {
    let namespace = two_mib_blocks()?;
    let tokens = prompt(0, BLOCK_TOKENS * effort.pick(32, 8));
    let (from, mut to) =
        (Tensors::new(namespace.layout(), tokens.len()), Tensors::new(namespace.layout(), tokens.len()));
    let mut target = Tensors::new(namespace.layout(), tokens.len());
    let bytes = from.bytes();
    let cache = KvCache::new(CacheConfig::new(2 * bytes as u64))?;
    let views = from.views()?;
    let mut into = target.views_mut()?;
    let layers = namespace.layout().layers();
    let [memcpy, store, load] = alternate(
        effort.pick(21, 9),
        [
            &mut || {
                time(|| {
                    to.copy_from(&from);
                    Ok(())
                })
            },
            &mut || {
                // Not `clear`: it gives the memory back, and a cache in use keeps its own.
                cache.remove(&namespace, &tokens)?;
                time(|| Ok(cache.store(&namespace, &tokens, &views)?))
            },
            &mut || {
                time(|| {
                    let found = cache.lookup(&namespace, &tokens)?;
                    ensure!(found.cached_tokens() == tokens.len(), "what was just stored was not found");
                    found.load(0..layers, &mut into)?;
                    black_box(&into);
                    Ok(())
                })
            },
        ],
    )?
    .map(|seconds| float(bytes) / GB / seconds);
    let figure = |name, rate| Figure::rate(name, rate, "GB/s", memcpy, "memcpy").bar(Bar::AtLeast(0.9));
    Ok(vec![figure("store into blocks of 2 MiB", store), figure("load out of blocks of 2 MiB", load)])
}

pub(super) fn eviction(effort: Effort) -> Result<Vec<Figure>> {
    const BLOCKS: usize = 8;
    let namespace = two_mib_blocks()?;
    let layout = namespace.layout();
    let (from, mut to) = (Tensors::new(layout, BLOCKS * BLOCK_TOKENS), Tensors::new(layout, BLOCKS * BLOCK_TOKENS));
    let views = from.views()?;
    let cache = KvCache::new(CacheConfig::new(4 * from.bytes() as u64))?;
    let mut number = 0;
    let mut store_new = || {
        number += 1;
        let tokens = prompt(number, BLOCKS * BLOCK_TOKENS);
        time(|| {
            let report = cache.store(&namespace, &tokens, &views)?;
            ensure!(report.stored_blocks == BLOCKS, "a full cache did not admit: {report:?}");
            Ok(())
        })
    };
    for _ in 0..8 {
        store_new()?;
    }
    let [memcpy, store] = alternate(
        effort.pick(41, 15),
        [
            &mut || {
                time(|| {
                    to.copy_from(&from);
                    Ok(())
                })
            },
            &mut store_new,
        ],
    )?;
    ensure!(cache.stats().evictions > 0, "nothing was evicted");
    let (blocks, gb) = (|seconds| float(BLOCKS) / seconds, |seconds| float(from.bytes()) / GB / seconds);
    Ok(vec![
        Figure::rate("store under eviction", blocks(store), "blocks/s", blocks(memcpy), "memcpy"),
        Figure::rate("store under eviction, bytes", gb(store), "GB/s", gb(memcpy), "memcpy"),
    ])
}

pub(super) fn index(_: Effort) -> Result<Vec<Figure>> {
    const BLOCKS: usize = 100_000;
    let layout = KvLayout::new(1, 1, 1, DType::U8)?.with_block_tokens(1)?;
    let namespace = Namespace::new("index", layout);
    // Each block takes a page, however small it is.
    let cache = KvCache::new(CacheConfig::new(BLOCKS as u64 * 4096))?;
    let kv = vec![1u8; BLOCKS];
    let view = TensorView::of(&kv, &[BLOCKS, 1, 1])?;
    let report = cache.store(&namespace, &prompt(0, BLOCKS), &[LayerView { k: view, v: view }])?;
    ensure!(report.stored_blocks == BLOCKS, "not all blocks were admitted: {report:?}");
    let stats = cache.stats();
    let count = |value: u64| usize::try_from(value).map(float);
    let bytes = count(stats.index_bytes)? / count(stats.entries)?;
    Ok(vec![
        Figure::cost("index memory at 100k blocks", bytes, "bytes/block", 128.0, "128 bytes").bar(Bar::AtMost(1.0)),
    ])
}
