use proptest::prelude::*;

use super::*;

/// Values of both signs over several orders of magnitude, from a seed.
fn values(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next() * 10f32.powf(next())).collect()
}

fn halves(seed: u64, len: usize) -> Vec<f16> {
    values(seed, len).into_iter().map(f16::from_f32).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// What one pair of kernels, fast and portable, made of the same input.
fn both(mut run: impl FnMut(Kernels) -> Vec<f32>) -> (Vec<u32>, Vec<u32>) {
    (bits(&run(Kernels::detect())), bits(&run(Kernels::scalar())))
}

fn run_product<W: Weight>(
    kernels: Kernels,
    (rows, k, panels): (usize, usize, usize),
    w: &[W],
    w_step: usize,
    into: Into,
) -> Vec<f32> {
    let stride = rows * LANES;
    let a = values(1, k.div_ceil(LANES) * stride);
    let mut out = values(3, panels * stride);
    let w_stride = if w_step == LANES { k * LANES } else { LANES };
    let product = Product { a: &a, a_stride: stride, w, w_stride, w_step, k, rows, panels, out_stride: stride };
    kernels.product(&product, &mut out, into);
    out
}

fn into_strategy() -> impl Strategy<Value = Into> {
    prop_oneof![Just(Into::Set), Just(Into::Add), Just(Into::Chain)]
}

/// Every shape up to some blocks of 8 and an edge. A shape without columns, but with rows beside a
/// whole block, once made the fast kernel look behind the end of its result.
#[test]
fn a_transposition_moves_every_value_and_touches_nothing_else() {
    for (rows, columns, spare) in (0..20).flat_map(|r| (0..20).flat_map(move |c| (0..2).map(move |s| (r, c, s)))) {
        let (from_stride, to_stride) = (columns + spare, rows + spare);
        let shape = Transpose { rows, columns, from_stride, to_stride };
        let from = halves(5, rows * from_stride);
        let run = |kernels: Kernels| {
            let mut to = vec![f16::NAN; columns * to_stride];
            kernels.transpose(&from, &mut to, &shape);
            to.into_iter().map(f16::to_bits).collect::<Vec<_>>()
        };
        let fast = run(Kernels::detect());
        for (i, bits) in fast.iter().enumerate() {
            let (column, row) = (i / to_stride, i % to_stride);
            let expected = if row < rows { from[row * from_stride + column] } else { f16::NAN };
            assert_eq!(*bits, expected.to_bits(), "{shape:?}");
        }
        assert_eq!(fast, run(Kernels::scalar()), "{shape:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn products_have_the_same_bits_on_every_machine(
        rows in 1usize..20, k in 1usize..70, panels in 1usize..9, into in into_strategy()
    ) {
        let (w16, w32) = (halves(2, panels * k * LANES), values(2, panels * k * LANES));
        let (fast, portable) = both(|kernels| run_product(kernels, (rows, k, panels), &w16, LANES, into));
        prop_assert_eq!(fast, portable);
        let (fast, portable) = both(|kernels| run_product(kernels, (rows, k, panels), &w32, LANES, into));
        prop_assert_eq!(fast, portable);
        let step = panels * LANES + 32;
        let w16 = halves(5, k * step);
        let (fast, portable) = both(|kernels| run_product(kernels, (rows, k, panels), &w16, step, into));
        prop_assert_eq!(fast, portable);
    }

    #[test]
    fn a_row_of_a_product_does_not_depend_on_the_rows_beside_it(rows in 2usize..20, k in 1usize..70) {
        let w = halves(2, 3 * k * LANES);
        let kernels = Kernels::detect();
        let whole = run_product(kernels, (rows, k, 3), &w, LANES, Into::Set);
        let stride = rows * LANES;
        let a = values(1, k.div_ceil(LANES) * stride);
        for row in 0..rows {
            let mut one = vec![0.0; 3 * LANES];
            let product = Product {
                a: &a[row * LANES..], a_stride: stride, w: &w, w_stride: k * LANES, w_step: LANES,
                k, rows: 1, panels: 3, out_stride: LANES,
            };
            kernels.product(&product, &mut one, Into::Set);
            for panel in 0..3 {
                let in_batch = &whole[panel * stride + row * LANES..][..LANES];
                prop_assert_eq!(bits(in_batch), bits(&one[panel * LANES..][..LANES]));
            }
        }
    }

    #[test]
    fn elementwise_kernels_have_the_same_bits_on_every_machine(rows in 1usize..9, panels in 1usize..5, seed: u64) {
        let len = rows * panels * LANES;
        let x = values(seed, len);
        let y = values(!seed, len);
        let (fast, portable) = both(|kernels| {
            let mut inverse = vec![0.0; rows];
            kernels.rms_inverse(&x, panels * LANES, 1e-5, &mut inverse);
            let mut out = vec![0.0; rows * LANES];
            kernels.normalize(&x, &inverse, &y, &mut out);
            out.extend(inverse);
            let mut hidden = vec![0.0; rows * LANES];
            kernels.swiglu(&[&x[..rows * LANES], &y[..rows * LANES]].concat(), rows * LANES, &mut hidden);
            kernels.rope(&mut hidden, &x, &y, 0.125);
            kernels.divide(&mut hidden, &y);
            out.extend(hidden);
            out
        });
        prop_assert_eq!(fast, portable);
    }

    #[test]
    fn softmax_has_the_same_bits_on_every_machine(
        rows in 1usize..12, group in 1usize..4, first_visible in 1usize..80, seed: u64
    ) {
        let stride = rows * LANES;
        let (fast, portable) = both(|kernels| {
            let mut scores = values(seed, TILE_KEYS * rows);
            let (mut max, mut sum) = (values(1, rows), vec![1.0; rows]);
            max[0] = f32::NEG_INFINITY;
            let mut acc = values(2, 2 * stride);
            kernels.softmax(&mut SoftmaxTile {
                scores: &mut scores, stride, rows: 0..rows, first_visible, group,
                max: &mut max, sum: &mut sum, acc: &mut acc, acc_panels: 2,
            });
            [scores, max, sum, acc].concat()
        });
        prop_assert_eq!(fast, portable);
    }

    #[test]
    fn narrowing_rounds_to_the_nearest_half(seed: u64, len in 0usize..40) {
        let mut from = values(seed, len);
        from.extend([0.0, -0.0, 65504.0, 65520.0, 1e-8, f32::INFINITY, 5.960_464_5e-8, 2049.0, 2051.0]);
        let (fast, portable) = both(|kernels| {
            let mut to = vec![f16::ZERO; from.len()];
            kernels.narrow(&from, &mut to);
            to.into_iter().map(f16::to_f32).collect()
        });
        prop_assert_eq!(fast, portable);
    }

    #[test]
    fn exp2_is_within_two_units_in_the_last_place(x in -125.9f32..125.9) {
        let (got, exact) = (f64::from(body::exp2(x)), f64::from(x).exp2());
        prop_assert!(((got - exact) / exact).abs() < 2.5e-7, "{x}: {got} {exact}");
    }
}

#[test]
fn exp2_has_exact_ends() {
    assert_eq!(body::exp2(0.0), 1.0);
    assert_eq!(body::exp2(-0.0), 1.0);
    assert_eq!(body::exp2(f32::NEG_INFINITY), 0.0);
    assert_eq!(body::exp2(-1000.0), 0.0);
    assert!(body::exp2(1e30).is_finite());
}

#[test]
#[should_panic(expected = "assertion failed")]
fn a_product_beyond_its_slices_is_refused_before_it_reads() {
    let product = Product {
        a: &[0.0; 16],
        a_stride: 16,
        w: &[0.0f32; 31],
        w_stride: 16,
        w_step: 16,
        k: 2,
        rows: 1,
        panels: 1,
        out_stride: 16,
    };
    Kernels::detect().product(&product, &mut [0.0; 16], Into::Set);
}
