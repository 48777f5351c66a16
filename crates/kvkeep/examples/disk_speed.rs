//! How fast the disk tier is: `cargo run --release -p kvkeep --example disk_speed -- DIR [MiB]`.
//!
//! Stores blocks of 2 MiB and makes them durable, opens the directory again and loads them cold,
//! one prompt after the other; then opens a directory of 100,000 blocks of 64 KiB, with and
//! without the segments' indexes. Compare with fio in the same directory:
//!
//!     fio --name=w --directory=DIR --rw=write --bs=2M --size=1G --direct=1 --ioengine=psync --end_fsync=1
//!     fio --name=w --directory=DIR --rw=read  --bs=2M --size=1G --direct=1 --ioengine=psync

#![expect(clippy::print_stdout, clippy::cast_precision_loss, reason = "a measurement that prints its figures")]

use std::path::Path;
use std::time::Instant;

use kvkeep::{CacheConfig, DType, DiskConfig, Error, KvCache, KvLayout, LayerView, Namespace, TensorView, WritePolicy};

const MIB: u64 = 1 << 20;

fn main() -> Result<(), Error> {
    let mut args = std::env::args().skip(1);
    let dir = args.next().unwrap_or_else(|| "target/disk_speed".into());
    let mib = args.next().and_then(|mib| mib.parse().ok()).unwrap_or(1024);
    blocks_of_two_mib(&Path::new(&dir).join("blocks"), mib)?;
    opening(&Path::new(&dir).join("opening"))
}

/// A namespace whose blocks are one layer of so many bytes.
fn namespace(block_bytes: u32) -> Result<Namespace, Error> {
    let layout = KvLayout::new(1, 1, block_bytes / 2, DType::U8)?.with_block_tokens(1)?;
    Ok(Namespace::new("speed", layout))
}

fn cache(dir: &Path, ram_bytes: u64, disk_bytes: u64, policy: WritePolicy) -> Result<KvCache, Error> {
    let disk = DiskConfig::new(dir, disk_bytes).queue_bytes(256 * MIB).write_policy(policy);
    KvCache::new(CacheConfig::new(ram_bytes).disk(disk))
}

/// The tokens of a prompt: each is a block.
fn prompt(number: u32, blocks: u32) -> Vec<u32> {
    (number * 1000..number * 1000 + blocks).collect()
}

/// Stores prompts of so many blocks each, and makes them durable.
fn store(cache: &KvCache, namespace: &Namespace, prompts: u32, blocks: u32, kv: &[u8]) -> Result<(), Error> {
    let view = TensorView::new(DType::U8, &[blocks as usize, 1, kv.len() / blocks as usize], kv)?;
    for number in 0..prompts {
        cache.store(namespace, &prompt(number, blocks), &[LayerView { k: view, v: view }])?;
        while cache.stats().disk.is_some_and(|disk| disk.queued_bytes > 128 * MIB) {
            std::thread::sleep(std::time::Duration::from_micros(200));
        }
    }
    cache.flush()
}

fn blocks_of_two_mib(dir: &Path, mib: u64) -> Result<(), Error> {
    let namespace = namespace(2 << 20)?;
    // Segments are a 32nd of the cap: at 32 GiB none is begun in the middle of a measurement.
    let (ram, disk) = (mib / 2 * MIB, 32 << 30);
    for blocks in [1, 8] {
        let prompts = u32::try_from(mib / 2).unwrap_or(u32::MAX) / blocks;
        let kv: Vec<u8> = (0..blocks << 20).map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
        let open = cache(dir, ram, disk, WritePolicy::Through)?;
        let begin = Instant::now();
        store(&open, &namespace, prompts, blocks, &kv)?;
        let seconds = begin.elapsed().as_secs_f64();
        println!("store and flush, prompts of {blocks} blocks of 2 MiB: {:.0} MiB/s", mib as f64 / seconds);
        drop(open);
        let open = cache(dir, ram, disk, WritePolicy::Through)?;
        let begin = Instant::now();
        let mut found = 0;
        for number in 0..prompts {
            found += open.lookup(&namespace, &prompt(number, blocks))?.blocks();
        }
        let seconds = begin.elapsed().as_secs_f64();
        let rate = 2.0 * found as f64 / seconds;
        println!("cold load, prompts of {blocks} blocks of 2 MiB: {rate:.0} MiB/s, {found} blocks");
        open.clear();
    }
    // All of it into RAM first: then the flush is the disk's part alone.
    let open = cache(dir, ram, disk, WritePolicy::Back)?;
    let kv = vec![3u8; 1 << 20];
    let view = TensorView::new(DType::U8, &[1, 1, kv.len()], &kv)?;
    let prompts = u32::try_from(mib / 2).unwrap_or(u32::MAX) / 2;
    for number in 0..prompts {
        open.store(&namespace, &prompt(number, 1), &[LayerView { k: view, v: view }])?;
    }
    let begin = Instant::now();
    open.flush()?;
    let rate = 2.0 * f64::from(prompts) / begin.elapsed().as_secs_f64();
    println!("flush of what RAM holds: {rate:.0} MiB/s");
    open.clear();
    Ok(())
}

fn opening(dir: &Path) -> Result<(), Error> {
    const BLOCKS: u32 = 100_000;
    let namespace = namespace(64 << 10)?;
    let (ram, disk) = (512 * MIB, 8192 * MIB);
    let kv = vec![7u8; 32 << 10];
    let open = cache(dir, ram, disk, WritePolicy::Through)?;
    if open.stats().disk.is_none_or(|disk| disk.entries < u64::from(BLOCKS)) {
        store(&open, &namespace, BLOCKS, 1, &kv)?;
    }
    drop(open);
    for round in 0..3 {
        let begin = Instant::now();
        let open = cache(dir, ram, disk, WritePolicy::Through)?;
        let ms = begin.elapsed().as_secs_f64() * 1e3;
        let (entries, bytes) = open.stats().disk.map_or((0, 0), |disk| (disk.entries, disk.index_bytes));
        println!("open {round}: {ms:.1} ms, {entries} blocks, {} bytes of index each", bytes / entries.max(1));
    }
    Ok(())
}
