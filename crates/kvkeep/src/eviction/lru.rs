//! Least recently used. What every other policy is measured against.

use super::list::{Links, List};
use super::{Arrival, Departure, EntryId, Place, Policy};
use crate::slots::Slots;

#[derive(Debug)]
pub(crate) struct Lru {
    links: Links,
    order: List,
    /// Is the entry in `order`? Held ones are not.
    listed: Slots<bool>,
}

impl Lru {
    pub(crate) fn new() -> Self {
        Self { links: Slots::default(), order: List::new(), listed: Slots::default() }
    }

    fn unlink(&mut self, id: EntryId) {
        if self.listed.get_mut(id).is_some_and(std::mem::take) {
            self.order.unlink(&mut self.links, id);
        }
    }

    fn link(&mut self, id: EntryId) {
        self.order.push(&mut self.links, id);
        if let Some(listed) = self.listed.grow(id, false) {
            *listed = true;
        }
    }
}

impl Policy for Lru {
    fn insert(&mut self, id: EntryId, _arrival: &Arrival) {
        self.link(id);
    }

    fn touch(&mut self, _id: EntryId, _place: Place) {}

    fn hold(&mut self, id: EntryId) {
        self.unlink(id);
    }

    fn release(&mut self, id: EntryId) {
        self.link(id);
    }

    fn remove(&mut self, id: EntryId, _why: Departure) {
        self.unlink(id);
    }

    fn victim(&mut self) -> Option<EntryId> {
        self.order.oldest()
    }

    fn memory_bytes(&self) -> usize {
        self.links.memory_bytes() + self.listed.memory_bytes()
    }
}
