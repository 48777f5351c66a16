//! What comes back is within the stated bound, whatever goes in; and bytes that nobody encoded.

use half::{bf16, f16};
use proptest::prelude::*;

use super::*;
use crate::layout::{KvLayout, TokenOrder};

const TOKENS: u32 = 8;
const COUNT: usize = 8 * 2 * 16;

fn layout(dtype: DType, order: TokenOrder) -> KvLayout {
    let layout = KvLayout::new(1, 2, 16, dtype).unwrap().with_block_tokens(TOKENS).unwrap();
    layout.with_order(order)
}

fn codec(name: &str) -> Lossy {
    Lossy::all().into_iter().find(|codec| codec.name == name).unwrap()
}

fn bytes(values: &[f32], dtype: DType) -> Vec<u8> {
    let of = |value: &f32| match dtype {
        DType::BF16 => bf16::from_f32(*value).to_le_bytes().to_vec(),
        DType::F16 => f16::from_f32(*value).to_le_bytes().to_vec(),
        _ => value.to_le_bytes().to_vec(),
    };
    values.iter().flat_map(of).collect()
}

/// What comes back of a frame, on this processor as on any; `None` if it is kept as it is.
fn back(codec: Lossy, frame: &Frame, raw: &[u8]) -> Option<Vec<u8>> {
    let (mut stored, mut again) = (vec![0xee; raw.len() - 1], vec![0xaa; raw.len()]);
    let anywhere = Lossy { wide: None, ..codec };
    let mut there = stored.clone();
    let length = codec.encode(frame, raw, &mut stored);
    assert_eq!(length, anywhere.encode(frame, raw, &mut there));
    let (stored, there) = (&stored[..length?], &there[..length?]);
    assert!(stored == there, "{}: other bytes on another processor", codec.name);
    assert!(codec.decode(frame, stored, &mut again), "{} reads itself", codec.name);
    let mut elsewhere = again.clone();
    assert!(anywhere.decode(frame, stored, &mut elsewhere) && elsewhere == again, "{}", codec.name);
    assert!(!codec.decode(frame, &stored[..stored.len() - 1], &mut elsewhere), "nothing shorter");
    Some(again)
}

/// Which group an element of a frame is in: written here once more, from what the words of the files say.
fn group(frame: &Frame, at: usize) -> usize {
    let &[_, inner, dim] = frame.shape.dims() else { panic!("three dimensions") };
    let (first, second, channel) = (at / dim / inner, at / dim % inner, at % dim);
    match (frame.side.unwrap(), frame.order.unwrap()) {
        (Side::K, TokenOrder::TokenHeadDim) => second * dim + channel,
        (Side::K, TokenOrder::HeadTokenDim) => first * dim + channel,
        (Side::V, _) => first * inner + second,
    }
}

/// The token of an element.
fn token(frame: &Frame, at: usize) -> u32 {
    let &[_, inner, dim] = frame.shape.dims() else { panic!("three dimensions") };
    let token = if frame.order == Some(TokenOrder::TokenHeadDim) { at / dim / inner } else { at / dim % inner };
    u32::try_from(token).unwrap()
}

/// Holds every element of both sides, dtypes and orders against the bound that the files state.
fn check(values: &[f32]) {
    for dtype in [DType::BF16, DType::F16, DType::F32] {
        for order in [TokenOrder::TokenHeadDim, TokenOrder::HeadTokenDim] {
            for frame in layout(dtype, order).frames() {
                Lossy::all().into_iter().for_each(|codec| check_frame(codec, &frame, &bytes(values, dtype)));
            }
        }
    }
}

/// How far this element may be from what it becomes, of a group with these ends, among groups of these magnitudes.
fn bound(kind: Kind, value: f64, (least, most): (f64, f64), magnitudes: (f64, f64)) -> f64 {
    let largest = least.abs().max(most.abs());
    let level = |codes: f64| (most - least + (most - least).max(largest) / 32.0) / codes / 2.0 * 1.02;
    match kind {
        Kind::Int8 => level(255.0),
        Kind::Int4 => level(15.0),
        Kind::F8 => (value.abs() / 16.0).max(largest / 400_000.0) * 1.02,
        Kind::Normal4 => (largest + (magnitudes.1 - magnitudes.0 * 0.99) / 250.0) * 0.153,
    }
}

fn check_frame(codec: Lossy, frame: &Frame, raw: &[u8]) {
    let values = elements::read(frame.dtype, raw);
    let Some(again) = back(codec, frame, raw) else {
        let spread = values.iter().fold(0.0f64, |most, value| most.max(f64::from(value.abs())));
        assert!(!spread.is_finite() || spread > 1e37, "{}: {frame:?} is kept as it is", codec.name);
        return;
    };
    if again == raw {
        return;
    }
    assert!(values.iter().all(|value| value.is_finite()), "{}: {frame:?} is not exact", codec.name);
    // Of the dtype's rounding: relative, and between numbers that are too small for that.
    let (half, tiny) = match frame.dtype {
        DType::BF16 => (1.0 / 256.0, 1e-37),
        DType::F16 => (1.0 / 2048.0, 6e-8),
        _ => (1e-6, 1e-37),
    };
    let mut ranges = std::collections::BTreeMap::new();
    for (at, value) in values.iter().enumerate() {
        let range = ranges.entry(group(frame, at)).or_insert((f64::MAX, f64::MIN));
        *range = (range.0.min((*value).into()), range.1.max((*value).into()));
    }
    let largest = |(least, most): &(f64, f64)| least.abs().max(most.abs());
    let magnitudes =
        (ranges.values().map(largest).fold(f64::MAX, f64::min), ranges.values().map(largest).fold(0.0, f64::max));
    for (at, (value, came)) in values.iter().zip(elements::read(frame.dtype, &again)).enumerate() {
        let (value, range) = (f64::from(*value), ranges[&group(frame, at)]);
        let bound = bound(codec.kind(frame).unwrap(), value, range, magnitudes) + largest(&range) * half + tiny;
        let error = (value - f64::from(came)).abs();
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
    check(&vec![-0.0; count]);
    check(&vec![-3.3; count]);
    check(&vec![f32::MIN_POSITIVE / 4.0; count]);
    // A range that a float just has: rounded up, so many steps were an infinity.
    for most in [1.4e38, 1.702e38, 3.4e38] {
        check(&(0..count).map(|at| if at % 3 == 0 { most } else { most - f32::MAX }).collect::<Vec<_>>());
        check(&(0..count).map(|at| f32::MAX * (at as f32 / 600.0).sin() / 2.0).collect::<Vec<_>>());
    }
    check(&(0..count).map(|at| at as f32 * f32::MIN_POSITIVE / 512.0).collect::<Vec<_>>());
    check(&(0..count).map(|at| 1000.0 + (at * 37 % 11) as f32).collect::<Vec<_>>());
    check(&(0..count).map(|at| if at % 2 == 0 { 65_504.0 } else { -65_504.0 }).collect::<Vec<_>>());
    check(&(0..count).map(|at| if at % 3 == 0 { f32::MAX } else { f32::MIN }).collect::<Vec<_>>());
}

/// What has no place on a scale must not become a number.
#[test]
fn frames_with_nan_or_infinity_and_those_of_other_kinds_come_back_exactly() {
    let comes_back = |codec, frame: &Frame, raw: &[u8]| back(codec, frame, raw).is_none_or(|again| again == raw);
    for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::from_bits(0xffc1_2345)] {
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            let mut values = vec![1.0; COUNT];
            values[9] = odd;
            for frame in layout(dtype, TokenOrder::TokenHeadDim).frames() {
                Lossy::all().iter().for_each(|codec| assert!(comes_back(*codec, &frame, &bytes(&values, dtype))));
            }
        }
    }
    let raw: Vec<u8> = (0..COUNT).map(|at| u8::try_from(at / 7).unwrap()).collect();
    for dtype in [DType::U8, DType::F8E4M3, DType::I8] {
        let frames = KvLayout::new(1, 2, 16, dtype).unwrap().with_block_tokens(TOKENS).unwrap().frames();
        assert!(frames.iter().all(|frame| Lossy::all().iter().all(|codec| comes_back(*codec, frame, &raw))));
    }
    let opaque = KvLayout::opaque(256, 8).unwrap().frames();
    assert!(Lossy::all().iter().all(|codec| comes_back(*codec, &opaque[0], &raw)));
}

/// Of which nobody says what is K: a lossy codec would have kept all bytes of an engine's opaque blocks.
#[test]
fn what_a_lossy_codec_cannot_take_is_as_small_as_lossless_makes_it() {
    let raw = bytes(&(0..4096).map(|at| (at * 37 % 101) as f32 / 99.0).collect::<Vec<_>>(), DType::BF16);
    let frame = &KvLayout::opaque(8192, 8).unwrap().frames()[0];
    let mut into = vec![0; raw.len()];
    let exact = Lossless::new().encode(frame, &raw, &mut into).unwrap();
    assert!(exact < raw.len() * 3 / 4);
    for codec in Lossy::all() {
        assert_eq!(codec.encode(frame, &raw, &mut into), Some(exact + 1));
    }
}

#[test]
fn tokens_that_are_to_be_exact_are_and_a_large_one_among_them_spoils_no_other() {
    for order in [TokenOrder::TokenHeadDim, TokenOrder::HeadTokenDim] {
        for (exact, frame) in [[1, 0], [2, 3], [0, 1], [8, 0], [5, 9]]
            .into_iter()
            .flat_map(|exact| layout(DType::F32, order).frames().into_iter().map(move |frame| (exact, frame)))
        {
            let frame = Frame { exact_tokens: exact, ..frame };
            let is_exact = |at| token(&frame, at) < exact[0] || token(&frame, at) + exact[1] >= TOKENS;
            let values: Vec<f32> =
                (0..COUNT).map(|at| if is_exact(at) { 9999.0 + at as f32 } else { (at % 11) as f32 / 11.0 }).collect();
            for codec in Lossy::all() {
                // Where all are exact nothing becomes less.
                let Some(again) = back(codec, &frame, &bytes(&values, DType::F32)) else { continue };
                for (at, (value, came)) in values.iter().zip(elements::read(DType::F32, &again)).enumerate() {
                    let bound = if is_exact(at) { 0.0 } else { 0.16 };
                    assert!((value - came).abs() <= bound, "{} {exact:?} {at}: {value} came as {came}", codec.name);
                }
            }
        }
    }
}

#[test]
fn they_are_as_small_as_they_say() {
    let values: Vec<f32> = (0..64 * 4 * 128).map(|at| (at * 37 % 101) as f32 / 7.0 - 5.0).collect();
    let layout = KvLayout::new(1, 4, 128, DType::BF16).unwrap().with_block_tokens(64).unwrap();
    let raw = bytes(&values, DType::BF16);
    let ratio = |name: &str| {
        let mut into = vec![0; raw.len()];
        let stored = layout.frames().into_iter().map(|frame| codec(name).encode(&frame, &raw, &mut into).unwrap());
        2.0 * raw.len() as f64 / stored.sum::<usize>() as f64
    };
    let ratios = ["int8", "int4", "k8v4", "fp8", "nf4"].map(ratio);
    let least = [1.88, 3.5, 2.4, 1.93, 3.8];
    assert!(ratios.iter().zip(least).all(|(ratio, least)| *ratio > least), "{ratios:?}");
}

/// Every number of eight bits is read as what it is, and none is nearer to what is written.
#[test]
fn floats_of_eight_bits_are_those_of_e4m3() {
    let mut bytes = [0; 2];
    let scales = F8::fit(&[(-448.0, 448.0)], &mut bytes).unwrap();
    let Some(Row::One(scale)) = scales.row(false, 0) else { panic!("one") };
    let number = |code: u8| {
        let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
        let size = if exponent == 0 { mantissa / 512.0 } else { (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7) };
        if code & 0x80 == 0 { size } else { -size }
    };
    let codes: Vec<u8> = (0..=255).filter(|code| code & 0x7f != 0x7f).collect();
    for code in &codes {
        assert_eq!(f64::from(F8::value(*code, scale)), number(*code));
    }
    for at in 0..90_000u32 {
        let value = (f64::from(at) - 45_000.0) / 100.0;
        let nearest = codes.iter().map(|code| (number(*code) - value).abs()).fold(f64::MAX, f64::min);
        #[expect(clippy::cast_possible_truncation, reason = "few digits")]
        let came = f64::from(F8::value(F8::code(value as f32, scale), scale));
        assert!((came - value).abs() <= nearest + 1e-4, "{value} came as {came}");
    }
}

/// Of a long entry all tokens had one scale a channel: the larger the text, the coarser its keys.
#[test]
fn keys_of_many_tokens_have_scales_of_their_own_for_every_64() {
    for order in [TokenOrder::TokenHeadDim, TokenOrder::HeadTokenDim] {
        let layout = KvLayout::new(1, 2, 16, DType::F32).unwrap().with_block_tokens(300).unwrap().with_order(order);
        let k = Frame { exact_tokens: [4, 7], ..layout.frames().remove(0) };
        let large = |at| if token(&k, at) < 68 { 90.0 } else { 0.0 };
        let values: Vec<f32> = (0..300 * 32).map(|at| (at % 7) as f32 * large(at) + (at % 11) as f32 / 11.0).collect();
        for codec in Lossy::all() {
            let again = back(codec, &k, &bytes(&values, DType::F32)).unwrap();
            for (at, (value, came)) in values.iter().zip(elements::read(DType::F32, &again)).enumerate() {
                let bound = if token(&k, at) < 68 { 90.0 } else { 0.16 };
                assert!((value - came).abs() <= bound, "{} {at}: {value} came as {came}", codec.name);
            }
        }
    }
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
        stored in prop::collection::vec(any::<u8>(), 0..1200),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        exact in prop::array::uniform2(0u32..5),
    ) {
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            for (codec, frame) in Lossy::all().iter().zip(layout(dtype, TokenOrder::HeadTokenDim).frames().iter().cycle()) {
                let frame = Frame { exact_tokens: exact, ..frame.clone() };
                let mut raw = vec![0; frame.range.len()];
                let _ = codec.decode(&frame, &stored, &mut raw);
                let mut real = vec![0; raw.len()];
                let values: Vec<f32> = (0..COUNT).map(|at| (at * 37 % 101) as f32 - 50.0).collect();
                // Where so many are exact that nothing becomes less.
                let Some(length) = codec.encode(&frame, &bytes(&values, dtype), &mut real) else { continue };
                real.truncate(length);
                for (at, byte) in &flips {
                    let at = at.index(length);
                    real[at] = *byte;
                }
                let _ = codec.decode(&frame, &real, &mut raw);
            }
        }
    }
}
