//! Finding records and reading them, and what a read teaches of the disk.
//!
//! Invariant: the lock is never held while the disk is read. A record that is not what it should be is forgotten and
//! counted as damaged; a disk that does not answer is not asked again until it is back. Trying again at once was the
//! alternative: every request would then wait for a disk that is gone.

use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;

use super::Disk;
use super::coded::{At, Decoder};
use super::format::{PAGE_BYTES, RecordHeader};
use super::index::Found;
use super::segment::{Expected, ReadError};
use crate::error::Result;
use crate::key::ObjectKey;

/// Failed reads in a row that make the disk a failing one.
const BAD_READS: u32 = 3;

impl Disk {
    /// The record of a key, if it is on the disk and the disk can be read.
    pub(crate) fn find(&self, key: &ObjectKey) -> Option<Found> {
        let now_ms = self.shared.now_ms();
        let mut state = self.shared.state.lock();
        if state.hung_reads > 0 || !state.reads.allows(now_ms) {
            return None;
        }
        state.index.find(key, now_ms)
    }

    /// As [`Disk::find`], of many with one look.
    pub(super) fn find_each(&self, keys: &[ObjectKey]) -> Vec<Option<Found>> {
        let now_ms = self.shared.now_ms();
        let mut state = self.shared.state.lock();
        if state.hung_reads > 0 || !state.reads.allows(now_ms) {
            return vec![None; keys.len()];
        }
        keys.iter().map(|key| state.index.find(key, now_ms)).collect()
    }

    /// These were used without being read.
    pub(super) fn heat_each(&self, keys: &[ObjectKey]) {
        let mut state = self.shared.state.lock();
        keys.iter().for_each(|key| state.index.heat(key));
    }

    /// Reads a record into exactly its pages. `None` is a miss: the disk failed, or the record
    /// is not what it should be and is forgotten.
    pub(crate) fn read(&self, key: &ObjectKey, found: &Found, into: &mut [u8]) -> Option<RecordHeader> {
        let result = self.decoder().read(at(key, found), into);
        self.settle(key, found, found.slot.payload_pages as usize * PAGE_BYTES, result)
    }

    /// Reads these bytes of a block into as many.
    pub(crate) fn read_part(
        &self,
        key: &ObjectKey,
        found: &Found,
        range: &Range<usize>,
        into: &mut [u8],
    ) -> Option<RecordHeader> {
        let result = self.decoder().read_part(at(key, found), range, into);
        self.settle(key, found, range.len(), result)
    }

    fn decoder(&self) -> Decoder<'_> {
        Decoder { codecs: &self.shared.codecs, cipher: self.cipher.as_deref() }
    }

    /// Counts a read, and learns from a failed one.
    fn settle<T>(&self, key: &ObjectKey, found: &Found, bytes: usize, result: Result<T, ReadError>) -> Option<T> {
        let now_ms = self.shared.now_ms();
        let mut state = self.shared.state.lock();
        let error = match result {
            Ok(read) => {
                self.bad_reads.store(0, Relaxed);
                state.counters.hits += 1;
                state.counters.read_bytes_total += bytes as u64;
                state.index.heat(key);
                let is_back = state.reads.heal();
                drop(state);
                if is_back {
                    tracing::info!(dir = %self.shared.dir.display(), "the disk tier can be read again");
                }
                return Some(read);
            }
            Err(ReadError::NoRoom) => return None,
            Err(ReadError::Damaged | ReadError::UnknownCodec(_)) => {
                state.counters.damaged_total += 1;
                state.index.remove_at(key, &found.slot);
                return None;
            }
            Err(ReadError::Io(error)) => error,
        };
        state.counters.read_errors_total += 1;
        let is_new = self.bad_reads.fetch_add(1, Relaxed) + 1 >= BAD_READS && state.reads.fail(now_ms);
        drop(state);
        if is_new {
            tracing::warn!(dir = %self.shared.dir.display(), %error, "the disk tier cannot be read: going on without");
        }
        None
    }

    /// A read has run out of time: the disk is not asked again until it comes back.
    pub(crate) fn read_hangs(&self) {
        let is_new = {
            let mut state = self.shared.state.lock();
            state.counters.timeouts_total += 1;
            state.hung_reads += 1;
            state.hung_reads == 1
        };
        if is_new {
            tracing::warn!(dir = %self.shared.dir.display(), "the disk tier does not answer: going on without");
        }
    }

    /// A read that had run out of time came back.
    pub(crate) fn read_returns(&self) {
        let is_back = {
            let mut state = self.shared.state.lock();
            state.hung_reads = state.hung_reads.saturating_sub(1);
            state.hung_reads == 0
        };
        if is_back {
            tracing::info!(dir = %self.shared.dir.display(), "the disk tier answers again");
        }
    }
}

/// Where a record stands, and what it must be.
fn at<'a>(key: &ObjectKey, found: &'a Found) -> At<'a> {
    let Found { segment, namespace, slot } = found;
    let expected = Expected { key: *key, namespace: *namespace, codec: slot.codec() };
    At { segment, page: slot.page, payload_pages: slot.payload_pages, expected }
}
