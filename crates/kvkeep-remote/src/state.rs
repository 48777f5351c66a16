//! What callers and the writer share, under one lock: what is known of the store, what is to be done there, and what
//! was removed. Pure but for the payloads that it holds.
//!
//! Invariant: what is to be done is done in the order in which it was asked for. So a removal removes what was written
//! before it, and not what comes after.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use kvkeep::tiers::{BlockKey, BlockMeta, Epoch, Forget, Forgets, Forgotten, Located, Offer, Payload, Reports};
use kvkeep::{NamespaceId, TierStats};

use crate::index::{Index, Known};
use crate::store::{Listed, Name};

/// More keys than these are not remembered as taken out.
const MAX_TAKEN: usize = 1 << 16;

/// One thing for the writer to do.
pub(crate) enum Op {
    Write(Box<Write>),
    /// Objects, and the bytes that they take.
    Remove(Vec<(Name, u64)>),
    /// All of a namespace, or of the prefix; of those that were known, the bytes that they take.
    Clear(Option<NamespaceId>, u64),
}

/// A block to be written.
pub(crate) struct Write {
    ticket: u64,
    pub(crate) meta: BlockMeta,
    pub(crate) mark: u8,
    pub(crate) payload: Arc<dyn Payload>,
}

/// What became of an offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Taken {
    Queued,
    There,
    Outdated,
    /// There is no room now.
    Full,
    /// There never will be.
    Refused,
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) index: Index,
    ops: VecDeque<Op>,
    /// Payloads that wait or are being written.
    queued_bytes: u64,
    /// The newest write of each key that waits or is under way.
    wanted: HashMap<BlockKey, (u64, NamespaceId)>,
    last_ticket: u64,
    forgets: Forgets,
    /// What is being removed from the store: nobody finds it any more.
    removing: HashMap<BlockKey, usize>,
    clearing: Vec<Option<NamespaceId>>,
    /// Bytes of objects that are being removed or written.
    moving_bytes: u64,
    /// Is the writer at work?
    pub(crate) is_busy: bool,
    /// Things done so far.
    pub(crate) done: u64,
    pub(crate) is_closed: bool,
    /// Nothing more is done.
    pub(crate) is_ended: bool,
    pub(crate) counters: TierStats,
    pub(crate) reports: Option<Reports>,
    /// What was taken out here since the last list began, and since the one before. A list may still show it.
    taken: [HashSet<BlockKey>; 2],
    /// One more than the highest layer that was written, by namespace.
    layers: HashMap<NamespaceId, u32>,
    /// What could not be written, though some of it may be there: it is taken again. Was a flush told?
    lost: HashMap<BlockKey, bool>,
}

impl State {
    /// Where a block is, as far as that is known.
    pub(crate) fn look(&self, name: &Name, now_ms: u64, now: Instant) -> Known {
        if self.is_removed(name) { Known::Absent } else { self.index.look(name, now_ms, now) }
    }

    /// Is all of this namespace being removed?
    fn is_cleared(&self, namespace: NamespaceId) -> bool {
        self.clearing.iter().any(|what| what.is_none_or(|id| id == namespace))
    }

    /// Is it being removed?
    pub(crate) fn is_removed(&self, name: &Name) -> bool {
        self.removing.contains_key(&name.key) || self.is_cleared(name.namespace)
    }

    /// Takes an offer, if it is new and there is room.
    pub(crate) fn offer(&mut self, offer: &Offer, now_ms: u64, queue_bytes: u64, is_there: bool) -> Taken {
        let Offer { meta, epoch, mark, payload, .. } = offer;
        if !self.forgets.allow(&meta.key, meta.namespace, *epoch) {
            return Taken::Outdated;
        }
        if self.is_closed || !is_there {
            return Taken::Refused;
        }
        // What another process wrote under the key of a prefix text may be another value.
        let is_known = match meta.is_replaceable() {
            true => self.index.has_written(&meta.key, now_ms),
            false => self.index.contains(&meta.key, now_ms) && !self.is_removed(&Name::of(meta)),
        };
        if (is_known && !self.lost.contains_key(&meta.key)) || self.wanted.contains_key(&meta.key) {
            return Taken::There;
        }
        let bytes = payload.bytes().len() as u64;
        if self.queued_bytes > 0 && self.queued_bytes + bytes > queue_bytes {
            return Taken::Full;
        }
        if meta.is_replaceable() {
            // An older value may still be on its way here.
            self.forgets.record(&Forget::Replaced(meta.namespace, &[meta.key]), *epoch);
            let layers = self.layers.entry(meta.namespace).or_default();
            *layers = (*layers).max(meta.key.layer() + 1);
        }
        self.last_ticket += 1;
        self.wanted.insert(meta.key, (self.last_ticket, meta.namespace));
        self.queued_bytes += bytes;
        let (ticket, meta, payload) = (self.last_ticket, meta.clone(), Arc::clone(payload));
        self.ops.push_back(Op::Write(Box::new(Write { ticket, meta, mark: *mark, payload })));
        Taken::Queued
    }

    /// Takes out all writes that have not begun.
    pub(crate) fn give_up(&mut self) -> Vec<Write> {
        let (mut writes, mut kept) = (Vec::new(), VecDeque::new());
        for op in self.ops.drain(..) {
            match op {
                Op::Write(write) => writes.push(*write),
                other => kept.push_back(other),
            }
        }
        self.ops = kept;
        self.counters.dropped_total += writes.len() as u64;
        writes.iter().for_each(|write| _ = self.finish(write));
        writes
    }

    /// Forgets at once, and has it removed from the store.
    pub(crate) fn forget(&mut self, what: &Forget<'_>, epoch: Epoch, now_ms: u64, now: Instant) -> Forgotten {
        self.forgets.record(what, epoch);
        let mut forgotten = Forgotten::default();
        match what {
            Forget::Keys(namespace, keys) => {
                let there = |key: &BlockKey| {
                    let name = Name { namespace: *namespace, key: *key };
                    self.wanted.contains_key(key) || matches!(self.look(&name, now_ms, now), Known::Here(_))
                };
                forgotten.found = keys.iter().map(there).collect();
                forgotten.entries = forgotten.found.iter().filter(|found| **found).count() as u64;
                self.remove(*namespace, keys, now);
            }
            Forget::Replaced(namespace, keys) => {
                let older = self.forgets.not_newer(keys, epoch);
                self.remove(*namespace, &older, now);
            }
            Forget::Namespace(id) => forgotten.entries = self.clear(Some(*id)),
            Forget::All => forgotten.entries = self.clear(None),
        }
        forgotten
    }

    fn remove(&mut self, namespace: NamespaceId, keys: &[BlockKey], now: Instant) {
        let mut removed = Vec::new();
        for key in keys {
            let was_queued = self.wanted.remove(key).is_some();
            let bytes = self.index.take(key);
            self.is_taken(*key);
            // It may be there all the same, unless all that is there is known.
            if bytes.is_some() || was_queued || !self.index.knows_all(now) {
                removed.push((Name { namespace, key: *key }, bytes.unwrap_or(0)));
                *self.removing.entry(*key).or_default() += 1;
                self.reports.iter().for_each(|reports| reports.went(key));
            }
        }
        if !removed.is_empty() {
            self.moving_bytes += removed.iter().map(|(_, bytes)| bytes).sum::<u64>();
            self.ops.push_back(Op::Remove(removed));
        }
    }

    /// Drops what has expired; a store that does not is told to.
    pub(crate) fn sweep(&mut self, now_ms: u64, store_knows_time: bool) {
        let expired = self.index.take_expired(now_ms);
        for (name, _) in &expired {
            self.is_taken(name.key);
            self.reports.iter().for_each(|reports| reports.went(&name.key));
        }
        if !expired.is_empty() && !store_knows_time {
            for (name, bytes) in &expired {
                self.moving_bytes += bytes;
                *self.removing.entry(name.key).or_default() += 1;
            }
            self.ops.push_back(Op::Remove(expired));
        }
    }

    /// Says how many can no longer be found.
    fn clear(&mut self, namespace: Option<NamespaceId>) -> u64 {
        let keys = self.index.keys_of(namespace);
        let mut bytes = 0;
        for key in &keys {
            bytes += self.index.take(key).unwrap_or(0);
            self.is_taken(*key);
            self.reports.iter().for_each(|reports| reports.went(key));
        }
        let queued = self.wanted.len();
        self.wanted.retain(|_, (_, id)| namespace.is_some_and(|namespace| namespace != *id));
        match namespace {
            Some(id) => drop(self.layers.remove(&id)),
            None => self.layers.clear(),
        }
        self.moving_bytes += bytes;
        self.clearing.push(namespace);
        self.ops.push_back(Op::Clear(namespace, bytes));
        (keys.len() + queued - self.wanted.len()) as u64
    }

    /// The next thing to do.
    pub(crate) fn next(&mut self) -> Option<Op> {
        let op = self.ops.pop_front()?;
        self.is_busy = true;
        Some(op)
    }

    /// The next write, if that is the next thing to do.
    pub(crate) fn next_write(&mut self) -> Option<Write> {
        match self.ops.pop_front()? {
            Op::Write(write) => Some(*write),
            other => {
                self.ops.push_front(other);
                None
            }
        }
    }

    /// Is this still the newest write of its key?
    pub(crate) fn wants(&self, write: &Write) -> bool {
        self.wanted.get(&write.meta.key).is_some_and(|(ticket, _)| *ticket == write.ticket)
    }

    /// A write is done with, one way or the other; says whether it was still wanted. Its payload is dropped after this.
    pub(crate) fn finish(&mut self, write: &Write) -> bool {
        self.queued_bytes -= write.payload.bytes().len() as u64;
        let wants = self.wants(write);
        if wants {
            self.wanted.remove(&write.meta.key);
        }
        wants
    }

    /// An object could not be written.
    pub(crate) fn lost(&mut self, write: &Write) {
        self.lost.insert(write.meta.key, false);
    }

    /// How many could not be written, for a flush to say; each is said once, unless it fails again.
    pub(crate) fn tell_lost(&mut self) -> usize {
        self.lost.values_mut().map(|told| usize::from(!std::mem::replace(told, true))).sum()
    }

    /// An object was written.
    pub(crate) fn written(&mut self, write: &Write, meta: &BlockMeta, bytes: u64) {
        self.lost.remove(&meta.key);
        let located = Located::of(meta, write.mark);
        self.index.written(meta.key, bytes, located, meta.expires_at_ms);
        self.reports.iter().for_each(|reports| reports.came(meta));
        self.counters.stored_total += 1;
        self.counters.written_bytes_total += meta.stored_bytes;
        self.counters.written_raw_bytes_total += meta.raw_bytes;
    }

    /// What the header of an object says.
    pub(crate) fn learned(&mut self, meta: &BlockMeta, bytes: u64) -> Option<Located> {
        if self.is_removed(&Name::of(meta)) {
            return None;
        }
        let located = Located::of(meta, 0);
        self.index.learned(meta.key, bytes, located, meta.expires_at_ms);
        self.reports.iter().for_each(|reports| reports.came(meta));
        Some(located)
    }

    /// An object is not there, or is not what it should be.
    pub(crate) fn missed(&mut self, name: Name, now: Instant) {
        self.index.is_absent(name, now);
        self.reports.iter().for_each(|reports| reports.went(&name.key));
    }

    /// A list begins.
    pub(crate) fn begin_list(&mut self) -> u64 {
        self.taken.rotate_right(1);
        if let Some(now) = self.taken.first_mut() {
            now.clear();
        }
        self.index.begin_list()
    }

    /// A list shows this. What was taken out here meanwhile it may show still, and what is being written counts already.
    pub(crate) fn shown(&mut self, listed: Listed) {
        let is_taken = self.taken.iter().any(|taken| taken.contains(&listed.name.key));
        if !is_taken && !self.wanted.contains_key(&listed.name.key) {
            self.index.heard(listed);
        }
    }

    fn is_taken(&mut self, key: BlockKey) {
        if let Some(now) = self.taken.first_mut() {
            if now.len() >= MAX_TAKEN {
                now.clear();
            }
            now.insert(key);
        }
    }

    /// So many bytes begin to be moved, or have been.
    pub(crate) fn moves(&mut self, bytes: u64) {
        self.moving_bytes += bytes;
    }

    pub(crate) fn moved(&mut self, bytes: u64) {
        self.moving_bytes -= bytes;
    }

    /// What has to go from the store so that so many bytes fit; it counts as moving until it is gone.
    pub(crate) fn make_room(&mut self, bytes: u64, capacity_bytes: u64) -> Vec<(Name, u64)> {
        let others = self.moving_bytes + bytes;
        let victims = self.index.evict_to(capacity_bytes.saturating_sub(others));
        for (name, bytes) in &victims {
            self.moving_bytes += bytes;
            self.is_taken(name.key);
            self.counters.evictions += 1;
            self.reports.iter().for_each(|reports| reports.went(&name.key));
        }
        victims
    }

    pub(crate) fn used_bytes(&self) -> u64 {
        self.index.used_bytes() + self.moving_bytes
    }

    pub(crate) fn queued_bytes(&self) -> u64 {
        self.queued_bytes
    }

    /// These are gone from the store.
    pub(crate) fn is_gone(&mut self, removed: &[(Name, u64)]) {
        for (Name { key, .. }, bytes) in removed {
            self.moving_bytes -= bytes;
            self.lost.remove(key);
            if let Some(times) = self.removing.get_mut(key) {
                *times -= 1;
                if *times == 0 {
                    self.removing.remove(key);
                }
            }
        }
    }

    /// As [`State::is_gone`], of a namespace or everything.
    pub(crate) fn is_all_gone(&mut self, namespace: Option<NamespaceId>, bytes: u64) {
        self.moving_bytes -= bytes;
        if let Some(at) = self.clearing.iter().position(|what| *what == namespace) {
            self.clearing.remove(at);
        }
    }

    /// Is everything done?
    pub(crate) fn is_idle(&self) -> bool {
        self.ops.is_empty() && !self.is_busy
    }

    pub(crate) fn layers(&self, namespace: NamespaceId) -> u32 {
        self.layers.get(&namespace).copied().unwrap_or(0)
    }
}
