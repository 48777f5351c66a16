//! Making room in RAM: what is refused, what is evicted, and what goes to the tier below.
//!
//! Invariant: what would not fit if everything that can go went is refused before anything is evicted. Only
//! what a quota refuses may have cost entries before: its own share's, and what others had beyond theirs.

use super::{Object, State};
use crate::error::Rejection;
use crate::eviction::{Departure, EntryId, ShareId};
use crate::index::Entry;
use crate::key::ObjectKey;
use crate::tier::ram::{Extent, PAGE_BYTES, page_bytes, pages_for};

/// At most one full sweep in this time, however often entries expire.
const SWEEP_INTERVAL_MS: u64 = 1000;

impl State {
    /// Free extents behind each other in one run of pages, so that a reader of all of them
    /// needs one view. Evicts what these sizes take wherever they come to lie, and nothing
    /// for the sake of the run: where the free pages are scattered there is none.
    pub(super) fn make_run(&mut self, share: ShareId, sizes_bytes: &[usize], now_ms: u64) -> Option<Vec<Extent>> {
        let pages: Vec<u32> = sizes_bytes.iter().map(|bytes| pages_for(*bytes)).collect::<Option<_>>()?;
        let all = pages.iter().try_fold(0u32, |all, pages| all.checked_add(*pages))?;
        self.sweep_when_due(now_ms);
        while self.pages.free_pages() < all {
            self.evict_one(share, all, all).ok()?;
        }
        let extents = self.pages.allocate_run(&pages)?;
        self.held_pages += all;
        Some(extents)
    }

    /// A free extent, after as many evictions as it takes; the share has `pending` pages already
    /// that are not sealed yet.
    pub(super) fn make_room(
        &mut self,
        share: ShareId,
        bytes: usize,
        pending: u32,
        now_ms: u64,
    ) -> Result<Extent, Rejection> {
        self.admit(std::iter::once(bytes))?;
        let pages = pages_for(bytes).unwrap_or(u32::MAX);
        self.sweep_when_due(now_ms);
        loop {
            if let Some(extent) = self.pages.allocate(pages) {
                self.held_pages += pages;
                return Ok(extent);
            }
            self.evict_one(share, pending + pages, pages)?;
        }
    }

    /// Evicts what the policy says for a share that will have `pending` pages more, of which
    /// `pages` are wanted now.
    pub(super) fn evict_one(&mut self, share: ShareId, pending: u32, pages: u32) -> Result<(), Rejection> {
        let victim = self.policy.victim(share, pending, self.pages.capacity_pages());
        let victim = victim.ok_or_else(|| self.no_victim(share, pending, pages))?;
        self.demote_entry(victim, false);
        self.drop_entry(victim, Departure::Evicted);
        self.counters.evictions += 1;
        Ok(())
    }

    fn no_victim(&self, share: ShareId, pending: u32, pages: u32) -> Rejection {
        let capacity_pages = self.pages.capacity_pages();
        match self.policy.exceeded(share, pending, capacity_pages) {
            Some(due_pages) => {
                Rejection::OverQuota { needed_bytes: page_bytes(pages), share_bytes: due_bytes(due_pages) }
            }
            None => self.all_pinned(u64::from(pages)),
        }
    }

    fn sweep_when_due(&mut self, now_ms: u64) {
        if now_ms.saturating_sub(self.last_sweep_ms) >= SWEEP_INTERVAL_MS {
            self.sweep(now_ms);
        }
    }

    /// Drops what has expired, if anything can have; says how many entries.
    pub(in crate::store) fn sweep(&mut self, now_ms: u64) -> u64 {
        if now_ms < self.earliest_expiry_ms {
            return 0;
        }
        let expired = self.index.select(|entry| entry.expires_at_ms <= now_ms);
        expired.iter().for_each(|id| self.drop_entry(*id, Departure::Removed));
        self.counters.expirations += expired.len() as u64;
        self.last_sweep_ms = now_ms;
        self.earliest_expiry_ms = self.index.earliest_expiry_ms();
        expired.len() as u64
    }

    /// Refuses, before anything is evicted, what would not fit if everything that can go went.
    pub(super) fn admit(&self, sizes_bytes: impl Iterator<Item = usize>) -> Result<(), Rejection> {
        let pages = self.fits_empty(sizes_bytes)?;
        if pages + u64::from(self.held_pages) > u64::from(self.pages.capacity_pages()) {
            return Err(self.all_pinned(pages));
        }
        Ok(())
    }

    /// The pages these sizes take, if an empty cache has as many.
    pub(super) fn fits_empty(&self, sizes_bytes: impl Iterator<Item = usize>) -> Result<u64, Rejection> {
        let pages: u64 = sizes_bytes.map(|bytes| bytes.div_ceil(PAGE_BYTES) as u64).sum();
        let capacity_pages = self.pages.capacity_pages();
        if pages <= u64::from(capacity_pages) {
            return Ok(pages);
        }
        Err(Rejection::LargerThanCapacity {
            needed_bytes: pages.saturating_mul(PAGE_BYTES as u64),
            capacity_bytes: page_bytes(capacity_pages),
        })
    }

    fn all_pinned(&self, pages: u64) -> Rejection {
        let held_bytes = page_bytes(self.held_pages);
        Rejection::AllPinned { needed_bytes: pages.saturating_mul(PAGE_BYTES as u64), held_bytes }
    }

    /// Offers the entry under a key to the tier below, if that does not have it.
    pub(in crate::store) fn demote(&mut self, key: &ObjectKey, wait: bool) {
        if let Some(id) = self.index.find(key) {
            self.demote_entry(id, wait);
        }
    }

    /// As [`State::demote`], of a chain: behind one that is kept off nothing could be found.
    pub(in crate::store) fn demote_run(&mut self, keys: &[ObjectKey]) {
        for key in keys {
            if let Some(id) = self.index.find(key)
                && !self.demote_entry(id, false)
            {
                return;
            }
        }
    }

    /// Says whether it may go there.
    pub(super) fn demote_entry(&mut self, id: EntryId, wait: bool) -> bool {
        let Some(below) = self.below.clone() else { return false };
        let Some(mut object) = self.index.get(id).and_then(|entry| self.object(entry)) else { return false };
        if below.holds(&object.key) {
            self.gate.iter_mut().for_each(|gate| gate.is_below(id));
            return true;
        }
        if let Some(gate) = &mut self.gate {
            let Some(kind) = gate.admits(id) else { return false };
            object.kind = kind;
        }
        if let Some(held) = self.hold_queued(id) {
            match below.demote(&object, held, wait) {
                Ok(()) => self.gate.iter_mut().for_each(|gate| gate.wrote(id, object.kind)),
                Err(held) => self.release(vec![held]),
            }
        }
        true
    }

    fn object(&self, entry: &Entry) -> Option<Object> {
        Some(Object {
            key: entry.key,
            namespace: self.index.namespaces().id(entry.namespace)?,
            bytes: entry.payload_bytes(),
            expires_at_ms: entry.expires_at_ms,
            compute_us: entry.compute_us,
            spec: entry.spec.clone(),
            kind: 0,
        })
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a part of the capacity in pages")]
fn due_bytes(pages: f64) -> u64 {
    pages as u64 * PAGE_BYTES as u64
}
