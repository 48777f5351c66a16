//! The arithmetic: a few kernels, each with one fixed order of operations.
//!
//! Invariant: every output element is computed by the same chain of IEEE operations
//! whatever the number of rows in the batch, the split over threads, and the
//! instruction set. So KV is the same to the last bit however a prompt was cut up,
//! and a prefix computed in one request can be reused in any other. The alternative
//! was to compute on a fixed grid of batch shapes: it keeps bits equal only on that
//! grid, and not between prefill and decode.
//!
//! Activations lie in panels, `[columns / 16][rows][16]`: a kernel's outputs are whole
//! panels, so threads split the work without sharing memory, and one row is plain
//! row-major. All `unsafe` of the crate is in this module.

#![expect(clippy::indexing_slicing, reason = "kernels: bounds are asserted once, before the loops")]
#![cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "calls AVX2 kernels where the CPU has them"))]

#[cfg(target_arch = "x86_64")]
mod avx2;
mod body;
mod scalar;

use half::f16;

/// Columns of a panel: two AVX registers of `f32`.
pub(crate) const LANES: usize = 16;
/// Keys of an attention tile; tiles begin at multiples of it.
pub(crate) const TILE_KEYS: usize = 64;

/// Proof that the kernels it picks can run on this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kernels {
    avx2: bool,
}

/// A matrix product `out[row][n] = sum over k of a[row][k] * w[n][k]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Product<'a, W> {
    /// Left side in panels: `(row, k)` is at `k / 16 * a_stride + row * 16 + k % 16`.
    pub(crate) a: &'a [f32],
    /// Floats from one panel of `a` to the next.
    pub(crate) a_stride: usize,
    /// Right side: `(n, k)` is at `n / 16 * w_stride + k * w_step + n % 16`.
    pub(crate) w: &'a [W],
    /// Elements from 16 outputs of `w` to the next 16.
    pub(crate) w_stride: usize,
    /// Elements from one `k` to the next; 16 in panels.
    pub(crate) w_step: usize,
    /// Length of each sum.
    pub(crate) k: usize,
    /// Rows to compute.
    pub(crate) rows: usize,
    /// Panels of 16 outputs to compute.
    pub(crate) panels: usize,
    /// Floats from one panel of the output to the next.
    pub(crate) out_stride: usize,
}

/// What happens to the value that is in the output already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Into {
    /// It is overwritten: the chain starts at 0.
    Set,
    /// The chain starts at 0, its result is added to it.
    Add,
    /// The chain starts at it.
    Chain,
}

/// Element types of a product's right side.
pub(crate) trait Weight: Copy + Send + Sync + sealed::Sealed {
    /// Are these 16-bit floats (else `f32`)?
    const HALF: bool;
    /// The value as `f32`; exact.
    fn wide(self) -> f32;
}

mod sealed {
    pub(crate) trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
}

impl Weight for f32 {
    const HALF: bool = false;
    fn wide(self) -> f32 {
        self
    }
}

impl Weight for f16 {
    const HALF: bool = true;
    fn wide(self) -> f32 {
        self.to_f32()
    }
}

impl<W> Product<'_, W> {
    /// The kernels run on raw pointers: this is what makes that sound.
    fn assert_bounds(&self, out: &[f32]) {
        if self.rows == 0 || self.panels == 0 {
            return;
        }
        assert!(self.k > 0 && (self.k.div_ceil(LANES) - 1) * self.a_stride + self.rows * LANES <= self.a.len());
        assert!((self.panels - 1) * self.w_stride + (self.k - 1) * self.w_step + LANES <= self.w.len());
        assert!((self.panels - 1) * self.out_stride + self.rows * LANES <= out.len());
        assert!(self.a_stride >= self.rows * LANES && self.out_stride >= self.rows * LANES);
    }
}

/// Online softmax of one attention tile: scores in, probabilities out.
#[derive(Debug)]
pub(crate) struct SoftmaxTile<'a> {
    /// Scores of `TILE_KEYS` keys in panels, in units of log2.
    pub(crate) scores: &'a mut [f32],
    /// Floats from one panel to the next; also of `acc`.
    pub(crate) stride: usize,
    /// The first row that sees this tile, and the number of rows.
    pub(crate) rows: std::ops::Range<usize>,
    /// Keys that the first `group` of these rows see; each following group sees one more.
    pub(crate) first_visible: usize,
    /// Rows of the same position: the query heads that share a KV head.
    pub(crate) group: usize,
    /// Running maximum of each row.
    pub(crate) max: &'a mut [f32],
    /// Running sum of each row.
    pub(crate) sum: &'a mut [f32],
    /// Weighted values so far, in panels; rescaled to the new maximum.
    pub(crate) acc: &'a mut [f32],
    /// Panels of `acc`.
    pub(crate) acc_panels: usize,
}

/// Shape of a transposition of 16-bit values; strides in elements.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Transpose {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    /// From one row of the source to the next.
    pub(crate) from_stride: usize,
    /// From one column of the source, a row of the result, to the next.
    pub(crate) to_stride: usize,
}

impl Transpose {
    /// The kernels run on raw pointers: this is what makes that sound.
    fn assert_bounds(&self, from: &[f16], to: &[f16]) {
        if self.rows > 0 && self.columns > 0 {
            assert!((self.rows - 1) * self.from_stride + self.columns <= from.len());
            assert!((self.columns - 1) * self.to_stride + self.rows <= to.len());
        }
    }
}

macro_rules! pick {
    ($self:ident, $name:ident ( $($arg:expr),* )) => {{
        #[cfg(target_arch = "x86_64")]
        if $self.avx2 {
            // SAFETY: `avx2` is only true where the CPU was asked and has AVX2, FMA and F16C.
            return unsafe { avx2::$name($($arg),*) };
        }
        scalar::$name($($arg),*)
    }};
}

impl Kernels {
    /// The fastest kernels of this machine.
    pub(crate) fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        let avx2 =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        #[cfg(not(target_arch = "x86_64"))]
        let avx2 = false;
        Self { avx2 }
    }

    /// The portable twins: same bits, slow.
    pub(crate) fn scalar() -> Self {
        Self { avx2: false }
    }

    /// `k` ascending, one fused multiply-add each, one accumulator for each output.
    pub(crate) fn product<W: Weight>(self, product: &Product<'_, W>, out: &mut [f32], into: Into) {
        product.assert_bounds(out);
        pick!(self, product(product, out, into));
    }

    /// `1 / sqrt(mean of squares + eps)` of each row.
    pub(crate) fn rms_inverse(self, x: &[f32], columns: usize, eps: f32, out: &mut [f32]) {
        pick!(self, rms_inverse(x, columns, eps, out));
    }

    /// One panel of `x * inverse[row] * weight[column]`.
    pub(crate) fn normalize(self, x: &[f32], inverse: &[f32], weight: &[f32], out: &mut [f32]) {
        pick!(self, normalize(x, inverse, weight, out));
    }

    /// Elementwise `silu(gate) * up`; `pairs` is gate and up panels in turn.
    pub(crate) fn swiglu(self, pairs: &[f32], panel: usize, out: &mut [f32]) {
        pick!(self, swiglu(pairs, panel, out));
    }

    /// Rotates neighbouring pairs of one panel by each row's angles, then scales.
    pub(crate) fn rope(self, x: &mut [f32], cos: &[f32], sin: &[f32], scale: f32) {
        pick!(self, rope(x, cos, sin, scale));
    }

    /// Rounds to the nearest `f16`, ties to even.
    pub(crate) fn narrow(self, from: &[f32], to: &mut [f16]) {
        assert_eq!(from.len(), to.len());
        pick!(self, narrow(from, to));
    }

    /// `to[column * to_stride + row] = from[row * from_stride + column]`.
    pub(crate) fn transpose(self, from: &[f16], to: &mut [f16], shape: &Transpose) {
        shape.assert_bounds(from, to);
        pick!(self, transpose(from, to, shape));
    }

    /// Scores to probabilities; rescales what was summed before.
    pub(crate) fn softmax(self, tile: &mut SoftmaxTile<'_>) {
        pick!(self, softmax(tile));
    }

    /// Divides each row of a panel by its sum.
    pub(crate) fn divide(self, panel: &mut [f32], sums: &[f32]) {
        pick!(self, divide(panel, sums));
    }
}

#[cfg(test)]
mod tests;
