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

use super::crypt::Cipher;
use super::format::{Kind, PAGE_BYTES, RecordHeader, RecordMeta, SegmentLine, Trailer, decode_index};
use super::index::SegmentNumber;
use super::io::{Backend, Pages};
use super::log::{Aside, Line, Log, seal_segment};
use super::segment::{Expected, ReadError, Segment, offset, read_if_there};
use super::shared::Shared;
use super::survey::{Listed, Refusal, Seen, Survey, Surveyed, survey};
use crate::key::ObjectKey;

/// Pages read at once where a header is searched for.
const SEARCH_PAGES: usize = 256;

/// What is in a segment.
#[derive(Debug, Default)]
pub(crate) struct Records {
    /// Page and description, in order.
    pub(crate) entries: Vec<(u32, RecordMeta)>,
    /// Behind the last record.
    pub(crate) end_page: u32,
    /// Pages of the whole file, if there is an index and it is whole.
    pub(crate) index_end: Option<u32>,
    /// Is something missing that was durable?
    pub(crate) lost: bool,
    /// Could a part of it not be read that says what lies there?
    pub(crate) unreadable: bool,
}

impl Surveyed {
    /// Its records.
    pub(crate) fn read(&self) -> Records {
        let mut records = read_segment(&self.segment, self.listed_entries);
        let all = self.listed_entries.is_some_and(|listed| listed as usize == records.entries.len());
        let unsealed = self.must_be_sealed && records.index_end.is_none();
        records.lost |= unsealed || (records.unreadable && !all);
        records
    }

    /// Its records without those that were torn when the process ended, and how many those are.
    ///
    /// Only of a segment that was being written. What is damaged in another is a miss when it is
    /// read; left out here, it would bring back what it replaced.
    pub(crate) fn read_whole(&self, cipher: Option<&Cipher>) -> (Records, usize) {
        let mut records = self.read();
        let was_open = self.listed_entries.is_none() && !self.must_be_sealed;
        let torn = if was_open { verify_tail(&self.segment, &mut records, cipher) } else { 0 };
        (records, torn)
    }
}

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
        let (lines, aside, unsealed, named, unsure) = Default::default();
        Self { cipher, shared, lines, aside, unsealed, named, unsure, lost: 0, unreadable: 0 }
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
        let number = self.index(&segment, &records)?;
        let named = records.entries.iter().filter(|(_, meta)| meta.kind == Kind::Named);
        self.named.extend(named.map(|(_, meta)| meta.key));
        let size = segment.file.size()?;
        let allocated_bytes = size.allocated_bytes.max(size.bytes);
        let SegmentLine { sealed, entries, pages, .. } = listed;
        let mut line = Line { segment: Arc::clone(&segment), number, sealed, entries, pages, allocated_bytes };
        match (records.index_end, records.lost, records.unreadable) {
            (Some(pages), ..) => line.index_is_whole(pages, records.entries.len()),
            (None, false, _) => line.seal(&records),
            // What is there now is all that there will ever be.
            (None, true, false) => {
                self.lose();
                self.unsealed.push((segment, records));
            }
            (None, true, true) => self.leave_aside(),
        }
        self.lines.push(line);
        Ok(())
    }

    fn index(&self, segment: &Arc<Segment>, records: &Records) -> io::Result<SegmentNumber> {
        let now_ms = self.shared.now_ms();
        let mut state = self.shared.state.lock();
        let number = state.index.add_segment(Arc::clone(segment)).ok_or(io::ErrorKind::StorageFull)?;
        state.index.reserve(records.entries.len());
        for (page, meta) in &records.entries {
            let meta = RecordMeta { expires_at_ms: meta.expires_at_ms(now_ms), ..*meta };
            match meta.kind {
                Kind::Block | Kind::Named if meta.expires_at_ms > now_ms => state.index.insert(&meta, number, *page, 0),
                // An expired one still replaces what was before it.
                Kind::Block | Kind::Named | Kind::Removal => drop(state.index.remove(&meta.key)),
                Kind::NamespaceCleared => drop(state.index.remove_namespace(meta.namespace)),
                Kind::Cleared => drop(state.index.clear()),
            }
        }
        Ok(number)
    }

    /// Something is lost that may have replaced or removed any named record before it.
    fn lose(&mut self) {
        self.lost += 1;
        self.unsure.append(&mut self.named);
        let mut state = self.shared.state.lock();
        let dropped = state.index.remove_named();
        state.counters.damaged_total += 1 + dropped as u64;
    }

    /// Something cannot be read now. As long as that is so, it may as well be lost.
    fn leave_aside(&mut self) {
        self.unreadable += 1;
        let mut state = self.shared.state.lock();
        state.index.remove_named();
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
                line.into_iter().for_each(|line| line.seal(records));
            }
        }
        shared.state.lock().aside = !settled;
        self.say();
        match log.shrink() {
            Err(error) if is_forbidden(&error) => return Err(error.into()),
            Err(error) => shared.write_failed(&error),
            Ok(()) => {}
        }
        Ok(log)
    }

    fn say(&self) {
        let Self { shared, lost, unreadable, .. } = *self;
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
        (self.sealed, self.pages, self.entries) = (true, pages, u32::try_from(entries).unwrap_or(u32::MAX));
    }

    /// Writes an index of these records. Where that fails, the next opening does it.
    fn seal(&mut self, records: &Records) {
        if let Ok((size, pages, _)) = seal_segment(&self.segment, records.end_page, &records.entries) {
            self.index_is_whole(pages, records.entries.len());
            self.allocated_bytes = size.allocated_bytes.max(size.bytes);
        }
    }
}

/// Trying again would not help.
fn is_forbidden(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem)
}

/// The records of a segment, from its index, or page by page where that is not whole.
/// `listed` is how many lines the manifest says that the index has.
pub(crate) fn read_segment(segment: &Segment, listed: Option<u32>) -> Records {
    let bytes = segment.file.size().map_or(0, |size| size.bytes);
    let pages = u32::try_from(bytes / PAGE_BYTES as u64).unwrap_or(u32::MAX);
    let index = read_index(segment, pages);
    let unreadable = index.is_err();
    if let Ok(Some(entries)) = index
        && listed.is_none_or(|listed| listed as usize == entries.len())
    {
        let end_page = pages - Trailer::tail_pages(entries.len());
        return Records { entries, end_page, index_end: Some(pages), ..Records::default() };
    }
    let mut records = scan(segment, pages);
    records.lost |= listed.is_some_and(|listed| listed as usize != records.entries.len());
    records.unreadable |= unreadable;
    records
}

/// `None` if there is no whole one; an error is one of the disk.
fn read_index(segment: &Segment, pages: u32) -> io::Result<Option<Vec<(u32, RecordMeta)>>> {
    let Some(last_page) = pages.checked_sub(1) else { return Ok(None) };
    let mut last = Pages::new(1);
    read_if_there(segment.file.as_ref(), last.bytes_mut(), offset(last_page))?;
    let Some(trailer) = Trailer::decode(last.bytes()).filter(|trailer| trailer.belongs_to(segment, pages)) else {
        return Ok(None);
    };
    let mut index = Pages::new(trailer.index_pages() as usize);
    read_if_there(segment.file.as_ref(), index.bytes_mut(), offset(trailer.index_page))?;
    let inside = |(page, meta): &(u32, RecordMeta)| {
        meta.pages().and_then(|pages| page.checked_add(pages)).is_some_and(|end| end <= trailer.index_page)
    };
    Ok(decode_index(&trailer, index.bytes()).filter(|entries| entries.iter().all(inside)))
}

impl Trailer {
    /// Does it stand at the end of a segment of so many pages?
    fn belongs_to(&self, segment: &Segment, pages: u32) -> bool {
        let end = self.index_page.checked_add(self.index_pages()).and_then(|end| end.checked_add(1));
        self.store_id == segment.store_id && self.segment == segment.id && end == Some(pages)
    }
}

/// Reads headers from record to record. Where none stands, the next one is searched for.
fn scan(segment: &Segment, pages: u32) -> Records {
    let mut records = Records { end_page: 1, ..Records::default() };
    let (mut page, mut gap, mut durable) = (1, None::<u32>, 1);
    let mut head = Pages::new(1);
    while page < pages {
        let read = segment.file.read(&mut [head.bytes_mut()], offset(page));
        records.unreadable |= read.is_err();
        let header = read.ok().and_then(|()| segment.header_at(head.bytes(), page));
        let end = |header: RecordHeader| page.checked_add(header.meta.pages()?).map(|end| (header, end));
        let Some((header, end)) = header.and_then(end) else {
            gap = gap.or(Some(page));
            match search(segment, page + 1, pages, &mut records.unreadable) {
                Some(next) => page = next,
                None => break,
            }
            continue;
        };
        durable = durable.max(header.durable_pages);
        if end > pages {
            break;
        }
        push(&mut records.entries, page, &header);
        (page, records.end_page) = (end, end);
    }
    records.lost = gap.is_some_and(|gap| gap < durable);
    records
}

fn push(entries: &mut Vec<(u32, RecordMeta)>, page: u32, header: &RecordHeader) {
    let before = entries.len();
    entries.extend(header.keys().map(|key| (page, RecordMeta { key, ..header.meta })));
    if entries.len() == before {
        entries.push((page, header.meta));
    }
}

/// The next page on which a record of this segment begins. What cannot be read is passed over, page
/// by page.
fn search(segment: &Segment, from: u32, pages: u32, unreadable: &mut bool) -> Option<u32> {
    let mut window = Pages::new(SEARCH_PAGES);
    let most = u32::try_from(SEARCH_PAGES).unwrap_or(1);
    let (mut page, mut at_once) = (from, most);
    while page < pages {
        let count = (pages - page).min(at_once);
        let bytes = window.bytes_mut().get_mut(..count as usize * PAGE_BYTES)?;
        if segment.file.read(&mut [&mut *bytes], offset(page)).is_err() {
            *unreadable = true;
            (page, at_once) = if count > 1 { (page, 1) } else { (page + 1, 1) };
            continue;
        }
        at_once = most;
        for (number, bytes) in (page..).zip(bytes.chunks_exact(PAGE_BYTES)) {
            if segment.header_at(bytes, number).is_some() {
                return Some(number);
            }
        }
        page += count;
    }
    None
}

/// Of a segment that was being written: what may not have been durable is read and checked,
/// and left out if a byte of it is missing. Says how many were.
fn verify_tail(segment: &Segment, records: &mut Records, cipher: Option<&Cipher>) -> usize {
    let durable = durable_pages(segment, records);
    let whole = |page: u32, meta: &RecordMeta| {
        let Some(pages) = meta.payload_pages() else { return false };
        let mut payload = Pages::new(pages as usize);
        let expected = Expected { key: meta.key, namespace: meta.namespace };
        match segment.read(page, &expected, cipher, payload.bytes_mut()) {
            Ok(_) => true,
            // What the disk fails to read may be whole: it is checked again before it is used.
            Err(ReadError::Io(error)) => error.kind() != io::ErrorKind::UnexpectedEof,
            Err(ReadError::Damaged) => false,
        }
    };
    let before = records.entries.len();
    records.entries.retain(|(page, meta)| *page < durable || !meta.kind.is_stored() || whole(*page, meta));
    let torn = before - records.entries.len();
    if torn > 0 {
        // The index got there and what it names did not.
        records.index_end = None;
    }
    torn
}

/// What the last header says was durable when it was written.
fn durable_pages(segment: &Segment, records: &Records) -> u32 {
    let mut head = Pages::new(1);
    let mut of = |page: u32| {
        segment.file.read(&mut [head.bytes_mut()], offset(page)).ok()?;
        segment.header_at(head.bytes(), page).map(|header| header.durable_pages)
    };
    records.entries.last().and_then(|(page, _)| of(*page)).unwrap_or(1)
}
