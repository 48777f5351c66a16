//! The same bits, whatever they are; what shrinks, and by how much; and bytes that nobody encoded.

#![allow(clippy::cast_possible_truncation, clippy::allow_attributes, reason = "patterns of bytes")]

use half::{bf16, f16};
use proptest::prelude::*;

use super::huffman::Lengths;
use super::*;
use crate::layout::Side;
use crate::tensor::Shape;

const DTYPES: [DType; 11] = DType::ALL;

fn frame(dtype: DType, bytes: usize) -> Frame {
    let shape = Shape::new(&[bytes]).unwrap();
    Frame { range: 0..bytes, layer: 0, side: Some(Side::K), dtype, shape, order: None, exact_tokens: [0; 2] }
}

fn stored(codec: &Lossless, dtype: DType, raw: &[u8]) -> Option<Vec<u8>> {
    let mut into = vec![0xee; raw.len() + 100];
    let bytes = codec.encode(&frame(dtype, raw.len()), raw, &mut into)?;
    into.truncate(bytes);
    Some(into)
}

/// Encodes, on this processor and as on any, and holds what comes of it against what went in. Bytes that are stored.
fn round_trip(dtype: DType, raw: &[u8]) -> usize {
    let (here, anywhere) = (Lossless::new(), Lossless { wide: None });
    let kept = stored(&here, dtype, raw).unwrap();
    assert!(stored(&anywhere, dtype, raw).unwrap() == kept, "{dtype}: other bytes on another processor");
    for codec in [here, anywhere] {
        let mut again = vec![0xaa; raw.len()];
        assert!(codec.decode(&frame(dtype, raw.len()), &kept, &mut again), "{dtype}, {} bytes", raw.len());
        assert!(again == raw, "{dtype}, {} bytes", raw.len());
    }
    kept.len()
}

/// Numbers without order, the same in each run.
fn numbers(seed: u64) -> impl Iterator<Item = u64> {
    let mut state = seed ^ 0x9e37_79b9_7f4a_7c15;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    })
}

/// Spread as KV of a layer is: normal, as the sum of twelve even ones is.
fn normal(count: usize) -> Vec<f32> {
    let mut numbers = numbers(7).map(|number| (number >> 40) as f32 / (1u32 << 24) as f32);
    (0..count).map(|_| numbers.by_ref().take(12).sum::<f32>() - 6.0).collect()
}

fn of_bf16(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect()
}

#[test]
fn every_pattern_of_sixteen_bits_comes_back_in_every_dtype() {
    let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    let often: Vec<u8> = (0..=u16::MAX).flat_map(|number| (number / 1024).to_le_bytes()).collect();
    let nans: Vec<u8> = (0..40_000u32).flat_map(|number| (0x7f80_0000 | number << 31 | number).to_le_bytes()).collect();
    for dtype in DTYPES {
        for raw in [&all, &often, &nans] {
            round_trip(dtype, raw);
        }
    }
}

#[test]
fn any_length_comes_back_also_those_that_are_no_whole_elements_or_pieces() {
    let bytes: Vec<u8> = of_bf16(&normal(100_000));
    for dtype in DTYPES {
        for len in (0..300).chain([PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES + 1001]) {
            round_trip(dtype, &bytes[..len]);
        }
    }
}

#[test]
fn kv_shrinks_as_much_as_its_exponents_let_it() {
    let values = normal(48 << 10);
    let ratio = |dtype, raw: &[u8]| raw.len() as f64 / round_trip(dtype, raw) as f64;
    let bf16s = of_bf16(&values);
    assert!(ratio(DType::BF16, &bf16s) > 1.45);
    let f16s: Vec<u8> = values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect();
    assert!(ratio(DType::F16, &f16s) > 1.15);
    let f32s: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    assert!(ratio(DType::F32, &f32s) > 1.15);
    let widened: Vec<u8> = bf16s.chunks(2).flat_map(|half| [0, 0, half[0], half[1]]).collect();
    assert!(ratio(DType::F32, &widened) > 2.9, "what was made longer is no longer");
    let zeros = vec![0; 100_000];
    assert!(ratio(DType::BF16, &zeros) > 5_000.0);
}

#[test]
fn bytes_of_unknown_kind_shrink_as_if_their_kind_were_known() {
    let bf16s = of_bf16(&normal(48 << 10));
    let known = round_trip(DType::BF16, &bf16s);
    for dtype in [DType::U8, DType::I16] {
        assert_eq!(round_trip(dtype, &bf16s), known, "{dtype}");
    }
    // 8-bit floats travel as bytes, and have but one plane.
    let fp8: Vec<u8> = bf16s.chunks(2).map(|half| half[1]).collect();
    assert_eq!(round_trip(DType::U8, &fp8), round_trip(DType::F8E4M3, &fp8));
}

#[test]
fn what_does_not_shrink_is_refused_where_there_is_only_room_for_less() {
    let noise: Vec<u8> = numbers(1).flat_map(u64::to_le_bytes).take(40_000).collect();
    for dtype in DTYPES {
        let mut into = vec![0; noise.len() - 1];
        assert_eq!(Lossless::new().encode(&frame(dtype, noise.len()), &noise, &mut into), None, "{dtype}");
        let grown = round_trip(dtype, &noise) - noise.len();
        assert!(grown < 20, "{dtype}: {grown}");
    }
}

#[test]
fn one_symbol_out_of_many_and_two_alike_are_coded() {
    let mut skewed = vec![0u8; 60_000];
    (0..skewed.len()).step_by(4999).for_each(|at| skewed[at] = at as u8 | 1);
    assert!(round_trip(DType::F8E4M3, &skewed) < skewed.len() / 7, "a bit for each");
    let two: Vec<u8> = numbers(3).map(|number| number as u8 & 1).take(60_000).collect();
    assert!(round_trip(DType::F8E4M3, &two) < two.len() / 7);
}

/// Of counts such that the best codes without a bound are far longer: each twice the one before.
#[test]
fn lengths_are_complete_and_bounded_for_the_most_uneven_counts() {
    let mut counts = [0; 256];
    (0..17).for_each(|at| counts[at * 3] = 1 << at);
    let (mut even, mut two) = ([0; 256], [0; 256]);
    even.fill(70);
    (two[0], two[255]) = (1, 65_000);
    for counts in [counts, even, two] {
        let lengths = Lengths::of(&counts).unwrap();
        let raw: Vec<u8> = (0..=255).flat_map(|symbol| vec![symbol; counts[usize::from(symbol)] as usize]).collect();
        let mut coded = vec![0; raw.len() * 2];
        let bytes = huffman::encode(&lengths, &raw, &mut coded).unwrap();
        assert!(bytes <= lengths.bytes(&counts), "it takes no more than was said");
        let mut again = vec![0; raw.len()];
        assert!(huffman::decode(&coded[..bytes], &mut again).is_some() && again == raw);
    }
    assert_eq!(Lengths::of(&[0; 256]), None);
}

proptest! {
    #[test]
    fn any_bytes_come_back_exactly(
        seed in any::<u64>(),
        bits in 0u32..=8,
        common in any::<u8>(),
        len in 0usize..6000,
        dtype in prop::sample::select(DTYPES.as_slice()),
    ) {
        // From one symbol to all of them, with one that is more frequent than the others.
        let mask = (1u16 << bits) - 1;
        let byte = |number: u64| if number >> 60 < 6 { common } else { number as u8 & mask as u8 };
        let raw: Vec<u8> = numbers(seed).map(byte).take(len).collect();
        round_trip(dtype, &raw);
    }

    #[test]
    fn damaged_bytes_are_an_error_or_other_bytes_and_the_same_on_any_processor(
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        near in prop::collection::vec((0usize..80, any::<u8>()), 0..4),
        cut in any::<prop::sample::Index>(),
        is_cut in any::<bool>(),
    ) {
        let raw = of_bf16(&normal(3000));
        let mut kept = stored(&Lossless::new(), DType::BF16, &raw).unwrap();
        let whole = kept.len();
        for (at, byte) in flips.into_iter().map(|(at, byte)| (at.index(whole), byte)).chain(near) {
            kept[at] = byte;
        }
        if is_cut {
            kept.truncate(cut.index(kept.len()));
        }
        let decoded = |codec: Lossless| {
            let mut again = vec![0; raw.len()];
            codec.decode(&frame(DType::BF16, raw.len()), &kept, &mut again).then_some(again)
        };
        prop_assert_eq!(decoded(Lossless::new()), decoded(Lossless { wide: None }));
    }

    #[test]
    fn anything_at_all_is_decoded_without_a_panic(stored in prop::collection::vec(any::<u8>(), 0..3000), len in 0usize..5000) {
        let mut raw = vec![0; len];
        let _ = Lossless::new().decode(&frame(DType::BF16, len), &stored, &mut raw);
        let mut symbols = vec![0; len];
        let _ = huffman::decode(&stored, &mut symbols);
    }
}
