//! What is refused: layouts that no block can have, and tensors that are not of a layout.
//!
//! Invariant: a [`KvLayout`] that exists has passed `checked`, so its sizes fit 4 GiB and nothing else has to look for
//! overflows. Sizes that may fail wherever they are asked for were the alternative.

use std::ops::Range;

use super::shapes::{Kinds, LayerShape, MAX_MIXED_LAYERS};
use super::{KvLayout, Side, TokenOrder};
use crate::error::{Error, Result};
use crate::tensor::TensorSpec;

impl KvLayout {
    /// Refuses a layer range that the layout does not have.
    pub(crate) fn check_layers(&self, layers: &Range<usize>) -> Result<()> {
        if self.is_opaque {
            let text = "blocks of this layout are opaque and have no layers: store them whole and read them whole";
            return Err(Error::Layout(text.into()));
        }
        if layers.is_empty() {
            return Err(Error::ZeroLayers);
        }
        if layers.end > self.layers() {
            return Err(Error::LayerOutOfRange { layer: layers.end - 1, layers: self.layers() });
        }
        Ok(())
    }

    /// Refuses K and V of layers, from `first_layer` on, that are not of at least `min_tokens` tokens: each one's element
    /// types and shapes. Says how many tokens each K and V has.
    ///
    /// # Errors
    /// [`Error::ZeroLayers`], [`Error::LayerOutOfRange`], [`Error::DTypeMismatch`], [`Error::ShapeMismatch`].
    pub fn check_pairs(
        &self,
        first_layer: usize,
        pairs: &[(TensorSpec, TensorSpec)],
        min_tokens: usize,
    ) -> Result<Vec<(usize, usize)>> {
        self.check_layers(&(first_layer..first_layer.saturating_add(pairs.len())))?;
        let check = |(layer, (k, v)): (usize, &(TensorSpec, TensorSpec))| {
            let tokens_of_k = self.check_tensor(*k, Side::K, layer, min_tokens)?;
            Ok((tokens_of_k, self.check_tensor(*v, Side::V, layer, min_tokens)?))
        };
        (first_layer..).zip(pairs).map(check).collect()
    }

    /// Refuses a tensor that is not one layer's K or V of at least `min_tokens` tokens;
    /// says how many tokens it has.
    fn check_tensor(&self, (dtype, shape): TensorSpec, side: Side, layer: usize, min_tokens: usize) -> Result<usize> {
        let tensor = || format!("{} of layer {layer}", if side == Side::K { "k" } else { "v" });
        if dtype != self.dtype {
            let (expected, got) = (self.dtype, dtype);
            return Err(Error::DTypeMismatch { tensor: tensor(), expected, got });
        }
        let of = self.layer_shape(layer);
        let tokens = match (self.order, shape.dims()) {
            (TokenOrder::TokenHeadDim, &[tokens, heads, dim]) | (TokenOrder::HeadTokenDim, &[heads, tokens, dim])
                if heads == of.kv_heads as usize && dim == of.dim(side) as usize && tokens >= min_tokens =>
            {
                tokens
            }
            _ => {
                let expected = format!("{} with at least {min_tokens} tokens", self.expected(of, side));
                return Err(Error::ShapeMismatch { tensor: tensor(), expected, got: shape });
            }
        };
        Ok(tokens)
    }

    fn expected(&self, of: LayerShape, side: Side) -> String {
        let (heads, dim) = (of.kv_heads, of.dim(side));
        match self.order {
            TokenOrder::TokenHeadDim => format!("[tokens, {heads}, {dim}]"),
            TokenOrder::HeadTokenDim => format!("[{heads}, tokens, {dim}]"),
        }
    }

    pub(super) fn checked(self) -> Result<Self> {
        let usual = self.usual();
        for (name, value) in [
            ("layers", self.layers),
            ("kv_heads", usual.kv_heads),
            ("k_head_dim", usual.k_head_dim),
            ("block_tokens", self.block_tokens),
        ] {
            if value == 0 {
                return Err(Error::Layout(format!("{name} is 0: it must be at least 1")));
            }
        }
        let half = |shape: &&LayerShape| **shape != LayerShape::NONE && (shape.kv_heads == 0 || shape.k_head_dim == 0);
        if let Some(shape) = self.shapes.iter().find(half) {
            return Err(Error::Layout(format!(
                "{shape:?} keeps nothing: give heads and elements, or LayerShape::NONE"
            )));
        }
        if !self.is_uniform()
            && (self.layers > MAX_MIXED_LAYERS || self.kinds.count_before(self.layers(), Kinds::NONE) >= self.layers())
        {
            return Err(Error::Layout(format!(
                "layers that differ must be {MAX_MIXED_LAYERS} at most, and one of them keep something"
            )));
        }
        self.checked_bytes()
            .and_then(|bytes| u32::try_from(bytes).ok())
            .filter(|bytes| *bytes > 0)
            .map(|_| self)
            .ok_or(Error::SizeOverflow("the size of a block (at most 4 GiB)"))
    }

    /// As [`KvLayout::block_bytes`]; `None` if that overflows.
    fn checked_bytes(&self) -> Option<u64> {
        if self.is_opaque {
            return Some(u64::from(self.usual().k_head_dim));
        }
        let mixed = |kind| self.kinds.count_before(self.layers(), kind) as u64;
        let mut elements = 0u64;
        for (kind, shape) in (0..).zip(&self.shapes) {
            let layers = if self.is_uniform() { u64::from(self.layers) * u64::from(kind == 0) } else { mixed(kind) };
            elements = elements.checked_add(shape.elements()?.checked_mul(layers)?)?;
        }
        elements.checked_mul(u64::from(self.block_tokens))?.checked_mul(self.dtype.size_bytes() as u64)
    }
}
