//! A prompt's blocks by name: hashed once, and then taken by every call of [`KvCache`](crate::KvCache).
//!
//! Invariant: every key covers its namespace. Hashes from outside, which an engine made by rules of its own, are
//! hashed again together with the namespace, so that two tenants whose engines make the same hash stay apart.
//! Looking such hashes up as they are was the alternative: then whoever knows a hash reads its block.

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::key::{BlockHash, Namespace, ObjectKey, TokenId};

/// The full blocks of a prompt, from its first token on.
///
/// ```
/// use kvkeep::{CacheConfig, Chain, DType, KvCache, KvLayout, Namespace};
///
/// let namespace = Namespace::new("my-model", KvLayout::new(2, 1, 4, DType::F32)?.with_block_tokens(2)?);
/// let chain = Chain::of(&namespace, &[11, 12, 13, 14, 15])?;
/// assert_eq!((chain.blocks(), chain.tokens()), (2, 5));
/// let cache = KvCache::new(CacheConfig::new(1 << 20))?;
/// assert_eq!(cache.lookup_chain(&chain).blocks(), 0);
/// # Ok::<(), kvkeep::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Chain {
    namespace: Namespace,
    keys: Vec<ObjectKey>,
    tokens: usize,
    /// For listeners; none unless they were given.
    token_ids: Vec<TokenId>,
}

impl Chain {
    /// The full blocks of `tokens`. A last partial block is not part of it.
    ///
    /// # Errors
    /// [`Error::EmptyTokens`] if there are no tokens at all.
    pub fn of(namespace: &Namespace, tokens: &[TokenId]) -> Result<Self> {
        let keys = namespace.keys(tokens)?;
        Ok(Self { namespace: namespace.clone(), keys, tokens: tokens.len(), token_ids: Vec::new() })
    }

    /// The same with its tokens, for a listener that wants to know them ([`EventSink`](crate::EventSink)) when its
    /// blocks are stored. Calls that take tokens do this themselves.
    #[must_use]
    pub fn with_token_ids(mut self, tokens: &[TokenId]) -> Self {
        self.token_ids = tokens.to_vec();
        self
    }

    /// Blocks that an engine has named by hashes of its own, in the order of the prompt. Each hash must cover all
    /// tokens before its block, as a chain of hashes does, and may have any length. The key is SHA-256 of the namespace
    /// and the hash.
    ///
    /// # Errors
    /// [`Error::EmptyTokens`] if there are no hashes at all.
    pub fn external<H: AsRef<[u8]>>(namespace: &Namespace, hashes: &[H]) -> Result<Self> {
        if hashes.is_empty() {
            return Err(Error::EmptyTokens);
        }
        let begin = Sha256::new_with_prefix(b"kvkeep external block 1").chain_update(namespace.root().as_bytes());
        let key = |hash: &H| ObjectKey::new(begin.clone().chain_update(hash).finalize().into(), 0);
        let tokens = hashes.len().saturating_mul(namespace.layout().block_tokens());
        let of_codec = |key: ObjectKey| namespace.codecs().fold(key, ObjectKey::through);
        let keys = hashes.iter().map(key).map(of_codec).collect();
        Ok(Self { namespace: namespace.clone(), keys, tokens, token_ids: Vec::new() })
    }

    /// The chain of `tokens`, which begin with the full blocks of this one: only the blocks behind those are hashed.
    /// What an answer adds to a prompt. Of a chain of tokens, not of one that is [`Chain::external`].
    #[must_use]
    pub fn continued(&self, tokens: &[TokenId]) -> Self {
        let mut chain = self.clone();
        chain.truncate(tokens.len() / self.namespace.layout().block_tokens());
        let behind =
            self.namespace.block_hashes_behind(chain.keys.last().map(ObjectKey::block_hash), tokens, chain.keys.len());
        chain.keys.extend(behind.into_iter().map(BlockHash::key));
        chain.tokens = tokens.len();
        if !self.token_ids.is_empty() {
            chain.token_ids = tokens.to_vec();
        }
        chain
    }

    /// The same blocks behind a lossy codec: as in [`Namespace::with_codec`].
    #[must_use]
    pub fn with_codec(mut self, codec: &str) -> Self {
        let namespace = self.namespace.clone().with_codec(codec);
        if namespace != self.namespace {
            self.keys.iter_mut().for_each(|key| *key = key.through(codec));
            self.namespace = namespace;
        }
        self
    }

    /// What the blocks belong to.
    #[must_use]
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Full blocks.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.keys.len()
    }

    /// Tokens of the whole prompt, with those of a last partial block.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// The names under which the blocks are kept, in order.
    pub fn hashes(&self) -> impl ExactSizeIterator<Item = BlockHash> {
        self.keys.iter().map(ObjectKey::block_hash)
    }

    /// The same without what lies behind the first `blocks` blocks.
    pub fn truncate(&mut self, blocks: usize) {
        if blocks < self.keys.len() {
            self.keys.truncate(blocks);
            self.tokens = blocks * self.namespace.layout().block_tokens();
        }
    }

    pub(crate) fn keys(&self) -> &[ObjectKey] {
        &self.keys
    }

    /// The blocks from this one on, each with its tokens if they were given.
    pub(crate) fn blocks_from(&self, first: usize) -> impl Iterator<Item = (BlockHash, &[TokenId])> {
        let block_tokens = self.namespace.layout().block_tokens();
        let tokens = self.token_ids.chunks_exact(block_tokens).map(Some).chain(std::iter::repeat(None));
        let blocks = self.keys.iter().zip(tokens).skip(first);
        blocks.map(|(key, tokens)| (key.block_hash(), tokens.unwrap_or_default()))
    }

    /// The block before this one.
    pub(crate) fn before(&self, block: usize) -> Option<BlockHash> {
        block.checked_sub(1).and_then(|before| self.keys.get(before)).map(ObjectKey::block_hash)
    }
}

/// Equal chains name the same blocks of a prompt, whether their tokens were given or not.
impl PartialEq for Chain {
    fn eq(&self, other: &Self) -> bool {
        (&self.namespace, &self.keys, self.tokens) == (&other.namespace, &other.keys, other.tokens)
    }
}

impl Eq for Chain {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::KvLayout;
    use crate::tensor::DType;

    fn namespace() -> Namespace {
        Namespace::new("m", KvLayout::new(2, 1, 4, DType::F16).unwrap().with_block_tokens(4).unwrap())
    }

    #[test]
    fn a_chain_of_tokens_has_the_published_hashes_of_its_full_blocks() {
        let tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9];
        let mut chain = Chain::of(&namespace(), &tokens).unwrap();
        assert_eq!(chain.hashes().collect::<Vec<_>>(), namespace().block_hashes(&tokens).unwrap());
        assert_eq!((chain.blocks(), chain.tokens()), (2, 9));
        chain.truncate(2);
        assert_eq!(chain.tokens(), 9);
        chain.truncate(1);
        assert_eq!((chain.blocks(), chain.tokens()), (1, 4));
        assert!(matches!(Chain::of(&namespace(), &[]), Err(Error::EmptyTokens)));
    }

    #[test]
    fn a_chain_that_goes_on_is_that_of_all_its_tokens() {
        let tokens: Vec<u32> = (0..23).collect();
        let whole = Chain::of(&namespace(), &tokens).unwrap();
        for begin in [1, 4, 9, 20, 23] {
            assert_eq!(Chain::of(&namespace(), &tokens[..begin]).unwrap().continued(&tokens), whole);
        }
        assert_eq!(whole.continued(&tokens[..9]), Chain::of(&namespace(), &tokens[..9]).unwrap());
    }

    /// Whoever asks with the namespace of a codec and whoever has a chain already must find the same blocks.
    #[test]
    fn a_chain_behind_a_codec_is_that_of_the_namespace_behind_it() {
        let tokens: Vec<u32> = (0..23).collect();
        let lossy = namespace().with_codec("int4").with_codec("fp8");
        let whole = Chain::of(&namespace(), &tokens).unwrap();
        let behind = whole.clone().with_codec("int4").with_codec("fp8");
        assert_eq!(behind, Chain::of(&lossy, &tokens).unwrap());
        assert_eq!(behind, behind.clone().with_codec("int4"), "once");
        for begin in [1, 4, 9, 20, 23] {
            assert_eq!(Chain::of(&lossy, &tokens[..begin]).unwrap().continued(&tokens), behind);
        }
        let hashes = [[7; 32], [8; 32]];
        let external = |namespace: &Namespace| Chain::external(namespace, &hashes).unwrap();
        assert_eq!(external(&namespace()).with_codec("int4").with_codec("fp8"), external(&lossy));
        let all = [whole, behind, external(&namespace()), external(&lossy)];
        let mut names: Vec<_> = all.iter().flat_map(Chain::hashes).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), 5 + 5 + 2 + 2);
    }

    /// Two tenants' engines make equal hashes of equal tokens.
    #[test]
    fn the_same_external_hash_names_another_block_in_another_namespace() {
        let other = namespace().with_salt("other");
        let hashes = [[7; 32], [8; 32]];
        let [one, two] = [namespace(), other].map(|namespace| Chain::external(&namespace, &hashes).unwrap());
        assert!(one.hashes().zip(two.hashes()).all(|(one, two)| one != two));
        assert!(one.hashes().zip(hashes).all(|(key, hash)| *key.as_bytes() != hash));
        assert_eq!((one.blocks(), one.tokens()), (2, 8));
        assert!(matches!(Chain::external::<[u8; 32]>(&namespace(), &[]), Err(Error::EmptyTokens)));
    }

    /// A block of eight tokens has as many bytes as a hash: neither may stand for the other.
    #[test]
    fn an_external_hash_that_looks_like_tokens_is_not_a_block_of_tokens() {
        let namespace = Namespace::new("m", KvLayout::new(2, 1, 4, DType::F16).unwrap().with_block_tokens(8).unwrap());
        let by_tokens = Chain::of(&namespace, &[0x0707_0707; 8]).unwrap();
        let by_hash = Chain::external(&namespace, &[[7; 32]]).unwrap();
        assert_ne!(by_tokens.hashes().next(), by_hash.hashes().next());
    }
}
