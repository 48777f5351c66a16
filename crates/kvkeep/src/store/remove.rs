//! What is taken out of the cache: keys, a namespace, everything.
//!
//! Invariant: nothing that was removed comes back. RAM goes first, then each tier, and what was on its way up or down since before
//! is out of date by its epoch.

use super::ledger::{Gone, Ledger, SLICE};
use super::{Removed, Store};
use crate::block::BlockKey;
use crate::key::{NamespaceId, ObjectKey};
use crate::tier::{Forget, Forgotten};

impl Store {
    /// Removes everything, and gives the memory back to the system. What is pinned can no longer be found and is
    /// freed with its last pin.
    pub fn clear(&self) -> Removed {
        self.clear_where(None)
    }

    /// Removes all entries of one namespace, by its own name and by that under which a lossy codec keeps them.
    pub(crate) fn clear_namespace(&self, id: NamespaceId) -> Removed {
        let mut removed = self.clear_where(Some(id));
        let own = self.each_tier().filter_map(|tier| tier.lossy(id)).fold(id, NamespaceId::through);
        if own != id {
            let Removed { entries, bytes } = self.clear_where(Some(own));
            removed = Removed { entries: removed.entries + entries, bytes: removed.bytes + bytes };
        }
        removed
    }

    fn clear_where(&self, namespace: Option<NamespaceId>) -> Removed {
        if self.here().is_err() {
            return Removed::default();
        }
        // First, so that what they hold is freed at once; and again, for those that came meanwhile.
        let end_leases = || self.end_leases(|lease| namespace.is_none_or(|namespace| namespace == lease.namespace));
        end_leases();
        let gone = namespace.map_or(Gone::All, Gone::Namespace);
        let what = namespace.map_or(Forget::All, Forget::Namespace);
        let mut removed = Removed::default();
        let begin = |ledger: &mut Ledger| ledger.is_cleared(namespace);
        let ((), forgotten) = self.forget(gone, &what, begin, || {
            // In slices: between two of them others get the lock.
            let mut next = Some(0);
            while let Some(from) = next {
                next = self.shared.with(|ledger| {
                    let number = namespace.map(|id| ledger.index().namespaces().known(id));
                    if number == Some(None) {
                        return None;
                    }
                    let number = number.flatten();
                    let goes = |entry: &crate::index::Entry| number.is_none_or(|number| entry.namespace == number);
                    ledger.remove_some(from, SLICE, goes, &mut removed)
                });
            }
        });
        end_leases();
        self.shared.give_back();
        let below = forgotten.iter().map(|forgotten| forgotten.entries).max().unwrap_or(0);
        Removed { entries: removed.entries.max(below), ..removed }
    }

    /// Removes these keys of a namespace; says for each whether it was there.
    pub(crate) fn remove(&self, namespace: NamespaceId, keys: &[ObjectKey]) -> (Removed, Vec<bool>) {
        if self.here().is_err() {
            return (Removed::default(), vec![false; keys.len()]);
        }
        self.end_leases_of(keys);
        let now_ms = self.shared.now_ms();
        let names: Vec<BlockKey> = keys.iter().copied().map(BlockKey).collect();
        let begin = |ledger: &mut Ledger| ledger.remove(keys, now_ms);
        let ((mut removed, mut found), forgotten) =
            self.forget(Gone::Keys(namespace, names.clone()), &Forget::Keys(namespace, &names), begin, || {});
        self.end_leases_of(keys);
        for below in &forgotten {
            found.iter_mut().zip(&below.found).for_each(|(found, below)| *found |= below);
        }
        if !forgotten.is_empty() {
            removed.entries = found.iter().filter(|found| **found).count() as u64;
        }
        (removed, found)
    }

    /// Takes something out of RAM and then out of every tier, while nothing of it can come up again.
    fn forget<T>(
        &self,
        gone: Gone,
        what: &Forget<'_>,
        begin: impl FnOnce(&mut Ledger) -> T,
        and_then: impl FnOnce(),
    ) -> (T, Vec<Forgotten>) {
        let Some(tiers) = &self.tiers else {
            let begun = self.shared.with(begin);
            and_then();
            return (begun, Vec::new());
        };
        let (epoch, begun) = self.shared.with(|ledger| (ledger.forget(gone), begin(ledger)));
        and_then();
        // What was offered while slices of it were still here is out of date, too.
        let now = self.shared.with(Ledger::next_epoch);
        let forgotten = tiers.forget(what, now);
        self.shared.with(|ledger| ledger.has_forgotten(epoch));
        (begun, forgotten)
    }
}
