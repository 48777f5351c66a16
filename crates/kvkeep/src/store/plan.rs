//! What of a chain lies where, and what of it is worth loading: one pass, made before anything is read.
//!
//! Invariant: RAM is asked once for all keys, and each tier once for those that are in none before it. What RAM has
//! is held from then on, so that loading the rest does not evict it.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::Store;
use super::guard::Pin;
use super::ledger::{Held, Request};
use super::tiers::Tiers;
use crate::block::BlockKey;
use crate::clock::{Deadline, Moment};
use crate::key::{NamespaceId, ObjectKey};
use crate::tier::{Epoch, Located};

/// Where a block is.
#[derive(Debug)]
pub(super) enum Whereabouts {
    /// In RAM, with what it took to compute.
    Ram(u32),
    /// In the tier of this number.
    Tier(usize, Located),
    Nowhere,
}

/// The blocks of a chain.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) places: Vec<Whereabouts>,
    /// Those in RAM that are held, with their positions.
    pub(super) held: Vec<(usize, Held)>,
    /// When it was made: what was removed later does not come up.
    pub(super) epoch: Epoch,
    /// How long it waited for tiers to say what they have.
    pub(super) waited: Duration,
}

/// What to load of a run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Worth {
    /// Blocks from the first one on that are worth it, with those in RAM.
    pub(super) blocks: usize,
    /// Blocks behind them that are there, but not worth it.
    pub(super) not_worth: usize,
    /// How long loading takes.
    pub(super) load_us: u64,
}

/// What a lookup may find, tier by tier, and what of it is worth loading.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Overview {
    /// In RAM, from the first key on.
    pub(crate) ram: usize,
    /// Behind those, worth loading: from a tier, or in RAM behind such.
    pub(crate) load: usize,
    /// Behind those, not worth it.
    pub(crate) not_worth: usize,
    /// How long loading takes.
    pub(crate) load_time: Duration,
    /// All that is there by where it lies: blocks of each tier, in the tiers' order.
    pub(crate) by_tier: Vec<(String, usize)>,
}

/// Blocks of a run that were not all in RAM, from the first that was not: whole stretches of it, each with the name of the
/// tier that gave it, RAM among them. Two words, as each hit moves one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Loaded(Box<[(String, Range<usize>)]>);

impl Loaded {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn blocks(&self) -> usize {
        self.0.iter().map(|(_, blocks)| blocks.len()).sum()
    }

    /// Lets go of what is behind so many blocks of the run.
    pub(crate) fn truncate(&mut self, blocks: usize) {
        self.0.iter_mut().for_each(|(_, stretch)| stretch.end = stretch.end.min(blocks));
        let whole = self.0.iter().take_while(|(_, stretch)| !stretch.is_empty()).count();
        if whole < self.0.len() {
            self.0 = std::mem::take(&mut self.0).into_iter().take(whole).collect();
        }
    }

    /// What each tier gave of a run of so many blocks; RAM first.
    pub(crate) fn by_tier(&self, blocks: usize) -> Vec<(String, usize)> {
        let mut tiers = vec![(super::RAM.to_owned(), blocks - self.blocks())];
        for (name, stretch) in &*self.0 {
            match tiers.iter_mut().find(|(tier, _)| tier == name) {
                Some((_, blocks)) => *blocks += stretch.len(),
                None => tiers.push((name.clone(), stretch.len())),
            }
        }
        tiers
    }
}

impl Plan {
    /// Where the blocks from `first` to `end` come from.
    fn loaded(&self, tiers: &Tiers, first: usize, end: usize) -> Loaded {
        let mut stretches: Vec<(String, Range<usize>)> = Vec::new();
        for (position, place) in self.places.iter().enumerate().take(end).skip(first) {
            let tier = if let Whereabouts::Tier(number, _) = place { tiers.tier(*number) } else { None };
            let tier = tier.map_or(super::RAM, |tier| tier.name());
            match stretches.last_mut() {
                Some((last, blocks)) if last == tier => blocks.end = position + 1,
                _ => stretches.push((tier.to_owned(), position..position + 1)),
            }
        }
        Loaded(stretches.into())
    }

    /// Blocks from the first one on that are in RAM.
    pub(super) fn in_ram(&self) -> usize {
        self.places.iter().take_while(|place| matches!(place, Whereabouts::Ram(_))).count()
    }
}

impl Store {
    /// Pins the longest run of objects from the first key on; what is in a tier and worth
    /// it is loaded first. Says where what is behind the first one that was not in RAM came from.
    pub(crate) fn pin_run(&self, namespace: NamespaceId, keys: &[ObjectKey], request: Request) -> (Pin, Loaded) {
        if self.here().is_err() {
            return (Pin::new(Arc::clone(&self.shared), Vec::new()), Loaded::default());
        }
        let now_ms = self.shared.now_ms();
        let Some(tiers) = &self.tiers else {
            let held = self.shared.with(|ledger| ledger.hold_run(keys, now_ms, request));
            return (Pin::new(Arc::clone(&self.shared), held), Loaded::default());
        };
        let deadline = tiers.deadline();
        let plan = match self.hold_or_plan(tiers, (namespace, keys), request, deadline) {
            Ok(held) => return (Pin::new(Arc::clone(&self.shared), held), Loaded::default()),
            Err(plan) => plan,
        };
        // What is to be loaded needs room.
        self.end_expired();
        let first = plan.in_ram();
        let worth = tiers.judge(&plan, first, None);
        tiers.count_skipped(&plan, worth, request);
        let mut loaded = plan.loaded(tiers, first, worth.blocks);
        let run = tiers.fetch(keys, plan, worth.blocks, deadline);
        self.shared.with(|ledger| ledger.count(request, run.held(), run.len()));
        self.offer();
        loaded.truncate(run.len());
        (run, loaded)
    }

    /// Pins all of these objects that are in RAM, or none if one is not. Asks no tier and counts nothing.
    pub(crate) fn pin_in_ram(&self, keys: &[ObjectKey]) -> Option<Pin> {
        self.here().ok()?;
        let now_ms = self.shared.now_ms();
        let held = self.shared.with(|ledger| ledger.hold_all(keys, now_ms, Request::Uncounted))?;
        Some(Pin::new(Arc::clone(&self.shared), held))
    }

    /// Counts a request for these objects, of which some may be in RAM: as a lookup does that asks no tier.
    pub(crate) fn note(&self, keys: &[ObjectKey], request: Request) {
        if self.here().is_ok() {
            let now_ms = self.shared.now_ms();
            let held = self.shared.with(|ledger| ledger.hold_run(keys, now_ms, request));
            drop(Pin::new(Arc::clone(&self.shared), held));
        }
    }

    /// Pins all of these objects or none; loads what is in a tier, if that is worth it.
    pub(crate) fn pin_all(&self, namespace: NamespaceId, keys: &[ObjectKey], request: Request) -> Option<Pin> {
        self.here().ok()?;
        let now_ms = self.shared.now_ms();
        let Some(tiers) = &self.tiers else {
            let held = self.shared.with(|ledger| ledger.hold_all(keys, now_ms, request))?;
            return Some(Pin::new(Arc::clone(&self.shared), held));
        };
        let deadline = tiers.deadline();
        let plan = match self.hold_or_plan(tiers, (namespace, keys), request, deadline) {
            Ok(held) => return Some(Pin::new(Arc::clone(&self.shared), held)),
            Err(plan) => plan,
        };
        // All or nothing: a part is not worth anything.
        let wanted = if tiers.judge(&plan, 0, None).blocks < keys.len() { 0 } else { keys.len() };
        let mut run = tiers.fetch(keys, plan, wanted, deadline);
        if run.len() < keys.len() {
            run.truncate(0);
        }
        self.shared.with(|ledger| ledger.count(request, run.held(), run.len()));
        self.offer();
        (run.len() > 0).then_some(run)
    }

    /// Begins to load what of these keys is in a tier, and does not wait for it; says how
    /// many are under way.
    pub(crate) fn prefetch(&self, namespace: NamespaceId, keys: &[ObjectKey]) -> usize {
        let Some(tiers) = self.here().ok().and_then(|store| store.tiers.as_ref()) else { return 0 };
        let plan = self.survey(tiers, (namespace, keys), tiers.deadline());
        let first = plan.in_ram();
        let worth = tiers.judge(&plan, first, None);
        tiers.fetch_ahead(keys, &plan, first..worth.blocks)
    }

    /// Hands these bytes of the objects under these keys to `each`, in order: from RAM where they are there, else
    /// straight from a tier, without bringing them into RAM. Says how many there were.
    pub(crate) fn read_parts(
        &self,
        namespace: NamespaceId,
        keys: &[ObjectKey],
        range: &Range<usize>,
        request: Request,
        mut each: impl FnMut(usize, &[u8]),
    ) -> usize {
        if self.here().is_err() {
            return 0;
        }
        let now_ms = self.shared.now_ms();
        let part = |bytes: &[u8]| -> Range<usize> { range.start.min(bytes.len())..range.end.min(bytes.len()) };
        let deadline = self.tiers.as_ref().map_or_else(Deadline::never, |tiers| tiers.deadline());
        let held_or_plan = match &self.tiers {
            Some(tiers) => self.hold_or_plan(tiers, (namespace, keys), request, deadline).map_err(|plan| (tiers, plan)),
            None => Ok(self.shared.with(|ledger| ledger.hold_run(keys, now_ms, request))),
        };
        let (tiers, plan) = match held_or_plan {
            Ok(held) => {
                let pin = Pin::new(Arc::clone(&self.shared), held);
                for position in 0..pin.len() {
                    let bytes = pin.bytes(position);
                    each(position, bytes.get(part(bytes)).unwrap_or_default());
                }
                return pin.len();
            }
            Err(missing) => missing,
        };
        let worth = tiers.judge(&plan, plan.in_ram(), Some(range.len()));
        tiers.count_skipped(&plan, worth, request);
        let (pin, read) = tiers.read_parts(keys, plan, worth.blocks, range, &mut each, deadline);
        self.shared.with(|ledger| ledger.count(request, pin.held(), read));
        self.offer();
        read
    }

    /// What a lookup of these keys would find, without loading anything.
    pub(crate) fn look(&self, namespace: NamespaceId, keys: &[ObjectKey]) -> Overview {
        if self.here().is_err() {
            return Overview::default();
        }
        let Some(tiers) = &self.tiers else {
            let ram = self.shared.with(|ledger| ledger.resident(keys)).iter().take_while(|resident| **resident).count();
            return Overview { ram, by_tier: vec![(super::RAM.to_owned(), ram)], ..Overview::default() };
        };
        let plan = self.survey(tiers, (namespace, keys), tiers.deadline());
        let ram = plan.in_ram();
        let worth = tiers.estimate(&plan, ram, None);
        let there = worth.blocks + worth.not_worth;
        let mut by_tier = vec![(super::RAM.to_owned(), 0)];
        by_tier.extend(tiers.each().map(|tier| (tier.name().to_owned(), 0)));
        for place in plan.places.iter().take(there) {
            let at = match place {
                Whereabouts::Ram(_) => 0,
                Whereabouts::Tier(tier, _) => tier + 1,
                Whereabouts::Nowhere => continue,
            };
            by_tier.iter_mut().skip(at).take(1).for_each(|(_, blocks)| *blocks += 1);
        }
        let load_time = Duration::from_micros(worth.load_us);
        Overview { ram, load: worth.blocks - ram, not_worth: worth.not_worth, load_time, by_tier }
    }

    /// Of each tier, `ram` first, which of these keys it has: also those that a tier before it has.
    pub(crate) fn residency(&self, namespace: NamespaceId, keys: &[ObjectKey]) -> Vec<(String, Vec<bool>)> {
        if self.here().is_err() {
            return Vec::new();
        }
        let mut residency = vec![(super::RAM.to_owned(), self.shared.with(|ledger| ledger.resident(keys)))];
        if let Some(tiers) = &self.tiers {
            let names: Vec<BlockKey> = keys.iter().copied().map(BlockKey).collect();
            let has = |tier: &Arc<dyn crate::tier::Tier>| {
                tier.locate(namespace, &names, tiers.deadline()).iter().map(Option::is_some).collect()
            };
            residency.extend(tiers.each().map(|tier| (tier.name().to_owned(), has(tier))));
        }
        residency
    }

    /// All of these from RAM, counted, with the lock taken once; or else a plan for all of them.
    fn hold_or_plan(
        &self,
        tiers: &Tiers,
        (namespace, keys): (NamespaceId, &[ObjectKey]),
        request: Request,
        deadline: Deadline,
    ) -> Result<Vec<Held>, Plan> {
        let now_ms = self.shared.now_ms();
        let held = self.shared.with(|ledger| {
            let held = ledger.hold_run(keys, now_ms, Request::Uncounted);
            if held.len() < keys.len() {
                let first = held.len();
                let rest = ledger.hold_each(keys.get(first..).unwrap_or_default(), now_ms);
                let rest = rest.into_iter().map(|(position, held)| (first + position, held));
                let held: Vec<(usize, Held)> = held.into_iter().enumerate().chain(rest).collect();
                let compute = held.iter().map(|(position, held)| (*position, ledger.compute_us(held))).collect();
                return Err((held, compute, ledger.epoch()));
            }
            ledger.count(request, &held, held.len());
            Ok(held)
        });
        match held {
            Ok(held) => {
                self.offer();
                Ok(held)
            }
            Err((held, compute, epoch)) => {
                let began = Moment::now();
                let places = locate(tiers, (namespace, keys), compute, deadline);
                Err(Plan { held, epoch, places, waited: began.elapsed() })
            }
        }
    }

    /// A plan that holds nothing, and so is no use of what is in RAM.
    fn survey(&self, tiers: &Tiers, (namespace, keys): (NamespaceId, &[ObjectKey]), deadline: Deadline) -> Plan {
        let (compute, epoch) = self.shared.with(|ledger| {
            let compute_us = keys.iter().map(|key| ledger.compute_us_of(key)).enumerate();
            (compute_us.filter_map(|(position, us)| Some((position, us?))).collect(), ledger.epoch())
        });
        let places = locate(tiers, (namespace, keys), compute, deadline);
        Plan { held: Vec::new(), epoch, places, waited: Duration::ZERO }
    }
}

impl Tiers {
    /// How many blocks are worth it, of a plan whose first `first` are in RAM; `part_bytes` of each are to be read.
    pub(super) fn estimate(&self, plan: &Plan, first: usize, part_bytes: Option<usize>) -> Worth {
        let (mut saved_us, mut best_us, mut worth) = (0i128, 0i128, Worth { blocks: first, ..Worth::default() });
        let (mut load_us, mut there) = (0, first);
        for (position, place) in plan.places.iter().enumerate().skip(first) {
            match place {
                Whereabouts::Ram(compute_us) => saved_us += i128::from(*compute_us),
                Whereabouts::Tier(tier, located) => {
                    let bytes = part_bytes.map_or(located.stored_bytes, |bytes| stored_part(located, bytes));
                    let one_us = self.rate(*tier).map_or(0, |rate| rate.estimate_us(bytes));
                    load_us += one_us;
                    // Where nobody said what computing costs, loading is worth it.
                    let compute_us = if located.compute_us == 0 { one_us + 1 } else { located.compute_us.into() };
                    saved_us += i128::from(compute_us) - i128::from(one_us);
                }
                Whereabouts::Nowhere => break,
            }
            there = position + 1;
            // What is in RAM costs nothing: it goes with what is before it, or has just come there.
            if saved_us > best_us || (matches!(place, Whereabouts::Ram(_)) && worth.blocks == position) {
                (best_us, worth.blocks, worth.load_us) = (saved_us, position + 1, load_us);
            }
        }
        worth.not_worth = there - worth.blocks;
        worth
    }

    /// Counts what was there and not worth loading.
    fn count_skipped(&self, plan: &Plan, worth: Worth, request: Request) {
        let Request::Tokens { block_tokens, .. } = request else { return };
        for place in plan.places.iter().skip(worth.blocks).take(worth.not_worth) {
            if let Whereabouts::Tier(tier, _) = place {
                self.count_not_worth(*tier, block_tokens);
            }
        }
    }

    /// As [`Tiers::estimate`]; of runs that are not worth loading, now and then one block is loaded, to measure again.
    pub(super) fn judge(&self, plan: &Plan, first: usize, part_bytes: Option<usize>) -> Worth {
        let mut worth = self.estimate(plan, first, part_bytes);
        let skips = worth.blocks == first && matches!(plan.places.get(first), Some(Whereabouts::Tier(..)));
        if skips && self.is_probe() {
            (worth.blocks, worth.not_worth) = (first + 1, worth.not_worth - 1);
        }
        worth
    }
}

/// Bytes that are moved for so many of a block.
fn stored_part(located: &Located, bytes: usize) -> u64 {
    let moved = u128::from(located.stored_bytes) * bytes as u128 / u128::from(located.raw_bytes.max(1));
    u64::try_from(moved).unwrap_or(u64::MAX)
}

/// Where each key is: in RAM if it is among `in_ram`, else in the first tier that says so.
fn locate(
    tiers: &Tiers,
    (namespace, keys): (NamespaceId, &[ObjectKey]),
    in_ram: Vec<(usize, u32)>,
    deadline: Deadline,
) -> Vec<Whereabouts> {
    let mut places: Vec<Whereabouts> = keys.iter().map(|_| Whereabouts::Nowhere).collect();
    for (position, compute_us) in in_ram {
        if let Some(place) = places.get_mut(position) {
            *place = Whereabouts::Ram(compute_us);
        }
    }
    for (number, tier) in tiers.each().enumerate() {
        let missing =
            places.iter().zip(keys).enumerate().filter(|(_, (place, _))| matches!(place, Whereabouts::Nowhere));
        let (positions, names): (Vec<usize>, Vec<BlockKey>) =
            missing.map(|(position, (_, key))| (position, BlockKey(*key))).unzip();
        if names.is_empty() {
            break;
        }
        for (position, located) in positions.into_iter().zip(tier.locate(namespace, &names, deadline)) {
            if let (Some(place), Some(located)) = (places.get_mut(position), located) {
                *place = Whereabouts::Tier(number, located);
            }
        }
    }
    places
}
