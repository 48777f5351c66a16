//! `int8`, `int4`, `k8v4`, `fp8` and `nf4`: elements as codes of 8 or 4 bits, on a scale of their group's own.
//!
//! Groups are KIVI's (Liu and others, 2024, arXiv 2402.02750): keys by channel, because a few channels of K are large in
//! every token; values by token and head. `k8v4` keeps keys in 8 bits and values in 4: attention weighs an error of a
//! key exponentially, and one of a value as it is.
//!
//! - Here: the codecs, and a frame's stored form.
//! - `plan`: a frame as rows and groups. `grid`: codes and scales. `elements`: dtypes as numbers.
//!
//! Stored: 1, and how many tokens at the beginning and at the end are kept as they are (a byte each); then section by
//! section (a head's rows, or all rows) those of the beginning, piece by piece the scales of the groups and the codes of
//! the rows between, and those of the end. Or 0, and the frame as `lossless` stores it.
//!
//! Bound: an element differs by what `grid` says of its group, and by the rounding of its dtype.
//!
//! Invariant: what has no place on a scale comes back exactly: a frame with an infinity or a NaN, of integers, of 8-bit
//! floats, or of which nobody says what is K and V. Scales of a whole frame were the alternative: one large channel
//! would take the codes of all others.

mod elements;
mod grid;
mod plan;
#[cfg(test)]
mod tests;

use super::lossless::Lossless;
use super::wide::{self, Wide, Work};
use super::{Codec, CodecId};
use crate::layout::{Frame, Side};
use crate::tensor::DType;
use grid::{F8, Grid, Int4, Int8, Normal4, Row, Scales};
use plan::Plan;

/// The elements of floats of 16 or 32 bits as numbers; `None` for those of other dtypes.
pub(crate) fn numbers(dtype: DType, raw: &[u8]) -> Option<Vec<f32>> {
    matches!(dtype, DType::BF16 | DType::F16 | DType::F32).then(|| elements::read(dtype, raw))
}

/// What a frame's stored form begins with.
const EXACT: u8 = 0;
const CODED: u8 = 1;

/// Elements as codes of one kind for keys and one for values.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lossy {
    id: u8,
    name: &'static str,
    k: Kind,
    v: Kind,
    wide: Option<Wide>,
}

/// Which of `grid` it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Int8,
    Int4,
    F8,
    Normal4,
}

impl Lossy {
    /// All of them, as fast as this processor allows. The bytes are the same on any.
    pub(super) fn all() -> [Self; 5] {
        let of = |id, name, k, v| Self { id, name, k, v, wide: Wide::detected() };
        [
            of(2, "int8", Kind::Int8, Kind::Int8),
            of(3, "int4", Kind::Int4, Kind::Int4),
            of(4, "k8v4", Kind::Int8, Kind::Int4),
            of(5, "fp8", Kind::F8, Kind::F8),
            of(6, "nf4", Kind::Normal4, Kind::Normal4),
        ]
    }

    fn kind(&self, frame: &Frame) -> Option<Kind> {
        frame.side.map(|side| if side == Side::K { self.k } else { self.v })
    }

    /// In codes; `None` for what comes back exactly.
    fn encode_coded(&self, frame: &Frame, raw: &[u8], into: &mut [u8]) -> Option<usize> {
        let plan = Plan::of(frame, raw.len(), frame.exact_tokens.map(|tokens| tokens.min(u8::MAX.into())))?;
        let values = plan.values(raw);
        if values.iter().any(|value| !value.is_finite()) {
            return None;
        }
        let ([form, first, last], into) = into.split_first_chunk_mut()?;
        (*form, *first, *last) = (CODED, u8::try_from(plan.exact[0]).ok()?, u8::try_from(plan.exact[1]).ok()?);
        let kind = self.kind(frame)?;
        let into = into.get_mut(..kind.stored_bytes(&plan))?;
        let bytes = 3 + into.len();
        wide::run(self.wide, Encoding { kind, plan, raw, values: &values, into })?;
        Some(bytes)
    }

    fn decode_coded(&self, frame: &Frame, stored: &[u8], raw: &mut [u8]) -> Option<()> {
        let ([first, last], stored) = stored.split_first_chunk()?;
        let exact = [*first, *last].map(u32::from);
        let plan = Plan::of(frame, raw.len(), exact).filter(|plan| plan.exact == exact)?;
        let kind = self.kind(frame)?;
        if stored.len() != kind.stored_bytes(&plan) {
            return None;
        }
        wide::run(self.wide, Decoding { kind, plan, stored, raw })
    }
}

impl Codec for Lossy {
    fn id(&self) -> CodecId {
        CodecId(self.id)
    }

    fn name(&self) -> &'static str {
        self.name
    }

    fn is_exact(&self) -> bool {
        false
    }

    fn encode(&self, frame: &Frame, raw: &[u8], into: &mut [u8]) -> Option<usize> {
        if let Some(bytes) = self.encode_coded(frame, raw, into) {
            return Some(bytes);
        }
        let (form, into) = into.split_first_mut()?;
        *form = EXACT;
        Some(1 + Lossless { wide: self.wide }.encode(frame, raw, into)?)
    }

    fn decode(&self, frame: &Frame, stored: &[u8], raw: &mut [u8]) -> bool {
        match stored.split_first() {
            Some((&EXACT, stored)) => Lossless { wide: self.wide }.decode(frame, stored, raw),
            Some((&CODED, stored)) => self.decode_coded(frame, stored, raw).is_some(),
            _ => false,
        }
    }
}

impl Kind {
    fn stored_bytes(self, plan: &Plan) -> usize {
        match self {
            Self::Int8 => stored_bytes::<Int8>(plan),
            Self::Int4 => stored_bytes::<Int4>(plan),
            Self::F8 => stored_bytes::<F8>(plan),
            Self::Normal4 => stored_bytes::<Normal4>(plan),
        }
    }
}

fn stored_bytes<G: Grid>(plan: &Plan) -> usize {
    let piece = |rows| G::scale_bytes(plan.groups(rows)) + rows * G::row_bytes(plan.columns);
    plan.sections * (plan.exact_bytes() + plan.pieces().map(piece).sum::<usize>())
}

/// Elements to be coded.
struct Encoding<'a> {
    kind: Kind,
    plan: Plan,
    raw: &'a [u8],
    values: &'a [f32],
    into: &'a mut [u8],
}

impl Work for Encoding<'_> {
    type Out = Option<()>;

    #[inline(always)]
    fn run(self) -> Option<()> {
        let Self { kind, plan, raw, values, into } = self;
        match kind {
            Kind::Int8 => encode::<Int8>(plan, raw, values, into),
            Kind::Int4 => encode::<Int4>(plan, raw, values, into),
            Kind::F8 => encode::<F8>(plan, raw, values, into),
            Kind::Normal4 => encode::<Normal4>(plan, raw, values, into),
        }
    }
}

#[inline(always)]
fn encode<G: Grid>(plan: Plan, raw: &[u8], values: &[f32], mut into: &mut [u8]) -> Option<()> {
    let [first, last] = plan.exact_rows();
    let sections = raw.chunks_exact(plan.section_bytes()).zip(values.chunks_exact(plan.rows * plan.columns));
    for (raw, values) in sections {
        let mut values = values.get(first * plan.columns..)?;
        into = put(into, raw.get(..first * plan.row_bytes())?)?;
        for rows in plan.pieces() {
            let (piece, scales);
            (piece, values) = values.split_at_checked(rows * plan.columns)?;
            (scales, into) = into.split_at_mut_checked(G::scale_bytes(plan.groups(rows)))?;
            let scales = G::fit(&plan.ranges(piece), scales)?;
            for (number, row) in piece.chunks_exact(plan.columns).enumerate() {
                let codes;
                (codes, into) = into.split_at_mut_checked(G::row_bytes(plan.columns))?;
                quantise::<G>(row, scales.row(plan.by_column, number)?, codes);
            }
        }
        into = put(into, raw.get((plan.rows - last) * plan.row_bytes()..)?)?;
    }
    Some(())
}

/// Copies, and says what is behind.
#[inline(always)]
fn put<'a>(into: &'a mut [u8], bytes: &[u8]) -> Option<&'a mut [u8]> {
    let (to, rest) = into.split_at_mut_checked(bytes.len())?;
    to.copy_from_slice(bytes);
    Some(rest)
}

/// Elements to be read.
struct Decoding<'a> {
    kind: Kind,
    plan: Plan,
    stored: &'a [u8],
    raw: &'a mut [u8],
}

impl Work for Decoding<'_> {
    type Out = Option<()>;

    #[inline(always)]
    fn run(self) -> Option<()> {
        let Self { kind, plan, stored, raw } = self;
        match kind {
            Kind::Int8 => decode::<Int8>(plan, stored, raw),
            Kind::Int4 => decode::<Int4>(plan, stored, raw),
            Kind::F8 => decode::<F8>(plan, stored, raw),
            Kind::Normal4 => decode::<Normal4>(plan, stored, raw),
        }
    }
}

#[inline(always)]
fn decode<G: Grid>(plan: Plan, mut stored: &[u8], raw: &mut [u8]) -> Option<()> {
    let [first, last] = plan.exact_rows();
    let mut values = vec![0.0; plan.columns];
    let mut scales = Scales::default();
    for section in raw.chunks_exact_mut(plan.section_bytes()) {
        let (head, rest) = section.split_at_mut_checked(first * plan.row_bytes())?;
        let (mut coded, tail) = rest.split_at_mut_checked(plan.coded_rows() * plan.row_bytes())?;
        stored = take(stored, head)?;
        for rows in plan.pieces() {
            let (kept, codes, piece);
            (kept, stored) = stored.split_at_checked(G::scale_bytes(plan.groups(rows)))?;
            G::read(kept, &mut scales)?;
            (codes, stored) = stored.split_at_checked(rows * G::row_bytes(plan.columns))?;
            (piece, coded) = coded.split_at_mut_checked(rows * plan.row_bytes())?;
            let both = piece.chunks_exact_mut(plan.row_bytes()).zip(codes.chunks_exact(G::row_bytes(plan.columns)));
            for (number, (row, codes)) in both.enumerate() {
                restore::<G>(codes, scales.row(plan.by_column, number)?, &mut values);
                elements::write(plan.dtype, &values, row);
            }
        }
        stored = take(stored, tail)?;
        debug_assert_eq!(tail.len(), last * plan.row_bytes());
    }
    Some(())
}

/// Copies, and says what is behind.
#[inline(always)]
fn take<'a>(from: &'a [u8], to: &mut [u8]) -> Option<&'a [u8]> {
    let (bytes, rest) = from.split_at_checked(to.len())?;
    to.copy_from_slice(bytes);
    Some(rest)
}

/// Codes of 4 bits: a byte has one of the row's first half, low, and one of its second half.
#[inline(always)]
fn quantise<G: Grid>(row: &[f32], scales: Row<'_>, codes: &mut [u8]) {
    let (low, high) = row.split_at(codes.len().min(row.len()));
    let (of_low, of_high) = scales.split(codes.len());
    of_low.each(low, codes, |value, code, scale| *code = G::code(*value, scale));
    if G::BITS == 4 {
        of_high.each(high, codes, |value, code, scale| *code |= G::code(*value, scale) << 4);
    }
}

#[inline(always)]
fn restore<G: Grid>(codes: &[u8], scales: Row<'_>, values: &mut [f32]) {
    let (low, high) = values.split_at_mut(codes.len().min(values.len()));
    let (of_low, of_high) = scales.split(codes.len());
    if G::BITS == 4 {
        of_low.each(codes, low, |code, value, scale| *value = G::value(*code & 15, scale));
        of_high.each(codes, high, |code, value, scale| *value = G::value(*code >> 4, scale));
    } else {
        of_low.each(codes, low, |code, value, scale| *value = G::value(*code, scale));
    }
}
