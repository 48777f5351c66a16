//! What KV belongs to, and the chain of hashes of a prompt in it.
//!
//! Invariant: whatever is added here changes the identity only of namespaces that say it; so caches of older releases stay
//! warm. A version in every identity was the alternative: each release would begin cold.

use sha2::{Digest, Sha256};

use super::{BlockHash, NamespaceId, ObjectKey, TokenId, through};
use crate::error::{Error, Result};
use crate::layout::{KvLayout, TokenOrder};

/// What KV belongs to: model, revision, layout and dtype, LoRA, tenant, and the
/// engine that computed it. Two namespaces see nothing of each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespace {
    model: String,
    revision: String,
    engine: String,
    lora: String,
    salt: String,
    /// Names of lossy codecs, joined by `+`.
    codec: String,
    layout: KvLayout,
    /// Without the codec.
    root: NamespaceId,
    id: NamespaceId,
}

impl Namespace {
    /// The namespace of a model, by the name its users know it by, and a layout.
    #[must_use]
    pub fn new(model: impl Into<String>, layout: KvLayout) -> Self {
        Self {
            model: model.into(),
            revision: String::new(),
            engine: String::new(),
            lora: String::new(),
            salt: String::new(),
            codec: String::new(),
            layout,
            root: NamespaceId([0; 32]),
            id: NamespaceId([0; 32]),
        }
        .identified()
    }

    /// The model's exact revision: a commit, or a digest of its weights.
    #[must_use]
    pub fn with_revision(mut self, revision: impl Into<String>) -> Self {
        self.revision = revision.into();
        self.identified()
    }

    /// What computed the KV, as far as its bits depend on it: engine, kernels,
    /// prefill grid, precision.
    #[must_use]
    pub fn with_engine(mut self, engine: impl Into<String>) -> Self {
        self.engine = engine.into();
        self.identified()
    }

    /// The LoRA adapter in use.
    #[must_use]
    pub fn with_lora(mut self, lora: impl Into<String>) -> Self {
        self.lora = lora.into();
        self.identified()
    }

    /// A tenant's salt: whoever does not know it can neither read the tenant's blocks
    /// nor find out whether they exist.
    #[must_use]
    pub fn with_salt(mut self, salt: impl Into<String>) -> Self {
        self.salt = salt.into();
        self.identified()
    }

    /// Of KV that a lossy codec of this name may have changed, and of KV that was computed behind such: it is not what
    /// the model computes. [`KvCache`](crate::KvCache) says so by itself where one of its tiers has such a codec.
    #[must_use]
    pub fn with_codec(mut self, codec: &str) -> Self {
        if !codec.is_empty() && self.codecs().all(|other| other != codec) {
            self.codec = self.codecs().chain([codec]).collect::<Vec<_>>().join("+");
        }
        self.identified()
    }

    /// The lossy codecs that may have changed it, joined by `+`; empty for none.
    #[must_use]
    pub fn codec(&self) -> &str {
        &self.codec
    }

    /// The model's name.
    #[must_use]
    pub fn model(&self) -> &str {
        &self.model
    }

    /// The layout of every block in this namespace.
    #[must_use]
    pub fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// The namespace's identity.
    #[must_use]
    pub fn id(&self) -> NamespaceId {
        self.id
    }

    /// The hashes of the full blocks of `tokens`, in order. A last partial block has none.
    ///
    /// # Errors
    /// [`Error::EmptyTokens`] if there are no tokens at all.
    pub fn block_hashes(&self, tokens: &[TokenId]) -> Result<Vec<BlockHash>> {
        if tokens.is_empty() {
            return Err(Error::EmptyTokens);
        }
        Ok(self.block_hashes_behind(None, tokens, 0).collect())
    }

    /// The keys of the full blocks of `tokens`.
    pub(crate) fn keys(&self, tokens: &[TokenId]) -> Result<Vec<ObjectKey>> {
        if tokens.is_empty() {
            return Err(Error::EmptyTokens);
        }
        Ok(self.block_hashes_behind(None, tokens, 0).map(BlockHash::key).collect())
    }

    /// The hashes of the full blocks of `tokens` behind the first `known`, of which the last one is `parent`.
    pub(crate) fn block_hashes_behind(
        &self,
        parent: Option<BlockHash>,
        tokens: &[TokenId],
        known: usize,
    ) -> impl Iterator<Item = BlockHash> {
        // Behind a codec's hash, which is one of a block's hash, no chain goes on.
        let parent = parent.filter(|_| self.codec.is_empty());
        let skipped = if parent.is_some() { known } else { 0 };
        let mut parent = parent.unwrap_or(BlockHash(self.root.0));
        let blocks = tokens.chunks_exact(self.layout.block_tokens()).skip(skipped);
        let hashes = blocks.map(move |block| {
            parent = parent.child(block);
            parent
        });
        let of_codec = |hash: BlockHash| if self.codec.is_empty() { hash } else { self.of_codecs(hash) };
        hashes.skip(known - skipped).map(of_codec)
    }

    fn of_codecs(&self, hash: BlockHash) -> BlockHash {
        self.codecs().fold(hash, |hash, codec| BlockHash(through(&hash.0, codec)))
    }

    pub(crate) fn codecs(&self) -> impl Iterator<Item = &str> {
        self.codec.split('+').filter(|codec| !codec.is_empty())
    }

    /// Its identity without a codec.
    pub(crate) fn root(&self) -> NamespaceId {
        self.root
    }

    fn identified(mut self) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(b"kvkeep namespace 1");
        for field in [&self.model, &self.revision, &self.engine, &self.lora, &self.salt] {
            hasher.update((field.len() as u64).to_le_bytes());
            hasher.update(field);
        }
        let layout = &self.layout;
        for number in
            [layout.layers(), layout.kv_heads(), layout.k_head_dim(), layout.v_head_dim(), layout.block_tokens()]
        {
            hasher.update((number as u64).to_le_bytes());
        }
        hasher.update(layout.dtype().name());
        hasher.update(match layout.order() {
            TokenOrder::TokenHeadDim => b"thd",
            TokenOrder::HeadTokenDim => b"htd",
        });
        if layout.is_opaque() {
            hasher.update(b"opaque");
        }
        // One shape for all layers says no more: so its namespaces are those of releases that knew no other.
        if !layout.is_uniform() {
            for layer in (0..layout.layers()).map(|layer| layout.layer_shape(layer)) {
                for number in [layer.kv_heads, layer.k_head_dim, layer.v_head_dim] {
                    hasher.update(u64::from(number).to_le_bytes());
                }
            }
        }
        self.root = NamespaceId(hasher.finalize().into());
        // So without a codec it is as in releases that knew none.
        self.id = self.codecs().fold(self.root, NamespaceId::through);
        self
    }
}

impl From<&Namespace> for NamespaceId {
    fn from(namespace: &Namespace) -> Self {
        namespace.id
    }
}
