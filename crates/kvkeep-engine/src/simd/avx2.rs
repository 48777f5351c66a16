//! AVX2, FMA and F16C kernels. Products read `f16` weights straight into registers:
//! the conversion runs beside the multiply-adds, on ports that they do not use, so a
//! separate pass that widens a panel first only adds traffic.
//!
//! Each function here may be called only where the CPU has AVX2, FMA and F16C.

#![expect(unsafe_code, reason = "the one SIMD leaf; each use states what makes it sound")]
#![expect(clippy::needless_range_loop, reason = "rows and panels index pointers and accumulators alike")]

use std::arch::x86_64::*;

use half::f16;

use super::{Into, LANES, Product, SoftmaxTile, Transpose, Weight, body, scalar};

macro_rules! compiled_with_avx2 {
    ($($name:ident($($arg:ident: $type:ty),*);)+) => {
        $(#[target_feature(enable = "avx2,fma,f16c")]
        pub(super) fn $name($($arg: $type),*) {
            body::$name($($arg),*);
        })+
    };
}

compiled_with_avx2! {
    rms_inverse(x: &[f32], columns: usize, eps: f32, out: &mut [f32]);
    normalize(x: &[f32], inverse: &[f32], weight: &[f32], out: &mut [f32]);
    swiglu(pairs: &[f32], panel: usize, out: &mut [f32]);
    rope(x: &mut [f32], cos: &[f32], sin: &[f32], scale: f32);
    softmax(tile: &mut SoftmaxTile<'_>);
    divide(panel: &mut [f32], sums: &[f32]);
}

/// Where one call of [`micro`] works: pointers to its first row and panel.
struct Spot<W> {
    a: *const f32,
    a_stride: usize,
    w: *const W,
    w_stride: usize,
    w_step: usize,
    k: usize,
    out: *mut f32,
    out_stride: usize,
    into: Into,
}

/// The caller has checked the bounds: `Product::assert_bounds`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn product<W: Weight>(product: &Product<'_, W>, out: &mut [f32], into: Into) {
    let rows = product.rows;
    // Few rows: several panels at once, or the chain of one accumulator sets the pace. Not more than it takes:
    // two rows by three panels, and three by two, took twice as long as four rows by one.
    let wide = match rows {
        0 => return,
        1 => 4,
        2 => 2,
        _ => 1,
    };
    let row_tiles = rows.div_ceil(6);
    let mut row = 0;
    for tile in 0..row_tiles {
        let tile_rows = (rows - row).div_ceil(row_tiles - tile);
        let mut panel = 0;
        while panel < product.panels {
            let panels = wide.min(product.panels - panel);
            // SAFETY: row < rows and panel < panels; `assert_bounds` has checked that all
            // of these rows, panels and k lie inside the three slices.
            let spot = unsafe {
                Spot {
                    a: product.a.as_ptr().add(row * LANES),
                    a_stride: product.a_stride,
                    w: product.w.as_ptr().add(panel * product.w_stride),
                    w_stride: product.w_stride,
                    w_step: product.w_step,
                    k: product.k,
                    out: out.as_mut_ptr().add(panel * product.out_stride + row * LANES),
                    out_stride: product.out_stride,
                    into,
                }
            };
            // SAFETY: tile_rows rows from `row` and `panels` panels from `panel` are in bounds, as above.
            unsafe { dispatch(&spot, tile_rows, panels) };
            panel += panels;
        }
        row += tile_rows;
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dispatch<W: Weight>(spot: &Spot<W>, rows: usize, panels: usize) {
    // SAFETY: passed on from the caller: `rows` rows and `panels` panels are in bounds.
    unsafe {
        match (rows, panels) {
            (1, 1) => micro::<1, 1, W>(spot),
            (1, 2) => micro::<1, 2, W>(spot),
            (1, 3) => micro::<1, 3, W>(spot),
            (1, _) => micro::<1, 4, W>(spot),
            (2, 1) => micro::<2, 1, W>(spot),
            (2, _) => micro::<2, 2, W>(spot),
            (3, _) => micro::<3, 1, W>(spot),
            (4, _) => micro::<4, 1, W>(spot),
            (5, _) => micro::<5, 1, W>(spot),
            _ => micro::<6, 1, W>(spot),
        }
    }
}

/// `R` rows by `P` panels, all accumulators in registers (at most 12 of the 16).
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn micro<const R: usize, const P: usize, W: Weight>(spot: &Spot<W>) {
    let mut acc = [[[_mm256_setzero_ps(); 2]; P]; R];
    // SAFETY: the caller vouches that `R` rows and `P` panels from the spot's pointers on
    // are inside the slices they came from, for all `k`; unaligned loads and stores only.
    unsafe {
        if spot.into == Into::Chain {
            for r in 0..R {
                for p in 0..P {
                    let out = spot.out.add(p * spot.out_stride + r * LANES);
                    acc[r][p] = [_mm256_loadu_ps(out), _mm256_loadu_ps(out.add(8))];
                }
            }
        }
        let mut w = spot.w;
        for panel in 0..spot.k.div_ceil(LANES) {
            let a = spot.a.add(panel * spot.a_stride);
            for k in 0..LANES.min(spot.k - panel * LANES) {
                step::<R, P, W>(a.add(k), w, spot.w_stride, &mut acc);
                // May end behind the last element, where it is not read.
                w = w.wrapping_add(spot.w_step);
            }
        }
        for r in 0..R {
            for p in 0..P {
                let out = spot.out.add(p * spot.out_stride + r * LANES);
                let [mut low, mut high] = acc[r][p];
                if spot.into == Into::Add {
                    low = _mm256_add_ps(_mm256_loadu_ps(out), low);
                    high = _mm256_add_ps(_mm256_loadu_ps(out.add(8)), high);
                }
                _mm256_storeu_ps(out, low);
                _mm256_storeu_ps(out.add(8), high);
            }
        }
    }
}

/// One `k`: `acc += a[row][k] * w[panel][k]`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn step<const R: usize, const P: usize, W: Weight>(
    a: *const f32,
    w: *const W,
    w_stride: usize,
    acc: &mut [[[__m256; 2]; P]; R],
) {
    // SAFETY: the caller vouches for `a` (R rows, 16 apart) and `w` (P panels of 16).
    unsafe {
        for p in 0..P {
            let w = w.add(p * w_stride);
            let (low, high) = if W::HALF {
                let w = w.cast::<__m128i>();
                (_mm256_cvtph_ps(_mm_loadu_si128(w)), _mm256_cvtph_ps(_mm_loadu_si128(w.add(1))))
            } else {
                let w = w.cast::<f32>();
                (_mm256_loadu_ps(w), _mm256_loadu_ps(w.add(8)))
            };
            for r in 0..R {
                let a = _mm256_set1_ps(*a.add(r * LANES));
                acc[r][p][0] = _mm256_fmadd_ps(a, low, acc[r][p][0]);
                acc[r][p][1] = _mm256_fmadd_ps(a, high, acc[r][p][1]);
            }
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn narrow(from: &[f32], to: &mut [f16]) {
    let mut to_chunks = to.chunks_exact_mut(8);
    for (from, to) in from.chunks_exact(8).zip(&mut to_chunks) {
        // SAFETY: both chunks have exactly 8 elements, 32 and 16 bytes.
        unsafe {
            let half = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm256_loadu_ps(from.as_ptr()));
            _mm_storeu_si128(to.as_mut_ptr().cast(), half);
        }
    }
    for (from, to) in from.chunks_exact(8).remainder().iter().zip(to_chunks.into_remainder()) {
        *to = f16::from_f32(*from);
    }
}

/// Blocks of 8 by 8 in registers; what is left at the edges one by one. The caller has
/// checked the bounds: `Transpose::assert_bounds`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn transpose(from: &[f16], to: &mut [f16], shape: &Transpose) {
    let Transpose { rows, columns, from_stride, to_stride } = *shape;
    if rows == 0 || columns == 0 {
        return;
    }
    let (whole_rows, whole_columns) = (rows / 8 * 8, columns / 8 * 8);
    for row in (0..whole_rows).step_by(8) {
        for column in (0..whole_columns).step_by(8) {
            // SAFETY: 8 rows from `row` and 8 columns from `column` on are inside the shape, which
            // `assert_bounds` has checked against both slices.
            unsafe {
                let from = from.as_ptr().add(row * from_stride + column);
                let to = to.as_mut_ptr().add(column * to_stride + row);
                transpose_8x8(from, from_stride, to, to_stride);
            }
        }
    }
    if whole_columns < columns && whole_rows > 0 {
        let edge = Transpose { rows: whole_rows, columns: columns - whole_columns, ..*shape };
        scalar::transpose(&from[whole_columns..], &mut to[whole_columns * to_stride..], &edge);
    }
    if whole_rows < rows {
        let edge = Transpose { rows: rows - whole_rows, ..*shape };
        scalar::transpose(&from[whole_rows * from_stride..], &mut to[whole_rows..], &edge);
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn transpose_8x8(from: *const f16, from_stride: usize, to: *mut f16, to_stride: usize) {
    // SAFETY: the caller vouches for 8 rows of 8 values at both pointers; unaligned loads and stores.
    unsafe {
        let row = |i: usize| _mm_loadu_si128(from.add(i * from_stride).cast());
        let pair = |i: usize| (_mm_unpacklo_epi16(row(i), row(i + 1)), _mm_unpackhi_epi16(row(i), row(i + 1)));
        let ((a, b), (c, d), (e, f), (g, h)) = (pair(0), pair(2), pair(4), pair(6));
        let fours = |x, y| (_mm_unpacklo_epi32(x, y), _mm_unpackhi_epi32(x, y));
        let ((p, q), (r, s)) = (fours(a, c), fours(b, d));
        let ((t, u), (v, w)) = (fours(e, g), fours(f, h));
        for (i, (low, high)) in [(p, t), (q, u), (r, v), (s, w)].into_iter().enumerate() {
            _mm_storeu_si128(to.add(2 * i * to_stride).cast(), _mm_unpacklo_epi64(low, high));
            _mm_storeu_si128(to.add((2 * i + 1) * to_stride).cast(), _mm_unpackhi_epi64(low, high));
        }
    }
}
