//! Identity: what must be equal for KV to be the same KV.
//!
//! Everything that changes a single bit of KV is in the [`Namespace`]; its SHA-256
//! is the root of every chain. A block's hash covers its tokens and, through its
//! parent, all tokens before them. Faster hashes were the alternative: a collision
//! here is a wrong answer across tenants, and SHA-256 in hardware already hashes
//! a 32k-token prompt in about 0.1 ms.

mod namespace;

use std::fmt;
use std::str::FromStr;

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

pub use namespace::Namespace;

/// A token of the model's vocabulary.
pub type TokenId = u32;

/// SHA-256 of everything in a [`Namespace`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamespaceId([u8; 32]);

/// SHA-256 over the parent's hash and a block's tokens; the root's parent is the namespace.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash([u8; 32]);

/// The key of one stored object, whichever front door made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct ObjectKey {
    hash: [u8; 32],
    /// 0 for blocks, which hold all layers.
    layer: u32,
}

/// Hashes growing prefixes of one text: each byte is hashed once.
#[derive(Debug, Clone)]
pub(crate) struct PrefixHasher(Sha256);

/// SHA-256 of a prefix text in its namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PrefixHash([u8; 32]);

/// The identity of what a lossy codec may have changed.
fn through(hash: &[u8; 32], codec: &str) -> [u8; 32] {
    let mut hasher = Sha256::new();
    hasher.update(b"kvkeep lossy codec 1");
    hasher.update((codec.len() as u64).to_le_bytes());
    hasher.update(codec);
    hasher.update(hash);
    hasher.finalize().into()
}

impl NamespaceId {
    /// The identity of a named cache: it has no layout, only a name.
    pub(crate) fn named(name: &str) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(b"kvkeep named cache 1");
        hasher.update(name);
        Self(hasher.finalize().into())
    }

    /// Of the same KV behind a lossy codec.
    pub(crate) fn through(self, codec: &str) -> Self {
        Self(through(&self.0, codec))
    }

    /// The identity of which these are the bytes, for tiers that name it and read the name again.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes of the identity.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl BlockHash {
    /// The hash with these bytes, as [`BlockHash::as_bytes`] gives them.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes of the hash.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    pub(crate) fn key(self) -> ObjectKey {
        ObjectKey { hash: self.0, layer: 0 }
    }

    fn child(self, tokens: &[TokenId]) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(self.0);
        if cfg!(target_endian = "little") {
            hasher.update(bytemuck::cast_slice::<TokenId, u8>(tokens));
        } else {
            tokens.iter().for_each(|token| hasher.update(token.to_le_bytes()));
        }
        Self(hasher.finalize().into())
    }
}

impl ObjectKey {
    pub(crate) fn new(hash: [u8; 32], layer: u32) -> Self {
        Self { hash, layer }
    }

    pub(crate) fn hash(&self) -> &[u8; 32] {
        &self.hash
    }

    /// The name of the block under this key.
    pub(crate) fn block_hash(&self) -> BlockHash {
        BlockHash(self.hash)
    }

    /// The key of a block that only has a number, in a simulation.
    pub(crate) fn numbered(number: u64) -> Self {
        // Uniform first bytes, as a hash has: the finaliser of MurmurHash3, a bijection.
        let mut mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        mixed = (mixed ^ (mixed >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        mixed = (mixed ^ (mixed >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        mixed ^= mixed >> 33;
        let mut hash = [0; 32];
        let halves = mixed.to_le_bytes().into_iter().chain(number.to_le_bytes());
        hash.iter_mut().zip(halves).for_each(|(to, from)| *to = from);
        Self { hash, layer: 0 }
    }

    pub(crate) fn layer(&self) -> u32 {
        self.layer
    }

    /// Of the same block behind a lossy codec.
    pub(crate) fn through(self, codec: &str) -> Self {
        Self { hash: through(&self.hash, codec), ..self }
    }

    /// 64 bits for hash tables. SHA-256 is uniform already, so its first bytes do.
    pub(crate) fn table_hash(&self) -> u64 {
        let (first, _) = self.hash.split_first_chunk::<8>().unwrap_or((&[0; 8], &[]));
        u64::from_le_bytes(*first) ^ u64::from(self.layer).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }
}

impl PrefixHasher {
    pub(crate) fn new(namespace: NamespaceId) -> Self {
        Self(Sha256::new_with_prefix(namespace.0))
    }

    /// The next piece of the text.
    pub(crate) fn update(&mut self, text: &[u8]) {
        self.0.update(text);
    }

    /// The hash of all the text so far.
    pub(crate) fn hash(&self) -> PrefixHash {
        PrefixHash(self.0.clone().finalize().into())
    }
}

impl PrefixHash {
    pub(crate) fn of(namespace: NamespaceId, prefix: &str) -> Self {
        let mut hasher = PrefixHasher::new(namespace);
        hasher.update(prefix.as_bytes());
        hasher.hash()
    }

    pub(crate) fn key(self, layer: u32) -> ObjectKey {
        ObjectKey { hash: self.0, layer }
    }
}

macro_rules! hex {
    ($($type:ident),+) => {$(
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        /// Reads what `Display` writes.
        impl FromStr for $type {
            type Err = Error;

            fn from_str(text: &str) -> Result<Self> {
                from_hex(text).map(Self).ok_or_else(|| Error::BadId(text.chars().take(80).collect()))
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($type), "({})"), self)
            }
        }
    )+};
}

hex!(NamespaceId, BlockHash);

/// 32 bytes from 64 hexadecimal digits.
fn from_hex(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    if text.len() != 64 {
        return None;
    }
    for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let digit = |at: usize| char::from(*digits.get(at)?).to_digit(16);
        *byte = u8::try_from(digit(0)? * 16 + digit(1)?).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{KvLayout, LayerShape, TokenOrder};
    use crate::tensor::DType;

    fn namespace() -> Namespace {
        let layout = KvLayout::new(2, 1, 4, DType::F16).unwrap().with_block_tokens(4).unwrap();
        Namespace::new("m", layout)
    }

    #[test]
    fn every_part_of_a_namespace_changes_its_identity() {
        let base = namespace();
        let layout = *base.layout();
        let others = [
            Namespace::new("n", layout),
            base.clone().with_revision("r"),
            base.clone().with_engine("r"),
            base.clone().with_lora("r"),
            base.clone().with_salt("r"),
            base.clone().with_codec("r"),
            base.clone().with_codec("q").with_codec("r"),
            base.clone().with_codec("r").with_codec("q"),
            Namespace::new("m", layout.with_order(TokenOrder::HeadTokenDim)),
            Namespace::new("m", layout.with_block_tokens(8).unwrap()),
            Namespace::new("m", layout.with_v_head_dim(8).unwrap()),
            Namespace::new("m", KvLayout::new(2, 1, 4, DType::BF16).unwrap()),
            Namespace::new("m", layout.with_v_head_dim(0).unwrap()),
            Namespace::new(
                "m",
                layout.with_layers([1], LayerShape { v_head_dim: 8, ..layout.layer_shape(0) }).unwrap(),
            ),
            Namespace::new(
                "m",
                layout.with_layers([0], LayerShape { v_head_dim: 8, ..layout.layer_shape(0) }).unwrap(),
            ),
            Namespace::new("m", layout.with_layers([1], LayerShape::NONE).unwrap()),
            Namespace::new("m", KvLayout::opaque(64, 4).unwrap()),
            Namespace::new("m", KvLayout::opaque(64, 8).unwrap()),
            Namespace::new("m", KvLayout::opaque(128, 4).unwrap()),
        ];
        let mut ids: Vec<_> = others.iter().map(Namespace::id).chain([base.id()]).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), others.len() + 1);
    }

    #[test]
    fn ids_are_read_back_from_their_hexadecimal_digits_and_nothing_else_is() {
        let id = namespace().id();
        assert_eq!(id.to_string().parse::<NamespaceId>().unwrap(), id);
        let hash = namespace().block_hashes(&[1, 2, 3, 4]).unwrap()[0];
        assert_eq!(hash.to_string().parse::<BlockHash>().unwrap(), hash);
        assert_eq!(id.to_string().to_uppercase().parse::<NamespaceId>().unwrap(), id);
        for wrong in ["", "ab", &"g".repeat(64), &"ä".repeat(32), &format!("+{}", "0".repeat(63))] {
            let error = wrong.parse::<NamespaceId>().unwrap_err();
            assert!(error.to_string().contains("64 hexadecimal digits"), "{wrong}: {error}");
        }
    }

    /// "ab" + "c" and "a" + "bc" must not meet: fields are length-prefixed.
    #[test]
    fn fields_of_a_namespace_cannot_run_into_each_other() {
        let one = namespace().with_revision("ab").with_engine("c");
        let other = namespace().with_revision("a").with_engine("bc");
        assert_ne!(one.id(), other.id());
    }

    #[test]
    fn a_block_hash_covers_all_tokens_before_it_and_no_partial_block() {
        let namespace = namespace();
        let hashes = namespace.block_hashes(&[1, 2, 3, 4, 5, 6, 7, 8, 9]).unwrap();
        assert_eq!(hashes.len(), 2);
        let changed = namespace.block_hashes(&[9, 2, 3, 4, 5, 6, 7, 8]).unwrap();
        assert_ne!(hashes[1], changed[1]);
        assert_eq!(hashes[..1], namespace.block_hashes(&[1, 2, 3, 4, 9, 9, 9, 9]).unwrap()[..1]);
        assert!(matches!(namespace.block_hashes(&[]), Err(Error::EmptyTokens)));
    }

    /// The chain is a published format: other programs compute it too.
    #[test]
    fn a_block_hash_is_sha256_of_parent_and_little_endian_tokens() {
        let namespace = namespace();
        let mut hasher = Sha256::new();
        hasher.update(namespace.id().0);
        for token in [1u32, 2, 3, 0x0102_0304] {
            hasher.update(token.to_le_bytes());
        }
        let expected: [u8; 32] = hasher.finalize().into();
        let hashes = namespace.block_hashes(&[1, 2, 3, 0x0102_0304]).unwrap();
        assert_eq!(hashes[0].as_bytes(), &expected);
    }
}
