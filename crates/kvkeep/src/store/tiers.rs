//! The tiers behind RAM, in their order, and what connects them with it.
//!
//! Invariant: only the store knows the order. A block is read from the first tier that has it, and offered to all.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
#[cfg(feature = "disk")]
use std::sync::Weak;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use super::Shared;
use super::gate::Gate;
use super::loads::Loads;
use super::meter::LoadRate;
use super::patience::Patience;
use crate::block::BlockKey;
use crate::clock::Deadline;
use crate::config::{CacheConfig, WritePolicy};
use crate::error::Result;
use crate::eviction::Admission;
use crate::key::{Namespace, NamespaceId, ObjectKey};
use crate::layout::KvLayout;
use crate::stats::TierStats;
use crate::sync::Mutex;
#[cfg(feature = "disk")]
use crate::tier::disk::{DiskTier, Resident};
use crate::tier::{Epoch, Forget, Forgotten, Tier};

/// What a look at a tier may take where nobody says.
#[cfg(feature = "disk")]
pub(super) const LOOK_TIMEOUT: Duration = Duration::from_millis(50);
/// More namespaces than this are not remembered by name.
const MAX_MODELS: usize = 4096;
/// Of runs that are not worth loading, each so many-th is begun, to measure again.
const PROBE_EVERY: u64 = 16;

/// The tiers, and what connects them with RAM.
pub(super) struct Tiers {
    tiers: Vec<Arc<dyn Tier>>,
    /// Lent blocks wait for room in the first so many: those of this machine.
    local: usize,
    shared: Arc<Shared>,
    timeouts: Timeouts,
    patience: Patience,
    write_policy: WritePolicy,
    models: Arc<Models>,
    loads: Arc<Loads>,
    /// One for each tier.
    rates: Vec<LoadRate>,
    not_worth_tokens: Vec<AtomicU64>,
    skipped: AtomicU64,
    /// Blocks whose queued writes stores gave up.
    given_up: AtomicUsize,
}

/// What becomes of it where no room has come in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Late {
    /// What is queued is given up, and its room taken.
    GivesUp,
    /// What is queued stays, and the lookup does without the block.
    IsAMiss,
}

/// What holds between RAM and all tiers: what the disk's settings say, if there is a disk.
struct Terms {
    admission: Admission,
    write_policy: WritePolicy,
    timeouts: Timeouts,
}

/// How long somebody waits for a tier.
#[derive(Debug, Clone, Copy)]
pub(super) struct Timeouts {
    /// A request, in all.
    pub(super) request: Duration,
    /// A flush, for one sign of life.
    pub(super) flush: Duration,
}

impl Terms {
    fn of(config: &CacheConfig) -> Self {
        #[cfg(feature = "disk")]
        if let Some(disk) = &config.disk {
            let timeouts = Timeouts { request: disk.read_timeout, flush: disk.flush_timeout };
            return Self { admission: disk.admission, write_policy: disk.write_policy, timeouts };
        }
        let (request, flush) = config.timeouts;
        let timeouts = Timeouts { request, flush };
        Self { admission: Admission::default(), write_policy: WritePolicy::default(), timeouts }
    }
}

/// What the layout and the model of a namespace are, for the headers of its blocks.
pub(super) type Models = Mutex<HashMap<NamespaceId, (KvLayout, String)>>;

impl Tiers {
    /// `None` if there are none.
    pub(super) fn open(config: CacheConfig, shared: &Arc<Shared>) -> Result<Option<Self>> {
        let mut tiers: Vec<Arc<dyn Tier>> = Vec::new();
        let Terms { admission, write_policy, timeouts } = Terms::of(&config);
        #[cfg(feature = "disk")]
        if let Some(disk_config) = config.disk {
            admission.check()?;
            let reports = shared.announcer().map(|announcer| announcer.reports("disk"));
            let disk = DiskTier::open(&disk_config, config.capacity_bytes, Arc::clone(&shared.clock), reports)?;
            disk.set_resident(resident_of(shared));
            tiers.push(Arc::new(disk));
        }
        if let Some(announcer) = shared.announcer() {
            let others = config.near.iter().chain(&config.tiers);
            others.for_each(|tier| tier.report_to(announcer.reports(tier.name())));
        }
        let local = config.near.len() + tiers.len();
        tiers.splice(0..0, config.near);
        tiers.extend(config.tiers);
        if tiers.is_empty() {
            return Ok(None);
        }
        let gate = Gate::new(admission, write_policy);
        let mut tiers = Self::over(tiers, gate, timeouts, write_policy, shared);
        tiers.local = local.max(1);
        Ok(Some(tiers))
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
            local: 1,
            shared: Arc::clone(shared),
            timeouts,
            patience: Patience::new(timeouts.request),
            write_policy,
            models: Arc::default(),
            loads: Arc::new(Loads::new(limit_bytes)),
            skipped: AtomicU64::new(0),
            given_up: AtomicUsize::new(0),
        }
    }

    pub(super) fn all(&self) -> &[Arc<dyn Tier>] {
        &self.tiers
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

    pub(super) fn local(&self) -> usize {
        self.local
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

    /// When a lookup waits no longer for memory that writes hold, and what it does then. A tier with a deadline makes no
    /// lookup later than that, and loses nothing by it.
    pub(super) fn room_deadline(&self, request: Deadline) -> (Deadline, Late) {
        match self.tiers.iter().filter_map(|tier| tier.deadline()).min() {
            Some(deadline) if deadline < request.left() => (Deadline::after(deadline), Late::IsAMiss),
            _ => (request, Late::GivesUp),
        }
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
    pub(super) fn hold_any(&self, namespace: NamespaceId, keys: &[ObjectKey]) -> bool {
        let names: Vec<BlockKey> = keys.iter().copied().map(BlockKey).collect();
        self.tiers.iter().any(|tier| tier.locate(namespace, &names, self.deadline()).iter().any(Option::is_some))
    }

    /// Which of these keys are not in RAM, and in a tier.
    pub(super) fn has_each(&self, namespace: NamespaceId, keys: &[ObjectKey]) -> Vec<bool> {
        let mut has = self.shared.with(|ledger| ledger.resident(keys));
        let missing = keys.iter().zip(&has).filter(|(_, resident)| !**resident);
        let missing: Vec<ObjectKey> = missing.map(|(key, _)| *key).collect();
        let mut places = self.where_each(namespace, &missing).into_iter();
        has.iter_mut().for_each(|has| *has = !*has && places.next().flatten().is_some());
        has
    }

    /// The first tier that has each of these keys.
    pub(super) fn where_each(&self, namespace: NamespaceId, keys: &[ObjectKey]) -> Vec<Option<&Arc<dyn Tier>>> {
        let mut places = vec![None; keys.len()];
        let mut missing: Vec<usize> = (0..keys.len()).collect();
        for tier in &self.tiers {
            let names: Vec<BlockKey> = missing.iter().filter_map(|at| keys.get(*at).copied().map(BlockKey)).collect();
            if names.is_empty() {
                break;
            }
            for (position, located) in missing.iter().zip(tier.locate(namespace, &names, self.deadline())) {
                places.iter_mut().skip(*position).take(1).for_each(|place| *place = located.map(|_| tier));
            }
            missing.retain(|position| places.get(*position).is_some_and(Option::is_none));
        }
        places
    }

    /// These were used outside.
    pub(super) fn touch(&self, keys: &[ObjectKey]) {
        let names: Vec<BlockKey> = keys.iter().copied().map(BlockKey).collect();
        self.tiers.iter().for_each(|tier| tier.touch(&names));
    }

    pub(super) fn loads(&self) -> &Arc<Loads> {
        &self.loads
    }

    pub(super) fn patience(&self) -> &Patience {
        &self.patience
    }

    pub(super) fn given_up(&self) -> &AtomicUsize {
        &self.given_up
    }

    pub(super) fn timeouts(&self) -> Timeouts {
        self.timeouts
    }

    /// So many tokens were in a tier and not worth loading.
    pub(super) fn count_not_worth(&self, tier: usize, tokens: usize) {
        if let Some(total) = self.not_worth_tokens.get(tier) {
            total.fetch_add(tokens as u64, Ordering::Relaxed);
        }
    }
}

impl fmt::Debug for Tiers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tiers").field("tiers", &self.tiers).finish_non_exhaustive()
    }
}

/// Says which keys are in RAM, or retained. Weak: what it asks owns the tier that asks.
#[cfg(feature = "disk")]
pub(super) fn resident_of(shared: &Arc<Shared>) -> Resident {
    let weak: Weak<Shared> = Arc::downgrade(shared);
    Box::new(move |keys| {
        let Some(shared) = weak.upgrade() else { return vec![false; keys.len()] };
        let mut hot = shared.with(|ledger| ledger.resident(keys));
        shared.retained.mark(keys, shared.now_ms(), &mut hot);
        hot
    })
}
