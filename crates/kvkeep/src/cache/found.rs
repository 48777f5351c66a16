//! What a lookup hands out: the blocks that were found, pinned.
//!
//! Invariant: what it shows stays where it is, and as it is, for as long as it lives. Copies of the blocks were the alternative:
//! then the cost of a hit grows with its size.

use std::ops::Range;
use std::time::Duration;

use super::tensors::{check_targets, copy_block};
use crate::error::{Error, Result};
use crate::layout::{KvLayout, LayerView, LayerViewMut, Side};
use crate::store::{Loaded, Pin};
use crate::tensor::TensorView;

/// The longest resident prefix of a prompt, pinned: its blocks stay readable and are not
/// evicted while this value lives. It keeps the cache's memory alive too.
#[derive(Debug)]
pub struct Match {
    pub(super) pin: Pin,
    /// Where what was not in RAM came from, and what was behind such.
    pub(super) loaded: Loaded,
    pub(super) layout: KvLayout,
}

impl Match {
    /// Tokens matched: a multiple of the block's tokens, at most the prompt's.
    #[must_use]
    pub fn cached_tokens(&self) -> usize {
        self.blocks() * self.layout.block_tokens()
    }

    /// Blocks matched.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.pin.len()
    }

    /// Was nothing found?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.blocks() == 0
    }

    /// Of [`Match::cached_tokens`], those whose blocks were in RAM when they were looked for. The
    /// others were loaded from a tier, or lay in RAM behind such. Blocks that
    /// [`KvCache::get_or_prefill`](crate::KvCache::get_or_prefill) had computed count as in RAM.
    #[must_use]
    pub fn ram_tokens(&self) -> usize {
        (self.blocks() - self.loaded.blocks()) * self.layout.block_tokens()
    }

    /// [`Match::cached_tokens`] by the tier that gave them: its name, `ram` first, and its tokens. What lay in RAM behind what
    /// was loaded counts as RAM's here.
    #[must_use]
    pub fn tiers(&self) -> Vec<(String, usize)> {
        let by_tier = self.loaded.by_tier(self.blocks()).into_iter();
        by_tier.map(|(tier, blocks)| (tier, blocks * self.layout.block_tokens())).collect()
    }

    /// What computing these blocks took, as those said who stored them: what whoever uses them is
    /// spared. Blocks that were stored without [`StoreOptions::compute_time`](crate::StoreOptions::compute_time) count as nothing.
    #[must_use]
    pub fn compute_time(&self) -> Duration {
        self.pin.compute_time()
    }

    /// Lets go of the blocks behind the first `tokens` tokens, rounded down to whole blocks.
    pub fn truncate(&mut self, tokens: usize) {
        self.pin.truncate(tokens / self.layout.block_tokens());
        self.loaded.truncate(self.pin.len());
    }

    /// K and V of one layer of one block, without copying: `[block_tokens, kv_heads,
    /// head_dim]` or `[kv_heads, block_tokens, head_dim]` as the layout orders them.
    ///
    /// # Errors
    /// [`Error::LayerOutOfRange`] for a layer that the layout does not have,
    /// [`Error::BlockOutOfRange`] for a block that was not matched.
    pub fn layer(&self, block: usize, layer: usize) -> Result<LayerView<'_>> {
        self.pin.check()?;
        self.layout.check_layers(&(layer..layer + 1))?;
        if block >= self.blocks() {
            return Err(Error::BlockOutOfRange { block, blocks: self.blocks() });
        }
        Ok(LayerView { k: self.view(block, layer, Side::K), v: self.view(block, layer, Side::V) })
    }

    /// A whole block, without copying: bytes in the order of the namespace's layout. All there is to read of an opaque
    /// one.
    ///
    /// # Errors
    /// [`Error::BlockOutOfRange`] for a block that was not matched.
    pub fn block(&self, block: usize) -> Result<&[u8]> {
        self.pin.check()?;
        let bytes = if block < self.blocks() { self.pin.bytes(block).get(..self.layout.block_bytes()) } else { None };
        bytes.ok_or(Error::BlockOutOfRange { block, blocks: self.blocks() })
    }

    /// Copies K and V of these layers into an engine's tensors, one for each layer of the
    /// range. Each tensor has room for at least [`Match::cached_tokens`] tokens; the matched
    /// ones are written at its beginning, the rest is left alone.
    ///
    /// # Errors
    /// [`Error::ZeroLayers`], [`Error::LayerOutOfRange`], [`Error::LayerCount`],
    /// [`Error::DTypeMismatch`], [`Error::ShapeMismatch`]; then nothing is written.
    pub fn load(&self, layers: Range<usize>, into: &mut [LayerViewMut<'_>]) -> Result<()> {
        self.pin.check()?;
        let room = check_targets(&self.layout, &layers, into, self.cached_tokens())?;
        for ((layer, target), room) in layers.zip(into).zip(room) {
            for (side, tensor, room) in [(Side::K, &mut target.k, room.0), (Side::V, &mut target.v, room.1)] {
                let range = self.layout.range(layer, side);
                for block in 0..self.blocks() {
                    let payload = self.pin.bytes(block).get(range.clone()).unwrap_or_default();
                    copy_block(&self.layout, (layer, side), block, payload, tensor, room);
                }
            }
        }
        Ok(())
    }

    fn view(&self, block: usize, layer: usize, side: Side) -> TensorView<'_> {
        let bytes = self.pin.bytes(block).get(self.layout.range(layer, side)).unwrap_or_default();
        let shape = self.layout.shape(layer, side, self.layout.block_tokens());
        TensorView::trusted(self.layout.dtype(), shape, bytes)
    }
}
