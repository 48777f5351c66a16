//! The disk tier in a directory: storing and loading blocks of 2 MiB, and opening many.
//!
//! Both are measured as they are in service: the arena has been touched before, what is stored is
//! counted until `flush` has returned, and what is loaded was evicted from RAM by other blocks.
//! Files are read and written with direct I/O, so the machine's page cache has no part in it;
//! that of a virtual machine's host may.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kvkeep::{CacheConfig, DiskConfig, KvCache, Namespace, PolicyKind, TokenId};

use super::fio::{Direction, Reference};
use super::{Bar, Effort, Figure, Tensors, alternate, namespace, prompt, time};
use crate::stats::float;

/// 32 layers, 4 heads of 64, f16: 2 MiB.
const BLOCK_TOKENS: u32 = 64;
const BLOCK_BYTES: usize = 2 << 20;
/// Blocks of one prompt.
const PROMPT_BLOCKS: usize = 32;
/// Writes are counted in full, so nothing may be dropped.
const QUEUE_BYTES: u64 = 4 << 30;

/// Blocks that are opened: 64 KiB each.
const SMALL_BYTES: usize = 64 << 10;
const SMALL_PROMPT_BLOCKS: usize = 100;
const OPEN_BAR_MS: f64 = 100.0;
const NO_MANIFEST_BAR_MS: f64 = 2000.0;

/// Everything that is measured lies in a directory of its own, which goes at the end.
pub(super) fn figures(dir: &Path, effort: Effort) -> Result<Vec<Figure>> {
    let home = tempfile::Builder::new().prefix("kvkeep-bench-").tempdir_in(dir);
    let home = home.with_context(|| format!("cannot write into {}", dir.display()))?;
    let needed_bytes: u64 = if effort.quick { 2 << 30 } else { 10 << 30 };
    let free = rustix::fs::statvfs(home.path()).map(|stat| stat.f_bavail.saturating_mul(stat.f_frsize))?;
    ensure!(free >= needed_bytes, "{} has {free} bytes free: {needed_bytes} are needed", dir.display());
    let mut figures = blocks(home.path(), effort)?;
    figures.extend(opening(&home.path().join("many"), effort)?);
    let in_ram = CacheConfig::new(64 << 20).disk(DiskConfig::new(home.path().join("behind"), 1 << 30));
    figures.extend(super::hits::lookup_of_32k("lookup of 32k tokens in RAM, with a disk behind it", in_ram, effort)?);
    Ok(figures)
}

/// A cache with prompts that are stored and loaded in turn.
struct Bench {
    cache: KvCache,
    namespace: Namespace,
    tensors: Tensors,
    prompts: u32,
    next: u32,
}

impl Bench {
    fn open(dir: &Path, prompts: u32) -> Result<Self> {
        let namespace = namespace(32, 4, 64, BLOCK_TOKENS)?;
        ensure!(namespace.layout().block_bytes() == BLOCK_BYTES);
        let mut tensors = Tensors::new(namespace.layout(), PROMPT_BLOCKS * BLOCK_TOKENS as usize);
        tensors.scramble();
        // RAM for one round: the next one evicts it.
        let ram_bytes = u64::from(prompts) * tensors.bytes() as u64;
        let disk = DiskConfig::new(dir, 64 << 30).queue_bytes(QUEUE_BYTES);
        // The policy that keeps nothing of the last round: all of a load comes from the disk.
        let cache = KvCache::new(CacheConfig::new(ram_bytes).policy(PolicyKind::Lru).disk(disk))?;
        Ok(Self { cache, namespace, tensors, prompts, next: 0 })
    }

    fn tokens(number: u32) -> Vec<TokenId> {
        prompt(number, PROMPT_BLOCKS * BLOCK_TOKENS as usize)
    }

    /// One round of new blocks, until they are durable.
    fn store(&mut self) -> Result<Duration> {
        let first = self.next;
        self.next += self.prompts;
        time(|| {
            let layers = self.tensors.views()?;
            for number in first..self.next {
                let report = self.cache.store(&self.namespace, &Self::tokens(number), &layers)?;
                ensure!(report.stored_blocks == PROMPT_BLOCKS, "not all was stored: {report:?}");
            }
            Ok(self.cache.flush()?)
        })
    }

    /// One round of blocks that are on the disk and not in RAM.
    fn load(&mut self, first: u32) -> Result<Duration> {
        let before = self.read_bytes()?;
        let took = time(|| {
            for number in first..first + self.prompts {
                let found = self.cache.lookup(&self.namespace, &Self::tokens(number))?;
                ensure!(found.cached_tokens() == PROMPT_BLOCKS * BLOCK_TOKENS as usize, "what was stored is gone");
            }
            Ok(())
        })?;
        let (read, wanted) = (self.read_bytes()? - before, u64::from(self.prompts) * self.tensors.bytes() as u64);
        ensure!(read == wanted, "{read} of {wanted} bytes came from the disk: the rest was in RAM still");
        Ok(took)
    }

    fn read_bytes(&self) -> Result<u64> {
        Ok(self.cache.stats().tier("disk").context("there is a disk tier")?.read_bytes_total)
    }
}

fn blocks(dir: &Path, effort: Effort) -> Result<Vec<Figure>> {
    let prompts = u32::try_from(effort.pick(8, 2))?;
    let bytes = prompts as usize * PROMPT_BLOCKS * BLOCK_BYTES;
    let reference = Reference::new(dir, bytes)?;
    let mut bench = Bench::open(&dir.join("blocks"), prompts)?;
    let rounds = effort.pick(9, 3);
    let [one, four, store] = alternate(
        rounds,
        [&mut || reference.run(Direction::Write, 1), &mut || reference.run(Direction::Write, 4), &mut || bench.store()],
    )?
    .map(|seconds| float(bytes) / seconds / 1e9);
    let mut round = 0;
    let [read_one, read_four, load] = alternate(
        rounds,
        [&mut || reference.run(Direction::Read, 1), &mut || reference.run(Direction::Read, 4), &mut || {
            // Two sets of blocks take turns: each is evicted by the other.
            round += 1;
            bench.load(if round % 2 == 0 { 0 } else { prompts })
        }],
    )?
    .map(|seconds| float(bytes) / seconds / 1e9);
    let rate = |name: &str, value, reference, against| Figure::rate(name, value, "GB/s", reference, against);
    let names = ("disk store of 2 MiB blocks, flushed", "disk cold load of 2 MiB blocks");
    Ok(vec![
        rate(names.0, store, one, reference.name(1)).bar(Bar::AtLeast(0.9)),
        rate(names.0, store, four, reference.name(4)),
        rate(names.1, load, read_one, reference.name(1)),
        rate(names.1, load, read_four, reference.name(4)).bar(Bar::AtLeast(0.9)),
    ])
}

/// Opening a directory of many blocks, after a clean close and without its manifest.
fn opening(dir: &Path, effort: Effort) -> Result<Vec<Figure>> {
    let prompts = effort.pick(1000, 100);
    let blocks = prompts * SMALL_PROMPT_BLOCKS;
    fill(dir, prompts)?;
    let open = || -> Result<Duration> {
        let mut opened = None;
        let took = time(|| {
            opened = Some(KvCache::new(small_config(dir))?);
            Ok(())
        })?;
        let entries = opened.map_or(0, |cache| cache.stats().tier("disk").map_or(0, |disk| disk.entries));
        ensure!(entries == blocks as u64, "{entries} of {blocks} blocks were there after opening");
        Ok(took)
    };
    let manifest = dir.join("MANIFEST");
    let [with, without] = alternate(
        effort.pick(7, 3),
        [&mut || open(), &mut || {
            std::fs::remove_file(&manifest).context("there is no manifest to leave out")?;
            open()
        }],
    )?
    .map(|seconds| seconds * 1e3);
    // Promised of 100,000; fewer stand beside their share, which fixed costs do not know of.
    let share = float(blocks) / 1e5;
    let figure = |how: &str, ms, promised_ms: f64| {
        let figure =
            Figure::cost(format!("open {blocks} blocks of 64 KiB{how}"), ms, "ms", promised_ms * share, "promised");
        if effort.quick { figure } else { figure.bar(Bar::AtMost(1.0)) }
    };
    Ok(vec![figure("", with, OPEN_BAR_MS), figure(", no manifest", without, NO_MANIFEST_BAR_MS)])
}

fn small_config(dir: &Path) -> CacheConfig {
    CacheConfig::new(1 << 30).disk(DiskConfig::new(PathBuf::from(dir), 16 << 30).queue_bytes(QUEUE_BYTES))
}

fn fill(dir: &Path, prompts: usize) -> Result<()> {
    let namespace = namespace(8, 4, 64, 8)?;
    ensure!(namespace.layout().block_bytes() == SMALL_BYTES);
    let tokens = SMALL_PROMPT_BLOCKS * namespace.layout().block_tokens();
    let tensors = Tensors::new(namespace.layout(), tokens);
    let (layers, cache) = (tensors.views()?, KvCache::new(small_config(dir))?);
    for number in 0..prompts {
        let report = cache.store(&namespace, &prompt(u32::try_from(number)?, tokens), &layers)?;
        ensure!(report.stored_blocks == SMALL_PROMPT_BLOCKS, "not all was stored: {report:?}");
        if number % 50 == 49 {
            cache.flush()?;
        }
    }
    Ok(cache.flush()?)
}
