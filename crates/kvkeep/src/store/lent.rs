//! Blocks that go between the tiers and memory that an engine lends, past RAM: for engines that have a RAM tier of
//! their own and want no second copy.
//!
//! Invariant: the engine's memory is used for as long as its owner value lives, and no longer. Borrowing it was the
//! alternative: a disk that hangs would then hang the engine.

use std::sync::Arc;
use std::time::Duration;

use super::{Shared, Store};
use crate::block::{BlockKey, BlockMeta, Content, Facts};
use crate::chain::Chain;
use crate::clock::{Deadline, Moment, duration_ms};
use crate::config::StoreOptions;
use crate::index::NEVER;
use crate::key::ObjectKey;
use crate::tier::{Offer, Payload, Read, ReadTarget, Tier};

impl Store {
    /// Offers these blocks of a chain to every tier; says how many the first tier took.
    pub(crate) fn write_lent(
        &self,
        chain: &Chain,
        first_block: usize,
        payloads: Vec<Arc<dyn Payload>>,
        options: &StoreOptions,
    ) -> usize {
        let Some(tiers) = self.here().ok().and_then(|store| store.tiers.as_ref()) else { return 0 };
        let namespace = chain.namespace();
        self.describe(namespace);
        self.expect(chain, first_block);
        let epoch = self.shared.with(|ledger| ledger.epoch());
        let expires_at_ms = expires_at_ms(&self.shared, options);
        let share = u32::try_from(payloads.len()).unwrap_or(u32::MAX).max(1);
        let compute = options.compute_time.map_or(Duration::ZERO, |time| time / share);
        let block_bytes = namespace.layout().block_bytes() as u64;
        let offers = chain.keys().iter().enumerate().skip(first_block).zip(payloads).map(|((block, key), payload)| {
            let meta = BlockMeta {
                facts: Facts {
                    expires_at_ms,
                    compute_us: u32::try_from(compute.as_micros()).unwrap_or(u32::MAX),
                    ..Facts::raw(*key, namespace.id(), block_bytes)
                },
                begins: block == 0,
                content: Content::Block { layout: *namespace.layout(), model: namespace.model().to_owned() },
            };
            Offer { meta, epoch, mark: 0, payload }
        });
        // What is shorter than a block is none.
        let offers: Vec<Offer> = offers.filter(|offer| offer.payload.bytes().len() as u64 >= block_bytes).collect();
        tiers.offer_lent(offers)
    }

    /// Begins to read these blocks of a chain into lent memory; each is completed exactly once. Says how many of
    /// them, from the first one on, a tier has.
    pub(crate) fn read_lent(&self, chain: &Chain, first_block: usize, targets: Vec<Box<dyn ReadTarget>>) -> usize {
        let keys: Vec<ObjectKey> = chain.keys().iter().skip(first_block).take(targets.len()).copied().collect();
        let Some(tiers) = self.here().ok().and_then(|store| store.tiers.as_ref()) else {
            targets.into_iter().for_each(|target| target.complete(None));
            return 0;
        };
        let (mut places, deadline) = (vec![None::<&Arc<dyn Tier>>; keys.len()], tiers.deadline());
        let names: Vec<BlockKey> = keys.iter().copied().map(BlockKey).collect();
        let began = Moment::now();
        for tier in tiers.each() {
            for (place, located) in places.iter_mut().zip(tier.locate(chain.namespace().id(), &names, deadline)) {
                *place = place.or(located.map(|_| tier));
            }
        }
        let found = places.iter().take_while(|place| place.is_some()).count();
        let (mut places, waited) = (places.into_iter(), began.elapsed());
        for (target, name) in targets.into_iter().zip(names.iter().map(Some).chain(std::iter::repeat(None))) {
            match (places.next().flatten(), name) {
                (Some(tier), Some(key)) => {
                    let namespace = chain.namespace().id();
                    tier.read(vec![Read { key: *key, namespace, range: None, waited, target }]);
                }
                _ => target.complete(None),
            }
        }
        found
    }
}

impl Store {
    /// Which of these a tier has.
    pub(crate) fn has_lent(&self, chain: &Chain) -> Vec<bool> {
        let tiers = self.here().ok().and_then(|store| store.tiers.as_ref());
        tiers.map_or_else(|| vec![false; chain.blocks()], |tiers| tiers.has_each(chain.namespace().id(), chain.keys()))
    }

    /// These were used in the engine's own memory.
    pub(crate) fn touch_lent(&self, chain: &Chain) {
        if let Some(tiers) = self.here().ok().and_then(|store| store.tiers.as_ref()) {
            tiers.touch(chain.keys());
        }
    }

    /// Keeps these before others; says how many.
    pub(crate) fn retain_lent(&self, chain: &Chain, time: Option<Duration>) -> usize {
        if self.here().is_err() {
            return 0;
        }
        let now_ms = self.shared.now_ms();
        let until_ms = time.map_or(NEVER, |time| now_ms.saturating_add(duration_ms(time)));
        self.shared.retained.add(chain.keys(), until_ms, now_ms)
    }

    /// These are like others again.
    pub(crate) fn release_lent(&self, chain: &Chain) {
        if self.here().is_ok() {
            self.shared.retained.remove(chain.keys());
        }
    }
}

/// When what is stored now expires.
pub(super) fn expires_at_ms(shared: &Shared, options: &StoreOptions) -> u64 {
    let ttl = options.ttl.or(shared.default_ttl);
    ttl.map_or(NEVER, |ttl| shared.now_ms().saturating_add(duration_ms(ttl)))
}

impl super::tiers::Tiers {
    /// Says how many the first tier took.
    fn offer_lent(&self, offers: Vec<Offer>) -> usize {
        let offered = offers.len();
        let Some((first, others)) = self.all().split_first() else { return 0 };
        for tier in others {
            drop(tier.offer(super::demote::copies(&offers), Deadline::over()));
        }
        offered - first.offer(offers, self.deadline()).len()
    }
}
