//! The manifest: which segments there are. Small, and replaced as a whole by renaming.
//!
//! It names segments, not records: records are in the segments' own indexes. So it changes
//! only when a segment comes, is sealed or goes, and tells a lost segment from none.

use super::{Identity, PAGE_BYTES, Put, Take, VERSION, checksum};

const MAGIC: &[u8; 8] = b"KVKMANIF";
const FIXED_BYTES: usize = 8 + 4 + 4 + 40 + 8 + 8;
const LINE_BYTES: usize = 32;
const SUM_BYTES: usize = 8;
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
        put.skip(8);
        for line in &self.segments {
            put.u64(line.segment);
            put.u8(u8::from(line.sealed));
            put.skip(7);
            put.u32(line.entries);
            put.u32(line.pages);
            put.skip(8);
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
        take.skip(8)?;
        let segments = (0..count).map(|_| take_line(&mut take)).collect::<Option<Vec<_>>>()?;
        let ascending = segments.windows(2).all(|pair| matches!(pair, [a, b] if a.segment < b.segment));
        let below = segments.last().is_none_or(|last| last.segment < next_segment);
        (ascending && below).then_some(Self { identity, next_segment, segments })
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
    let line = SegmentLine { segment, sealed, entries: take.u32()?, pages: take.u32()? };
    take.skip(8)?;
    Some(line)
}
