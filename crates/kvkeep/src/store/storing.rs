//! A store: room for what is missing, and then all of it findable at once.
//!
//! Invariant: what is reserved and not sealed goes back. Nobody can find it before it is sealed.

use std::sync::Arc;
use std::time::Duration;

use super::guard::{Pending, Pin};
use super::ledger::{self, Gone, Ledger, OnPresent, Reservation, Shortage, Terms, Wanted, Written};
use super::tiers::{Late, Tiers};
use super::{Shared, Store, lent};
use crate::block::BlockKey;
use crate::clock::Deadline;
use crate::config::{StoreOptions, WritePolicy};
use crate::error::Rejection;
use crate::eviction::Place;
use crate::key::{NamespaceId, ObjectKey};
use crate::tensor::PairSpec;
use crate::tier::Forget;
use crate::tier::ram::pages_for;

/// One object to be sealed.
pub(crate) struct Sealing {
    pub(crate) key: ObjectKey,
    pub(crate) pending: Pending,
    /// Of these pages, what is the payload.
    pub(crate) bytes: usize,
    pub(crate) spec: Option<Arc<PairSpec>>,
    /// The key of the block before it in its chain.
    pub(crate) parent: Option<ObjectKey>,
    pub(crate) place: Place,
}

/// What [`Store::reserve`] found and made for a run of keys.
pub(crate) struct Reserved {
    /// Those already there, pinned.
    pub(crate) present: Pin,
    /// Position in the run and pages for each that is missing, up to the first rejection.
    pub(crate) missing: Vec<(usize, Pending)>,
    /// Those that are there and were not pinned: in a tier, or behind the first rejection.
    pub(crate) below: usize,
    /// Why the rest was not admitted; positions stand for tokens.
    pub(crate) rejection: Option<Rejection>,
}

impl Store {
    /// Pages for each of `sizes_bytes`, all or nothing.
    pub(crate) fn reserve_all(&self, namespace: NamespaceId, sizes_bytes: &[usize]) -> Result<Vec<Pending>, Rejection> {
        let now_ms = self.shared.now_ms();
        let pages = sizes_bytes.iter().filter_map(|bytes| pages_for(*bytes)).fold(0, u32::saturating_add);
        let reserved = self.with_room(
            Terms::Patient,
            |ledger| ledger.reserve_all(namespace, sizes_bytes, now_ms),
            |made| made.as_ref().err().copied(),
        );
        let extents = match reserved {
            Ok(extents) => extents,
            Err(shortage) => {
                return Err(self.shared.with(|ledger| {
                    ledger.count_rejection();
                    shortage.rejection(ledger, pages)
                }));
            }
        };
        Ok(extents.into_iter().map(|extent| Pending::new(Arc::clone(&self.shared), extent)).collect())
    }

    /// Pins what is there of a chain and makes room for the rest, head first. What is
    /// missing before the first position given cannot be written and ends it.
    pub(crate) fn reserve(&self, namespace: NamespaceId, keys: &[ObjectKey], wanted: Wanted) -> Reserved {
        let now_ms = self.shared.now_ms();
        // What is given is stored whether a tier has it or not.
        let below =
            self.tiers.as_ref().filter(|_| wanted.terms == Terms::Patient).map_or_else(Vec::new, |tiers| {
                tiers.has_each(namespace, keys.get(..wanted.first_given).unwrap_or(keys))
            });
        let attempt = |ledger: &mut Ledger| {
            let made = ledger.reserve(namespace, keys, wanted, &below, now_ms);
            Unclaimed { shared: Arc::clone(&self.shared), made: Some(made) }
        };
        let mut taken = self.with_room(wanted.terms, attempt, |taken| taken.made.as_ref()?.shortage);
        let Reservation { present, missing, below, refused_from, shortage } = taken.made.take().unwrap_or_default();
        let refused_from = refused_from.unwrap_or(keys.len());
        let pages = pages_for(wanted.bytes_each).unwrap_or(u32::MAX);
        let refused = keys.get(refused_from..).unwrap_or_default();
        let there = self.tiers.as_ref().filter(|_| !refused.is_empty()).map_or(0, |tiers| {
            // In RAM behind a gap nobody finds them.
            tiers.has_each(namespace, refused).into_iter().filter(|has| *has).count()
        });
        // Where RAM has no room, not even for what a tier has all of, a lookup could not load it: that is refused.
        let there = if there < refused.len() { there } else { 0 };
        let rejection = shortage.map(|shortage| {
            self.shared.with(|ledger| {
                ledger.count_rejection();
                shortage.rejection(ledger, pages)
            })
        });
        let pending = |(position, extent)| (position, Pending::new(Arc::clone(&self.shared), extent));
        let below = below + there;
        Reserved {
            present: Pin::new(Arc::clone(&self.shared), present),
            missing: missing.into_iter().map(pending).collect(),
            below,
            rejection,
        }
    }

    /// Makes written objects findable, all at once; says how many are new.
    /// The first of them counts as the most recently used.
    pub(crate) fn seal(
        &self,
        namespace: NamespaceId,
        mut objects: Vec<Sealing>,
        options: &StoreOptions,
        on_present: OnPresent,
    ) -> usize {
        let now_ms = self.shared.now_ms();
        let expires_at_ms = lent::expires_at_ms(&self.shared, options);
        let share = options
            .compute_time
            .map_or(Duration::ZERO, |time| time / u32::try_from(objects.len()).unwrap_or(u32::MAX).max(1));
        let compute_us = u32::try_from(share.as_micros()).unwrap_or(u32::MAX);
        objects.iter_mut().for_each(|object| object.pending.clear_from(object.bytes));
        let keys: Vec<ObjectKey> = objects.iter().map(|object| object.key).collect();
        let seal = |ledger: &mut Ledger| {
            let written = objects.into_iter().filter_map(|Sealing { key, pending, bytes, spec, parent, place }| {
                let begins = parent.is_none() && spec.is_none();
                let entry = ledger::new_entry(key, pending.into_extent()?, bytes, spec, compute_us);
                Some(Written { entry: entry.begins(begins), expires_at_ms, parent, place })
            });
            ledger.seal_all(namespace, written, on_present, options.priority)
        };
        let Some(tiers) = &self.tiers else { return self.shared.with(seal) };
        let through = tiers.write_policy() == WritePolicy::Through;
        let sealed = match on_present {
            OnPresent::Keep => self.shared.with(|ledger| {
                let sealed = seal(ledger);
                if through {
                    ledger.offer_run(&keys);
                }
                sealed
            }),
            OnPresent::Replace => self.replace(tiers, (namespace, &keys), now_ms, through, seal),
        };
        self.offer();
        sealed
    }

    /// Seals what may replace older values. It is held until the tiers have hidden those: whoever looks there
    /// meanwhile would find them.
    fn replace(
        &self,
        tiers: &Tiers,
        (namespace, keys): (NamespaceId, &[ObjectKey]),
        now_ms: u64,
        through: bool,
        seal: impl FnOnce(&mut Ledger) -> usize,
    ) -> usize {
        let names: Vec<BlockKey> = keys.iter().copied().map(BlockKey).collect();
        let (epoch, sealed, held) = self.shared.with(|ledger| {
            let epoch = ledger.forget(Gone::Keys(namespace, names.clone()));
            let sealed = seal(ledger);
            let held = ledger.hold_each(keys, now_ms).into_iter().map(|(_, held)| held).collect();
            (epoch, sealed, Pin::new(Arc::clone(&self.shared), held))
        });
        tiers.forget(&Forget::Replaced(namespace, &names), epoch);
        self.shared.with(|ledger| {
            ledger.has_forgotten(epoch);
            if through {
                ledger.offer_run(keys);
            }
        });
        drop(held);
        sealed
    }

    /// Tries until there is room, or none to come. Between two tries what departs is offered to the tiers, and their
    /// writes are waited for: as long as one request waits at most in all, or less (see `patience`).
    fn with_room<T>(
        &self,
        terms: Terms,
        attempt: impl Fn(&mut Ledger) -> T,
        shortage: impl Fn(&T) -> Option<Shortage>,
    ) -> T {
        self.end_expired();
        let mut gave_back = self.shared.given_back.times();
        let mut made = self.shared.with(&attempt);
        // Giving memory back has pages for a moment, too.
        while matches!(shortage(&made), Some(Shortage::Refused(Rejection::AllPinned { .. })))
            && self.shared.given_back.wait_since(gave_back)
        {
            drop(made);
            gave_back = self.shared.given_back.times();
            made = self.shared.with(&attempt);
        }
        match &self.tiers {
            Some(tiers) if shortage(&made) == Some(Shortage::Coming) => {
                let wait = |deadline| tiers.wait_for_room(made, (deadline, Late::GivesUp), attempt, shortage);
                if terms == Terms::AtOnce { wait(Deadline::over()) } else { tiers.patience().wait(wait) }
            }
            Some(tiers) => {
                tiers.offer(Deadline::over());
                made
            }
            None => made,
        }
    }
}

/// A reservation that goes back if it is not taken.
struct Unclaimed {
    shared: Arc<Shared>,
    made: Option<Reservation>,
}

impl Drop for Unclaimed {
    fn drop(&mut self) {
        if let Some(Reservation { present, missing, .. }) = self.made.take()
            && self.shared.process.is_current()
        {
            self.shared.with(|ledger| {
                ledger.release(present);
                missing.into_iter().for_each(|(_, extent)| ledger.abandon(extent));
            });
        }
    }
}
