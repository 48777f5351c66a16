//! Writes: what is offered waits in a queue, and threads take it to the daemon.
//!
//! Each has a thread of the daemon's for itself, and a pair that shares a core takes turns: a second pair keeps the other
//! cores at work. The bytes go through staging memory piece by piece: while the daemon copies one, the next is filled. Staging for whole
//! blocks was the alternative: it takes as much memory as there are blocks under way, and a block goes through RAM twice
//! instead of through the processor's cache.
//!
//! Invariant: what was removed does not come back by a write. What is older than a removal is not sealed here; what had
//! begun before it the daemon does not seal.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Duration;

use kvkeep::tiers::{BlockMeta, Deadline, Offer};

use crate::channel::Channel;
use crate::link;
use crate::lock;
use crate::memory::Mapping;
use crate::shared::{Counts, Shared};
use crate::wire::{Answer, Fate, Message, PIECE_BYTES, PIECES, Purpose, Request};

/// Threads that write: one alone put 0.63 to 0.71 of what memcpy moves on two free cores, two 0.80 to 0.97.
pub(crate) const WRITERS: usize = 2;
/// Blocks and bytes that are begun at a time; and never more than a part of the region.
const BATCH_BLOCKS: usize = 128;
const BATCH_BYTES: u64 = 16 << 20;
const BATCH_DIVISOR: u64 = 16;
/// What the daemon may take for one answer, which may have to make room.
const WRITE_TIME: Duration = Duration::from_secs(5);

/// A connection, and the memory that came with it.
struct Staging {
    channel: Channel,
    memory: Mapping,
    generation: u64,
    free: Vec<u32>,
}

/// What became of one offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Written,
    There,
    Dropped,
}

/// The thread's work.
pub(crate) fn run(shared: &Arc<Shared>) {
    let mut staging = None;
    while let Some(batch) = next(shared) {
        let outcomes = write(shared, &mut staging, &batch);
        if outcomes.is_err() {
            staging = None;
        }
        let mut outcomes = outcomes.unwrap_or_default().into_iter();
        let bytes = batch.iter().map(|offer| offer.meta.stored_bytes).sum::<u64>();
        for offer in batch {
            end(shared, &offer, outcomes.next().unwrap_or(Outcome::Dropped));
        }
        let mut writes = lock(&shared.writes);
        writes.bytes -= bytes;
        writes.writing -= 1;
        writes.done += 1;
        drop(writes);
        shared.written.notify_all();
    }
}

/// Waits for offers; `None` when nothing more comes.
fn next(shared: &Shared) -> Option<Vec<Offer>> {
    let mut writes = lock(&shared.writes);
    while writes.queue.is_empty() {
        if shared.is_closed() {
            return None;
        }
        writes = shared.written.wait(writes).unwrap_or_else(PoisonError::into_inner);
    }
    let most = BATCH_BYTES.min(shared.capacity_bytes.load(Ordering::SeqCst) / BATCH_DIVISOR);
    let (mut batch, mut bytes) = (Vec::new(), 0);
    while let Some(offer) = writes.queue.front() {
        bytes += offer.meta.stored_bytes;
        if !batch.is_empty() && (bytes > most || batch.len() >= BATCH_BLOCKS) {
            break;
        }
        batch.extend(writes.queue.pop_front());
    }
    writes.writing += 1;
    Some(batch)
}

fn end(shared: &Shared, offer: &Offer, outcome: Outcome) {
    match outcome {
        Outcome::Written => {
            Counts::add(&shared.counts.stored, 1);
            Counts::add(&shared.counts.written_bytes, offer.meta.stored_bytes);
            offer.payload.written(true);
        }
        Outcome::There => offer.payload.written(false),
        Outcome::Dropped => Counts::add(&shared.counts.dropped, 1),
    }
}

fn write(shared: &Shared, staging: &mut Option<Staging>, batch: &[Offer]) -> io::Result<Vec<Outcome>> {
    if !shared.is_up() {
        return Ok(Vec::new());
    }
    current(shared, staging).and_then(|staging| staging.write(shared, batch)).inspect_err(|_| shared.lose())
}

fn current<'a>(shared: &Shared, staging: &'a mut Option<Staging>) -> io::Result<&'a mut Staging> {
    let generation = shared.generation();
    if staging.as_ref().is_none_or(|staging| staging.generation != generation) {
        *staging = None;
        let welcomed = link::connect(&shared.config, Purpose::Write)?;
        let file = welcomed.file.ok_or_else(|| io::Error::other("no memory came"))?;
        let memory = Mapping::of_writer(file.as_fd(), (PIECES * PIECE_BYTES) as u64)?;
        let free = (0..u32::try_from(PIECES).unwrap_or(1)).collect();
        *staging = Some(Staging { channel: welcomed.channel, memory, generation, free });
    }
    staging.as_mut().ok_or_else(|| io::Error::other("no connection"))
}

/// Another answer than was asked for.
fn unexpected() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "another answer than was asked for")
}

impl Staging {
    fn write(&mut self, shared: &Shared, batch: &[Offer]) -> io::Result<Vec<Outcome>> {
        // What cannot be described cannot be sent.
        let is_sent: Vec<bool> = batch.iter().map(|offer| offer.meta.to_bytes().is_some()).collect();
        let sent: Vec<&Offer> = batch.iter().zip(&is_sent).filter(|(_, sent)| **sent).map(|(offer, _)| offer).collect();
        let metas: Vec<BlockMeta> = sent.iter().map(|offer| offer.meta.clone()).collect();
        let Answer::Begun(fates) = self.channel.ask(&Request::Begin(metas), Deadline::after(WRITE_TIME))? else {
            return Err(unexpected());
        };
        let is_wanted: Vec<bool> = {
            // After the daemon has begun: what is removed from now on it does not seal.
            let forgets = lock(&shared.forgets);
            let allowed = |offer: &&Offer| forgets.allow(&offer.meta.key, offer.meta.namespace, offer.epoch);
            sent.iter().zip(&fates).map(|(offer, fate)| *fate == Fate::Room && allowed(offer)).collect()
        };
        for (number, (offer, _)) in sent.iter().zip(&is_wanted).enumerate().filter(|(_, (_, wanted))| **wanted) {
            self.fill(u32::try_from(number).unwrap_or(u32::MAX), offer)?;
        }
        while self.free.len() < PIECES {
            self.take_back()?;
        }
        let Answer::Sealed(sealed) = self.channel.ask(&Request::Seal(is_wanted), Deadline::after(WRITE_TIME))? else {
            return Err(unexpected());
        };
        let of_sent = fates.iter().zip(sealed).map(|(fate, sealed)| match (fate, sealed) {
            (Fate::There, _) | (_, Some(false)) => Outcome::There,
            (_, Some(true)) => Outcome::Written,
            (_, None) => Outcome::Dropped,
        });
        let mut of_sent = of_sent.collect::<Vec<_>>().into_iter();
        let outcome = |sent: bool| if sent { of_sent.next().unwrap_or(Outcome::Dropped) } else { Outcome::Dropped };
        Ok(is_sent.into_iter().map(outcome).collect())
    }

    /// Has a block's bytes copied, as far as slots are free without waiting for its end.
    fn fill(&mut self, room: u32, offer: &Offer) -> io::Result<()> {
        let bytes = usize::try_from(offer.meta.stored_bytes).unwrap_or(usize::MAX);
        let payload =
            offer.payload.bytes().get(..bytes).ok_or_else(|| io::Error::other("a payload that is too short"))?;
        for piece in payload.chunks(PIECE_BYTES) {
            while self.free.is_empty() {
                self.take_back()?;
            }
            let slot = self.free.pop().ok_or_else(unexpected)?;
            let at = u64::from(slot) * PIECE_BYTES as u64;
            let sum = self.memory.copy_in_summed(at, piece).ok_or_else(unexpected)?;
            let bytes = u32::try_from(piece.len()).unwrap_or(u32::MAX);
            self.channel.send(&Request::Piece { room, slot, bytes, sum }.encode())?;
        }
        Ok(())
    }

    /// Waits for a slot. A piece that was not right is not sealed by the daemon.
    fn take_back(&mut self) -> io::Result<()> {
        match self.channel.answer(Deadline::after(WRITE_TIME))? {
            Answer::Took { slot, .. } if (slot as usize) < PIECES && !self.free.contains(&slot) => {
                self.free.push(slot);
                Ok(())
            }
            _ => Err(unexpected()),
        }
    }
}
