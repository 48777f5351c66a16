//! Elementwise kernels, written once and compiled twice: plainly, and inside a function
//! with AVX2 and FMA enabled, where the compiler vectorises them. Rust never reorders or
//! contracts float operations, so both compilations give the same bits by construction.
//! Intrinsics were the alternative: twice the code, and a twin that can drift.

use super::{LANES, SoftmaxTile, TILE_KEYS};

/// Adding and subtracting it rounds to the nearest integer: 1.5 * 2^23.
const ROUND: f32 = 12_582_912.0;
/// ln(2)^i / i!: the Taylor series of 2^x, below 1.3e-7 relative error on [-0.5, 0.5].
const EXP2: [f32; 7] =
    [1.0, std::f32::consts::LN_2, 0.240_226_5, 0.055_504_11, 0.009_618_129, 0.001_333_355_8, 0.000_154_035_3];

/// 2^x; 0 below the smallest normal number, and no infinity.
#[inline(always)]
pub(super) fn exp2(x: f32) -> f32 {
    let small = x < -126.0;
    let x = if small { -126.0 } else { x };
    let x = if x > 126.0 { 126.0 } else { x };
    let shifted = x + ROUND;
    let f = x - (shifted - ROUND);
    let mut p = EXP2[6];
    p = p.mul_add(f, EXP2[5]);
    p = p.mul_add(f, EXP2[4]);
    p = p.mul_add(f, EXP2[3]);
    p = p.mul_add(f, EXP2[2]);
    p = p.mul_add(f, EXP2[1]);
    p = p.mul_add(f, EXP2[0]);
    // The integer part sits in the low bits of `shifted`: move it to the exponent.
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    if small { 0.0 } else { p * power }
}

/// The sum of 16 lanes, always as the same tree.
#[inline(always)]
fn tree(lanes: &[f32; LANES], join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = [0.0; 8];
    for i in 0..8 {
        half[i] = join(lanes[i], lanes[i + 8]);
    }
    for i in 0..4 {
        half[i] = join(half[i], half[i + 4]);
    }
    join(join(half[0], half[2]), join(half[1], half[3]))
}

#[inline(always)]
fn lanes(x: &[f32], at: usize) -> &[f32; LANES] {
    x[at..at + LANES].as_array().unwrap_or(&[0.0; LANES])
}

#[inline(always)]
fn lanes_mut(x: &mut [f32], at: usize) -> &mut [f32] {
    &mut x[at..at + LANES]
}

#[inline(always)]
pub(super) fn rms_inverse(x: &[f32], columns: usize, eps: f32, out: &mut [f32]) {
    let rows = out.len();
    #[expect(clippy::cast_precision_loss, reason = "columns are far below 2^24")]
    let columns_f = columns as f32;
    for (row, out) in out.iter_mut().enumerate() {
        let mut sums = [0.0f32; LANES];
        for panel in 0..columns / LANES {
            let x = lanes(x, (panel * rows + row) * LANES);
            for i in 0..LANES {
                sums[i] = x[i].mul_add(x[i], sums[i]);
            }
        }
        *out = 1.0 / (tree(&sums, |a, b| a + b) / columns_f + eps).sqrt();
    }
}

#[inline(always)]
pub(super) fn normalize(x: &[f32], inverse: &[f32], weight: &[f32], out: &mut [f32]) {
    let weight = lanes(weight, 0);
    for (row, inverse) in inverse.iter().enumerate() {
        let x = lanes(x, row * LANES);
        let out = lanes_mut(out, row * LANES);
        for i in 0..LANES {
            out[i] = x[i] * inverse * weight[i];
        }
    }
}

#[inline(always)]
pub(super) fn swiglu(pairs: &[f32], panel: usize, out: &mut [f32]) {
    for (pair, out) in pairs.chunks_exact(2 * panel).zip(out.chunks_exact_mut(panel)) {
        let (gate, up) = pair.split_at(panel);
        for ((gate, up), out) in gate.iter().zip(up).zip(out) {
            let sigmoid = 1.0 / (1.0 + exp2(*gate * -std::f32::consts::LOG2_E));
            *out = *gate * sigmoid * *up;
        }
    }
}

#[inline(always)]
pub(super) fn rope(x: &mut [f32], cos: &[f32], sin: &[f32], scale: f32) {
    for ((x, cos), sin) in x.chunks_exact_mut(LANES).zip(cos.chunks_exact(LANES)).zip(sin.chunks_exact(LANES)) {
        let mut turned = [0.0f32; LANES];
        for i in 0..LANES {
            turned[i] = x[i ^ 1].mul_add(sin[i], x[i] * cos[i]) * scale;
        }
        x.copy_from_slice(&turned);
    }
}

#[inline(always)]
pub(super) fn divide(panel: &mut [f32], sums: &[f32]) {
    for (x, sum) in panel.chunks_exact_mut(LANES).zip(sums) {
        let inverse = 1.0 / sum;
        for x in x {
            *x *= inverse;
        }
    }
}

#[inline(always)]
pub(super) fn softmax(tile: &mut SoftmaxTile<'_>) {
    for (i, row) in tile.rows.clone().enumerate() {
        let visible = (tile.first_visible + i / tile.group).min(TILE_KEYS);
        let rescale = softmax_row(tile, row, visible);
        // Exact, so skipping it changes no bit.
        if rescale != 1.0 {
            for panel in 0..tile.acc_panels {
                for x in lanes_mut(tile.acc, panel * tile.stride + row * LANES) {
                    *x *= rescale;
                }
            }
        }
    }
}

/// Keys from `visible` on get probability 0. Returns the factor from the old maximum to the new.
#[inline(always)]
fn softmax_row(tile: &mut SoftmaxTile<'_>, row: usize, visible: usize) -> f32 {
    let at = |panel: usize| panel * tile.stride + row * LANES;
    let mut max = [f32::NEG_INFINITY; LANES];
    for panel in 0..TILE_KEYS / LANES {
        let scores = lanes_mut(tile.scores, at(panel));
        if visible < (panel + 1) * LANES {
            scores[visible.saturating_sub(panel * LANES)..].fill(f32::NEG_INFINITY);
        }
        for i in 0..LANES {
            max[i] = if scores[i] > max[i] { scores[i] } else { max[i] };
        }
    }
    let tile_max = tree(&max, |a, b| if a > b { a } else { b });
    let old = tile.max[row];
    let new = if tile_max > old { tile_max } else { old };
    let rescale = exp2(old - new);
    let mut sums = [0.0f32; LANES];
    for panel in 0..TILE_KEYS / LANES {
        let scores = lanes_mut(tile.scores, at(panel));
        for i in 0..LANES {
            scores[i] = exp2(scores[i] - new);
            sums[i] += scores[i];
        }
    }
    tile.max[row] = new;
    tile.sum[row] = tile.sum[row].mul_add(rescale, tree(&sums, |a, b| a + b));
    rescale
}
