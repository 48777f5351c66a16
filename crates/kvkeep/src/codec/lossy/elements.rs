//! Elements as numbers, and back: without the branches that keep compilers from vectors.

use half::f16;

use crate::tensor::DType;

/// Floats of 16 or 32 bits. An infinity or a NaN stays one.
pub(super) fn read(dtype: DType, raw: &[u8]) -> Vec<f32> {
    let halves = raw.as_chunks().0.iter().map(|element| u16::from_le_bytes(*element));
    match dtype {
        DType::BF16 => halves.map(|half| f32::from_bits(u32::from(half) << 16)).collect(),
        DType::F16 => halves.map(|half| f16::from_bits(half).to_f32()).collect(),
        _ => raw.as_chunks().0.iter().map(|element| f32::from_le_bytes(*element)).collect(),
    }
}

/// The nearest of the dtype, none of them beyond what it has.
#[inline(always)]
pub(super) fn write(dtype: DType, values: &[f32], row: &mut [u8]) {
    match dtype {
        DType::BF16 => {
            for (to, value) in row.as_chunks_mut().0.iter_mut().zip(values) {
                *to = to_bf16(*value).to_le_bytes();
            }
        }
        DType::F16 => {
            for (to, value) in row.as_chunks_mut().0.iter_mut().zip(values) {
                *to = to_f16(*value).to_le_bytes();
            }
        }
        _ => {
            for (to, value) in row.as_chunks_mut().0.iter_mut().zip(values) {
                *to = value.clamp(f32::MIN, f32::MAX).to_le_bytes();
            }
        }
    }
}

/// To the nearest, ties to even.
#[inline(always)]
fn to_bf16(value: f32) -> u16 {
    const MOST: f32 = f32::from_bits(0x7f7f_0000);
    let bits = value.clamp(-MOST, MOST).to_bits();
    let [.., low, high] = (bits + 0x7fff + (bits >> 16 & 1)).to_le_bytes();
    u16::from_le_bytes([low, high])
}

/// To the nearest, ties to even.
#[inline(always)]
fn to_f16(value: f32) -> u16 {
    const MOST: f32 = 65_504.0;
    const LEAST_NORMAL: f32 = 1.0 / 16_384.0;
    let bits = value.clamp(-MOST, MOST).to_bits();
    let (sign, size) = (bits >> 16 & 0x8000, bits & 0x7fff_ffff);
    let normal = ((size + 0xfff + (size >> 13 & 1)) >> 13).wrapping_sub(112 << 10);
    // Next to a half, floats of 32 bits are as far apart as the smallest ones of 16 are.
    let small = (f32::from_bits(size) + 0.5).to_bits() - 0.5f32.to_bits();
    let [low, high, ..] = (sign | if f32::from_bits(size) < LEAST_NORMAL { small } else { normal }).to_le_bytes();
    u16::from_le_bytes([low, high])
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn numbers_become_the_nearest_of_their_dtype() {
        for pattern in (0..=u32::MAX).step_by(9973) {
            let value = f32::from_bits(pattern);
            if value.is_finite() {
                let within = value.clamp(-65_504.0, 65_504.0);
                assert_eq!(to_f16(value), f16::from_f32(within).to_bits(), "{value:e}");
                let most = bf16::MAX.to_f32();
                assert_eq!(to_bf16(value), bf16::from_f32(value.clamp(-most, most)).to_bits(), "{value:e}");
            }
        }
        for half in (0..=u16::MAX).map(f16::from_bits).filter(|half| half.is_finite()) {
            assert_eq!(to_f16(half.to_f32()), half.to_bits());
        }
    }
}
