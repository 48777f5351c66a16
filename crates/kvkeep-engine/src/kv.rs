//! The KV of one sequence, in the engine's own hands.
//!
//! `f16`, for each layer `[token][kv_head][head_dim]`, K after RoPE: the order of
//! `kvkeep`'s `TokenHeadDim`, so nothing is transposed on the way in or out. All memory
//! is reserved at once and touched as it fills; a buffer is meant to be used again,
//! because fresh pages cost more than copying a cached prefix into old ones.

use half::f16;
use kvkeep::{LayerView, LayerViewMut, TensorView, TensorViewMut};

use crate::config::Config;
use crate::error::{EngineError, Result};

/// KV of up to `capacity` tokens.
#[derive(Debug, Clone)]
pub struct KvBuffer {
    layers: Vec<LayerKv>,
    len: usize,
    capacity: usize,
    kv_heads: usize,
    head_dim: usize,
}

/// K and V of one layer: `capacity * kv_heads * head_dim` elements each.
#[derive(Debug, Clone)]
pub(crate) struct LayerKv {
    pub(crate) k: Vec<f16>,
    pub(crate) v: Vec<f16>,
}

impl KvBuffer {
    pub(crate) fn new(config: &Config, capacity: usize) -> Result<Self> {
        if capacity == 0 || capacity > config.context {
            return Err(EngineError::BadCapacity { capacity, context: config.context });
        }
        let elements = capacity * config.kv_dim();
        let layer = || LayerKv { k: vec![f16::ZERO; elements], v: vec![f16::ZERO; elements] };
        let layers = (0..config.layers).map(|_| layer()).collect();
        Ok(Self { layers, len: 0, capacity, kv_heads: config.kv_heads, head_dim: config.head_dim })
    }

    /// Tokens whose KV is in the buffer.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Is there no KV in the buffer?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Tokens that fit.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets the KV of all tokens from `tokens` on.
    pub fn truncate(&mut self, tokens: usize) {
        self.len = self.len.min(tokens);
    }

    /// K and V of every layer, `[len, kv_heads, head_dim]` each, borrowed.
    ///
    /// # Errors
    /// Never for a buffer made by an engine; the signature is that of the views.
    pub fn views(&self) -> Result<Vec<LayerView<'_>>> {
        self.views_from(0)
    }

    /// K and V of every layer from token `first` on, `[len - first, kv_heads, head_dim]` each.
    ///
    /// # Errors
    /// As [`KvBuffer::views`].
    pub fn views_from(&self, first: usize) -> Result<Vec<LayerView<'_>>> {
        let first = first.min(self.len);
        let dims = [self.len - first, self.kv_heads, self.head_dim];
        let row = self.kv_heads * self.head_dim;
        self.layers
            .iter()
            .map(|layer| {
                let k = layer.k.get(first * row..self.len * row).unwrap_or_default();
                let v = layer.v.get(first * row..self.len * row).unwrap_or_default();
                Ok(LayerView { k: TensorView::of(k, &dims)?, v: TensorView::of(v, &dims)? })
            })
            .collect()
    }

    /// Sets the length to `tokens` and returns K and V of every layer, `[tokens, kv_heads,
    /// head_dim]` each, to be written: KV of the same model from a cache. What is not
    /// written is what the buffer held before, so write all of it.
    ///
    /// # Errors
    /// [`EngineError::ContextOverflow`] if they do not fit.
    pub fn import(&mut self, tokens: usize) -> Result<Vec<LayerViewMut<'_>>> {
        self.check_room(tokens)?;
        self.len = tokens;
        let dims = [tokens, self.kv_heads, self.head_dim];
        let elements = tokens * self.kv_heads * self.head_dim;
        self.layers
            .iter_mut()
            .map(|layer| {
                let k = layer.k.get_mut(..elements).unwrap_or_default();
                let v = layer.v.get_mut(..elements).unwrap_or_default();
                Ok(LayerViewMut { k: TensorViewMut::of(k, &dims)?, v: TensorViewMut::of(v, &dims)? })
            })
            .collect()
    }

    pub(crate) fn fits(&self, config: &Config) -> bool {
        self.layers.len() == config.layers && self.kv_heads == config.kv_heads && self.head_dim == config.head_dim
    }

    pub(crate) fn check_room(&self, tokens: usize) -> Result<()> {
        if tokens > self.capacity {
            return Err(EngineError::ContextOverflow { tokens, capacity: self.capacity });
        }
        Ok(())
    }

    pub(crate) fn layers_mut(&mut self) -> &mut [LayerKv] {
        &mut self.layers
    }

    /// Counts tokens whose KV all layers have got.
    pub(crate) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }
}
