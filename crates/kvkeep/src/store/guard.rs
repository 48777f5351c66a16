//! The two ways to hold pages outside the lock: [`Pending`] to write, [`Pin`] to read.
//!
//! Sealed and pending are different types: what is being written cannot be found, what
//! can be found cannot be written. Both give their pages back when dropped.

use std::fmt;
use std::sync::Arc;

use super::Shared;
use super::state::Held;
use crate::tensor::PairSpec;
use crate::tier::ram::Extent;

/// Pages that are being written; invisible until sealed, freed if dropped.
pub(crate) struct Pending {
    shared: Arc<Shared>,
    extent: Option<Extent>,
}

/// Sealed objects that stay readable, and are not evicted, while this value lives.
pub(crate) struct Pin {
    shared: Arc<Shared>,
    held: Vec<Held>,
}

impl Pending {
    pub(super) fn new(shared: Arc<Shared>, extent: Extent) -> Self {
        Self { shared, extent: Some(extent) }
    }

    /// The pages to write: at least as many bytes as were asked for.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.extent {
            Some(extent) => self.shared.arena.bytes_mut(extent),
            None => &mut [],
        }
    }

    /// Clears what lies behind the payload: it was somebody else's, and goes to the disk with it.
    pub(super) fn clear_from(&mut self, bytes: usize) {
        if let Some(rest) = self.bytes_mut().get_mut(bytes..) {
            rest.fill(0);
        }
    }

    pub(super) fn into_extent(mut self) -> Option<Extent> {
        self.extent.take()
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if let Some(extent) = self.extent.take() {
            self.shared.state.lock().abandon(extent);
        }
    }
}

impl Pin {
    pub(super) fn new(shared: Arc<Shared>, held: Vec<Held>) -> Self {
        Self { shared, held }
    }

    pub(crate) fn len(&self) -> usize {
        self.held.len()
    }

    /// The pages of the object at `position`: at least as many bytes as were stored.
    pub(crate) fn bytes(&self, position: usize) -> &[u8] {
        self.held.get(position).map_or(&[], |held| self.shared.arena.bytes(&held.grant))
    }

    /// What the two tensors of a named object look like.
    pub(crate) fn spec(&self, position: usize) -> Option<&PairSpec> {
        self.held.get(position)?.spec.as_deref()
    }

    pub(super) fn held(&self) -> &[Held] {
        &self.held
    }

    /// Holds more behind what is held already.
    pub(super) fn extend(&mut self, more: Vec<Held>) {
        self.held.extend(more);
    }

    /// Lets go of everything from `len` on.
    pub(crate) fn truncate(&mut self, len: usize) {
        if len < self.held.len() {
            let rest = self.held.split_off(len);
            self.shared.state.lock().release(rest);
        }
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        if !self.held.is_empty() {
            self.shared.state.lock().release(std::mem::take(&mut self.held));
        }
    }
}

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pin").field("objects", &self.held.len()).finish_non_exhaustive()
    }
}

impl fmt::Debug for Pending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pending").field("extent", &self.extent).finish_non_exhaustive()
    }
}
