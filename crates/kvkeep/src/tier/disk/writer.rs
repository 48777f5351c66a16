//! The one thread that writes.
//!
//! It takes what is queued in order. When the disk fails, records are dropped and counted,
//! and tried again with growing pauses; removals are never dropped: they are owed, and
//! written before anything else. Owing too many turns them into one removal of everything:
//! a cache may forget, but must not bring back what was removed.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Weak};

use super::active::Record;
use super::coded::Draft;
use super::format::PAGE_BYTES;
use super::io::Opener;
use super::log::{Log, WrittenAt};
use super::queue::{Op, Write};
use super::recover;
use super::shared::Shared;
use crate::key::{NamespaceId, ObjectKey};
use crate::sync::thread;

/// More removals than this are not kept one by one.
const MAX_OWED_KEYS: usize = 1 << 16;
const MAX_OWED_NAMESPACES: usize = 1 << 10;
/// Encoded blocks that wait to be written take this much memory besides RAM's own, and one block more.
const MAX_AHEAD_BYTES: usize = 16 << 20;

struct Writer {
    log: Log,
    opener: Opener,
    shared: Arc<Shared>,
    owed: Owed,
    /// Bytes of payloads that one write takes at most, if it takes more than one.
    at_once_bytes: u64,
    /// Why something that was to be written since the last flush was not.
    lost: Option<(io::ErrorKind, String)>,
}

/// What became of a write.
#[derive(Debug, Clone, Copy)]
enum Outcome {
    Written(WrittenAt),
    /// It was expired, removed or replaced before.
    Unwanted,
    /// The disk is failing, or no segment can hold it.
    Dropped,
    /// The disk failed while it was written: it may be there.
    Failed,
}

/// Removals that are not on the disk yet.
#[derive(Debug, Default)]
struct Owed {
    keys: Vec<ObjectKey>,
    namespaces: Vec<NamespaceId>,
    all: bool,
}

/// Starts the thread, and one that encodes and makes checksums while this one waits for the disk.
pub(super) fn spawn(log: Log, opener: Opener, at_once_bytes: u64, shared: Arc<Shared>) -> thread::JoinHandle<()> {
    if log.cipher.is_none() || !shared.codecs.are_raw() {
        shared.state.lock().queue.works_ahead = true;
        let shared = Arc::clone(&shared);
        thread::spawn(move || work_ahead(&shared));
    }
    let mut writer = Writer { log, opener, shared, owed: Owed::default(), at_once_bytes, lost: None };
    writer.publish_sizes();
    thread::spawn(move || writer.run())
}

/// Makes what is written of what is queued, until the tier is closed.
fn work_ahead(shared: &Shared) {
    let mut made = VecDeque::new();
    loop {
        let mut state = shared.state.lock();
        let next = loop {
            if ahead_bytes(&mut made) >= MAX_AHEAD_BYTES && !state.closed {
                // Something leaves the queue.
                state = shared.room.wait(state);
                continue;
            }
            match state.queue.ahead.pop_front() {
                Some(next) => break next,
                None if state.closed => return,
                None => state = shared.work.wait(state),
            }
        };
        drop(state);
        made.push_back(next.make());
    }
}

/// Memory of what was made and is not written yet.
fn ahead_bytes(made: &mut VecDeque<Weak<Draft>>) -> usize {
    while made.front().is_some_and(|first| first.strong_count() == 0) {
        made.pop_front();
    }
    made.iter().filter_map(Weak::upgrade).map(|draft| draft.form_bytes()).sum()
}

impl Writer {
    fn run(&mut self) {
        loop {
            match self.next() {
                Op::Write(write) => {
                    let mut writes = vec![*write];
                    self.take_more(&mut writes);
                    self.write(writes);
                }
                // In parts: only what cannot be paid adds up.
                Op::Remove(keys) => keys.chunks(MAX_OWED_KEYS / 2).for_each(|keys| {
                    self.owed.add(keys, &self.shared);
                    self.pay_if_due();
                }),
                Op::Clear(namespace) => {
                    self.owed.clear(namespace, &self.shared);
                    self.pay_if_due();
                }
                Op::Flush(reply) => {
                    self.owe_hidden();
                    let flushed = self.attempt(|writer| {
                        writer.pay()?;
                        writer.log.sync()?;
                        writer.log.backend.check()
                    });
                    let lost = self.lost.take().map_or(Ok(()), |(kind, error)| Err(io::Error::new(kind, error)));
                    self.publish_sizes();
                    self.shared.answer(&reply, flushed.and(lost));
                }
                Op::Close(reply) => {
                    self.owe_hidden();
                    let closed = self.attempt(|writer| {
                        writer.pay()?;
                        writer.log.close()
                    });
                    self.publish_sizes();
                    self.shared.answer(&reply, closed);
                    return;
                }
            }
            self.publish_sizes();
        }
    }

    /// What was replaced, and whose successor did not get here, is removed.
    fn owe_hidden(&mut self) {
        let hidden = self.shared.state.lock().take_hidden();
        self.owed.add(&hidden, &self.shared);
    }

    fn next(&self) -> Op {
        let mut state = self.shared.state.lock();
        loop {
            match state.queue.ops.pop_front() {
                Some(op) => return op,
                None => state = self.shared.work.wait(state),
            }
        }
    }

    /// Takes the writes that come next, as many as may be under way at once: they cannot be given up any more.
    fn take_more(&self, writes: &mut Vec<Write>) {
        let size = |write: &Write| write.payload.bytes().len() as u64;
        let mut bytes: u64 = writes.iter().map(size).sum();
        let mut state = self.shared.state.lock();
        while let Some(Op::Write(next)) = state.queue.ops.front()
            && bytes + size(next) <= self.at_once_bytes
            && let Some(Op::Write(next)) = state.queue.ops.pop_front()
        {
            bytes += size(&next);
            writes.push(*next);
        }
    }

    /// Writes what is still wanted of these, with as few writes as may be.
    fn write(&mut self, writes: Vec<Write>) {
        let now_ms = self.shared.now_ms();
        let (wanted, rest): (Vec<Write>, Vec<Write>) = {
            let state = self.shared.state.lock();
            writes.into_iter().partition(|write| {
                let meta = &write.draft.meta;
                meta.expires_at_ms > now_ms && state.queue.is_wanted(&meta.key.0, write.ticket)
            })
        };
        rest.into_iter().for_each(|write| self.finish(write, Outcome::Unwanted));
        let mut wanted = VecDeque::from(wanted);
        while !wanted.is_empty() {
            let outcomes = self.write_some(wanted.make_contiguous());
            for (write, outcome) in wanted.drain(..outcomes.len()).zip(outcomes) {
                self.finish(write, outcome);
            }
        }
    }

    /// Says what became of them, from the first one on as far as it got.
    fn write_some(&mut self, writes: &[Write]) -> Vec<Outcome> {
        if !self.shared.state.lock().writes.allows(self.shared.now_ms()) {
            self.lost = Some((io::ErrorKind::Other, "the disk tier is failing".into()));
            return vec![Outcome::Dropped; writes.len()];
        }
        let records = writes.iter().map(|write| {
            let payload = write.payload.bytes();
            let form = write.draft.form(payload);
            let (content, sums) = (&write.draft.content, form.sums.as_deref());
            Record { meta: &form.meta, content, keys: &[], payload: form.bytes(payload), sums }
        });
        let records: Vec<Record<'_>> = records.collect();
        self.log.touched = false;
        let written = self.attempt(|writer| {
            // A file whose directory is gone can still be written: nobody would find it again.
            writer.log.backend.check()?;
            writer.pay()?;
            let written = writer.log.append(&records)?;
            writer.heal();
            Ok(written)
        });
        match written {
            Ok(written) => written.into_iter().map(Outcome::Written).collect(),
            // The first one: the others may fit.
            Err(error) if error.kind() == io::ErrorKind::FileTooLarge => vec![Outcome::Dropped],
            Err(error) => {
                self.lost = Some((error.kind(), error.to_string()));
                vec![if self.log.touched { Outcome::Failed } else { Outcome::Dropped }; writes.len()]
            }
        }
    }

    /// A write is done with. Its payload is dropped without a lock.
    fn finish(&mut self, write: Write, outcome: Outcome) {
        let Write { ticket, draft, mark, payload } = write;
        let mut meta = draft.meta;
        if matches!(outcome, Outcome::Written(_)) {
            payload.written(true);
            meta = draft.form(payload.bytes()).meta;
        }
        drop(draft);
        {
            let mut state = self.shared.state.lock();
            match outcome {
                // Removed or replaced while it was written: then a removal, or the newer
                // one, comes behind it.
                Outcome::Written(written) if state.queue.is_wanted(&meta.key.0, ticket) => {
                    state.settle(&meta.key.0);
                    state.index.insert(&meta, written.segment, written.page, mark);
                    state.counters.stored_total += 1;
                    let pages = |bytes: u64| bytes.next_multiple_of(PAGE_BYTES as u64);
                    state.counters.written_bytes_total += pages(meta.stored_bytes);
                    state.counters.written_raw_bytes_total += pages(meta.raw_bytes);
                }
                Outcome::Written(_) | Outcome::Unwanted => {}
                Outcome::Dropped => state.counters.dropped_total += 1,
                Outcome::Failed => {
                    state.counters.dropped_total += 1;
                    state.doubt(&meta.key.0);
                }
            }
            state.queue.finish(&meta.key.0, ticket);
        }
        drop(payload);
    }

    /// Tries something on the disk; a failure is latched.
    fn attempt<T>(&mut self, action: impl FnOnce(&mut Self) -> io::Result<T>) -> io::Result<T> {
        if self.shared.state.lock().writes.is_failing() {
            self.reopen_if_gone();
        }
        let result = action(self);
        match &result {
            // One record that no segment can hold says nothing about the disk.
            Err(error) if error.kind() == io::ErrorKind::FileTooLarge => {}
            Ok(_) => {}
            Err(error) => {
                self.shared.write_failed(error);
                self.log.abandon();
            }
        }
        result
    }

    /// A directory that was moved away or unmounted is opened again where it should be.
    fn reopen_if_gone(&mut self) {
        if self.log.backend.check().is_ok() {
            return;
        }
        let Ok(backend) = (self.opener)() else { return };
        let forgotten = self.shared.state.lock().index.forget_everything();
        self.shared.report_gone(&forgotten);
        drop(forgotten);
        let (cipher, capacity_bytes) = (self.log.cipher.clone(), self.log.room.capacity_bytes());
        if let Ok(log) = recover::open(backend, cipher, capacity_bytes, &self.shared) {
            self.log = log;
        }
    }

    /// Something was written: if the disk was failing, it is not any more.
    fn heal(&self) {
        if self.shared.state.lock().writes.heal() {
            tracing::info!(dir = %self.shared.dir.display(), "the disk tier can be written again");
        }
    }

    fn pay_if_due(&mut self) {
        if self.shared.state.lock().writes.allows(self.shared.now_ms()) {
            // A failure is latched, and what is owed stays owed.
            let _ = self.attempt(Self::pay);
        }
    }

    /// Writes the removals that are owed.
    fn pay(&mut self) -> io::Result<()> {
        let now_ms = self.shared.now_ms();
        if self.owed.is_empty() {
            return Ok(());
        }
        if self.owed.all {
            self.log.clear()?;
            self.owed.all = false;
        }
        while let Some(namespace) = self.owed.namespaces.last() {
            self.log.append_cleared(*namespace, now_ms)?;
            self.owed.namespaces.pop();
        }
        if !self.owed.keys.is_empty() {
            self.log.append_removals(&self.owed.keys, now_ms)?;
            self.owed.keys.clear();
        }
        self.heal();
        Ok(())
    }

    fn publish_sizes(&self) {
        self.shared.state.lock().counters.used_bytes = self.log.used_bytes();
    }
}

impl Owed {
    fn is_empty(&self) -> bool {
        self.keys.is_empty() && self.namespaces.is_empty() && !self.all
    }

    fn add(&mut self, keys: &[ObjectKey], shared: &Shared) {
        self.keys.extend_from_slice(keys);
        if self.keys.len() > MAX_OWED_KEYS {
            self.clear(None, shared);
        }
    }

    fn clear(&mut self, namespace: Option<NamespaceId>, shared: &Shared) {
        match namespace {
            Some(namespace) if self.namespaces.len() < MAX_OWED_NAMESPACES => {
                if !self.namespaces.contains(&namespace) {
                    self.namespaces.push(namespace);
                }
            }
            _ => {
                *self = Self { all: true, ..Self::default() };
                shared.remove_everything();
            }
        }
    }
}
