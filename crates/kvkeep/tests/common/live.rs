//! A live cache, RAM and disk, driven by requests that are lists of block numbers, with blocks of two bytes: what a replay
//! without payload is held against.
//!
//! A request is looked up and loaded, what is missing is stored, and its writes are waited for, so that a run says the same
//! each time. Many blocks lie in a segment, as with real payloads.

use std::error::Error;
use std::time::Duration;

use kvkeep::{
    Admission, CacheConfig, DType, DiskConfig, KvCache, KvLayout, LayerView, Namespace, PolicyKind, StoreOptions,
    TensorView, TokenId,
};

/// A block takes one page of RAM; on the disk two, with its header, and a line of an index.
const PAGE_BYTES: u64 = 4096;
const DISK_BLOCK_BYTES: u64 = 2 * PAGE_BYTES + 128;
/// What a directory takes besides.
const DISK_BYTES: u64 = 128 << 10;

/// What came of it, in blocks.
pub(crate) struct Hits {
    pub(crate) blocks: usize,
    pub(crate) from_disk: u64,
    pub(crate) written: u64,
    pub(crate) again: u64,
}

/// Runs the requests against a cache of so many blocks of RAM and of disk, in a directory of its own.
pub(crate) fn live(requests: &[Vec<u64>], ram: u32, disk: u32, rule: Admission) -> Result<Hits, Box<dyn Error>> {
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
        let found = cache.lookup(&namespace, &tokens)?.blocks();
        blocks += found;
        if found < tokens.len() {
            let payload = bytes.get(..tokens.len()).unwrap_or_default();
            let view = TensorView::new(DType::U8, &[tokens.len(), 1, 1], payload)?;
            cache.store_from(&namespace, &tokens, 0, &[LayerView { k: view, v: view }], &StoreOptions::default())?;
        }
        while cache.stats().tier("disk").is_some_and(|disk| disk.queued_bytes > 0) {
            std::thread::yield_now();
        }
    }
    let stats = cache.stats().tier("disk").cloned().unwrap_or_default();
    Ok(Hits { blocks, from_disk: stats.hits, written: stats.stored_total, again: stats.reinserted_total })
}
