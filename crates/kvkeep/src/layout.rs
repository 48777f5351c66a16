//! The shape of a block's payload, and the copies between blocks and an engine's
//! tensors.
//!
//! A payload is `[layer][k|v][token][kv_head][head_dim]` or
//! `[layer][k|v][kv_head][token][head_dim]`. The namespace picks the order its
//! engine uses, so that a layer's K (or V) of a block is one contiguous slice and
//! no copy transposes. One order for all engines was the alternative: it makes
//! every load of the other half of them a transposition.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::tensor::{DType, Shape, TensorView, TensorViewMut};

/// Tokens in a block unless said otherwise.
pub const DEFAULT_BLOCK_TOKENS: u32 = 64;

/// Which index runs outside the other inside one layer's K or V.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum TokenOrder {
    /// `[token][kv_head][head_dim]`: new tokens are appended at the end.
    #[default]
    TokenHeadDim,
    /// `[kv_head][token][head_dim]`: what transformers' caches use.
    HeadTokenDim,
}

/// Shape of the KV of one block: all layers, K and V.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct KvLayout {
    layers: u32,
    kv_heads: u32,
    k_head_dim: u32,
    v_head_dim: u32,
    dtype: DType,
    block_tokens: u32,
    order: TokenOrder,
}

/// K and V of one layer, each `[tokens, kv_heads, head_dim]` or
/// `[kv_heads, tokens, head_dim]` as the layout orders them.
#[derive(Debug, Clone, Copy)]
pub struct LayerView<'a> {
    /// The keys.
    pub k: TensorView<'a>,
    /// The values.
    pub v: TensorView<'a>,
}

/// K and V of one layer to be written into; shapes as in [`LayerView`].
#[derive(Debug)]
pub struct LayerViewMut<'a> {
    /// The keys.
    pub k: TensorViewMut<'a>,
    /// The values.
    pub v: TensorViewMut<'a>,
}

/// The two tensors of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    K,
    V,
}

impl KvLayout {
    /// A layout with K and V of the same `head_dim`, [`DEFAULT_BLOCK_TOKENS`] tokens a
    /// block and [`TokenOrder::TokenHeadDim`].
    ///
    /// # Errors
    /// [`Error::Layout`] if a dimension is zero, [`Error::SizeOverflow`] if a block
    /// would not fit 4 GiB.
    pub fn new(layers: u32, kv_heads: u32, head_dim: u32, dtype: DType) -> Result<Self> {
        Self {
            layers,
            kv_heads,
            k_head_dim: head_dim,
            v_head_dim: head_dim,
            dtype,
            block_tokens: DEFAULT_BLOCK_TOKENS,
            order: TokenOrder::default(),
        }
        .checked()
    }

    /// The same with another `head_dim` for V.
    ///
    /// # Errors
    /// As [`KvLayout::new`].
    pub fn with_v_head_dim(mut self, v_head_dim: u32) -> Result<Self> {
        self.v_head_dim = v_head_dim;
        self.checked()
    }

    /// The same with blocks of `block_tokens` tokens.
    ///
    /// # Errors
    /// As [`KvLayout::new`].
    pub fn with_block_tokens(mut self, block_tokens: u32) -> Result<Self> {
        self.block_tokens = block_tokens;
        self.checked()
    }

    /// The same in another order of tokens and heads.
    #[must_use]
    pub fn with_order(mut self, order: TokenOrder) -> Self {
        self.order = order;
        self
    }

    /// Number of layers.
    #[must_use]
    pub fn layers(&self) -> usize {
        self.layers as usize
    }

    /// Key/value heads of each layer.
    #[must_use]
    pub fn kv_heads(&self) -> usize {
        self.kv_heads as usize
    }

    /// Elements of one head's K.
    #[must_use]
    pub fn k_head_dim(&self) -> usize {
        self.k_head_dim as usize
    }

    /// Elements of one head's V.
    #[must_use]
    pub fn v_head_dim(&self) -> usize {
        self.v_head_dim as usize
    }

    /// Element type of K and V.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Tokens in a block.
    #[must_use]
    pub fn block_tokens(&self) -> usize {
        self.block_tokens as usize
    }

    /// Order of tokens and heads.
    #[must_use]
    pub fn order(&self) -> TokenOrder {
        self.order
    }

    /// Bytes of one block: all layers, K and V.
    #[must_use]
    pub fn block_bytes(&self) -> usize {
        self.layers() * self.layer_bytes()
    }

    /// Bytes of one token: all layers, K and V.
    #[must_use]
    pub fn token_bytes(&self) -> usize {
        self.block_bytes() / self.block_tokens()
    }

    /// The shape of one layer's K of `tokens` tokens.
    ///
    /// # Errors
    /// Never for shapes this small; the signature is [`Shape::new`]'s.
    pub fn k_shape(&self, tokens: usize) -> Result<Shape> {
        self.shape(Side::K, tokens)
    }

    /// The shape of one layer's V of `tokens` tokens.
    ///
    /// # Errors
    /// As [`KvLayout::k_shape`].
    pub fn v_shape(&self, tokens: usize) -> Result<Shape> {
        self.shape(Side::V, tokens)
    }

    pub(crate) fn shape(&self, side: Side, tokens: usize) -> Result<Shape> {
        match self.order {
            TokenOrder::TokenHeadDim => Shape::new(&[tokens, self.kv_heads(), self.dim(side)]),
            TokenOrder::HeadTokenDim => Shape::new(&[self.kv_heads(), tokens, self.dim(side)]),
        }
    }

    /// Where one layer's K or V lies in a block's payload.
    pub(crate) fn range(&self, layer: usize, side: Side) -> Range<usize> {
        let k_bytes = self.side_bytes(Side::K);
        let start = layer * self.layer_bytes();
        match side {
            Side::K => start..start + k_bytes,
            Side::V => start + k_bytes..start + self.layer_bytes(),
        }
    }

    /// Refuses a layer range that the layout does not have.
    pub(crate) fn check_layers(&self, layers: &Range<usize>) -> Result<()> {
        if layers.is_empty() {
            return Err(Error::ZeroLayers);
        }
        if layers.end > self.layers() {
            return Err(Error::LayerOutOfRange { layer: layers.end - 1, layers: self.layers() });
        }
        Ok(())
    }

    /// Refuses a tensor that is not one layer's K or V of at least `min_tokens` tokens;
    /// says how many tokens it has.
    pub(crate) fn check_tensor(
        &self,
        view: &TensorView<'_>,
        side: Side,
        layer: usize,
        min_tokens: usize,
    ) -> Result<usize> {
        let tensor = || format!("{} of layer {layer}", if side == Side::K { "k" } else { "v" });
        if view.dtype() != self.dtype {
            let (expected, got) = (self.dtype, view.dtype());
            return Err(Error::DTypeMismatch { tensor: tensor(), expected, got });
        }
        let shape = view.shape();
        let tokens = match (self.order, shape.dims()) {
            (TokenOrder::TokenHeadDim, &[tokens, heads, dim]) | (TokenOrder::HeadTokenDim, &[heads, tokens, dim])
                if heads == self.kv_heads() && dim == self.dim(side) && tokens >= min_tokens =>
            {
                tokens
            }
            _ => {
                let expected = format!("{} with at least {min_tokens} tokens", self.expected(side));
                return Err(Error::ShapeMismatch { tensor: tensor(), expected, got: shape });
            }
        };
        Ok(tokens)
    }

    /// Copies one block's slice of a layer's K or V between the payload and an engine
    /// tensor: `tensor_tokens` is that tensor's own number of tokens (its stride),
    /// `at_token` where the block begins in it. `copy` gets (range in the payload slice,
    /// range in the tensor) for each contiguous run.
    pub(crate) fn each_run(
        &self,
        side: Side,
        tensor_tokens: usize,
        at_token: usize,
        mut copy: impl FnMut(Range<usize>, Range<usize>),
    ) {
        let row_bytes = self.dim(side) * self.dtype.size_bytes();
        let (runs, run_tokens_bytes, stride, start) = match self.order {
            TokenOrder::TokenHeadDim => {
                let token_bytes = row_bytes * self.kv_heads();
                (1, token_bytes * self.block_tokens(), 0, at_token * token_bytes)
            }
            TokenOrder::HeadTokenDim => {
                let run = row_bytes * self.block_tokens();
                (self.kv_heads(), run, tensor_tokens * row_bytes, at_token * row_bytes)
            }
        };
        for run in 0..runs {
            let (from, to) = (run * run_tokens_bytes, start + run * stride);
            copy(from..from + run_tokens_bytes, to..to + run_tokens_bytes);
        }
    }

    fn dim(&self, side: Side) -> usize {
        match side {
            Side::K => self.k_head_dim(),
            Side::V => self.v_head_dim(),
        }
    }

    fn side_bytes(&self, side: Side) -> usize {
        self.block_tokens() * self.kv_heads() * self.dim(side) * self.dtype.size_bytes()
    }

    fn layer_bytes(&self) -> usize {
        self.side_bytes(Side::K) + self.side_bytes(Side::V)
    }

    fn expected(&self, side: Side) -> String {
        let (heads, dim) = (self.kv_heads, self.dim(side));
        match self.order {
            TokenOrder::TokenHeadDim => format!("[tokens, {heads}, {dim}]"),
            TokenOrder::HeadTokenDim => format!("[{heads}, tokens, {dim}]"),
        }
    }

    fn checked(self) -> Result<Self> {
        for (name, value) in [
            ("layers", self.layers),
            ("kv_heads", self.kv_heads),
            ("k_head_dim", self.k_head_dim),
            ("v_head_dim", self.v_head_dim),
            ("block_tokens", self.block_tokens),
        ] {
            if value == 0 {
                return Err(Error::Layout(format!("{name} is 0: it must be at least 1")));
            }
        }
        let head_dims = u64::from(self.k_head_dim) + u64::from(self.v_head_dim);
        [self.layers, self.kv_heads, self.block_tokens]
            .iter()
            .try_fold(head_dims * self.dtype.size_bytes() as u64, |bytes, factor| bytes.checked_mul(u64::from(*factor)))
            .and_then(|bytes| u32::try_from(bytes).ok())
            .map(|_| self)
            .ok_or(Error::SizeOverflow("the size of a block (at most 4 GiB)"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layout_without_size_or_beyond_4_gib_a_block_is_refused() {
        assert!(matches!(KvLayout::new(0, 3, 64, DType::F16), Err(Error::Layout(_))));
        assert!(matches!(KvLayout::new(30, 3, 0, DType::F16), Err(Error::Layout(_))));
        assert!(matches!(KvLayout::new(u32::MAX, u32::MAX, u32::MAX, DType::F32), Err(Error::SizeOverflow(_))));
        let layout = KvLayout::new(30, 3, 64, DType::F16).unwrap();
        assert!(matches!(layout.with_block_tokens(0), Err(Error::Layout(_))));
        assert_eq!(layout.block_bytes(), 30 * 2 * 64 * 3 * 64 * 2);
        assert_eq!(layout.token_bytes() * 64, layout.block_bytes());
    }

    #[test]
    fn the_ranges_of_a_payload_tile_it_without_gap_or_overlap() {
        let layout = KvLayout::new(3, 2, 4, DType::F16).unwrap().with_v_head_dim(6).unwrap();
        let mut end = 0;
        for layer in 0..3 {
            for side in [Side::K, Side::V] {
                let range = layout.range(layer, side);
                assert_eq!(range.start, end);
                end = range.end;
            }
        }
        assert_eq!(end, layout.block_bytes());
    }
}
