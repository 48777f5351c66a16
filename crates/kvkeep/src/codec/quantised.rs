//! `int8`, `int4` and `k8v4`: elements as whole numbers of 8 or 4 bits, on a scale of their group's own.
//!
//! Groups are KIVI's (Liu and others, 2024, arXiv 2402.02750): keys by channel, because a few channels of K are large in
//! every token; values by token and head. `k8v4` keeps keys in 8 bits and values in 4: attention weighs an error of a
//! key exponentially, and one of a value as it is.
//!
//! Stored: for each group where its scale begins and how far apart its levels are, as bfloat16; then the elements' levels,
//! in the frame's order, of 4 bits two a byte, low bits first.
//!
//! Bound: an element differs by half the distance of its group's levels at most, and by the rounding of its dtype. The
//! distance is the group's range, and up to a hundredth of its largest magnitude, in 255 or 15 parts.
//!
//! Invariant: what has no place on a scale is kept as it is: a frame with an infinity or a NaN, of integers, of 8-bit
//! floats, or of which nobody says what is K and V. Scales of a whole frame were the alternative: one large channel
//! would take the levels of all others.

use half::{bf16, f16};

use super::{Codec, CodecId};
use crate::layout::{Frame, Side, TokenOrder};
use crate::tensor::DType;

/// Bytes of a group's scale.
const SCALE_BYTES: usize = 4;

/// Elements as levels of so many bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Quantised {
    id: u8,
    name: &'static str,
    k_bits: u32,
    v_bits: u32,
}

/// `int8`.
pub(super) const INT8: Quantised = Quantised { id: 2, name: "int8", k_bits: 8, v_bits: 8 };
/// `int4`.
pub(super) const INT4: Quantised = Quantised { id: 3, name: "int4", k_bits: 4, v_bits: 4 };
/// `k8v4`.
pub(super) const K8V4: Quantised = Quantised { id: 4, name: "k8v4", k_bits: 8, v_bits: 4 };

/// A frame as sections of rows and columns, and where its groups are.
#[derive(Debug, Clone, Copy)]
struct Plan {
    dtype: DType,
    bits: u32,
    rows: usize,
    columns: usize,
    /// A group is a column of a section, else a row.
    by_column: bool,
    sections: usize,
}

/// Levels of a group: the lowest one, and the distance from one to the next.
#[derive(Debug, Clone, Copy, Default)]
struct Scale {
    zero: f32,
    step: f32,
}

impl Codec for Quantised {
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
        let plan = self.plan(frame, raw.len())?;
        let values = plan.values(raw);
        if values.iter().any(|value| !value.is_finite()) {
            return None;
        }
        let into = into.get_mut(..plan.stored_bytes())?;
        let length = into.len();
        let (mut scales, mut levels) = into.split_at_mut_checked(plan.groups() * SCALE_BYTES)?;
        for section in values.chunks_exact(plan.rows * plan.columns) {
            let groups = plan.scales(section)?;
            for scale in &groups {
                let (to, rest) = scales.split_first_chunk_mut()?;
                (*to, scales) = (scale.to_bytes(), rest);
            }
            for (number, row) in section.chunks_exact(plan.columns).enumerate() {
                let (to, rest) = levels.split_at_mut_checked(plan.row_bytes())?;
                plan.quantise(row, plan.of_row(&groups, number)?, to);
                levels = rest;
            }
        }
        Some(length)
    }

    fn decode(&self, frame: &Frame, stored: &[u8], raw: &mut [u8]) -> bool {
        self.plan(frame, raw.len()).and_then(|plan| plan.decode(stored, raw)).is_some()
    }
}

impl Quantised {
    /// `None` for what is kept as it is.
    fn plan(&self, frame: &Frame, raw_bytes: usize) -> Option<Plan> {
        let &[outer, inner, dim] = frame.shape.dims() else { return None };
        let (rows, columns, sections, by_column, bits) = match (frame.side?, frame.order?) {
            (Side::K, TokenOrder::TokenHeadDim) => (outer, inner.checked_mul(dim)?, 1, true, self.k_bits),
            (Side::K, TokenOrder::HeadTokenDim) => (inner, dim, outer, true, self.k_bits),
            (Side::V, _) => (outer.checked_mul(inner)?, dim, 1, false, self.v_bits),
        };
        let dtype = frame.dtype;
        let plan = Plan { dtype, bits, rows, columns, by_column, sections };
        let is_float = matches!(dtype, DType::BF16 | DType::F16 | DType::F32);
        let fits = frame.shape.size_bytes(dtype) == Some(raw_bytes) && raw_bytes > 0;
        (is_float && fits && columns % 2 == 0).then_some(plan)
    }
}

impl Plan {
    fn groups(&self) -> usize {
        self.sections * if self.by_column { self.columns } else { self.rows }
    }

    fn row_bytes(&self) -> usize {
        if self.bits == 8 { self.columns } else { self.columns / 2 }
    }

    fn stored_bytes(&self) -> usize {
        self.groups() * SCALE_BYTES + self.sections * self.rows * self.row_bytes()
    }

    fn most(&self) -> f32 {
        if self.bits == 8 { 255.0 } else { 15.0 }
    }

    fn values(&self, raw: &[u8]) -> Vec<f32> {
        let halves = raw.as_chunks().0.iter();
        match self.dtype {
            DType::BF16 => halves.map(|element| bf16::from_le_bytes(*element).to_f32()).collect(),
            DType::F16 => halves.map(|element| f16::from_le_bytes(*element).to_f32()).collect(),
            _ => raw.as_chunks().0.iter().map(|element| f32::from_le_bytes(*element)).collect(),
        }
    }

    /// One for each group of the section; `None` if a range is too large for a number.
    fn scales(&self, section: &[f32]) -> Option<Vec<Scale>> {
        let ends = |(least, most): (f32, f32), value: f32| (least.min(value), most.max(value));
        let none = (f32::INFINITY, f32::NEG_INFINITY);
        let rows = section.chunks_exact(self.columns);
        let ranges: Vec<(f32, f32)> = if self.by_column {
            let mut ranges = vec![none; self.columns];
            for row in rows {
                ranges.iter_mut().zip(row).for_each(|(range, value)| *range = ends(*range, *value));
            }
            ranges
        } else {
            rows.map(|row| row.iter().copied().fold(none, ends)).collect()
        };
        ranges.into_iter().map(|range| Scale::over(range, self.most())).collect()
    }

    /// The scales of a row's elements: of each column, or one for all of it.
    fn of_row<'a>(&self, groups: &'a [Scale], row: usize) -> Option<&'a [Scale]> {
        if self.by_column { Some(groups) } else { groups.get(row..row + 1) }
    }

    fn quantise(&self, row: &[f32], scales: &[Scale], to: &mut [u8]) {
        let mut scales = scales.iter().copied().cycle();
        let mut level = |value: &f32| scales.next().unwrap_or_default().level(*value, self.most());
        if self.bits == 8 {
            to.iter_mut().zip(row).for_each(|(to, value)| *to = level(value));
        } else {
            for (to, [low, high]) in to.iter_mut().zip(row.as_chunks::<2>().0) {
                *to = level(low) | level(high) << 4;
            }
        }
    }

    fn decode(&self, stored: &[u8], raw: &mut [u8]) -> Option<()> {
        if stored.len() != self.stored_bytes() {
            return None;
        }
        let (scales, mut levels) = stored.split_at_checked(self.groups() * SCALE_BYTES)?;
        let groups: Vec<Scale> =
            scales.as_chunks().0.iter().map(|bytes| Scale::from_bytes(*bytes)).collect::<Option<_>>()?;
        let row_bytes = self.columns * self.dtype.size_bytes();
        let mut values = vec![0.0; self.columns];
        for (number, row) in raw.chunks_exact_mut(row_bytes).enumerate() {
            let section = number / self.rows * (self.groups() / self.sections);
            let of_section = groups.get(section..)?.get(..self.groups() / self.sections)?;
            let of_row;
            (of_row, levels) = levels.split_at_checked(self.row_bytes())?;
            self.restore(of_row, self.of_row(of_section, number % self.rows)?, &mut values);
            self.write(&values, row);
        }
        Some(())
    }

    fn restore(&self, levels: &[u8], scales: &[Scale], values: &mut [f32]) {
        let both = |byte: &u8| [byte & 15, byte >> 4];
        match (self.bits, scales) {
            (8, [scale]) => values.iter_mut().zip(levels).for_each(|(to, level)| *to = scale.value(*level)),
            (8, scales) => {
                let each = values.iter_mut().zip(levels).zip(scales);
                each.for_each(|((to, level), scale)| *to = scale.value(*level));
            }
            (_, [scale]) => {
                let each = values.as_chunks_mut().0.iter_mut().zip(levels);
                each.for_each(|(to, byte)| *to = both(byte).map(|level| scale.value(level)));
            }
            (_, scales) => {
                let pairs = scales.as_chunks::<2>().0;
                for ((to, byte), [low, high]) in values.as_chunks_mut().0.iter_mut().zip(levels).zip(pairs) {
                    let [first, second] = both(byte);
                    *to = [low.value(first), high.value(second)];
                }
            }
        }
    }

    /// The elements, none of them beyond what their dtype has.
    fn write(&self, values: &[f32], row: &mut [u8]) {
        let within = |value: f32, most: f32| value.clamp(-most, most);
        match self.dtype {
            DType::BF16 => {
                for (to, value) in row.as_chunks_mut().0.iter_mut().zip(values) {
                    *to = rounded(within(*value, bf16::MAX.to_f32())).to_le_bytes();
                }
            }
            DType::F16 => {
                for (to, value) in row.as_chunks_mut().0.iter_mut().zip(values) {
                    *to = f16::from_f32(within(*value, f16::MAX.to_f32())).to_le_bytes();
                }
            }
            _ => {
                for (to, value) in row.as_chunks_mut().0.iter_mut().zip(values) {
                    *to = within(*value, f32::MAX).to_le_bytes();
                }
            }
        }
    }
}

/// A finite number as bfloat16, to the nearest, ties to even: without the branches that keep compilers from vectors.
fn rounded(value: f32) -> u16 {
    let bits = value.to_bits();
    let [.., low, high] = (bits + 0x7fff + (bits >> 16 & 1)).to_le_bytes();
    u16::from_le_bytes([low, high])
}

impl Scale {
    /// Levels from the least element to the most. `None` if they are too far apart for a number.
    fn over((least, most): (f32, f32), levels: f32) -> Option<Self> {
        // What is kept of them is bfloat16: the lowest level not above the least, the highest not below the most.
        let away = |value: f32| f32::from_bits((value.to_bits() | 0xffff).wrapping_add(1) & 0xffff_0000);
        let cut = |value: f32| f32::from_bits(value.to_bits() & 0xffff_0000);
        let zero = if cut(least) > least { away(least) } else { cut(least) };
        let step = (most - zero) / levels;
        let step = if cut(step) < step { away(step) } else { step };
        (zero.is_finite() && step.is_finite()).then_some(Self { zero, step })
    }

    fn level(self, value: f32, most: f32) -> u8 {
        if self.step == 0.0 {
            return 0;
        }
        // Casts of floats stay within the number.
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 0 to 255")]
        let level = ((value - self.zero) / self.step + 0.5).clamp(0.0, most) as u8;
        level
    }

    fn value(self, level: u8) -> f32 {
        self.zero + f32::from(level) * self.step
    }

    fn to_bytes(self) -> [u8; SCALE_BYTES] {
        let [[.., a, b], [.., c, d]] = [self.zero, self.step].map(f32::to_le_bytes);
        [a, b, c, d]
    }

    /// `None` for bytes that no scale has.
    fn from_bytes([a, b, c, d]: [u8; SCALE_BYTES]) -> Option<Self> {
        let scale = Self { zero: f32::from_le_bytes([0, 0, a, b]), step: f32::from_le_bytes([0, 0, c, d]) };
        (scale.zero.is_finite() && scale.step.is_finite() && scale.step >= 0.0).then_some(scale)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::layout::KvLayout;

    const CODECS: [Quantised; 3] = [INT8, INT4, K8V4];
    const TOKENS: u32 = 8;
    const COUNT: usize = 8 * 2 * 16;

    fn layout(dtype: DType, order: TokenOrder) -> KvLayout {
        let layout = KvLayout::new(1, 2, 16, dtype).unwrap().with_block_tokens(TOKENS).unwrap();
        layout.with_order(order)
    }

    fn bytes(values: &[f32], dtype: DType) -> Vec<u8> {
        let of = |value: &f32| match dtype {
            DType::BF16 => bf16::from_f32(*value).to_le_bytes().to_vec(),
            DType::F16 => f16::from_f32(*value).to_le_bytes().to_vec(),
            _ => value.to_le_bytes().to_vec(),
        };
        values.iter().flat_map(of).collect()
    }

    /// What comes back of a frame; `None` if it is kept as it is.
    fn back(codec: Quantised, frame: &Frame, raw: &[u8]) -> Option<Vec<u8>> {
        let (mut stored, mut again) = (vec![0xee; raw.len() - 1], vec![0xaa; raw.len()]);
        let length = codec.encode(frame, raw, &mut stored)?;
        assert!(codec.decode(frame, &stored[..length], &mut again), "{} reads itself", codec.name);
        assert!(!codec.decode(frame, &stored[..length - 1], &mut again.clone()), "nothing shorter");
        Some(again)
    }

    /// Which group an element of a frame is in: written here once more, from what the words of the file say.
    fn group(frame: &Frame, at: usize) -> usize {
        let &[_, inner, dim] = frame.shape.dims() else { panic!("three dimensions") };
        let (first, second, channel) = (at / dim / inner, at / dim % inner, at % dim);
        match (frame.side.unwrap(), frame.order.unwrap()) {
            (Side::K, TokenOrder::TokenHeadDim) => second * dim + channel,
            (Side::K, TokenOrder::HeadTokenDim) => first * dim + channel,
            (Side::V, _) => first * inner + second,
        }
    }

    /// Holds every element of both sides, dtypes and orders against the bound that the file states.
    fn check(values: &[f32]) {
        for (dtype, order) in [DType::BF16, DType::F16, DType::F32]
            .into_iter()
            .flat_map(|dtype| [(dtype, TokenOrder::TokenHeadDim), (dtype, TokenOrder::HeadTokenDim)])
        {
            for (codec, frame) in CODECS
                .into_iter()
                .flat_map(|codec| layout(dtype, order).frames().into_iter().map(move |frame| (codec, frame)))
            {
                check_frame(codec, &frame, &bytes(values, dtype));
            }
        }
    }

    fn check_frame(codec: Quantised, frame: &Frame, raw: &[u8]) {
        let plan = codec.plan(frame, raw.len()).unwrap();
        let values = plan.values(raw);
        let Some(again) = back(codec, frame, raw) else {
            let spread = values.iter().fold(0.0f64, |most, value| most.max(f64::from(value.abs())));
            assert!(!spread.is_finite() || spread > 1e37, "{}: {frame:?} is kept as it is", codec.name);
            return;
        };
        // Of the dtype's rounding: relative, and between numbers that are too small for that.
        let (half, tiny) = match frame.dtype {
            DType::BF16 => (1.0 / 256.0, 1e-37),
            DType::F16 => (1.0 / 2048.0, 6e-8),
            _ => (1e-6, 1e-37),
        };
        let mut ranges = vec![(f64::MAX, f64::MIN); values.len()];
        for (at, value) in values.iter().enumerate() {
            let (least, most) = &mut ranges[group(frame, at)];
            (*least, *most) = (least.min((*value).into()), most.max((*value).into()));
        }
        for (at, (value, came)) in values.iter().zip(plan.values(&again)).enumerate() {
            let (least, most) = ranges[group(frame, at)];
            let largest = least.abs().max(most.abs());
            let step = (most - least + largest / 100.0) * (1.0 + 1.0 / 128.0) / f64::from(plan.most());
            let bound = step * 0.51 + largest * half + tiny;
            let error = (f64::from(*value) - f64::from(came)).abs();
            assert!(error <= bound, "{} {frame:?} {at}: {value} came as {came}, bound {bound}", codec.name);
        }
    }

    #[test]
    fn elements_stay_within_the_stated_bound_whatever_they_are() {
        let count = COUNT;
        let mut outlier = vec![0.01; count];
        outlier[77] = -30_000.0;
        check(&outlier);
        check(&vec![0.0; count]);
        check(&vec![-3.3; count]);
        check(&vec![f32::MIN_POSITIVE / 4.0; count]);
        check(&(0..count).map(|at| at as f32 * f32::MIN_POSITIVE / 512.0).collect::<Vec<_>>());
        check(&(0..count).map(|at| 1000.0 + (at * 37 % 11) as f32).collect::<Vec<_>>());
        check(&(0..count).map(|at| if at % 2 == 0 { 65_504.0 } else { -65_504.0 }).collect::<Vec<_>>());
        check(&(0..count).map(|at| if at % 3 == 0 { f32::MAX } else { f32::MIN }).collect::<Vec<_>>());
    }

    /// What has no place on a scale must not become a number.
    #[test]
    fn frames_with_nan_or_infinity_and_those_of_other_kinds_are_kept_as_they_are() {
        let layout = layout(DType::F32, TokenOrder::TokenHeadDim);
        for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = vec![1.0; COUNT];
            values[9] = odd;
            for (codec, frame) in CODECS.iter().zip(layout.frames()) {
                assert_eq!(back(*codec, &frame, &bytes(&values, DType::F32)), None);
            }
        }
        let raw = vec![1; COUNT];
        for dtype in [DType::U8, DType::F8E4M3, DType::I8] {
            let frames = KvLayout::new(1, 2, 16, dtype).unwrap().with_block_tokens(TOKENS).unwrap().frames();
            assert!(frames.iter().all(|frame| back(INT8, frame, &raw).is_none()));
        }
        let opaque = KvLayout::opaque(256, 8).unwrap().frames();
        assert_eq!(back(INT8, &opaque[0], &raw), None);
    }

    #[test]
    fn they_are_as_small_as_they_say() {
        let values: Vec<f32> = (0..64 * 4 * 128).map(|at| (at * 37 % 101) as f32 / 7.0 - 5.0).collect();
        let layout = KvLayout::new(1, 4, 128, DType::BF16).unwrap().with_block_tokens(64).unwrap();
        let raw = bytes(&values, DType::BF16);
        let ratio = |codec: Quantised| {
            let mut into = vec![0; raw.len()];
            let stored =
                layout.frames().iter().map(|frame| codec.encode(frame, &raw, &mut into).unwrap()).sum::<usize>();
            2.0 * raw.len() as f64 / stored as f64
        };
        assert!(ratio(INT8) > 1.9 && ratio(INT4) > 3.5 && ratio(K8V4) > 2.4);
    }

    proptest! {
        #[test]
        fn any_elements_stay_within_the_stated_bound(
            values in prop::collection::vec(any::<f32>(), 1..9),
            mantissas in prop::collection::vec(-1.0f32..1.0, COUNT),
        ) {
            // Magnitudes of channels as far apart as floats have them.
            let each = mantissas.iter().zip(values.iter().cycle());
            check(&each.map(|(mantissa, value)| mantissa * value).collect::<Vec<_>>());
        }

        #[test]
        fn damaged_bytes_are_an_error_or_other_elements_and_never_a_panic(
            stored in prop::collection::vec(any::<u8>(), 0..400),
            length in 0usize..2,
        ) {
            for dtype in [DType::BF16, DType::F32] {
                for (codec, frame) in CODECS.iter().zip(layout(dtype, TokenOrder::HeadTokenDim).frames()) {
                    let plan = codec.plan(&frame, frame.range.len()).unwrap();
                    let mut stored = stored.clone();
                    stored.resize(plan.stored_bytes() + length, 0x7f);
                    let mut raw = vec![0; frame.range.len()];
                    let decoded = codec.decode(&frame, &stored, &mut raw);
                    prop_assert!(!decoded || length == 0);
                }
            }
        }
    }
}
