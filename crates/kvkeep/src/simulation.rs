//! The cache without payload: the library's real index, policies and accounting, driven by
//! requests that are lists of block numbers. What `kvkeep replay` runs.
//!
//! One block takes one page. A second implementation would be simpler to make fast, and
//! would prove nothing about the first.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::eviction::{Admission, Admitter, Place, PolicyKind, Priority};
use crate::index::NEVER;
use crate::key::{NamespaceId, ObjectKey};
use crate::store::OnPresent;
use crate::store::Wanted;
use crate::store::ledger::{Ledger, Request, Reservation, Written, new_entry};
use crate::tier::ram::{PAGE_BYTES, pages_without_arena};

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
    state: Ledger,
    admitter: Admitter,
    /// The kind of each entry when it was written.
    kinds: Vec<u8>,
    written_blocks: u64,
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

    /// A disk behind the RAM: what `admission` lets pass is written when it is stored, what is
    /// read from it goes to RAM again.
    ///
    /// # Errors
    /// [`Error::Config`] for a capacity of no blocks.
    pub fn with_disk(mut self, capacity_blocks: u32, policy: PolicyKind, admission: Admission) -> Result<Self> {
        let state = state(capacity_blocks, policy, &[])?;
        self.disk = Some(Disk { state, admitter: Admitter::new(admission), kinds: Vec::new(), written_blocks: 0 });
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
            disk.write(keys, in_ram + on_disk);
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
        self.disk.as_ref().map_or(0, |disk| disk.written_blocks)
    }
}

fn state(capacity_blocks: u32, policy: PolicyKind, quotas: &[(NamespaceId, f64)]) -> Result<Ledger> {
    if capacity_blocks == 0 {
        return Err(Error::Config("a capacity of 0 blocks makes no cache: give at least 1".to_owned()));
    }
    Ok(Ledger::new(pages_without_arena(capacity_blocks), policy, quotas))
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
    let wanted = Wanted { bytes_each: PAGE_BYTES, first_given: 0, priority };
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
        let on_disk = behind.iter().take_while(|key| self.state.index().find(key).is_some()).count();
        for key in behind.iter().take(on_disk) {
            if let Some(id) = self.state.index().find(key) {
                self.admitter.read(self.kinds.get(id as usize).copied().unwrap_or_default());
            }
        }
        // What RAM served was used as well.
        let requested = Request::Tokens { requested: keys.len(), block_tokens: 1 };
        let used = self.state.hold_run(keys.get(..in_ram + on_disk).unwrap_or_default(), 0, requested);
        self.state.release(used);
        on_disk
    }

    fn write(&mut self, keys: &[ObjectKey], found: usize) {
        let mut written = Vec::new();
        for (position, key) in keys.iter().enumerate() {
            if self.state.index().find(key).is_some() {
                continue;
            }
            let (touches, place) = (u8::from(position < found), Place::of(position, keys.len(), found));
            // Behind a gap nothing can be read.
            if !self.admitter.admits(touches, place) {
                break;
            }
            let wanted = Wanted { bytes_each: PAGE_BYTES, first_given: 0, priority: Priority::Normal };
            let room = self.state.reserve(tenant(0), std::slice::from_ref(key), wanted, &[], 0).missing;
            let parent = position.checked_sub(1).and_then(|before| keys.get(before)).copied();
            let entry = |extent| Written { entry: new_entry(*key, extent, usize::MAX, NEVER, None, 0), parent, place };
            written.extend(room.into_iter().map(|(_, extent)| (entry(extent), touches)));
        }
        self.written_blocks += written.len() as u64;
        let told: Vec<_> =
            written.iter().map(|(written, touches)| (written.entry.key, *touches, written.place)).collect();
        let written = written.into_iter().map(|(written, _)| written);
        self.state.seal_all(tenant(0), written, OnPresent::Keep, Priority::Normal);
        for (key, touches, place) in told {
            if let Some(id) = self.state.index().find(&key) {
                let (slot, kind) = (id as usize, Admitter::kind(touches, place));
                self.admitter.wrote(kind);
                self.kinds.resize(self.kinds.len().max(slot + 1), 0);
                if let Some(entry) = self.kinds.get_mut(slot) {
                    *entry = kind;
                }
            }
        }
    }
}
