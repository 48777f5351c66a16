//! The writing side: records appended to the newest segment, segments sealed, begun and
//! evicted ([`room`]). One thread owns it; readers never wait for it.
//!
//! Invariants:
//! - What is on the disk stays under the cap at every moment: room is made before it is taken,
//!   a segment's at once, and while segments can go there is room for one more, so that hot
//!   records of the oldest one can be written again before it goes.
//! - Segments go oldest first. So a removal outlives everything that it removes.
//! - The manifest names a segment before it exists and until it is gone: an unnamed one is a
//!   leftover.

mod room;

use std::io;
use std::sync::Arc;

use super::crypt::{self, Cipher};
use super::format::{
    CipherKind, Content, HEADER_KEYS, Identity, Kind, Manifest, PAGE_BYTES, Place, RecordHeader, RecordMeta,
    SegmentHeader, SegmentLine, Trailer, encode_index,
};
use super::index::SegmentNumber;
use super::io::{Backend, Pages};
use super::manifest;
use super::segment::{Segment, offset};
use super::shared::{Shared, Sums};
use crate::key::{NamespaceId, ObjectKey};

/// What the directory, its lock and two manifests take at most.
pub(crate) const OVERHEAD_BYTES: u64 = 64 << 10;
/// Below this there is no room for segments that can take turns.
pub(crate) const MIN_CAPACITY_BYTES: u64 = 1 << 20;
const MIN_SEGMENT_BYTES: u64 = 128 << 10;
const MAX_SEGMENT_BYTES: u64 = 1 << 30;
/// A segment is this part of the cap: what is evicted at once.
const SEGMENTS: u64 = 32;
/// Written without a sync at most: what a recovery has to check byte by byte.
const SYNC_BYTES: u64 = 256 << 20;
/// No process lives to write so many.
const MAX_SEGMENT: u64 = u64::MAX >> 1;
/// Encrypted and copied this many pages at a time.
const BOUNCE_PAGES: usize = 256;

/// A segment in the order of its age.
#[derive(Debug)]
pub(crate) struct Line {
    pub(crate) segment: Arc<Segment>,
    pub(crate) number: SegmentNumber,
    pub(crate) sealed: bool,
    pub(crate) entries: u32,
    pub(crate) pages: u32,
    pub(crate) allocated_bytes: u64,
}

/// A segment that the manifest names and nobody reads: lost, or not to be read for now.
#[derive(Debug)]
pub(crate) struct Aside {
    pub(crate) line: SegmentLine,
    /// Of the file, if there is one.
    pub(crate) bytes: u64,
}

/// The segment that is being written: the last line.
#[derive(Debug)]
struct Active {
    segment: Arc<Segment>,
    number: SegmentNumber,
    end_page: u32,
    capacity_pages: u32,
    durable_pages: u32,
    /// Is the file itself there to stay?
    durable_name: bool,
    entries: Vec<(u32, RecordMeta)>,
}

/// What the writer owns.
#[derive(Debug)]
pub(crate) struct Log {
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) identity: Identity,
    pub(crate) cipher: Option<Arc<Cipher>>,
    pub(crate) capacity_bytes: u64,
    pub(crate) next_segment: u64,
    pub(crate) lines: Vec<Line>,
    /// Oldest first. They go in turn with the lines.
    pub(crate) aside: Vec<Aside>,
    /// Evicted segments whose files are not gone yet, and their bytes.
    doomed: Vec<(u64, u64)>,
    active: Option<Active>,
    /// Did an append get as far as to write records since this was last taken back?
    pub(crate) touched: bool,
    shared: Arc<Shared>,
    bounce: Pages,
}

/// A record to be appended.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Record<'a> {
    pub(crate) meta: &'a RecordMeta,
    pub(crate) content: &'a Content,
    /// What a removal lists.
    pub(crate) keys: &'a [ObjectKey],
    /// Whole pages.
    pub(crate) payload: &'a [u8],
    /// Its checksums, if they may have been made already.
    pub(crate) sums: Option<&'a Sums>,
}

/// Where a record was written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Written {
    pub(crate) segment: SegmentNumber,
    pub(crate) page: u32,
}

impl Record<'_> {
    /// Adds its lines to an index.
    fn list(&self, page: u32, entries: &mut Vec<(u32, RecordMeta)>) {
        if self.keys.is_empty() {
            entries.push((page, *self.meta));
        }
        entries.extend(self.keys.iter().map(|key| (page, RecordMeta { key: *key, ..*self.meta })));
    }
}

/// How long segments of a cache of this size are.
fn segment_bytes(capacity_bytes: u64) -> u64 {
    let bytes = (capacity_bytes / SEGMENTS).clamp(MIN_SEGMENT_BYTES, MAX_SEGMENT_BYTES);
    bytes / PAGE_BYTES as u64 * PAGE_BYTES as u64
}

/// The name of a segment's file.
pub(crate) fn segment_name(id: u64) -> String {
    format!("segment-{id:016x}")
}

/// The number in a segment's name. One above all that are ever used is not ours, so that numbers behind it are not
/// used up.
pub(crate) fn segment_id(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("segment-")?;
    let id = u64::from_str_radix(digits, 16).ok()?;
    (segment_name(id) == name && id <= MAX_SEGMENT).then_some(id)
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
        let bounce = Pages::new(if cipher.is_some() { BOUNCE_PAGES } else { 0 });
        Self {
            backend,
            identity,
            cipher,
            capacity_bytes,
            next_segment,
            lines,
            aside: Vec::new(),
            doomed: Vec::new(),
            active: None,
            touched: false,
            shared,
            bounce,
        }
    }

    /// Appends as many of these records, of at least one, as the newest segment has room for, with one write; says
    /// where they are.
    pub(crate) fn append(&mut self, records: &[Record<'_>]) -> io::Result<Vec<Written>> {
        let Some(first) = records.first() else { return Ok(Vec::new()) };
        let pages = first.meta.pages().ok_or(io::ErrorKind::FileTooLarge)?;
        if !self.fits(pages) {
            self.rotate(pages)?;
        }
        let (mut count, mut all) = (1, pages);
        for record in records.iter().skip(1) {
            // What is encrypted is written piece by piece anyway.
            let more = record.meta.pages().and_then(|pages| all.checked_add(pages));
            match more {
                Some(more) if self.cipher.is_none() && self.fits_lines(more, count + 1) => all = more,
                _ => break,
            }
            count += 1;
        }
        self.append_here(records.get(..count).unwrap_or_default())
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

    fn append_marker(&mut self, meta: &RecordMeta, keys: &[ObjectKey]) -> io::Result<()> {
        // Each key takes a line of the index.
        if !self.fits_lines(1, keys.len().max(1)) {
            self.rotate(1)?;
        }
        let record = Record { meta, content: &Content::Nothing, keys, payload: &[], sums: None };
        self.append_here(&[record]).map(drop)
    }

    /// There is room for all of them.
    fn append_here(&mut self, records: &[Record<'_>]) -> io::Result<Vec<Written>> {
        let active = self.active.as_ref().ok_or(io::ErrorKind::StorageFull)?;
        self.touched = true;
        let (first, segment, number) = (active.end_page, Arc::clone(&active.segment), active.number);
        let durable_pages = active.durable_pages;
        let mut written = Vec::with_capacity(records.len());
        let mut heads = Pages::new(records.len());
        let mut page = first;
        for (record, head) in records.iter().zip(heads.bytes_mut().chunks_exact_mut(PAGE_BYTES)) {
            let place = Place { store_id: self.identity.store_id, segment: segment.id, page };
            self.header(&segment, record, place, durable_pages)?.encode(head);
            written.push(Written { segment: number, page });
            page += record.meta.pages().unwrap_or(1);
        }
        let mut parts = Vec::with_capacity(2 * records.len());
        for (record, head) in records.iter().zip(heads.bytes().chunks_exact(PAGE_BYTES)) {
            parts.push(head);
            if !self.encrypts(record) {
                parts.push(record.payload);
            }
        }
        segment.file.write(&parts, offset(first))?;
        self.shared.progress();
        let mut unsynced = 0;
        if let Some(active) = &mut self.active {
            active.end_page = page;
            for (record, place) in records.iter().zip(&written) {
                record.list(place.page, &mut active.entries);
            }
            unsynced = offset(active.end_page - active.durable_pages);
        }
        if unsynced >= SYNC_BYTES {
            self.sync()?;
        }
        Ok(written)
    }

    fn encrypts(&self, record: &Record<'_>) -> bool {
        self.cipher.is_some() && record.meta.kind.is_stored()
    }

    /// The header of a record; what is encrypted is written on the way.
    fn header(
        &mut self,
        segment: &Segment,
        record: &Record<'_>,
        place: Place,
        durable_pages: u32,
    ) -> io::Result<RecordHeader> {
        let Record { meta, content, keys, payload, sums } = *record;
        let encrypted = self.encrypts(record);
        let mut header = RecordHeader {
            meta: *meta,
            place,
            durable_pages,
            cipher: if encrypted { self.identity.cipher } else { CipherKind::None },
            nonce: if encrypted { crypt::random_nonce()? } else { [0; 24] },
            content: content.clone(),
            list: RecordHeader::key_list(keys),
        };
        if encrypted {
            self.write_encrypted(segment, &mut header, payload)?;
        } else if meta.kind.is_stored() {
            let make = || meta.sums(payload);
            header.list = sums.map_or_else(make, |sums| sums.get_or_init(make).clone());
        }
        Ok(header)
    }

    /// Encrypts piece by piece through a buffer of its own: the payload is somebody's to read.
    fn write_encrypted(&mut self, segment: &Segment, header: &mut RecordHeader, payload: &[u8]) -> io::Result<()> {
        let piece_bytes = 1usize << header.meta.piece_shift(header.cipher);
        let cipher = self.cipher.as_ref().ok_or_else(|| io::Error::other("no key"))?;
        let pieces = payload.len().div_ceil(piece_bytes);
        header.list = vec![0; pieces * 16];
        let bound = header.bound();
        if piece_bytes > self.bounce.bytes().len() {
            self.bounce = Pages::new(piece_bytes / PAGE_BYTES);
        }
        let mut at = offset(header.place.page + 1);
        let mut tags = Vec::with_capacity(pieces * 16);
        for (number, piece) in (0u32..).zip(payload.chunks(piece_bytes)) {
            let Some(buffer) = self.bounce.bytes_mut().get_mut(..piece.len()) else { continue };
            buffer.copy_from_slice(piece);
            let tag =
                cipher.seal(&header.nonce, number, &bound, buffer).ok_or_else(|| io::Error::other("encryption"))?;
            segment.file.write(&[buffer], at)?;
            at += piece.len() as u64;
            tags.extend_from_slice(&tag);
        }
        header.list = tags;
        Ok(())
    }

    /// Makes everything that was appended durable.
    pub(crate) fn sync(&mut self) -> io::Result<()> {
        if let Some(active) = &mut self.active
            && active.durable_pages < active.end_page
        {
            active.segment.file.sync()?;
            self.shared.progress();
            if !active.durable_name {
                self.backend.sync_dir()?;
                active.durable_name = true;
            }
            active.durable_pages = active.end_page;
        }
        Ok(())
    }

    /// Seals the newest segment, so that the next opening is fast.
    pub(crate) fn close(&mut self) -> io::Result<()> {
        if self.active.is_some() {
            self.seal()?;
            self.write_manifest()?;
        }
        Ok(())
    }

    /// Gives up the newest segment after a write or a sync failed: what is in it can be read,
    /// but nothing is known of what would come behind it.
    pub(crate) fn abandon(&mut self) {
        self.active = None;
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

    /// Writes down which segments there are.
    pub(crate) fn write_manifest(&self) -> io::Result<()> {
        manifest::write(self.backend.as_ref(), &self.manifest())
    }

    fn manifest(&self) -> Manifest {
        let line = |line: &Line| SegmentLine {
            segment: line.segment.id,
            sealed: line.sealed,
            entries: line.entries,
            pages: line.pages,
        };
        let aside = self.aside.iter().map(|aside| aside.line);
        let mut segments: Vec<SegmentLine> = self.lines.iter().map(line).chain(aside).collect();
        segments.sort_unstable_by_key(|line| line.segment);
        Manifest { identity: self.identity, next_segment: self.next_segment, segments }
    }

    fn fits(&self, pages: u32) -> bool {
        self.fits_lines(pages, 1)
    }

    fn fits_lines(&self, pages: u32, lines: usize) -> bool {
        self.active.as_ref().is_some_and(|active| {
            let needed = u64::from(active.end_page)
                + u64::from(pages)
                + u64::from(Trailer::tail_pages(active.entries.len() + lines));
            needed <= u64::from(active.capacity_pages)
        })
    }

    /// Begins a segment, after those that went to make room for it are unlinked.
    fn begin(&mut self, bytes: u64) -> io::Result<()> {
        let id = self.next_segment;
        self.next_segment += 1;
        let mut manifest = self.manifest();
        manifest.segments.push(SegmentLine { segment: id, sealed: false, entries: 0, pages: 0 });
        manifest::write(self.backend.as_ref(), &manifest)?;
        self.remove_doomed()?;
        let made = self.create(id, bytes);
        let (segment, allocated_bytes) = made.inspect_err(|_| drop(self.backend.remove(&segment_name(id))))?;
        let number = self.shared.state.lock().index.add_segment(Arc::clone(&segment));
        let number = number.ok_or(io::ErrorKind::StorageFull)?;
        let line = Line { segment: Arc::clone(&segment), number, sealed: false, entries: 0, pages: 0, allocated_bytes };
        self.lines.push(line);
        let capacity_pages = u32::try_from(bytes / PAGE_BYTES as u64).unwrap_or(u32::MAX);
        let entries = Vec::new();
        self.active = Some(Active {
            segment,
            number,
            end_page: 1,
            capacity_pages,
            durable_pages: 1,
            durable_name: false,
            entries,
        });
        Ok(())
    }

    /// A file that has its space already, and a header. The first sync makes both durable.
    fn create(&self, id: u64, bytes: u64) -> io::Result<(Arc<Segment>, u64)> {
        let file = self.backend.create(&segment_name(id))?;
        file.allocate(bytes)?;
        let mut head = Pages::new(1);
        SegmentHeader { identity: self.identity, segment: id }.encode(head.bytes_mut());
        file.write(&[head.bytes()], 0)?;
        let allocated_bytes = file.size()?.allocated_bytes.max(bytes);
        Ok((Arc::new(Segment { id, store_id: self.identity.store_id, file }), allocated_bytes))
    }

    /// Writes the index and the trailer and cuts off what is left. The manifest is not written.
    fn seal(&mut self) -> io::Result<()> {
        let Some(active) = self.active.take() else { return Ok(()) };
        let (size, pages, entries) = seal_segment(&active.segment, active.end_page, &active.entries)?;
        self.shared.progress();
        if !active.durable_name {
            self.backend.sync_dir()?;
        }
        if let Some(line) = self.lines.iter_mut().find(|line| line.number == active.number) {
            line.sealed = true;
            line.entries = entries;
            line.pages = pages;
            line.allocated_bytes = size.allocated_bytes.max(size.bytes);
        }
        Ok(())
    }
}

/// Closes a segment's file with an index of its records; gives its size, pages and lines.
pub(crate) fn seal_segment(
    segment: &Segment,
    end_page: u32,
    entries: &[(u32, RecordMeta)],
) -> io::Result<(super::io::FileSize, u32, u32)> {
    let tail = Trailer::tail_pages(entries.len());
    let mut pages = Pages::new(tail as usize);
    let (index, trailer) = pages.bytes_mut().split_at_mut((tail as usize - 1) * PAGE_BYTES);
    let index_sum = encode_index(entries, index);
    let lines = u32::try_from(entries.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
    Trailer { store_id: segment.store_id, segment: segment.id, index_page: end_page, entries: lines, index_sum }
        .encode(trailer);
    segment.file.write(&[pages.bytes()], offset(end_page))?;
    let pages = end_page + tail;
    segment.file.truncate(offset(pages))?;
    segment.file.sync()?;
    Ok((segment.file.size()?, pages, lines))
}

/// A record without a payload.
fn marker(kind: Kind, namespace: NamespaceId, now_ms: u64) -> RecordMeta {
    RecordMeta {
        kind,
        key: ObjectKey::new([0; 32], 0),
        namespace,
        payload_bytes: 0,
        stored_at_ms: now_ms,
        expires_at_ms: u64::MAX,
        compute_us: 0,
        prefix_bytes: 0,
    }
}
