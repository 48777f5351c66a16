//! The KV of one sequence, in the engine's own hands.
//!
//! `f16`, for each layer `[token][kv_head][head_dim]`, K after RoPE: the order of
//! `kvkeep`'s `TokenHeadDim`, so nothing is transposed on the way in or out. All memory
//! is reserved at once and touched as it fills; a buffer is meant to be used again,
//! because fresh pages cost more than copying a cached prefix into old ones.
//!
//! Beside them lies a second copy of K, `[tile][kv_head][head_dim][64]`, which attention
//! reads: transposing every tile again in every step made decoding at 1,024 tokens a third
//! slower. It is brought up to date before each pass, so imports need not know of it.

use std::ops::Range;

use half::f16;
use kvkeep::{LayerView, LayerViewMut, Match, TensorView, TensorViewMut};
use rayon::prelude::*;

use crate::config::Config;
use crate::error::{EngineError, Result};
use crate::simd::{Kernels, TILE_KEYS, Transpose};

/// KV of up to `capacity` tokens. The default one has room for none and fits no model.
#[derive(Debug, Clone, Default)]
pub struct KvBuffer {
    layers: Vec<LayerKv>,
    len: usize,
    /// Tokens whose keys are in every layer's tiles; changed by a pass only.
    tiled: usize,
    capacity: usize,
    kv_heads: usize,
    head_dim: usize,
}

/// K and V of one layer: `capacity * kv_heads * head_dim` elements each.
#[derive(Debug, Clone)]
pub(crate) struct LayerKv {
    pub(crate) k: Vec<f16>,
    pub(crate) v: Vec<f16>,
    /// K again, transposed within tiles of 64 tokens.
    pub(crate) tiles: Vec<f16>,
}

impl KvBuffer {
    pub(crate) fn new(config: &Config, capacity: usize) -> Result<Self> {
        if capacity == 0 || capacity > config.context {
            return Err(EngineError::BadCapacity { capacity, context: config.context });
        }
        let elements = capacity * config.kv_dim();
        let zeros = |elements| vec![f16::ZERO; elements];
        let tiles = capacity.next_multiple_of(TILE_KEYS) * config.kv_dim();
        let layer = || LayerKv { k: zeros(elements), v: zeros(elements), tiles: zeros(tiles) };
        let layers = (0..config.layers).map(|_| layer()).collect();
        Ok(Self { layers, len: 0, tiled: 0, capacity, kv_heads: config.kv_heads, head_dim: config.head_dim })
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
        self.tiled = self.tiled.min(tokens);
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
        (self.len, self.tiled) = (tokens, 0);
        let dims = [tokens, self.kv_heads, self.head_dim];
        let elements = tokens * self.kv_heads * self.head_dim;
        self.layers.iter_mut().map(|layer| layer.view_mut(elements, &dims)).collect()
    }

    /// Replaces what is in the buffer by the KV of a match, layers side by side on rayon's
    /// threads, and each layer's tiles while its keys are in the caches.
    pub(crate) fn load(&mut self, found: &Match, kernels: Kernels) -> Result<()> {
        let tokens = found.cached_tokens();
        self.check_room(tokens)?;
        self.truncate(0);
        let (heads, head_dim) = (self.kv_heads, self.head_dim);
        let (dims, elements) = ([tokens, heads, head_dim], tokens * heads * head_dim);
        self.layers.par_iter_mut().enumerate().try_for_each(|(index, layer)| {
            found.load(index..index + 1, &mut [layer.view_mut(elements, &dims)?])?;
            layer.tile(kernels, 0..tokens, heads, head_dim);
            Ok::<(), EngineError>(())
        })?;
        (self.len, self.tiled) = (tokens, tokens);
        Ok(())
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

    pub(crate) fn layer(&self, layer: usize) -> Option<&LayerKv> {
        self.layers.get(layer)
    }

    pub(crate) fn layers_mut(&mut self) -> &mut [LayerKv] {
        &mut self.layers
    }

    /// Counts tokens whose KV all layers have got, without tiles.
    pub(crate) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }

    /// Counts tokens whose KV and tiles all layers have got.
    pub(crate) fn advance_tiled(&mut self, tokens: usize) {
        self.len += tokens;
        self.tiled = self.len;
    }

    /// Brings the tiles of imported KV up to date.
    pub(crate) fn tile_imported(&mut self, kernels: Kernels) {
        let (range, heads, head_dim) = (self.tiled..self.len, self.kv_heads, self.head_dim);
        if !range.is_empty() {
            self.layers.par_iter_mut().for_each(|layer| layer.tile(kernels, range.clone(), heads, head_dim));
            self.tiled = self.len;
        }
    }
}

impl LayerKv {
    /// The first `elements` of K and V, to be written.
    fn view_mut(&mut self, elements: usize, dims: &[usize]) -> Result<LayerViewMut<'_>> {
        let k = self.k.get_mut(..elements).unwrap_or_default();
        let v = self.v.get_mut(..elements).unwrap_or_default();
        Ok(LayerViewMut { k: TensorViewMut::of(k, dims)?, v: TensorViewMut::of(v, dims)? })
    }

    /// Copies the keys of these tokens to their tiles.
    pub(crate) fn tile(&mut self, kernels: Kernels, tokens: Range<usize>, heads: usize, head_dim: usize) {
        let (kv_dim, head_len) = (heads * head_dim, head_dim * TILE_KEYS);
        let first = tokens.start / TILE_KEYS;
        let tiles = self.tiles.chunks_exact_mut(TILE_KEYS * kv_dim).enumerate().skip(first);
        for (tile, to) in tiles.take(tokens.end.div_ceil(TILE_KEYS) - first) {
            let begin = tile * TILE_KEYS;
            let (from, end) = (tokens.start.max(begin), tokens.end.min(begin + TILE_KEYS));
            let keys = self.k.get(from * kv_dim..end * kv_dim).unwrap_or_default();
            for (head, to) in to.chunks_exact_mut(head_len).enumerate() {
                let shape =
                    Transpose { rows: end - from, columns: head_dim, from_stride: kv_dim, to_stride: TILE_KEYS };
                let keys = keys.get(head * head_dim..).unwrap_or_default();
                kernels.transpose(keys, to.get_mut(from - begin..).unwrap_or_default(), &shape);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_hold_each_key_once_whatever_the_order_they_came_in() {
        let (heads, head_dim, tokens) = (2, 16, 150);
        let key = |i: usize| f16::from_f32(i as f32);
        let k: Vec<f16> = (0..tokens * heads * head_dim).map(|i| key(i % 2039)).collect();
        let mut layer = LayerKv { v: Vec::new(), tiles: vec![f16::NAN; 192 * heads * head_dim], k };
        for range in [0..10, 10..11, 11..70, 70..128, 128..150] {
            layer.tile(Kernels::detect(), range, heads, head_dim);
        }
        for token in 0..tokens {
            for at in 0..heads * head_dim {
                let tiled = layer.tiles[(token / 64 * heads * head_dim + at) * 64 + token % 64];
                assert_eq!(tiled, layer.k[token * heads * head_dim + at]);
            }
        }
    }
}
