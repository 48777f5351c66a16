//! The manifest: which segments there are. Small, and replaced as a whole by renaming.
//!
//! It names segments, not records: records are in the segments' own indexes. So it changes
//! only when a segment comes, is sealed or goes, and tells a lost segment from none.
//!
//! Two pages behind it are written in place, in turns: the [`Mark`] says how far the segment that is being written
//! has become durable since. A new manifest for each flush was the alternative: two more syncs.

use super::page::{
    Identity, PAGE_BYTES, PAGE_SUM_AT, Put, StoreId, Take, VERSION, begin_page, checksum, finish_page, open_page,
};

const MAGIC: &[u8; 8] = b"KVKMANIF";
const FIXED_BYTES: usize = 8 + 4 + 4 + 40 + 8 + 8;
const LINE_BYTES: usize = 32;
const SUM_BYTES: usize = 8;
const MARK_MAGIC: &[u8; 8] = b"KVKMARKS";
const MARK_BYTES: usize = 8 + 4 + 4 + 16 + 8 + 8 + 4 + 4;
/// Pages behind the manifest of which each holds a mark. Releases before there were any wrote 0 here.
pub(crate) const MARK_PAGES: usize = 2;
/// Segments that a mark names as gone at most.
const MAX_GONE: usize = (PAGE_SUM_AT - MARK_BYTES) / 8;
/// More segments than this no directory has.
const MAX_SEGMENTS: usize = 65_535;

/// All of the manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub(crate) identity: Identity,
    /// No segment has had this number or a higher one.
    pub(crate) next_segment: u64,
    /// Oldest first.
    pub(crate) segments: Vec<SegmentLine>,
    /// Do pages for marks stand behind it?
    pub(crate) has_marks: bool,
}

/// What the manifest says of one segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SegmentLine {
    pub(crate) segment: u64,
    /// Does it have an index?
    pub(crate) sealed: bool,
    /// Lines in that index.
    pub(crate) entries: u32,
    /// Pages of the whole file, if sealed.
    pub(crate) pages: u32,
    /// Pages of records that were durable when this was written, if not sealed; 0 if none ever were.
    pub(crate) durable_pages: u32,
}

/// What changed since the manifest was written.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Mark {
    pub(crate) store_id: StoreId,
    /// The higher one counts.
    pub(crate) sequence: u64,
    /// A segment, and the pages of it that are durable.
    pub(crate) segment: u64,
    pub(crate) durable_pages: u32,
    /// Segments that were evicted.
    pub(crate) gone: Vec<u64>,
}

impl SegmentLine {
    /// Of a segment that is being written and of which nothing is durable.
    pub(crate) fn open(segment: u64) -> Self {
        Self { segment, sealed: false, entries: 0, pages: 0, durable_pages: 0 }
    }
}

impl Mark {
    pub(crate) fn encode(&self, page: &mut [u8]) {
        let gone = self.gone.get(..self.gone.len().min(MAX_GONE)).unwrap_or_default();
        let mut put = begin_page(page, MARK_MAGIC);
        put.skip(4);
        put.bytes(&self.store_id);
        put.u64(self.sequence);
        put.u64(self.segment);
        put.u32(self.durable_pages);
        put.u32(u32::try_from(gone.len()).unwrap_or(0));
        gone.iter().for_each(|segment| put.u64(*segment));
        finish_page(page);
    }

    pub(crate) fn decode(page: &[u8]) -> Option<Self> {
        let mut take = open_page(page, MARK_MAGIC)?;
        take.skip(4)?;
        let (store_id, sequence, segment) = (take.array()?, take.u64()?, take.u64()?);
        let (durable_pages, count) = (take.u32()?, take.u32()? as usize);
        if count > MAX_GONE {
            return None;
        }
        let gone = (0..count).map(|_| take.u64()).collect::<Option<_>>()?;
        Some(Self { store_id, sequence, segment, durable_pages, gone })
    }
}

impl Manifest {
    /// Bytes that [`Manifest::encode`] writes, in whole pages.
    pub(crate) fn encoded_bytes(&self) -> usize {
        (FIXED_BYTES + self.segments.len() * LINE_BYTES + SUM_BYTES).next_multiple_of(PAGE_BYTES)
    }

    /// Writes into `bytes`, which has [`Manifest::encoded_bytes`].
    pub(crate) fn encode(&self, bytes: &mut [u8]) {
        let mut put = Put::new(bytes);
        put.bytes(MAGIC);
        put.u32(VERSION);
        put.u32(u32::try_from(self.segments.len()).unwrap_or(u32::MAX));
        self.identity.put(&mut put);
        put.u64(self.next_segment);
        put.u64(if self.has_marks { MARK_PAGES as u64 } else { 0 });
        for line in &self.segments {
            put.u64(line.segment);
            put.u8(u8::from(line.sealed));
            put.skip(7);
            put.u32(line.entries);
            put.u32(line.pages);
            put.u32(line.durable_pages);
            put.skip(4);
        }
        let end = put.at;
        let sum = checksum(bytes.get(..end).unwrap_or_default());
        if let Some(to) = bytes.get_mut(end..end + SUM_BYTES) {
            to.copy_from_slice(&sum.to_le_bytes());
        }
    }

    /// The version of a manifest that another release wrote.
    pub(crate) fn other_version(bytes: &[u8]) -> Option<u32> {
        let mut take = Take::new(bytes);
        let (magic, version) = (take.bytes(8)?, take.u32()?);
        take.seek(16 + 16 + 1);
        (magic == MAGIC && version != VERSION && take.u32()? == version).then_some(version)
    }

    /// Takes over what changed since it was written.
    pub(crate) fn apply(&mut self, mark: &Mark) {
        self.segments.retain(|line| !mark.gone.contains(&line.segment));
        for line in self.segments.iter_mut().filter(|line| line.segment == mark.segment && !line.sealed) {
            line.durable_pages = line.durable_pages.max(mark.durable_pages);
        }
    }

    /// A manifest that is whole.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut take = Take::new(bytes);
        if take.bytes(8)? != MAGIC || take.u32()? != VERSION {
            return None;
        }
        let count = take.u32()? as usize;
        if count > MAX_SEGMENTS {
            return None;
        }
        let end = FIXED_BYTES + count * LINE_BYTES;
        let sum = checksum(bytes.get(..end)?).to_le_bytes();
        if bytes.get(end..end + SUM_BYTES)? != sum {
            return None;
        }
        let identity = Identity::take(&mut take)?;
        let next_segment = take.u64()?;
        let has_marks = match take.u64()? {
            0 => false,
            marks if marks == MARK_PAGES as u64 => true,
            _ => return None,
        };
        let segments = (0..count).map(|_| take_line(&mut take)).collect::<Option<Vec<_>>>()?;
        let ascending = segments.windows(2).all(|pair| matches!(pair, [a, b] if a.segment < b.segment));
        let below = segments.last().is_none_or(|last| last.segment < next_segment);
        (ascending && below).then_some(Self { identity, next_segment, segments, has_marks })
    }
}

/// For fuzzing: the checksum stands where the number of lines says.
#[cfg(any(test, feature = "fuzzing"))]
pub(super) fn make_sum_right(bytes: &mut [u8]) {
    let lines = bytes.get(12..16).and_then(|lines| lines.try_into().ok()).map_or(0, u32::from_le_bytes);
    let end = FIXED_BYTES + (lines as usize).min(MAX_SEGMENTS) * LINE_BYTES;
    if let Some((body, rest)) = bytes.split_at_mut_checked(end)
        && let Some(sum) = rest.get_mut(..SUM_BYTES)
    {
        sum.copy_from_slice(&checksum(body).to_le_bytes());
    }
}

fn take_line(take: &mut Take<'_>) -> Option<SegmentLine> {
    let segment = take.u64()?;
    let sealed = match take.u8()? {
        0 => false,
        1 => true,
        _ => return None,
    };
    take.skip(7)?;
    let line = SegmentLine { segment, sealed, entries: take.u32()?, pages: take.u32()?, durable_pages: take.u32()? };
    take.skip(4)?;
    Some(line)
}
