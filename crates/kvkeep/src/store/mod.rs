//! The store: sealed objects under keys, in one arena, under one cap. Both front doors
//! ([`KvCache`](crate::KvCache) by tokens, [`SimpleKvCache`](crate::SimpleKvCache) by
//! prefix text) only make keys for it.
//!
//! One lock guards the index, the policy and the free pages, and is never held while
//! payload bytes are copied: writers copy into pages that only they have
//! ([`Pending`]), readers out of pages that cannot be freed ([`Pin`]). Shards with a
//! lock each were the alternative: the blocks of one prompt would lie in all of them,
//! and a lookup of 512 blocks takes one lock 512 times over instead of once.

mod gate;
mod give_back;
mod guard;
mod readers;
pub(crate) mod state;
#[cfg(test)]
mod tests;
mod tiering;

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::{Clock, duration_ms};
use crate::config::{CacheConfig, StoreOptions, WritePolicy};
use crate::error::{Error, Rejection, Result};
use crate::eviction::Place;
use crate::index::NEVER;
use crate::key::{Namespace, NamespaceId, ObjectKey, PrefixHash};
use crate::namespaces::NamespaceUsage;
use crate::process::Process;
use crate::record::TraceRecorder;
use crate::stats::Stats;
use crate::sync::Mutex;
use crate::tensor::PairSpec;
use crate::tier::disk::Disk;
use crate::tier::ram::{self, Arena};

use give_back::GiveBack;
pub(crate) use guard::{Pending, Pin, PrivatePin};
pub(crate) use state::{Request, Wanted};
use state::{State, Written};
use tiering::{Decision, Tiering};

/// So often a store waits for queued writes to give their pages back: what it evicts on its way is
/// queued too.
const WAYS: usize = 4;

/// Keyed, sealed objects in RAM and, if configured, on a disk, each under a cap. Cheap to clone:
/// clones share everything. Dropping the last clone closes the disk tier.
///
/// Make one and put both front doors over it, or let each door make its own.
#[derive(Clone)]
pub struct Store {
    shared: Arc<Shared>,
    /// Not part of `shared`, which pins keep alive: with the last clone it closes.
    tiering: Option<Arc<Tiering>>,
}

/// What all clones, pins and pending objects share.
pub(crate) struct Shared {
    state: Mutex<State>,
    arena: Arena,
    clock: Arc<dyn Clock>,
    default_ttl: Option<Duration>,
    recorder: Option<Arc<TraceRecorder>>,
    /// The one that may use it.
    process: Process,
    given_back: GiveBack,
}

/// What was taken out of the cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Removed {
    /// Entries that can no longer be found.
    pub entries: u64,
    /// Their bytes, in whole pages. Pinned ones are freed when the last pin is dropped.
    pub bytes: u64,
}

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
    /// Those that are only in a slower tier, and were not given.
    pub(crate) below: usize,
    /// Why the rest was not admitted; positions stand for tokens.
    pub(crate) rejection: Option<Rejection>,
}

/// What a lookup may find, tier by tier, and what of it is worth loading.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Found {
    /// In RAM, from the first key on.
    pub(crate) ram: usize,
    /// Behind those, worth loading: from the disk, or in RAM behind such.
    pub(crate) load: usize,
    /// Behind those, not worth it.
    pub(crate) not_worth: usize,
    /// How long loading takes.
    pub(crate) load_time: Duration,
}

/// What happens to an object that is already there under the same key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnPresent {
    /// The new one takes its place.
    Replace,
    /// It stays; equal keys mean equal bytes.
    Keep,
}

impl Shared {
    /// # Errors
    /// [`Error::Forked`] in a child of the process that made it.
    fn check(&self) -> Result<()> {
        if self.process.is_current() { Ok(()) } else { Err(Error::Forked) }
    }
}

impl Store {
    /// Opens a store. Address space is reserved now, memory is committed as it is used. A disk
    /// tier is read as far as it takes to know what is there.
    ///
    /// # Errors
    /// [`Error::Config`] for a capacity below one page (4 KiB) or beyond 16 TiB, or a disk
    /// tier below 1 MiB; [`Error::Memory`] if it cannot be reserved; [`Error::Disk`],
    /// [`Error::DiskLocked`], [`Error::DiskRefused`] if the disk tier cannot be opened.
    pub fn new(config: CacheConfig) -> Result<Self> {
        let (arena, pages) = ram::reserve(config.capacity_bytes)?;
        let shared = Arc::new(Shared {
            state: Mutex::new(State::new(pages, config.policy, &config.quotas)),
            arena,
            clock: config.clock,
            default_ttl: config.ttl,
            recorder: config.recorder,
            process: Process::current(),
            given_back: GiveBack::default(),
        });
        let tiering = config.disk.map(|disk| Tiering::open(&disk, config.capacity_bytes, &shared).map(Arc::new));
        Ok(Self { tiering: tiering.transpose()?, shared })
    }

    /// This store, in the process that made it.
    ///
    /// # Errors
    /// [`Error::Forked`] in a child: see [`Process`].
    pub(crate) fn here(&self) -> Result<&Self> {
        self.shared.check().map(|()| self)
    }

    /// Counters and sizes as of now; all zero in a child of the process that made it. Sweeps what has expired first.
    #[must_use]
    pub fn stats(&self) -> Stats {
        if self.here().is_err() {
            return Stats::default();
        }
        let now_ms = self.now_ms();
        let stats = {
            let mut state = self.shared.state.lock();
            state.sweep(now_ms);
            state.stats()
        };
        let disk = self.tiering.as_ref().map(|tiering| tiering.stats());
        Stats { disk, ..stats }
    }

    /// What each namespace takes of RAM and disk now, ordered by id. Counted as entries come and
    /// go, so it costs no more than there are namespaces.
    #[must_use]
    pub fn usage(&self) -> Vec<NamespaceUsage> {
        if self.here().is_err() {
            return Vec::new();
        }
        let mut usage = BTreeMap::new();
        for (id, entries, bytes) in self.shared.state.lock().index().namespaces().usage() {
            let of = usage.entry(id).or_insert_with(|| NamespaceUsage::none(id));
            (of.ram_entries, of.ram_bytes) = (entries, bytes);
        }
        for (id, entries, bytes) in self.tiering.iter().flat_map(|tiering| tiering.disk().usage()) {
            let of = usage.entry(id).or_insert_with(|| NamespaceUsage::none(id));
            (of.disk_entries, of.disk_bytes) = (entries, bytes);
        }
        usage.into_values().collect()
    }

    /// Makes everything stored so far durable: after a crash it is there, unless it was
    /// evicted, removed, or expired meanwhile.
    ///
    /// # Errors
    /// [`Error::NoDisk`] without a disk tier, [`Error::Disk`] if it fails: then some of it may
    /// be lost in a crash; [`Error::Forked`] in a child of the process that made it.
    pub fn flush(&self) -> Result<()> {
        self.here()?.tiering.as_ref().ok_or(Error::NoDisk)?.flush()
    }

    /// Flushes a disk tier and ends the use of this clone; the last one to go leaves a clean
    /// directory, for this or another process to open. Dropping does the same, and can only log
    /// what goes wrong.
    ///
    /// # Errors
    /// [`Error::Disk`] if it fails: then some of what was stored may not be on the disk; [`Error::Forked`] in a
    /// child of the process that made it, where nothing happens to it.
    pub fn close(self) -> Result<()> {
        match &self.here()?.tiering {
            Some(tiering) => tiering.flush(),
            None => Ok(()),
        }
    }

    /// Removes everything, and gives the memory back to the system. What is pinned can no longer be found and is
    /// freed with its last pin.
    pub fn clear(&self) -> Removed {
        if self.here().is_err() {
            return Removed::default();
        }
        let removed = self.change(
            |_, _| true,
            |state, disk| {
                let (removed, below) = (state.remove_where(|_| true), disk.map_or(0, |disk| disk.clear(None)));
                Removed { entries: removed.entries.max(below), ..removed }
            },
        );
        self.shared.give_back();
        removed
    }

    /// Drops everything whose TTL has run out and says how many entries of the RAM tier that
    /// were. Stores and [`Store::stats`] do it by themselves; a quiet cache may want a timer.
    pub fn sweep(&self) -> u64 {
        if self.here().is_err() {
            return 0;
        }
        let now_ms = self.now_ms();
        if let Some(tiering) = &self.tiering {
            tiering.disk().sweep();
        }
        self.shared.state.lock().sweep(now_ms)
    }

    /// Removes all entries of one namespace.
    pub(crate) fn clear_namespace(&self, id: NamespaceId) -> Removed {
        if self.here().is_err() {
            return Removed::default();
        }
        let removed = self.change(
            |_, namespace| namespace == id,
            |state, disk| {
                let removed = match state.index().namespaces().known(id) {
                    Some(number) => state.remove_where(|entry| entry.namespace == number),
                    None => Removed::default(),
                };
                let below = disk.map_or(0, |disk| disk.clear(Some(id)));
                Removed { entries: removed.entries.max(below), ..removed }
            },
        );
        self.shared.give_back();
        removed
    }

    /// Removes these keys; says for each whether it was there.
    pub(crate) fn remove(&self, keys: &[ObjectKey]) -> (Removed, Vec<bool>) {
        let now_ms = self.now_ms();
        self.change(
            |key, _| keys.contains(key),
            |state, disk| {
                let (mut removed, mut found) = state.remove(keys, now_ms);
                if let Some(disk) = disk {
                    found.iter_mut().zip(disk.remove(keys)).for_each(|(found, below)| *found |= below);
                    removed.entries = found.iter().filter(|found| **found).count() as u64;
                }
                (removed, found)
            },
        )
    }

    /// Remembers what the blocks of a namespace look like: their headers on the disk say so.
    pub(crate) fn describe(&self, namespace: &Namespace) {
        if let Some(tiering) = &self.tiering {
            tiering.describe(namespace);
        }
    }

    /// Pins the longest run of objects from the first key on; what is on the disk and worth
    /// it is loaded first. Says which positions were not in RAM, or in RAM behind such.
    pub(crate) fn pin_run(&self, keys: &[ObjectKey], request: Request) -> (Pin, Range<usize>) {
        let now_ms = self.now_ms();
        let Some(tiering) = &self.tiering else {
            let held = self.shared.state.lock().hold_run(keys, now_ms, request);
            return (Pin::new(Arc::clone(&self.shared), held), 0..0);
        };
        let held = self.shared.state.lock().hold_run(keys, now_ms, Request::Uncounted);
        let mut pin = Pin::new(Arc::clone(&self.shared), held);
        let first = pin.len();
        let rest = keys.get(first..).unwrap_or_default();
        let Decision { load, not_worth } = self.decide(tiering, rest);
        if load > 0 {
            let wanted = rest.get(..load).unwrap_or_default();
            let loaded = tiering.load(keys, first..first + load);
            let more = self.shared.state.lock().hold_run(wanted, now_ms, Request::Uncounted);
            drop(loaded);
            pin.extend(more);
        }
        if let Request::Tokens { block_tokens, .. } = request {
            tiering.count_not_worth(not_worth * block_tokens);
        }
        self.count(&pin, request);
        let loaded = first..pin.len();
        (pin, loaded)
    }

    /// Begins to load what of these keys is on the disk, and does not wait for it; says how
    /// many are under way.
    pub(crate) fn prefetch(&self, keys: &[ObjectKey]) -> usize {
        let Some(tiering) = &self.tiering else { return 0 };
        let first = self.shared.state.lock().resident(keys).iter().take_while(|resident| **resident).count();
        let rest = keys.get(first..).unwrap_or_default();
        let load = self.decide(tiering, rest).load;
        tiering.start_loads(keys, first..first + load).len()
    }

    /// Hands these bytes of the objects under these keys to `each`, in order: from RAM, behind
    /// that straight from the disk, without bringing them into RAM. Says how many there were.
    pub(crate) fn read_parts(
        &self,
        keys: &[ObjectKey],
        range: &Range<usize>,
        mut each: impl FnMut(usize, &[u8]),
    ) -> usize {
        let now_ms = self.now_ms();
        let held = self.shared.state.lock().hold_run(keys, now_ms, Request::Uncounted);
        let pin = Pin::new(Arc::clone(&self.shared), held);
        let first = pin.len();
        for position in 0..first {
            each(position, pin.bytes(position).get(range.clone()).unwrap_or_default());
        }
        let Some(tiering) = &self.tiering else { return first };
        let rest = keys.get(first..).unwrap_or_default();
        first + tiering.read_parts(rest, range, |position, bytes| each(first + position, bytes))
    }

    /// What a lookup of these keys would find, without loading anything.
    pub(crate) fn look(&self, keys: &[ObjectKey]) -> Found {
        let ram = self.shared.state.lock().resident(keys).iter().take_while(|resident| **resident).count();
        let Some(tiering) = &self.tiering else { return Found { ram, ..Found::default() } };
        let rest = keys.get(ram..).unwrap_or_default();
        let Decision { load, not_worth } = self.decide(tiering, rest);
        let load_time = tiering.load_time(rest.get(..load).unwrap_or_default());
        Found { ram, load, not_worth, load_time }
    }

    /// Pins all of these objects or none; loads what is on the disk, if that is worth it.
    pub(crate) fn pin_all(&self, keys: &[ObjectKey], request: Request) -> Option<Pin> {
        let now_ms = self.now_ms();
        let Some(tiering) = &self.tiering else {
            let held = self.shared.state.lock().hold_all(keys, now_ms, request)?;
            return Some(Pin::new(Arc::clone(&self.shared), held));
        };
        let held = self.shared.state.lock().hold_all(keys, now_ms, Request::Uncounted);
        let held = held.or_else(|| {
            // All or nothing: a part is not worth anything.
            if self.decide(tiering, keys).load < keys.len() {
                return None;
            }
            let _loaded = tiering.load(keys, 0..keys.len());
            self.shared.state.lock().hold_all(keys, now_ms, Request::Uncounted)
        });
        let pin = Pin::new(Arc::clone(&self.shared), held.unwrap_or_default());
        self.count(&pin, request);
        (pin.len() > 0).then_some(pin)
    }

    pub(crate) fn prefix_lengths(&self, id: NamespaceId, max_bytes: usize) -> Vec<usize> {
        let mut lengths = self.shared.state.lock().index().namespaces().prefix_lengths(id, max_bytes);
        if let Some(tiering) = &self.tiering {
            lengths.extend(tiering.disk().prefix_lengths(id, max_bytes));
            lengths.sort_unstable();
            lengths.dedup();
        }
        lengths
    }

    /// Layers of a named cache: one more than the highest one stored.
    pub(crate) fn layers(&self, id: NamespaceId) -> u32 {
        // In this order: meanwhile something may go down, and is then found there.
        let here = self.shared.state.lock().index().namespaces().layers(id);
        self.tiering.as_ref().map_or(here, |tiering| here.max(tiering.disk().layers(id)))
    }

    /// The length that goes with the first of these prefixes of which any layer is there.
    pub(crate) fn first_stored(&self, id: NamespaceId, prefixes: &[(usize, PrefixHash)]) -> Option<usize> {
        let now_ms = self.now_ms();
        let layers = self.layers(id);
        let mut state = self.shared.state.lock();
        let below = |key: &ObjectKey| self.tiering.as_ref().is_some_and(|tiering| tiering.disk().holds(key));
        let mut stored = |prefix: &PrefixHash| {
            (0..layers).map(|layer| prefix.key(layer)).any(|key| state.find_live(&key, now_ms).is_some() || below(&key))
        };
        prefixes.iter().find(|(_, prefix)| stored(prefix)).map(|(length, _)| *length)
    }

    /// Counts a pin as a request after the fact.
    pub(crate) fn count(&self, pin: &Pin, request: Request) {
        self.shared.state.lock().count(request, pin.held());
    }

    /// Pages for each of `sizes_bytes`, all or nothing.
    pub(crate) fn reserve_all(&self, namespace: NamespaceId, sizes_bytes: &[usize]) -> Result<Vec<Pending>, Rejection> {
        let now_ms = self.now_ms();
        let gave_back = self.shared.given_back.times();
        let mut reserved = self.shared.state.lock().reserve_all(namespace, sizes_bytes, now_ms);
        for _ in 0..WAYS {
            if !matches!(reserved, Err(Rejection::AllPinned { .. })) || !self.make_way(gave_back) {
                break;
            }
            reserved = self.shared.state.lock().reserve_all(namespace, sizes_bytes, now_ms);
        }
        let extents = reserved.inspect_err(|_| self.shared.state.lock().count_rejection())?;
        Ok(extents.into_iter().map(|extent| Pending::new(Arc::clone(&self.shared), extent)).collect())
    }

    /// Pins what is there of a chain and makes room for the rest, head first. What is
    /// missing before the first position given cannot be written and ends it.
    pub(crate) fn reserve(&self, namespace: NamespaceId, keys: &[ObjectKey], wanted: Wanted) -> Reserved {
        let gave_back = self.shared.given_back.times();
        let mut reserved = self.try_reserve(namespace, keys, wanted);
        for _ in 0..WAYS {
            if !matches!(reserved.rejection, Some(Rejection::AllPinned { .. })) || !self.make_way(gave_back) {
                break;
            }
            drop(reserved);
            reserved = self.try_reserve(namespace, keys, wanted);
        }
        if reserved.rejection.is_some() {
            self.shared.state.lock().count_rejection();
        }
        reserved
    }

    fn try_reserve(&self, namespace: NamespaceId, keys: &[ObjectKey], wanted: Wanted) -> Reserved {
        let now_ms = self.now_ms();
        let (present, missing, rejection) = self.shared.state.lock().reserve(namespace, keys, wanted, now_ms);
        let pending = |(position, extent)| (position, Pending::new(Arc::clone(&self.shared), extent));
        let below = match &rejection {
            None => keys.len() - present.len() - missing.len(),
            Some(_) => 0,
        };
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
        let now_ms = self.now_ms();
        let expires_at_ms =
            options.ttl.or(self.shared.default_ttl).map_or(NEVER, |ttl| now_ms.saturating_add(duration_ms(ttl)));
        let share = options
            .compute_time
            .map_or(Duration::ZERO, |time| time / u32::try_from(objects.len()).unwrap_or(u32::MAX).max(1));
        let compute_us = u32::try_from(share.as_micros()).unwrap_or(u32::MAX);
        objects.iter_mut().for_each(|object| object.pending.clear_from(object.bytes));
        let keys: Vec<ObjectKey> = objects.iter().map(|object| object.key).collect();
        let through = self.tiering.as_ref().is_some_and(|tiering| tiering.policy == WritePolicy::Through);
        let replaced = |key: &ObjectKey, _| on_present == OnPresent::Replace && keys.contains(key);
        self.change(replaced, |state, disk| {
            if let Some(disk) = disk.filter(|_| on_present == OnPresent::Replace) {
                disk.hide(&keys);
            }
            let written = objects.into_iter().filter_map(|Sealing { key, pending, bytes, spec, parent, place }| {
                let entry = state::new_entry(key, pending.into_extent()?, bytes, expires_at_ms, spec, compute_us);
                Some(Written { entry, parent, place })
            });
            let sealed = state.seal_all(namespace, written, on_present, options.priority);
            if through {
                state.demote_run(&keys);
            }
            sealed
        })
    }

    /// Changes RAM and disk together, while nothing of what `gone` names can come up from the disk.
    fn change<T>(
        &self,
        gone: impl Fn(&ObjectKey, NamespaceId) -> bool,
        change: impl FnOnce(&mut State, Option<&Disk>) -> T,
    ) -> T {
        match &self.tiering {
            Some(tiering) => {
                tiering.loads().without(gone, || change(&mut self.shared.state.lock(), Some(tiering.disk())))
            }
            None => change(&mut self.shared.state.lock(), None),
        }
    }

    fn decide(&self, tiering: &Tiering, keys: &[ObjectKey]) -> Decision {
        if keys.is_empty() {
            return Decision::default();
        }
        tiering.decide(keys, |key| self.shared.state.lock().compute_us(key))
    }

    /// Writes a request of the token door to the trace, if there is one.
    pub(crate) fn record(&self, tokens: usize, keys: &[ObjectKey]) {
        if let Some(recorder) = &self.shared.recorder {
            recorder.request(self.now_ms(), tokens, keys.iter().map(ObjectKey::table_hash));
        }
    }

    /// Queued writes pin pages that are needed now, and so does giving memory back, if any has been under way since
    /// it was done so many times.
    fn make_way(&self, gave_back: u64) -> bool {
        let gave_back = self.shared.given_back.wait_since(gave_back);
        self.tiering.as_ref().is_some_and(|tiering| tiering.make_way()) || gave_back
    }

    fn now_ms(&self) -> u64 {
        self.shared.clock.now_ms()
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Store").field(&self.stats()).finish()
    }
}
