//! Codecs: bytes to bytes and back, without I/O. Each record carries its codec's number, so that a tier can hold
//! blocks of several codecs, and a cache that has changed its codec still reads what it wrote before.
//!
//! Invariant: decoding what was encoded gives the block, as exactly as the codec says. A codec chosen once for a
//! whole directory was the alternative: changing it would throw the directory away.

use std::borrow::Cow;
use std::fmt;

/// The number of a codec in a record's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CodecId(pub u8);

/// Makes the form of a block that tiers keep, and the block again.
pub trait Codec: Send + Sync + fmt::Debug {
    /// Its number, for ever.
    fn id(&self) -> CodecId;
    /// Its name in settings.
    fn name(&self) -> &'static str;
    /// What tiers keep of a block.
    fn encode<'a>(&self, raw: &'a [u8]) -> Cow<'a, [u8]>;
    /// The block again, in a buffer of exactly its size. `false` if the bytes are not what [`Codec::encode`] made.
    #[must_use]
    fn decode(&self, stored: &[u8], raw: &mut [u8]) -> bool;
}

/// The bytes as they are.
#[derive(Debug, Clone, Copy, Default)]
pub struct Raw;

impl CodecId {
    /// Of [`Raw`].
    pub const RAW: Self = Self(0);
}

impl Codec for Raw {
    fn id(&self) -> CodecId {
        CodecId::RAW
    }

    fn name(&self) -> &'static str {
        "raw"
    }

    fn encode<'a>(&self, raw: &'a [u8]) -> Cow<'a, [u8]> {
        Cow::Borrowed(raw)
    }

    fn decode(&self, stored: &[u8], raw: &mut [u8]) -> bool {
        let fits = stored.len() == raw.len();
        if fits {
            raw.copy_from_slice(stored);
        }
        fits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raw_gives_back_exactly_what_it_was_given_and_nothing_of_another_size() {
        let block: Vec<u8> = (0..=255).collect();
        let stored = Raw.encode(&block);
        let mut again = vec![0; block.len()];
        assert!(Raw.decode(&stored, &mut again) && again == block);
        assert!(!Raw.decode(&stored, &mut [0; 255]));
        assert_eq!((Raw.id(), Raw.name()), (CodecId::RAW, "raw"));
    }
}
