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

use kvkeep::{CacheConfig, DType, DiskConfig, Error, KvCache, KvLayout, LayerView, Namespace, TensorView};

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

fn cache(dir: &Path, ram_bytes: u64, disk_bytes: u64) -> Result<KvCache, Error> {
    let disk = DiskConfig::new(dir, disk_bytes).queue_bytes(256 * MIB);
    KvCache::new(CacheConfig::new(ram_bytes).disk(disk))
}

/// Stores prompts of one block each.
fn store(cache: &KvCache, namespace: &Namespace, prompts: u32, kv: &[u8]) -> Result<(), Error> {
    let view = TensorView::new(DType::U8, &[1, 1, kv.len()], kv)?;
    for prompt in 0..prompts {
        cache.store(namespace, &[prompt], &[LayerView { k: view, v: view }])?;
        while cache.stats().disk.is_some_and(|disk| disk.queued_bytes > 128 * MIB) {
            std::thread::sleep(std::time::Duration::from_micros(200));
        }
    }
    cache.flush()
}

fn blocks_of_two_mib(dir: &Path, mib: u64) -> Result<(), Error> {
    let namespace = namespace(2 << 20)?;
    let prompts = u32::try_from(mib / 2).unwrap_or(u32::MAX);
    let (ram, disk) = (mib / 2 * MIB, 2 * mib * MIB);
    let kv: Vec<u8> = (0..1u32 << 20).map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    let open = cache(dir, ram, disk)?;
    let begin = Instant::now();
    store(&open, &namespace, prompts, &kv)?;
    let seconds = begin.elapsed().as_secs_f64();
    println!("store and flush, 2 MiB blocks: {:.0} MiB/s", mib as f64 / seconds);
    println!("  {:?}", open.stats().disk);
    drop(open);
    let open = cache(dir, ram, disk)?;
    let begin = Instant::now();
    let mut found = 0;
    for prompt in 0..prompts {
        found += open.lookup(&namespace, &[prompt])?.blocks();
    }
    let seconds = begin.elapsed().as_secs_f64();
    println!(
        "cold load, 2 MiB blocks, one at a time: {:.0} MiB/s ({found} of {prompts})",
        2.0 * found as f64 / seconds
    );
    let open = {
        drop(open);
        cache(dir, ram, disk)?
    };
    open.clear();
    Ok(())
}

fn opening(dir: &Path) -> Result<(), Error> {
    const BLOCKS: u32 = 100_000;
    let namespace = namespace(64 << 10)?;
    let (ram, disk) = (512 * MIB, 8192 * MIB);
    let kv = vec![7u8; 32 << 10];
    let open = cache(dir, ram, disk)?;
    if open.stats().disk.is_none_or(|disk| disk.entries < u64::from(BLOCKS)) {
        store(&open, &namespace, BLOCKS, &kv)?;
    }
    drop(open);
    for round in 0..3 {
        let begin = Instant::now();
        let open = cache(dir, ram, disk)?;
        let stats = open.stats().disk;
        println!(
            "open {round}: {:.1} ms: {:?}",
            begin.elapsed().as_secs_f64() * 1e3,
            stats.map(|disk| (disk.entries, disk.index_bytes / disk.entries.max(1)))
        );
    }
    Ok(())
}
