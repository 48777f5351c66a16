//! Mixed load at twice the disk tier's cap, for as long as asked for, every byte checked.
//!
//! `soak DIR SECONDS`: rounds of threads that store, look up, replace, remove and let expire
//! through both front doors and several namespaces, with flushes in between. Between two rounds
//! the cache is flushed, listed, closed, opened and listed again: what was there before may be
//! missing only as far as the disk tier counts evictions meanwhile. Memory and the directory's
//! size are for somebody outside to watch: `make soak` does. Prints one JSON object of counts;
//! fails at the first wrong byte, and wherever a promise is broken.
//!
//! Contents follow from keys and versions, so that any hit can be checked without a second copy.

#![allow(clippy::cast_possible_truncation, clippy::allow_attributes, reason = "numbers here are small")]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvkeep::{
    CacheConfig, DType, DiskConfig, KvCache, KvLayout, LayerKv, LayerView, Namespace, Outcome, SimpleKvCache, Stats,
    Store, StoreOptions, TensorView,
};

type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

const RAM_BYTES: u64 = 48 << 20;
const DISK_BYTES: u64 = 192 << 20;
const ROUND: Duration = Duration::from_secs(15);

const NAMESPACES: u32 = 3;
/// 32 KiB a block, 8 to 39 blocks a prompt: with the named entries twice the disk tier's cap.
const PROMPTS: u32 = 140;
const BLOCK_TOKENS: usize = 16;
const LAYERS: usize = 4;
/// K or V of one layer of a token: 2 heads of 32 elements.
const DIMS: [usize; 2] = [2, 32];

const NAMED_CACHES: u32 = 2;
const PREFIXES: u32 = 96;
const NAMED_LAYERS: usize = 8;
/// K of one layer of a named entry is 24 KiB, V as well.
const NAMED_ELEMENTS: usize = 6 << 10;
const SHORT_TTL: Duration = Duration::from_secs(3);

/// What happened, for the summary.
#[derive(Debug, Default)]
struct Counts {
    lookups: AtomicU64,
    hits: AtomicU64,
    stores: AtomicU64,
    removals: AtomicU64,
    expired: AtomicU64,
    flushes: AtomicU64,
    checked_bytes: AtomicU64,
    kept: AtomicU64,
    evicted: AtomicU64,
}

/// What the one thread that uses a prefix knows of it.
#[derive(Debug, Clone, Copy, Default)]
struct Known {
    version: u32,
    /// Nothing may be found any more.
    gone: bool,
    expires: Option<Instant>,
}

/// An open cache with both doors.
struct Doors {
    tokens: KvCache,
    named: Vec<SimpleKvCache>,
    namespaces: Vec<Namespace>,
}

/// A small, quick generator.
struct Random(u64);

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let (Some(dir), Some(seconds)) = (args.next(), args.next()) else {
        return Err("usage: soak DIR SECONDS".into());
    };
    let end = Instant::now() + Duration::from_secs(seconds.parse()?);
    let (dir, counts) = (PathBuf::from(dir), Counts::default());
    let mut known: Vec<HashMap<u32, Known>> = (0..NAMED_CACHES).map(|_| HashMap::new()).collect();
    let mut doors = Doors::open(&dir)?;
    let mut rounds = 0u64;
    while Instant::now() < end {
        let stop = end.min(Instant::now() + ROUND);
        round(&doors, &counts, &mut known, stop, rounds)?;
        doors = restart(doors, &dir, &counts, &known)?;
        rounds += 1;
    }
    let stats = doors.stats();
    let disk = stats.tier("disk").ok_or("there is a disk tier")?;
    let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
    println!(
        "{{\"rounds\":{rounds},\"lookups\":{},\"hits\":{},\"stores\":{},\"removals\":{},\"expired\":{},\"flushes\":{},\
         \"checked_bytes\":{},\"kept_over_restarts\":{},\"evicted_meanwhile\":{},\"disk_used_bytes\":{},\
         \"ram_capacity_bytes\":{RAM_BYTES},\"disk_capacity_bytes\":{DISK_BYTES}}}",
        get(&counts.lookups),
        get(&counts.hits),
        get(&counts.stores),
        get(&counts.removals),
        get(&counts.expired),
        get(&counts.flushes),
        get(&counts.checked_bytes),
        get(&counts.kept),
        get(&counts.evicted),
        disk.used_bytes,
    );
    Ok(())
}

/// All threads until `stop`.
fn round(doors: &Doors, counts: &Counts, known: &mut [HashMap<u32, Known>], stop: Instant, number: u64) -> Result<()> {
    let failed = AtomicBool::new(false);
    let failed = &failed;
    let going = || Instant::now() < stop && !failed.load(Ordering::Relaxed);
    let outcomes: Vec<Result<()>> = std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for seed in 0..3 {
            let mut random = Random::new(number * 16 + seed);
            threads.push(scope.spawn(move || while_going(&going, || doors.token_step(&mut random, counts))));
        }
        for (which, (cache, known)) in (0..).zip(doors.named.iter().zip(known)) {
            let mut random = Random::new(number * 16 + 8 + u64::from(which));
            threads.push(
                scope.spawn(move || while_going(&going, || named_step(which, cache, known, &mut random, counts))),
            );
        }
        threads.push(scope.spawn(move || while_going(&going, || doors.watch_step(counts))));
        let ended = threads.into_iter().map(|thread| {
            let outcome = thread.join().unwrap_or_else(|_| Err("a thread panicked".into()));
            failed.fetch_or(outcome.is_err(), Ordering::Relaxed);
            outcome
        });
        ended.collect()
    });
    outcomes.into_iter().collect()
}

fn while_going(going: &impl Fn() -> bool, mut step: impl FnMut() -> Result<()>) -> Result<()> {
    while going() {
        step()?;
    }
    Ok(())
}

/// Flushes, lists, closes, opens, lists: nothing flushed is lost that was not evicted.
fn restart(doors: Doors, dir: &Path, counts: &Counts, known: &[HashMap<u32, Known>]) -> Result<Doors> {
    let before_evictions = evictions(&doors)?;
    doors.tokens.flush()?;
    let before = doors.list(known, counts)?;
    // Listing moves entries between RAM and disk.
    doors.tokens.flush()?;
    let meanwhile = evictions(&doors)? - before_evictions;
    drop(doors);
    let doors = Doors::open(dir)?;
    doors.check_stats()?;
    let after = doors.list(known, counts)?;
    let meanwhile = meanwhile + evictions(&doors)?;
    let lost = before.iter().filter(|(entry, blocks)| after.get(*entry).is_none_or(|now| now < *blocks)).count() as u64;
    if lost > meanwhile {
        return Err(
            format!("{lost} flushed entries are gone after a restart, {meanwhile} were evicted meanwhile").into()
        );
    }
    counts.kept.fetch_add(before.len() as u64 - lost, Ordering::Relaxed);
    counts.evicted.fetch_add(lost, Ordering::Relaxed);
    Ok(doors)
}

fn evictions(doors: &Doors) -> Result<u64> {
    Ok(doors.stats().tier("disk").ok_or("there is a disk tier")?.evictions)
}

impl Doors {
    fn open(dir: &Path) -> Result<Self> {
        // Through and back: what is queued and dropped is flushed from RAM.
        let disk = DiskConfig::new(dir, DISK_BYTES).read_timeout(Duration::from_secs(60));
        let store = Store::new(CacheConfig::new(RAM_BYTES).disk(disk))?;
        let layout = KvLayout::new(LAYERS as u32, DIMS[0] as u32, DIMS[1] as u32, DType::F32)?
            .with_block_tokens(BLOCK_TOKENS as u32)?;
        let namespaces = (0..NAMESPACES).map(|number| Namespace::new("soak", layout).with_salt(number.to_string()));
        Ok(Self {
            named: (0..NAMED_CACHES).map(|number| SimpleKvCache::over(store.clone(), &number.to_string())).collect(),
            tokens: KvCache::over(store),
            namespaces: namespaces.collect(),
        })
    }

    fn stats(&self) -> Stats {
        self.tokens.stats()
    }

    /// Caps as the cache itself counts them, and that the disk did not fail.
    fn check_stats(&self) -> Result<()> {
        let stats = self.stats();
        let disk = stats.tier("disk").ok_or("there is a disk tier")?;
        let over = stats.used_bytes > stats.capacity_bytes || disk.used_bytes > disk.capacity_bytes;
        let failed = disk.failing || disk.damaged_total + disk.read_errors_total + disk.write_errors_total > 0;
        if over || failed { Err(format!("over a cap, or a failing disk: {stats:?}").into()) } else { Ok(()) }
    }

    /// A few flushes, while all others go on.
    fn watch_step(&self, counts: &Counts) -> Result<()> {
        self.check_stats()?;
        std::thread::sleep(Duration::from_millis(200));
        if counts.flushes.fetch_add(1, Ordering::Relaxed).is_multiple_of(10) {
            self.tokens.flush()?;
        }
        Ok(())
    }

    fn token_step(&self, random: &mut Random, counts: &Counts) -> Result<()> {
        let (which, number) = (random.below(NAMESPACES), random.below(PROMPTS));
        let namespace = self.namespaces.get(which as usize).ok_or("no such namespace")?;
        let tokens = tokens(number);
        match random.below(100) {
            0..60 => {
                let found = self.tokens.lookup(namespace, &tokens)?;
                counts.lookups.fetch_add(1, Ordering::Relaxed);
                counts.hits.fetch_add(u64::from(!found.is_empty()), Ordering::Relaxed);
                for block in 0..found.blocks() {
                    for layer in 0..LAYERS {
                        let LayerView { k, v } = found.layer(block, layer)?;
                        let seed = |side| block_seed(which, number, block, layer, side);
                        check(k, seed(0), counts)?;
                        check(v, seed(1), counts)?;
                    }
                }
            }
            60..97 => self.store_prompt(which, number, random, counts)?,
            97..99 => {
                let _ = self.tokens.remove(namespace, &tokens)?;
                counts.removals.fetch_add(1, Ordering::Relaxed);
            }
            _ if random.below(40) == 0 => {
                let _ = self.tokens.clear_namespace(namespace);
                counts.removals.fetch_add(1, Ordering::Relaxed);
            }
            _ => drop(self.tokens.prefetch(namespace, &tokens)?),
        }
        Ok(())
    }

    fn store_prompt(&self, which: u32, number: u32, random: &mut Random, counts: &Counts) -> Result<()> {
        let namespace = self.namespaces.get(which as usize).ok_or("no such namespace")?;
        let tokens = tokens(number);
        let blocks = tokens.len() / BLOCK_TOKENS;
        let made: Vec<[Vec<f32>; 2]> = (0..LAYERS)
            .map(|layer| {
                [0, 1].map(|side| {
                    let of = |block| values(block_seed(which, number, block, layer, side)).take(block_elements());
                    (0..blocks).flat_map(of).collect()
                })
            })
            .collect();
        let dims = [tokens.len(), DIMS[0], DIMS[1]];
        let view = |elements| TensorView::of::<f32>(elements, &dims);
        let layers =
            made.iter().map(|[k, v]| Ok(LayerView { k: view(k)?, v: view(v)? })).collect::<Result<Vec<_>>>()?;
        let mut options = StoreOptions::default();
        if expires(number) {
            options = options.ttl(SHORT_TTL);
        }
        // Part of them as a prompt that has grown: only the new blocks are given.
        let first = if random.below(4) == 0 { tokens.len() / 2 / BLOCK_TOKENS * BLOCK_TOKENS } else { 0 };
        let tail = layers.iter().map(|layer| tail_of(layer, first, &dims)).collect::<Result<Vec<_>>>()?;
        let _ = self.tokens.store_from(namespace, &tokens, first, &tail, &options)?;
        counts.stores.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Everything that is there and does not expire: how many blocks, or a whole named entry.
    fn list(&self, known: &[HashMap<u32, Known>], counts: &Counts) -> Result<HashMap<(u32, u32), usize>> {
        let mut there = HashMap::new();
        for (which, namespace) in (0..).zip(&self.namespaces) {
            for number in (0..PROMPTS).filter(|number| !expires(*number)) {
                let look = self.tokens.look(namespace, &tokens(number))?;
                let found = look.worth_tokens() + look.not_worth_tokens;
                if found > 0 {
                    there.insert((which, number), found);
                }
            }
        }
        for (which, (cache, known)) in (0..).zip(self.named.iter().zip(known)) {
            for (number, known) in known.iter().filter(|(number, _)| !expires(**number)) {
                if read_named(which, cache, *number, known, counts)? {
                    there.insert((NAMESPACES + which, *number), NAMED_LAYERS);
                }
            }
        }
        Ok(there)
    }
}

/// The thread of a named cache is the only one that changes it, so it knows what it must find.
fn named_step(
    which: u32,
    cache: &SimpleKvCache,
    known: &mut HashMap<u32, Known>,
    random: &mut Random,
    counts: &Counts,
) -> Result<()> {
    let number = random.below(PREFIXES);
    let entry = known.entry(number).or_default();
    let lives = entry.expires.is_some_and(|at| Instant::now() < at + Duration::from_secs(1));
    match random.below(100) {
        // What is to expire is let expire, and looked for then.
        60..96 if lives => drop(read_named(which, cache, number, entry, counts)?),
        0..60 => drop(read_named(which, cache, number, entry, counts)?),
        60..96 => {
            let version = entry.version + 1;
            let made: Vec<[Vec<f32>; 2]> = (0..NAMED_LAYERS)
                .map(|layer| {
                    [0, 1].map(|side| {
                        values(named_seed(which, number, version, layer, side)).take(NAMED_ELEMENTS).collect()
                    })
                })
                .collect();
            let view = |elements| TensorView::of::<f32>(elements, &[1, NAMED_ELEMENTS]);
            let layers = made.iter().enumerate();
            let layers = layers.map(|(layer, [k, v])| Ok(LayerKv { layer, k: view(k)?, v: view(v)? }));
            let layers = layers.collect::<Result<Vec<_>>>()?;
            let ttl = expires(number).then_some(SHORT_TTL);
            let options = ttl.map_or_else(StoreOptions::default, |ttl| StoreOptions::default().ttl(ttl));
            // What cannot be admitted leaves the old one in its place.
            if cache.cache_all_layers_with(&prefix(number), &layers, &options)? == Outcome::Stored {
                *entry = Known { version, gone: false, expires: ttl.map(|ttl| Instant::now() + ttl) };
            }
            counts.stores.fetch_add(1, Ordering::Relaxed);
        }
        _ => {
            let _ = cache.evict(&prefix(number), None)?;
            entry.gone = true;
            counts.removals.fetch_add(1, Ordering::Relaxed);
        }
    }
    Ok(())
}

/// A hit is the last version stored, whole, or there is none.
fn read_named(which: u32, cache: &SimpleKvCache, number: u32, known: &Known, counts: &Counts) -> Result<bool> {
    // Before the lookup: what has expired by now cannot be found any more.
    let expired = known.expires.is_some_and(|at| Instant::now() > at + Duration::from_millis(50));
    let found = cache.get_all_layers(&prefix(number), NAMED_LAYERS)?;
    counts.lookups.fetch_add(1, Ordering::Relaxed);
    counts.expired.fetch_add(u64::from(expired), Ordering::Relaxed);
    let Some(found) = found else { return Ok(false) };
    if known.gone || expired || known.version == 0 {
        return Err(format!("found prefix {number}, which is gone: {known:?}").into());
    }
    counts.hits.fetch_add(1, Ordering::Relaxed);
    for (layer, (k, v)) in found.iter().enumerate() {
        check(k, named_seed(which, number, known.version, layer, 0), counts)?;
        check(v, named_seed(which, number, known.version, layer, 1), counts)?;
    }
    Ok(true)
}

/// From token `first` on.
fn tail_of<'a>(layer: &LayerView<'a>, first: usize, dims: &[usize; 3]) -> Result<LayerView<'a>> {
    let tail = |view: TensorView<'a>| -> Result<TensorView<'a>> {
        let rest = view.bytes().get(first * DIMS[0] * DIMS[1] * 4..).ok_or("no such token")?;
        Ok(TensorView::new(DType::F32, &[dims[0] - first, dims[1], dims[2]], rest)?)
    };
    Ok(LayerView { k: tail(layer.k)?, v: tail(layer.v)? })
}

fn check(found: TensorView<'_>, seed: u64, counts: &Counts) -> Result<()> {
    let elements = found.elements::<f32>()?;
    if elements.iter().zip(values(seed)).any(|(found, expected)| found.to_bits() != expected.to_bits()) {
        return Err("WRONG BYTES: a hit is not what was stored".into());
    }
    counts.checked_bytes.fetch_add(found.bytes().len() as u64, Ordering::Relaxed);
    Ok(())
}

/// 8 to 39 blocks, no two prompts with a block in common.
fn tokens(number: u32) -> Vec<u32> {
    let blocks = 8 + number % 32;
    (0..blocks * BLOCK_TOKENS as u32).map(|token| token.wrapping_mul(2_654_435_761).wrapping_add(number)).collect()
}

fn prefix(number: u32) -> String {
    format!("This is the prefix of number {number}. {}", "All of it counts. ".repeat(number as usize % 7))
}

/// A fifth of all entries lives for a short time only.
fn expires(number: u32) -> bool {
    number.is_multiple_of(5)
}

fn block_elements() -> usize {
    BLOCK_TOKENS * DIMS[0] * DIMS[1]
}

fn block_seed(namespace: u32, prompt: u32, block: usize, layer: usize, side: u64) -> u64 {
    mix(u64::from(namespace) << 48 | u64::from(prompt) << 32 | (block as u64) << 16 | (layer as u64) << 1 | side)
}

fn named_seed(cache: u32, prefix: u32, version: u32, layer: usize, side: u64) -> u64 {
    mix(1 << 60
        | u64::from(cache) << 50
        | u64::from(prefix) << 40
        | u64::from(version) << 8
        | (layer as u64) << 1
        | side)
}

fn mix(seed: u64) -> u64 {
    (seed ^ seed >> 31).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn values(seed: u64) -> impl Iterator<Item = f32> {
    (0..u32::MAX).map(move |at| f32::from_bits((seed as u32).wrapping_add(at.wrapping_mul(0x9e37_79b1)) >> 2))
}

impl Random {
    fn new(seed: u64) -> Self {
        Self(mix(seed + 1) | 1)
    }

    fn below(&mut self, end: u32) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as u32 % end
    }
}
