//! Blocks that go between the tiers and memory that an engine lends, past RAM: for engines that have a RAM tier of
//! their own and want no second copy.
//!
//! Invariant: the engine's memory is used for as long as its owner value lives, and no longer. Borrowing it was the
//! alternative: a disk that hangs would then hang the engine.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use super::{Shared, Store};
use crate::block::{BlockKey, BlockMeta, Content, Facts};
use crate::chain::Chain;
use crate::clock::{Deadline, Moment, duration_ms};
use crate::config::StoreOptions;
use crate::index::NEVER;
use crate::key::ObjectKey;
use crate::tier::{Offer, Payload, Read, ReadTarget};

impl Store {
    /// Offers these blocks of a chain to every tier; says how many any of them took.
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
        tiers.offer_lent(&offers)
    }

    /// Begins to read these blocks of a chain into lent memory; each is completed exactly once. Says how many of
    /// them, from the first one on, a tier has.
    pub(crate) fn read_lent(&self, chain: &Chain, first_block: usize, targets: Vec<Box<dyn ReadTarget>>) -> usize {
        let keys: Vec<ObjectKey> = chain.keys().iter().skip(first_block).take(targets.len()).copied().collect();
        let Some(tiers) = self.here().ok().and_then(|store| store.tiers.as_ref()) else {
            targets.into_iter().for_each(|target| target.complete(None));
            return 0;
        };
        let (namespace, began) = (chain.namespace().id(), Moment::now());
        let places = tiers.where_each(namespace, &keys);
        let found = places.iter().take_while(|place| place.is_some()).count();
        let (waited, mut places) = (began.elapsed(), keys.into_iter().zip(places));
        for target in targets {
            match places.next() {
                Some((key, Some(tier))) => {
                    tier.read(vec![Read { key: BlockKey(key), namespace, range: None, waited, target }]);
                }
                _ => target.complete(None),
            }
        }
        found
    }
}

impl Store {
    /// The tier that would be read for each of these.
    pub(crate) fn where_lent(&self, chain: &Chain) -> Vec<Option<&str>> {
        let Some(tiers) = self.here().ok().and_then(|store| store.tiers.as_ref()) else {
            return vec![None; chain.blocks()];
        };
        let places = tiers.where_each(chain.namespace().id(), chain.keys());
        places.into_iter().map(|place| place.map(|tier| tier.name())).collect()
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
    /// Says how many any tier took. Those over a network come last and are not waited for: they may be slower than all else.
    fn offer_lent(&self, offers: &[Offer]) -> usize {
        let mut left: HashSet<BlockKey> = offers.iter().map(|offer| offer.meta.key).collect();
        let deadline = self.deadline();
        for (number, tier) in self.each().enumerate() {
            let deadline = if number < self.local() { deadline } else { Deadline::over() };
            let back = tier.offer(super::demote::copies(offers), deadline);
            let back: HashSet<BlockKey> = back.iter().map(|offer| offer.meta.key).collect();
            left.retain(|key| back.contains(key));
        }
        offers.iter().filter(|offer| !left.contains(&offer.meta.key)).count()
    }
}
