//! Ten million executions of the codecs' fuzz target by a generator with a seed, where cargo-fuzz is not at hand: records
//! that codecs wrote, with bytes changed, cut off and put in; blocks of numbers; and bytes without order.
//!
//! `cargo run --release --features fuzzing --example fuzz_codecs [-- EXECUTIONS [SEED]]`
//!
//! It ends with a panic if a codec panics, reads beyond what it was given, cannot read itself, or an exact one is not.
//! Coverage guides cargo-fuzz, and nothing here: `make fuzz` finds more in the same number.

use std::sync::Arc;

use kvkeep::tiers::{Codec, Codecs};
use kvkeep::{DType, KvLayout, TokenOrder, fuzz_codecs};

/// A generator of Marsaglia's kind, with a multiplication behind it.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, most: usize) -> usize {
        usize::try_from(self.next() >> 33).unwrap_or(0) % most.max(1)
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[7]
    }
}

/// Of a block of so many bytes: numbers as KV has them, with now and then one that is none.
fn block(numbers: &mut Numbers, bytes: usize, dtype: DType) -> Vec<u8> {
    let (scale, odd) = (numbers.byte() % 16, numbers.below(40) == 0);
    let number = |numbers: &mut Numbers| {
        let even = f32::from(numbers.byte()) + f32::from(numbers.byte()) - 255.0;
        let value = even * 2f32.powi(i32::from(scale) - 12);
        if odd && numbers.below(50) == 0 { [f32::NAN, f32::INFINITY, f32::MAX, 1e-42][numbers.below(4)] } else { value }
    };
    let mut made = Vec::with_capacity(bytes + 8);
    while made.len() < bytes {
        let value = number(numbers);
        match dtype.size_bytes() {
            1 => made.push(value.to_bits().to_le_bytes()[3]),
            2 if dtype == DType::BF16 => made.extend(&value.to_bits().to_le_bytes()[2..]),
            2 => made.extend(((value.to_bits() >> 13) as u16).to_le_bytes()),
            _ => made.extend(value.to_le_bytes()),
        }
    }
    made.truncate(bytes);
    made
}

/// What a codec wrote of a block, behind the four bytes that tell the target what it is.
fn record(numbers: &mut Numbers, codecs: &[Arc<dyn Codec>]) -> Option<Vec<u8>> {
    let (dtype, kind) = (DType::ALL[numbers.below(DType::ALL.len())], numbers.byte() & 0xf9 | 2);
    let (inner, dim) = (1 + u32::from(kind >> 3 & 3), 2 + u32::from(kind >> 5) * 2);
    let row = inner as usize * dim as usize * dtype.size_bytes();
    // The target decodes into a multiple of 36 bytes.
    let size = 1 + numbers.below(20);
    let outer = u32::try_from((size * 36).checked_div(row)?).ok()?;
    if outer == 0 || !(size * 36).is_multiple_of(row) {
        return None;
    }
    let (heads, tokens, order) = match kind & 1 {
        0 => (inner, outer, TokenOrder::TokenHeadDim),
        _ => (outer, inner, TokenOrder::HeadTokenDim),
    };
    let layout = KvLayout::new(1, heads, dim, dtype).ok()?.with_block_tokens(tokens).ok()?.with_order(order);
    let frames = layout.frames();
    let is_value = numbers.byte() & 1;
    let frame = frames.get(usize::from(is_value))?;
    let raw = block(numbers, size * 36, dtype);
    let mut stored = vec![0; raw.len() + 64];
    let codec = &codecs[numbers.below(codecs.len())];
    let length = codec.encode(frame, &raw, &mut stored)?;
    stored.truncate(length);
    let dtype = u8::try_from(DType::ALL.iter().position(|other| *other == dtype)?).ok()?;
    // 1 of the target's three sides is K, 2 is V.
    let kind = kind & 0xf9 | (1 + is_value) << 1;
    let mut bytes = vec![dtype, u8::try_from(size).ok()?, kind, numbers.byte() & 0x11];
    bytes.append(&mut stored);
    Some(bytes)
}

/// Changes a few bytes, and now and then the length.
fn mutate(numbers: &mut Numbers, bytes: &mut Vec<u8>) {
    for _ in 0..numbers.below(6) {
        let at = numbers.below(bytes.len());
        match numbers.below(8) {
            0 => bytes.truncate(at.max(4)),
            1 => bytes.insert(at, numbers.byte()),
            2 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][numbers.below(5)],
            3 => bytes[at] ^= 1 << numbers.below(8),
            _ => bytes[at] = numbers.byte(),
        }
    }
}

fn main() {
    let mut arguments = std::env::args().skip(1).filter_map(|text| text.parse::<u64>().ok());
    let (executions, seed) = (arguments.next().unwrap_or(10_000_000), arguments.next().unwrap_or(1));
    let codecs: Vec<Arc<dyn Codec>> = Codecs::names().iter().filter_map(|name| Codecs::known_as(name).ok()).collect();
    let mut numbers = Numbers(seed.wrapping_mul(2).wrapping_add(0x9e37_79b9_7f4a_7c15));
    let (mut done, mut records) = (0, 0u64);
    while done < executions {
        let mut bytes = match numbers.below(4) {
            0 | 1 => match record(&mut numbers, &codecs) {
                Some(bytes) => {
                    records += 1;
                    bytes
                }
                None => continue,
            },
            2 => {
                let (dtype, length) = (numbers.below(DType::ALL.len()), numbers.below(500));
                let mut bytes = vec![dtype.to_le_bytes()[0], numbers.byte() % 20, numbers.byte(), numbers.byte()];
                bytes.extend(block(&mut numbers, length, DType::ALL[dtype]));
                bytes
            }
            _ => (0..4 + numbers.below(400)).map(|_| numbers.byte()).collect(),
        };
        mutate(&mut numbers, &mut bytes);
        fuzz_codecs(&bytes);
        done += 1;
        if done % (executions / 10).max(1) == 0 {
            println!("{done} executions, {records} of them of records");
        }
    }
}
