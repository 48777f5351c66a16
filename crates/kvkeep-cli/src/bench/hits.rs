//! Finding and borrowing what is in RAM.

use std::hint::black_box;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use kvkeep::{CacheConfig, KvCache, Namespace, TokenId};

use super::{Bar, Effort, Figure, Tensors, alternate, namespace, prompt, time};
use crate::stats::float;

const THREADS: [usize; 4] = [1, 2, 4, 8];

/// A prompt of one block in a cache, ready to be hit.
struct Hit {
    cache: KvCache,
    namespace: Namespace,
    tokens: Vec<TokenId>,
}

impl Hit {
    fn new(namespace: Namespace) -> Result<Self> {
        let layout = *namespace.layout();
        let cache = KvCache::new(CacheConfig::new(4 * layout.block_bytes().max(1 << 16) as u64))?;
        let tokens = prompt(0, layout.block_tokens());
        let _ = cache.store(&namespace, &tokens, &Tensors::new(&layout, tokens.len()).views()?)?;
        let hit = Self { cache, namespace, tokens };
        ensure!(hit.hit()? > 0, "the block just stored was not found");
        Ok(hit)
    }

    /// Hashes the prompt, finds and pins its block, borrows K and V, and lets go.
    fn hit(&self) -> Result<usize> {
        let found = self.cache.lookup(&self.namespace, &self.tokens)?;
        if found.is_empty() {
            return Ok(0);
        }
        let layer = found.layer(0, 0)?;
        Ok(black_box(layer.k.bytes()).len() + black_box(layer.v.bytes()).len())
    }

    fn times(&self, times: usize) -> Result<Duration> {
        time(|| {
            let mut bytes = 0;
            for _ in 0..times {
                bytes += self.hit()?;
            }
            Ok(bytes)
        })
    }
}

pub(super) fn zero_copy(effort: Effort) -> Result<Vec<Figure>> {
    let small = Hit::new(namespace(2, 4, 8, 16)?)?;
    let large = Hit::new(namespace(32, 16, 128, 16)?)?;
    let times = effort.pick(20_000, 5_000);
    let [small_ns, large_ns] = alternate(effort.pick(21, 9), [&mut || small.times(times), &mut || large.times(times)])?
        .map(|seconds| seconds * 1e9 / float(times));
    let one_us = |name, ns| Figure::cost(name, ns, "ns", 1000.0, "1 µs").bar(Bar::AtMost(1.0));
    Ok(vec![
        one_us("hit, borrowed, block of 4 KiB", small_ns),
        one_us("hit, borrowed, block of 4 MiB", large_ns),
        Figure::cost("hit of 4 MiB against 4 KiB", large_ns, "ns", small_ns, "block of 4 KiB").bar(Bar::AtMost(1.2)),
    ])
}

pub(super) fn long_lookup(effort: Effort) -> Result<Vec<Figure>> {
    lookup_of_32k("lookup of 32k tokens, 512 blocks, all hits", CacheConfig::new(64 << 20), effort)
}

pub(super) fn lookup_of_32k(name: &str, config: CacheConfig, effort: Effort) -> Result<Vec<Figure>> {
    const TOKENS: usize = 32 * 1024;
    let namespace = namespace(1, 1, 8, 64)?;
    let tokens = prompt(0, TOKENS);
    let cache = KvCache::new(config)?;
    let _ = cache.store(&namespace, &tokens, &Tensors::new(namespace.layout(), TOKENS).views()?)?;
    let cached = cache.lookup(&namespace, &tokens)?.cached_tokens();
    ensure!(cached == TOKENS, "{cached} of {TOKENS} tokens were found");
    let [seconds] =
        alternate(effort.pick(201, 51), [&mut || time(|| Ok(black_box(cache.lookup(&namespace, &tokens)?)))])?;
    Ok(vec![Figure::cost(name, seconds * 1e3, "ms", 0.3, "0.3 ms").bar(Bar::AtMost(1.0))])
}

pub(super) fn threads(effort: Effort) -> Result<Vec<Figure>> {
    let hit = Hit::new(namespace(8, 8, 128, 64)?)?;
    let times = effort.pick(40_000, 10_000);
    let run = |threads: usize| -> Result<Duration> {
        let start = Barrier::new(threads + 1);
        std::thread::scope(|scope| {
            let work = || {
                start.wait();
                hit.times(times).map(drop)
            };
            let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            start.wait();
            let begin = Instant::now();
            for worker in workers {
                worker.join().map_err(|_| anyhow::anyhow!("a measuring thread panicked"))??;
            }
            Ok(begin.elapsed())
        })
    };
    let mut runs = THREADS.map(|threads| move || run(threads));
    let [one, two, four, eight] = &mut runs;
    let seconds = alternate(effort.pick(11, 5), [one, two, four, eight])?;
    let rates = THREADS.iter().zip(seconds).map(|(threads, s)| (*threads, float(threads * times) / s / 1e6));
    let (_, single) = rates.clone().next().unwrap_or_default();
    let figure = |(threads, rate)| {
        Figure::rate(format!("hits of 2 MiB blocks, threads: {threads}"), rate, "million/s", single, "1 thread")
    };
    Ok(rates.map(figure).collect())
}
