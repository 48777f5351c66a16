//! The tiers behind RAM, and what goes down to them.
//!
//! What the ledger says is offered to every tier, after the lock is let go. An offered entry keeps its pages until
//! every tier has dropped its payload, and can be found all the time. A store that needs those pages waits for the
//! writes, as long as a request waits at most; after that the writes that have not begun are given up.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::Shared;
use super::fetch::Fetch;
use super::gate::Gate;
use super::ledger::{Held, Leaving, Ledger, Request, SLICE, Shortage};
use super::meter::LoadRate;
use super::plan::{Plan, Worth};
use crate::block::{BlockKey, Content};
use crate::clock::Deadline;
use crate::config::{CacheConfig, WritePolicy};
use crate::error::Result;
use crate::key::{Namespace, NamespaceId, ObjectKey};
use crate::layout::KvLayout;
use crate::stats::TierStats;
use crate::sync::Mutex;
use crate::tier::disk::DiskTier;
use crate::tier::{Epoch, Forget, Forgotten, Offer, Payload, Tier};

/// More namespaces than this are not remembered by name.
const MAX_MODELS: usize = 4096;
/// Of runs that are not worth loading, each so many-th is begun, to measure again.
const PROBE_EVERY: u64 = 16;
/// So often a store tries again after it has given up what was queued: what it evicts is queued too.
const LAST_TRIES: usize = 4;

/// The tiers, and what connects them with RAM.
pub(super) struct Tiers {
    tiers: Vec<Arc<dyn Tier>>,
    shared: Arc<Shared>,
    timeouts: Timeouts,
    write_policy: WritePolicy,
    models: Arc<Models>,
    pub(super) fetch: Arc<Fetch>,
    /// One for each tier.
    rates: Vec<LoadRate>,
    not_worth_tokens: Vec<AtomicU64>,
    skipped: AtomicU64,
}

/// How long somebody waits for a tier.
#[derive(Debug, Clone, Copy)]
pub(super) struct Timeouts {
    /// A request, in all.
    pub(super) request: Duration,
    /// A flush, for one sign of life.
    pub(super) flush: Duration,
}

/// What the layout and the model of a namespace are, for the headers of its blocks.
pub(super) type Models = Mutex<HashMap<NamespaceId, (KvLayout, String)>>;

/// The pages of an entry that was offered.
struct Leaver {
    shared: Arc<Shared>,
    held: Option<Held>,
    mark: u8,
    /// What a tier has said: nothing, [`THERE`] or [`NEW`].
    outcome: AtomicU8,
}

const THERE: u8 = 1;
const NEW: u8 = 2;

impl Payload for Leaver {
    fn bytes(&self) -> &[u8] {
        self.held.as_ref().map_or(&[], |held| self.shared.arena.bytes(&held.grant))
    }

    fn written(&self, is_new: bool) {
        self.outcome.fetch_max(if is_new { NEW } else { THERE }, Ordering::Relaxed);
    }
}

impl Drop for Leaver {
    fn drop(&mut self) {
        if let Some(held) = self.held.take()
            && self.shared.process.is_current()
        {
            let (mark, outcome) = (self.mark, *self.outcome.get_mut());
            self.shared.with(|ledger| {
                if outcome > 0 {
                    ledger.is_below(&held, (outcome == NEW).then_some(mark));
                }
                ledger.release(vec![held]);
            });
        }
    }
}

impl Tiers {
    /// `None` if there are none.
    pub(super) fn open(config: CacheConfig, shared: &Arc<Shared>) -> Result<Option<Self>> {
        let mut tiers: Vec<Arc<dyn Tier>> = Vec::new();
        let is_disk = config.disk.is_some();
        let disk_config = config.disk.unwrap_or_else(|| crate::config::DiskConfig::new("", 0));
        if is_disk {
            disk_config.admission.check()?;
            let disk = DiskTier::open(&disk_config, config.capacity_bytes, Arc::clone(&shared.clock))?;
            disk.set_resident(resident_of(shared));
            tiers.push(Arc::new(disk));
        }
        tiers.extend(config.tiers);
        if tiers.is_empty() {
            return Ok(None);
        }
        let gate = Gate::new(disk_config.admission, disk_config.write_policy);
        let timeouts = Timeouts { request: disk_config.read_timeout, flush: disk_config.flush_timeout };
        Ok(Some(Self::over(tiers, gate, timeouts, disk_config.write_policy, shared)))
    }

    pub(super) fn over(
        tiers: Vec<Arc<dyn Tier>>,
        gate: Option<Gate>,
        timeouts: Timeouts,
        write_policy: WritePolicy,
        shared: &Arc<Shared>,
    ) -> Self {
        let limit_bytes = shared.with(|ledger| {
            ledger.set_tiers(gate);
            u64::from(ledger.capacity_pages()) * crate::tier::ram::PAGE_BYTES as u64
        });
        Self {
            rates: tiers.iter().map(|_| LoadRate::default()).collect(),
            not_worth_tokens: tiers.iter().map(|_| AtomicU64::new(0)).collect(),
            tiers,
            shared: Arc::clone(shared),
            timeouts,
            write_policy,
            models: Arc::default(),
            fetch: Arc::new(Fetch::new(limit_bytes)),
            skipped: AtomicU64::new(0),
        }
    }

    pub(super) fn each(&self) -> impl Iterator<Item = &Arc<dyn Tier>> {
        self.tiers.iter()
    }

    pub(super) fn tier(&self, number: usize) -> Option<&Arc<dyn Tier>> {
        self.tiers.get(number)
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    pub(super) fn models(&self) -> &Arc<Models> {
        &self.models
    }

    pub(super) fn rate(&self, tier: usize) -> Option<&LoadRate> {
        self.rates.get(tier)
    }

    pub(super) fn write_policy(&self) -> WritePolicy {
        self.write_policy
    }

    /// When a request that begins now waits no longer.
    pub(super) fn deadline(&self) -> Deadline {
        Deadline::after(self.timeouts.request)
    }

    /// Is this run that is not worth loading one of those that are tried all the same?
    pub(super) fn is_probe(&self) -> bool {
        self.skipped.fetch_add(1, Ordering::Relaxed) % PROBE_EVERY == PROBE_EVERY - 1
    }

    pub(super) fn stats(&self) -> Vec<TierStats> {
        let not_admitted_total = self.shared.with(|ledger| ledger.kept_off());
        let numbered = self.tiers.iter().zip(&self.rates).zip(&self.not_worth_tokens);
        numbered
            .map(|((tier, rate), not_worth)| TierStats {
                not_admitted_total,
                load_bytes_per_s: rate.bytes_per_s(),
                not_worth_tokens_total: not_worth.load(Ordering::Relaxed),
                ..tier.stats()
            })
            .collect()
    }

    /// Remembers what the blocks of a namespace look like.
    pub(super) fn describe(&self, namespace: &Namespace) {
        let mut models = self.models.lock();
        if models.contains_key(&namespace.id()) {
            return;
        }
        if models.len() >= MAX_MODELS {
            models.clear();
        }
        models.insert(namespace.id(), (*namespace.layout(), namespace.model().to_owned()));
    }

    pub(super) fn forget(&self, what: &Forget<'_>, epoch: Epoch) -> Vec<Forgotten> {
        self.tiers.iter().map(|tier| tier.forget(what, epoch)).collect()
    }

    /// Does a tier have any of these?
    pub(super) fn hold_any(&self, keys: &[ObjectKey]) -> bool {
        let names: Vec<BlockKey> = keys.iter().copied().map(BlockKey).collect();
        self.tiers.iter().any(|tier| tier.locate(&names, self.deadline()).iter().any(Option::is_some))
    }

    /// Which of these keys are not in RAM, and in a tier.
    pub(super) fn has_each(&self, keys: &[ObjectKey]) -> Vec<bool> {
        let resident = self.shared.with(|ledger| ledger.resident(keys));
        let mut has = vec![false; keys.len()];
        if resident.iter().all(|resident| *resident) {
            return has;
        }
        let missing = keys.iter().zip(&resident).enumerate().filter(|(_, (_, resident))| !**resident);
        let (positions, names): (Vec<usize>, Vec<BlockKey>) =
            missing.map(|(position, (key, _))| (position, BlockKey(*key))).unzip();
        for tier in &self.tiers {
            for (position, located) in positions.iter().zip(tier.locate(&names, self.deadline())) {
                if let Some(has) = has.get_mut(*position) {
                    *has |= located.is_some();
                }
            }
        }
        has
    }

    /// Offers what the ledger says, and waits for room in the tiers until the deadline at most.
    pub(super) fn offer(&self, deadline: Deadline) {
        let mut offers = self.to_offer();
        if offers.is_empty() {
            return;
        }
        let Some((last, others)) = self.tiers.split_last() else { return };
        for tier in others {
            drop(tier.offer(copies(&offers), deadline));
        }
        offers = last.offer(offers, deadline);
        drop(offers);
    }

    /// Offers what the ledger says, and waits for room in each tier as long as that gets on.
    fn offer_patiently(&self) {
        let offers = self.to_offer();
        for tier in &self.tiers {
            let mut left = copies(&offers);
            while !left.is_empty() {
                let before = left.len();
                left = tier.offer(left, Deadline::after(self.timeouts.flush));
                if left.len() == before {
                    break;
                }
            }
        }
    }

    fn to_offer(&self) -> Vec<Offer> {
        if !self.shared.has_offers() {
            return Vec::new();
        }
        let leaving = self.shared.with(Ledger::take_offers);
        leaving.into_iter().filter_map(|leaving| self.describe_leaving(leaving)).collect()
    }

    /// What nobody can describe is not offered, and its pages are let go of.
    fn describe_leaving(&self, leaving: Leaving) -> Option<Offer> {
        let Leaving { mut meta, held, epoch, mark } = leaving;
        let leaver = Leaver { shared: Arc::clone(&self.shared), held: Some(held), mark, outcome: AtomicU8::new(0) };
        if meta.content == Content::Nothing {
            let (layout, model) = self.models.lock().get(&meta.namespace).cloned()?;
            meta.content = Content::Block { layout, model };
        }
        Some(Offer { meta, epoch, mark, payload: Arc::new(leaver) })
    }

    /// Tries again, as often as pages come, until the request's time is over; then without what is queued.
    pub(super) fn wait_for_room<T>(
        &self,
        made: T,
        deadline: Deadline,
        attempt: impl Fn(&mut Ledger) -> T,
        shortage: impl Fn(&T) -> Option<Shortage>,
    ) -> T {
        let mut made = made;
        let mut tries = LAST_TRIES;
        while shortage(&made) == Some(Shortage::Coming) && tries > 0 {
            // What it has goes back, so that it can be had again.
            drop(made);
            let is_stuck = self.tiers.iter().any(|tier| tier.is_stuck());
            self.offer(if is_stuck { Deadline::over() } else { deadline });
            if is_stuck || self.shared.wait_for_room(deadline) {
                let waited = if is_stuck { Duration::ZERO } else { self.timeouts.request };
                self.tiers.iter().for_each(|tier| _ = tier.give_up(waited));
                tries -= 1;
            }
            made = self.shared.with(&attempt);
        }
        self.offer(Deadline::over());
        made
    }

    /// Counts what was there and not worth loading.
    pub(super) fn count_not_worth(&self, plan: &Plan, worth: Worth, request: Request) {
        let Request::Tokens { block_tokens, .. } = request else { return };
        for place in plan.places.iter().skip(worth.blocks).take(worth.not_worth) {
            let super::plan::Place::Tier(tier, _) = place else { continue };
            if let Some(tokens) = self.not_worth_tokens.get(*tier) {
                tokens.fetch_add(block_tokens as u64, Ordering::Relaxed);
            }
        }
    }

    /// Makes everything durable that is in RAM or was queued, and may be in a tier.
    pub(super) fn flush(&self) -> Result<()> {
        let mut next = Some(0);
        while let Some(from) = next {
            // In slices: between two of them others get the lock.
            next = self.shared.with(|ledger| ledger.offer_some(from, SLICE));
            self.offer_patiently();
        }
        self.tiers.iter().map(|tier| tier.flush(self.timeouts.flush)).fold(Ok(()), Result::and)
    }
}

impl Drop for Tiers {
    /// What is in RAM is written first: after a restart the cache is as warm as it was. A tier
    /// that hangs is left to itself.
    fn drop(&mut self) {
        // A child has none of the threads, and the directory is its parent's.
        if !self.shared.process.is_current() {
            return;
        }
        self.fetch.close();
        let flushed = self.flush();
        let closed = self.tiers.iter().map(|tier| tier.close()).fold(Ok(()), Result::and);
        if let Err(error) = flushed.and(closed) {
            tracing::warn!(%error, "a tier was not closed cleanly");
        }
    }
}

impl fmt::Debug for Tiers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tiers").field("tiers", &self.tiers).finish_non_exhaustive()
    }
}

/// The same offers for one more tier.
fn copies(offers: &[Offer]) -> Vec<Offer> {
    let copy = |offer: &Offer| Offer {
        meta: offer.meta.clone(),
        epoch: offer.epoch,
        mark: offer.mark,
        payload: Arc::clone(&offer.payload),
    };
    offers.iter().map(copy).collect()
}

/// Says which keys are in RAM. Weak: what it asks owns the tier that asks.
pub(super) fn resident_of(shared: &Arc<Shared>) -> Box<dyn Fn(&[ObjectKey]) -> Vec<bool> + Send + Sync> {
    let weak: Weak<Shared> = Arc::downgrade(shared);
    Box::new(move |keys| {
        let shared = weak.upgrade();
        shared.map_or_else(|| vec![false; keys.len()], |shared| shared.with(|ledger| ledger.resident(keys)))
    })
}
