//! What leaves RAM for the tiers.
//!
//! A victim that no tier may have yet departs: it is offered, can still be found, and counts as room only when the
//! write has let go of its pages. If it is asked for meanwhile, it stays. Dropping victims while their writes were
//! queued was the alternative: their pages were not free, so one store evicted as many as the queue took.

use super::{Held, Ledger};
use crate::block::{BlockMeta, Content, Facts};
use crate::eviction::{Arrival, Departure, EntryId, Place};
use crate::index::Flag;
use crate::key::ObjectKey;
use crate::tier::Epoch;

/// An entry to be offered to the tiers. Its content is not filled in: the ledger does not know models.
#[derive(Debug)]
pub(crate) struct Leaving {
    pub(crate) meta: BlockMeta,
    pub(crate) held: Held,
    pub(crate) epoch: Epoch,
    /// The kind it was admitted as.
    pub(crate) mark: u8,
}

impl Ledger {
    /// What is to be offered now.
    pub(crate) fn take_offers(&mut self) -> Vec<Leaving> {
        std::mem::take(&mut self.offers)
    }

    /// Offers the entries of a chain: behind one that is kept off nothing could be found.
    pub(crate) fn offer_run(&mut self, keys: &[ObjectKey]) {
        for key in keys {
            if let Some(id) = self.index.find(key)
                && !self.offer_entry(id)
            {
                return;
            }
        }
    }

    /// Offers entries of the next `slots` slots, so that a flush can wait for them. `again`: those alone that a flush waits for
    /// still. Says how many it waits for, and where to go on, if there is more.
    pub(in crate::store) fn flush_some(
        &mut self,
        from: EntryId,
        slots: usize,
        again: bool,
    ) -> (usize, Option<EntryId>) {
        let (ids, next) = self.index.select_some(from, slots, |entry| entry.is(Flag::Flushing) || !again);
        let mut awaited = 0;
        for id in ids {
            let may_go = self.offer_entry(id);
            awaited += usize::from(may_go);
            if let Some(entry) = self.index.get_mut(id) {
                entry.set(Flag::Flushing, may_go);
            }
        }
        (awaited, next)
    }

    /// Every tier has an entry.
    pub(crate) fn is_everywhere(&mut self, held: &Held) {
        if let Some(entry) = self.index.get_mut(held.id) {
            entry.set(Flag::Flushing, false);
        }
    }

    /// Offers an entry to the tiers; says whether it may go there.
    pub(super) fn offer_entry(&mut self, id: EntryId) -> bool {
        if !self.has_tiers {
            return false;
        }
        let Some(entry) = self.index.get(id) else { return false };
        if entry.is(Flag::Queued) {
            return true;
        }
        let Some(meta) = self.describe(id) else { return false };
        let mark = match self.gate.as_mut().map(|gate| gate.admits(id)) {
            Some(None) => return false,
            Some(Some(kind)) => kind,
            None => 0,
        };
        if let Some(held) = self.hold_queued(id) {
            self.offers.push(Leaving { meta, held, epoch: self.epoch, mark });
        }
        true
    }

    /// What an entry is. Of a block of tokens it does not know the content: the ledger knows no models.
    pub(in crate::store) fn describe(&self, id: EntryId) -> Option<BlockMeta> {
        let entry = self.index.get(id)?;
        let namespace = self.index.namespaces().id(entry.namespace)?;
        Some(BlockMeta {
            facts: Facts {
                expires_at_ms: self.index.expires_at_ms(entry),
                compute_us: entry.compute_us,
                ..Facts::raw(entry.key, namespace, entry.payload_bytes())
            },
            begins: entry.is(Flag::Begins),
            content: entry.spec.as_ref().map_or(Content::Nothing, |spec| Content::Named(**spec)),
        })
    }

    /// A tier has an entry; since now, if it was offered as a kind.
    pub(crate) fn is_below(&mut self, held: &Held, kind: Option<u8>) {
        match (&mut self.gate, kind) {
            (Some(gate), Some(kind)) => gate.wrote(held.id, kind),
            (Some(gate), None) => gate.is_below(held.id),
            (None, _) => {}
        }
    }

    /// Takes a victim out of the policy's order: it goes as soon as no write reads it. Says whether its pages are
    /// still to come.
    pub(super) fn depart(&mut self, id: EntryId) -> bool {
        let offered = self.offer_entry(id);
        let Some(entry) = self.index.get_mut(id) else { return false };
        if !offered && !entry.is(Flag::Queued) {
            return false;
        }
        entry.set(Flag::Departing, true);
        let pages = entry.extent.pages();
        self.departing_pages += pages;
        self.policy.remove(id, pages, Departure::Evicted);
        true
    }

    /// No write reads this entry any more.
    pub(super) fn is_written(&mut self, id: EntryId) {
        let Some(entry) = self.index.get(id) else { return };
        if entry.is(Flag::Departing) || !entry.linked {
            self.departing_pages -= entry.extent.pages();
        }
        if entry.is(Flag::Departing) && entry.linked {
            self.ready.push_back(id);
        }
        self.freed = true;
    }

    /// The departing entry that goes first, if one's pages are free to take.
    pub(super) fn next_ready(&mut self) -> Option<EntryId> {
        while let Some(id) = self.ready.pop_front() {
            // It may have been asked for, or removed, and another may have its id.
            if self
                .index
                .get(id)
                .is_some_and(|entry| entry.linked && entry.is(Flag::Departing) && !entry.is(Flag::Queued))
            {
                return Some(id);
            }
        }
        None
    }

    /// A departing entry was asked for, and is held: it stays. `before` is the block before it.
    pub(super) fn stay(&mut self, id: EntryId, before: Option<EntryId>) {
        let Some(entry) = self.index.get_mut(id) else { return };
        entry.set(Flag::Departing, false);
        let (pages, fingerprint, number) = (entry.extent.pages(), entry.key.table_hash(), entry.namespace);
        if entry.is(Flag::Queued) {
            self.departing_pages -= pages;
        }
        let share = self.index.namespaces().id(number).map_or(0, |namespace| self.share(namespace));
        let arrival = Arrival { fingerprint, parent: before, place: Place::default() };
        self.policy.insert_run(&mut [(id, arrival)], |_| pages, share, crate::eviction::Priority::default());
        self.policy.hold(id);
    }

    /// Holds an entry's pages for a queued write, and leaves it where it is in the policy's order.
    fn hold_queued(&mut self, id: EntryId) -> Option<Held> {
        let entry = self.index.get_mut(id).filter(|entry| !entry.is(Flag::Queued))?;
        entry.set(Flag::Queued, true);
        if entry.is(Flag::Departing) {
            // It was ready to go, and is offered once more.
            self.departing_pages += entry.extent.pages();
        }
        Some(Held { id, queued: true, grant: entry.extent.grant(), spec: None })
    }
}
