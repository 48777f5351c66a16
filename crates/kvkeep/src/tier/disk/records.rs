//! What is in a segment: from its index, or from header to header where that is not whole.
//!
//! Nothing is changed here, and nothing is known of other segments. What was durable and is not there is told: by
//! the manifest's mark, by its number of lines, or by a later header that speaks of earlier pages.

use std::io;

use super::crypt::Cipher;
use super::format::{PAGE_BYTES, RecordHeader, RecordMeta, Trailer, decode_index};
use super::pages::Pages;
use super::segment::{Expected, ReadError, Segment, offset, read_if_there};
use super::survey::Surveyed;

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
        let mut records = read_segment(&self.segment, self.listed_entries, self.durable_pages);
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
        let torn = if was_open { verify_tail(&self.segment, &mut records, self.durable_pages, cipher) } else { 0 };
        (records, torn)
    }
}

/// The records of a segment, from its index, or page by page where that is not whole.
/// `listed` is how many lines the manifest says that the index has, `durable` how many pages of records were durable
/// for sure.
pub(crate) fn read_segment(segment: &Segment, listed: Option<u32>, durable: u32) -> Records {
    let bytes = segment.file.size().map_or(0, |size| size.bytes);
    let pages = u32::try_from(bytes / PAGE_BYTES as u64).unwrap_or(u32::MAX);
    let index = read_index(segment, pages);
    let unreadable = index.is_err();
    if let Ok(Some(entries)) = index
        && listed.is_none_or(|listed| listed as usize == entries.len())
    {
        let end_page = pages - Trailer::tail_pages(entries.len());
        return Records { entries, end_page, index_end: Some(pages), lost: end_page < durable, ..Records::default() };
    }
    let mut records = scan(segment, pages, durable);
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
fn scan(segment: &Segment, pages: u32, durable: u32) -> Records {
    let mut records = Records { end_page: 1, ..Records::default() };
    let (mut page, mut gap, mut durable) = (1, None::<u32>, durable.max(1));
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
            gap = gap.or(Some(page));
            break;
        }
        push(&mut records.entries, page, &header);
        (page, records.end_page) = (end, end);
    }
    // Whole up to here, or up to the end of the file.
    records.lost = gap.unwrap_or(page) < durable;
    records
}

fn push(entries: &mut Vec<(u32, RecordMeta)>, page: u32, header: &RecordHeader) {
    let before = entries.len();
    entries.extend(header.keys().map(|key| (page, header.meta.of_key(key))));
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
fn verify_tail(segment: &Segment, records: &mut Records, durable: u32, cipher: Option<&Cipher>) -> usize {
    let durable = durable.max(durable_pages(segment, records));
    let whole = |page: u32, meta: &RecordMeta| {
        let Some(pages) = meta.payload_pages() else { return false };
        let mut payload = Pages::new(pages as usize);
        let expected = Expected::from(meta);
        match segment.read(page, &expected, cipher, payload.bytes_mut()) {
            Ok(_) => true,
            // What the disk fails to read may be whole: it is checked again before it is used.
            Err(ReadError::Io(error)) => error.kind() != io::ErrorKind::UnexpectedEof,
            Err(ReadError::Damaged | ReadError::NoRoom | ReadError::UnknownCodec(_)) => false,
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
