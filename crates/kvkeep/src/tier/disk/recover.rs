//! Opening a directory: what of it is whole, and what it means.
//!
//! Segments are replayed oldest first: a later record wins over an earlier one, a removal
//! over what it names. Where something that was durable has been lost (a segment that the
//! manifest names, an index that does not check, a header in front of durable ones), the
//! lost part may have replaced a named entry or removed it: named entries older than the
//! loss are dropped, and removals of them are durable before the manifest stops to name what
//! is lost. Blocks stay: under a block's key there are never other bytes.
//!
//! What the disk fails to read counts as lost until the next opening, and is kept. Removing it
//! was the alternative: an error that passes would have cost a segment.

use std::io;
use std::sync::Arc;

use super::active::seal_segment;
use super::crypt::Cipher;
use super::format::{Kind, RecordMeta, SegmentLine};
use super::index::SegmentNumber;
use super::io::Backend;
use super::log::{Aside, Line, Log};
use super::records::Records;
use super::segment::Segment;
use super::shared::Shared;
use super::survey::{Listed, Refusal, Seen, Survey, Surveyed, survey};
use crate::codec::CodecId;
use crate::key::ObjectKey;

/// Records that are put into the index under one lock.
const RECORDS_AT_ONCE: usize = 1024;

/// A directory that is being opened.
struct Opening<'a> {
    cipher: Option<Arc<Cipher>>,
    shared: &'a Arc<Shared>,
    lines: Vec<Line>,
    /// What the manifest goes on to name until it is settled: lost segments, and such as cannot be read.
    aside: Vec<Aside>,
    /// Segments in which something is lost, to be given an index of what is left.
    unsealed: Vec<(Arc<Segment>, Records)>,
    /// Keys of all named records so far.
    named: Vec<ObjectKey>,
    /// Those of them that are older than a loss.
    unsure: Vec<ObjectKey>,
    lost: usize,
    unreadable: usize,
    /// The codec of each record that nobody here can decode.
    unknown: Vec<CodecId>,
}

/// Opens a directory for writing: afterwards the index is filled, every segment that is wholly known sealed, and
/// what lies there fits the cap.
pub(crate) fn open(
    backend: Arc<dyn Backend>,
    cipher: Option<Arc<Cipher>>,
    capacity_bytes: u64,
    shared: &Arc<Shared>,
) -> Result<Log, Refusal> {
    let Survey { identity, next_segment, segments, foreign, leftovers, .. } =
        survey(backend.as_ref(), cipher.as_deref(), true)?;
    for name in &leftovers {
        backend.remove(name)?;
    }
    shared.state.lock().counters.foreign_files = foreign.len() as u64;
    let mut opening = Opening::new(cipher.clone(), shared);
    for listed in segments {
        opening.take(listed)?;
    }
    let lines = std::mem::take(&mut opening.lines);
    let log = Log::new(backend, identity, cipher, capacity_bytes, next_segment, lines, Arc::clone(shared));
    opening.finish(log)
}

impl<'a> Opening<'a> {
    fn new(cipher: Option<Arc<Cipher>>, shared: &'a Arc<Shared>) -> Self {
        let (lines, aside, unsealed, named, unsure, unknown) = Default::default();
        Self { cipher, shared, lines, aside, unsealed, named, unsure, lost: 0, unreadable: 0, unknown }
    }

    /// Takes the next segment.
    fn take(&mut self, listed: Listed) -> io::Result<()> {
        let Listed { line, seen } = listed;
        match seen {
            Seen::Ours(surveyed) => return self.replay(&surveyed, line),
            Seen::Missing | Seen::Damaged => {
                self.aside.push(Aside { line, bytes: 0 });
                self.lose();
            }
            Seen::Unreadable(bytes) => {
                self.aside.push(Aside { line, bytes });
                self.leave_aside();
            }
        }
        Ok(())
    }

    /// Puts a segment's records into the index, and an index at its end if it has none and nothing of it is lost.
    fn replay(&mut self, surveyed: &Surveyed, listed: SegmentLine) -> io::Result<()> {
        let segment = Arc::clone(&surveyed.segment);
        let (records, _) = surveyed.read_whole(self.cipher.as_deref());
        let unknown = records.entries.iter().filter(|(_, meta)| meta.kind.is_stored() && !self.knows(meta));
        let unknown: Vec<CodecId> = unknown.map(|(_, meta)| meta.codec).collect();
        self.unknown.extend(unknown);
        let number = self.index(&segment, &records)?;
        let named = records.entries.iter().filter(|(_, meta)| meta.kind == Kind::Named);
        self.named.extend(named.map(|(_, meta)| meta.key.0));
        let size = segment.file.size()?;
        let allocated_bytes = size.allocated_bytes.max(size.bytes);
        let mut line = Line { segment: Arc::clone(&segment), number, listed, allocated_bytes };
        match (records.index_end, records.lost, records.unreadable) {
            (Some(pages), false, _) => line.index_is_whole(pages, records.entries.len()),
            (None, false, _) => line.seal_anew(&records),
            // What is there now is all that there will ever be.
            (_, true, false) => {
                self.lose();
                self.unsealed.push((segment, records));
            }
            (_, true, true) => self.leave_aside(),
        }
        self.lines.push(line);
        Ok(())
    }

    fn index(&self, segment: &Arc<Segment>, records: &Records) -> io::Result<SegmentNumber> {
        let number = {
            let mut state = self.shared.state.lock();
            state.index.reserve(records.entries.len());
            state.index.add_segment(Arc::clone(segment)).ok_or(io::ErrorKind::StorageFull)?
        };
        // In slices: a directory may come back while requests go on.
        records.entries.chunks(RECORDS_AT_ONCE).for_each(|records| self.index_some(number, records));
        Ok(number)
    }

    fn index_some(&self, number: SegmentNumber, records: &[(u32, RecordMeta)]) {
        let now_ms = self.shared.now_ms();
        let mut state = self.shared.state.lock();
        for (page, meta) in records {
            let meta = meta.expiring(meta.expires_at_ms(now_ms));
            match meta.kind {
                Kind::Block | Kind::Named if meta.expires_at_ms > now_ms && self.knows(&meta) => {
                    state.index.insert(&meta, number, *page, 0);
                    self.shared.pace.finds(meta.codec);
                }
                // One that has expired or cannot be decoded still replaces what was before it.
                Kind::Block | Kind::Named | Kind::Removal => drop(state.index.remove(&meta.key.0)),
                Kind::NamespaceCleared => {
                    let closed = state.index.close_namespace(meta.namespace);
                    drop(state);
                    closed.iter().for_each(|closed| self.shared.remove_namespace(closed));
                    state = self.shared.state.lock();
                }
                Kind::Cleared => {
                    drop(state);
                    self.shared.remove_everything();
                    state = self.shared.state.lock();
                }
            }
        }
    }

    fn knows(&self, meta: &RecordMeta) -> bool {
        self.shared.codecs.reading(meta.namespace, meta.codec).is_some()
    }

    /// Something is lost that may have replaced or removed any named record before it.
    fn lose(&mut self) {
        self.lost += 1;
        self.unsure.append(&mut self.named);
        let dropped = self.shared.remove_named();
        let mut state = self.shared.state.lock();
        state.counters.damaged_total += 1 + dropped as u64;
    }

    /// Something cannot be read now. As long as that is so, it may as well be lost.
    fn leave_aside(&mut self) {
        self.unreadable += 1;
        self.shared.remove_named();
        let mut state = self.shared.state.lock();
        state.counters.read_errors_total += 1;
    }

    /// Settles what is lost: what may have been replaced or removed there is removed for good, before the manifest
    /// stops to name what is lost. Not while something cannot be read, which may hold more of it.
    fn finish(mut self, mut log: Log) -> Result<Log, Refusal> {
        let shared = self.shared;
        log.aside = std::mem::take(&mut self.aside);
        self.unsure.retain(|key| !shared.state.lock().index.contains(key, 0));
        let settled = self.unreadable == 0 && (self.unsure.is_empty() || self.remove_unsure(&mut log));
        if settled {
            log.aside.clear();
            for (segment, records) in &self.unsealed {
                let line = log.lines.iter_mut().find(|line| line.segment.id == segment.id);
                line.into_iter().for_each(|line| line.seal_anew(records));
            }
        }
        {
            let mut state = shared.state.lock();
            state.aside = !settled;
            state.counters.unknown_codec_records = self.unknown.len() as u64;
        }
        self.say();
        match log.shrink() {
            Err(error) if is_forbidden(&error) => return Err(error.into()),
            Err(error) => shared.write_failed(&error),
            Ok(()) => {}
        }
        Ok(log)
    }

    fn say(&self) {
        let Self { shared, lost, unreadable, ref unknown, .. } = *self;
        if let Some(codec) = unknown.first() {
            tracing::warn!(
                dir = %shared.dir.display(),
                records = unknown.len(),
                %codec,
                "the disk tier holds records of a codec that is not known here: they are misses. Open it with a release \
                 that knows the codec, or let them age out"
            );
        }
        if lost > 0 {
            tracing::warn!(
                dir = %shared.dir.display(),
                segments = lost,
                "the disk tier has lost segments or parts of them: what was there is a miss"
            );
        }
        if unreadable > 0 {
            tracing::warn!(
                dir = %shared.dir.display(),
                segments = unreadable,
                "the disk tier cannot read some segments: left aside until it is opened again"
            );
        }
    }

    /// Says whether it got there to stay.
    fn remove_unsure(&self, log: &mut Log) -> bool {
        match log.append_removals(&self.unsure, self.shared.now_ms()).and_then(|()| log.sync()) {
            Ok(()) => true,
            Err(error) => {
                self.shared.write_failed(&error);
                log.abandon();
                false
            }
        }
    }
}

impl Line {
    fn index_is_whole(&mut self, pages: u32, entries: usize) {
        let entries = u32::try_from(entries).unwrap_or(u32::MAX);
        self.listed = SegmentLine { sealed: true, entries, pages, durable_pages: 0, ..self.listed };
    }

    /// Writes an index of these records. Where that fails, the next opening does it.
    fn seal_anew(&mut self, records: &Records) {
        if let Ok(sealed) = seal_segment(&self.segment, records.end_page, &records.entries) {
            self.seal(sealed);
        }
    }
}

/// Trying again would not help.
fn is_forbidden(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem)
}
