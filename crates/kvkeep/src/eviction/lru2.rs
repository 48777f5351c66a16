//! LRU-2 (O'Neil et al., "The LRU-K page replacement algorithm for database disk buffering",
//! SIGMOD 1993): the entry whose second to last use is longest ago goes first; what was used
//! once goes before all of them, the least recent first. What was evicted is remembered for four
//! times as many evictions as there are residents; the paper leaves that time open, and without it
//! a session that comes back after an eviction looks new for ever.

use std::collections::BTreeSet;

use super::ghosts::Ghosts;
use super::list::Slots;
use super::{Arrival, Departure, EntryId, Place, Policy};

/// Evictions remembered for each resident entry.
const REMEMBERED: usize = 4;

#[derive(Debug)]
pub(crate) struct Lru2 {
    slots: Slots<Slot>,
    order: BTreeSet<(u64, u64, EntryId)>,
    now: u64,
    history: Ghosts<u64>,
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    fingerprint: u64,
    second_last: u64,
    last: u64,
    /// Uses are told while an entry is held and count when it is released.
    used: bool,
    listed: bool,
}

impl Lru2 {
    pub(crate) fn new() -> Self {
        Self { slots: Slots::new(), order: BTreeSet::new(), now: 0, history: Ghosts::new() }
    }

    fn link(&mut self, id: EntryId) {
        self.now += 1;
        let Some(slot) = self.slots.get_mut(id) else { return };
        if std::mem::take(&mut slot.used) {
            slot.second_last = slot.last;
        }
        slot.last = self.now;
        slot.listed = true;
        self.order.insert((slot.second_last, slot.last, id));
    }

    fn unlink(&mut self, id: EntryId) {
        let Some(slot) = self.slots.get_mut(id) else { return };
        if std::mem::take(&mut slot.listed) {
            self.order.remove(&(slot.second_last, slot.last, id));
        }
    }
}

impl Policy for Lru2 {
    fn insert(&mut self, id: EntryId, arrival: &Arrival) {
        let second_last = self.history.take(arrival.fingerprint).unwrap_or(0);
        let slot = Slot { fingerprint: arrival.fingerprint, second_last, last: 0, used: false, listed: false };
        if let Some(place) = self.slots.grow(id, slot) {
            *place = slot;
        }
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
        if let Some(slot) = self.slots.get(id).filter(|_| why == Departure::Evicted) {
            self.history.add(slot.fingerprint, slot.last, self.order.len() * REMEMBERED);
        }
    }

    fn victim(&mut self) -> Option<EntryId> {
        self.order.first().map(|(_, _, id)| *id)
    }

    fn memory_bytes(&self) -> usize {
        // A B-tree's nodes are two thirds full or more after random inserts.
        self.slots.memory_bytes() + self.order.len() * size_of::<(u64, u64, EntryId)>() * 3 / 2
    }
}
