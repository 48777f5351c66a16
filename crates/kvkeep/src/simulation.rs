//! The cache without payload: the library's real index, policies and accounting, driven by
//! requests that are lists of block numbers. What `kvkeep replay` runs.
//!
//! One block takes one page. A second implementation would be simpler to make fast, and
//! would prove nothing about the first.

mod segments;

use std::ops::Range;

use crate::error::{Error, Result};
use crate::eviction::{Admission, Admitter, Place, PolicyKind, Priority};
use crate::index::NEVER;
use crate::key::{NamespaceId, ObjectKey};
use crate::store::OnPresent;
use crate::store::ledger::{Ledger, Request, Reservation, Written, new_entry};
use crate::store::{Terms, Wanted};
use crate::tier::ram::{PAGE_BYTES, pages_without_arena};
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
    disk: Option<Disk>,
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

#[derive(Debug)]
struct Disk {
    segments: Segments,
    admitter: Admitter,
}

impl Hits {
    /// On either tier.
    #[must_use]
    pub fn total(self) -> usize {
        self.ram + self.disk
    }
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
    /// stored, what is read from it goes to RAM again.
    ///
    /// # Errors
    /// [`Error::Config`] for a capacity of no blocks.
    pub fn with_disk(mut self, capacity_blocks: u32, admission: Admission) -> Result<Self> {
        if capacity_blocks == 0 {
            return Err(no_capacity());
        }
        let segments = Segments::new(capacity_blocks as usize);
        self.disk = Some(Disk { segments, admitter: Admitter::new(admission) });
        Ok(self)
    }

    /// One request, as a live cache sees it: look up, read what is there, store what is
    /// missing. `blocks` are prefix-chained: equal numbers mean equal blocks and equal
    /// everything before them.
    pub fn request(&mut self, blocks: &[u64]) -> Hits {
        self.request_of(0, blocks, Priority::Normal)
    }

    /// As [`Simulation::request`], by a tenant, whose blocks have numbers of their own.
    pub fn request_of(&mut self, tenant_number: u32, blocks: &[u64], priority: Priority) -> Hits {
        let Self { ram, disk, keys, unpinned } = self;
        keys.clear();
        keys.extend(blocks.iter().map(|number| ObjectKey::numbered(*number)));
        if let Some(capacity) = unpinned {
            return Hits { ram: pass_through(ram, keys, *capacity), disk: 0 };
        }
        let found = ram.hold_run(keys, 0, Request::Tokens { requested: keys.len(), block_tokens: 1 });
        let in_ram = found.len();
        ram.release(found);
        let on_disk = disk.as_mut().map_or(0, |disk| disk.read(keys, in_ram));
        if in_ram < keys.len() {
            store_missing(ram, keys, 0..keys.len(), in_ram + on_disk, tenant(tenant_number), priority);
        }
        if let Some(disk) = disk {
            disk.write(keys, in_ram + on_disk, ram);
        }
        Hits { ram: in_ram, disk: on_disk }
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
        self.disk.as_ref().map_or(0, |disk| disk.segments.written_blocks)
    }

    /// Blocks that were written to disk again before the segment in which they lay went.
    #[must_use]
    pub fn disk_reinserted_blocks(&self) -> u64 {
        self.disk.as_ref().map_or(0, |disk| disk.segments.reinserted_blocks)
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
        store_missing(state, keys, end - missing..end, found, tenant(0), Priority::Normal);
        end -= missing;
    }
    state.shrink_to(capacity);
    found
}

/// Stores what is missing of a part of a request, head first as far as it fits.
fn store_missing(
    state: &mut Ledger,
    keys: &[ObjectKey],
    part: Range<usize>,
    found: usize,
    tenant: NamespaceId,
    priority: Priority,
) {
    let wanted = Wanted { bytes_each: PAGE_BYTES, first_given: 0, priority, terms: Terms::Patient };
    let first = part.start;
    let Reservation { present, missing, .. } =
        state.reserve(tenant, keys.get(part).unwrap_or_default(), wanted, &[], 0);
    let written = missing.into_iter().filter_map(|(position, extent)| {
        let position = first + position;
        let entry = new_entry(*keys.get(position)?, extent, usize::MAX, NEVER, None, 0);
        let parent = position.checked_sub(1).and_then(|before| keys.get(before)).copied();
        Some(Written { entry, parent, place: Place::of(position, keys.len(), found) })
    });
    state.seal_all(tenant, written, OnPresent::Keep, priority);
    state.release(present);
}

impl Disk {
    /// Reads on from where RAM ends; says how many blocks that were.
    fn read(&mut self, keys: &[ObjectKey], in_ram: usize) -> usize {
        let behind = keys.get(in_ram..).unwrap_or_default();
        let mut on_disk = 0;
        for kind in behind.iter().map_while(|key| self.segments.read(key)) {
            self.admitter.read(kind);
            on_disk += 1;
        }
        on_disk
    }

    fn write(&mut self, keys: &[ObjectKey], found: usize, ram: &Ledger) {
        for (position, key) in keys.iter().enumerate() {
            if self.segments.holds(key) {
                continue;
            }
            let (touches, place) = (u8::from(position < found), Place::of(position, keys.len(), found));
            // Behind a gap nothing can be read.
            if !self.admitter.admits(touches, place) {
                break;
            }
            let kind = Admitter::kind(touches, place);
            self.segments.write(*key, kind, |key| ram.index().find(key).is_some());
            self.admitter.wrote(kind);
        }
        self.segments.take_evicted(|key| ram.index().find(key).is_some());
    }
}
