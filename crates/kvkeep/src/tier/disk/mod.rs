//! The disk tier: a bounded directory of append-only segments that is warm after a restart
//! and never serves wrong bytes.
//!
//! - `format` says what every byte means and does no I/O; docs/format.md describes it.
//! - `io` makes the system calls, behind a trait that tests put a simulated disk behind.
//! - `reading` finds and reads for callers. `segment` reads and checks records, `coded` takes them through codecs; `records` says what is in a segment, `survey` what is in a directory.
//! - `active` writes one segment, `log` all of them within `room`, and evicts; `recover` opens a directory.
//! - `shared` is what callers, readers and the writer share, `queue` what is to be written; `writer` is the one thread
//!   that writes.
//! - `message` is a record by itself, for tiers elsewhere.
//!
//! Writes are queued and never hold a request up. Reads are made by whoever wants them.
//! Nothing here knows of RAM: payloads come as bytes that stay readable while they are queued.

mod active;
mod archive;
mod coded;
#[cfg_attr(not(feature = "encryption"), path = "unencrypted.rs")]
mod crypt;
mod described;
mod format;
mod index;
mod io;
mod log;
mod manifest;
mod message;
mod pace;
mod pages;
mod queue;
mod readers;
mod reading;
mod records;
mod recover;
mod refusal;
mod room;
mod segment;
mod shared;
#[cfg(test)]
pub(crate) mod sim;
mod survey;
#[cfg(test)]
#[cfg(feature = "encryption")]
mod tests;
pub(crate) mod tier;
mod writer;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::{Clock, Deadline};
use crate::codec::Codecs;
use crate::error::{Error, OneLine, Result};
use crate::event::Reports;
use crate::key::{NamespaceId, ObjectKey};
use crate::namespaces::Usage;
use crate::process::Process;
use crate::stats::TierStats;
use crate::sync::{Mutex, thread};
use crate::tier::Payload;

pub use archive::{Archive, Contents, RecordInfo, RecordState, Verified};
use coded::Draft;
pub(crate) use crypt::Cipher;
use format::PAGE_BYTES;
#[cfg(feature = "fuzzing")]
pub(crate) use format::decode_anything;
use format::{Content, RecordMeta};
pub(crate) use index::Found;
use io::{Access, Backend, Directory, OpenError, Opener};
pub use message::{Message, Messages};
use queue::{Op, Reply};
use refusal::{open_error, refused};
pub(crate) use shared::Resident;
use shared::Shared;
pub use survey::ManifestState;
pub(crate) use tier::DiskTier;

/// The open tier. Dropping it closes it.
#[derive(Debug)]
pub(crate) struct Disk {
    shared: Arc<Shared>,
    cipher: Option<Arc<Cipher>>,
    queue_bytes: u64,
    flush_timeout: Duration,
    writer: Mutex<Option<thread::JoinHandle<()>>>,
    bad_reads: std::sync::atomic::AtomicU32,
    process: Process,
}

/// How a tier is opened.
#[derive(Debug, Clone)]
pub(crate) struct Options<'a> {
    pub(crate) dir: &'a Path,
    pub(crate) capacity_bytes: u64,
    pub(crate) key_file: Option<&'a Path>,
    pub(crate) queue_bytes: u64,
    /// Payloads that are written at once, in bytes.
    pub(crate) at_once_bytes: u64,
    /// How long a flush waits for a disk that gets nothing done.
    pub(crate) flush_timeout: Duration,
    pub(crate) codecs: Codecs,
    /// Who is told what can be found, from the opening on.
    pub(crate) reports: Option<Reports>,
}

/// What an offer says besides its record: a mark that is kept with it, and whether it is the first of a prompt.
#[derive(Debug, Clone, Copy, Default)]
struct Said {
    mark: u8,
    begins: bool,
}

/// What became of a write that was offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Taken {
    Queued,
    /// The block is there already, or on its way.
    There,
    /// Something newer is known of its key.
    Outdated,
    /// The queue is full, or the disk fails.
    Full,
}

impl Disk {
    /// Opens a directory and whatever lies in it.
    pub(crate) fn open(options: &Options<'_>, clock: Arc<dyn Clock>) -> Result<Self> {
        let cipher = options.key_file.map(Cipher::from_file).transpose()?.map(Arc::new);
        let dir = options.dir.to_owned();
        let directory = Directory::open(&dir, Access::Exclusive).map_err(|error| open_error(&dir, error))?;
        let again = dir.clone();
        let opener = Box::new(move || match Directory::open(&again, Access::Exclusive) {
            Ok(directory) => Ok(Arc::new(directory) as Arc<dyn Backend>),
            Err(OpenError::Io(error)) => Err(error),
            Err(OpenError::Locked(_)) => Err(std::io::ErrorKind::ResourceBusy.into()),
        });
        Self::over(Arc::new(directory), opener, options, cipher, clock)
    }

    /// Opens whatever lies in a backend.
    fn over(
        backend: Arc<dyn Backend>,
        opener: Opener,
        options: &Options<'_>,
        cipher: Option<Arc<Cipher>>,
        clock: Arc<dyn Clock>,
    ) -> Result<Self> {
        let Options { dir, capacity_bytes, queue_bytes, at_once_bytes, flush_timeout, ref codecs, .. } = *options;
        if capacity_bytes < room::MIN_CAPACITY_BYTES {
            return Err(Error::Config(format!(
                "a disk tier of {capacity_bytes} bytes is too small: give at least {}",
                room::MIN_CAPACITY_BYTES
            )));
        }
        if flush_timeout.is_zero() {
            return Err(Error::Config("a flush_timeout of zero lets no flush end well: give some time".into()));
        }
        let shared = Arc::new(Shared::new(dir, clock, codecs.clone()));
        {
            let mut state = shared.state.lock();
            state.counters.capacity_bytes = capacity_bytes;
            options.reports.iter().for_each(|reports| state.index.report_to(reports.clone()));
        }
        let log = recover::open(backend, cipher.clone(), capacity_bytes, &shared)
            .map_err(|refusal| refused(dir, "open", refusal))?;
        let writer = writer::spawn(log, opener, at_once_bytes, Arc::clone(&shared));
        Ok(Self {
            shared,
            cipher,
            queue_bytes,
            flush_timeout,
            writer: Mutex::new(Some(writer)),
            bad_reads: 0.into(),
            process: Process::current(),
        })
    }

    /// Is this the process that opened it?
    pub(crate) fn is_here(&self) -> bool {
        self.process.is_current()
    }

    /// Says who knows what is in RAM: that is hot, and kept when its segment goes.
    pub(crate) fn set_resident(&self, resident: Resident) {
        self.shared.set_resident(resident);
    }

    /// Queues a record to be written, unless it is a block that is there already. `payload` is
    /// asked for only if the record is taken. With `wait` it is taken anyway: then what waits is limited by RAM
    /// alone.
    fn try_write(
        &self,
        meta: RecordMeta,
        content: Content,
        said: Said,
        wait: bool,
        payload: impl FnOnce() -> Arc<dyn Payload>,
    ) -> Taken {
        let now_ms = self.shared.now_ms();
        let mut state = self.shared.state.lock();
        if !state.needs(&meta, now_ms) {
            return Taken::There;
        }
        let bytes = meta.stored_bytes.next_multiple_of(PAGE_BYTES as u64);
        let room = wait
            || ((state.queue.bytes == 0 || state.queue.bytes + bytes <= self.queue_bytes)
                && state.writes.allows(now_ms));
        if !room || state.closed {
            return Taken::Full;
        }
        if state.queue.bytes == 0 {
            state.moved(now_ms);
        }
        let codec = self.shared.codecs.writing_what(meta.namespace, content.may_be_lossy());
        let depends = self.shared.codecs.depends(Some(meta.namespace));
        let codec = codec.filter(|_| !depends || self.shared.pace.pays()).cloned();
        let draft = Draft::new(meta, content, codec, self.cipher.is_none()).begins(said.begins).must_pay(depends);
        state.queue.push(draft, said.mark, self.shared.counted(payload()));
        drop(state);
        self.shared.work.notify_all();
        Taken::Queued
    }

    /// Something was offered and not taken.
    fn count_dropped(&self) {
        let now_ms = self.shared.now_ms();
        let said = {
            let mut state = self.shared.state.lock();
            state.counters.dropped_total += 1;
            state.look_for_stall(now_ms, self.flush_timeout)
        };
        self.shared.say_stall(said);
    }

    /// Waits until the queue is not full, or the deadline; says whether it is worth another try.
    fn wait_for_room(&self, deadline: Deadline) -> bool {
        self.shared.wait_for_room(deadline, self.queue_bytes, self.flush_timeout)
    }

    /// Somebody has waited so long for what is queued: has the writer got nothing done meanwhile?
    fn look_for_silence(&self, waited: Duration) {
        let said = {
            let mut state = self.shared.state.lock();
            let is_silent = !waited.is_zero() && state.queue.bytes > 0 && state.idle() >= waited / 4 * 3;
            is_silent && state.stalls(waited)
        };
        self.shared.say_stall(said);
    }

    /// Waits until the queue has room.
    #[cfg(test)]
    pub(crate) fn wait_for_queue(&self) -> Result<()> {
        let full = |state: &shared::DiskState| state.queue.bytes > self.queue_bytes;
        if self.shared.wait_while(self.flush_timeout, full) {
            return Ok(());
        }
        Err(self.error("flush", shared::hang(self.flush_timeout)))
    }

    /// Waits until nothing is queued or being written, as long as the writer gets on; says whether
    /// it is so.
    #[cfg(test)]
    pub(crate) fn wait_for_writer(&self, at_most: Duration) -> bool {
        self.shared.wait_while(at_most, |state| state.queue.bytes > 0)
    }

    /// Does a read or a write take longer than anybody waits?
    pub(crate) fn hangs(&self) -> bool {
        self.shared.state.lock().hangs()
    }

    /// Is this on the disk, or on its way there?
    pub(crate) fn holds(&self, key: &ObjectKey) -> bool {
        let now_ms = self.shared.now_ms();
        let state = self.shared.state.lock();
        state.index.contains(key, now_ms) || state.queue.wants(key, now_ms)
    }

    /// Gives up writes that have not begun, so that their payloads are free; says how many.
    pub(crate) fn cancel_writes(&self) -> usize {
        let mut state = self.shared.state.lock();
        let writes = state.queue.cancel_writes();
        state.counters.dropped_total += writes.len() as u64;
        drop(state);
        writes.len()
    }

    /// Removes keys, at once for every reader, and on the disk before the next flush returns.
    /// Says for each whether it was there.
    pub(crate) fn remove(&self, keys: &[ObjectKey]) -> Vec<bool> {
        let now_ms = self.shared.now_ms();
        let mut state = self.shared.state.lock();
        let mut written = Vec::new();
        let found = keys.iter().map(|key| {
            let live = state.index.contains(key, now_ms);
            let (known, queued) = (state.index.remove(key), state.queue.forget(key));
            if state.settle(key) || known || queued || state.aside {
                written.push(*key);
            }
            live || queued
        });
        let found = found.collect();
        if !written.is_empty() && !state.closed {
            state.queue.ops.push_back(Op::Remove(written));
        }
        drop(state);
        self.shared.work.notify_all();
        found
    }

    /// These are about to be replaced: what is on the disk is not to be found any more.
    pub(crate) fn hide(&self, keys: &[ObjectKey]) {
        let mut state = self.shared.state.lock();
        keys.iter().for_each(|key| state.hide(key));
    }

    /// Removes a namespace, or everything; says how many records.
    pub(crate) fn clear(&self, namespace: Option<NamespaceId>) -> u64 {
        let mut state = self.shared.state.lock();
        let (closed, cleared) = match namespace {
            Some(id) => (state.index.close_namespace(id), None),
            None => {
                state.forget_hidden();
                (None, Some(state.index.clear()))
            }
        };
        state.queue.forget_all(namespace);
        if !state.closed {
            state.queue.ops.push_back(Op::Clear(namespace));
        }
        drop(state);
        self.shared.work.notify_all();
        if let Some(closed) = &closed {
            self.shared.remove_namespace(closed);
        }
        if let Some(records) = &cleared {
            self.shared.report_gone(records);
        }
        let removed = closed.map_or(0, |closed| closed.entries);
        removed + cleared.map_or(0, |records| records.len() as u64)
    }

    /// Makes everything durable that was written or removed before. Ends also where the disk hangs.
    pub(crate) fn flush(&self) -> Result<()> {
        self.ask("flush", Op::Flush)
    }

    /// Writes what is queued and leaves the directory ready to be opened fast. Afterwards
    /// nothing is taken any more. A writer that hangs is left to itself: it does the same when the
    /// disk is back, if the process is still there.
    pub(crate) fn close(&self) -> Result<()> {
        if !self.is_here() {
            return Ok(());
        }
        let Some(writer) = self.writer.lock().take() else { return Ok(()) };
        let closed = self.ask("close", Op::Close);
        if !self.hangs() {
            // A writer that panicked has answered nothing worse than its own error.
            let _ = writer.join();
        }
        closed
    }

    fn ask(&self, doing: &'static str, op: impl FnOnce(Arc<Reply>) -> Op) -> Result<()> {
        let reply = Arc::new(Reply::default());
        let op = op(Arc::clone(&reply));
        let mut state = self.shared.state.lock();
        if state.closed {
            return Err(self.error(doing, std::io::Error::other("it is closed")));
        }
        state.closed = matches!(op, Op::Close(_));
        state.queue.ops.push_back(op);
        drop(state);
        self.shared.work.notify_all();
        self.shared.wait_for(&reply, self.flush_timeout).map_err(|source| self.error(doing, source))
    }

    fn error(&self, doing: &'static str, source: std::io::Error) -> Error {
        Error::Disk { dir: self.shared.dir.clone(), doing, source }
    }

    /// Drops what has expired from the index; says how many.
    pub(crate) fn sweep(&self) -> usize {
        let now_ms = self.shared.now_ms();
        self.shared.remove_where(|slot| slot.expires_at_ms <= now_ms)
    }

    /// One more than the highest layer of a namespace.
    pub(crate) fn layers(&self, id: NamespaceId) -> u32 {
        self.shared.state.lock().layers(id)
    }

    /// Lengths of the prefix texts of a namespace, shortest first.
    pub(crate) fn prefix_lengths(&self, id: NamespaceId, max_bytes: usize) -> Vec<usize> {
        self.shared.state.lock().index.namespaces().prefix_lengths(id, max_bytes)
    }

    /// Records and bytes of each namespace, in no order.
    pub(crate) fn usage(&self) -> Vec<(NamespaceId, Usage)> {
        self.shared.state.lock().index.namespaces().usage().collect()
    }

    /// Of what is written now, where no namespace says otherwise.
    fn codec_name(&self) -> &'static str {
        let codecs = &self.shared.codecs;
        if codecs.depends(None) && !self.shared.pace.pays() { "raw" } else { codecs.name() }
    }

    pub(crate) fn stats(&self) -> TierStats {
        let state = self.shared.state.lock();
        TierStats {
            entries: state.index.len() as u64,
            index_bytes: state.index.memory_bytes() as u64,
            queued_bytes: state.queue.bytes,
            encrypted: self.cipher.is_some(),
            codec: self.codec_name(),
            failing: state.writes.is_failing() || state.reads.is_failing() || state.hangs(),
            ..state.counters.clone()
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::warn!(error = %OneLine(&error), "the disk tier was not closed cleanly");
        }
    }
}
