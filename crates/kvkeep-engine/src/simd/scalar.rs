//! Portable kernels: what every other compilation must equal bit for bit.

use half::f16;

pub(super) use super::body::{divide, normalize, rms_inverse, rope, softmax, swiglu};
use super::{Into, LANES, Product, Transpose, Weight};

pub(super) fn product<W: Weight>(product: &Product<'_, W>, out: &mut [f32], into: Into) {
    for panel in 0..product.panels {
        let w = &product.w[panel * product.w_stride..];
        for row in 0..product.rows {
            let out = &mut out[panel * product.out_stride + row * LANES..][..LANES];
            let mut acc = [0.0f32; LANES];
            if into == Into::Chain {
                acc.copy_from_slice(out);
            }
            for k in 0..product.k {
                let w = &w[k * product.w_step..][..LANES];
                let a = product.a[k / LANES * product.a_stride + row * LANES + k % LANES];
                for (acc, w) in acc.iter_mut().zip(w) {
                    *acc = a.mul_add(w.wide(), *acc);
                }
            }
            for (out, acc) in out.iter_mut().zip(acc) {
                *out = if into == Into::Add { *out + acc } else { acc };
            }
        }
    }
}

pub(super) fn narrow(from: &[f32], to: &mut [f16]) {
    for (from, to) in from.iter().zip(to) {
        *to = f16::from_f32(*from);
    }
}

pub(super) fn transpose(from: &[f16], to: &mut [f16], shape: &Transpose) {
    for column in 0..shape.columns {
        for row in 0..shape.rows {
            to[column * shape.to_stride + row] = from[row * shape.from_stride + column];
        }
    }
}
