//! Layers of a layout that differ: which shapes there are, and which layer has which.
//!
//! Invariant: the usual shape is number 0, so a layout whose layers are all alike has no number set, and costs no look at
//! them. A shape for each layer was the alternative: 128 of them do not fit a record's header.

use super::{KvLayout, Side};
use crate::error::{Error, Result};

/// What one layer keeps of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct LayerShape {
    /// Key/value heads.
    pub kv_heads: u32,
    /// Elements of one head's K.
    pub k_head_dim: u32,
    /// Elements of one head's V; 0 where there is one tensor only, which counts as K.
    pub v_head_dim: u32,
}

impl LayerShape {
    /// Of a layer that keeps nothing.
    pub const NONE: Self = Self { kv_heads: 0, k_head_dim: 0, v_head_dim: 0 };

    pub(super) fn dim(&self, side: Side) -> u32 {
        match side {
            Side::K => self.k_head_dim,
            Side::V => self.v_head_dim,
        }
    }

    /// Elements of one token; `None` if that overflows.
    pub(super) fn elements(&self) -> Option<u64> {
        (u64::from(self.k_head_dim) + u64::from(self.v_head_dim)).checked_mul(u64::from(self.kv_heads))
    }
}

/// Shapes that a layout can have.
pub(crate) const SHAPES: usize = 3;

/// Layers of a layout in which they differ, at most.
pub(super) const MAX_MIXED_LAYERS: u32 = 128;

/// Which shape each layer has, 2 bits a layer: a number, or [`Kinds::NONE`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(crate) struct Kinds(pub(crate) [u64; 4]);

impl Kinds {
    /// Of a layer that keeps nothing.
    pub(super) const NONE: u64 = 3;
    const LAYERS_A_WORD: usize = 32;

    pub(super) fn is_uniform(&self) -> bool {
        self.0 == [0; 4]
    }

    pub(super) fn of(&self, layer: usize) -> u64 {
        let word = self.0.get(layer / Self::LAYERS_A_WORD).copied().unwrap_or(0);
        word >> (layer % Self::LAYERS_A_WORD * 2) & 3
    }

    pub(super) fn set(&mut self, layer: usize, kind: u64) {
        if let Some(word) = self.0.get_mut(layer / Self::LAYERS_A_WORD) {
            let at = layer % Self::LAYERS_A_WORD * 2;
            *word = *word & !(3 << at) | kind << at;
        }
    }

    /// Layers of a kind before this one.
    pub(super) fn count_before(&self, layer: usize, kind: u64) -> usize {
        let word = |(number, word): (usize, &u64)| {
            let layers = layer.saturating_sub(number * Self::LAYERS_A_WORD).min(Self::LAYERS_A_WORD);
            let bits = u32::try_from(2 * layers).unwrap_or(u64::BITS);
            let inside = u64::MAX.checked_shr(u64::BITS - bits).unwrap_or(0) & LOW_BITS;
            let other = word ^ (kind * LOW_BITS);
            (!(other | other >> 1) & inside).count_ones() as usize
        };
        self.0.iter().enumerate().map(word).sum()
    }
}

/// The lower bit of each pair.
const LOW_BITS: u64 = u64::MAX / 3;

impl KvLayout {
    /// The same with another shape for these layers: of models whose layers differ. [`LayerShape::NONE`] for layers that keep
    /// nothing of a token.
    ///
    /// # Errors
    /// [`Error::Layout`] for layers that the layout does not have or beyond the 128th, for a third shape besides the
    /// usual one, and for a shape with heads and without elements; and as [`KvLayout::new`].
    pub fn with_layers(mut self, layers: impl IntoIterator<Item = u32>, shape: LayerShape) -> Result<Self> {
        let refuse = |text: String| Err(Error::Layout(text));
        let kind = match self.shapes.iter().position(|other| *other == shape) {
            _ if shape == LayerShape::NONE => Kinds::NONE,
            Some(kind) => kind as u64,
            None => {
                let free = self.shapes.iter().position(|other| *other == LayerShape::NONE);
                let Some((kind, slot)) = free.and_then(|free| Some((free, self.shapes.get_mut(free)?))) else {
                    return refuse(format!("layers of more than {SHAPES} shapes: keep such blocks as opaque ones"));
                };
                *slot = shape;
                kind as u64
            }
        };
        for layer in layers {
            if layer >= self.layers.min(MAX_MIXED_LAYERS) || self.is_opaque {
                let (all, most) = (self.layers(), MAX_MIXED_LAYERS);
                return refuse(format!(
                    "no shape of its own for layer {layer}: it has {all} layers, the first {most} may"
                ));
            }
            self.kinds.set(layer as usize, kind);
        }
        self.checked()
    }
}
