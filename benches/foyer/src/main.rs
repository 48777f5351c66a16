//! foyer's hybrid cache, storing and loading 2 MiB values as `kvkeep bench --disk` does blocks.
//!
//! Usage: `kvkeep-bench-foyer DIR [VALUES [ROUNDS]]`. A store round opens an empty cache, inserts all
//! values and closes it; a load round opens the cache again and gets all values, four at a
//! time, out of a memory tier that was empty. Direct I/O, no compression, its own checksums
//! on. Prints medians.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use foyer::{
    BlockEngineConfig, DeviceBuilder, FsDeviceBuilder, HybridCache, HybridCacheBuilder, HybridCachePolicy,
    PsyncIoEngineConfig,
};

const VALUE_BYTES: usize = 2 << 20;
const GETS_AT_ONCE: u64 = 4;

type Cache = HybridCache<u64, Vec<u8>>;

#[tokio::main]
async fn main() -> Result<()> {
    let mut args = std::env::args_os().skip(1);
    let dir = PathBuf::from(args.next().context("give a directory")?).join("foyer");
    let mut number =
        |otherwise: u64| -> Result<u64> { args.next().map_or(Ok(otherwise), |arg| Ok(arg.to_string_lossy().parse()?)) };
    let (values, rounds) = (number(256)?, number(5)?);
    let (mut stores, mut loads) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        stores.push(store(&dir, values).await?);
        loads.push(load(&dir, values).await?);
        std::fs::remove_dir_all(&dir)?;
    }
    let rate = |times: Vec<Duration>| bytes(values) / median(times).as_secs_f64() / 1e9;
    println!("foyer 0.22.6, {values} values of 2 MiB, medians of {rounds}:");
    println!("store, closed  {:.2} GB/s", rate(stores));
    println!("cold load      {:.2} GB/s", rate(loads));
    Ok(())
}

async fn open(dir: &Path, values: u64) -> Result<Cache> {
    let needed = usize::try_from(values)? * VALUE_BYTES;
    let device = FsDeviceBuilder::new(dir).with_capacity(needed * 3 / 2 + (256 << 20)).with_direct(true).build()?;
    // By default 16 MiB may be queued and what comes on top is dropped: then nothing would be measured.
    let engine = BlockEngineConfig::new(device)
        .with_block_size(64 << 20)
        .with_buffer_pool_size(needed * 2)
        .with_submit_queue_size_threshold(needed * 2);
    let builder = HybridCacheBuilder::new()
        .with_policy(HybridCachePolicy::WriteOnInsertion)
        .memory(needed * 2)
        .with_weighter(|_, value: &Vec<u8>| value.len())
        .storage();
    Ok(builder.with_io_engine_config(PsyncIoEngineConfig::new()).with_engine_config(engine).build().await?)
}

/// From the first insert until everything is on the disk.
async fn store(dir: &Path, values: u64) -> Result<Duration> {
    let cache = open(dir, values).await?;
    let made: Vec<Vec<u8>> = (0..values).map(value).collect();
    let begin = Instant::now();
    for (key, value) in (0..values).zip(made) {
        cache.insert(key, value);
    }
    cache.close().await?;
    Ok(begin.elapsed())
}

async fn load(dir: &Path, values: u64) -> Result<Duration> {
    let cache = open(dir, values).await?;
    let begin = Instant::now();
    let tasks: Vec<_> = (0..GETS_AT_ONCE)
        .map(|first| {
            let cache = cache.clone();
            tokio::spawn(async move {
                let (mut key, mut found) = (first, 0u64);
                while key < values {
                    let entry = cache.get(&key).await?;
                    found += u64::from(entry.is_some_and(|entry| entry.value().len() == VALUE_BYTES));
                    key += GETS_AT_ONCE;
                }
                anyhow::Ok(found)
            })
        })
        .collect();
    let mut found = 0;
    for task in tasks {
        found += task.await??;
    }
    let took = begin.elapsed();
    ensure!(found == values, "{found} of {values} values were found");
    cache.close().await?;
    Ok(took)
}

/// Not all the same, so that nothing on the way can save itself work.
fn value(key: u64) -> Vec<u8> {
    let mut word = key | 1;
    let mut bytes = Vec::with_capacity(VALUE_BYTES);
    while bytes.len() < VALUE_BYTES {
        word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn bytes(values: u64) -> f64 {
    values as f64 * VALUE_BYTES as f64
}
