//! What is removed because somebody says so, and that nothing of it comes back.
//!
//! Invariant: from the moment a removal begins until it has reached every tier nothing that it names comes up, and
//! afterwards nothing that was asked of a tier before it ended. Waiting for loads under way was the alternative: then a
//! removal takes as long as the slowest tier.

use super::Ledger;
use crate::block::BlockKey;
use crate::eviction::{Departure, EntryId};
use crate::index::Entry;
use crate::key::{NamespaceId, ObjectKey};
use crate::store::Removed;
use crate::tier::ram::page_bytes;
use crate::tier::{Epoch, Forget};

/// What a removal names, kept until it has reached every tier.
#[derive(Debug, Clone)]
pub(in crate::store) enum Gone {
    Keys(NamespaceId, Vec<BlockKey>),
    Namespace(NamespaceId),
    All,
}

impl Gone {
    fn as_forget(&self) -> Forget<'_> {
        match self {
            Self::Keys(namespace, keys) => Forget::Keys(*namespace, keys),
            Self::Namespace(id) => Forget::Namespace(*id),
            Self::All => Forget::All,
        }
    }
}

impl Ledger {
    pub(in crate::store) fn remove(&mut self, keys: &[ObjectKey], now_ms: u64) -> (Removed, Vec<bool>) {
        let mut removed = Removed::default();
        let found = keys.iter().map(|key| {
            let id = self.find_live(key, now_ms);
            if let Some(id) = id {
                self.remove_entry(id, &mut removed);
            }
            id.is_some()
        });
        let found = found.collect();
        (removed, found)
    }

    /// Removes what satisfies `condition` of the next `slots` slots; says where to go on, if there is more.
    pub(in crate::store) fn remove_some(
        &mut self,
        from: EntryId,
        slots: usize,
        condition: impl Fn(&Entry) -> bool,
        removed: &mut Removed,
    ) -> Option<EntryId> {
        let (ids, next) = self.index.select_some(from, slots, condition);
        for id in ids {
            self.remove_entry(id, removed);
        }
        next
    }

    fn remove_entry(&mut self, id: EntryId, removed: &mut Removed) {
        let pages = self.index.get(id).map_or(0, |entry| entry.extent.pages());
        removed.entries += 1;
        removed.bytes += page_bytes(pages);
        self.counters.removals += 1;
        self.drop_entry(id, Departure::Removed);
    }

    /// A removal begins: until [`Ledger::has_forgotten`] nothing of it comes up.
    pub(in crate::store) fn forget(&mut self, gone: Gone) -> Epoch {
        self.epoch += 1;
        self.forgets.record(&gone.as_forget(), self.epoch);
        self.forgetting.push((self.epoch, gone));
        self.epoch
    }

    /// It has reached every tier. What was asked of a tier before is out of date.
    pub(in crate::store) fn has_forgotten(&mut self, epoch: Epoch) {
        let Some(at) = self.forgetting.iter().position(|(begun, _)| *begun == epoch) else { return };
        let (_, gone) = self.forgetting.swap_remove(at);
        self.epoch += 1;
        self.forgets.record(&gone.as_forget(), self.epoch);
    }

    /// Was it neither removed nor replaced since, and is it not being removed now?
    pub(in crate::store) fn may_come_up(&self, key: &ObjectKey, namespace: NamespaceId, epoch: Epoch) -> bool {
        let key = BlockKey(*key);
        let going = self.forgetting.iter().any(|(_, gone)| gone.as_forget().covers(&key, namespace));
        !going && self.forgets.allow(&key, namespace, epoch)
    }

    /// What was asked of a tier so far is older than this.
    pub(in crate::store) fn next_epoch(&mut self) -> Epoch {
        self.epoch += 1;
        self.epoch
    }

    /// Goes with whatever is asked of a tier from now on.
    pub(crate) fn epoch(&self) -> Epoch {
        self.epoch
    }
}
