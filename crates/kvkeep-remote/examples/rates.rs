//! Bytes a second through a remote tier, written and read: blocks of 2 MiB straight from and to memory, past RAM.
//!
//! Usage: rates URL [BLOCKS]   (256 blocks). Prints `set` and `get`, in MB/s, of the median of five rounds, and `miss`:
//! nanoseconds of a lookup of one block that is nowhere, by a node that knows the store.
//! `benches/remote/run.sh` runs it in turns with redis-benchmark.

#![expect(clippy::print_stdout, reason = "what it is for")]

use std::error::Error;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvkeep::tiers::{BlockMeta, Payload, ReadTarget};
use kvkeep::{CacheConfig, Chain, DType, KvCache, KvLayout, Namespace, StoreOptions};
use kvkeep_remote::{RemoteConfig, RemoteTier};

/// Of an 8B model: 16 tokens of 128 KiB.
const BLOCK_TOKENS: usize = 16;
const BLOCK_BYTES: usize = 2 << 20;
const ROUNDS: u32 = 5;

/// Memory of an engine.
struct Memory(Vec<u8>);

impl Payload for Memory {
    fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// Counts reads that have ended, and those that found their block.
#[derive(Default)]
struct Ended {
    counts: Mutex<(usize, usize)>,
    one: Condvar,
}

/// Memory to read into.
struct Target(Vec<u8>, Arc<Ended>);

impl ReadTarget for Target {
    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }

    fn complete(self: Box<Self>, read: Option<BlockMeta>) {
        let mut counts = self.1.counts.lock().unwrap_or_else(PoisonError::into_inner);
        *counts = (counts.0 + 1, counts.1 + usize::from(read.is_some()));
        self.1.one.notify_all();
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let url = args.next().ok_or("give the URL of a store")?;
    let blocks: usize = args.next().map_or(Ok(256), |blocks| blocks.parse())?;
    let config = RemoteConfig::new(url)
        .prefix(format!("bench-{}", std::process::id()))
        .queue_bytes(128 << 20)
        .capacity_bytes(2 * (blocks * BLOCK_BYTES) as u64)
        .deadline(Duration::from_secs(2))
        .variables(std::env::vars());
    let tier = Arc::new(RemoteTier::open(&config)?);
    let cache = KvCache::new(CacheConfig::without_ram().tier(Arc::clone(&tier) as _))?;
    let layout = KvLayout::new(1, 1, u32::try_from(BLOCK_BYTES / BLOCK_TOKENS / 2)?, DType::U8)?
        .with_block_tokens(u32::try_from(BLOCK_TOKENS)?)?;
    let namespace = Namespace::new("bench", layout);
    let (mut sets, mut gets) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let tokens: Vec<u32> =
            (0..blocks * BLOCK_TOKENS).map(|at| u32::try_from(at).unwrap_or(0) ^ (round << 28)).collect();
        let chain = Chain::of(&namespace, &tokens)?;
        sets.push(set(&cache, &chain)?);
        gets.push(get(&cache, &chain)?);
        cache.clear();
        cache.flush()?;
    }
    for (name, mut rates) in [("set", sets), ("get", gets)] {
        rates.sort_by(f64::total_cmp);
        println!("{name} {:.0}", rates.get(rates.len() / 2).copied().unwrap_or_default());
    }
    println!("miss {}", miss(&cache, &tier, &namespace)?);
    Ok(())
}

/// The median of many lookups, each of another prompt.
fn miss(cache: &KvCache, tier: &RemoteTier, namespace: &Namespace) -> Result<u128, Box<dyn Error>> {
    let began = Instant::now();
    while !tier.knows_all() {
        if began.elapsed() > Duration::from_secs(30) {
            return Err("the node does not get to know the store".into());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut took = Vec::new();
    for number in 0..10_000 {
        let tokens = [number | 1 << 31; BLOCK_TOKENS];
        let began = Instant::now();
        let found = cache.lookup(namespace, &tokens)?.cached_tokens();
        took.push(began.elapsed().as_nanos());
        if found > 0 {
            return Err("a prompt was found that nobody has stored".into());
        }
    }
    took.sort_unstable();
    Ok(took.get(took.len() / 2).copied().unwrap_or_default())
}

/// Writes all blocks; MB/s from the first offer until the store has all.
fn set(cache: &KvCache, chain: &Chain) -> Result<f64, Box<dyn Error>> {
    let memory: Arc<dyn Payload> = Arc::new(Memory((0..BLOCK_BYTES).map(|at| (at * 7).to_le_bytes()[0]).collect()));
    let began = Instant::now();
    let mut taken = 0;
    while taken < chain.blocks() {
        taken += cache.write_lent(chain, taken, vec![Arc::clone(&memory)], &StoreOptions::default());
    }
    cache.flush()?;
    Ok(rate(chain.blocks(), began))
}

/// Reads all blocks into memory that has been touched before, 64 at a time.
fn get(cache: &KvCache, chain: &Chain) -> Result<f64, Box<dyn Error>> {
    let ended = Arc::new(Ended::default());
    let mut memory: Vec<Vec<u8>> = (0..chain.blocks()).map(|_| vec![1; BLOCK_BYTES]).collect();
    let began = Instant::now();
    let mut next = 0;
    while next < chain.blocks() {
        let part: Vec<Box<dyn ReadTarget>> = memory
            .drain(..64.min(chain.blocks() - next))
            .map(|bytes| Box::new(Target(bytes, Arc::clone(&ended))) as Box<dyn ReadTarget>)
            .collect();
        next += part.len();
        cache.read_lent(chain, next - part.len(), part);
        let counts = ended.counts.lock().unwrap_or_else(PoisonError::into_inner);
        drop(ended.one.wait_while(counts, |counts| counts.0 < next).unwrap_or_else(PoisonError::into_inner));
    }
    let found = ended.counts.lock().unwrap_or_else(PoisonError::into_inner).1;
    if found < chain.blocks() {
        return Err(format!("{found} of {} blocks were found", chain.blocks()).into());
    }
    Ok(rate(chain.blocks(), began))
}

#[expect(clippy::cast_precision_loss, reason = "for people to read")]
fn rate(blocks: usize, began: Instant) -> f64 {
    (blocks * BLOCK_BYTES) as f64 / began.elapsed().as_secs_f64() / 1e6
}
