//! LRU-2 (O'Neil et al., "The LRU-K page replacement algorithm for database disk buffering",
//! SIGMOD 1993): the entry whose second to last use is longest ago goes first; what was used
//! once goes before all of them, the least recent first. What was evicted is remembered for twelve
//! times as many evictions as there are residents, which takes 96 bytes a resident. The paper
//! leaves that time open; with a shorter one the published figures are not reached.

use std::collections::BTreeSet;

use super::ghosts::{Buckets, tag};
use super::list::Slots;
use super::{Arrival, Departure, EntryId, Place, Policy};

/// Evictions remembered for each resident entry.
const REMEMBERED: usize = 12;

#[derive(Debug)]
pub(crate) struct Lru2 {
    slots: Slots<Slot>,
    /// By second to last use, last use, entry.
    order: BTreeSet<(u32, u32, EntryId)>,
    ghosts: Buckets,
    /// Releases so far. It turns over after 4 billion, which disturbs the order once.
    now: u32,
    resident: usize,
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

impl Lru2 {
    pub(crate) fn new() -> Self {
        Self { slots: Slots::new(), order: BTreeSet::new(), ghosts: Buckets::default(), now: 0, resident: 0 }
    }

    fn link(&mut self, id: EntryId) {
        self.now = self.now.wrapping_add(1);
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
            let wanted = self.resident * REMEMBERED;
            self.ghosts.add(slot.tag, slot.last, wanted);
        }
    }

    fn victim(&mut self) -> Option<EntryId> {
        self.order.first().map(|(_, _, id)| *id)
    }

    fn memory_bytes(&self) -> usize {
        // A B-tree's nodes are two thirds full or more after random inserts.
        self.slots.memory_bytes()
            + self.order.len() * size_of::<(u32, u32, EntryId)>() * 3 / 2
            + self.ghosts.memory_bytes()
    }
}
