//! What the store knows, under its one lock: pure bookkeeping. No payload is touched here, nothing is logged, and no
//! tier is asked.
//!
//! Invariants:
//! - `pages.used_pages()` is the sum of the extents in the index (linked or not) and of the pending ones, so it is
//!   under the cap at every moment.
//! - `held_pages` is what cannot be evicted: pending extents and those being read. A queued write reads too, but does
//!   not keep its entry from being evicted.
//! - An entry is in the policy's order exactly if it is linked, not pinned and not departing.
//! - A departing entry can still be found. Its pages are room only when no write reads them any more.
//!
//! The ledger says what is to be offered to the tiers ([`Ledger::take_offers`]); whoever holds the lock offers it
//! after unlocking. Asking the tiers from in here was the alternative: then a tier that is slow stops everybody.

mod leaving;
mod room;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use super::Removed;
use super::gate::Gate;
use crate::block::BlockKey;
use crate::event::{Change, Journal};
use crate::eviction::{Arrival, Departure, EntryId, Place, PolicyKind, Priority, ShareId, Shares};
use crate::index::{Entry, Index};
use crate::key::{NamespaceId, ObjectKey};
use crate::stats::Stats;
use crate::tensor::PairSpec;
use crate::tier::ram::{Arena, Extent, PAGE_BYTES, Pages, ReadGrant, page_bytes};
use crate::tier::{Epoch, Forget, Forgets};

pub(crate) use leaving::Leaving;
pub(super) use room::SLICE;
pub(crate) use room::Shortage;

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
    pub(super) id: EntryId,
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
    pub(crate) terms: Terms,
}

/// How a store deals with what it does not get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Terms {
    /// It waits for writes under way that have its pages, and wants nothing without what comes before it.
    Patient,
    /// It waits for nothing, gives up writes that have not begun instead, and what comes before it is somebody else's business.
    AtOnce,
}

/// What happens to an object that is already there under the same key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnPresent {
    /// The new one takes its place.
    Replace,
    /// It stays; equal keys mean equal bytes.
    Keep,
}

/// What [`Ledger::reserve`] found and made of a run of keys.
#[derive(Debug, Default)]
pub(crate) struct Reservation {
    /// Those that are there, pinned.
    pub(crate) present: Vec<Held>,
    /// Position and pages of each that is missing, up to the first one without room.
    pub(crate) missing: Vec<(usize, Extent)>,
    /// Those that are in a tier and were not given.
    pub(crate) below: usize,
    /// The first position without room.
    pub(crate) refused_from: Option<usize>,
    pub(crate) shortage: Option<Shortage>,
}

#[derive(Debug)]
pub(crate) struct Ledger {
    index: Index,
    policy: Shares,
    /// The shares of namespaces with a quota.
    quotas: HashMap<NamespaceId, ShareId>,
    pages: Pages,
    held_pages: u32,
    last_sweep_ms: u64,
    counters: Stats,
    time_saved_us: u64,
    /// Is what leaves RAM offered to anybody?
    has_tiers: bool,
    /// `None` if everything may go there.
    gate: Option<Gate>,
    /// To be offered by whoever holds the lock now, once it has let it go.
    offers: Vec<Leaving>,
    /// Departing entries that no write reads any more: the first to go, in this order.
    ready: VecDeque<EntryId>,
    /// Pages that a write still reads, of entries that depart or are gone.
    departing_pages: u32,
    /// What came by prefetch and was not used yet, oldest first, and its pages.
    ahead: VecDeque<EntryId>,
    ahead_pages: u32,
    forgets: Forgets,
    epoch: Epoch,
    /// Removals that have not reached every tier yet: nothing of these may come up meanwhile.
    forgetting: Vec<(Epoch, Gone)>,
    /// Threads that wait for pages, and whether some have come since they were told.
    pub(super) waiting: usize,
    freed: bool,
    journal: Journal,
}

/// What whoever unlocks has to say.
#[derive(Debug)]
pub(super) struct News {
    /// Pages that somebody waits for are free.
    pub(super) freed: bool,
    pub(super) has_offers: bool,
    pub(super) changes: Vec<Change>,
}

/// What a removal names, kept until it has reached every tier.
#[derive(Debug, Clone)]
pub(super) enum Gone {
    Keys(NamespaceId, Vec<BlockKey>),
    Namespace(NamespaceId),
    All,
}

impl Gone {
    fn as_forget(&self) -> Forget<'_> {
        match self {
            Self::Keys(namespace, keys) => Forget::Keys(*namespace, keys),
            Self::Namespace(id) => Forget::Namespace(*id),
            Self::All => Forget::All,
        }
    }
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
    Entry::new(key, extent, slack_bytes, expires_at_ms, spec, compute_us)
}

impl Ledger {
    /// `quotas` are weights of namespaces; all others together have the weight 1.
    pub(crate) fn new(pages: Pages, policy: PolicyKind, quotas: &[(NamespaceId, f64)]) -> Self {
        let shares = Shares::new(policy, quotas.iter().map(|(_, weight)| *weight));
        Self {
            index: Index::default(),
            policy: shares,
            quotas: (1..).zip(quotas).map(|(share, (namespace, _))| (*namespace, share)).collect(),
            pages,
            held_pages: 0,
            last_sweep_ms: 0,
            counters: Stats::default(),
            time_saved_us: 0,
            has_tiers: false,
            gate: None,
            offers: Vec::new(),
            ready: VecDeque::new(),
            departing_pages: 0,
            ahead: VecDeque::new(),
            ahead_pages: 0,
            forgets: Forgets::default(),
            epoch: 0,
            forgetting: Vec::new(),
            waiting: 0,
            freed: false,
            journal: Journal::default(),
        }
    }

    /// What leaves RAM is offered from now on, if the gate lets it pass.
    pub(crate) fn set_tiers(&mut self, gate: Option<Gate>) {
        (self.has_tiers, self.gate) = (true, gate);
    }

    /// Everything of a namespace is being removed everywhere, or everything.
    pub(super) fn is_cleared(&mut self, namespace: Option<NamespaceId>) {
        self.journal.cleared(namespace);
    }

    /// Somebody wants to know what comes and goes.
    pub(crate) fn keep_journal(&mut self) {
        self.journal.keep();
    }

    /// What came and went since this was last asked for.
    pub(crate) fn take_changes(&mut self) -> Vec<Change> {
        self.journal.take()
    }

    /// What was written as this kind was read from a tier.
    pub(crate) fn read_below(&mut self, kind: u8) {
        if let Some(gate) = &mut self.gate {
            gate.read(kind);
        }
    }

    /// Entries that the gate kept off the tiers.
    pub(super) fn kept_off(&self) -> u64 {
        self.gate.as_ref().map_or(0, Gate::kept_off)
    }

    pub(crate) fn index(&self) -> &Index {
        &self.index
    }

    pub(crate) fn policy_bytes(&self) -> usize {
        self.policy.memory_bytes()
    }

    pub(super) fn capacity_pages(&self) -> u32 {
        self.pages.capacity_pages()
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
            ..self.counters.clone()
        }
    }

    /// Do writes under way have pages that will be free?
    pub(super) fn is_room_coming(&self) -> bool {
        self.departing_pages > 0
    }

    /// What has happened since this was last asked for.
    pub(super) fn take_news(&mut self) -> News {
        let freed = std::mem::take(&mut self.freed) && self.waiting > 0;
        News { freed, has_offers: !self.offers.is_empty(), changes: self.take_changes() }
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
            match self.hold_key(key, now_ms, &run) {
                Some(held) => run.push(held),
                None => break,
            }
        }
        self.count(request, &run, run.len());
        run
    }

    /// Holds those of these entries that are there, each with its position.
    pub(crate) fn hold_each(&mut self, keys: &[ObjectKey], now_ms: u64) -> Vec<(usize, Held)> {
        let held = |(position, key)| Some((position, self.hold_key(key, now_ms, &[])?));
        keys.iter().enumerate().filter_map(held).collect()
    }

    /// Holds the live entry under a key, which stands behind `run` in its chain.
    pub(crate) fn hold_key(&mut self, key: &ObjectKey, now_ms: u64, run: &[Held]) -> Option<Held> {
        let id = self.find_live(key, now_ms)?;
        let (held, departing) = self.hold(id)?;
        // It was chosen to go: the policy has to be told of it anew.
        if departing {
            self.stay(id, run.last().map(|before| before.id));
        }
        Some(held)
    }

    /// Holds the entries of all keys, or none of them.
    pub(super) fn hold_all(&mut self, keys: &[ObjectKey], now_ms: u64, request: Request) -> Option<Vec<Held>> {
        let mut run = self.hold_run(keys, now_ms, Request::Uncounted);
        let complete = run.len() == keys.len();
        if !complete {
            self.release(std::mem::take(&mut run));
        }
        self.count(request, &run, run.len());
        complete.then_some(run)
    }

    /// Ends the reading of entries. Goes from the tail to the head, so that the head of a
    /// chain is the most recently used.
    pub(crate) fn release(&mut self, run: Vec<Held>) {
        for Held { id, grant, queued, .. } in run.into_iter().rev() {
            let Some(entry) = self.index.get_mut(id) else { continue };
            entry.extent.revoke(grant);
            let is_over = |entry: &Entry| !entry.linked && !entry.extent.is_read();
            let goes = if queued {
                entry.queued = false;
                self.is_written(id);
                self.index.get(id).is_some_and(is_over)
            } else {
                let goes = is_over(entry);
                if !entry.is_pinned() {
                    self.held_pages -= entry.extent.pages();
                    self.freed = true;
                    if entry.linked {
                        self.policy.release(id);
                    }
                }
                goes
            };
            if goes {
                self.free(id);
            }
        }
    }

    /// Pages that were reserved and will not be sealed.
    pub(crate) fn abandon(&mut self, extent: Extent) {
        self.held_pages -= extent.pages();
        self.freed = true;
        // A pending extent has no readers, so this cannot be refused.
        let _ = self.pages.free(extent);
    }

    /// Free pages at or behind `from` with memory that can be given back to the system: to be abandoned again.
    pub(super) fn take_committed(&mut self, from: u32, arena: &Arena) -> Option<Extent> {
        let extent = self.pages.take_committed(from, arena)?;
        self.held_pages += extent.pages();
        Some(extent)
    }

    /// A store was refused.
    pub(super) fn count_rejection(&mut self) {
        self.counters.rejections += 1;
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
        for Written { entry, parent: behind, place } in written {
            let parent = behind.and_then(|key| match before {
                Some((known, id)) if known == key => Some(id),
                _ => self.in_order(&key),
            });
            let arrival = Arrival { fingerprint: entry.key.table_hash(), parent, place };
            let (key, is_block) = (entry.key, entry.spec.is_none());
            let (id, new) = self.seal(namespace, entry, on_present);
            before = Some((key, id));
            if new {
                arrivals.push((id, arrival));
                self.gate.iter_mut().for_each(|gate| gate.stored(id, place));
                if is_block {
                    self.journal.came(namespace, &key, behind.as_ref());
                }
            }
        }
        let Self { index, policy, .. } = self;
        let pages = |id| index.get(id).map_or(0, |entry| entry.extent.pages());
        let sealed = arrivals.len();
        policy.insert_run(&mut arrivals, pages, share, priority);
        sealed
    }

    /// As [`Ledger::seal_all`], of one that came from a tier: it does not count as stored. `next` is the block behind
    /// it in the request, which may have come up before it. Nothing that was removed since `epoch` comes up. Says
    /// whether it may be there.
    pub(crate) fn seal_promoted(
        &mut self,
        namespace: NamespaceId,
        written: Written,
        next: Option<&ObjectKey>,
        epoch: Epoch,
    ) -> bool {
        let key = written.entry.key;
        if !self.may_come_up(&key, namespace, epoch) {
            self.abandon(written.entry.extent);
            return false;
        }
        let sealed = self.seal_all(namespace, std::iter::once(written), OnPresent::Keep, Priority::default());
        self.counters.stored_total -= sealed as u64;
        if let (Some(next), Some(id)) = (next.and_then(|next| self.in_order(next)), self.in_order(&key)) {
            self.policy.link(next, id);
        }
        if let (Some(gate), Some(id)) = (&mut self.gate, self.index.find(&key)) {
            gate.is_below(id);
        }
        true
    }

    /// Was it neither removed nor replaced since, and is it not being removed now?
    pub(super) fn may_come_up(&self, key: &ObjectKey, namespace: NamespaceId, epoch: Epoch) -> bool {
        let key = BlockKey(*key);
        let going = self.forgetting.iter().any(|(_, gone)| gone.as_forget().covers(&key, namespace));
        !going && self.forgets.allow(&key, namespace, epoch)
    }

    /// A removal begins: until [`Ledger::has_forgotten`] nothing of it comes up.
    pub(super) fn forget(&mut self, gone: Gone) -> Epoch {
        self.epoch += 1;
        self.forgets.record(&gone.as_forget(), self.epoch);
        self.forgetting.push((self.epoch, gone));
        self.epoch
    }

    /// It has reached every tier. What was asked of a tier before is out of date.
    pub(super) fn has_forgotten(&mut self, epoch: Epoch) {
        let Some(at) = self.forgetting.iter().position(|(begun, _)| *begun == epoch) else { return };
        let (_, gone) = self.forgetting.swap_remove(at);
        self.epoch += 1;
        self.forgets.record(&gone.as_forget(), self.epoch);
    }

    /// What was asked of a tier so far is older than this.
    pub(super) fn next_epoch(&mut self) -> Epoch {
        self.epoch += 1;
        self.epoch
    }

    /// Goes with whatever is asked of a tier from now on.
    pub(crate) fn epoch(&self) -> Epoch {
        self.epoch
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
        self.freed = true;
        entry.namespace = self.index.namespace(namespace);
        self.counters.stored_total += 1;
        (self.index.insert(entry), true)
    }

    /// An entry that the policy knows.
    fn in_order(&self, key: &ObjectKey) -> Option<EntryId> {
        self.index.find(key).filter(|id| self.index.get(*id).is_some_and(|entry| !entry.departing))
    }

    /// Which of these keys are here.
    pub(super) fn resident(&self, keys: &[ObjectKey]) -> Vec<bool> {
        keys.iter().map(|key| self.index.find(key).is_some()).collect()
    }

    /// How long an entry that is here took to compute.
    pub(super) fn compute_us_of(&self, key: &ObjectKey) -> Option<u32> {
        self.index.find(key).and_then(|id| self.index.get(id)).map(|entry| entry.compute_us)
    }

    /// How long a held entry took to compute.
    pub(super) fn compute_us(&self, held: &Held) -> u32 {
        self.index.get(held.id).map_or(0, |entry| entry.compute_us)
    }

    /// What computing all of these took.
    pub(super) fn compute_time(&self, run: &[Held]) -> std::time::Duration {
        std::time::Duration::from_micros(run.iter().map(|held| u64::from(self.compute_us(held))).sum())
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

    /// Removes what satisfies `condition` of the next `slots` slots; says where to go on, if there is more.
    pub(super) fn remove_some(
        &mut self,
        from: EntryId,
        slots: usize,
        condition: impl Fn(&Entry) -> bool,
        removed: &mut Removed,
    ) -> Option<EntryId> {
        let (ids, next) = self.index.select_some(from, slots, condition);
        for id in ids {
            self.remove_entry(id, removed);
        }
        next
    }

    /// A namespace has the share of this one, too.
    pub(super) fn is_also(&mut self, namespace: NamespaceId, other: NamespaceId) {
        if let Some(share) = self.quotas.get(&namespace).copied() {
            self.quotas.insert(other, share);
        }
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
        let parent = parent.and_then(|key| self.in_order(key));
        let place = Place::of(position, keys.len(), keys.len());
        let arrival = Arrival { fingerprint: key.table_hash(), parent, place };
        self.policy.raise(id, &arrival, pages, priority);
    }

    /// Says too whether it was chosen to go.
    fn hold(&mut self, id: EntryId) -> Option<(Held, bool)> {
        let entry = self.index.get_mut(id)?;
        if std::mem::take(&mut entry.ahead) {
            self.ahead_pages -= entry.extent.pages();
        }
        if !entry.is_pinned() {
            self.held_pages += entry.extent.pages();
            if !entry.departing {
                self.policy.hold(id);
            }
        }
        let held = Held { id, queued: false, grant: entry.extent.grant(), spec: entry.spec.clone() };
        Some((held, entry.departing))
    }

    /// A request begins that holds none of its blocks while it is served: [`Ledger::touch`],
    /// [`Ledger::seal_all`], and then [`Ledger::shrink_to`].
    pub(crate) fn tick(&mut self) {
        self.policy.tick();
    }

    /// Uses one entry of such a request, if it is there.
    pub(crate) fn touch(&mut self, key: &ObjectKey, place: Place) -> bool {
        let Some((held, _)) = self.index.find(key).and_then(|id| self.hold(id)) else { return false };
        self.policy.touch(held.id, place);
        self.release(vec![held]);
        true
    }

    /// Evicts until there are so many entries.
    pub(crate) fn shrink_to(&mut self, entries: usize) {
        while self.index.len() > entries && self.evict_one(0, 0, 0).is_ok() {}
    }

    /// Counts a request that found so many blocks, of which it holds these.
    pub(crate) fn count(&mut self, request: Request, run: &[Held], found: usize) {
        if request == Request::Uncounted {
            return;
        }
        self.policy.tick();
        let mut blocks = found;
        if let Request::Tokens { requested, block_tokens } = request {
            self.counters.requested_tokens_total += requested as u64;
            self.counters.cached_tokens_total += (found * block_tokens) as u64;
            blocks = requested / block_tokens.max(1);
        }
        if found == 0 {
            self.counters.misses += 1;
            return;
        }
        self.counters.hits += 1;
        let blocks = u32::try_from(blocks).unwrap_or(u32::MAX);
        let blocks_found = u32::try_from(found).unwrap_or(u32::MAX);
        let mut may_go = true;
        for (depth, held) in (0..).zip(run) {
            let place = Place { depth, blocks, found: blocks_found };
            self.policy.touch(held.id, place);
            let compute_us = self.index.get(held.id).map_or(0, |entry| entry.compute_us);
            self.time_saved_us += u64::from(compute_us);
            // Used again, it may be worth a write now; but not behind a block that is kept off.
            if self.gate.as_mut().is_some_and(|gate| gate.touched(held.id, place)) && may_go {
                may_go = self.offer_entry(held.id);
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
        let Some(entry) = self.index.get_mut(id) else { return };
        let (pages, key, is_block) = (entry.extent.pages(), entry.key, entry.spec.is_none());
        if std::mem::take(&mut entry.ahead) {
            self.ahead_pages -= pages;
        }
        if !entry.departing {
            // A write that was queued has its pages for a while.
            self.departing_pages += if entry.queued { pages } else { 0 };
            self.policy.remove(id, pages, why);
        }
        if is_block {
            self.journal.went(&key);
        }
        self.index.unlink(id);
        if self.index.get(id).is_some_and(|entry| !entry.extent.is_read()) {
            self.free(id);
        }
    }

    /// Frees an unlinked entry that nobody reads.
    fn free(&mut self, id: EntryId) {
        if let Some(entry) = self.index.take(id) {
            self.freed = true;
            // Nobody reads it, so this cannot be refused.
            let _ = self.pages.free(entry.extent);
        }
    }
}
