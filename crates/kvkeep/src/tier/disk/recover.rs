//! Opening a directory: what is there, what of it is whole, and what it means.
//!
//! Segments are replayed oldest first: a later record wins over an earlier one, a removal
//! over what it names. Where something that was durable has been lost (a segment that the
//! manifest names, an index that does not check, a header in front of durable ones), the
//! lost part may have replaced a named entry or removed it: named entries older than the
//! loss are dropped. Blocks stay: under a block's key there are never other bytes.
//!
//! Files that are not ours are left alone and counted.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use super::crypt::{self, Cipher};
use super::format::{
    CipherKind, Identity, Kind, Manifest, PAGE_BYTES, RecordHeader, RecordMeta, SegmentHeader, StoreId, Trailer,
    decode_index,
};
use super::io::{Backend, DiskFile, Pages};
use super::log::{Line, Log, seal_segment, segment_id, segment_name};
use super::manifest;
use super::segment::{Expected, ReadError, Segment, offset};
use super::shared::Shared;

/// Pages read at once where a header is searched for.
const SEARCH_PAGES: usize = 256;

/// Why a directory cannot be used as it is asked for.
#[derive(Debug)]
pub(crate) enum Refusal {
    Io(io::Error),
    /// Another release wrote it.
    OtherVersion(u32),
    /// It is encrypted with another key.
    WrongKey,
    /// It is encrypted, and no key was given.
    KeyMissing,
    /// It is not encrypted, and a key was given.
    NotEncrypted,
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

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

/// What lies in a directory.
#[derive(Debug)]
pub(crate) struct Survey {
    pub(crate) identity: Identity,
    pub(crate) next_segment: u64,
    /// Oldest first; `None` for one that is lost.
    pub(crate) segments: Vec<(u64, Option<Surveyed>)>,
    /// Not ours, left alone.
    pub(crate) foreign: Vec<String>,
    /// Ours and of no use: evicted, or damaged beyond use.
    pub(crate) leftovers: Vec<String>,
    /// Of those, damaged.
    pub(crate) damaged: usize,
    /// Of those, with a first page that cannot be read. The manifest counts too.
    pub(crate) unreadable: usize,
    /// Is there a whole manifest?
    pub(crate) has_manifest: bool,
}

/// What stands in the first page of a segment's file; an error if it cannot be read.
type Header = io::Result<Option<SegmentHeader>>;

/// A segment whose header is ours.
#[derive(Debug)]
pub(crate) struct Surveyed {
    pub(crate) segment: Arc<Segment>,
    /// Lines of its index, if the manifest knows it as sealed.
    pub(crate) listed_entries: Option<u32>,
    /// Must it have an index? A power cut leaves the newest segment without one; but it does
    /// not leave a directory without a manifest.
    pub(crate) must_be_sealed: bool,
}

impl Surveyed {
    /// Its records.
    pub(crate) fn read(&self) -> Records {
        let mut records = read_segment(&self.segment, self.listed_entries);
        records.lost |= self.must_be_sealed && records.index_end.is_none();
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

/// Opens a directory for writing: afterwards the index is filled, every segment sealed, and
/// what lies there fits the cap.
pub(crate) fn open(
    backend: Arc<dyn Backend>,
    cipher: Option<Arc<Cipher>>,
    capacity_bytes: u64,
    shared: &Arc<Shared>,
) -> Result<Log, Refusal> {
    let Survey { identity, next_segment, segments, foreign, leftovers, damaged, unreadable, .. } =
        survey(backend.as_ref(), cipher.as_deref(), true)?;
    for name in &leftovers {
        backend.remove(name)?;
    }
    let mut lines = Vec::with_capacity(segments.len());
    shared.state.lock().counters.foreign_files = foreign.len() as u64;
    shared.state.lock().counters.damaged_total += (damaged + unreadable) as u64;
    for (_, surveyed) in segments {
        match surveyed {
            Some(surveyed) => lines.extend(replay(&surveyed, cipher.as_deref(), shared)?),
            None => drop_unsure(shared),
        }
    }
    let mut log = Log::new(backend, identity, cipher, capacity_bytes, next_segment, lines, Arc::clone(shared));
    log.shrink()?;
    Ok(log)
}

/// Puts a segment's records into the index, and an index at its end if it has none.
fn replay(surveyed: &Surveyed, cipher: Option<&Cipher>, shared: &Arc<Shared>) -> Result<Option<Line>, Refusal> {
    let segment = &surveyed.segment;
    let (records, _) = surveyed.read_whole(cipher);
    let now_ms = shared.now_ms();
    let mut state = shared.state.lock();
    let number = state.index.add_segment(Arc::clone(segment)).ok_or(io::Error::from(io::ErrorKind::StorageFull))?;
    state.index.reserve(records.entries.len());
    for (page, meta) in &records.entries {
        match meta.kind {
            Kind::Block | Kind::Named if meta.expires_at_ms > now_ms => state.index.insert(meta, number, *page, 0),
            // An expired one still replaces what was before it.
            Kind::Block | Kind::Named | Kind::Removal => drop(state.index.remove(&meta.key)),
            Kind::NamespaceCleared => drop(state.index.remove_namespace(meta.namespace)),
            Kind::Cleared => drop(state.index.clear()),
        }
    }
    drop(state);
    if records.lost {
        drop_unsure(shared);
    }
    let (sealed, pages) = match records.index_end {
        Some(pages) => (true, pages),
        None => match seal_segment(segment, records.end_page, &records.entries) {
            Ok((_, pages, _)) => (true, pages),
            Err(_) => (false, records.end_page),
        },
    };
    let size = segment.file.size()?;
    let entries = u32::try_from(records.entries.len()).unwrap_or(u32::MAX);
    let allocated_bytes = size.allocated_bytes.max(size.bytes);
    Ok(Some(Line { segment: Arc::clone(segment), number, sealed, entries, pages, allocated_bytes }))
}

fn drop_unsure(shared: &Shared) {
    let mut state = shared.state.lock();
    let dropped = state.index.remove_named();
    state.counters.damaged_total += 1 + dropped as u64;
}

/// Looks at every file. Nothing is changed. Whoever only reads goes on without a manifest that cannot
/// be read; to write without it would be to forget what it says.
pub(crate) fn survey(backend: &dyn Backend, cipher: Option<&Cipher>, write: bool) -> Result<Survey, Refusal> {
    let mut unreadable = 0;
    let manifest = match manifest::read(backend) {
        Ok(manifest::Read::Whole(manifest)) => Some(manifest),
        Ok(manifest::Read::None) => None,
        Ok(manifest::Read::OtherVersion(version)) => return Err(Refusal::OtherVersion(version)),
        Err(error) if write => return Err(error.into()),
        Err(_) => {
            unreadable += 1;
            None
        }
    };
    let (mut foreign, mut leftovers) = (Vec::new(), Vec::new());
    let mut found = BTreeMap::new();
    for name in backend.list()? {
        match segment_id(&name) {
            Some(id) => match open_segment(backend, &name, write) {
                // A directory by that name.
                Ok((Err(error), _)) if error.kind() == io::ErrorKind::IsADirectory => foreign.push(name),
                Ok(opened) => drop(found.insert(id, opened)),
                Err(_) => foreign.push(name),
            },
            None if name == manifest::NAME => {}
            None if name == manifest::TEMPORARY => leftovers.push(name),
            None => foreign.push(name),
        }
    }
    let identity = match &manifest {
        Some(manifest) => manifest.identity,
        None => identity_of(&found).map_or_else(|| new_identity(cipher), Ok)?,
    };
    check_key(&identity, cipher)?;
    let last = found.keys().next_back().map_or(0, |last| last + 1);
    let next_segment = manifest.as_ref().map_or(1, |manifest| manifest.next_segment).max(last);
    let mut survey = Survey {
        identity,
        next_segment,
        segments: Vec::new(),
        foreign,
        leftovers,
        damaged: 0,
        unreadable,
        has_manifest: manifest.is_some(),
    };
    let mut ours = survey.sort(found, manifest.as_ref());
    let expected: Vec<u64> = match &manifest {
        Some(manifest) => manifest.segments.iter().map(|line| line.segment).collect(),
        None => ours.first_key_value().map_or_else(Vec::new, |(first, _)| (*first..last).collect()),
    };
    for id in expected {
        let surveyed = ours.remove(&id);
        // The newest one may have been named and not made when the process ended.
        let newest_open = manifest.as_ref().is_some_and(|manifest| manifest.is_newest_open(id));
        let unmade = surveyed.is_none() && newest_open && survey.damaged + survey.unreadable == 0;
        if !unmade {
            survey.segments.push((id, surveyed));
        }
    }
    Ok(survey)
}

impl Survey {
    /// Keeps the segments that are ours and tells the others apart.
    fn sort(
        &mut self,
        found: BTreeMap<u64, (Header, Arc<Segment>)>,
        manifest: Option<&Manifest>,
    ) -> BTreeMap<u64, Surveyed> {
        let mut ours = BTreeMap::new();
        for (id, (header, segment)) in found {
            let line = manifest.and_then(|manifest| manifest.segments.iter().find(|line| line.segment == id));
            let known = manifest.is_none() || line.is_some();
            match header {
                Ok(Some(header)) if header.identity == self.identity && header.segment == id => {
                    if known {
                        let listed_entries = line.filter(|line| line.sealed).map(|line| line.entries);
                        let segment = Segment { id, store_id: self.identity.store_id, file: Arc::clone(&segment.file) };
                        let must_be_sealed = manifest.is_none();
                        ours.insert(id, Surveyed { segment: Arc::new(segment), listed_entries, must_be_sealed });
                    } else {
                        self.leftovers.push(segment_name(id));
                    }
                }
                Err(_) if known => {
                    self.unreadable += 1;
                    let listed = line.is_some();
                    if listed { &mut self.leftovers } else { &mut self.foreign }.push(segment_name(id));
                }
                Ok(None) if line.is_some() => {
                    let unfinished = is_blank(&segment) && manifest.is_some_and(|manifest| manifest.is_newest_open(id));
                    self.damaged += usize::from(!unfinished);
                    self.leftovers.push(segment_name(id));
                }
                _ => self.foreign.push(segment_name(id)),
            }
        }
        ours
    }
}

impl Manifest {
    fn is_newest_open(&self, id: u64) -> bool {
        self.segments.last().is_some_and(|line| line.segment == id && !line.sealed)
    }
}

fn open_segment(backend: &dyn Backend, name: &str, write: bool) -> io::Result<(Header, Arc<Segment>)> {
    let file = backend.open(name, write)?;
    let mut head = Pages::new(1);
    let header = read_if_there(file.as_ref(), head.bytes_mut(), 0);
    let header = header.map(|there| if there { SegmentHeader::decode(head.bytes()) } else { None });
    let (id, store_id) = match &header {
        Ok(Some(header)) => (header.segment, header.identity.store_id),
        _ => (0, [0; 16]),
    };
    Ok((header, Arc::new(Segment { id, store_id, file })))
}

/// Says whether the file is as long as that; an error is one of the disk.
fn read_if_there(file: &dyn DiskFile, into: &mut [u8], at: u64) -> io::Result<bool> {
    match file.read(&mut [into], at) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

/// Was the process killed after it had made the file, and before it wrote the header?
fn is_blank(segment: &Segment) -> bool {
    let mut head = Pages::new(1);
    segment.file.read(&mut [head.bytes_mut()], 0).is_err() || head.bytes().iter().all(|byte| *byte == 0)
}

/// What most segments say that they belong to.
fn identity_of(found: &BTreeMap<u64, (Header, Arc<Segment>)>) -> Option<Identity> {
    let mut votes: BTreeMap<StoreId, (usize, Identity)> = BTreeMap::new();
    for (id, (header, _)) in found {
        if let Ok(Some(header)) = header
            && header.segment == *id
        {
            votes.entry(header.identity.store_id).or_insert((0, header.identity)).0 += 1;
        }
    }
    votes.into_values().max_by_key(|(votes, _)| *votes).map(|(_, identity)| identity)
}

fn new_identity(cipher: Option<&Cipher>) -> io::Result<Identity> {
    let random = crypt::random_nonce()?;
    let store_id = random.first_chunk::<16>().copied().unwrap_or([0; 16]);
    Ok(match cipher {
        Some(cipher) => {
            Identity { store_id, cipher: CipherKind::XChaCha20Poly1305, key_check: cipher.check(&store_id) }
        }
        None => Identity { store_id, cipher: CipherKind::None, key_check: [0; 16] },
    })
}

fn check_key(identity: &Identity, cipher: Option<&Cipher>) -> Result<(), Refusal> {
    match (identity.cipher, cipher) {
        (CipherKind::None, None) => Ok(()),
        (CipherKind::None, Some(_)) => Err(Refusal::NotEncrypted),
        (CipherKind::XChaCha20Poly1305, None) => Err(Refusal::KeyMissing),
        (CipherKind::XChaCha20Poly1305, Some(cipher)) if cipher.check(&identity.store_id) == identity.key_check => {
            Ok(())
        }
        (CipherKind::XChaCha20Poly1305, Some(_)) => Err(Refusal::WrongKey),
    }
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
