//! Copies between blocks and an engine's tensors, which are checked before the first byte is written.
//!
//! Invariant: neither side is transposed: what is contiguous in a block is contiguous in the tensor.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::layout::{KvLayout, LayerView, LayerViewMut, Side};
use crate::tensor::{TensorSpec, TensorView, TensorViewMut};

/// Checks that there is a tensor for each layer with room for `tokens` tokens; says for how
/// many each K and V has room.
pub(super) fn check_targets(
    layout: &KvLayout,
    layers: &Range<usize>,
    into: &[LayerViewMut<'_>],
    tokens: usize,
) -> Result<Vec<(usize, usize)>> {
    layout.check_layers(layers)?;
    if into.len() != layers.len() {
        return Err(Error::LayerCount { expected: layers.len(), got: into.len() });
    }
    let pairs: Vec<_> = into.iter().map(|target| (of(&target.k.as_view()), of(&target.v.as_view()))).collect();
    layout.check_pairs(layers.start, &pairs, tokens)
}

/// Copies one side of one layer of a block to where it belongs in a tensor of `room` tokens.
pub(super) fn copy_block(
    layout: &KvLayout,
    of: (usize, Side),
    block: usize,
    payload: &[u8],
    target: &mut TensorViewMut<'_>,
    room: usize,
) {
    let bytes = target.bytes_mut();
    layout.each_run(of, room, block * layout.block_tokens(), |from, to| {
        if let (Some(from), Some(to)) = (payload.get(from), bytes.get_mut(to)) {
            copy(from, to);
        }
    });
}

/// Where the target begins a few bytes further in its page than the source, the instruction that C libraries copy much with
/// is three times slower on some AMD processors (glibc's bug 30994). numpy's arrays begin 16 bytes behind a page, blocks at one.
/// Small pieces are copied with other instructions.
fn copy(from: &[u8], to: &mut [u8]) {
    const PAGE: usize = 4096;
    const PIECE: usize = 2048;
    let ahead = to.as_ptr().addr().wrapping_sub(from.as_ptr().addr()) % PAGE;
    let piece = if (1..32).contains(&ahead) { PIECE } else { to.len().max(1) };
    to.chunks_mut(piece).zip(from.chunks(piece)).for_each(|(to, from)| to.copy_from_slice(from));
}

fn of(view: &TensorView<'_>) -> TensorSpec {
    (view.dtype(), view.shape())
}

/// An engine's tensors, checked to hold what is to be stored.
pub(super) struct Source<'a> {
    layout: &'a KvLayout,
    layers: &'a [LayerView<'a>],
    first_token: usize,
    tensor_tokens: Vec<(usize, usize)>,
}

impl<'a> Source<'a> {
    pub(super) fn checked(
        layout: &'a KvLayout,
        layers: &'a [LayerView<'a>],
        first_token: usize,
        end_token: usize,
    ) -> Result<Self> {
        if layers.is_empty() {
            return Err(Error::ZeroLayers);
        }
        layout.check_layers(&(0..layout.layers()))?;
        if layers.len() != layout.layers() {
            return Err(Error::LayerCount { expected: layout.layers(), got: layers.len() });
        }
        let min_tokens = end_token.saturating_sub(first_token);
        let pairs: Vec<_> = layers.iter().map(|view| (of(&view.k), of(&view.v))).collect();
        let tensor_tokens = layout.check_pairs(0, &pairs, min_tokens)?;
        Ok(Self { layout, layers, first_token, tensor_tokens })
    }

    pub(super) fn write_block(&self, at_token: usize, payload: &mut [u8]) {
        for (layer, (view, tokens)) in self.layers.iter().zip(&self.tensor_tokens).enumerate() {
            self.write_side(layer, Side::K, &view.k, tokens.0, at_token, payload);
            self.write_side(layer, Side::V, &view.v, tokens.1, at_token, payload);
        }
    }

    fn write_side(
        &self,
        layer: usize,
        side: Side,
        tensor: &TensorView<'_>,
        tensor_tokens: usize,
        at_token: usize,
        payload: &mut [u8],
    ) {
        let Some(payload) = payload.get_mut(self.layout.range(layer, side)) else { return };
        self.layout.each_run((layer, side), tensor_tokens, at_token - self.first_token, |to, from| {
            if let (Some(from), Some(to)) = (tensor.bytes().get(from), payload.get_mut(to)) {
                copy(from, to);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::copy;

    #[test]
    fn every_byte_is_copied_wherever_source_and_target_begin() {
        let source: Vec<u8> = (0..20_000u32).map(|at| (at % 251) as u8).collect();
        for begin in [0, 1, 16, 31, 32, 4_095] {
            for bytes in [0, 1, 2_047, 2_048, 2_049, 10_000] {
                let mut target = vec![0; 20_000];
                copy(&source[4_096..4_096 + bytes], &mut target[begin..begin + bytes]);
                assert_eq!(target[begin..begin + bytes], source[4_096..4_096 + bytes]);
                assert!(target[begin + bytes..].iter().all(|byte| *byte == 0));
            }
        }
    }
}
