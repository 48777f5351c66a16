//! What is known of a block besides its bytes: the one description that the store, the tiers' queues and the tiers
//! themselves pass on.
//!
//! Invariant: both sizes are known everywhere, that of the block itself and that of what a codec made of it. So
//! nobody takes bytes on a disk for bytes of RAM. Sizes in pages were the alternative: then each reader has to guess
//! which of the two is meant.
//!
//! Its facts stand alone where what the payload is does not matter: in the disk's queue, records and lines of an index.
//! The two tables of what can be found keep a smaller form of them (a number for the namespace, pages for bytes): 128 bytes
//! a block is all that they may take.

use std::ops::{Deref, Range};

use crate::codec::{self, CodecId, Codecs, Ends};
use crate::key::{NamespaceId, ObjectKey};
use crate::layout::{Frame, KvLayout};
use crate::tensor::PairSpec;

/// The first tokens of a prompt, which all others attend to (Xiao and others, 2023, arXiv 2309.17453): an error there is
/// one everywhere.
const SINK_TOKENS: u32 = 4;

/// The key of one block, or of one layer under a prefix text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockKey(pub(crate) ObjectKey);

/// What the payload is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Content {
    Block { layout: KvLayout, model: String },
    Named(PairSpec),
    Nothing,
}

impl Content {
    /// Bytes of the block; `None` if that overflows.
    #[cfg(feature = "disk")]
    pub(crate) fn raw_bytes(&self) -> Option<u64> {
        match self {
            Self::Block { layout, .. } => Some(layout.block_bytes() as u64),
            Self::Named(pair) => pair.payload_bytes().map(|bytes| bytes as u64),
            Self::Nothing => Some(0),
        }
    }

    /// Is it known what is K and V, of floats? Nothing else is for a lossy codec.
    pub(crate) fn may_be_lossy(&self) -> bool {
        matches!(self, Self::Block { layout, .. } if layout.may_be_lossy())
    }

    /// The parts that a codec encodes by themselves.
    pub(crate) fn frames(&self) -> Vec<Frame> {
        match self {
            Self::Block { layout, .. } => layout.frames(),
            Self::Named(pair) => Frame::of_pair(pair),
            Self::Nothing => Vec::new(),
        }
    }

    /// The same, of a block that is the first of its prompt or not.
    pub(crate) fn frames_to_code(&self, begins: bool) -> Vec<Frame> {
        let exact_tokens = [if begins { SINK_TOKENS } else { 0 }, 0];
        self.frames().into_iter().map(|frame| Frame { exact_tokens, ..frame }).collect()
    }
}

/// What is known of a block besides its bytes: its facts, which read as its own fields, and what the payload is.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct BlockMeta {
    /// What does not depend on what the payload is.
    pub facts: Facts,
    /// Is it the first of its prompt, as far as whoever offers it knows? Lossy codecs keep its first tokens.
    pub begins: bool,
    pub(crate) content: Content,
}

/// What every place that knows of a block knows of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Facts {
    /// Its key, which covers the namespace.
    pub key: BlockKey,
    /// What it belongs to.
    pub namespace: NamespaceId,
    /// Bytes of the block itself.
    pub raw_bytes: u64,
    /// Bytes of what its codec made of it: those of the payload that travels with this.
    pub stored_bytes: u64,
    /// The codec.
    pub codec: CodecId,
    /// When it expires, in milliseconds since the Unix epoch; `u64::MAX` for never.
    pub expires_at_ms: u64,
    /// What it took to compute, in microseconds; 0 if nobody said.
    pub compute_us: u32,
}

impl Facts {
    /// Of a block of so many bytes as it is, which never expires; nobody said what it took to compute.
    pub(crate) fn raw(key: ObjectKey, namespace: NamespaceId, bytes: u64) -> Self {
        Self {
            key: BlockKey(key),
            namespace,
            raw_bytes: bytes,
            stored_bytes: bytes,
            codec: CodecId::RAW,
            expires_at_ms: u64::MAX,
            compute_us: 0,
        }
    }
}

impl Deref for BlockMeta {
    type Target = Facts;

    fn deref(&self) -> &Facts {
        &self.facts
    }
}

impl BlockKey {
    /// The key of this hash and layer, for tiers that keep blocks under names and read those again.
    #[must_use]
    pub fn new(hash: [u8; 32], layer: u32) -> Self {
        Self(ObjectKey::new(hash, layer))
    }

    /// The 32 bytes of the hash.
    #[must_use]
    pub fn hash(&self) -> &[u8; 32] {
        self.0.hash()
    }

    /// The layer: 0 for blocks, which hold all of them.
    #[must_use]
    pub fn layer(&self) -> u32 {
        self.0.layer()
    }
}

impl BlockMeta {
    /// What tiers keep of a block with these bytes, and its description: where its codec makes it smaller. For tiers
    /// that encode what is offered.
    #[must_use]
    pub fn encoded(&self, codecs: &Codecs, raw: &[u8]) -> Option<(Self, Vec<u8>)> {
        let codec = codecs.writing_what(self.namespace, self.content.may_be_lossy());
        let codec = codec.filter(|_| self.codec == CodecId::RAW)?;
        let raw = raw.get(..usize::try_from(self.raw_bytes).ok()?)?;
        let frames = self.content.frames_to_code(self.begins);
        let (mut stored, bytes) = codec::encode(codec.as_ref(), &frames, raw, |bytes| vec![0; bytes])?;
        stored.truncate(bytes);
        let facts = Facts { codec: codec.id(), stored_bytes: bytes as u64, ..self.facts };
        Some((Self { facts, ..self.clone() }, stored))
    }

    /// Writes the bytes of `range` of the block, all of them if `None`, into the beginning of `into`, and zeros behind
    /// them. `stored` is what a tier kept of it. `false` if that is not its stored form, its codec is not known, or it is
    /// lossy and its namespace did not ask for it.
    #[must_use]
    pub fn decode(&self, codecs: &Codecs, stored: &[u8], range: Option<Range<usize>>, into: &mut [u8]) -> bool {
        let range = range.unwrap_or(0..usize::try_from(self.raw_bytes).unwrap_or(usize::MAX));
        let Some((into, rest)) = into.split_at_mut_checked(range.len()) else { return false };
        rest.fill(0);
        if range.end as u64 > self.raw_bytes {
            return false;
        }
        if self.codec == CodecId::RAW {
            return stored.get(range).map(|stored| into.copy_from_slice(stored)).is_some();
        }
        let (Some(codec), frames) = (codecs.reading(self.namespace, self.codec), self.content.frames()) else {
            return false;
        };
        let Some(ends) = Ends::read(frames.len(), stored) else { return false };
        codec::decode_range(codec.as_ref(), &frames, &ends, (stored, 0), &range, into)
    }

    /// Of the block itself, as a tier hands it over.
    #[must_use]
    pub fn decoded(self) -> Self {
        Self { facts: Facts { stored_bytes: self.raw_bytes, codec: CodecId::RAW, ..self.facts }, ..self }
    }

    /// Does a later one of the same key replace it? Blocks of tokens stay what they are for ever.
    #[must_use]
    pub fn is_replaceable(&self) -> bool {
        matches!(self.content, Content::Named(_))
    }
}
