//! Looking at a directory: which segments there should be, and what is there.
//!
//! Nothing is changed here. What the disk fails to read is told from what is lost: it may be back the next time. Taking
//! both for lost was the alternative: a cable that was loose for a moment would have cost a segment.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use super::crypt::{self, Cipher};
use super::format::{CipherKind, Identity, Manifest, SegmentHeader, SegmentLine, StoreId};
use super::io::{Backend, DiskFile, is_no_file};
use super::manifest;
use super::pages::Pages;
use super::segment::{Segment, offset, read_if_there, segment_id, segment_name};

/// Why a directory cannot be used as it is asked for.
#[derive(Debug)]
pub(crate) enum Refusal {
    Io(io::Error),
    /// The disk fails to read the manifest.
    Manifest(io::Error),
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

/// How a directory's manifest is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum ManifestState {
    /// Every byte is what it was.
    #[default]
    Whole,
    /// It is not there: the segments speak for themselves.
    Missing,
    /// It is there and not what it was: the segments speak for themselves.
    Damaged,
    /// The disk fails to read it. A cache does not open the directory.
    Unreadable,
}

/// What lies in a directory.
#[derive(Debug)]
pub(crate) struct Survey {
    pub(crate) identity: Identity,
    pub(crate) next_segment: u64,
    /// Oldest first.
    pub(crate) segments: Vec<Listed>,
    /// Not ours, left alone.
    pub(crate) foreign: Vec<String>,
    /// Ours and of no use: evicted, or damaged beyond use.
    pub(crate) leftovers: Vec<String>,
    pub(crate) manifest: ManifestState,
}

/// A segment that should be there, and what is there.
#[derive(Debug)]
pub(crate) struct Listed {
    pub(crate) line: SegmentLine,
    pub(crate) seen: Seen,
}

#[derive(Debug)]
pub(crate) enum Seen {
    Ours(Surveyed),
    /// Without a manifest: a gap in the numbers.
    Missing,
    /// Its header is damaged.
    Damaged,
    /// The disk fails to say whose it is. The file takes so many bytes.
    Unreadable(u64),
}

/// A segment whose header is ours.
#[derive(Debug)]
pub(crate) struct Surveyed {
    pub(crate) segment: Arc<Segment>,
    /// Lines of its index, if the manifest knows it as sealed.
    pub(crate) listed_entries: Option<u32>,
    /// Must it have an index? A power cut leaves the newest segment without one; but it does
    /// not leave a directory without a manifest.
    pub(crate) must_be_sealed: bool,
    /// Pages of records that are known to have been durable.
    pub(crate) durable_pages: u32,
}

/// A file by a segment's name.
#[derive(Debug)]
struct Candidate {
    /// An error if the disk fails to read it.
    header: io::Result<Option<SegmentHeader>>,
    file: Option<Arc<dyn DiskFile>>,
}

/// Looks at every file. Whoever only reads goes on without a manifest that cannot be read; to write
/// without it would be to forget what it says.
pub(crate) fn survey(backend: &dyn Backend, cipher: Option<&Cipher>, write: bool) -> Result<Survey, Refusal> {
    let (state, manifest) = match manifest::read(backend) {
        Ok(manifest::Read::Whole(manifest)) => (ManifestState::Whole, Some(manifest)),
        Ok(manifest::Read::Missing) => (ManifestState::Missing, None),
        Ok(manifest::Read::Damaged) => (ManifestState::Damaged, None),
        Ok(manifest::Read::OtherVersion(version)) => return Err(Refusal::OtherVersion(version)),
        Err(error) if write => return Err(Refusal::Manifest(error)),
        Err(_) => (ManifestState::Unreadable, None),
    };
    let (mut foreign, mut leftovers) = (Vec::new(), Vec::new());
    let mut found = BTreeMap::new();
    for name in backend.list()? {
        match segment_id(&name) {
            Some(id) => match look(backend, &name, write) {
                Some(candidate) => drop(found.insert(id, candidate)),
                None => foreign.push(name),
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
    let segments = Vec::new();
    let mut survey = Survey { identity, next_segment, segments, foreign, leftovers, manifest: state };
    let seen = survey.sort(found, manifest.as_ref());
    survey.segments = match &manifest {
        Some(manifest) => expected(manifest, seen),
        None => without_manifest(seen, last),
    };
    Ok(survey)
}

impl Survey {
    /// Keeps the segments that are ours and tells the others apart.
    fn sort(&mut self, found: BTreeMap<u64, Candidate>, manifest: Option<&Manifest>) -> BTreeMap<u64, Seen> {
        let mut seen = BTreeMap::new();
        for (id, Candidate { header, file }) in found {
            let line = manifest.and_then(|manifest| manifest.segments.iter().find(|line| line.segment == id));
            let known = manifest.is_none() || line.is_some();
            match (header, file) {
                (Ok(Some(header)), Some(file)) if header.identity == self.identity && header.segment == id => {
                    if known {
                        let listed_entries = line.filter(|line| line.sealed).map(|line| line.entries);
                        let segment = Arc::new(Segment { id, store_id: self.identity.store_id, file });
                        let must_be_sealed = manifest.is_none();
                        let durable_pages = line.map_or(0, |line| line.durable_pages);
                        let surveyed = Surveyed { segment, listed_entries, must_be_sealed, durable_pages };
                        seen.insert(id, Seen::Ours(surveyed));
                    } else {
                        self.leftovers.push(segment_name(id));
                    }
                }
                (Err(_), file) if known => {
                    let listed_bytes = line.map_or(0, |line| offset(line.pages));
                    let bytes =
                        file.and_then(|file| file.size().ok()).map_or(listed_bytes, |size| size.allocated_bytes);
                    seen.insert(id, Seen::Unreadable(bytes));
                }
                (Ok(None), Some(file)) if line.is_some() => {
                    self.leftovers.push(segment_name(id));
                    if !(is_blank(file.as_ref()) && manifest.is_some_and(|manifest| manifest.is_only_begun(id))) {
                        seen.insert(id, Seen::Damaged);
                    }
                }
                _ => self.foreign.push(segment_name(id)),
            }
        }
        seen
    }
}

/// What the manifest says, beside what is there.
fn expected(manifest: &Manifest, mut seen: BTreeMap<u64, Seen>) -> Vec<Listed> {
    let in_order = seen.values().all(|seen| matches!(seen, Seen::Ours(_)));
    let listed = manifest.segments.iter().filter_map(|line| {
        let seen = seen.remove(&line.segment).unwrap_or(Seen::Missing);
        // The newest one may have been named and not made when the process ended.
        let unmade = matches!(seen, Seen::Missing) && manifest.is_only_begun(line.segment) && in_order;
        (!unmade).then_some(Listed { line: *line, seen })
    });
    listed.collect()
}

/// What is there, and one that is missing for each gap in the numbers before `end`: a foreign file by such a name may
/// have taken a segment's place.
fn without_manifest(seen: BTreeMap<u64, Seen>, end: u64) -> Vec<Listed> {
    let mut listed: Vec<Listed> = Vec::new();
    let gap = |listed: &[Listed], id| {
        let next = listed.last().map(|before| before.line.segment + 1).filter(|next| *next < id);
        next.map(|next| Listed { line: unsure_line(next), seen: Seen::Missing })
    };
    for (id, seen) in seen {
        listed.extend(gap(&listed, id));
        let line = match seen {
            Seen::Unreadable(_) => SegmentLine::open(id),
            _ => unsure_line(id),
        };
        listed.push(Listed { line, seen });
    }
    listed.extend(gap(&listed, end));
    listed
}

/// As it is listed until what is lost with it is settled: no index has so many lines, so that it counts as lost again.
fn unsure_line(segment: u64) -> SegmentLine {
    SegmentLine { sealed: true, entries: u32::MAX, ..SegmentLine::open(segment) }
}

impl Manifest {
    /// Is it the newest one, and was nothing of it ever durable? A killed process leaves one that is named and not made.
    fn is_only_begun(&self, id: u64) -> bool {
        self.segments.last().is_some_and(|line| line.segment == id && !line.sealed && line.durable_pages == 0)
    }
}

/// `None` for what is no file of ours, whatever is in it.
fn look(backend: &dyn Backend, name: &str, write: bool) -> Option<Candidate> {
    let file = match backend.open(name, write) {
        Ok(file) => file,
        Err(error) if is_no_file(&error) => return None,
        Err(error) => return Some(Candidate { header: Err(error), file: None }),
    };
    let mut head = Pages::new(1);
    let header = match read_if_there(file.as_ref(), head.bytes_mut(), 0) {
        Ok(there) => Ok(if there { SegmentHeader::decode(head.bytes()) } else { None }),
        Err(error) if is_no_file(&error) => return None,
        Err(error) => Err(error),
    };
    Some(Candidate { header, file: Some(file) })
}

/// Was the process killed after it had made the file, and before it wrote the header?
fn is_blank(file: &dyn DiskFile) -> bool {
    let mut head = Pages::new(1);
    file.read(&mut [head.bytes_mut()], 0).is_err() || head.bytes().iter().all(|byte| *byte == 0)
}

/// What most segments say that they belong to.
fn identity_of(found: &BTreeMap<u64, Candidate>) -> Option<Identity> {
    let mut votes: BTreeMap<StoreId, (usize, Identity)> = BTreeMap::new();
    for (id, candidate) in found {
        if let Ok(Some(header)) = &candidate.header
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
