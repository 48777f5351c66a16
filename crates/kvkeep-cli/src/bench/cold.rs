//! Cold loads through codecs: blocks of real KV, on the disk and not in RAM, until they are decoded in RAM.
//!
//! Invariant: codecs take turns on the same disk, and each load comes from there: RAM holds one prompt, and the next one
//! evicts it. A disk that was written by one codec and read by the next was the alternative: then the page cache of the
//! machine below knows the one and not the other.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kvkeep::tiers::Codecs;
use kvkeep::{CacheConfig, Chain, DType, DiskConfig, KvCache, KvLayout, Namespace, PolicyKind, StoreOptions};
use serde::Serialize;

use super::sample::Sample;
use super::{alternate, time};
use crate::stats::{float, ratio};

const CODECS: [&str; 4] = ["raw", "lossless", "fp8", "int4"];

/// KV bytes a second (1e9), of all cores, until they are in RAM.
#[derive(Debug, Serialize)]
pub(super) struct ColdLoad {
    pub(super) codec: String,
    pub(super) load_gb_s: f64,
    /// By that of `raw`, in the same run.
    pub(super) against_raw: f64,
}

/// One codec's directory.
struct Disk {
    cache: KvCache,
    chains: Vec<Chain>,
}

impl Disk {
    /// Writes the blocks of a sample as those of so many prompts.
    fn filled(dir: &Path, codec: &str, layout: KvLayout, blocks: &[Vec<u8>], prompts: usize) -> Result<Self> {
        let prompt_bytes = (blocks.len() * layout.block_bytes()) as u64;
        let disk = DiskConfig::new(dir.join(codec), 64 << 30).codecs(Codecs::named(codec)?).queue_bytes(4 << 30);
        let cache = KvCache::new(CacheConfig::new(prompt_bytes * 3 / 2).policy(PolicyKind::Lru).disk(disk))?;
        let tokens: Vec<u32> = (0..u32::try_from(blocks.len() * layout.block_tokens())?).collect();
        let of_prompt = |number: usize| Namespace::new("m", layout).with_salt(number.to_string());
        let chains: Vec<Chain> =
            (0..prompts).map(|number| Chain::of(&of_prompt(number), &tokens)).collect::<kvkeep::Result<_>>()?;
        let views: Vec<&[u8]> = blocks.iter().map(Vec::as_slice).collect();
        for chain in &chains {
            let report = cache.store_blocks(chain, 0, &views, &StoreOptions::default())?;
            ensure!(report.stored_blocks == blocks.len(), "not all was stored: {report:?}");
            cache.flush()?;
        }
        Ok(Self { cache, chains })
    }

    fn load(&self) -> Result<Duration> {
        let read = |cache: &KvCache| Ok::<_, anyhow::Error>(cache.stats().tier("disk").context("a disk")?.hits);
        let before = read(&self.cache)?;
        let took = time(|| {
            for chain in &self.chains {
                ensure!(self.cache.lookup_chain(chain).blocks() == chain.blocks(), "what was stored is gone");
            }
            Ok(())
        })?;
        let blocks: usize = self.chains.iter().map(Chain::blocks).sum();
        ensure!(read(&self.cache)? - before == blocks as u64, "a part was in RAM still");
        Ok(took)
    }
}

/// In a directory of its own in `dir`, which goes at the end.
pub(super) fn loads(dir: &Path, sample: &Sample, own: &KvLayout, quick: bool) -> Result<Vec<ColdLoad>> {
    let dim = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
    let layout = KvLayout::new(dim(own.layers()), dim(own.kv_heads()), dim(own.k_head_dim()), DType::BF16)?;
    let layout = layout.with_block_tokens(dim(own.block_tokens()))?;
    let bytes = sample.bytes();
    let blocks: Vec<Vec<u8>> = bytes.chunks_exact(layout.block_bytes()).map(<[u8]>::to_vec).collect();
    let (prompts, rounds) = if quick { (3, 3) } else { (8, 7) };
    let home = tempfile::Builder::new().prefix("kvkeep-bench-").tempdir_in(dir);
    let home = home.with_context(|| format!("cannot write into {}", dir.display()))?;
    let filled = |codec| Disk::filled(home.path(), codec, layout, &blocks, prompts);
    let disks: Vec<Disk> = CODECS.iter().map(|codec| filled(codec)).collect::<Result<_>>()?;
    let [raw, lossless, fp8, int4] = disks.as_slice() else { anyhow::bail!("four codecs") };
    let seconds =
        alternate(rounds, [&mut || raw.load(), &mut || lossless.load(), &mut || fp8.load(), &mut || int4.load()])?;
    let [raw_s, ..] = seconds;
    let all = float(prompts * blocks.len() * layout.block_bytes());
    let row = |(codec, seconds): (&str, f64)| ColdLoad {
        codec: codec.to_owned(),
        load_gb_s: all / seconds / 1e9,
        against_raw: ratio(raw_s, seconds),
    };
    Ok(CODECS.into_iter().zip(seconds).map(row).collect())
}
