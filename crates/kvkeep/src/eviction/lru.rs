//! Least recently used, as a doubly linked list through a vector of slots: every
//! call is O(1) and an entry costs 8 bytes. A queue of timestamps was the
//! alternative: it needs a sweep of stale stamps.

use super::{EntryId, Policy};

/// Marks an unlinked slot and the ends of the list.
const NONE: EntryId = EntryId::MAX;

/// The list runs from the most recent (`newest`) to the least recent (`oldest`).
#[derive(Debug)]
pub(crate) struct Lru {
    links: Vec<Link>,
    newest: EntryId,
    oldest: EntryId,
}

#[derive(Debug, Clone, Copy)]
struct Link {
    newer: EntryId,
    older: EntryId,
}

impl Lru {
    pub(crate) fn new() -> Self {
        Self { links: Vec::new(), newest: NONE, oldest: NONE }
    }

    fn link(&mut self, id: EntryId) {
        let slot = id as usize;
        if slot >= self.links.len() {
            let missing = slot + 1 - self.links.len();
            // Grow by an eighth, not by half: slack counts as index memory.
            if self.links.capacity() <= slot {
                self.links.reserve_exact(missing.max(self.links.len() / 8));
            }
            self.links.resize(slot + 1, Link { newer: NONE, older: NONE });
        }
        let older = self.newest;
        self.set(id, |link| *link = Link { newer: NONE, older });
        self.set(older, |link| link.newer = id);
        self.newest = id;
        if self.oldest == NONE {
            self.oldest = id;
        }
    }

    fn unlink(&mut self, id: EntryId) {
        let Some(&Link { newer, older }) = self.links.get(id as usize) else { return };
        if newer == NONE && older == NONE && self.newest != id {
            return; // not in the list
        }
        self.set(newer, |link| link.older = older);
        self.set(older, |link| link.newer = newer);
        if self.newest == id {
            self.newest = older;
        }
        if self.oldest == id {
            self.oldest = newer;
        }
        self.set(id, |link| *link = Link { newer: NONE, older: NONE });
    }

    fn set(&mut self, id: EntryId, change: impl FnOnce(&mut Link)) {
        if let Some(link) = self.links.get_mut(id as usize) {
            change(link);
        }
    }
}

impl Policy for Lru {
    fn insert(&mut self, id: EntryId) {
        self.link(id);
    }

    fn remove(&mut self, id: EntryId) {
        self.unlink(id);
    }

    fn hold(&mut self, id: EntryId) {
        self.unlink(id);
    }

    fn release(&mut self, id: EntryId) {
        self.link(id);
    }

    fn victim(&self) -> Option<EntryId> {
        (self.oldest != NONE).then_some(self.oldest)
    }

    fn memory_bytes(&self) -> usize {
        self.links.capacity() * size_of::<Link>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn drain(lru: &mut Lru) -> Vec<EntryId> {
        std::iter::from_fn(|| {
            let id = lru.victim()?;
            lru.remove(id);
            Some(id)
        })
        .collect()
    }

    #[test]
    fn the_least_recently_used_goes_first() {
        let mut lru = Lru::new();
        (0..4).for_each(|id| lru.insert(id));
        lru.hold(0);
        lru.release(0);
        lru.hold(2);
        lru.remove(2);
        assert_eq!(drain(&mut lru), [1, 3, 0]);
    }

    proptest! {
        /// Against the plainest model there is: a vector ordered by recency.
        #[test]
        fn agrees_with_a_vector_ordered_by_recency(ops in prop::collection::vec((0u8..4, 0u32..8), 1..200)) {
            let mut lru = Lru::new();
            let mut order: Vec<u32> = Vec::new();
            let mut held: Vec<u32> = Vec::new();
            for (op, id) in ops {
                let (listed, pinned) = (order.contains(&id), held.contains(&id));
                match op {
                    0 if !listed && !pinned => {
                        lru.insert(id);
                        order.push(id);
                    }
                    1 if listed => {
                        lru.hold(id);
                        order.retain(|other| *other != id);
                        held.push(id);
                    }
                    2 if pinned => {
                        lru.release(id);
                        held.retain(|other| *other != id);
                        order.push(id);
                    }
                    3 => {
                        lru.remove(id);
                        order.retain(|other| *other != id);
                        held.retain(|other| *other != id);
                    }
                    _ => {}
                }
                prop_assert_eq!(lru.victim(), order.first().copied());
            }
            prop_assert_eq!(drain(&mut lru), order);
        }
    }
}
