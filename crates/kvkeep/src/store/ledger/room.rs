//! Making room in RAM: what is refused, and what is evicted.
//!
//! Invariant: a request that cannot fit is refused before anything is evicted for it. Only what a quota refuses may
//! have cost entries before: its own share's, and what others had beyond theirs.

use super::{Held, Ledger};
use crate::error::Rejection;
use crate::eviction::{Arrival, Departure, EntryId, Place, Priority, ShareId};
use crate::index::Flag;
use crate::key::{NamespaceId, ObjectKey};
use crate::tier::ram::{Extent, PAGE_BYTES, page_bytes, pages_for};

/// At most one full sweep in this time, however often entries expire.
const SWEEP_INTERVAL_MS: u64 = 1000;
/// Entries that expire are dropped so many at a time: between two slices others get the lock.
pub(crate) const SLICE: usize = 256;
/// What was prefetched and not used yet takes at most this part of RAM.
const AHEAD_DIVISOR: u32 = 4;

/// What room is made for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    pub(crate) bytes_each: usize,
    /// The first position that can be written.
    pub(crate) first_given: usize,
    pub(crate) priority: Priority,
    pub(crate) terms: Terms,
}

/// How a store deals with what it does not get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Terms {
    /// It waits for writes under way that have its pages, and wants nothing without what comes before it.
    Patient,
    /// It waits for nothing, gives up writes that have not begun instead, and what comes before it is somebody else's business.
    AtOnce,
}

/// What [`Ledger::reserve`] found and made of a run of keys.
#[derive(Debug, Default)]
pub(crate) struct Reservation {
    /// Those that are there, pinned.
    pub(crate) present: Vec<Held>,
    /// Position and pages of each that is missing, up to the first one without room.
    pub(crate) missing: Vec<(usize, Extent)>,
    /// Those that are in a tier and were not given.
    pub(crate) below: usize,
    /// The first position without room.
    pub(crate) refused_from: Option<usize>,
    pub(crate) shortage: Option<Shortage>,
}

/// There is no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shortage {
    /// Writes under way have the pages: it is worth waiting.
    Coming,
    /// There will be none.
    Refused(Rejection),
}

impl From<Rejection> for Shortage {
    fn from(rejection: Rejection) -> Self {
        Self::Refused(rejection)
    }
}

impl Shortage {
    /// What to say if nobody waits any more.
    pub(in crate::store) fn rejection(self, ledger: &Ledger, pages: u32) -> Rejection {
        match self {
            Self::Coming => ledger.all_pinned(u64::from(pages)),
            Self::Refused(rejection) => rejection,
        }
    }
}

impl Ledger {
    /// Room for each size, or for none.
    pub(in crate::store) fn reserve_all(
        &mut self,
        namespace: NamespaceId,
        sizes_bytes: &[usize],
        now_ms: u64,
    ) -> Result<Vec<Extent>, Shortage> {
        self.admit(sizes_bytes.iter().copied())?;
        let share = self.share(namespace);
        if let Some(run) = self.make_run(share, sizes_bytes, now_ms) {
            return Ok(run);
        }
        let mut extents: Vec<Extent> = Vec::with_capacity(sizes_bytes.len());
        for bytes in sizes_bytes {
            let pending = extents.iter().map(Extent::pages).sum();
            match self.make_room(share, *bytes, pending, now_ms) {
                Ok(extent) => extents.push(extent),
                Err(shortage) => {
                    extents.into_iter().for_each(|extent| self.abandon(extent));
                    self.depart_for(share, sizes_bytes.iter().copied());
                    return Err(shortage);
                }
            }
        }
        Ok(extents)
    }

    /// Room for one promoted entry.
    pub(crate) fn reserve_one(
        &mut self,
        namespace: NamespaceId,
        bytes: usize,
        now_ms: u64,
    ) -> Result<Extent, Shortage> {
        let share = self.share(namespace);
        self.make_room(share, bytes, 0, now_ms)
    }

    /// Room for an entry that nobody has asked for yet: what came so before and was not used goes first.
    pub(in crate::store) fn reserve_ahead(
        &mut self,
        namespace: NamespaceId,
        bytes: usize,
        now_ms: u64,
    ) -> Option<Extent> {
        let pages = pages_for(bytes)?;
        while self.ahead_pages + pages > self.ahead_limit_pages() {
            let id = self.ahead.pop_front()?;
            if self.index.get(id).is_some_and(|entry| entry.is(Flag::Ahead) && entry.linked && !entry.is_pinned()) {
                self.drop_entry(id, Departure::Evicted);
                self.counters.evictions += 1;
            }
        }
        let extent = self.reserve_one(namespace, bytes, now_ms).ok()?;
        self.ahead_pages += extent.pages();
        Some(extent)
    }

    /// Pages that [`Ledger::reserve_ahead`] gives at most.
    pub(in crate::store) fn ahead_limit_pages(&self) -> u32 {
        (self.pages.capacity_pages() / AHEAD_DIVISOR).max(1)
    }

    /// What room was made for by [`Ledger::reserve_ahead`] is there, or will not be.
    pub(in crate::store) fn came_ahead(&mut self, pages: u32, key: Option<&ObjectKey>) {
        let id = key.and_then(|key| self.index.find(key));
        match id.and_then(|id| Some((id, self.index.get_mut(id)?))) {
            Some((id, entry)) if !entry.is_pinned() && !entry.is(Flag::Ahead) && entry.extent.pages() == pages => {
                entry.set(Flag::Ahead, true);
                self.ahead.push_back(id);
            }
            _ => self.ahead_pages -= pages,
        }
    }

    /// Holds what is there of a chain and makes room for what is not, head first; what does not fit any more is the
    /// tail. `below` says of each position that is not in RAM whether a tier has it.
    pub(crate) fn reserve(
        &mut self,
        namespace: NamespaceId,
        keys: &[ObjectKey],
        wanted: Wanted,
        below: &[bool],
        now_ms: u64,
    ) -> Reservation {
        let Wanted { bytes_each, first_given, priority, terms } = wanted;
        let share = self.share(namespace);
        let (mut made, mut pending) = (Reservation::default(), 0);
        for (position, key) in keys.iter().enumerate() {
            if let Some(held) = self.hold_key(key, now_ms, &made.present) {
                self.raise(held.id, keys, position, priority);
                made.present.push(held);
                continue;
            }
            let is_below = below.get(position) == Some(&true);
            if position < first_given && (is_below || terms == Terms::AtOnce) {
                made.below += 1;
                continue;
            }
            let room = if position < first_given {
                Err(Rejection::PrefixGone { token: position }.into())
            } else {
                self.make_room(share, bytes_each, pending, now_ms)
            };
            match room {
                Ok(extent) => {
                    pending += extent.pages();
                    made.missing.push((position, extent));
                }
                Err(shortage) => {
                    let rest = keys.get(position..).unwrap_or_default();
                    let refused = rest.iter().filter(|key| self.index.find(key).is_none()).count();
                    let sizes = |blocks| std::iter::repeat_n(bytes_each, blocks);
                    let too_large = self.fits_empty(sizes(made.missing.len() + refused)).err();
                    made.refused_from = Some(position);
                    made.shortage = Some(too_large.map_or(shortage, Shortage::Refused));
                    if made.shortage == Some(Shortage::Coming) {
                        self.depart_for(share, sizes(refused));
                    }
                    return made;
                }
            }
        }
        made
    }

    /// What comes before must be kept as long as what is stored behind it.
    fn raise(&mut self, id: EntryId, keys: &[ObjectKey], position: usize, priority: Priority) {
        if self.policy.priority(id) >= priority {
            return;
        }
        let (Some(key), Some(entry)) = (keys.get(position), self.index.get(id)) else { return };
        let pages = entry.extent.pages();
        let parent = position.checked_sub(1).and_then(|before| keys.get(before));
        let parent = parent.and_then(|key| self.in_order(key));
        let place = Place::of(position, keys.len(), keys.len());
        let arrival = Arrival { fingerprint: key.table_hash(), parent, place };
        self.policy.raise(id, &arrival, pages, priority);
    }

    /// Free extents behind each other in one run of pages, so that a reader of all of them
    /// needs one view. Evicts what these sizes take wherever they come to lie, and nothing
    /// for the sake of the run: where the free pages are scattered there is none.
    fn make_run(&mut self, share: ShareId, sizes_bytes: &[usize], now_ms: u64) -> Option<Vec<Extent>> {
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
    fn make_room(&mut self, share: ShareId, bytes: usize, pending: u32, now_ms: u64) -> Result<Extent, Shortage> {
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

    /// Evicts one entry, for a share that will have `pending` pages more, of which `pages` are wanted now: one that
    /// departed before, or what the policy says. One that has to be offered first departs now.
    pub(super) fn evict_one(&mut self, share: ShareId, pending: u32, pages: u32) -> Result<(), Shortage> {
        if let Some(id) = self.next_ready() {
            self.evict(id);
            return Ok(());
        }
        loop {
            // Where the free pages are scattered, more have to come than are missing.
            let missing = pages.saturating_sub(self.pages.free_pages()).max(1);
            if self.departing_pages >= missing {
                return Err(Shortage::Coming);
            }
            let victim = self.policy.victim(share, pending, self.pages.capacity_pages());
            let Some(victim) = victim else {
                let coming = self.departing_pages > 0;
                return Err(if coming { Shortage::Coming } else { self.no_victim(share, pending, pages).into() });
            };
            if !self.depart(victim) {
                self.evict(victim);
                return Ok(());
            }
        }
    }

    fn evict(&mut self, id: EntryId) {
        self.drop_entry(id, Departure::Evicted);
        self.counters.evictions += 1;
    }

    /// Has as many entries depart as these sizes will need, so that they are written together.
    fn depart_for(&mut self, share: ShareId, sizes_bytes: impl Iterator<Item = usize>) {
        let pages: u64 = sizes_bytes.map(|bytes| bytes.div_ceil(PAGE_BYTES) as u64).sum();
        let pages = u32::try_from(pages).unwrap_or(u32::MAX);
        while self.pages.free_pages().saturating_add(self.departing_pages) < pages {
            let Some(victim) = self.policy.victim(share, pages, self.pages.capacity_pages()) else { return };
            if !self.depart(victim) {
                self.evict(victim);
            }
        }
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
            self.last_sweep_ms = now_ms;
            self.sweep(now_ms);
        }
    }

    /// Drops what has expired, at most [`SLICE`] entries; says how many.
    pub(in crate::store) fn sweep(&mut self, now_ms: u64) -> usize {
        let mut dropped = 0;
        while dropped < SLICE
            && let Some(id) = self.index.next_expired(now_ms)
        {
            self.drop_entry(id, Departure::Removed);
            dropped += 1;
        }
        self.counters.expirations += dropped as u64;
        dropped
    }

    /// Refuses, before anything is evicted, what would not fit even if everything went that is not pinned.
    fn admit(&self, sizes_bytes: impl Iterator<Item = usize>) -> Result<(), Rejection> {
        let pages = self.fits_empty(sizes_bytes)?;
        if pages + u64::from(self.held_pages) > u64::from(self.pages.capacity_pages()) {
            return Err(self.all_pinned(pages));
        }
        Ok(())
    }

    /// The pages these sizes take, if an empty cache has as many.
    fn fits_empty(&self, sizes_bytes: impl Iterator<Item = usize>) -> Result<u64, Rejection> {
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
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a part of the capacity in pages")]
fn due_bytes(pages: f64) -> u64 {
    pages as u64 * PAGE_BYTES as u64
}
