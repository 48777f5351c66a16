//! Codes and scales: the numbers that a group's elements can be.
//!
//! How far an element is from what it becomes, at most:
//! - [`Int8`], [`Int4`]: half a level. Levels are even, from the group's least to its most; so a level is the range in 255
//!   or 15 parts, and up to a 64th of that and of its largest magnitude more, because scales are kept as bfloat16.
//! - [`F8`]: a 16th of the element (float8 e4m3: Micikevicius and others, 2022, arXiv 2209.05433), or 1/400,000 of the
//!   group's largest magnitude.
//! - [`Normal4`]: 0.152 of the group's largest magnitude, as it is kept: in 8 bits, up to a 255th of the range of the
//!   magnitudes of up to 256 groups more. The levels are those of `QLoRA` (Dettmers and others, 2023, arXiv 2305.14314), where
//!   a normal distribution has equal parts; "double quantisation" is theirs too, here with a least value in place of a mean.

/// Numbers of `BITS` bits.
pub(super) trait Grid {
    const BITS: usize;
    /// Bytes of the scales of so many groups.
    fn scale_bytes(groups: usize) -> usize;
    /// Writes the scales of groups with this least and most, and gives them as they will be read. `None` if a range is too
    /// large for a number.
    fn fit(ranges: &[(f32, f32)], into: &mut [u8]) -> Option<Scales>;
    /// Reads what `fit` has written. `None` for bytes that no scale has.
    fn read(stored: &[u8], scales: &mut Scales) -> Option<()>;
    /// Of an element.
    fn code(value: f32, scale: Scale) -> u8;
    fn value(code: u8, scale: Scale) -> f32;

    /// Bytes of the codes of so many elements, an even number.
    fn row_bytes(columns: usize) -> usize {
        columns * Self::BITS / 8
    }
}

/// Whole numbers from 0 to 255.
pub(super) struct Int8;
/// Whole numbers from 0 to 15.
pub(super) struct Int4;
/// Floats of 8 bits.
pub(super) struct F8;
/// 16 levels, close to each other near zero.
pub(super) struct Normal4;

/// Where a group's numbers begin, and how far apart or how large they are.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Scale {
    zero: f32,
    step: f32,
}

/// One for each group.
#[derive(Debug, Default)]
pub(super) struct Scales {
    zeros: Vec<f32>,
    steps: Vec<f32>,
}

/// Those of a row: of each column, or one for all.
#[derive(Debug, Clone, Copy)]
pub(super) enum Row<'a> {
    One(Scale),
    Each(&'a [f32], &'a [f32]),
}

impl Scales {
    fn begin(&mut self) {
        self.zeros.clear();
        self.steps.clear();
    }

    fn push(&mut self, scale: Scale) {
        self.zeros.push(scale.zero);
        self.steps.push(scale.step);
    }

    #[inline(always)]
    pub(super) fn row(&self, by_column: bool, number: usize) -> Option<Row<'_>> {
        if by_column {
            return Some(Row::Each(&self.zeros, &self.steps));
        }
        Some(Row::One(Scale { zero: *self.zeros.get(number)?, step: *self.steps.get(number)? }))
    }
}

impl Row<'_> {
    #[inline(always)]
    pub(super) fn split(self, at: usize) -> (Self, Self) {
        match self {
            Self::One(_) => (self, self),
            Self::Each(zeros, steps) => {
                let at = at.min(zeros.len()).min(steps.len());
                let ((low_zeros, zeros), (low_steps, steps)) = (zeros.split_at(at), steps.split_at(at));
                (Self::Each(low_zeros, low_steps), Self::Each(zeros, steps))
            }
        }
    }

    #[inline(always)]
    pub(super) fn each<A, B>(self, from: &[A], to: &mut [B], work: impl Fn(&A, &mut B, Scale)) {
        match self {
            Self::One(scale) => from.iter().zip(to).for_each(|(from, to)| work(from, to, scale)),
            Self::Each(zeros, steps) => {
                let scales = zeros.iter().zip(steps);
                let all = from.iter().zip(to).zip(scales);
                all.for_each(|((from, to), (zero, step))| work(from, to, Scale { zero: *zero, step: *step }));
            }
        }
    }
}

/// The bfloat16 that is no further from zero.
fn cut(value: f32) -> f32 {
    f32::from_bits(value.to_bits() & 0xffff_0000)
}

/// The bfloat16 that is no nearer to zero.
fn away(value: f32) -> f32 {
    if cut(value) == value { value } else { f32::from_bits((value.to_bits() | 0xffff).wrapping_add(1)) }
}

fn to_bytes(value: f32) -> [u8; 2] {
    let [.., low, high] = value.to_le_bytes();
    [low, high]
}

fn from_bytes([low, high]: [u8; 2]) -> f32 {
    f32::from_le_bytes([0, 0, low, high])
}

fn largest((least, most): (f32, f32)) -> f32 {
    least.abs().max(most.abs())
}

/// Levels: the lowest one not above the least, the highest not below the most.
fn levels(ranges: &[(f32, f32)], most_code: f32, into: &mut [u8]) -> Option<Scales> {
    let mut scales = Scales::default();
    for ((least, most), to) in ranges.iter().zip(into.as_chunks_mut().0) {
        let zero = if cut(*least) > *least { away(*least) } else { cut(*least) };
        let step = away((most - zero) / most_code);
        if !zero.is_finite() || !(most_code * step).is_finite() {
            return None;
        }
        let ([a, b], [c, d]) = (to_bytes(zero), to_bytes(step));
        *to = [a, b, c, d];
        scales.push(Scale { zero, step });
    }
    Some(scales)
}

fn read_levels(stored: &[u8], scales: &mut Scales) -> Option<()> {
    scales.begin();
    for [a, b, c, d] in stored.as_chunks().0 {
        scales.push(Scale { zero: from_bytes([*a, *b]), step: from_bytes([*c, *d]) });
    }
    is_right(scales)
}

fn is_right(scales: &Scales) -> Option<()> {
    let all = scales.zeros.iter().zip(&scales.steps);
    all.fold(true, |right, (zero, step)| right & zero.is_finite() & step.is_finite() & (*step >= 0.0)).then_some(())
}

#[inline(always)]
fn level(value: f32, scale: Scale, most: f32) -> u8 {
    // Of equal elements, whose levels are no distance apart: all are at zero.
    let step = if scale.step == 0.0 { 1.0 } else { scale.step };
    // Casts of floats stay within the number.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 0 to 255")]
    let level = ((value - scale.zero) / step + 0.5).clamp(0.0, most) as u8;
    level
}

macro_rules! levels_of {
    ($grid:ident, $bits:literal, $most:literal) => {
        impl Grid for $grid {
            const BITS: usize = $bits;

            fn scale_bytes(groups: usize) -> usize {
                4 * groups
            }

            fn fit(ranges: &[(f32, f32)], into: &mut [u8]) -> Option<Scales> {
                levels(ranges, $most, into)
            }

            fn read(stored: &[u8], scales: &mut Scales) -> Option<()> {
                read_levels(stored, scales)
            }

            #[inline(always)]
            fn code(value: f32, scale: Scale) -> u8 {
                level(value, scale, $most)
            }

            #[inline(always)]
            fn value(code: u8, scale: Scale) -> f32 {
                scale.zero + f32::from(code) * scale.step
            }
        }
    };
}

levels_of!(Int8, 8, 255.0);
levels_of!(Int4, 4, 15.0);

impl F8 {
    /// The largest number of e4m3.
    const MOST: f32 = 448.0;
    const LEAST_NORMAL: f32 = 1.0 / 64.0;
    /// Of a float of 32 bits, exponents are 120 more, and the mantissa has 20 bits more.
    const MORE: u32 = 120;
}

impl Grid for F8 {
    const BITS: usize = 8;

    fn scale_bytes(groups: usize) -> usize {
        2 * groups
    }

    fn fit(ranges: &[(f32, f32)], into: &mut [u8]) -> Option<Scales> {
        let mut scales = Scales::default();
        for (range, to) in ranges.iter().zip(into.as_chunks_mut().0) {
            let step = away(largest(*range) / Self::MOST);
            *to = to_bytes(step);
            scales.push(Scale { zero: 0.0, step });
        }
        Some(scales)
    }

    fn read(stored: &[u8], scales: &mut Scales) -> Option<()> {
        scales.begin();
        stored.as_chunks().0.iter().for_each(|bytes| scales.push(Scale { zero: 0.0, step: from_bytes(*bytes) }));
        is_right(scales)
    }

    #[inline(always)]
    fn code(value: f32, scale: Scale) -> u8 {
        let step = if scale.step == 0.0 { f32::INFINITY } else { scale.step };
        let bits = (value / step).clamp(-Self::MOST, Self::MOST).to_bits();
        let (sign, size) = (bits >> 24 & 0x80, bits & 0x7fff_ffff);
        let normal = ((size + 0x7_ffff + (size >> 20 & 1)) >> 20).wrapping_sub(Self::MORE << 3);
        // Next to 16,384, floats of 32 bits are as far apart as the smallest ones of 8 are.
        let small = (f32::from_bits(size) + 16_384.0).to_bits() & 0x7f;
        let [code, ..] = (sign | if f32::from_bits(size) < Self::LEAST_NORMAL { small } else { normal }).to_le_bytes();
        code
    }

    #[inline(always)]
    fn value(code: u8, scale: Scale) -> f32 {
        let code = u32::from(code);
        let size = f32::from_bits((code & 0x7f) << 20) * f32::from_bits((127 + Self::MORE) << 23);
        f32::from_bits(size.to_bits() | (code & 0x80) << 24) * scale.step
    }
}

impl Normal4 {
    const LEVELS: [f32; 16] = [
        -1.0,
        -0.696_192_8,
        -0.525_073_05,
        -0.394_917_5,
        -0.284_441_38,
        -0.184_773_43,
        -0.091_050_036,
        0.0,
        0.079_580_3,
        0.160_930_2,
        0.246_112_3,
        0.337_915_24,
        0.440_709_83,
        0.562_617,
        0.722_956_84,
        1.0,
    ];
    /// Groups whose magnitudes have a scale together.
    const TOGETHER: usize = 256;

    /// Where one number ends and the next one begins.
    const fn ends() -> [f32; 15] {
        let mut ends = [0.0; 15];
        let mut at = 0;
        #[expect(clippy::indexing_slicing, reason = "computed by the compiler")]
        while at < 15 {
            ends[at] = (Self::LEVELS[at] + Self::LEVELS[at + 1]) / 2.0;
            at += 1;
        }
        ends
    }
}

impl Grid for Normal4 {
    const BITS: usize = 4;

    fn scale_bytes(groups: usize) -> usize {
        groups + 4 * groups.div_ceil(Self::TOGETHER)
    }

    fn fit(ranges: &[(f32, f32)], mut into: &mut [u8]) -> Option<Scales> {
        let mut scales = Scales::default();
        for ranges in ranges.chunks(Self::TOGETHER) {
            let magnitudes = ranges.iter().copied().map(largest);
            let least = cut(magnitudes.clone().fold(f32::INFINITY, f32::min));
            let step = away((magnitudes.clone().fold(0.0, f32::max) - least) / 255.0);
            let head;
            (head, into) = into.split_first_chunk_mut::<4>()?;
            let ([a, b], [c, d]) = (to_bytes(least), to_bytes(step));
            *head = [a, b, c, d];
            let codes;
            (codes, into) = into.split_at_mut_checked(ranges.len())?;
            for (magnitude, code) in magnitudes.zip(codes) {
                // Up: no element is beyond the last number.
                let up = level(magnitude, Scale { zero: least, step }, 255.0);
                let reaches = least + f32::from(up) * step >= magnitude;
                *code = if reaches { up } else { up.saturating_add(1) };
                scales.push(Scale { zero: 0.0, step: least + f32::from(*code) * step });
            }
        }
        scales.steps.iter().all(|step| step.is_finite()).then_some(scales)
    }

    fn read(mut stored: &[u8], scales: &mut Scales) -> Option<()> {
        scales.begin();
        while let Some(([a, b, c, d], rest)) = stored.split_first_chunk() {
            let (least, step) = (from_bytes([*a, *b]), from_bytes([*c, *d]));
            let codes;
            (codes, stored) = rest.split_at_checked(rest.len().min(Self::TOGETHER))?;
            codes.iter().for_each(|code| scales.push(Scale { zero: 0.0, step: least + f32::from(*code) * step }));
        }
        is_right(scales)
    }

    #[inline(always)]
    fn code(value: f32, scale: Scale) -> u8 {
        const ENDS: [f32; 15] = Normal4::ends();
        let value = value / if scale.step == 0.0 { 1.0 } else { scale.step };
        ENDS.iter().map(|end| u8::from(value > *end)).sum()
    }

    #[inline(always)]
    fn value(code: u8, scale: Scale) -> f32 {
        Self::LEVELS.get(usize::from(code & 15)).copied().unwrap_or(0.0) * scale.step
    }
}
