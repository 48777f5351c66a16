//! Reads: blocks are held, copied out of the region, and let go of; then whoever waits is told.
//!
//! Invariant: a read is a hit only if its block was held until its bytes were copied: the daemon says so when it lets go.
//! A client that was stopped for longer than its lease has copied what may be another block, and takes it for a miss.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use kvkeep::tiers::{BlockMeta, Deadline, Read};

use crate::channel::Channel;
use crate::link;
use crate::memory::Mapping;
use crate::shared::{Counts, Shared};
use crate::wire::{Answer, Purpose, Request};

/// Threads that copy: a core moves only a part of what memory gives.
pub(crate) const READERS: usize = 4;
/// Blocks and bytes that are held at a time: what one thread takes, no other one copies.
const BATCH_BLOCKS: usize = 256;
const BATCH_BYTES: usize = 16 << 20;
/// What the daemon may take, which may have to read its disk.
const READ_TIME: Duration = Duration::from_secs(1);

/// A connection, and the region that came with it.
struct Region {
    channel: Channel,
    memory: Mapping,
    generation: u64,
}

/// One thread's work.
pub(crate) fn run(shared: &Arc<Shared>) {
    // Of a whole block nobody says the size; they are alike.
    let (mut region, mut block_bytes) = (None, BATCH_BYTES);
    loop {
        let (mut blocks, mut bytes) = (0, 0);
        let batch = shared.reads.pop(|read| {
            blocks += 1;
            bytes += read.range.as_ref().map_or(block_bytes, ExactSizeIterator::len);
            blocks <= BATCH_BLOCKS && bytes <= BATCH_BYTES
        });
        let Some(mut batch) = batch else { return };
        let came = read(shared, &mut region, &mut batch);
        if came.is_err() {
            region = None;
        }
        let mut came = came.unwrap_or_default().into_iter();
        for read in batch {
            let came = came.next().flatten();
            if let Some(meta) = &came {
                block_bytes = usize::try_from(meta.raw_bytes).unwrap_or(BATCH_BYTES);
                let bytes = read.range.as_ref().map_or(meta.raw_bytes, |range| range.len() as u64);
                Counts::add(&shared.counts.hits, 1);
                Counts::add(&shared.counts.read_bytes, bytes);
            }
            read.target.complete(came);
        }
    }
}

/// What each block is, if its bytes are there.
fn read(shared: &Shared, region: &mut Option<Region>, batch: &mut [Read]) -> io::Result<Vec<Option<BlockMeta>>> {
    if !shared.is_up() {
        return Ok(Vec::new());
    }
    let read = current(shared, region).and_then(|region| copy(region, batch));
    read.inspect_err(|_| shared.lose())
}

/// The region of the daemon that is there now.
fn current<'a>(shared: &Shared, region: &'a mut Option<Region>) -> io::Result<&'a mut Region> {
    let generation = shared.generation();
    if region.as_ref().is_none_or(|region| region.generation != generation) {
        *region = None;
        let welcomed = link::connect(&shared.config, Purpose::Read)?;
        let file = welcomed.file.ok_or_else(|| io::Error::other("no memory came"))?;
        let memory = Mapping::of_reader(&file, welcomed.region_bytes)?;
        *region = Some(Region { channel: welcomed.channel, memory, generation });
    }
    region.as_mut().ok_or_else(|| io::Error::other("no connection"))
}

fn copy(region: &mut Region, batch: &mut [Read]) -> io::Result<Vec<Option<BlockMeta>>> {
    let wanted = batch.iter().map(|read| (read.key, read.namespace)).collect();
    let Answer::Held(held) = region.channel.ask(&Request::Hold(wanted), Deadline::after(READ_TIME))? else {
        return Err(io::Error::other("another answer than was asked for"));
    };
    let mut came = Vec::with_capacity(batch.len());
    for (read, held) in batch.iter_mut().zip(held) {
        let copied = held.filter(|(at, meta)| copy_one(&region.memory, *at, meta, read));
        came.push(copied.map(|(_, meta)| meta));
    }
    // What copying took is not the daemon's fault.
    match region.channel.ask(&Request::Release, Deadline::after(READ_TIME))? {
        Answer::Released(true) => Ok(came),
        Answer::Released(false) => Ok(Vec::new()),
        _ => Err(io::Error::other("another answer than was asked for")),
    }
}

/// Copies what is wanted of a block, and clears what is behind it; `false` if it is not what was asked for.
fn copy_one(memory: &Mapping, at: u64, meta: &BlockMeta, read: &mut Read) -> bool {
    if meta.key != read.key || meta.namespace != read.namespace {
        return false;
    }
    let range = read.range.clone().unwrap_or(0..usize::try_from(meta.raw_bytes).unwrap_or(usize::MAX));
    if range.end as u64 > meta.raw_bytes {
        return false;
    }
    read.target.fill(&mut |bytes| {
        let Some((into, behind)) = bytes.split_at_mut_checked(range.len()) else { return false };
        behind.fill(0);
        memory.copy_out(at.saturating_add(range.start as u64), into)
    })
}
