//! Doubly linked lists through one list of slots: every call is O(1), an entry costs
//! 8 bytes, and several lists share it because an entry is in one at a time.
//! A queue of time stamps was the alternative: it needs a sweep of stale stamps.

use super::EntryId;
use crate::slots::Slots;

/// Marks an unlinked slot and the ends of a list.
pub(super) const NONE: EntryId = EntryId::MAX;

#[derive(Debug, Clone, Copy)]
pub(super) struct Link {
    newer: EntryId,
    older: EntryId,
}

/// The links of all lists of a policy.
pub(super) type Links = Slots<Link>;

/// One list, from the most recent (`newest`) to the least recent (`oldest`).
#[derive(Debug)]
pub(super) struct List {
    newest: EntryId,
    oldest: EntryId,
    len: usize,
}

impl List {
    pub(super) const fn new() -> Self {
        Self { newest: NONE, oldest: NONE, len: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn oldest(&self) -> Option<EntryId> {
        (self.oldest != NONE).then_some(self.oldest)
    }

    /// Puts an entry that is in no list at the recent end.
    pub(super) fn push(&mut self, links: &mut Links, id: EntryId) {
        let older = self.newest;
        if let Some(link) = links.grow(id, Link { newer: NONE, older: NONE }) {
            *link = Link { newer: NONE, older };
        }
        if let Some(link) = links.get_mut(older) {
            link.newer = id;
        }
        self.newest = id;
        if self.oldest == NONE {
            self.oldest = id;
        }
        self.len += 1;
    }

    /// Takes out an entry; one that is not in this list must not be passed.
    pub(super) fn unlink(&mut self, links: &mut Links, id: EntryId) {
        let Some(&Link { newer, older }) = links.get(id) else { return };
        if let Some(link) = links.get_mut(newer) {
            link.older = older;
        }
        if let Some(link) = links.get_mut(older) {
            link.newer = newer;
        }
        if self.newest == id {
            self.newest = older;
        }
        if self.oldest == id {
            self.oldest = newer;
        }
        self.len -= 1;
    }
}
