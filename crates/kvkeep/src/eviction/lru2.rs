//! LRU-2 (O'Neil et al., "The LRU-K page replacement algorithm for database disk buffering",
//! SIGMOD 1993): the entry whose second to last use is longest ago goes first; what was used
//! once goes before all of them, the least recent first. What was evicted is remembered for four
//! times as many evictions as the cache has held entries, which takes 32 bytes an entry. The
//! paper leaves that time open; with twelve times as many no published figure changes by 0.1
//! points, with three times one of them is missed.

use std::collections::BTreeSet;

use super::ghosts::{Buckets, tag};
use super::{Arrival, Departure, EntryId, Place, Policy};
use crate::slots::Slots;

/// Evictions remembered for each resident entry.
const REMEMBERED: usize = 4;
/// Marks the rank of an entry used more than once; the clock has the bits below.
const OFTEN: u32 = 1 << 31;

#[derive(Debug)]
pub(crate) struct Lru2 {
    slots: Slots<Slot>,
    /// By rank, entry.
    order: BTreeSet<(u32, EntryId)>,
    /// A chain is worth nothing behind a block that was forgotten, so the order has to be nearly
    /// exact: buckets of eight lose a point of hits.
    ghosts: Buckets<128>,
    /// Releases so far. It turns over after 2 billion, which disturbs the order once.
    now: u32,
    resident: usize,
    /// The most that was resident when a request began.
    capacity: usize,
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    tag: u32,
    second_last: u32,
    last: u32,
    /// Uses are told while an entry is held and count when it is released.
    used: bool,
    listed: bool,
    here: bool,
}

impl Slot {
    fn rank(&self) -> u32 {
        if self.second_last == 0 { self.last } else { self.second_last | OFTEN }
    }
}

impl Lru2 {
    pub(crate) fn new() -> Self {
        Self {
            slots: Slots::default(),
            order: BTreeSet::new(),
            ghosts: Buckets::default(),
            now: 0,
            resident: 0,
            capacity: 0,
        }
    }

    fn link(&mut self, id: EntryId) {
        self.now = (self.now + 1) % OFTEN;
        let Some(slot) = self.slots.get_mut(id) else { return };
        if std::mem::take(&mut slot.used) {
            slot.second_last = slot.last;
        }
        slot.last = self.now;
        slot.listed = true;
        self.order.insert((slot.rank(), id));
    }

    fn unlink(&mut self, id: EntryId) {
        let Some(slot) = self.slots.get_mut(id) else { return };
        if std::mem::take(&mut slot.listed) {
            self.order.remove(&(slot.rank(), id));
        }
    }
}

impl Policy for Lru2 {
    fn tick(&mut self) {
        self.capacity = self.capacity.max(self.resident);
    }

    fn insert(&mut self, id: EntryId, arrival: &Arrival) {
        let tag = tag(arrival.fingerprint);
        let second_last = self.ghosts.take(tag).unwrap_or(0);
        let slot = Slot { tag, second_last, last: 0, used: false, listed: false, here: true };
        if let Some(place) = self.slots.grow(id, slot) {
            *place = slot;
        }
        self.resident += 1;
        self.link(id);
    }

    fn touch(&mut self, id: EntryId, _place: Place) {
        if let Some(slot) = self.slots.get_mut(id) {
            slot.used = true;
        }
    }

    fn hold(&mut self, id: EntryId) {
        self.unlink(id);
    }

    fn release(&mut self, id: EntryId) {
        self.link(id);
    }

    fn remove(&mut self, id: EntryId, why: Departure) {
        self.unlink(id);
        let Some(slot) = self.slots.get_mut(id).filter(|slot| slot.here) else { return };
        slot.here = false;
        self.resident -= 1;
        if why == Departure::Evicted {
            let capacity = if self.capacity == 0 { self.resident } else { self.capacity };
            self.ghosts.add(slot.tag, slot.last, capacity * REMEMBERED);
        }
    }

    fn victim(&mut self) -> Option<EntryId> {
        self.order.first().map(|(_, id)| *id)
    }

    fn memory_bytes(&self) -> usize {
        // A B-tree's nodes are two thirds full or more after random inserts.
        self.slots.memory_bytes() + self.order.len() * size_of::<(u32, EntryId)>() * 3 / 2 + self.ghosts.memory_bytes()
    }
}
