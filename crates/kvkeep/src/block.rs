//! What is known of a block besides its bytes: the one description that the store, the tiers' queues and the tiers
//! themselves pass on.
//!
//! Invariant: both sizes are known everywhere, that of the block itself and that of what a codec made of it. So
//! nobody takes bytes on a disk for bytes of RAM. Sizes in pages were the alternative: then each reader has to guess
//! which of the two is meant.
//!
//! The indexes keep their own, smaller form of it (a number for the namespace, no layout): 128 bytes a block is all
//! that they may take.

use crate::key::{NamespaceId, ObjectKey};
use crate::layout::KvLayout;
use crate::tensor::PairSpec;

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

/// What is known of a block besides its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct BlockMeta {
    /// Its key, which covers the namespace.
    pub key: BlockKey,
    /// What it belongs to.
    pub namespace: NamespaceId,
    /// Bytes of the block itself.
    pub raw_bytes: u64,
    /// Bytes of what its codec made of it: those of the payload that travels with this.
    pub stored_bytes: u64,
    /// The codec.
    pub codec: crate::codec::CodecId,
    /// When it expires, in milliseconds since the Unix epoch; `u64::MAX` for never.
    pub expires_at_ms: u64,
    /// What it took to compute, in microseconds; 0 if nobody said.
    pub compute_us: u32,
    pub(crate) content: Content,
}

impl BlockKey {
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
    /// Does a later one of the same key replace it? Blocks of tokens stay what they are for ever.
    #[must_use]
    pub fn is_replaceable(&self) -> bool {
        matches!(self.content, Content::Named(_))
    }
}
