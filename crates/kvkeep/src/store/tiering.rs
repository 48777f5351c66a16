//! RAM and disk together: what goes down, what comes up, and whether that is worth it.
//!
//! - Demotion: what is stored is queued for the disk at once (write-through) or when it is
//!   evicted (write-back), under the store's lock, so that a removal cannot slip in between. Queued
//!   pages are pinned; a store that needs them makes the queue give them up.
//! - Promotion: a lookup that goes on behind what is in RAM has the rest read into pending
//!   pages by other threads, and waits for it with a limit. Of those that want the same
//!   record at the same time one reads.
//! - Worth it: a block says how long it took to compute, the meter how long it takes to load;
//!   a run is loaded as far as that saves time.
//!
//! Lock order: loads, then the store's state, then the disk's. None is held across I/O.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::Shared;
use super::gate::Gate;
use super::guard::{Pending, Pin};
use super::readers::{Answer, Readers};
use super::state::{self, Below, Held, Object, Written};
use crate::config::{DiskConfig, WritePolicy};
use crate::error::Result;
use crate::eviction::Place;
use crate::key::{Namespace, NamespaceId, ObjectKey};
use crate::layout::KvLayout;
use crate::stats::DiskStats;
use crate::sync::{Condvar, Mutex};
use crate::tier::disk::{Content, Disk, Found, Kind, Options, Pages, Payload, RecordHeader, RecordMeta};
use crate::tier::ram::PAGE_BYTES;

/// What waits to be written is at most this part of RAM.
const QUEUE_DIVISOR: u64 = 8;
/// What is written at once is at most this part of RAM: it cannot be given up.
const AT_ONCE_DIVISOR: u64 = 16;
/// More at once makes a disk no faster.
const MAX_AT_ONCE_BYTES: u64 = 8 << 20;
/// Parts of payloads under way at a time.
const READS_AT_ONCE: usize = 8;
/// More namespaces than this are not remembered by name.
const MAX_MODELS: usize = 4096;
/// Of runs that are not worth loading, each so many-th is begun, to measure again.
const PROBE_EVERY: u64 = 16;

/// The disk tier and what connects it with RAM.
pub(super) struct Tiering {
    disk: Arc<Disk>,
    shared: Arc<Shared>,
    readers: Readers,
    read_timeout: Duration,
    pub(super) policy: WritePolicy,
    models: Arc<Models>,
    loads: Arc<Loads>,
    meter: Arc<Meter>,
    skipped: AtomicU64,
}

/// What the layout and the model of a namespace are, for the headers of its blocks.
type Models = Mutex<HashMap<NamespaceId, (KvLayout, String)>>;

/// Records under way from the disk. Comes before the store's lock.
#[derive(Default)]
pub(super) struct Loads {
    flying: Mutex<HashMap<ObjectKey, Arc<Load>>>,
    /// Readers that have said that a record has come, and may still hold it. Held together with no other lock.
    landing: Mutex<usize>,
    let_go: Condvar,
}

/// A reader that lets something land, until it holds nothing of it any more.
struct Landing(Arc<Loads>);

/// One record under way.
pub(super) struct Load {
    namespace: NamespaceId,
    /// The keys before and behind it in the request; for a block, those of its parent and a child.
    before: Option<ObjectKey>,
    behind: Option<ObjectKey>,
    place: Place,
    state: Mutex<LoadState>,
    landed: Condvar,
}

enum LoadState {
    Flying {
        /// It was removed or replaced meanwhile.
        cancelled: bool,
        /// Somebody ran out of time over it.
        overdue: bool,
    },
    /// It is in RAM, and stays there while somebody who waited for it looks.
    Landed(Pin),
    Failed,
}

/// How fast loads have been.
#[derive(Debug, Default)]
struct Meter(Mutex<(f64, f64)>);

/// What to load of a run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Decision {
    /// Keys from the first on.
    pub(super) load: usize,
    /// Keys behind them that are there, but not worth it.
    pub(super) not_worth: usize,
}

/// A queued write: the pages it reads are pinned.
struct Queued(Pin);

impl Payload for Queued {
    fn bytes(&self) -> &[u8] {
        self.0.bytes(0)
    }
}

/// Takes what RAM evicts.
struct Demoter {
    disk: Arc<Disk>,
    models: Arc<Models>,
    /// Weak: the state that owns this is part of it.
    shared: Weak<Shared>,
}

impl Tiering {
    pub(super) fn open(config: &DiskConfig, capacity_bytes: u64, shared: &Arc<Shared>) -> Result<Self> {
        let options = Options {
            dir: &config.dir,
            capacity_bytes: config.capacity_bytes,
            key_file: config.key_file.as_deref(),
            queue_bytes: config.queue_bytes.unwrap_or(capacity_bytes / QUEUE_DIVISOR),
            at_once_bytes: at_once_bytes(capacity_bytes),
            flush_timeout: config.flush_timeout,
        };
        config.admission.check()?;
        let disk = Disk::open(&options, Arc::clone(&shared.clock))?;
        Ok(Self::over(disk, config, shared))
    }

    pub(super) fn over(disk: Disk, config: &DiskConfig, shared: &Arc<Shared>) -> Self {
        let (disk, models) = (Arc::new(disk), Arc::<Models>::default());
        let weak = Arc::downgrade(shared);
        disk.set_resident(Box::new(move |keys| {
            let shared = weak.upgrade();
            shared.map_or_else(|| vec![false; keys.len()], |shared| shared.state.lock().resident(keys))
        }));
        let demoter = Demoter { disk: Arc::clone(&disk), models: Arc::clone(&models), shared: Arc::downgrade(shared) };
        let gate = Gate::new(config.admission, config.write_policy);
        shared.state.lock().set_below(Arc::new(demoter), gate);
        Self {
            disk,
            shared: Arc::clone(shared),
            readers: Readers::start(),
            read_timeout: config.read_timeout,
            policy: config.write_policy,
            models,
            loads: Arc::default(),
            meter: Arc::default(),
            skipped: AtomicU64::new(0),
        }
    }

    pub(super) fn stats(&self) -> DiskStats {
        let not_admitted_total = self.shared.state.lock().kept_off();
        DiskStats { load_bytes_per_s: self.load_bytes_per_s(), not_admitted_total, ..self.disk.stats() }
    }

    pub(super) fn disk(&self) -> &Disk {
        &self.disk
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

    /// Of keys behind those in RAM: how many are worth loading. `known` says of a key in RAM how
    /// long it took to compute.
    pub(super) fn decide(&self, keys: &[ObjectKey], known: impl Fn(&ObjectKey) -> Option<u32>) -> Decision {
        let (mut saved_us, mut best_us, mut decision) = (0i128, 0i128, Decision::default());
        let mut on_disk = 0usize;
        for (position, key) in keys.iter().enumerate() {
            let in_ram = known(key);
            if let Some(compute_us) = in_ram {
                saved_us += i128::from(compute_us);
            } else if let Some(found) = self.disk.find(key) {
                on_disk += 1;
                let load_us = self.meter.estimate_us(u64::from(found.slot.payload_pages) * PAGE_BYTES as u64);
                // Where nobody said what computing costs, loading is worth it.
                let compute_us = if found.slot.compute_us == 0 { load_us + 1 } else { found.slot.compute_us.into() };
                saved_us += i128::from(compute_us) - i128::from(load_us);
            } else {
                break;
            }
            decision.not_worth = position + 1;
            // What is in RAM costs nothing: it goes with what is before it, or has just come there.
            if saved_us > best_us || (in_ram.is_some() && decision.load == position) {
                (best_us, decision.load) = (saved_us, position + 1);
            }
        }
        decision.not_worth -= decision.load;
        let skips = on_disk > 0 && decision.load == 0;
        if skips && self.skipped.fetch_add(1, Ordering::Relaxed) % PROBE_EVERY == PROBE_EVERY - 1 {
            decision = Decision { load: 1, not_worth: decision.not_worth - 1 };
        }
        decision
    }

    /// Begins to load those of a request's keys that are wanted, on the disk and not in RAM, as
    /// far as there is room.
    pub(super) fn start_loads(&self, keys: &[ObjectKey], wanted: Range<usize>) -> Vec<Arc<Load>> {
        let shared = &self.shared;
        let mut loads = Vec::new();
        for (position, key) in keys.iter().enumerate().take(wanted.end).skip(wanted.start) {
            let (load, found) = {
                // What is found under this lock is cancelled by every removal that comes after.
                let mut flying = self.loads.flying.lock();
                if let Some(load) = flying.get(key) {
                    loads.push(Arc::clone(load));
                    continue;
                }
                let Some(found) = self.disk.find(key) else { continue };
                if shared.state.lock().resident(std::slice::from_ref(key)) == [true] {
                    continue;
                }
                let load = Arc::new(Load::new(found.namespace, keys, position));
                flying.insert(*key, Arc::clone(&load));
                (load, found)
            };
            let bytes = found.slot.payload_pages as usize * PAGE_BYTES;
            let now_ms = shared.clock.now_ms();
            let extent = shared.state.lock().reserve_one(found.namespace, bytes, now_ms);
            match extent {
                Ok(extent) => self.submit(*key, found, Pending::new(Arc::clone(shared), extent), &load),
                Err(_) => {
                    self.loads.land(key, &load, LoadState::Failed);
                    break;
                }
            }
            loads.push(load);
        }
        loads
    }

    fn submit(&self, key: ObjectKey, found: Found, mut pending: Pending, load: &Arc<Load>) {
        let (disk, loads, models) = (Arc::clone(&self.disk), Arc::clone(&self.loads), Arc::clone(&self.models));
        let (load, shared) = (Arc::clone(load), Arc::clone(&self.shared));
        self.readers.submit(Box::new(move || {
            let mut header = disk.read(&key, &found, pending.bytes_mut());
            // The index knows better than the record, which may be from under a wrong clock.
            header.iter_mut().for_each(|header| header.meta.expires_at_ms = found.slot.expires_at_ms);
            // In this order: the load, and the pages that it pins, are let go of first.
            let landing = Landing::new(&loads);
            let load = load;
            if header.is_some() {
                shared.state.lock().read_below(found.slot.mark);
            }
            let overdue = loads.finish(&key, &load, header, pending, &shared, &models);
            drop(load);
            drop(landing);
            if overdue {
                disk.read_returns();
            }
        }));
    }

    /// Waits until these have come, failed, or taken too long. What has landed stays in RAM
    /// while the loads are kept.
    fn wait(&self, loads: &[Arc<Load>], begin_us: u64) {
        let mut bytes = 0;
        for load in loads {
            match load.wait(self.read_timeout) {
                Waited::Landed(payload_bytes) => bytes += payload_bytes,
                Waited::Failed => {}
                Waited::TooLong => {
                    self.disk.read_hangs();
                    return;
                }
            }
        }
        if bytes > 0 {
            self.meter.measured(bytes, self.shared.clock.now_us().saturating_sub(begin_us));
        }
    }

    /// Counts what was there and not worth loading.
    pub(super) fn count_not_worth(&self, tokens: usize) {
        if tokens > 0 {
            self.disk.count_not_worth(tokens as u64);
        }
    }

    /// Bytes a second of loads so far; 0 before the first.
    fn load_bytes_per_s(&self) -> u64 {
        let (bytes, us) = *self.meter.0.lock();
        if us > 0.0 { to_u64(bytes * 1e6 / us) } else { 0 }
    }

    /// How long it takes to load those of these keys that are on the disk.
    pub(super) fn load_time(&self, keys: &[ObjectKey]) -> Duration {
        let pages = keys.iter().filter_map(|key| self.disk.find(key)).map(|found| u64::from(found.slot.payload_pages));
        Duration::from_micros(self.meter.estimate_us(pages.sum::<u64>() * PAGE_BYTES as u64))
    }

    /// Nothing under way of these keys may land any more. Held by the caller until it has
    /// changed RAM and disk.
    pub(super) fn loads(&self) -> &Loads {
        &self.loads
    }

    /// Loads those of a request's keys that are wanted and on the disk, and waits for them. What is
    /// in RAM stays there meanwhile; what comes stays while the answer is kept.
    pub(super) fn load(&self, keys: &[ObjectKey], wanted: Range<usize>) -> (Pin, Vec<Arc<Load>>) {
        let now_ms = self.shared.clock.now_ms();
        let held = self.shared.state.lock().hold_each(keys.get(wanted.clone()).unwrap_or_default(), now_ms);
        let kept = Pin::new(Arc::clone(&self.shared), held);
        let begin_us = self.shared.clock.now_us();
        let loads = self.start_loads(keys, wanted);
        self.wait(&loads, begin_us);
        (kept, loads)
    }

    /// Hands these bytes of the payloads of these keys to `each`, in order, straight from the disk,
    /// until one is not there; says how many there were.
    pub(super) fn read_parts(
        &self,
        keys: &[ObjectKey],
        range: &Range<usize>,
        mut each: impl FnMut(usize, &[u8]),
    ) -> usize {
        let mut done = 0;
        for window in keys.chunks(READS_AT_ONCE) {
            let reads: Vec<Answer<_>> = window.iter().map_while(|key| self.read_part(*key, range)).collect();
            for read in &reads {
                let Some(part) = read.wait(self.read_timeout) else {
                    self.disk.read_hangs();
                    return done;
                };
                let Some((pages, at)) = part else { return done };
                each(done, pages.bytes().get(at..at + range.len()).unwrap_or_default());
                done += 1;
            }
            if reads.len() < window.len() {
                break;
            }
        }
        done
    }

    fn read_part(&self, key: ObjectKey, range: &Range<usize>) -> Option<Answer<Option<(Pages, usize)>>> {
        let found = self.disk.find(&key)?;
        let (disk, range) = (Arc::clone(&self.disk), range.clone());
        let late = Arc::clone(&self.disk);
        let shared = Arc::clone(&self.shared);
        let read = move || {
            let (_, pages, at) = disk.read_range(&key, &found, &range)?;
            shared.state.lock().read_below(found.slot.mark);
            Some((pages, at))
        };
        Some(self.readers.ask(read, move || late.read_returns()))
    }

    /// Makes everything durable that is in RAM or was queued, and may be on the disk.
    pub(super) fn flush(&self) -> Result<()> {
        let keys = self.shared.state.lock().all_keys();
        for key in &keys {
            self.disk.wait_for_queue()?;
            self.shared.state.lock().demote(key, true);
        }
        self.disk.flush()
    }

    /// Gives up what is queued, and waits for what is being written and for readers that hold what has come: pages are
    /// needed. Says whether that may have helped, as it may if all was written since they were missing.
    pub(super) fn make_way(&self) -> bool {
        self.loads.wait_until_let_go();
        let cancelled = self.disk.cancel_writes() > 0;
        self.disk.wait_for_writer(self.read_timeout) || cancelled
    }
}

impl Drop for Tiering {
    /// What is in RAM is written first: after a restart the cache is as warm as it was. A disk
    /// that hangs is left to itself.
    fn drop(&mut self) {
        // A child has none of the threads, and the directory is its parent's.
        if !self.shared.process.is_current() {
            return;
        }
        let (flushed, closed) = (self.flush(), self.disk.close());
        if let Err(error) = flushed.and(closed) {
            tracing::warn!(%error, "the disk tier was not closed cleanly");
        }
        self.readers.close(!self.disk.hangs());
    }
}

impl fmt::Debug for Tiering {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tiering").field("disk", &self.disk).finish_non_exhaustive()
    }
}

impl fmt::Debug for Demoter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Demoter")
    }
}

impl Below for Demoter {
    fn holds(&self, key: &ObjectKey) -> bool {
        self.disk.holds(key)
    }

    fn demote(&self, object: &Object, held: Held, wait: bool) -> Result<(), Held> {
        let (Some(shared), Some(content)) = (self.shared.upgrade(), self.content(object)) else { return Err(held) };
        let meta = RecordMeta {
            kind: if object.spec.is_some() { Kind::Named } else { Kind::Block },
            key: object.key,
            namespace: object.namespace,
            payload_bytes: object.bytes,
            stored_at_ms: shared.clock.now_ms(),
            expires_at_ms: object.expires_at_ms,
            compute_us: object.compute_us,
            prefix_bytes: object.spec.as_ref().map_or(0, |spec| u32::try_from(spec.prefix_bytes).unwrap_or(u32::MAX)),
        };
        let mut held = Some(held);
        self.disk.write(meta, content, object.kind, wait, || {
            let held = held.take().into_iter().collect();
            Arc::new(Queued(Pin::new(shared, held)))
        });
        held.map_or(Ok(()), Err)
    }
}

impl Demoter {
    fn content(&self, object: &Object) -> Option<Content> {
        match &object.spec {
            Some(spec) => Some(Content::Named(**spec)),
            None => {
                let (layout, model) = self.models.lock().get(&object.namespace).cloned()?;
                Some(Content::Block { layout, model })
            }
        }
    }
}

impl Loads {
    /// Runs `change` while nothing can land, after what `gone` names will not land any more.
    pub(super) fn without<T>(&self, gone: impl Fn(&ObjectKey, NamespaceId) -> bool, change: impl FnOnce() -> T) -> T {
        let flying = self.flying.lock();
        for (key, load) in flying.iter() {
            if gone(key, load.namespace) {
                load.cancel();
            }
        }
        change()
    }

    /// Seals what was read, if it is still wanted. Says whether somebody ran out of time over it.
    fn finish(
        &self,
        key: &ObjectKey,
        load: &Arc<Load>,
        header: Option<RecordHeader>,
        pending: Pending,
        shared: &Arc<Shared>,
        models: &Models,
    ) -> bool {
        let mut flying = self.flying.lock();
        flying.remove(key);
        let (cancelled, overdue) = load.flags();
        let landed = header.filter(|_| !cancelled).and_then(|header| load.seal(header, pending, shared, models));
        drop(flying);
        load.land(landed.map_or(LoadState::Failed, LoadState::Landed));
        overdue
    }

    /// Nothing is read or written meanwhile.
    fn wait_until_let_go(&self) {
        let mut landing = self.landing.lock();
        while *landing > 0 {
            landing = self.let_go.wait(landing);
        }
    }

    fn land(&self, key: &ObjectKey, load: &Load, state: LoadState) {
        self.flying.lock().remove(key);
        load.land(state);
    }
}

impl Landing {
    fn new(loads: &Arc<Loads>) -> Self {
        *loads.landing.lock() += 1;
        Self(Arc::clone(loads))
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        *self.0.landing.lock() -= 1;
        self.0.let_go.notify_all();
    }
}

enum Waited {
    Landed(u64),
    Failed,
    TooLong,
}

impl Load {
    /// Of the key at `position` of a request.
    fn new(namespace: NamespaceId, keys: &[ObjectKey], position: usize) -> Self {
        let state = LoadState::Flying { cancelled: false, overdue: false };
        Self {
            namespace,
            before: position.checked_sub(1).and_then(|before| keys.get(before)).copied(),
            behind: keys.get(position + 1).copied(),
            place: Place::of(position, keys.len(), keys.len()),
            state: Mutex::new(state),
            landed: Condvar::default(),
        }
    }

    /// Makes a record that was read findable in RAM, and pins it.
    fn seal(&self, header: RecordHeader, pending: Pending, shared: &Arc<Shared>, models: &Models) -> Option<Pin> {
        let meta = header.meta;
        let (spec, parent, child) = match header.content {
            Content::Named(spec) => (Some(Arc::new(spec)), None, None),
            Content::Block { layout, model } => {
                models.lock().entry(meta.namespace).or_insert((layout, model));
                (None, self.before, self.behind)
            }
            Content::Nothing => return None,
        };
        let extent = pending.into_extent()?;
        let bytes = usize::try_from(meta.payload_bytes).unwrap_or(usize::MAX);
        let entry = state::new_entry(meta.key, extent, bytes, meta.expires_at_ms, spec, meta.compute_us);
        let now_ms = shared.clock.now_ms();
        let held = {
            let mut state = shared.state.lock();
            state.seal_promoted(meta.namespace, Written { entry, parent, place: self.place }, child.as_ref());
            state.hold_run(&[meta.key], now_ms, super::Request::Uncounted)
        };
        (!held.is_empty()).then(|| Pin::new(Arc::clone(shared), held))
    }

    fn wait(&self, at_most: Duration) -> Waited {
        let mut state = self.state.lock();
        loop {
            match &mut *state {
                LoadState::Landed(pin) => return Waited::Landed(pin.bytes(0).len() as u64),
                LoadState::Failed => return Waited::Failed,
                LoadState::Flying { .. } => {}
            }
            let (again, timed_out) = self.landed.wait_timeout(state, at_most);
            state = again;
            if let (LoadState::Flying { overdue, .. }, true) = (&mut *state, timed_out) {
                // Only one of those who wait says so: it comes back once.
                return if std::mem::replace(overdue, true) { Waited::Failed } else { Waited::TooLong };
            }
        }
    }

    fn cancel(&self) {
        if let LoadState::Flying { cancelled, .. } = &mut *self.state.lock() {
            *cancelled = true;
        }
    }

    fn flags(&self) -> (bool, bool) {
        match &*self.state.lock() {
            LoadState::Flying { cancelled, overdue } => (*cancelled, *overdue),
            LoadState::Landed(_) | LoadState::Failed => (true, false),
        }
    }

    fn land(&self, landed: LoadState) {
        *self.state.lock() = landed;
        self.landed.notify_all();
    }
}

impl Meter {
    /// Older measurements count a tenth less each time.
    const MEMORY: f64 = 0.9;

    fn measured(&self, bytes: u64, us: u64) {
        let mut sums = self.0.lock();
        sums.0 = sums.0 * Self::MEMORY + to_f64(bytes);
        sums.1 = sums.1 * Self::MEMORY + to_f64(us);
    }

    /// 0 before the first measurement: the first load is always worth it.
    fn estimate_us(&self, bytes: u64) -> u64 {
        let (sum_bytes, sum_us) = *self.0.lock();
        if sum_bytes > 0.0 { to_u64(to_f64(bytes) * sum_us / sum_bytes) } else { 0 }
    }
}

/// Payloads that the disk is given at once.
pub(super) fn at_once_bytes(capacity_bytes: u64) -> u64 {
    (capacity_bytes / AT_ONCE_DIVISOR).min(MAX_AT_ONCE_BYTES)
}

#[expect(clippy::cast_precision_loss, reason = "rates need no more than 52 bits")]
fn to_f64(value: u64) -> f64 {
    value as f64
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates, and is never negative")]
fn to_u64(value: f64) -> u64 {
    value as u64
}
