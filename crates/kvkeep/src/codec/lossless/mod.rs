//! `lossless`: the same bits in fewer bytes. KV as bfloat16 takes two thirds of its bytes.
//!
//! Of a float, sign and mantissa are noise, and the exponent has few values: 2.7 bits in real KV. So elements are cut
//! into byte planes (`planes`), and each plane that is worth it is coded by how often its bytes occur (`huffman`). What
//! is known of weights (`DFloat11`, arXiv 2504.11651) holds for KV.
//!
//! - Here: the codec, and a frame's stored form: its form (1 byte, see `planes`), then each 64 KiB of it by themselves,
//!   then bytes that are no whole element. Of each piece, planes from the lowest byte's on; of each plane its kind
//!   (1 byte) and what the kind says.
//!
//! Invariant: any bytes come back exactly, NaN and its payload too; no element is ever a number here. Exponents relative to
//! those of their channel were the alternative: real K takes 3% less, V nothing, and what is known of the channels has
//! to be kept, which is 1% to 3%.

mod huffman;
mod planes;
#[cfg(test)]
mod tests;

use super::wide::{self, Wide, Work};
use super::{Codec, CodecId};
use crate::layout::Frame;
use crate::tensor::DType;
use huffman::Lengths;
use planes::Form;

/// What has tables of its own: so many bytes, or what is left of the frame. Opaque blocks have many layers in a frame.
const PIECE_BYTES: usize = 64 << 10;
/// Kinds of planes: as it is; one byte, which all are; its length (2 bytes), and it as `huffman` codes it.
const RAW: u8 = 0;
const CONSTANT: u8 = 1;
const CODED: u8 = 2;

/// Bit-exact for every dtype; what does not shrink stays as it is.
#[derive(Debug, Clone, Copy)]
pub struct Lossless {
    pub(super) wide: Option<Wide>,
}

impl Lossless {
    /// As fast as this processor allows. The bytes are the same on any.
    #[must_use]
    pub fn new() -> Self {
        Self { wide: Wide::detected() }
    }
}

impl Default for Lossless {
    fn default() -> Self {
        Self::new()
    }
}

impl Codec for Lossless {
    fn id(&self) -> CodecId {
        CodecId::LOSSLESS
    }

    fn name(&self) -> &'static str {
        "lossless"
    }

    fn is_exact(&self) -> bool {
        true
    }

    fn encode(&self, frame: &Frame, raw: &[u8], into: &mut [u8]) -> Option<usize> {
        let form = form(frame.dtype, raw);
        wide::run(self.wide, Encoding { form, raw, into })
    }

    fn decode(&self, _frame: &Frame, stored: &[u8], raw: &mut [u8]) -> bool {
        wide::run(self.wide, Decoding { stored, raw }).is_some()
    }
}

/// A frame to be written.
struct Encoding<'a> {
    form: Form,
    raw: &'a [u8],
    into: &'a mut [u8],
}

impl Work for Encoding<'_> {
    type Out = Option<usize>;

    #[inline(always)]
    fn run(self) -> Option<usize> {
        encode(self.form, self.raw, self.into)
    }
}

/// A frame to be read.
struct Decoding<'a> {
    stored: &'a [u8],
    raw: &'a mut [u8],
}

impl Work for Decoding<'_> {
    type Out = Option<()>;

    #[inline(always)]
    fn run(self) -> Option<()> {
        decode(self.stored, self.raw)
    }
}

/// What elements are cut into. Integers may be anything that travels as such: their bytes tell.
fn form(dtype: DType, raw: &[u8]) -> Form {
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 | DType::F64 => Form::float(dtype.size_bytes()),
        DType::F8E4M3 | DType::F8E5M2 => Form::BYTES,
        DType::U8 | DType::I8 | DType::I16 | DType::I32 | DType::I64 => Form::guess(raw),
    }
}

#[inline(always)]
fn encode(form: Form, raw: &[u8], into: &mut [u8]) -> Option<usize> {
    let mut out = Out { into, at: 0 };
    out.put(&[form.code()])?;
    let whole = raw.len() - raw.len() % form.planes();
    let (whole, rest) = raw.split_at_checked(whole)?;
    let mut room = vec![0; PIECE_BYTES.min(whole.len())];
    for piece in whole.chunks(PIECE_BYTES) {
        let planes = room.get_mut(..piece.len())?;
        form.split(piece, planes);
        for plane in planes.chunks_exact(piece.len() / form.planes()) {
            encode_plane(plane, &mut out)?;
        }
    }
    out.put(rest)?;
    Some(out.at)
}

#[inline(always)]
fn encode_plane(plane: &[u8], out: &mut Out<'_>) -> Option<()> {
    if let [first, rest @ ..] = plane
        && rest.iter().all(|byte| byte == first)
    {
        return out.put(&[CONSTANT, *first]);
    }
    if let Some(lengths) = worth_coding(plane)
        && out.put_coded(&lengths, plane).is_some()
    {
        return Some(());
    }
    out.put(&[RAW])?;
    out.put(plane)
}

/// The lengths of its codes, if they save a part of the plane.
#[inline(always)]
fn worth_coding(plane: &[u8]) -> Option<Lengths> {
    const LEAST_BYTES: usize = 128;
    if plane.len() < LEAST_BYTES || is_flat(plane) {
        return None;
    }
    let counts = count(plane);
    let lengths = Lengths::of(&counts)?;
    let saved = plane.len().checked_sub(lengths.bytes(&counts))?;
    (saved > LEAST_BYTES / 2 && saved > plane.len() / 32).then_some(lengths)
}

/// Is it noise, as mantissas are? A sample tells, in a tenth of the time. Two bytes of noise are equal once in 256
/// times; of planes with that of less than 230 at most 2% can be saved, since the entropy is at least the logarithm of that.
#[inline(always)]
fn is_flat(plane: &[u8]) -> bool {
    const RUNS: usize = 16;
    const RUN_BYTES: usize = 64;
    let mut sample = [0; RUNS * RUN_BYTES];
    let runs = plane.chunks((plane.len() / RUNS).max(RUN_BYTES)).filter_map(|run| run.get(..RUN_BYTES));
    let mut bytes = 0;
    for (to, run) in sample.chunks_exact_mut(RUN_BYTES).zip(runs) {
        to.copy_from_slice(run);
        bytes += RUN_BYTES;
    }
    let counts = count(sample.get(..bytes).unwrap_or_default());
    let (pairs, equal) = pairs(&counts);
    equal * 230 < pairs
}

/// Bits of a plane of which these are a sample: its entropy, with what small samples miss (Miller and Madow, 1955).
fn bits(sample: &[u8]) -> f32 {
    let counts = count(sample);
    let each = counts.iter().filter(|count| **count > 0).map(|count| {
        let count = *count as f32;
        count * (sample.len() as f32 / count).log2() + 0.5 * std::f32::consts::LOG2_E
    });
    each.sum()
}

/// How many pairs of the counted there are, and how many of them are equal: both twice.
fn pairs(counts: &[u32; 256]) -> (u64, u64) {
    let total: u64 = counts.iter().map(|count| u64::from(*count)).sum();
    let equal = counts.iter().map(|count| u64::from(*count) * u64::from(count.saturating_sub(1))).sum();
    (total * total.saturating_sub(1), equal)
}

/// Four counts for each byte: one that is counted several times in a row would wait for itself.
#[inline(always)]
fn count(bytes: &[u8]) -> [u32; 256] {
    let mut parts = [[0u32; 256]; 4];
    let (fours, rest) = bytes.as_chunks::<4>();
    for four in fours {
        for (counts, byte) in parts.iter_mut().zip(four) {
            if let Some(count) = counts.get_mut(usize::from(*byte)) {
                *count += 1;
            }
        }
    }
    let [mut total, others @ ..] = parts;
    for counts in &others {
        total.iter_mut().zip(counts).for_each(|(total, count)| *total += count);
    }
    for byte in rest {
        if let Some(count) = total.get_mut(usize::from(*byte)) {
            *count += 1;
        }
    }
    total
}

#[inline(always)]
fn decode(stored: &[u8], raw: &mut [u8]) -> Option<()> {
    let (code, mut stored) = stored.split_first()?;
    let form = Form::from_code(*code)?;
    let whole = raw.len() - raw.len() % form.planes();
    let (whole, rest) = raw.split_at_mut_checked(whole)?;
    let mut room = vec![0; PIECE_BYTES.min(whole.len())];
    for piece in whole.chunks_mut(PIECE_BYTES) {
        stored = decode_piece(form, stored, &mut room, piece)?;
    }
    (stored.len() == rest.len()).then(|| rest.copy_from_slice(stored))
}

/// What is stored behind the piece.
#[inline(always)]
fn decode_piece<'s>(form: Form, mut stored: &'s [u8], room: &mut [u8], piece: &mut [u8]) -> Option<&'s [u8]> {
    let elements = piece.len() / form.planes();
    let mut planes: [&[u8]; Form::MOST_PLANES] = [&[]; Form::MOST_PLANES];
    let planes = planes.get_mut(..form.planes())?;
    for (plane, room) in planes.iter_mut().zip(room.chunks_exact_mut(elements)) {
        (*plane, stored) = decode_plane(stored, room)?;
    }
    form.merge(planes, piece);
    Some(stored)
}

/// A plane as long as `room`, there or where it is stored, and what is stored behind it.
#[inline(always)]
fn decode_plane<'a, 's: 'a>(stored: &'s [u8], room: &'a mut [u8]) -> Option<(&'a [u8], &'s [u8])> {
    let (kind, stored) = stored.split_first()?;
    match *kind {
        RAW => stored.split_at_checked(room.len()),
        CONSTANT => {
            let (byte, stored) = stored.split_first()?;
            room.fill(*byte);
            Some((room, stored))
        }
        CODED => {
            let (bytes, stored) = stored.split_first_chunk::<2>()?;
            let (coded, stored) = stored.split_at_checked(u16::from_le_bytes(*bytes).into())?;
            huffman::decode(coded, room)?;
            Some((room, stored))
        }
        _ => None,
    }
}

/// What is written.
#[derive(Debug)]
struct Out<'a> {
    into: &'a mut [u8],
    at: usize,
}

impl Out<'_> {
    #[inline(always)]
    fn put(&mut self, bytes: &[u8]) -> Option<()> {
        self.into.get_mut(self.at..)?.get_mut(..bytes.len())?.copy_from_slice(bytes);
        self.at += bytes.len();
        Some(())
    }

    #[inline(always)]
    fn put_coded(&mut self, lengths: &Lengths, plane: &[u8]) -> Option<()> {
        let ([kind, length @ ..], room) = self.into.get_mut(self.at..)?.split_first_chunk_mut::<3>()?;
        let most = room.len().min(plane.len() - 1);
        let bytes = huffman::encode(lengths, plane, room.get_mut(..most)?)?;
        (*kind, *length) = (CODED, u16::try_from(bytes).ok()?.to_le_bytes());
        self.at += 3 + bytes;
        Some(())
    }
}
