//! What every codec promises, held against the one for tests and the raw one.

#![allow(clippy::cast_possible_truncation, clippy::allow_attributes, reason = "a pattern of bytes")]

use proptest::prelude::*;

use super::*;
use crate::layout::{KvLayout, Side};
use crate::tensor::{DType, PairSpec, Shape};

#[path = "../../tests/common/planes.rs"]
pub(crate) mod planes;

use planes::{Planes, planes};

fn frames() -> Vec<Frame> {
    let layout = KvLayout::new(3, 2, 8, DType::F16).unwrap().with_v_head_dim(4).unwrap();
    layout.with_block_tokens(4).unwrap().frames()
}

/// Runs, so that it shrinks, and noise in the second frame, so that this one does not.
fn block(frames: &[Frame], seed: u8) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (number, frame) in frames.iter().enumerate() {
        let byte = |at: usize| if number == 1 { (at * 37) as u8 ^ (at >> 3) as u8 } else { (at / 40) as u8 ^ seed };
        bytes.resize(frame.range.start, 0);
        bytes.extend((0..frame.range.len()).map(byte));
    }
    bytes
}

fn stored(frames: &[Frame], raw: &[u8]) -> Vec<u8> {
    let (mut stored, bytes) = encode(&Planes, frames, raw, |bytes| vec![0xee; bytes]).unwrap();
    stored.truncate(bytes);
    stored
}

#[test]
fn raw_gives_back_exactly_what_it_was_given_and_nothing_of_another_size() {
    let (frame, block) = (&frames()[0], (0..=255).collect::<Vec<u8>>());
    let (mut stored, mut again) = (vec![0; 256], vec![0; 256]);
    assert_eq!(Raw.encode(frame, &block, &mut stored), Some(256));
    assert!(Raw.decode(frame, &stored, &mut again) && again == block);
    assert!(!Raw.decode(frame, &stored, &mut [0; 255]));
    assert_eq!((Raw.id(), Raw.name()), (CodecId::RAW, "raw"));
    assert_eq!(Raw.encode(frame, &block, &mut [0; 255]), None);
}

#[test]
fn the_frames_of_a_layout_tile_its_block() {
    let frames = frames();
    assert_eq!(frames.len(), 6);
    assert!(frames.windows(2).all(|pair| pair[0].range.end == pair[1].range.start));
    assert_eq!(frames.iter().map(|frame| frame.side).collect::<Vec<_>>()[..2], [Some(Side::K), Some(Side::V)]);
    assert_eq!(frames[5].range.end, 3 * 4 * 2 * 12 * 2);
}

#[test]
fn a_framed_block_comes_back_whole_and_in_every_part() {
    let frames = frames();
    let raw = block(&frames, 3);
    let stored = stored(&frames, &raw);
    assert!(stored.len() < raw.len());
    let mut again = vec![0xaa; raw.len() + 100];
    assert!(decode(&Planes, &frames, &stored, &mut again));
    assert!(again[..raw.len()] == raw && again[raw.len()..].iter().all(|byte| *byte == 0));
    let ends = Ends::read(frames.len(), &stored).unwrap();
    assert_eq!(ends.extent(1..2).unwrap().len(), frames[1].range.len(), "noise stays as it is");
    for start in (0..raw.len()).step_by(17) {
        for end in (start..=raw.len()).step_by(23) {
            let wanted = frames_in(&frames, &(start..end));
            let extent = ends.extent(wanted).unwrap();
            let mut part = vec![0xaa; end - start];
            let kept = (&stored[extent.clone()], extent.start);
            assert!(decode_range(&Planes, &frames, &ends, kept, &(start..end), &mut part));
            assert!(part == raw[start..end], "{start}..{end}");
        }
    }
}

/// Between K and V of a named pair lie zeros that belong to neither.
#[test]
fn what_lies_between_frames_is_zero_again() {
    let half = |bytes| (DType::U8, Shape::new(&[bytes]).unwrap());
    let pair = PairSpec { k: half(100), v: half(90), prefix_bytes: 1, tag: 0 };
    let frames = Frame::of_pair(&pair);
    assert_eq!(frames.iter().map(|frame| frame.range.clone()).collect::<Vec<_>>(), [0..100, 128..218]);
    let mut raw = vec![7; 218];
    raw[100..128].fill(0);
    let mut again = vec![0xaa; 256];
    assert!(decode(&Planes, &frames, &stored(&frames, &raw), &mut again));
    assert!(again[..218] == raw && again[218..] == [0; 38]);
    let empty = Frame::of_pair(&PairSpec { k: half(0), ..pair });
    assert_eq!(empty.len(), 1, "what has no bytes is no frame");
}

#[test]
fn a_block_that_does_not_shrink_is_not_encoded() {
    let frames = frames();
    let noise: Vec<u8> = (0..frames[5].range.end).map(|at| (at * 37) as u8 ^ (at >> 3) as u8).collect();
    assert_eq!(encode(&Planes, &frames, &noise, |bytes| vec![0; bytes]), None);
}

#[test]
fn codecs_are_found_by_their_names_and_a_wrong_name_says_which_there_are() {
    assert_eq!(Codecs::names(), ["raw", "lossless", "int8", "int4", "k8v4", "fp8", "nf4"]);
    for name in Codecs::names() {
        assert_eq!(Codecs::named(name).unwrap().name(), name);
    }
    let error = Codecs::named("lossy").unwrap_err().to_string();
    assert!(error.contains("\"lossy\"") && error.contains("raw, lossless"), "{error}");
}

#[test]
fn each_namespace_is_written_by_its_codec_and_all_are_known() {
    let special = NamespaceId::named("special");
    let codecs = planes().namespace(special, Arc::new(Raw));
    assert_eq!(codecs.writing(special).map(|codec| codec.name()), None);
    assert_eq!(codecs.writing(NamespaceId::named("other")).map(|codec| codec.name()), Some("planes"));
    assert_eq!((codecs.name(), Codecs::default().name()), ("planes", "raw"));
    assert!(codecs.get(CodecId::RAW).is_some() && codecs.get(CodecId(77)).is_none());
    assert!(Codecs::default().are_raw() && !codecs.are_raw());
    assert!(Codecs::default().knows(Arc::new(Planes)).are_raw(), "what is only read changes nothing");
}

proptest! {
    /// The twin of fuzz/fuzz_targets/codecs.rs.
    #[test]
    fn what_every_codec_is_fed_comes_back_or_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..4000), run in 1usize..9) {
        let bytes: Vec<u8> = (0..bytes.len()).map(|at| bytes[at / run * run]).collect();
        code_anything(&bytes);
    }

    #[test]
    fn any_block_comes_back_exactly(bytes in prop::collection::vec(any::<u8>(), 576), run in 1usize..64) {
        let frames = frames();
        let raw: Vec<u8> = (0..576).map(|at| bytes[at / run * run]).collect();
        if let Some((stored, _)) = encode(&Planes, &frames, &raw, |bytes| vec![0; bytes]) {
            let mut again = vec![0; 576];
            prop_assert!(decode(&Planes, &frames, &stored, &mut again) && again == raw);
        }
    }

    #[test]
    fn damaged_bytes_are_an_error_or_other_bytes_and_never_a_panic(
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in any::<prop::sample::Index>(),
        start in 0usize..576,
        length in 0usize..200,
    ) {
        let frames = frames();
        let mut stored = stored(&frames, &block(&frames, 9));
        for (at, byte) in flips {
            let at = at.index(stored.len());
            stored[at] = byte;
        }
        stored.truncate(cut.index(stored.len() + 1));
        let mut again = vec![0; 700];
        let _ = decode(&Planes, &frames, &stored, &mut again);
        let range = start..(start + length).min(576);
        if let Some(ends) = Ends::read(frames.len(), &stored) {
            let mut part = vec![0; range.len()];
            let _ = decode_range(&Planes, &frames, &ends, (&stored, 0), &range, &mut part);
        }
    }
}
