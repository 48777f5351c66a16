//! The ways to hold pages outside the lock: [`Pending`] to write, [`Pin`] to read,
//! [`PrivatePin`] to read and to scribble on.
//!
//! Sealed and pending are different types: what is being written cannot be found, what
//! can be found cannot be written. Both give their pages back when dropped.

use std::fmt;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use super::Shared;
use super::ledger::Held;
use crate::error::{Error, Result};
use crate::tensor::PairSpec;
use crate::tier::ram::{Extent, PAGE_BYTES, View, page_bytes};

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

/// A pin together with memory of its holder's own that shows the pinned objects. Writing
/// there changes neither the objects nor what another holder sees.
pub(crate) struct PrivatePin {
    pin: Pin,
    views: Vec<View>,
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

    /// Where they begin in the store's memory, in bytes: for a device that writes them. Asks for no huge pages.
    pub(crate) fn offset(&self) -> usize {
        self.extent.as_ref().map_or(0, Extent::offset)
    }

    /// A part of them. Huge pages are asked for only where it lies.
    ///
    /// # Panics
    /// If it does not lie in them.
    pub(crate) fn part_mut(&mut self, part: Range<usize>) -> &mut [u8] {
        match &mut self.extent {
            Some(extent) => self.shared.arena.part_mut(extent, part),
            None => &mut [],
        }
    }

    /// Clears what lies behind the payload: it was somebody else's, and goes to the disk with it.
    pub(super) fn clear_from(&mut self, bytes: usize) {
        let end = self.extent.as_ref().map_or(0, |extent| extent.pages() as usize * PAGE_BYTES);
        if bytes < end {
            self.part_mut(bytes..end).fill(0);
        }
    }

    pub(super) fn into_extent(mut self) -> Option<Extent> {
        self.extent.take()
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if let Some(extent) = self.extent.take()
            && self.shared.process.is_current()
        {
            self.shared.with(|ledger| ledger.abandon(extent));
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
    /// Nothing in a child of the process that made it: there the pages may become others'.
    pub(crate) fn bytes(&self, position: usize) -> &[u8] {
        if !self.shared.process.is_current() {
            return &[];
        }
        self.held.get(position).map_or(&[], |held| self.shared.arena.bytes(&held.grant))
    }

    /// What the two tensors of a named object look like.
    pub(crate) fn spec(&self, position: usize) -> Option<&PairSpec> {
        self.held.get(position)?.spec.as_deref()
    }

    /// # Errors
    /// [`Error::Forked`] in a child of the process that made it.
    pub(crate) fn check(&self) -> Result<()> {
        self.shared.check()
    }

    /// What computing these took, as those said who stored them.
    pub(crate) fn compute_time(&self) -> Duration {
        self.shared.with(|ledger| ledger.compute_time(&self.held))
    }

    pub(super) fn held(&self) -> &[Held] {
        &self.held
    }

    /// Holds more behind what is held already.
    pub(super) fn extend(&mut self, more: Vec<Held>) {
        self.held.extend(more);
    }

    /// Holds what another pin holds, too.
    pub(super) fn absorb(&mut self, mut other: Self) {
        self.held.append(&mut other.held);
    }

    /// Lets go of everything from `len` on.
    pub(crate) fn truncate(&mut self, len: usize) {
        if len < self.held.len() {
            let rest = self.held.split_off(len);
            if !self.shared.process.is_current() {
                return;
            }
            self.shared.with(|ledger| ledger.release(rest));
        }
    }
}

impl Pin {
    /// Private memory for what is pinned; the cost does not depend on its size.
    pub(crate) fn into_private(self) -> Result<PrivatePin> {
        self.check()?;
        let grants: Vec<_> = self.held.iter().map(|held| &held.grant).collect();
        let pages = || grants.iter().map(|grant| grant.pages()).sum();
        let views = self.shared.arena.private_views(&grants);
        let views = views.map_err(|source| Error::PrivateMemory { bytes: page_bytes(pages()), source })?;
        Ok(PrivatePin { pin: self, views })
    }
}

impl PrivatePin {
    pub(crate) fn pin(&self) -> &Pin {
        &self.pin
    }

    /// Where the object at `position` begins.
    pub(crate) fn address(&self, position: usize) -> Option<NonNull<u8>> {
        self.pin.held.get(position)?.grant.address_in(&self.views)
    }

    /// Do all objects lie behind each other in one piece of memory?
    pub(crate) fn is_one_run(&self) -> bool {
        self.views.len() == 1
    }
}

impl Drop for PrivatePin {
    fn drop(&mut self) {
        if !self.pin.shared.process.is_current() {
            return;
        }
        // Before the pin goes: from then on the pages may be written again.
        self.views.drain(..).for_each(|view| self.pin.shared.arena.give_back(view));
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        if !self.held.is_empty() && self.shared.process.is_current() {
            let held = std::mem::take(&mut self.held);
            self.shared.with(|ledger| ledger.release(held));
        }
    }
}

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pin").field("objects", &self.held.len()).finish_non_exhaustive()
    }
}

impl fmt::Debug for PrivatePin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PrivatePin").field("views", &self.views).finish_non_exhaustive()
    }
}

impl fmt::Debug for Pending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pending").field("extent", &self.extent).finish_non_exhaustive()
    }
}
