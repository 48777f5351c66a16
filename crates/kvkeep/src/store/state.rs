//! Everything under the store's lock: pure bookkeeping, no payload is touched here.
//!
//! Invariants:
//! - `pages.used_pages()` is the sum of the extents in the index (linked or not) and of
//!   the pending ones, so it is under the cap at every moment.
//! - `held_pages` is what cannot be evicted: pending extents and those being read. A queued
//!   write reads too, but does not keep its entry from being evicted; the pages are then
//!   free when it is written.
//! - An entry is in the policy's order exactly if it is linked and not pinned.

mod room;

use std::collections::HashMap;
use std::sync::Arc;

use super::gate::Gate;
use super::{OnPresent, Removed};
use crate::error::Rejection;
use crate::eviction::{Arrival, Departure, EntryId, Place, PolicyKind, Priority, ShareId, Shares};
use crate::index::{Entry, Index, NEVER};
use crate::key::{NamespaceId, ObjectKey};
use crate::stats::Stats;
use crate::tensor::PairSpec;
use crate::tier::ram::{Extent, PAGE_BYTES, Pages, ReadGrant, page_bytes};

/// What a lookup counts as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Request {
    /// A request by prefix text: a hit or a miss.
    Named,
    /// A request for so many tokens in blocks of so many: also counted in tokens.
    Tokens { requested: usize, block_tokens: usize },
    /// Not a request of a user: counts nothing.
    Uncounted,
}

/// One pinned object.
#[derive(Debug)]
pub(crate) struct Held {
    id: EntryId,
    /// Held for a queued write: no use, and no pin.
    queued: bool,
    pub(super) grant: ReadGrant,
    pub(super) spec: Option<Arc<PairSpec>>,
}

/// One object whose payload is written, to be made findable.
#[derive(Debug)]
pub(crate) struct Written {
    pub(crate) entry: Entry,
    /// The key of the block before it.
    pub(crate) parent: Option<ObjectKey>,
    pub(crate) place: Place,
}

/// What room is made for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    pub(crate) bytes_each: usize,
    /// The first position that can be written.
    pub(crate) first_given: usize,
    pub(crate) priority: Priority,
}

pub(crate) type Reservation = (Vec<Held>, Vec<(usize, Extent)>, Option<Rejection>);

#[derive(Debug)]
pub(crate) struct State {
    index: Index,
    policy: Shares,
    /// The shares of namespaces with a quota.
    quotas: HashMap<NamespaceId, ShareId>,
    pages: Pages,
    held_pages: u32,
    /// Nothing expires before this.
    earliest_expiry_ms: u64,
    last_sweep_ms: u64,
    counters: Stats,
    time_saved_us: u64,
    below: Option<Arc<dyn Below>>,
    /// `None` if everything may go there.
    gate: Option<Gate>,
}

/// What an evicted entry is offered to: a slower tier.
pub(super) trait Below: Send + Sync + std::fmt::Debug {
    /// Is it there, or on its way there?
    fn holds(&self, key: &ObjectKey) -> bool;
    /// Takes an entry, or gives it back: there is no room for it. With `wait` there is.
    fn demote(&self, object: &Object, held: Held, wait: bool) -> Result<(), Held>;
}

/// What a slower tier has to know of an entry.
#[derive(Debug)]
pub(super) struct Object {
    pub(super) key: ObjectKey,
    pub(super) namespace: NamespaceId,
    pub(super) bytes: u64,
    pub(super) expires_at_ms: u64,
    pub(super) compute_us: u32,
    pub(super) spec: Option<Arc<PairSpec>>,
    /// The kind it was admitted as.
    pub(super) kind: u8,
}

pub(crate) fn new_entry(
    key: ObjectKey,
    extent: Extent,
    bytes: usize,
    expires_at_ms: u64,
    spec: Option<Arc<PairSpec>>,
    compute_us: u32,
) -> Entry {
    let slack = (extent.pages() as usize * PAGE_BYTES).saturating_sub(bytes);
    let slack_bytes = u16::try_from(slack).unwrap_or(0);
    Entry { key, namespace: 0, extent, expires_at_ms, spec, compute_us, slack_bytes, queued: false, linked: true }
}

impl State {
    /// `quotas` are weights of namespaces; all others together have the weight 1.
    pub(crate) fn new(pages: Pages, policy: PolicyKind, quotas: &[(NamespaceId, f64)]) -> Self {
        let shares = Shares::new(policy, quotas.iter().map(|(_, weight)| *weight));
        Self {
            index: Index::default(),
            policy: shares,
            quotas: (1..).zip(quotas).map(|(share, (namespace, _))| (*namespace, share)).collect(),
            pages,
            held_pages: 0,
            earliest_expiry_ms: NEVER,
            last_sweep_ms: 0,
            counters: Stats::default(),
            time_saved_us: 0,
            below: None,
            gate: None,
        }
    }

    /// Evicted entries are offered to this tier from now on, if the gate lets them pass.
    pub(super) fn set_below(&mut self, below: Arc<dyn Below>, gate: Option<Gate>) {
        (self.below, self.gate) = (Some(below), gate);
    }

    /// What was written as this kind was read from the tier below.
    pub(super) fn read_below(&mut self, kind: u8) {
        if let Some(gate) = &mut self.gate {
            gate.read(kind);
        }
    }

    /// Entries that the gate kept off the tier below.
    pub(super) fn kept_off(&self) -> u64 {
        self.gate.as_ref().map_or(0, Gate::kept_off)
    }

    pub(crate) fn index(&self) -> &Index {
        &self.index
    }

    pub(crate) fn policy_bytes(&self) -> usize {
        self.policy.memory_bytes()
    }

    pub(crate) fn stats(&self) -> Stats {
        Stats {
            time_saved: std::time::Duration::from_micros(self.time_saved_us),
            entries: self.index.len() as u64,
            used_bytes: page_bytes(self.pages.used_pages()),
            held_bytes: page_bytes(self.held_pages),
            capacity_bytes: page_bytes(self.pages.capacity_pages()),
            index_bytes: (self.index.memory_bytes()
                + self.policy.memory_bytes()
                + self.gate.as_ref().map_or(0, Gate::memory_bytes)) as u64,
            ..self.counters
        }
    }

    /// The live entry under a key. One that has expired goes.
    pub(super) fn find_live(&mut self, key: &ObjectKey, now_ms: u64) -> Option<EntryId> {
        let id = self.index.find(key)?;
        if self.index.get(id)?.expires_at_ms > now_ms {
            return Some(id);
        }
        self.drop_entry(id, Departure::Removed);
        self.counters.expirations += 1;
        None
    }

    /// Holds the longest unbroken run of live entries from the first key on.
    pub(crate) fn hold_run(&mut self, keys: &[ObjectKey], now_ms: u64, request: Request) -> Vec<Held> {
        let mut run = Vec::with_capacity(keys.len());
        for key in keys {
            match self.find_live(key, now_ms).and_then(|id| self.hold(id)) {
                Some(held) => run.push(held),
                None => break,
            }
        }
        self.count(request, &run);
        run
    }

    /// Holds those of these entries that are there.
    pub(super) fn hold_each(&mut self, keys: &[ObjectKey], now_ms: u64) -> Vec<Held> {
        keys.iter().filter_map(|key| self.find_live(key, now_ms).and_then(|id| self.hold(id))).collect()
    }

    /// Holds the entries of all keys, or none of them.
    pub(super) fn hold_all(&mut self, keys: &[ObjectKey], now_ms: u64, request: Request) -> Option<Vec<Held>> {
        let mut run = self.hold_run(keys, now_ms, Request::Uncounted);
        let complete = run.len() == keys.len();
        if !complete {
            self.release(std::mem::take(&mut run));
        }
        self.count(request, &run);
        complete.then_some(run)
    }

    /// Ends the reading of entries. Goes from the tail to the head, so that the head of a
    /// chain is the most recently used.
    pub(crate) fn release(&mut self, run: Vec<Held>) {
        for Held { id, grant, queued, .. } in run.into_iter().rev() {
            let Some(entry) = self.index.get_mut(id) else { continue };
            entry.extent.revoke(grant);
            if queued {
                entry.queued = false;
            } else if !entry.is_pinned() {
                self.held_pages -= entry.extent.pages();
                if entry.linked {
                    self.policy.release(id);
                }
            }
            if !entry.linked && !entry.extent.is_read() {
                self.free(id);
            }
        }
    }

    /// Pages that were reserved and will not be sealed.
    pub(crate) fn abandon(&mut self, extent: Extent) {
        self.held_pages -= extent.pages();
        // A pending extent has no readers, so this cannot be refused.
        let _ = self.pages.free(extent);
    }

    /// Room for each size, or for none.
    pub(super) fn reserve_all(
        &mut self,
        namespace: NamespaceId,
        sizes_bytes: &[usize],
        now_ms: u64,
    ) -> Result<Vec<Extent>, Rejection> {
        let share = self.share(namespace);
        let mut extents = Vec::with_capacity(sizes_bytes.len());
        let result = self.admit(sizes_bytes.iter().copied()).and_then(|()| {
            if let Some(run) = self.make_run(share, sizes_bytes, now_ms) {
                extents = run;
                return Ok(());
            }
            sizes_bytes.iter().try_for_each(|bytes| {
                let pending = extents.iter().map(Extent::pages).sum();
                extents.push(self.make_room(share, *bytes, pending, now_ms)?);
                Ok(())
            })
        });
        match result {
            Ok(()) => Ok(extents),
            Err(rejection) => {
                extents.into_iter().for_each(|extent| self.abandon(extent));
                Err(rejection)
            }
        }
    }

    /// Room for one promoted entry.
    pub(super) fn reserve_one(
        &mut self,
        namespace: NamespaceId,
        bytes: usize,
        now_ms: u64,
    ) -> Result<Extent, Rejection> {
        let share = self.share(namespace);
        self.make_room(share, bytes, 0, now_ms)
    }

    /// A store was refused.
    pub(super) fn count_rejection(&mut self) {
        self.counters.rejections += 1;
    }

    /// Holds what is there of a chain and makes room for what is not, head first; what does
    /// not fit any more is the tail.
    pub(crate) fn reserve(
        &mut self,
        namespace: NamespaceId,
        keys: &[ObjectKey],
        wanted: Wanted,
        now_ms: u64,
    ) -> Reservation {
        let Wanted { bytes_each, first_given, priority } = wanted;
        let share = self.share(namespace);
        let (mut present, mut missing, mut pending) = (Vec::new(), Vec::new(), 0);
        for (position, key) in keys.iter().enumerate() {
            if let Some(held) = self.find_live(key, now_ms).and_then(|id| self.hold(id)) {
                self.raise(held.id, keys, position, priority);
                present.push(held);
                continue;
            }
            let room = if position < first_given && self.below.as_ref().is_some_and(|below| below.holds(key)) {
                continue;
            } else if position < first_given {
                Err(Rejection::PrefixGone { token: position })
            } else {
                self.make_room(share, bytes_each, pending, now_ms)
            };
            match room {
                Ok(extent) => {
                    pending += extent.pages();
                    missing.push((position, extent));
                }
                Err(rejection) => {
                    let whole = self.fits_empty(std::iter::repeat_n(bytes_each, keys.len())).err();
                    return (present, missing, whole.or(Some(rejection)));
                }
            }
        }
        (present, missing, None)
    }

    /// Makes written entries findable, all at once; says how many are new. The policy hears of
    /// the last one first, so that the head of a chain is the most recent.
    pub(crate) fn seal_all(
        &mut self,
        namespace: NamespaceId,
        written: impl Iterator<Item = Written>,
        on_present: OnPresent,
        priority: Priority,
    ) -> usize {
        let share = self.share(namespace);
        let mut arrivals = Vec::with_capacity(written.size_hint().0);
        let mut before = None;
        for Written { entry, parent, place } in written {
            let parent = parent.and_then(|key| match before {
                Some((known, id)) if known == key => Some(id),
                _ => self.index.find(&key),
            });
            let arrival = Arrival { fingerprint: entry.key.table_hash(), parent, place };
            let key = entry.key;
            let (id, new) = self.seal(namespace, entry, on_present);
            before = Some((key, id));
            if new {
                arrivals.push((id, arrival));
                self.gate.iter_mut().for_each(|gate| gate.stored(id, place));
            }
        }
        let Self { index, policy, .. } = self;
        let pages = |id| index.get(id).map_or(0, |entry| entry.extent.pages());
        let sealed = arrivals.len();
        policy.insert_run(&mut arrivals, pages, share, priority);
        sealed
    }

    /// As [`State::seal_all`], of one that a slower tier had already: it does not count as stored. `next` is
    /// the block behind it in the request, which may have come up before it.
    pub(super) fn seal_promoted(&mut self, namespace: NamespaceId, written: Written, next: Option<&ObjectKey>) {
        let key = written.entry.key;
        let sealed = self.seal_all(namespace, std::iter::once(written), OnPresent::Keep, Priority::default());
        self.counters.stored_total -= sealed as u64;
        if let (Some(next), Some(id)) = (next.and_then(|next| self.index.find(next)), self.index.find(&key)) {
            self.policy.link(next, id);
        }
    }

    /// Makes a written entry findable; the policy has yet to hear of it. The id is another's if
    /// one is there already and stays.
    fn seal(&mut self, namespace: NamespaceId, mut entry: Entry, on_present: OnPresent) -> (EntryId, bool) {
        let present = self.index.find(&entry.key);
        if let (Some(id), OnPresent::Keep) = (present, on_present) {
            self.abandon(entry.extent);
            return (id, false);
        }
        if let Some(id) = present {
            self.drop_entry(id, Departure::Removed);
        }
        self.held_pages -= entry.extent.pages();
        self.earliest_expiry_ms = self.earliest_expiry_ms.min(entry.expires_at_ms);
        entry.namespace = self.index.namespace(namespace);
        self.counters.stored_total += 1;
        (self.index.insert(entry), true)
    }

    /// Which of these keys are here.
    pub(super) fn resident(&self, keys: &[ObjectKey]) -> Vec<bool> {
        keys.iter().map(|key| self.index.find(key).is_some()).collect()
    }

    /// The keys of everything that can be found.
    pub(super) fn all_keys(&self) -> Vec<ObjectKey> {
        let ids = self.index.select(|_| true);
        ids.into_iter().filter_map(|id| self.index.get(id)).map(|entry| entry.key).collect()
    }

    /// How long a live entry took to compute.
    /// What computing all of these took.
    pub(super) fn compute_time(&self, run: &[Held]) -> std::time::Duration {
        let us = |held: &Held| self.index.get(held.id).map_or(0, |entry| entry.compute_us.into());
        std::time::Duration::from_micros(run.iter().map(us).sum())
    }

    pub(super) fn compute_us(&self, key: &ObjectKey) -> Option<u32> {
        self.index.find(key).and_then(|id| self.index.get(id)).map(|entry| entry.compute_us)
    }

    pub(super) fn remove(&mut self, keys: &[ObjectKey], now_ms: u64) -> (Removed, Vec<bool>) {
        let mut removed = Removed::default();
        let found = keys.iter().map(|key| {
            let id = self.find_live(key, now_ms);
            if let Some(id) = id {
                self.remove_entry(id, &mut removed);
            }
            id.is_some()
        });
        let found = found.collect();
        (removed, found)
    }

    pub(super) fn remove_where(&mut self, condition: impl Fn(&Entry) -> bool) -> Removed {
        let mut removed = Removed::default();
        for id in self.index.select(condition) {
            self.remove_entry(id, &mut removed);
        }
        removed
    }

    fn share(&self, namespace: NamespaceId) -> ShareId {
        self.quotas.get(&namespace).copied().unwrap_or(0)
    }

    /// What comes before must be kept as long as what is stored behind it.
    fn raise(&mut self, id: EntryId, keys: &[ObjectKey], position: usize, priority: Priority) {
        if self.policy.priority(id) >= priority {
            return;
        }
        let (Some(key), Some(entry)) = (keys.get(position), self.index.get(id)) else { return };
        let pages = entry.extent.pages();
        let parent = position.checked_sub(1).and_then(|before| keys.get(before));
        let parent = parent.and_then(|key| self.index.find(key));
        let place = Place::of(position, keys.len(), keys.len());
        let arrival = Arrival { fingerprint: key.table_hash(), parent, place };
        self.policy.raise(id, &arrival, pages, priority);
    }

    fn hold(&mut self, id: EntryId) -> Option<Held> {
        let entry = self.index.get_mut(id)?;
        if !entry.is_pinned() {
            self.held_pages += entry.extent.pages();
            self.policy.hold(id);
        }
        Some(Held { id, queued: false, grant: entry.extent.grant(), spec: entry.spec.clone() })
    }

    /// Holds an entry's pages for a queued write, and leaves it where it is in the policy's order.
    fn hold_queued(&mut self, id: EntryId) -> Option<Held> {
        let entry = self.index.get_mut(id).filter(|entry| !entry.queued)?;
        entry.queued = true;
        Some(Held { id, queued: true, grant: entry.extent.grant(), spec: entry.spec.clone() })
    }

    /// A request begins that holds none of its blocks while it is served: [`State::touch`],
    /// [`State::seal_all`], and then [`State::shrink_to`].
    pub(crate) fn tick(&mut self) {
        self.policy.tick();
    }

    /// Uses one entry of such a request, if it is there.
    pub(crate) fn touch(&mut self, key: &ObjectKey, place: Place) -> bool {
        let Some(held) = self.index.find(key).and_then(|id| self.hold(id)) else { return false };
        self.policy.touch(held.id, place);
        self.release(vec![held]);
        true
    }

    /// Evicts until there are so many entries.
    pub(crate) fn shrink_to(&mut self, entries: usize) {
        while self.index.len() > entries && self.evict_one(0, 0, 0).is_ok() {}
    }

    /// Counts a request that found this run.
    pub(crate) fn count(&mut self, request: Request, run: &[Held]) {
        if request == Request::Uncounted {
            return;
        }
        self.policy.tick();
        let mut blocks = run.len();
        if let Request::Tokens { requested, block_tokens } = request {
            self.counters.requested_tokens_total += requested as u64;
            self.counters.cached_tokens_total += (run.len() * block_tokens) as u64;
            blocks = requested / block_tokens.max(1);
        }
        if run.is_empty() {
            self.counters.misses += 1;
            return;
        }
        self.counters.hits += 1;
        let blocks = u32::try_from(blocks).unwrap_or(u32::MAX);
        let blocks_found = u32::try_from(run.len()).unwrap_or(u32::MAX);
        let mut may_go = true;
        for (depth, held) in (0..).zip(run) {
            let place = Place { depth, blocks, found: blocks_found };
            self.policy.touch(held.id, place);
            let compute_us = self.index.get(held.id).map_or(0, |entry| entry.compute_us);
            self.time_saved_us += u64::from(compute_us);
            // Used again, it may be worth a write now; but not behind a block that is kept off.
            if self.gate.as_mut().is_some_and(|gate| gate.touched(held.id, place)) && may_go {
                may_go = self.demote_entry(held.id, false);
            }
        }
    }

    fn remove_entry(&mut self, id: EntryId, removed: &mut Removed) {
        let pages = self.index.get(id).map_or(0, |entry| entry.extent.pages());
        removed.entries += 1;
        removed.bytes += page_bytes(pages);
        self.counters.removals += 1;
        self.drop_entry(id, Departure::Removed);
    }

    /// Makes an entry unfindable and frees it, now or with its last reader.
    fn drop_entry(&mut self, id: EntryId, why: Departure) {
        let pages = self.index.get(id).map_or(0, |entry| entry.extent.pages());
        self.policy.remove(id, pages, why);
        self.index.unlink(id);
        if self.index.get(id).is_some_and(|entry| !entry.extent.is_read()) {
            self.free(id);
        }
    }

    /// Frees an unlinked entry that nobody reads.
    fn free(&mut self, id: EntryId) {
        if let Some(entry) = self.index.take(id) {
            // Nobody reads it, so this cannot be refused.
            let _ = self.pages.free(entry.extent);
        }
    }
}
