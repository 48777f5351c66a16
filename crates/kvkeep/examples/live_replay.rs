//! Drives a live cache, RAM and disk, with a recorded trace and blocks of two bytes, and prints what it hit beside what
//! the replay without payload says.
//!
//! `kvkeep replay` answers in seconds for any capacity; this shows that the product does as it says. A request is looked
//! up and loaded, stored, and its writes are waited for, so that a run says the same each time. Many blocks lie in a
//! segment, as with real payloads.
//!
//!     cargo run --release --example live_replay -- TRACE RAM_BLOCKS DISK_BLOCKS [ADMISSION...]

use std::error::Error;
use std::io::{BufRead, BufReader};
use std::time::Duration;

use kvkeep::{
    Admission, CacheConfig, DType, DiskConfig, KvCache, KvLayout, LayerView, Namespace, PolicyKind, Simulation,
    StoreOptions, TensorView, TokenId,
};

/// A block takes one page of RAM; on the disk two, with its header, and a line of an index.
const PAGE_BYTES: u64 = 4096;
const DISK_BLOCK_BYTES: u64 = 2 * PAGE_BYTES + 128;
/// What a directory takes besides.
const DISK_BYTES: u64 = 128 << 10;

struct Hits {
    blocks: usize,
    from_disk: u64,
    written: u64,
    again: u64,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [trace, ram, disk, rules @ ..] = arguments.as_slice() else {
        return Err("give TRACE RAM_BLOCKS DISK_BLOCKS [ADMISSION...]".into());
    };
    let (requests, ram, disk) = (read(trace)?, ram.parse()?, disk.parse()?);
    let rules = if rules.is_empty() { vec!["all".to_owned()] } else { rules.to_vec() };
    let all: usize = requests.iter().map(Vec::len).sum();
    let rate = |blocks: usize| 100.0 * blocks as f64 / all as f64;
    println!("{trace}, {ram} + {disk} blocks: % hit, blocks written (and again) to the disk");
    for rule in rules {
        let rule: Admission = rule.parse()?;
        let mut replay = Simulation::new(ram, PolicyKind::Adaptive)?.with_disk(disk, rule)?;
        let said: usize = requests.iter().map(|blocks| replay.request(blocks).total()).sum();
        let live = live(&requests, ram, disk, rule)?;
        println!(
            "{rule}: live {:.1}% ({} blocks from the disk), {} written and {} again; replay {:.1}%, {} written and {} again",
            rate(live.blocks),
            live.from_disk,
            live.written,
            live.again,
            rate(said),
            replay.disk_written_blocks(),
            replay.disk_reinserted_blocks()
        );
    }
    Ok(())
}

/// The blocks of each request, from JSON lines with `hash_ids`.
fn read(trace: &str) -> Result<Vec<Vec<u64>>, Box<dyn Error>> {
    let mut requests = Vec::new();
    for line in BufReader::new(std::fs::File::open(trace)?).lines() {
        let line = line?;
        let ids = line.split_once("\"hash_ids\"").and_then(|(_, rest)| rest.split_once('[')?.1.split_once(']'));
        let (ids, _) = ids.ok_or("a line without hash_ids")?;
        let ids = ids.split(',').map(str::trim).filter(|id| !id.is_empty());
        requests.push(ids.map(str::parse).collect::<Result<_, _>>()?);
    }
    Ok(requests)
}

fn live(requests: &[Vec<u64>], ram: u32, disk: u32, rule: Admission) -> Result<Hits, Box<dyn Error>> {
    let home = tempfile::tempdir()?;
    let disk_bytes = DISK_BYTES + u64::from(disk) * DISK_BLOCK_BYTES;
    let ram_bytes = u64::from(ram) * PAGE_BYTES;
    let config = DiskConfig::new(home.path(), disk_bytes).admission(rule).queue_bytes(ram_bytes);
    let config = config.read_timeout(Duration::from_secs(60));
    let cache = KvCache::new(CacheConfig::new(ram_bytes).policy(PolicyKind::Adaptive).disk(config))?;
    let namespace = Namespace::new("trace", KvLayout::new(1, 1, 1, DType::U8)?.with_block_tokens(1)?);
    let mut blocks = 0;
    let bytes = vec![0u8; requests.iter().map(Vec::len).max().unwrap_or(0)];
    for request in requests.iter().filter(|request| !request.is_empty()) {
        let tokens: Vec<TokenId> = request.iter().map(|id| TokenId::try_from(*id)).collect::<Result<_, _>>()?;
        blocks += cache.lookup(&namespace, &tokens)?.blocks();
        let view = TensorView::new(DType::U8, &[tokens.len(), 1, 1], bytes.get(..tokens.len()).unwrap_or_default())?;
        cache.store_from(&namespace, &tokens, 0, &[LayerView { k: view, v: view }], &StoreOptions::default())?;
        while cache.stats().tier("disk").is_some_and(|disk| disk.queued_bytes > 0) {
            std::thread::yield_now();
        }
    }
    let stats = cache.stats().tier("disk").cloned().unwrap_or_default();
    Ok(Hits { blocks, from_disk: stats.hits, written: stats.stored_total, again: stats.reinserted_total })
}
