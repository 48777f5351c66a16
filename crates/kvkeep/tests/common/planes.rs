//! A small codec for tests, and a real one: bytes of equal rank in their elements together, and runs of equal bytes
//! counted.
#![allow(dead_code, unreachable_pub, missing_docs, clippy::allow_attributes, reason = "each test uses its part")]

use std::sync::Arc;

use kvkeep::tiers::{Codec, CodecId, Codecs, Frame};

#[derive(Debug)]
pub struct Planes;

/// Everything goes through it.
pub fn planes() -> Codecs {
    Codecs::all(Arc::new(Planes))
}

fn plane(bytes: &[u8], of: usize, planes: usize) -> impl Iterator<Item = u8> {
    bytes.iter().skip(of).step_by(planes).copied()
}

impl Codec for Planes {
    fn id(&self) -> CodecId {
        CodecId(200)
    }

    fn name(&self) -> &'static str {
        "planes"
    }

    fn is_exact(&self) -> bool {
        true
    }

    /// Pairs of a count and a byte.
    fn encode(&self, frame: &Frame, raw: &[u8], into: &mut [u8]) -> Option<usize> {
        let (planes, mut at) = (frame.dtype.size_bytes(), 0);
        for of in 0..planes {
            let mut bytes = plane(raw, of, planes).peekable();
            while let Some(byte) = bytes.next() {
                let mut count = 1u8;
                while count < u8::MAX && bytes.next_if_eq(&byte).is_some() {
                    count += 1;
                }
                into.get_mut(at..at + 2)?.copy_from_slice(&[count, byte]);
                at += 2;
            }
        }
        Some(at)
    }

    fn decode(&self, frame: &Frame, stored: &[u8], raw: &mut [u8]) -> bool {
        let planes = frame.dtype.size_bytes();
        let places = |of: usize| (of..raw.len()).step_by(planes);
        let mut place = (0..planes).flat_map(places).collect::<Vec<_>>().into_iter();
        let (pairs, rest) = stored.as_chunks::<2>();
        for [count, byte] in pairs {
            for _ in 0..*count {
                let Some(to) = place.next().and_then(|place| raw.get_mut(place)) else { return false };
                *to = *byte;
            }
        }
        rest.is_empty() && place.next().is_none()
    }
}
