//! What the writer, the readers and the callers of the disk tier share: the index, the
//! queue of what is to be written, and how the disk is doing.
//!
//! One lock, never held across I/O, and never while a payload is dropped: a payload gives
//! its pages back to the RAM tier, whose lock comes before this one.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use super::format::{Kind, RecordMeta};
use super::index::{self, DiskIndex, SegmentNumber, Slot};
use super::pace::Pace;
use super::queue::{Op, Queue, Reply};
use crate::clock::{Clock, Deadline, Moment};
use crate::codec::Codecs;
use crate::key::{NamespaceId, ObjectKey};
use crate::namespaces::Closed;
use crate::stats::TierStats;
use crate::sync::{Condvar, Mutex};
use crate::tier::Payload;

const FIRST_RETRY_MS: u64 = 100;
/// More hidden records than this are removed at once.
const MAX_HIDDEN: usize = 1 << 16;
const LAST_RETRY_MS: u64 = 60_000;

/// Says which keys are in RAM.
pub(crate) type Resident = Box<dyn Fn(&[ObjectKey]) -> Vec<bool> + Send + Sync>;

#[derive(Default)]
pub(crate) struct DiskState {
    pub(crate) index: DiskIndex,
    pub(crate) queue: Queue,
    pub(crate) counters: TierStats,
    pub(crate) writes: Latch,
    pub(crate) reads: Latch,
    /// Reads that ran out of time and have not come back.
    pub(crate) hung_reads: usize,
    /// Named records that were replaced in RAM and must not be found any more. Their successors
    /// replace them on the disk too; where none gets there, the next flush writes a removal. Not
    /// before: a crash in between would leave neither.
    hidden: HashSet<ObjectKey>,
    /// Counts what the writer gets done on the disk.
    progress: u64,
    /// When it last got something done, or had nothing to do.
    pub(crate) progress_at_ms: u64,
    /// The same in real time.
    moved: Option<Moment>,
    /// How long somebody has waited for the writer in vain since it last got something done.
    pub(crate) stalled_for: Duration,
    /// There are segments that cannot be read for now. Anything may be in them: what is removed or replaced is removed
    /// there too, known or not.
    pub(crate) aside: bool,
    /// Nothing is taken any more.
    pub(crate) closed: bool,
}

pub(crate) struct Shared {
    /// For what is said of it.
    pub(crate) dir: PathBuf,
    /// Comes after the store's lock.
    pub(crate) state: Mutex<DiskState>,
    /// Something is queued.
    pub(crate) work: Condvar,
    /// Something left the queue, or was answered.
    pub(crate) room: Condvar,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) codecs: Codecs,
    pub(crate) pace: Pace,
    resident: OnceLock<Resident>,
}

/// A payload in the queue. It counts until its last holder has dropped it: the writer, or whoever
/// works ahead of it. Who waits for its pages goes by that.
struct Counted {
    payload: Option<Arc<dyn Payload>>,
    bytes: u64,
    shared: Weak<Shared>,
}

/// Is something failing, and when is it worth another try?
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Latch {
    attempts: u32,
    retry_at_ms: u64,
}

impl Shared {
    pub(crate) fn new(dir: &Path, clock: Arc<dyn Clock>, codecs: Codecs) -> Self {
        Self {
            dir: dir.to_owned(),
            state: Mutex::new(DiskState::default()),
            work: Condvar::default(),
            room: Condvar::default(),
            clock,
            codecs,
            pace: Pace::default(),
            resident: OnceLock::new(),
        }
    }

    /// Says once and for all who knows what is in RAM.
    pub(crate) fn set_resident(&self, resident: Resident) {
        // A second one would be the same store's.
        let _ = self.resident.set(resident);
    }

    /// Which of these keys are in RAM. Called without a lock held.
    pub(crate) fn resident(&self, keys: &[ObjectKey]) -> Vec<bool> {
        self.resident.get().map_or_else(|| vec![false; keys.len()], |resident| resident(keys))
    }

    pub(crate) fn now_ms(&self) -> u64 {
        self.clock.now_ms()
    }

    /// Forgets a segment and everything in it; says how many records that were. In slices: between two of them others
    /// get the lock.
    pub(crate) fn remove_segment(&self, number: SegmentNumber) -> usize {
        self.state.lock().index.close_segment(number);
        let removed = self.remove_all(|slot| slot.segment == number);
        self.state.lock().index.free_segment(number);
        removed
    }

    /// Forgets what a namespace had when it was closed, in slices.
    pub(crate) fn remove_namespace(&self, closed: &Closed) {
        self.remove_all(|slot| slot.namespace == closed.number);
        self.state.lock().index.free_namespace(closed);
    }

    /// Forgets everything; says how many records that were.
    pub(crate) fn remove_everything(&self) -> usize {
        let records = self.state.lock().index.clear();
        self.report_gone(&records);
        records.len()
    }

    /// Reports that these are gone which were taken out of the index, in slices: a listener of a million of them held
    /// the lock for as long as it takes to tell of all.
    pub(crate) fn report_gone(&self, records: &index::Records) {
        let mut next = Some(0);
        while let Some(from) = next {
            next = self.state.lock().index.report_gone(records, from);
        }
    }

    /// Forgets everything that a later record could have replaced or removed unseen, in slices; says how many records.
    pub(crate) fn remove_named(&self) -> usize {
        self.remove_all(Slot::is_named)
    }

    /// Removes from the index in slices, until a look at all of it finds no more.
    fn remove_all(&self, goes: impl Fn(&Slot) -> bool) -> usize {
        let mut removed = 0;
        loop {
            // A table that grew meanwhile may have moved some out of sight.
            let now = self.remove_where(&goes);
            removed += now;
            if now == 0 {
                return removed;
            }
        }
    }

    /// Removes from the index in slices; says how many records.
    pub(crate) fn remove_where(&self, goes: impl Fn(&Slot) -> bool) -> usize {
        let (mut removed, mut next) = (0, Some(0));
        while let Some(from) = next {
            let (now, then) = self.state.lock().index.remove_some(from, &goes);
            (removed, next) = (removed + now, then);
        }
        removed
    }

    /// The writer has got something done on the disk.
    pub(crate) fn progress(&self) {
        let now_ms = self.now_ms();
        let is_back = {
            let mut state = self.state.lock();
            state.progress += 1;
            state.moved(now_ms);
            !std::mem::take(&mut state.stalled_for).is_zero()
        };
        if is_back {
            tracing::info!(dir = %self.dir.display(), "the disk tier gets on again");
        }
    }

    /// The disk has failed to write: counted, latched, and said the first time.
    pub(crate) fn write_failed(&self, error: &io::Error) {
        let now_ms = self.now_ms();
        let is_new = {
            let mut state = self.state.lock();
            state.counters.write_errors_total += 1;
            state.writes.fail(now_ms)
        };
        if is_new {
            tracing::warn!(dir = %self.dir.display(), %error, "the disk tier cannot be written: going on without");
        }
    }

    pub(crate) fn answer(&self, reply: &Reply, result: io::Result<()>) {
        {
            let _state = self.state.lock();
            *reply.0.lock() = Some(result);
        }
        self.room.notify_all();
    }

    /// Waits for an answer, as long as the writer gets on.
    pub(crate) fn wait_for(&self, reply: &Reply, at_most: Duration) -> io::Result<()> {
        self.wait_while(at_most, |_| reply.0.lock().is_none());
        reply.0.lock().take().unwrap_or_else(|| Err(hang(at_most)))
    }

    /// Waits while this is so, and the writer gets something done at least once in `at_most`; says
    /// whether it ended. A writer that has once taken too long is not waited for again until
    /// it has got on.
    pub(crate) fn wait_while(&self, at_most: Duration, so: impl Fn(&DiskState) -> bool) -> bool {
        let mut state = self.state.lock();
        while so(&state) {
            if state.stalled_for >= at_most {
                return false;
            }
            let before = state.progress;
            let (again, timed_out) = self.room.wait_timeout(state, at_most);
            state = again;
            if timed_out && state.progress == before && so(&state) {
                let said = state.stalls(at_most);
                drop(state);
                self.say_stall(said);
                state = self.state.lock();
            }
        }
        true
    }

    /// Waits until something has left a queue of so many bytes, or the deadline; says whether it is worth another try.
    /// A writer that has got nothing done for so long is not waited for: who may wait longer does. After `at_most` of it
    /// nobody waits any more.
    pub(crate) fn wait_for_room(&self, deadline: Deadline, queue_bytes: u64, at_most: Duration) -> bool {
        let patience = deadline.left();
        let mut state = self.state.lock();
        if state.closed || state.stalled_for >= patience || !state.writes.allows(self.now_ms()) {
            return false;
        }
        let before = state.queue.bytes;
        while state.queue.bytes > 0 && state.queue.bytes >= before.min(queue_bytes) && !deadline.is_over() {
            let (again, timed_out) = self.room.wait_timeout(state, deadline.left());
            state = again;
            if timed_out && state.idle() >= at_most / 4 * 3 {
                let said = state.stalls(at_most);
                drop(state);
                self.say_stall(said);
                return false;
            }
            if !state.writes.allows(self.now_ms()) {
                return false;
            }
        }
        let is_over = deadline.is_over();
        if is_over && !state.stalled_for.is_zero() && state.idle() >= patience {
            // It hangs, and has now been waited for longer than before.
            state.stalled_for = state.stalled_for.max(patience);
        }
        !is_over
    }

    /// Says that the writer gets nothing done, if that is news.
    pub(crate) fn say_stall(&self, is_new: bool) {
        if is_new {
            tracing::warn!(dir = %self.dir.display(), "the disk tier gets nothing done: going on without");
        }
    }
}

/// What whoever waited so long for the writer is told.
pub(crate) fn hang(waited: Duration) -> io::Error {
    let text = format!(
        "the disk has got nothing done for {waited:?}: it may hang, or be slower than the configured flush_timeout"
    );
    io::Error::new(io::ErrorKind::TimedOut, text)
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

impl DiskState {
    /// Does a read or a write take longer than anybody waits?
    pub(crate) fn hangs(&self) -> bool {
        self.hung_reads > 0 || !self.stalled_for.is_zero()
    }

    /// The writer got something done, or has something to do from now on.
    pub(crate) fn moved(&mut self, now_ms: u64) {
        self.progress_at_ms = now_ms;
        self.moved = Some(Moment::now());
    }

    /// How long the writer has got nothing done, in real time.
    pub(crate) fn idle(&self) -> Duration {
        self.moved.map_or(Duration::ZERO, |moved| moved.elapsed())
    }

    /// The queue has no room: is it because the writer has got nothing done for so long? Says whether that is news.
    pub(crate) fn look_for_stall(&mut self, now_ms: u64, at_most: Duration) -> bool {
        let idle = Duration::from_millis(now_ms.saturating_sub(self.progress_at_ms));
        let waits = self.queue.bytes > 0 && !self.writes.is_failing();
        waits && idle >= at_most && self.stalled_for.is_zero() && self.stalls(at_most)
    }

    /// Nothing was done for so long: counted. Says whether that is news.
    pub(crate) fn stalls(&mut self, waited: Duration) -> bool {
        let is_new = self.stalled_for.is_zero();
        self.counters.timeouts_total += u64::from(is_new);
        self.stalled_for = waited;
        is_new
    }

    /// Is a record to be written? Not a block that is there already. An older named one can no
    /// longer be found.
    pub(crate) fn needs(&mut self, meta: &RecordMeta, now_ms: u64) -> bool {
        if meta.kind == Kind::Block {
            return !self.index.contains(&meta.key.0, now_ms) && !self.queue.wants(&meta.key.0, now_ms);
        }
        self.hide(&meta.key.0);
        true
    }

    /// One more than the highest layer of a namespace that is on the disk, or on its way there.
    pub(crate) fn layers(&self, id: NamespaceId) -> u32 {
        self.index.namespaces().layers(id).max(self.queue.layers(id))
    }

    /// What is on the disk under a key, or on its way there, is not to be found any more.
    pub(crate) fn hide(&mut self, key: &ObjectKey) {
        let (known, queued) = (self.index.remove(key), self.queue.forget(key));
        let newly = (known || queued || self.aside) && self.hidden.insert(*key);
        // Those with a successor in the queue stay.
        if newly && self.hidden.len().is_multiple_of(MAX_HIDDEN) {
            let hidden = self.take_hidden();
            self.queue.ops.push_back(Op::Remove(hidden));
        }
    }

    /// It was not written, as far as anybody knows; but it may have got there before the disk failed, and must not
    /// come back once it was removed.
    pub(crate) fn doubt(&mut self, key: &ObjectKey) {
        self.hidden.insert(*key);
    }

    /// Something newer is on the disk under this key; says whether something was hidden.
    pub(crate) fn settle(&mut self, key: &ObjectKey) -> bool {
        self.hidden.remove(key)
    }

    /// Hidden records without a successor that is queued: to be removed for good.
    pub(crate) fn take_hidden(&mut self) -> Vec<ObjectKey> {
        let Self { hidden, queue, .. } = self;
        hidden.extract_if(|key| !queue.has(key)).collect()
    }

    /// Everything is gone, what was hidden too.
    pub(crate) fn forget_hidden(&mut self) {
        self.hidden.clear();
    }
}

impl Shared {
    /// A payload that counts its bytes out of the queue when its last holder drops it.
    pub(crate) fn counted(self: &Arc<Self>, payload: Arc<dyn Payload>) -> Arc<dyn Payload> {
        Arc::new(Counted::new(payload, self))
    }
}

impl Counted {
    fn new(payload: Arc<dyn Payload>, shared: &Arc<Shared>) -> Self {
        Self { bytes: payload.bytes().len() as u64, payload: Some(payload), shared: Arc::downgrade(shared) }
    }
}

impl Payload for Counted {
    fn bytes(&self) -> &[u8] {
        self.payload.as_ref().map_or(&[], |payload| payload.bytes())
    }

    fn written(&self, is_new: bool) {
        if let Some(payload) = &self.payload {
            payload.written(is_new);
        }
    }
}

impl Drop for Counted {
    /// The pages first, then what is said of them.
    fn drop(&mut self) {
        drop(self.payload.take());
        if let Some(shared) = self.shared.upgrade() {
            shared.state.lock().queue.bytes -= self.bytes;
            shared.room.notify_all();
        }
    }
}

impl Latch {
    pub(crate) fn is_failing(&self) -> bool {
        self.attempts > 0
    }

    /// Is it worth trying?
    pub(crate) fn allows(&self, now_ms: u64) -> bool {
        !self.is_failing() || now_ms >= self.retry_at_ms
    }

    /// Another failure: the next try comes twice as late. Says whether it is the first.
    pub(crate) fn fail(&mut self, now_ms: u64) -> bool {
        let wait_ms = FIRST_RETRY_MS.checked_shl(self.attempts.min(16)).unwrap_or(LAST_RETRY_MS).min(LAST_RETRY_MS);
        self.retry_at_ms = now_ms.saturating_add(wait_ms);
        self.attempts = self.attempts.saturating_add(1);
        self.attempts == 1
    }

    /// It works; says whether it did not before.
    pub(crate) fn heal(&mut self) -> bool {
        std::mem::take(&mut self.attempts) > 0
    }
}
