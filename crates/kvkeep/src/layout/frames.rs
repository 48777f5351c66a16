//! What a codec takes by itself: K or V of one layer.
//!
//! Invariant: frames tile a payload, so a range of layers is decoded without the others. A whole block was the
//! alternative: then loading layer by layer decodes all of it each time.

use std::ops::Range;

use super::{KvLayout, Side, TokenOrder};
use crate::tensor::{DType, PairSpec, Shape};

/// A part of a block that codecs encode by itself: K or V of one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Frame {
    /// Where it lies in the block. Frames are in order, without overlap, and have bytes.
    pub range: Range<usize>,
    /// Its layer; 0 for opaque bytes.
    pub layer: u32,
    /// What of its layer it is; `None` for opaque bytes.
    pub side: Option<Side>,
    /// Its elements.
    pub dtype: DType,
    /// Its dimensions: all of the range.
    pub shape: Shape,
    /// Which dimension is the token's; `None` where nobody said.
    pub order: Option<TokenOrder>,
    /// So many tokens at its beginning and at its end are to come back exactly, whatever the codec.
    pub exact_tokens: [u32; 2],
}

impl Frame {
    /// Of a named pair, which has a layer of its own.
    pub(crate) fn of_pair(pair: &PairSpec) -> Vec<Self> {
        let at = [(Side::K, Some(0), pair.k), (Side::V, pair.v_start(), pair.v)];
        let frame = |(side, start, (dtype, shape)): (Side, Option<usize>, (DType, Shape))| {
            let range = start?..start?.checked_add(shape.size_bytes(dtype)?)?;
            Some(Self { range, layer: 0, side: Some(side), dtype, shape, order: None, exact_tokens: [0; 2] })
        };
        at.into_iter().filter_map(frame).filter(|frame| !frame.range.is_empty()).collect()
    }
}

impl KvLayout {
    /// The parts of a block that codecs encode by themselves: each layer's K and V, as far as they have bytes, or all of an
    /// opaque block.
    #[must_use]
    pub fn frames(&self) -> Vec<Frame> {
        let (dtype, all, exact_tokens) = (self.dtype, 0..self.block_bytes(), [0; 2]);
        if self.is_opaque {
            let shape = Shape::new(&[all.end]).into_iter();
            let frame =
                |shape| Frame { range: all.clone(), layer: 0, side: None, dtype, shape, order: None, exact_tokens };
            return shape.map(frame).collect();
        }
        let sides = (0..self.layers()).flat_map(|layer| [(layer, Side::K), (layer, Side::V)]);
        let frame = |(layer, side)| {
            let shape = self.shape(layer, side, self.block_tokens());
            let (range, number) = (self.range(layer, side), u32::try_from(layer).ok()?);
            let order = Some(self.order);
            Some(Frame { range, layer: number, side: Some(side), dtype, shape, order, exact_tokens })
        };
        sides.filter_map(frame).filter(|frame| !frame.range.is_empty()).collect()
    }

    /// Is it known what is K and V, of floats of 16 or 32 bits? Nothing else is for a lossy codec.
    pub(crate) fn may_be_lossy(&self) -> bool {
        !self.is_opaque && matches!(self.dtype, DType::BF16 | DType::F16 | DType::F32)
    }
}
