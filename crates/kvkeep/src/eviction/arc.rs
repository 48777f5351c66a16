//! ARC (Megiddo and Modha, "ARC: a self-tuning, low overhead replacement cache", FAST 2003): one
//! list of what was used once, one of what was used again, and for each a memory of what left
//! it; a newcomer found in a memory moves the border between the two lists.
//!
//! The cache's capacity is what is resident when room is needed.

use super::ghosts::{Ghosts, tag};
use super::list::{Links, List, Slots};
use super::{Arrival, Departure, EntryId, Place, Policy};

#[derive(Debug)]
pub(crate) struct Arc {
    links: Links,
    slots: Slots<Slot>,
    once: List,
    often: List,
    ghosts_once: Ghosts,
    ghosts_often: Ghosts,
    /// How many of the resident entries should be in `once`.
    target_once: usize,
    /// Entries, also those that are held.
    resident: usize,
    /// Held entries that were used once.
    held_once: usize,
    capacity: usize,
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    tag: u32,
    often: bool,
    place: At,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Gone,
    Listed,
    Held,
}

impl Arc {
    pub(crate) fn new() -> Self {
        Self {
            links: Slots::new(),
            slots: Slots::new(),
            once: List::new(),
            often: List::new(),
            ghosts_once: Ghosts::new(),
            ghosts_often: Ghosts::new(),
            target_once: 0,
            resident: 0,
            held_once: 0,
            capacity: 0,
        }
    }

    fn link(&mut self, id: EntryId) {
        let Some(slot) = self.slots.get_mut(id) else { return };
        if slot.place == At::Held && !slot.often {
            self.held_once -= 1;
        }
        slot.place = At::Listed;
        let list = if slot.often { &mut self.often } else { &mut self.once };
        list.push(&mut self.links, id);
    }

    /// Out of its list, wherever it is.
    fn unlink(&mut self, id: EntryId, now: At) {
        let Some(slot) = self.slots.get_mut(id) else { return };
        match std::mem::replace(&mut slot.place, now) {
            At::Listed => {
                let list = if slot.often { &mut self.often } else { &mut self.once };
                list.unlink(&mut self.links, id);
            }
            At::Held if !slot.often => self.held_once -= 1,
            _ => {}
        }
        if now == At::Held && !slot.often {
            self.held_once += 1;
        }
    }

    /// Moves the border if the newcomer was here before; was it?
    fn recall(&mut self, tag: u32) -> bool {
        let (once, often) = (self.ghosts_once.len(), self.ghosts_often.len());
        if self.ghosts_once.take(tag) {
            let step = (often / once.max(1)).max(1);
            self.target_once = (self.target_once + step).min(self.capacity);
            true
        } else if self.ghosts_often.take(tag) {
            let step = (once / often.max(1)).max(1);
            self.target_once = self.target_once.saturating_sub(step);
            true
        } else {
            false
        }
    }
}

impl Policy for Arc {
    fn insert(&mut self, id: EntryId, arrival: &Arrival) {
        let often = self.recall(tag(arrival.fingerprint));
        let slot = Slot { tag: tag(arrival.fingerprint), often, place: At::Gone };
        if let Some(place) = self.slots.grow(id, slot) {
            *place = slot;
        }
        self.link(id);
        self.resident += 1;
        self.capacity = self.capacity.max(self.resident);
    }

    fn touch(&mut self, id: EntryId, _place: Place) {
        let Some(slot) = self.slots.get_mut(id) else { return };
        if slot.place == At::Held && !slot.often {
            slot.often = true;
            self.held_once -= 1;
        }
    }

    fn hold(&mut self, id: EntryId) {
        self.unlink(id, At::Held);
    }

    fn release(&mut self, id: EntryId) {
        self.link(id);
    }

    fn remove(&mut self, id: EntryId, why: Departure) {
        let Some(slot) = self.slots.get(id).copied().filter(|slot| slot.place != At::Gone) else { return };
        self.unlink(id, At::Gone);
        self.resident -= 1;
        if why == Departure::Removed {
            return;
        }
        let ghosts = if slot.often { &mut self.ghosts_often } else { &mut self.ghosts_once };
        ghosts.add(slot.tag);
        let once = self.once.len() + self.held_once;
        self.ghosts_once.shrink(self.capacity.saturating_sub(once));
        let others = self.resident + self.ghosts_once.len();
        self.ghosts_often.shrink((2 * self.capacity).saturating_sub(others));
    }

    fn victim(&mut self) -> Option<EntryId> {
        let once = self.once.len() + self.held_once;
        let (first, second) =
            if once > self.target_once { (&self.once, &self.often) } else { (&self.often, &self.once) };
        first.oldest().or(second.oldest())
    }

    fn memory_bytes(&self) -> usize {
        self.links.memory_bytes()
            + self.slots.memory_bytes()
            + self.ghosts_once.memory_bytes()
            + self.ghosts_often.memory_bytes()
    }
}
