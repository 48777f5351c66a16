//! A disk tier's directory, looked at from outside: for verifying, inspecting and exporting.
//!
//! Nothing is changed, also not what is damaged. A directory that a process writes to is
//! refused; several readers may look at the same time.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::coded::{At, Decoder};
use super::crypt::Cipher;
use super::format::{Content, Kind, PAGE_BYTES, RecordMeta};
use super::io::{Access, Backend, Directory};
use super::pages::Pages;
use super::records::Records;
use super::refusal::{open_error, refused};
use super::segment::{Expected, ReadError, Segment};
use super::survey::{Listed, ManifestState, Seen, Survey, survey};
use crate::codec::{CodecId, Codecs};
use crate::error::{Error, Result};
use crate::key::{NamespaceId, ObjectKey};
use crate::layout::KvLayout;
use crate::tensor::{DType, Shape};

/// A directory of a disk tier, opened to be read only.
#[derive(Debug)]
pub struct Archive {
    dir: PathBuf,
    cipher: Option<Cipher>,
    codecs: Codecs,
    segments: Vec<Part>,
    records: Vec<RecordInfo>,
    foreign: Vec<String>,
    manifest: ManifestState,
    lost_segments: u64,
    damaged_segments: u64,
    unreadable_segments: u64,
    torn_records: u64,
    used_bytes: u64,
    /// Keeps writers out.
    _directory: Arc<dyn Backend>,
}

#[derive(Debug)]
struct Part {
    segment: Arc<Segment>,
    records: Records,
}

/// What a directory says of one stored record.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct RecordInfo {
    /// Whose it is.
    pub namespace: NamespaceId,
    /// The 32 bytes of its key: a block's hash, or a prefix text's.
    pub key: [u8; 32],
    /// The layer of a named record; 0 for blocks, which hold all layers.
    pub layer: u32,
    /// Is it a block of tokens, or K and V under a prefix text?
    pub is_block: bool,
    /// Bytes of the block itself.
    pub raw_bytes: u64,
    /// Bytes of the payload: what its codec made of it.
    pub stored_bytes: u64,
    /// The codec.
    pub codec: CodecId,
    /// When it was stored, in milliseconds since the Unix epoch.
    pub stored_at_ms: u64,
    /// When it expires; `None` for never.
    pub expires_at_ms: Option<u64>,
    /// How long it took to compute, if anybody said.
    pub compute_time: Option<Duration>,
    /// Can it still be found?
    pub state: RecordState,
    /// The segment it lies in.
    pub segment: u64,
    /// The page of the segment at which it begins.
    pub page: u32,
    part: usize,
}

/// What became of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RecordState {
    /// A cache that opens this directory finds it.
    Live,
    /// Its time ran out.
    Expired,
    /// A later record replaced or removed it, or something after it is lost.
    Gone,
}

/// What a record's payload is.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Contents {
    /// KV of a block of tokens, all layers, as the layout orders them.
    Block {
        /// Shapes and order.
        layout: KvLayout,
        /// The model's name, cut off at 128 bytes.
        model: String,
    },
    /// K and V of one layer: K first, V at the next multiple of 64 bytes.
    Named {
        /// Element type and shape of K.
        k: (DType, Shape),
        /// Element type and shape of V.
        v: (DType, Shape),
        /// Length of the prefix text, which is not on the disk.
        prefix_bytes: usize,
    },
}

/// What a check of everything found.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Verified {
    /// Records read and checked, whatever their state.
    pub records: u64,
    /// Bytes of their payloads.
    pub payload_bytes: u64,
    /// Records whose bytes are not what they were.
    pub damaged: Vec<RecordInfo>,
    /// Records that the disk fails to read.
    pub unreadable: Vec<RecordInfo>,
    /// Records whose bytes are what they were, and whose codec is not known here.
    pub unknown_codec: u64,
    /// Records that were not durable yet and not wholly written when the process ended. They are
    /// not listed, and opening the cache drops them.
    pub torn_records: u64,
    /// What says which segments there should be.
    pub manifest: ManifestState,
    /// Segments read.
    pub segments: u64,
    /// Segments without an index: the cache was not closed, which harms nothing.
    pub unsealed_segments: u64,
    /// Segments of which something durable is missing, or whose header is damaged.
    pub damaged_segments: u64,
    /// Segments of which the disk fails to read what says which records lie there.
    pub unreadable_segments: u64,
    /// Segments that should be there and are not.
    pub lost_segments: u64,
    /// Files that are not the disk tier's.
    pub foreign: Vec<String>,
}

impl Verified {
    /// Is every byte what it was?
    #[must_use]
    pub fn is_whole(&self) -> bool {
        let segments = self.damaged_segments + self.unreadable_segments + self.lost_segments;
        let manifest = self.manifest == ManifestState::Whole;
        manifest && self.damaged.is_empty() && self.unreadable.is_empty() && segments == 0
    }
}

impl Archive {
    /// Opens a directory and reads the index of every segment. `now_ms`, in milliseconds since
    /// the Unix epoch, tells what has expired.
    ///
    /// # Errors
    /// [`Error::DiskLocked`] if a process writes to it, [`Error::DiskRefused`] for a wrong or
    /// missing key, another version, or a directory in which no disk tier lies, [`Error::Disk`]
    /// if it cannot be read.
    pub fn open(dir: impl AsRef<Path>, key_file: Option<&Path>, now_ms: u64) -> Result<Self> {
        let dir = dir.as_ref().to_owned();
        let cipher = key_file.map(Cipher::from_file).transpose()?;
        let directory = Directory::open(&dir, Access::ReadOnly).map_err(|error| open_error(&dir, error))?;
        Self::over(Arc::new(directory), dir, cipher, now_ms)
    }

    /// Looks at whatever lies in a backend.
    pub(super) fn over(directory: Arc<dyn Backend>, dir: PathBuf, cipher: Option<Cipher>, now_ms: u64) -> Result<Self> {
        let survey = survey(directory.as_ref(), cipher.as_ref(), false);
        let survey = survey.map_err(|refusal| refused(&dir, "read", refusal))?;
        let is_known = |listed: &Listed| !matches!(listed.seen, Seen::Unreadable(_));
        let nothing = survey.manifest != ManifestState::Whole && !survey.segments.iter().any(is_known);
        if nothing && (survey.manifest == ManifestState::Unreadable || !survey.segments.is_empty()) {
            let source = std::io::Error::other("neither its manifest nor the beginning of a segment can be read");
            return Err(Error::Disk { dir, doing: "read", source });
        }
        if nothing {
            let reason = "nothing of a disk tier lies there: give the directory of a cache".into();
            return Err(Error::DiskRefused { dir, reason });
        }
        Ok(Self::of(dir, directory, cipher, survey, now_ms))
    }

    fn of(dir: PathBuf, directory: Arc<dyn Backend>, cipher: Option<Cipher>, survey: Survey, now_ms: u64) -> Self {
        let Survey { segments, foreign, manifest, .. } = survey;
        let mut parts = Vec::with_capacity(segments.len());
        let (mut lost_segments, mut damaged_segments, mut unreadable_segments, mut torn_records) = (0, 0, 0, 0);
        let mut replay = Replay::default();
        let mut used_bytes = super::room::OVERHEAD_BYTES;
        for Listed { seen, .. } in segments {
            let surveyed = match seen {
                Seen::Ours(surveyed) => surveyed,
                other => {
                    match other {
                        Seen::Damaged => damaged_segments += 1,
                        Seen::Unreadable(_) => unreadable_segments += 1,
                        Seen::Missing | Seen::Ours(_) => lost_segments += 1,
                    }
                    replay.lose_named();
                    continue;
                }
            };
            let (records, torn) = surveyed.read_whole(cipher.as_ref());
            torn_records += torn as u64;
            used_bytes += surveyed.segment.file.size().map_or(0, |size| size.allocated_bytes);
            replay.add(parts.len(), surveyed.segment.id, &records, now_ms);
            parts.push(Part { segment: surveyed.segment, records });
        }
        Self {
            dir,
            cipher,
            codecs: Codecs::default(),
            segments: parts,
            records: replay.records,
            foreign,
            manifest,
            lost_segments,
            damaged_segments,
            unreadable_segments,
            torn_records,
            used_bytes,
            _directory: directory,
        }
    }

    /// Decodes with these codecs, too.
    #[must_use]
    pub fn codecs(mut self, codecs: Codecs) -> Self {
        self.codecs = codecs;
        self
    }

    /// Every stored record, oldest first; removals are not listed.
    #[must_use]
    pub fn records(&self) -> &[RecordInfo] {
        &self.records
    }

    /// Bytes on the disk, with the margin that the cap counts for the directory itself.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.used_bytes
    }

    /// Are payloads encrypted?
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.cipher.is_some()
    }

    /// What a record's payload is, from its header. `None` if the header is damaged.
    ///
    /// # Errors
    /// [`Error::Disk`] if it cannot be read.
    pub fn contents(&self, record: &RecordInfo) -> Result<Option<Contents>> {
        let Some(part) = self.segments.get(record.part) else { return Ok(None) };
        let header = part.segment.read_header(record.page, &record.expected());
        Ok(self.unless_damaged(header)?.and_then(|header| contents(header.content)))
    }

    /// A record's block and what it is, checked and decoded. `None` if a byte of it is damaged.
    ///
    /// # Errors
    /// [`Error::Disk`] if it cannot be read, or nobody here knows its codec.
    pub fn load(&self, record: &RecordInfo) -> Result<Option<(Contents, Vec<u8>)>> {
        let Some(part) = self.segments.get(record.part) else { return Ok(None) };
        let raw_bytes = usize::try_from(record.raw_bytes).map_err(|_| Error::SizeOverflow("a block"))?;
        let mut pages = Pages::new(raw_bytes.div_ceil(PAGE_BYTES));
        let at = At {
            segment: &part.segment,
            page: record.page,
            payload_pages: record.payload_pages(),
            expected: record.expected(),
        };
        let decoder = Decoder { codecs: &self.codecs, cipher: self.cipher.as_ref() };
        let Some(header) = self.unless_damaged(decoder.read(at, pages.bytes_mut()))? else { return Ok(None) };
        let payload = pages.bytes().get(..raw_bytes).unwrap_or_default().to_vec();
        Ok(contents(header.content).map(|contents| (contents, payload)))
    }

    /// Reads everything and checks it. `progress` gets the number of records done. What cannot be read
    /// is noted, and the next record is looked at.
    #[must_use]
    pub fn verify(&self, mut progress: impl FnMut(u64)) -> Verified {
        let mut verified = Verified {
            foreign: self.foreign.clone(),
            manifest: self.manifest,
            lost_segments: self.lost_segments,
            damaged_segments: self.damaged_segments,
            unreadable_segments: self.unreadable_segments,
            torn_records: self.torn_records,
            segments: self.segments.len() as u64,
            ..Verified::default()
        };
        for part in &self.segments {
            verified.damaged_segments += u64::from(part.records.lost && !part.records.unreadable);
            verified.unreadable_segments += u64::from(part.records.unreadable);
            verified.unsealed_segments += u64::from(part.records.index_end.is_none() && !part.records.lost);
        }
        for record in &self.records {
            let is_known = self.codecs.get(record.codec).is_some();
            verified.unknown_codec += u64::from(!is_known);
            let read = if is_known { self.load(record).map(|loaded| loaded.is_some()) } else { self.is_whole(record) };
            match read {
                Ok(true) => verified.payload_bytes += record.stored_bytes,
                Ok(false) => verified.damaged.push(record.clone()),
                Err(_) => verified.unreadable.push(record.clone()),
            }
            verified.records += 1;
            progress(verified.records);
        }
        verified
    }

    /// Is every byte of a record's payload what it was, whatever it means?
    fn is_whole(&self, record: &RecordInfo) -> Result<bool> {
        let Some(part) = self.segments.get(record.part) else { return Ok(false) };
        let mut pages = Pages::new(record.payload_pages() as usize);
        let read = part.segment.read(record.page, &record.expected(), self.cipher.as_ref(), pages.bytes_mut());
        Ok(self.unless_damaged(read)?.is_some())
    }

    fn unless_damaged<T>(&self, read: Result<T, ReadError>) -> Result<Option<T>> {
        match read {
            Ok(value) => Ok(Some(value)),
            Err(ReadError::Damaged | ReadError::NoRoom) => Ok(None),
            Err(ReadError::Io(error)) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(None),
            Err(ReadError::Io(source)) => Err(Error::Disk { dir: self.dir.clone(), doing: "read", source }),
            Err(ReadError::UnknownCodec(codec)) => {
                let text = format!("nobody here knows codec {codec}: a later release of kvkeep may");
                let source = std::io::Error::new(std::io::ErrorKind::Unsupported, text);
                Err(Error::Disk { dir: self.dir.clone(), doing: "decode", source })
            }
        }
    }
}

impl RecordInfo {
    fn expected(&self) -> Expected {
        Expected { key: ObjectKey::new(self.key, self.layer), namespace: self.namespace, codec: self.codec }
    }

    fn payload_pages(&self) -> u32 {
        u32::try_from(self.stored_bytes.div_ceil(PAGE_BYTES as u64)).unwrap_or(u32::MAX)
    }
}

/// Follows what each record does to those before it.
#[derive(Debug, Default)]
struct Replay {
    records: Vec<RecordInfo>,
    /// The live record of each key.
    live: HashMap<([u8; 32], u32), usize>,
}

impl Replay {
    fn add(&mut self, part: usize, segment: u64, records: &Records, now_ms: u64) {
        for (page, meta) in &records.entries {
            let key = (*meta.key.hash(), meta.key.layer());
            match meta.kind {
                Kind::Block | Kind::Named => {
                    let expired = meta.expires_at_ms <= now_ms;
                    let state = if expired { RecordState::Expired } else { RecordState::Live };
                    self.lose(&key);
                    if !expired {
                        self.live.insert(key, self.records.len());
                    }
                    self.records.push(info(meta, *page, segment, part, state));
                }
                Kind::Removal => self.lose(&key),
                Kind::NamespaceCleared => self.lose_where(|record| record.namespace == meta.namespace),
                Kind::Cleared => self.lose_where(|_| true),
            }
        }
        if records.lost {
            self.lose_named();
        }
    }

    fn lose(&mut self, key: &([u8; 32], u32)) {
        let record = self.live.remove(key).and_then(|position| self.records.get_mut(position));
        if let Some(record) = record {
            record.state = RecordState::Gone;
        }
    }

    fn lose_named(&mut self) {
        self.lose_where(|record| !record.is_block);
    }

    fn lose_where(&mut self, condition: impl Fn(&RecordInfo) -> bool) {
        let Self { records, live } = self;
        live.retain(|_, position| {
            let Some(record) = records.get_mut(*position) else { return false };
            let lost = condition(record);
            if lost {
                record.state = RecordState::Gone;
            }
            !lost
        });
    }
}

fn info(meta: &RecordMeta, page: u32, segment: u64, part: usize, state: RecordState) -> RecordInfo {
    let compute_us = u64::from(meta.compute_us);
    RecordInfo {
        namespace: meta.namespace,
        key: *meta.key.hash(),
        layer: meta.key.layer(),
        is_block: meta.kind == Kind::Block,
        raw_bytes: meta.raw_bytes,
        stored_bytes: meta.stored_bytes,
        codec: meta.codec,
        stored_at_ms: meta.stored_at_ms,
        expires_at_ms: (meta.expires_at_ms != u64::MAX).then_some(meta.expires_at_ms),
        compute_time: (compute_us > 0).then(|| Duration::from_micros(compute_us)),
        state,
        segment,
        page,
        part,
    }
}

fn contents(content: Content) -> Option<Contents> {
    match content {
        Content::Block { layout, model } => Some(Contents::Block { layout, model }),
        Content::Named(spec) => Some(Contents::Named { k: spec.k, v: spec.v, prefix_bytes: spec.prefix_bytes }),
        Content::Nothing => None,
    }
}
