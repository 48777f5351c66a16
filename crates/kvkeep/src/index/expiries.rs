//! What expires, soonest first: a binary heap of times and ids, each entry knowing its place in it.
//!
//! So finding what has expired costs nothing where nothing has, 4 bytes an entry, and 12 more one that can expire. A set of
//! (time, id) was the alternative: three times the memory. The time in each entry was another: 8 bytes of what never expires, too.

use super::{Entry, NEVER, push};
use crate::eviction::EntryId;
use crate::slots::Slots;

/// The place of what does not expire.
pub(super) const NOWHERE: u32 = u32::MAX;

#[derive(Debug, Default)]
pub(super) struct Expiries {
    /// Apart, so that none takes room for the other's alignment.
    times_ms: Vec<u64>,
    ids: Vec<EntryId>,
}

impl Expiries {
    /// An entry that is in its slot now.
    pub(super) fn add(&mut self, slots: &mut Slots<Option<Entry>>, id: EntryId, expires_at_ms: u64) {
        if expires_at_ms == NEVER {
            return;
        }
        push(&mut self.times_ms, expires_at_ms);
        push(&mut self.ids, id);
        self.rise(slots, self.ids.len() - 1);
    }

    /// An entry that is still in its slot, and does not expire any more.
    pub(super) fn remove(&mut self, slots: &mut Slots<Option<Entry>>, id: EntryId) {
        let Some(entry) = slots.get_mut(id).and_then(Option::as_mut) else { return };
        let at = std::mem::replace(&mut entry.expiry_at, NOWHERE) as usize;
        if at >= self.ids.len() {
            return;
        }
        self.times_ms.swap_remove(at);
        self.ids.swap_remove(at);
        if at < self.ids.len() {
            let at = self.rise(slots, at);
            self.sink(slots, at);
        }
    }

    /// When what stands at a place expires.
    pub(super) fn time(&self, at: u32) -> u64 {
        self.time_at(at as usize)
    }

    pub(super) fn first(&self) -> Option<(u64, EntryId)> {
        self.times_ms.first().copied().zip(self.ids.first().copied())
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.times_ms.capacity() * size_of::<u64>() + self.ids.capacity() * size_of::<EntryId>()
    }

    /// Says where it comes to stand.
    fn rise(&mut self, slots: &mut Slots<Option<Entry>>, mut at: usize) -> usize {
        while at > 0 {
            let parent = (at - 1) / 2;
            if self.time_at(parent) <= self.time_at(at) {
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
            let next = if self.time_at(right) < self.time_at(left) { right } else { left };
            if next >= self.ids.len() || self.time_at(at) <= self.time_at(next) {
                return self.note(slots, at);
            }
            self.swap(slots, at, next);
            at = next;
        }
    }

    fn swap(&mut self, slots: &mut Slots<Option<Entry>>, one: usize, other: usize) {
        self.times_ms.swap(one, other);
        self.ids.swap(one, other);
        self.note(slots, one);
        self.note(slots, other);
    }

    fn note(&self, slots: &mut Slots<Option<Entry>>, at: usize) {
        let slot = self.ids.get(at).and_then(|id| slots.get_mut(*id));
        if let Some(Some(entry)) = slot {
            entry.expiry_at = u32::try_from(at).unwrap_or(NOWHERE);
        }
    }

    fn time_at(&self, at: usize) -> u64 {
        self.times_ms.get(at).copied().unwrap_or(NEVER)
    }
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
            let mut entry = Entry::new(ObjectKey::numbered(number), pages.allocate(1).unwrap(), 0, None, 0);
            entry.namespace = namespace;
            let id = index.insert(entry, expires);
            assert_eq!(index.expires_at_ms(index.get(id).unwrap()), expires);
            assert_eq!(index.live_mut(id, 100).is_some(), expires > 100);
            if expires != NEVER {
                live.push((expires, id));
            }
            if state >> 62 == 1 && !live.is_empty() {
                let (_, id) = live.swap_remove((state >> 20) as usize % live.len());
                index.unlink(id);
                let _ = pages.free(index.take(id).unwrap().extent);
            }
            let first = live.iter().map(|(expires, _)| *expires).min();
            let found = index.next_expired(NEVER - 1).map(|id| index.expires_at_ms(index.get(id).unwrap()));
            assert_eq!(found, first);
        }
    }
}
