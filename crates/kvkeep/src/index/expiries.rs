//! What expires, soonest first: a binary heap of ids, each entry knowing its place in it.
//!
//! So finding what has expired costs nothing where nothing has, 4 bytes an entry, and 4 more one that can expire. A set of
//! (time, id) was the alternative: four times the memory.

use super::{Entry, NEVER, push};
use crate::eviction::EntryId;
use crate::slots::Slots;

/// The place of what does not expire.
pub(super) const NOWHERE: u32 = u32::MAX;

#[derive(Debug, Default)]
pub(super) struct Expiries {
    heap: Vec<EntryId>,
}

impl Expiries {
    /// An entry that is in its slot now.
    pub(super) fn add(&mut self, slots: &mut Slots<Option<Entry>>, id: EntryId) {
        if time(slots, id) == NEVER {
            return;
        }
        push(&mut self.heap, id);
        self.rise(slots, self.heap.len() - 1);
    }

    /// An entry that is still in its slot.
    pub(super) fn remove(&mut self, slots: &mut Slots<Option<Entry>>, id: EntryId) {
        let at = slots.get(id).and_then(Option::as_ref).map_or(NOWHERE, |entry| entry.expiry_at) as usize;
        if self.heap.get(at) != Some(&id) {
            return;
        }
        self.heap.swap_remove(at);
        if at < self.heap.len() {
            let at = self.rise(slots, at);
            self.sink(slots, at);
        }
    }

    pub(super) fn first(&self) -> Option<EntryId> {
        self.heap.first().copied()
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.heap.capacity() * size_of::<EntryId>()
    }

    /// Says where it comes to stand.
    fn rise(&mut self, slots: &mut Slots<Option<Entry>>, mut at: usize) -> usize {
        while at > 0 {
            let parent = (at - 1) / 2;
            if self.time(slots, parent) <= self.time(slots, at) {
                break;
            }
            self.swap(slots, parent, at);
            at = parent;
        }
        self.note(slots, at);
        at
    }

    fn sink(&mut self, slots: &mut Slots<Option<Entry>>, mut at: usize) {
        loop {
            let (left, right) = (2 * at + 1, 2 * at + 2);
            let next = if self.time(slots, right) < self.time(slots, left) { right } else { left };
            if next >= self.heap.len() || self.time(slots, at) <= self.time(slots, next) {
                return self.note(slots, at);
            }
            self.swap(slots, at, next);
            at = next;
        }
    }

    fn swap(&mut self, slots: &mut Slots<Option<Entry>>, one: usize, other: usize) {
        self.heap.swap(one, other);
        self.note(slots, one);
        self.note(slots, other);
    }

    fn note(&self, slots: &mut Slots<Option<Entry>>, at: usize) {
        let slot = self.heap.get(at).and_then(|id| slots.get_mut(*id));
        if let Some(Some(entry)) = slot {
            entry.expiry_at = u32::try_from(at).unwrap_or(NOWHERE);
        }
    }

    fn time(&self, slots: &Slots<Option<Entry>>, at: usize) -> u64 {
        self.heap.get(at).map_or(NEVER, |id| time(slots, *id))
    }
}

fn time(slots: &Slots<Option<Entry>>, id: EntryId) -> u64 {
    slots.get(id).and_then(Option::as_ref).map_or(NEVER, |entry| entry.expires_at_ms)
}

#[cfg(test)]
mod tests {
    use super::super::Index;
    use super::*;
    use crate::key::{NamespaceId, ObjectKey};
    use crate::tier::ram::pages_without_arena;

    /// Against a plain search, with removals in between.
    #[test]
    fn what_expires_first_is_found_whatever_comes_and_goes() {
        let (mut pages, mut index) = (pages_without_arena(2000), Index::default());
        let namespace = index.namespace(NamespaceId::named("n"));
        let mut state = 7u64;
        let mut live: Vec<(u64, EntryId)> = Vec::new();
        for number in 0..2000u64 {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            let expires = if state >> 60 == 0 { NEVER } else { state >> 50 };
            let mut entry = Entry::new(ObjectKey::numbered(number), pages.allocate(1).unwrap(), 0, expires, None, 0);
            entry.namespace = namespace;
            let id = index.insert(entry);
            if expires != NEVER {
                live.push((expires, id));
            }
            if state >> 62 == 1 && !live.is_empty() {
                let (_, id) = live.swap_remove((state >> 20) as usize % live.len());
                index.unlink(id);
                let _ = pages.free(index.take(id).unwrap().extent);
            }
            let first = live.iter().map(|(expires, _)| *expires).min();
            let found = index.next_expired(NEVER - 1).map(|id| index.get(id).unwrap().expires_at_ms);
            assert_eq!(found, first);
        }
    }
}
