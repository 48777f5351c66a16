//! The shape of a block's payload, and the copies between blocks and an engine's
//! tensors.
//!
//! A payload is `[layer][k|v][token][kv_head][head_dim]` or
//! `[layer][k|v][kv_head][token][head_dim]`. The namespace picks the order its
//! engine uses, so that a layer's K (or V) of a block is one contiguous slice and
//! no copy transposes. One order for all engines was the alternative: it makes
//! every load of the other half of them a transposition.
//!
//! Layers may differ in shape, have one tensor instead of two, or none; and a payload may be opaque: bytes of an
//! engine's own, without layers. A list of shapes of any length was the alternative: a record's header has no room for it.

mod checks;
mod frames;
mod shapes;

use std::ops::Range;

use crate::error::Result;
use crate::tensor::{DType, Shape, TensorView, TensorViewMut};

pub use frames::Frame;
pub use shapes::LayerShape;
pub(crate) use shapes::{Kinds, SHAPES};

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
    /// The usual shape first, then up to two others.
    shapes: [LayerShape; SHAPES],
    kinds: Kinds,
    dtype: DType,
    block_tokens: u32,
    order: TokenOrder,
    /// Are blocks bytes without layers, as many as `k_head_dim` says?
    is_opaque: bool,
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

impl<'a> LayerView<'a> {
    /// Of a layer with one tensor only: its V has no elements.
    ///
    /// # Errors
    /// As [`TensorView::new`], never for three dimensions.
    pub fn latent(k: TensorView<'a>) -> Result<Self> {
        let mut dims = k.shape().dims().to_vec();
        dims.last_mut().into_iter().for_each(|dim| *dim = 0);
        Ok(Self { k, v: TensorView::new(k.dtype(), &dims, &[])? })
    }
}

/// K and V of one layer to be written into; shapes as in [`LayerView`].
#[derive(Debug)]
pub struct LayerViewMut<'a> {
    /// The keys.
    pub k: TensorViewMut<'a>,
    /// The values.
    pub v: TensorViewMut<'a>,
}

impl<'a> LayerViewMut<'a> {
    /// Of a layer with one tensor only: its V has no elements.
    ///
    /// # Errors
    /// As [`TensorViewMut::new`], never for three dimensions.
    pub fn latent(k: TensorViewMut<'a>) -> Result<Self> {
        let (dtype, mut dims) = (k.as_view().dtype(), k.as_view().shape().dims().to_vec());
        dims.last_mut().into_iter().for_each(|dim| *dim = 0);
        Ok(Self { k, v: TensorViewMut::new(dtype, &dims, &mut [])? })
    }
}

/// The two tensors of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// The keys.
    K,
    /// The values.
    V,
}

impl KvLayout {
    /// A layout with K and V of the same `head_dim`, [`DEFAULT_BLOCK_TOKENS`] tokens a
    /// block and [`TokenOrder::TokenHeadDim`].
    ///
    /// # Errors
    /// [`Error::Layout`](crate::Error::Layout) if a dimension is zero, [`Error::SizeOverflow`](crate::Error::SizeOverflow) if a block
    /// would not fit 4 GiB.
    pub fn new(layers: u32, kv_heads: u32, head_dim: u32, dtype: DType) -> Result<Self> {
        let shape = LayerShape { kv_heads, k_head_dim: head_dim, v_head_dim: head_dim };
        let shapes = [shape, LayerShape::NONE, LayerShape::NONE];
        Self::of_shapes(layers, shapes, Kinds::default(), dtype, DEFAULT_BLOCK_TOKENS, TokenOrder::default())
    }

    /// A layout with one tensor of `dim` elements a token in each layer, as models with latent attention (MLA) keep it.
    /// It counts as K of one head; V has no elements.
    ///
    /// # Errors
    /// As [`KvLayout::new`].
    pub fn latent(layers: u32, dim: u32, dtype: DType) -> Result<Self> {
        Self::new(layers, 1, dim, dtype)?.with_v_head_dim(0)
    }

    /// Blocks of `block_bytes` bytes for `block_tokens` tokens, whatever an engine has in them: they have no layers, and are
    /// stored and read whole.
    ///
    /// # Errors
    /// [`Error::Layout`](crate::Error::Layout) if either is zero.
    pub fn opaque(block_bytes: u32, block_tokens: u32) -> Result<Self> {
        let shape = LayerShape { kv_heads: 1, k_head_dim: block_bytes, v_head_dim: 0 };
        let shapes = [shape, LayerShape::NONE, LayerShape::NONE];
        let layout = Self::latent(1, 1, DType::U8)?;
        Self { shapes, is_opaque: true, block_tokens, ..layout }.checked()
    }

    /// The same with another `head_dim` for V; 0 where each layer has one tensor only, which counts as K.
    ///
    /// # Errors
    /// As [`KvLayout::new`].
    pub fn with_v_head_dim(mut self, v_head_dim: u32) -> Result<Self> {
        self.usual_mut().v_head_dim = v_head_dim;
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

    /// Number of layers; 0 of opaque blocks.
    #[must_use]
    pub fn layers(&self) -> usize {
        if self.is_opaque { 0 } else { self.layers as usize }
    }

    /// Are blocks bytes without layers?
    #[must_use]
    pub fn is_opaque(&self) -> bool {
        self.is_opaque
    }

    /// Have all layers the same shape?
    #[must_use]
    pub fn is_uniform(&self) -> bool {
        self.kinds.is_uniform()
    }

    /// The shape of one layer.
    #[must_use]
    pub fn layer_shape(&self, layer: usize) -> LayerShape {
        let kind = usize::try_from(self.kinds.of(layer)).unwrap_or(SHAPES);
        self.shapes.get(kind).copied().unwrap_or(LayerShape::NONE)
    }

    /// Key/value heads of a layer of the usual shape.
    #[must_use]
    pub fn kv_heads(&self) -> usize {
        self.usual().kv_heads as usize
    }

    /// Elements of one head's K in a layer of the usual shape.
    #[must_use]
    pub fn k_head_dim(&self) -> usize {
        self.usual().k_head_dim as usize
    }

    /// Elements of one head's V in a layer of the usual shape.
    #[must_use]
    pub fn v_head_dim(&self) -> usize {
        self.usual().v_head_dim as usize
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
        if self.is_opaque { self.k_head_dim() } else { self.layer_start(self.layers()) }
    }

    /// Bytes of one token: all layers, K and V.
    #[must_use]
    pub fn token_bytes(&self) -> usize {
        self.block_bytes() / self.block_tokens()
    }

    /// The shape of one layer's K or V of `tokens` tokens.
    #[must_use]
    pub fn shape(&self, layer: usize, side: Side, tokens: usize) -> Shape {
        self.tensor_shape(self.layer_shape(layer), side, tokens)
    }

    fn tensor_shape(&self, layer: LayerShape, side: Side, tokens: usize) -> Shape {
        let (heads, dim) = (layer.kv_heads as usize, layer.dim(side) as usize);
        match self.order {
            TokenOrder::TokenHeadDim => Shape::of([tokens, heads, dim]),
            TokenOrder::HeadTokenDim => Shape::of([heads, tokens, dim]),
        }
    }

    /// Where one layer's K or V lies in a block's payload.
    pub(crate) fn range(&self, layer: usize, side: Side) -> Range<usize> {
        let (start, shape) = (self.layer_start(layer), self.layer_shape(layer));
        let v_start = start + self.side_bytes(shape, Side::K);
        match side {
            Side::K => start..v_start,
            Side::V => v_start..v_start + self.side_bytes(shape, Side::V),
        }
    }

    /// Copies one block's slice of this layer's K or V between the payload and an engine
    /// tensor: `tensor_tokens` is that tensor's own number of tokens (its stride),
    /// `at_token` where the block begins in it. `copy` gets (range in the payload slice,
    /// range in the tensor) for each contiguous run.
    pub(crate) fn each_run(
        &self,
        (layer, side): (usize, Side),
        tensor_tokens: usize,
        at_token: usize,
        mut copy: impl FnMut(Range<usize>, Range<usize>),
    ) {
        let of = self.layer_shape(layer);
        let (heads, row_bytes) = (of.kv_heads as usize, of.dim(side) as usize * self.dtype.size_bytes());
        let (runs, run_tokens_bytes, stride, start) = match self.order {
            TokenOrder::TokenHeadDim => {
                let token_bytes = row_bytes * heads;
                (1, token_bytes * self.block_tokens(), 0, at_token * token_bytes)
            }
            TokenOrder::HeadTokenDim => {
                let run = row_bytes * self.block_tokens();
                (heads, run, tensor_tokens * row_bytes, at_token * row_bytes)
            }
        };
        for run in 0..runs {
            let (from, to) = (run * run_tokens_bytes, start + run * stride);
            copy(from..from + run_tokens_bytes, to..to + run_tokens_bytes);
        }
    }

    /// What a record's header says of it: the shapes besides the usual one, and which layers have them.
    #[cfg(feature = "disk")]
    pub(crate) fn others(&self) -> ([LayerShape; SHAPES - 1], Kinds) {
        let [_, others @ ..] = self.shapes;
        (others, self.kinds)
    }

    /// What a record's header says.
    pub(crate) fn of_shapes(
        layers: u32,
        shapes: [LayerShape; SHAPES],
        kinds: Kinds,
        dtype: DType,
        block_tokens: u32,
        order: TokenOrder,
    ) -> Result<Self> {
        Self { layers, shapes, kinds, dtype, block_tokens, order, is_opaque: false }.checked()
    }

    fn usual(&self) -> LayerShape {
        let [usual, ..] = self.shapes;
        usual
    }

    fn usual_mut(&mut self) -> &mut LayerShape {
        let [usual, ..] = &mut self.shapes;
        usual
    }

    /// Where a layer begins in a block's payload.
    fn layer_start(&self, layer: usize) -> usize {
        if self.is_uniform() {
            return layer * self.layer_bytes(self.usual());
        }
        let of = |(kind, shape): (u64, &LayerShape)| self.kinds.count_before(layer, kind) * self.layer_bytes(*shape);
        (0..).zip(&self.shapes).map(of).sum()
    }

    fn side_bytes(&self, of: LayerShape, side: Side) -> usize {
        self.block_tokens() * of.kv_heads as usize * of.dim(side) as usize * self.dtype.size_bytes()
    }

    fn layer_bytes(&self, of: LayerShape) -> usize {
        self.side_bytes(of, Side::K) + self.side_bytes(of, Side::V)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

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
