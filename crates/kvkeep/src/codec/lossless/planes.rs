//! Elements and their byte planes: all lowest bytes together, all second ones, and so on.
//!
//! A float is turned left by a bit first. Then its exponent is a byte of its own (of a half, with three bits of the
//! mantissa), and the sign is with the mantissa: noise with noise. Planes of the bytes as they are were the
//! alternative: bfloat16 has its exponent in two of them.

/// How elements are cut into planes. On disk: the logarithm of an element's bytes (2 bits), 4 for a float.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Form {
    log_bytes: u8,
    is_float: bool,
}

impl Form {
    pub(super) const MOST_PLANES: usize = 8;
    /// Elements of one byte.
    pub(super) const BYTES: Self = Self { log_bytes: 0, is_float: false };

    const FLOAT: u8 = 4;
    /// What bytes may be of which nobody said what they are, the likeliest first.
    const LIKELY: [Self; 3] = [Self::BYTES, Self::float(2), Self::float(4)];

    /// Of floats of 2, 4 or 8 bytes.
    pub(super) const fn float(bytes: usize) -> Self {
        let log_bytes = match bytes {
            2 => 1,
            4 => 2,
            _ => 3,
        };
        Self { log_bytes, is_float: true }
    }

    /// In which of those that are likely a sample of these bytes is the least.
    pub(super) fn guess(raw: &[u8]) -> Self {
        const PIECES: usize = 16;
        const PIECE_BYTES: usize = 256;
        let step = (raw.len() / PIECES).max(PIECE_BYTES).next_multiple_of(PIECE_BYTES);
        let pieces = raw.chunks(step).filter_map(|piece| piece.get(..PIECE_BYTES));
        let sample: Vec<u8> = pieces.take(PIECES).flatten().copied().collect();
        let bits = |form: &Self| {
            let mut planes = vec![0; sample.len()];
            form.split(&sample, &mut planes);
            let elements = (sample.len() / form.planes()).max(1);
            planes.chunks_exact(elements).map(super::bits).sum::<f32>()
        };
        let [first, others @ ..] = Self::LIKELY;
        let best = others.iter().fold((first, bits(&first)), |best, form| {
            let bits = bits(form);
            // Two halves are a single of another kind, and just as good but for what a sample misses.
            if bits < 0.98 * best.1 { (*form, bits) } else { best }
        });
        best.0
    }

    pub(super) fn code(self) -> u8 {
        self.log_bytes | if self.is_float { Self::FLOAT } else { 0 }
    }

    pub(super) fn from_code(code: u8) -> Option<Self> {
        let form = Self { log_bytes: code & 3, is_float: code & Self::FLOAT != 0 };
        (form.code() == code && (form.log_bytes > 0 || !form.is_float)).then_some(form)
    }

    /// Bytes of an element, each of a plane.
    pub(super) fn planes(self) -> usize {
        1 << self.log_bytes
    }

    /// Cuts whole elements into as many bytes: plane behind plane.
    #[inline(always)]
    pub(super) fn split(self, raw: &[u8], planes: &mut [u8]) {
        let turn = u32::from(self.is_float);
        match self.log_bytes {
            0 => planes.copy_from_slice(raw),
            1 => split_halves(raw, turn, planes),
            2 => split_singles(raw, turn, planes),
            _ => split_doubles(raw, turn, planes),
        }
    }

    /// The elements again, of one plane for each of their bytes.
    #[inline(always)]
    pub(super) fn merge(self, planes: &[&[u8]], raw: &mut [u8]) {
        let turn = u32::from(self.is_float);
        match (planes, self.log_bytes) {
            ([bytes], 0) => raw.copy_from_slice(bytes),
            ([low, high], 1) => merge_halves(low, high, turn, raw),
            (_, 2) => merge_singles(planes, turn, raw),
            _ => merge_doubles(planes, turn, raw),
        }
    }
}

/// Each plane has a pass of its own, so that compilers make vectors of it.
macro_rules! split {
    ($name:ident, $number:ty) => {
        #[inline(always)]
        fn $name(raw: &[u8], turn: u32, planes: &mut [u8]) {
            let (elements, _) = raw.as_chunks();
            for (plane, byte) in planes.chunks_exact_mut(elements.len().max(1)).zip((0..).step_by(8)) {
                for (to, element) in plane.iter_mut().zip(elements) {
                    let turned = <$number>::from_le_bytes(*element).rotate_left(turn);
                    *to = (turned >> byte).to_le_bytes()[0];
                }
            }
        }
    };
}

/// As well.
macro_rules! merge {
    ($name:ident, $number:ty) => {
        #[inline(always)]
        fn $name(planes: &[&[u8]], turn: u32, raw: &mut [u8]) {
            let (elements, _) = raw.as_chunks_mut();
            for ((plane, number), byte) in planes.iter().zip(1..).zip((0..).step_by(8)) {
                let turn = if number == size_of::<$number>() { turn } else { 0 };
                for (element, part) in elements.iter_mut().zip(*plane) {
                    let before = if number == 1 { 0 } else { <$number>::from_le_bytes(*element) };
                    *element = (before | <$number>::from(*part) << byte).rotate_right(turn).to_le_bytes();
                }
            }
        }
    };
}

split!(split_halves, u16);
split!(split_singles, u32);
split!(split_doubles, u64);
merge!(merge_singles, u32);
merge!(merge_doubles, u64);

/// What nearly all KV is: both planes in one pass, in half the time.
#[inline(always)]
fn merge_halves(low: &[u8], high: &[u8], turn: u32, raw: &mut [u8]) {
    for ((element, low), high) in raw.as_chunks_mut().0.iter_mut().zip(low).zip(high) {
        *element = u16::from_le_bytes([*low, *high]).rotate_right(turn).to_le_bytes();
    }
}
