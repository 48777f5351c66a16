//! The cache without payload: the library's real index, policies and accounting, driven by
//! requests that are lists of block numbers. What `kvkeep replay` runs.
//!
//! One block takes one page. Behind the RAM there may be a disk, also without bytes. What goes down, what comes up and
//! what is refused is decided by the ledger and its gate, as in a cache; what a cache waits for is done here at once.
//!
//! A second implementation would be simpler to make fast, and would prove nothing about the first. An order of its own
//! in which the disk was written and read was tried: it hit up to 10 points more than a cache does.

mod segments;

use std::ops::Range;

use crate::config::WritePolicy;
use crate::error::{Error, Result};
use crate::event::Change;
use crate::eviction::{Admission, Place, PolicyKind, Priority};
use crate::index::NEVER;
use crate::key::{BlockHash, NamespaceId, ObjectKey};
use crate::store::OnPresent;
use crate::store::gate::Gate;
use crate::store::ledger::{Held, Leaving, Ledger, Request, Reservation, Shortage, Written, new_entry};
use crate::store::{Terms, Wanted};
use crate::tier::Epoch;
use crate::tier::ram::{Extent, PAGE_BYTES, pages_without_arena};
use segments::Segments;

/// A cache of blocks that have a number and no payload.
///
/// ```
/// use kvkeep::{PolicyKind, Simulation};
///
/// let mut cache = Simulation::new(100, PolicyKind::Lru)?;
/// assert_eq!(cache.request(&[1, 2, 3]).total(), 0);
/// assert_eq!(cache.request(&[1, 2, 9]).ram, 2);
/// # Ok::<(), kvkeep::Error>(())
/// ```
#[derive(Debug)]
pub struct Simulation {
    ram: Ledger,
    disk: Option<Segments>,
    keys: Vec<ObjectKey>,
    /// Where requests hold nothing: how many blocks are left after each.
    unpinned: Option<usize>,
}

/// The blocks of one request that were there, from the first one on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Hits {
    /// In RAM.
    pub ram: usize,
    /// On disk only.
    pub disk: usize,
}

impl Hits {
    /// On either tier.
    #[must_use]
    pub fn total(self) -> usize {
        self.ram + self.disk
    }
}

/// What a listener is told after a request: blocks that came to RAM, and blocks that went from it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// In the order of their chain.
    pub stored: Vec<u64>,
    /// In the order of their eviction.
    pub removed: Vec<u64>,
}

impl Simulation {
    /// RAM for `capacity_blocks` blocks.
    ///
    /// # Errors
    /// [`Error::Config`] for a capacity of no blocks.
    pub fn new(capacity_blocks: u32, policy: PolicyKind) -> Result<Self> {
        Self::with_quotas(capacity_blocks, policy, &[])
    }

    /// As [`Simulation::new`], with weights for the tenants 1, 2, ...; tenant 0 has the weight 1.
    ///
    /// # Errors
    /// [`Error::Config`] for a capacity of no blocks.
    pub fn with_quotas(capacity_blocks: u32, policy: PolicyKind, weights: &[f64]) -> Result<Self> {
        let quotas: Vec<_> = (1..).zip(weights).map(|(number, weight)| (tenant(number), *weight)).collect();
        let ram = state(capacity_blocks, policy, &quotas)?;
        Ok(Self { ram, disk: None, keys: Vec::new(), unpinned: None })
    }

    /// As [`Simulation::new`], but a request of up to `longest_request_blocks` does not hold its
    /// blocks: it uses and stores them one by one from its tail to its head, beyond the capacity,
    /// and then the policy drives out what is too much, the request's own blocks as well. No live
    /// cache works so; published figures of policies do.
    ///
    /// # Errors
    /// [`Error::Config`] for a capacity of no blocks.
    pub fn unpinned(capacity_blocks: u32, policy: PolicyKind, longest_request_blocks: u32) -> Result<Self> {
        Self::new(capacity_blocks, policy)?;
        let room = Self::new(capacity_blocks.saturating_add(longest_request_blocks), policy)?;
        Ok(Self { unpinned: Some(capacity_blocks as usize), ..room })
    }

    /// A disk behind the RAM, which evicts as the disk tier does: what `admission` lets pass is written when it is
    /// stored, what is read from it goes to RAM again. A request finds no more than RAM has room for.
    ///
    /// # Errors
    /// [`Error::Config`] for a capacity of no blocks.
    pub fn with_disk(mut self, capacity_blocks: u32, admission: Admission) -> Result<Self> {
        if capacity_blocks == 0 {
            return Err(no_capacity());
        }
        self.ram.set_tiers(Gate::new(admission.check()?, WritePolicy::Through));
        self.disk = Some(Segments::new(capacity_blocks as usize));
        Ok(self)
    }

    /// One request, as a live cache sees it: look up, read what is there, store what is
    /// missing. `blocks` are prefix-chained: equal numbers mean equal blocks and equal
    /// everything before them.
    pub fn request(&mut self, blocks: &[u64]) -> Hits {
        self.request_of(0, blocks, Priority::Normal)
    }

    /// As [`Simulation::request`], with what a listener of RAM is told of it.
    pub fn request_told(&mut self, blocks: &[u64]) -> (Hits, Changes) {
        self.ram.keep_journal();
        let hits = self.request(blocks);
        let mut told = Changes::default();
        for change in self.ram.take_changes() {
            match change {
                Change::Came { block, .. } => told.stored.extend(number(&block)),
                Change::Went(block) => told.removed.extend(number(&block)),
                Change::Cleared(_) => {}
            }
        }
        (hits, told)
    }

    /// As [`Simulation::request`], by a tenant, whose blocks have numbers of their own.
    pub fn request_of(&mut self, tenant_number: u32, blocks: &[u64], priority: Priority) -> Hits {
        let Self { ram, disk, keys, unpinned } = self;
        keys.clear();
        keys.extend(blocks.iter().map(|number| ObjectKey::numbered(*number)));
        if let Some(capacity) = unpinned {
            return Hits { ram: pass_through(ram, keys, *capacity), disk: 0 };
        }
        let namespace = tenant(tenant_number);
        let mut run = ram.hold_run(keys, 0, Request::Uncounted);
        let in_ram = run.len();
        if let Some(disk) = disk {
            load(ram, disk, namespace, keys, &mut run);
        }
        let found = run.len();
        ram.count(Request::Tokens { requested: keys.len(), block_tokens: 1 }, &run, found);
        settle(ram, disk.as_mut());
        ram.release(run);
        if found < keys.len() {
            store_missing(ram, disk.as_mut(), keys, 0..keys.len(), None, namespace, priority);
        }
        Hits { ram: in_ram, disk: found - in_ram }
    }

    /// Memory of the RAM tier's policy, in bytes.
    #[must_use]
    pub fn policy_bytes(&self) -> usize {
        self.ram.policy_bytes()
    }

    /// Blocks in RAM.
    #[must_use]
    pub fn resident_blocks(&self) -> usize {
        self.ram.index().len()
    }

    /// Blocks of a request that RAM has, from the first one on; not a request.
    #[must_use]
    pub fn reachable_blocks(&self, blocks: &[u64]) -> usize {
        let found = |number: &&u64| self.ram.index().find(&ObjectKey::numbered(**number)).is_some();
        blocks.iter().take_while(found).count()
    }

    /// Blocks written to disk so far.
    #[must_use]
    pub fn disk_written_blocks(&self) -> u64 {
        self.disk.as_ref().map_or(0, |disk| disk.written_blocks)
    }

    /// Blocks that were written to disk again before the segment in which they lay went.
    #[must_use]
    pub fn disk_reinserted_blocks(&self) -> u64 {
        self.disk.as_ref().map_or(0, |disk| disk.reinserted_blocks)
    }
}

fn state(capacity_blocks: u32, policy: PolicyKind, quotas: &[(NamespaceId, f64)]) -> Result<Ledger> {
    if capacity_blocks == 0 {
        return Err(no_capacity());
    }
    Ok(Ledger::new(pages_without_arena(capacity_blocks), policy, quotas))
}

fn no_capacity() -> Error {
    Error::Config("a capacity of 0 blocks makes no cache: give at least 1".to_owned())
}

/// The number that a block was made of.
fn number(block: &BlockHash) -> Option<u64> {
    block.as_bytes().get(8..16)?.try_into().ok().map(u64::from_le_bytes)
}

fn tenant(number: u32) -> NamespaceId {
    NamespaceId::named(&format!("tenant {number}"))
}

/// A request that holds nothing; says how many blocks were there.
fn pass_through(state: &mut Ledger, keys: &[ObjectKey], capacity: usize) -> usize {
    let there = |state: &Ledger, key: &ObjectKey| state.index().find(key).is_some();
    let found = keys.iter().take_while(|key| there(state, key)).count();
    state.tick();
    let mut end = keys.len();
    while let Some((last, before)) = keys.get(..end).and_then(<[ObjectKey]>::split_last) {
        if state.touch(last, Place::of(before.len(), keys.len(), found)) {
            end -= 1;
            continue;
        }
        let missing = before.iter().rev().take_while(|key| !there(state, key)).count() + 1;
        store_missing(state, None, keys, end - missing..end, Some(found), tenant(0), Priority::Normal);
        end -= missing;
    }
    state.shrink_to(capacity);
    found
}

/// Stores what is missing of a part of a request, head first as far as it fits. Of the request so many blocks were
/// found: those before the first missing one, if nothing else is said.
fn store_missing(
    ram: &mut Ledger,
    mut disk: Option<&mut Segments>,
    keys: &[ObjectKey],
    part: Range<usize>,
    found: Option<usize>,
    tenant: NamespaceId,
    priority: Priority,
) {
    let wanted = Wanted { bytes_each: PAGE_BYTES, first_given: 0, priority, terms: Terms::Patient };
    let first = part.start;
    let wanted_keys = keys.get(part).unwrap_or_default();
    let mut made = ram.reserve(tenant, wanted_keys, wanted, &[], 0);
    while made.shortage == Some(Shortage::Coming) {
        // What it has goes back, so that it can be had again.
        ram.release(made.present);
        made.missing.into_iter().for_each(|(_, extent)| ram.abandon(extent));
        settle(ram, disk.as_deref_mut());
        made = ram.reserve(tenant, wanted_keys, wanted, &[], 0);
    }
    settle(ram, disk.as_deref_mut());
    let Reservation { present, missing, .. } = made;
    let found = found.unwrap_or_else(|| missing.first().map_or(keys.len(), |(position, _)| first + position));
    let new: Vec<ObjectKey> = missing.iter().filter_map(|(position, _)| keys.get(first + position)).copied().collect();
    let written = missing.into_iter().filter_map(|(position, extent)| {
        let position = first + position;
        let entry = new_entry(*keys.get(position)?, extent, usize::MAX, None, 0);
        let parent = position.checked_sub(1).and_then(|before| keys.get(before)).copied();
        Some(Written { entry, expires_at_ms: NEVER, parent, place: Place::of(position, keys.len(), found) })
    });
    ram.seal_all(tenant, written, OnPresent::Keep, priority);
    if disk.is_some() {
        ram.offer_run(&new);
        settle(ram, disk);
    }
    ram.release(present);
}

/// Brings up what the disk has behind a run that is held, as far as RAM has room: first room for all of it, then the
/// blocks. What RAM has between them is held meanwhile.
fn load(ram: &mut Ledger, disk: &mut Segments, namespace: NamespaceId, keys: &[ObjectKey], run: &mut Vec<Held>) {
    let (first, epoch) = (run.len(), ram.epoch());
    let behind = keys.get(first..).unwrap_or_default();
    let mut held = ram.hold_each(behind, 0);
    let there = {
        let mut in_ram = held.iter().map(|(position, _)| *position).peekable();
        let is_there = |(position, key): &(usize, &ObjectKey)| in_ram.next_if_eq(position).is_some() || disk.holds(key);
        behind.iter().enumerate().take_while(is_there).count()
    };
    let unreachable = held.split_off(held.partition_point(|(position, _)| *position < there));
    ram.release(unreachable.into_iter().map(|(_, held)| held).collect());
    let mut held = held.into_iter().peekable();
    let mut steps = Vec::with_capacity(there);
    for position in 0..there {
        let here = held.next_if(|(at, _)| *at == position).map(|(_, held)| Step::Here(held));
        let Some(step) = here.or_else(|| room(ram, disk, namespace).map(Step::Up)) else { break };
        steps.push(step);
    }
    let mut unused: Vec<Held> = Vec::new();
    let mut is_whole = true;
    for (position, step) in (first..).zip(steps) {
        let held = match step {
            Step::Here(held) => Some(held),
            Step::Up(extent) => come_up(ram, disk, namespace, keys, position, extent, epoch),
        };
        is_whole &= held.is_some();
        if is_whole { run.extend(held) } else { unused.extend(held) }
    }
    unused.extend(held.map(|(_, held)| held));
    ram.release(unused);
}

/// A block that is there: in RAM, or on the disk with room for it in RAM.
enum Step {
    Here(Held),
    Up(Extent),
}

/// Reads a block into its page. It may have gone from the disk while room was made.
fn come_up(
    ram: &mut Ledger,
    disk: &mut Segments,
    namespace: NamespaceId,
    keys: &[ObjectKey],
    position: usize,
    extent: Extent,
    epoch: Epoch,
) -> Option<Held> {
    let read = keys.get(position).and_then(|key| Some((*key, disk.read(key)?)));
    let Some((key, mark)) = read else {
        ram.abandon(extent);
        return None;
    };
    ram.read_below(mark);
    let entry = new_entry(key, extent, usize::MAX, None, 0);
    let parent = position.checked_sub(1).and_then(|before| keys.get(before)).copied();
    let written = Written { entry, expires_at_ms: NEVER, parent, place: Place::of(position, keys.len(), keys.len()) };
    ram.seal_promoted(namespace, written, keys.get(position + 1), epoch);
    ram.hold_key(&key, 0, &[])
}

/// A page for a block that comes up.
fn room(ram: &mut Ledger, disk: &mut Segments, namespace: NamespaceId) -> Option<Extent> {
    loop {
        let made = ram.reserve_one(namespace, PAGE_BYTES, 0);
        settle(ram, Some(disk));
        match made {
            Ok(extent) => return Some(extent),
            Err(Shortage::Coming) => {}
            Err(Shortage::Refused(_)) => return None,
        }
    }
}

/// Writes what the ledger offers.
fn settle(ram: &mut Ledger, disk: Option<&mut Segments>) {
    let Some(disk) = disk else { return };
    for Leaving { meta, held, mark, .. } in ram.take_offers() {
        let is_new = disk.offer(meta.key.0, mark, |key| ram.index().find(key).is_some());
        ram.is_below(&held, is_new.then_some(mark));
        ram.release(vec![held]);
    }
}
