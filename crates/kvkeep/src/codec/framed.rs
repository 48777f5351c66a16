//! A block as a codec keeps it: a table of ends, then frame behind frame.
//!
//! The table has 4 bytes for each frame: where it ends, counted from the end of the table. A frame as long as its raw
//! bytes is kept as it is: the codec made nothing smaller of it. So any frame can be found and decoded without those
//! before it.
//!
//! Invariant: bytes between frames, and behind the last one, are zero in the raw block, and are not kept. One stream
//! for the whole block was the alternative: a range of layers would then cost the decoding of all before it.

use std::ops::Range;

use super::Codec;
use crate::layout::Frame;

const END_BYTES: usize = 4;

/// Where each frame ends: the table in front of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ends(Vec<u32>);

impl Ends {
    /// Bytes of the table of so many frames.
    pub(crate) fn table_bytes(frames: usize) -> usize {
        frames * END_BYTES
    }

    /// The table of so many frames, if these bytes begin with one.
    pub(crate) fn read(frames: usize, stored: &[u8]) -> Option<Self> {
        let table = stored.get(..Self::table_bytes(frames))?;
        let ends: Vec<u32> = table.as_chunks::<END_BYTES>().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
        ends.is_sorted().then_some(Self(ends))
    }

    /// Where these frames lie in what is stored.
    pub(crate) fn extent(&self, frames: Range<usize>) -> Option<Range<usize>> {
        let table = Self::table_bytes(self.0.len());
        let end = |frame: usize| self.0.get(frame).map(|end| table + *end as usize);
        let begin = frames.start.checked_sub(1).map_or(Some(table), end)?;
        Some(begin..frames.end.checked_sub(1).map_or(Some(table), end)?)
    }
}

/// Bytes to be had for the stored form of a block.
fn most_bytes(frames: &[Frame], raw_bytes: usize) -> usize {
    Ends::table_bytes(frames.len()) + raw_bytes
}

/// Writes the stored form of a block into what `room` gives for so many bytes, and says how long it is; `None` if
/// it is no shorter than the block, or the block is too long for a table.
pub(crate) fn encode<T: AsMut<[u8]>>(
    codec: &dyn Codec,
    frames: &[Frame],
    raw: &[u8],
    room: impl FnOnce(usize) -> T,
) -> Option<(T, usize)> {
    u32::try_from(raw.len()).ok()?;
    let mut made = room(most_bytes(frames, raw.len()));
    let (table, body) = made.as_mut().split_at_mut_checked(Ends::table_bytes(frames.len()))?;
    let (ends, _) = table.as_chunks_mut::<END_BYTES>();
    let mut at = 0;
    for (frame, end) in frames.iter().zip(ends) {
        let raw = raw.get(frame.range.clone())?;
        let into = body.get_mut(at..at + raw.len())?;
        // One byte less: as long as the frame means as it is.
        let room = into.get_mut(..raw.len().saturating_sub(1))?;
        let room_bytes = room.len();
        at += match codec.encode(frame, raw, room).filter(|bytes| *bytes <= room_bytes) {
            Some(bytes) => bytes,
            None => {
                into.copy_from_slice(raw);
                raw.len()
            }
        };
        *end = u32::try_from(at).ok()?.to_le_bytes();
    }
    let stored_bytes = Ends::table_bytes(frames.len()) + at;
    made.as_mut().get_mut(stored_bytes..)?.fill(0);
    (stored_bytes < raw.len()).then_some((made, stored_bytes))
}

/// The frames that have bytes of this range.
pub(crate) fn frames_in(frames: &[Frame], range: &Range<usize>) -> Range<usize> {
    let first = frames.partition_point(|frame| frame.range.end <= range.start);
    let end = frames.partition_point(|frame| frame.range.start < range.end);
    first..end.max(first)
}

/// The whole block, at the beginning of `into`, and zeros behind it. `false` if these are not the bytes of one.
#[cfg(feature = "disk")]
pub(crate) fn decode(codec: &dyn Codec, frames: &[Frame], stored: &[u8], into: &mut [u8]) -> bool {
    let Some(ends) = Ends::read(frames.len(), stored) else { return false };
    let whole = ends.extent(0..frames.len()).is_some_and(|all| all.end <= stored.len());
    let raw = 0..into.len();
    whole && decode_range(codec, frames, &ends, (stored, 0), &raw, into)
}

/// Of a block, the bytes of `range`, into as many. `stored` has the bytes of its frames, and begins `at` so many
/// bytes into the stored form.
pub(crate) fn decode_range(
    codec: &dyn Codec,
    frames: &[Frame],
    ends: &Ends,
    (stored, at): (&[u8], usize),
    range: &Range<usize>,
    into: &mut [u8],
) -> bool {
    let mut done = range.start;
    let wanted = frames_in(frames, range);
    for (number, frame) in frames.iter().enumerate().skip(wanted.start).take(wanted.len()) {
        let extent = ends.extent(number..number + 1);
        let extent = extent.and_then(|extent| Some(extent.start.checked_sub(at)?..extent.end.checked_sub(at)?));
        let Some(kept) = extent.and_then(|extent| stored.get(extent)) else { return false };
        let part = frame.range.start.max(range.start)..frame.range.end.min(range.end);
        let gap = into.get_mut(done - range.start..part.start - range.start);
        gap.into_iter().for_each(|gap| gap.fill(0));
        let Some(to) = into.get_mut(part.start - range.start..part.end - range.start) else { return false };
        if !decode_part(codec, frame, kept, &part, to) {
            return false;
        }
        done = part.end;
    }
    into.get_mut(done - range.start..).into_iter().for_each(|rest| rest.fill(0));
    true
}

/// Straight into place where all of the frame is wanted.
fn decode_part(codec: &dyn Codec, frame: &Frame, kept: &[u8], part: &Range<usize>, to: &mut [u8]) -> bool {
    let within = part.start - frame.range.start..part.end - frame.range.start;
    if kept.len() == frame.range.len() {
        return kept.get(within).map(|kept| to.copy_from_slice(kept)).is_some();
    }
    if *part == frame.range {
        return codec.decode(frame, kept, to);
    }
    let mut whole = vec![0; frame.range.len()];
    let right = codec.decode(frame, kept, &mut whole);
    right && whole.get(within).map(|whole| to.copy_from_slice(whole)).is_some()
}
