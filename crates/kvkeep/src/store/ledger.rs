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

mod held;
mod leaving;
mod removals;
mod room;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use super::gate::Gate;
use crate::event::{Change, Journal};
use crate::eviction::{Arrival, Departure, EntryId, Place, PolicyKind, Priority, ShareId, Shares};
use crate::index::{Entry, Flag, Index};
use crate::key::{NamespaceId, ObjectKey};
use crate::stats::Stats;
use crate::tensor::PairSpec;
use crate::tier::ram::{Arena, Extent, PAGE_BYTES, Pages, page_bytes};
use crate::tier::{Epoch, Forgets};

pub(crate) use held::{Held, Request};
pub(crate) use leaving::Leaving;
pub(super) use removals::Gone;
pub(super) use room::SLICE;
pub(crate) use room::{Reservation, Shortage, Terms, Wanted};

/// One object whose payload is written, to be made findable.
#[derive(Debug)]
pub(crate) struct Written {
    pub(crate) entry: Entry,
    pub(crate) expires_at_ms: u64,
    /// The key of the block before it.
    pub(crate) parent: Option<ObjectKey>,
    pub(crate) place: Place,
}

/// What happens to an object that is already there under the same key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnPresent {
    /// The new one takes its place.
    Replace,
    /// It stays; equal keys mean equal bytes.
    Keep,
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

pub(crate) fn new_entry(
    key: ObjectKey,
    extent: Extent,
    bytes: usize,
    spec: Option<Arc<PairSpec>>,
    compute_us: u32,
) -> Entry {
    let slack = (extent.pages() as usize * PAGE_BYTES).saturating_sub(bytes);
    let slack_bytes = u16::try_from(slack).unwrap_or(0);
    Entry::new(key, extent, slack_bytes, spec, compute_us)
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

    /// Has anything happened that others have to be told? Pages that are free are no news where nobody waits for them.
    pub(super) fn has_news(&mut self) -> bool {
        self.freed &= self.waiting > 0;
        self.freed || !self.offers.is_empty() || !self.journal.is_empty()
    }

    /// What has happened since this was last asked for.
    pub(super) fn take_news(&mut self) -> News {
        News {
            freed: std::mem::take(&mut self.freed),
            has_offers: !self.offers.is_empty(),
            changes: self.take_changes(),
        }
    }

    /// The live entry under a key. One that has expired goes.
    pub(super) fn find_live(&mut self, key: &ObjectKey, now_ms: u64) -> Option<EntryId> {
        let id = self.index.find(key)?;
        if self.index.live_mut(id, now_ms).is_some() {
            return Some(id);
        }
        self.expire(id);
        None
    }

    fn expire(&mut self, id: EntryId) {
        self.drop_entry(id, Departure::Removed);
        self.counters.expirations += 1;
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
        for Written { entry, expires_at_ms, parent: behind, place } in written {
            let parent = behind.and_then(|key| match before {
                Some((known, id)) if known == key => Some(id),
                _ => self.in_order(&key),
            });
            let arrival = Arrival { fingerprint: entry.key.table_hash(), parent, place };
            let (key, is_block) = (entry.key, entry.spec.is_none());
            let (id, new) = self.seal(namespace, (entry, expires_at_ms), on_present);
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

    /// Makes a written entry findable; the policy has yet to hear of it. The id is another's if
    /// one is there already and stays.
    fn seal(
        &mut self,
        namespace: NamespaceId,
        (mut entry, expires_at_ms): (Entry, u64),
        on_present: OnPresent,
    ) -> (EntryId, bool) {
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
        (self.index.insert(entry, expires_at_ms), true)
    }

    /// An entry that the policy knows.
    fn in_order(&self, key: &ObjectKey) -> Option<EntryId> {
        self.index.find(key).filter(|id| self.index.get(*id).is_some_and(|entry| !entry.is(Flag::Departing)))
    }

    /// Which of these keys are here.
    pub(super) fn resident(&self, keys: &[ObjectKey]) -> Vec<bool> {
        keys.iter().map(|key| self.index.find(key).is_some()).collect()
    }

    /// How long an entry that is here took to compute.
    pub(super) fn compute_us_of(&self, key: &ObjectKey) -> Option<u32> {
        self.index.find(key).and_then(|id| self.index.get(id)).map(|entry| entry.compute_us)
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

    /// Evicts until there are so many entries.
    pub(crate) fn shrink_to(&mut self, entries: usize) {
        while self.index.len() > entries && self.evict_one(0, 0, 0).is_ok() {}
    }

    /// Makes an entry unfindable and frees it, now or with its last reader.
    fn drop_entry(&mut self, id: EntryId, why: Departure) {
        let Some(entry) = self.index.get_mut(id) else { return };
        let (pages, key, is_block) = (entry.extent.pages(), entry.key, entry.spec.is_none());
        if entry.take(Flag::Ahead) {
            self.ahead_pages -= pages;
        }
        if !entry.is(Flag::Departing) {
            // A write that was queued has its pages for a while.
            self.departing_pages += if entry.is(Flag::Queued) { pages } else { 0 };
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
