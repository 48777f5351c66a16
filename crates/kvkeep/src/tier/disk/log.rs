//! The segments of a directory: the newest is appended to, full ones are sealed, and the oldest go to make room.
//! One thread owns it; readers never wait for it.
//!
//! Invariants:
//! - What is on the disk stays under the cap at every moment: room is made before it is taken, a segment's at once, and
//!   while segments can go there is room for one more, so that hot records of the oldest one can be written again before
//!   it goes. Where a record was written again, its old copy goes only after the new one is durable.
//! - Segments go oldest first. So a removal outlives everything that it removes.
//! - The manifest names a segment before it exists and until it is gone: an unnamed one is a leftover.
//! - A disk that is full before the cap is reached rotates as one that is full at its cap ([`Room`]).

use std::io;
use std::sync::Arc;

use super::active::{Active, Encoder, Record, Sealed, marker};
use super::crypt::Cipher;
use super::format::{HEADER_KEYS, Identity, Kind, Manifest, RecordMeta, SegmentLine, Trailer};
use super::index::SegmentNumber;
use super::io::{Backend, is_full};
use super::manifest::{self, Marks};
use super::pages::Pages;
use super::records::read_segment;
use super::room::{OVERHEAD_BYTES, Room};
use super::segment::{Expected, Segment, offset, segment_name};
use super::shared::Shared;
use crate::key::{NamespaceId, ObjectKey};

/// Written without a sync at most: what a recovery has to check byte by byte.
const SYNC_BYTES: u64 = 256 << 20;
/// Of a new segment, the part that records of an old one may take: three quarters. So a block is written four times at
/// most for each that is stored.
const REINSERT_PARTS: (u32, u32) = (3, 4);
/// Records that are looked up under one lock.
const RECORDS_AT_ONCE: usize = 256;
/// A full disk is asked so often for one request at most; every third time it has been freed of a segment. If that was
/// not enough, what goes frees nothing, as under a snapshot, or goes to somebody else.
const ASKED_AT_ONCE: usize = 12;

/// A segment in the order of its age.
#[derive(Debug)]
pub(crate) struct Line {
    pub(crate) segment: Arc<Segment>,
    pub(crate) number: SegmentNumber,
    /// As the manifest has it.
    pub(crate) listed: SegmentLine,
    pub(crate) allocated_bytes: u64,
}

/// A segment that the manifest names and nobody reads: lost, or not to be read for now.
#[derive(Debug)]
pub(crate) struct Aside {
    pub(crate) line: SegmentLine,
    /// Of the file, if there is one.
    pub(crate) bytes: u64,
}

/// Where a record was written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WrittenAt {
    pub(crate) segment: SegmentNumber,
    pub(crate) page: u32,
}

/// What the writer owns.
#[derive(Debug)]
pub(crate) struct Log {
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) cipher: Option<Arc<Cipher>>,
    pub(crate) room: Room,
    pub(crate) lines: Vec<Line>,
    /// Oldest first. They go in turn with the lines.
    pub(crate) aside: Vec<Aside>,
    /// Did an append get as far as to write records since this was last taken back?
    pub(crate) touched: bool,
    identity: Identity,
    encoder: Encoder,
    next_segment: u64,
    /// Evicted segments whose files are not gone yet, and their bytes.
    doomed: Vec<(u64, u64)>,
    /// The last line, while it is written.
    active: Option<Active>,
    /// `None` until a manifest was written.
    marks: Option<Marks>,
    shared: Arc<Shared>,
}

impl Log {
    pub(crate) fn new(
        backend: Arc<dyn Backend>,
        identity: Identity,
        cipher: Option<Arc<Cipher>>,
        capacity_bytes: u64,
        next_segment: u64,
        lines: Vec<Line>,
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            backend,
            encoder: Encoder::new(identity, cipher.clone()),
            identity,
            cipher,
            room: Room::new(capacity_bytes),
            next_segment,
            lines,
            aside: Vec::new(),
            doomed: Vec::new(),
            active: None,
            touched: false,
            marks: None,
            shared,
        }
    }

    /// Appends as many of these records, of at least one, as the newest segment has room for, with one write; says
    /// where they are.
    pub(crate) fn append(&mut self, records: &[Record<'_>]) -> io::Result<Vec<WrittenAt>> {
        let Some(first) = records.first() else { return Ok(Vec::new()) };
        let pages = first.meta.pages().ok_or(io::ErrorKind::FileTooLarge)?;
        self.with_room(|log| {
            if !log.fits(pages, 1) {
                log.rotate(pages)?;
            }
            let count = log.count_that_fit(pages, records);
            log.append_here(records.get(..count).unwrap_or_default())
        })
    }

    /// Appends removals of these keys.
    pub(crate) fn append_removals(&mut self, keys: &[ObjectKey], now_ms: u64) -> io::Result<()> {
        for keys in keys.chunks(HEADER_KEYS) {
            let meta = marker(Kind::Removal, NamespaceId::from_bytes([0; 32]), now_ms);
            self.append_marker(&meta, keys)?;
        }
        Ok(())
    }

    /// Appends that a namespace was cleared.
    pub(crate) fn append_cleared(&mut self, namespace: NamespaceId, now_ms: u64) -> io::Result<()> {
        self.append_marker(&marker(Kind::NamespaceCleared, namespace, now_ms), &[])
    }

    /// Removes everything, files too: a full disk has room then.
    pub(crate) fn clear(&mut self) -> io::Result<()> {
        self.active = None;
        while self.segments() > 0 {
            self.forget_oldest();
        }
        self.shrink()
    }

    /// Makes everything that was appended durable, and notes that it is.
    pub(crate) fn sync(&mut self) -> io::Result<()> {
        let Some(active) = &mut self.active else { return Ok(()) };
        if active.sync(self.backend.as_ref())? {
            let (segment, pages) = (active.segment.id, active.durable_pages);
            self.shared.progress();
            self.note_durable(segment, pages)?;
        }
        Ok(())
    }

    /// Seals the newest segment, so that the next opening is fast.
    pub(crate) fn close(&mut self) -> io::Result<()> {
        if self.active.is_some() {
            self.seal()?;
            self.with_room(Self::write_manifest)?;
        }
        Ok(())
    }

    /// Gives up the newest segment after a write or a sync failed: what is in it can be read,
    /// but nothing is known of what would come behind it.
    pub(crate) fn abandon(&mut self) {
        self.active = None;
    }

    /// Evicts until what lies here fits the limit.
    pub(crate) fn shrink(&mut self) -> io::Result<()> {
        while self.kept_bytes() > self.room.limit_bytes() && self.segments() > 0 {
            self.forget_oldest();
        }
        self.write_manifest()?;
        self.remove_doomed()
    }

    /// Bytes on the disk.
    pub(crate) fn used_bytes(&self) -> u64 {
        self.kept_bytes() + self.doomed.iter().map(|(_, bytes)| bytes).sum::<u64>()
    }

    /// Bytes on the disk once everything evicted is gone.
    fn kept_bytes(&self) -> u64 {
        let aside: u64 = self.aside.iter().map(|aside| aside.bytes).sum();
        OVERHEAD_BYTES + aside + self.lines.iter().map(|line| line.allocated_bytes).sum::<u64>()
    }

    fn segments(&self) -> usize {
        self.lines.len() + self.aside.len()
    }

    fn fits(&self, pages: u32, lines: usize) -> bool {
        self.active.as_ref().is_some_and(|active| active.fits(pages, lines))
    }

    /// How many of these fit together, the first of which takes `all` pages and does fit.
    fn count_that_fit(&self, mut all: u32, records: &[Record<'_>]) -> usize {
        let mut count = 1;
        for record in records.iter().skip(1) {
            // What is encrypted is written piece by piece anyway.
            let more = record.meta.pages().and_then(|pages| all.checked_add(pages));
            match more {
                Some(more) if self.cipher.is_none() && self.fits(more, count + 1) => all = more,
                _ => break,
            }
            count += 1;
        }
        count
    }

    fn append_marker(&mut self, meta: &RecordMeta, keys: &[ObjectKey]) -> io::Result<()> {
        self.with_room(|log| {
            // Each key takes a line of the index.
            if !log.fits(1, keys.len().max(1)) {
                log.rotate(1)?;
            }
            log.append_here(&[Record::marker(meta, keys)]).map(drop)
        })
    }

    /// There is room for all of them in the newest segment.
    fn append_here(&mut self, records: &[Record<'_>]) -> io::Result<Vec<WrittenAt>> {
        let active = self.active.as_mut().ok_or(io::ErrorKind::StorageFull)?;
        let segment = self.lines.last().ok_or(io::ErrorKind::StorageFull)?.number;
        self.touched = true;
        let pages = match active.append(records, &mut self.encoder) {
            Ok(pages) => pages,
            Err(error) => {
                self.abandon();
                return Err(error);
            }
        };
        self.shared.progress();
        if active.unsynced_bytes() >= SYNC_BYTES {
            self.sync()?;
        }
        Ok(pages.into_iter().map(|page| WrittenAt { segment, page }).collect())
    }

    /// Does something that takes room. On a disk that is full before the cap is reached the oldest segments make it:
    /// a cache may forget.
    fn with_room<T>(&mut self, mut action: impl FnMut(&mut Self) -> io::Result<T>) -> io::Result<T> {
        for _ in 0..ASKED_AT_ONCE {
            match action(self) {
                Err(error) if is_full(&error) => self.room.refused(self.kept_bytes(), self.shared.now_ms()),
                done => return done,
            }
        }
        action(self)
    }

    /// Seals the newest segment and begins another with room for `pages` pages.
    fn rotate(&mut self, pages: u32) -> io::Result<()> {
        self.seal()?;
        self.room.ask_for_more(self.shared.now_ms());
        let (ordinary, limit) = (self.room.segment_bytes(), self.room.limit_bytes());
        let needed = offset(1) + offset(pages) + offset(Trailer::tail_pages(HEADER_KEYS));
        let bytes = ordinary.max(needed);
        if OVERHEAD_BYTES + bytes > limit {
            // That a large record does not fit says nothing of the others.
            let kind = if bytes > ordinary { io::ErrorKind::FileTooLarge } else { io::ErrorKind::StorageFull };
            return Err(kind.into());
        }
        while self.kept_bytes() + bytes > limit && self.segments() > 0 {
            self.forget_oldest();
        }
        self.begin(bytes)?;
        self.room.granted();
        while self.kept_bytes() + ordinary > limit && self.segments() > 1 {
            self.evict_oldest()?;
        }
        Ok(())
    }

    /// Begins a segment, after those that went to make room for it are unlinked.
    fn begin(&mut self, bytes: u64) -> io::Result<()> {
        let (id, listed) = (self.next_segment, SegmentLine::open(self.next_segment));
        self.publish(Some(listed))?;
        self.remove_doomed()?;
        let made = Active::create(self.backend.as_ref(), self.identity, id, bytes);
        // The same number again the next time: a gap would look like a loss, should the manifest be lost.
        let (active, allocated_bytes) = made.inspect_err(|_| drop(self.backend.remove(&segment_name(id))))?;
        self.next_segment += 1;
        let segment = Arc::clone(&active.segment);
        let number = self.shared.state.lock().index.add_segment(Arc::clone(&segment));
        let number = number.ok_or(io::ErrorKind::StorageFull)?;
        self.lines.push(Line { segment, number, listed, allocated_bytes });
        self.active = Some(active);
        Ok(())
    }

    /// Closes the newest segment, if one is being written. The manifest is not written.
    fn seal(&mut self) -> io::Result<()> {
        let Some(mut active) = self.active.take() else { return Ok(()) };
        let sealed = active.seal(self.backend.as_ref())?;
        self.shared.progress();
        // Should the next manifest never be written, this one knows of the segment what there is to know.
        self.note_durable(active.segment.id, active.end_page)?;
        if let Some(line) = self.lines.iter_mut().find(|line| line.segment.id == active.segment.id) {
            line.seal(sealed);
        }
        Ok(())
    }

    fn note_durable(&mut self, segment: u64, durable_pages: u32) -> io::Result<()> {
        if let Some(line) = self.lines.iter_mut().find(|line| line.segment.id == segment) {
            line.listed.durable_pages = durable_pages;
        }
        match &mut self.marks {
            Some(marks) => marks.durable(segment, durable_pages),
            None => self.write_manifest(),
        }
    }

    /// Writes down which segments there are.
    fn write_manifest(&mut self) -> io::Result<()> {
        self.publish(None)
    }

    /// A full disk has no room for a manifest until something is gone: then the one that is there says so in place.
    fn publish(&mut self, next: Option<SegmentLine>) -> io::Result<()> {
        let manifest = self.manifest(next);
        match manifest::write(self.backend.as_ref(), &manifest, &mut self.marks) {
            Err(_) if !self.doomed.is_empty() => {
                if let Some(marks) = &mut self.marks {
                    marks.gone(self.doomed.iter().map(|(segment, _)| *segment))?;
                }
                self.remove_doomed()?;
                manifest::write(self.backend.as_ref(), &manifest, &mut self.marks)
            }
            written => written,
        }
    }

    fn manifest(&self, next: Option<SegmentLine>) -> Manifest {
        let listed = self.lines.iter().map(|line| line.listed);
        let mut segments: Vec<SegmentLine> = listed.chain(self.aside.iter().map(|aside| aside.line)).collect();
        segments.extend(next);
        segments.sort_unstable_by_key(|line| line.segment);
        let next_segment = self.next_segment + u64::from(next.is_some());
        Manifest { identity: self.identity, next_segment, segments, has_marks: true }
    }

    /// Evicts the oldest segment, after what is hot in it has been written again.
    fn evict_oldest(&mut self) -> io::Result<()> {
        if !self.is_aside_oldest() {
            self.reinsert_hot()?;
        }
        self.forget_oldest();
        self.write_manifest()?;
        self.remove_doomed()
    }

    fn is_aside_oldest(&self) -> bool {
        let aside = self.aside.first().map(|aside| aside.line.segment);
        aside.is_some_and(|aside| self.lines.first().is_none_or(|line| aside < line.segment.id))
    }

    /// Takes the oldest segment out of everything but the directory.
    fn forget_oldest(&mut self) {
        if self.is_aside_oldest() {
            let aside = self.aside.remove(0);
            self.doomed.push((aside.line.segment, aside.bytes));
            return;
        }
        let line = self.lines.remove(0);
        self.doomed.push((line.segment.id, line.allocated_bytes));
        let evicted = self.shared.remove_segment(line.number);
        self.shared.state.lock().counters.evictions += evicted as u64;
    }

    /// Unlinks what was evicted and is no longer in the manifest.
    fn remove_doomed(&mut self) -> io::Result<()> {
        while let Some((id, _)) = self.doomed.last() {
            match self.backend.remove(&segment_name(*id)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => self.doomed.pop(),
            };
            self.shared.progress();
        }
        Ok(())
    }

    /// Writes what is worth keeping of the oldest segment again, within a budget: what is in RAM first, then the last used.
    fn reinsert_hot(&mut self) -> io::Result<()> {
        let Some(oldest) = self.lines.first() else { return Ok(()) };
        let (segment, number, entries) = (Arc::clone(&oldest.segment), oldest.number, oldest.listed.entries);
        let mut budget =
            self.active.as_ref().map_or(0, |active| active.capacity_pages / REINSERT_PARTS.1 * REINSERT_PARTS.0);
        let mut any = false;
        for (page, meta) in self.worth_keeping(&segment, number, entries) {
            let pages = meta.pages().unwrap_or(u32::MAX);
            if pages > budget || !self.fits(pages, 1) {
                continue;
            }
            budget -= pages;
            any |= self.reinsert(&segment, number, page, &meta)?;
        }
        // Before the old copy goes, the new one must be there to stay.
        if any { self.sync() } else { Ok(()) }
    }

    fn worth_keeping(&self, segment: &Segment, number: SegmentNumber, entries: u32) -> Vec<(u32, RecordMeta)> {
        let records = read_segment(segment, Some(entries), 0).entries;
        let stored: Vec<(u32, RecordMeta)> = records.into_iter().filter(|(_, meta)| meta.kind.is_stored()).collect();
        let keys: Vec<ObjectKey> = stored.iter().map(|(_, meta)| meta.key.0).collect();
        let resident = self.shared.resident(&keys);
        let mut kept = Vec::new();
        for (records, resident) in stored.chunks(RECORDS_AT_ONCE).zip(resident.chunks(RECORDS_AT_ONCE)) {
            let state = self.shared.state.lock();
            for ((page, meta), resident) in records.iter().zip(resident) {
                let Some(slot) = state.index.at(&meta.key.0, number, *page) else { continue };
                let age = if *resident { Some(0) } else { state.index.kept_age(&meta.key.0, number, *page) };
                let meta = meta.expiring(slot.expires_at_ms);
                kept.extend(age.map(|age| (age, (*page, meta))));
            }
        }
        kept.sort_by_key(|(age, _)| *age);
        kept.into_iter().map(|(_, record)| record).collect()
    }

    fn reinsert(&mut self, segment: &Segment, number: SegmentNumber, page: u32, meta: &RecordMeta) -> io::Result<bool> {
        let mut payload = Pages::new(meta.payload_pages().unwrap_or(0) as usize);
        let expected = Expected::from(meta);
        let Ok(mut header) = segment.read(page, &expected, self.cipher.as_deref(), payload.bytes_mut()) else {
            return Ok(false);
        };
        // What opening found too long stays cut.
        header.meta = header.meta.expiring(meta.expires_at_ms);
        let record =
            Record { meta: &header.meta, content: &header.content, keys: &[], payload: payload.bytes(), sums: None };
        let written = self.append_here(&[record])?;
        let Some(written) = written.first() else { return Ok(false) };
        let mut state = self.shared.state.lock();
        // It may have been removed or replaced while it was copied.
        if state.index.relocate(&meta.key.0, (number, page), (written.segment, written.page)) {
            state.counters.reinserted_total += 1;
        }
        Ok(true)
    }
}

impl Line {
    /// It was given an index.
    pub(crate) fn seal(&mut self, sealed: Sealed) {
        let Sealed { size, pages, entries } = sealed;
        self.listed = SegmentLine { sealed: true, entries, pages, durable_pages: 0, ..self.listed };
        self.allocated_bytes = size.allocated_bytes.max(size.bytes);
    }
}
