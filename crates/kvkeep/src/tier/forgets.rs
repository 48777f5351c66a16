//! What was last forgotten when, so that an offer or a read from before is not taken after it.
//!
//! Bounded: too many keys become "everything before now". That drops what may have been wanted, and never brings
//! back what was not.

use std::collections::HashMap;

use super::{Epoch, Forget};
use crate::block::BlockKey;
use crate::key::NamespaceId;

/// More keys and namespaces than this are not remembered one by one.
const MAX_REMEMBERED: usize = 1 << 14;

/// The epochs at which keys, namespaces and everything were last forgotten.
#[derive(Debug, Default)]
pub struct Forgets {
    keys: HashMap<BlockKey, Epoch>,
    namespaces: HashMap<NamespaceId, Epoch>,
    all: Epoch,
}

impl Forgets {
    /// These were forgotten at `epoch`.
    pub fn record(&mut self, what: &Forget<'_>, epoch: Epoch) {
        match what {
            Forget::Keys(_, keys) | Forget::Replaced(_, keys) => {
                for key in *keys {
                    let last = self.keys.entry(*key).or_insert(epoch);
                    *last = epoch.max(*last);
                }
            }
            Forget::Namespace(id) => {
                let last = self.namespaces.entry(*id).or_insert(epoch);
                *last = epoch.max(*last);
            }
            Forget::All => self.forget_all(epoch),
        }
        if self.keys.len() + self.namespaces.len() > MAX_REMEMBERED {
            let newest = self.keys.values().chain(self.namespaces.values()).max().copied();
            self.forget_all(newest.unwrap_or(epoch));
        }
    }

    /// Is what was asked for at `epoch` newer than the last `forget` of its key?
    #[must_use]
    pub fn allow(&self, key: &BlockKey, namespace: NamespaceId, epoch: Epoch) -> bool {
        let not_after = |last: Option<&Epoch>| last.is_none_or(|last| *last <= epoch);
        self.all <= epoch && not_after(self.namespaces.get(&namespace)) && not_after(self.keys.get(key))
    }

    /// Of these keys those of which nothing newer than `epoch` is known: a `forget` that comes late does not concern
    /// what has come since.
    #[must_use]
    pub fn not_newer(&self, keys: &[BlockKey], epoch: Epoch) -> Vec<BlockKey> {
        let is_newer = |key: &&BlockKey| self.keys.get(*key).is_some_and(|last| *last > epoch);
        keys.iter().filter(|key| !is_newer(key)).copied().collect()
    }

    fn forget_all(&mut self, epoch: Epoch) {
        self.keys.clear();
        self.namespaces.clear();
        self.all = self.all.max(epoch);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::ObjectKey;

    fn key(number: u64) -> BlockKey {
        BlockKey(ObjectKey::numbered(number))
    }

    #[test]
    fn what_is_older_than_the_last_forget_of_its_key_namespace_or_everything_is_not_allowed() {
        let (one, two) = (NamespaceId::named("one"), NamespaceId::named("two"));
        let mut forgets = Forgets::default();
        forgets.record(&Forget::Keys(one, &[key(1)]), 5);
        assert!(!forgets.allow(&key(1), one, 4) && forgets.allow(&key(1), one, 5) && forgets.allow(&key(2), one, 0));
        forgets.record(&Forget::Namespace(one), 7);
        assert!(!forgets.allow(&key(2), one, 6) && forgets.allow(&key(2), two, 6));
        forgets.record(&Forget::All, 9);
        assert!(!forgets.allow(&key(2), two, 8) && forgets.allow(&key(1), one, 9));
    }

    #[test]
    fn too_many_forgotten_keys_forbid_more_and_never_less() {
        let namespace = NamespaceId::named("n");
        let mut forgets = Forgets::default();
        for number in 0..=MAX_REMEMBERED as u64 {
            forgets.record(&Forget::Keys(namespace, &[key(number)]), number + 1);
        }
        assert!(forgets.keys.len() <= MAX_REMEMBERED);
        for number in 0..=MAX_REMEMBERED as u64 {
            assert!(!forgets.allow(&key(number), namespace, number));
        }
        assert!(forgets.allow(&key(0), namespace, MAX_REMEMBERED as u64 + 1));
    }
}
