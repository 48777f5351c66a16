//! Who holds what: entries that are read, and what a use of them counts.
//!
//! Invariant: what is held for a reader is out of the policy's order, and its pages stay until the last reader lets go.
//! Holding for a queued write leaves the order as it is. A run is let go from its tail to its head; the other way round was
//! the alternative: then prefixes are evicted before what stands on them.

use std::sync::Arc;

use super::Ledger;
use crate::eviction::{EntryId, Place};
use crate::index::{Entry, Flag};
use crate::key::ObjectKey;
use crate::tensor::PairSpec;
use crate::tier::ram::ReadGrant;

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
    pub(in crate::store) id: EntryId,
    /// Held for a queued write: no use, and no pin.
    pub(super) queued: bool,
    pub(in crate::store) grant: ReadGrant,
    pub(in crate::store) spec: Option<Arc<PairSpec>>,
}

impl Ledger {
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
    #[expect(clippy::inline_always, reason = "called for each block of a hit: else what is held is moved once more")]
    #[inline(always)]
    pub(crate) fn hold_key(&mut self, key: &ObjectKey, now_ms: u64, run: &[Held]) -> Option<Held> {
        let id = self.index.find(key)?;
        let Some(entry) = self.index.live_mut(id, now_ms) else {
            self.expire(id);
            return None;
        };
        if entry.take(Flag::Ahead) {
            self.ahead_pages -= entry.extent.pages();
        }
        let departing = entry.is(Flag::Departing);
        if !entry.is_pinned() {
            self.held_pages += entry.extent.pages();
            if !departing {
                self.policy.hold(id);
            }
        }
        let held = Held { id, queued: false, grant: entry.extent.grant(), spec: entry.spec.clone() };
        // It was chosen to go: the policy has to be told of it anew.
        if departing {
            self.stay(id, run.last().map(|before| before.id));
        }
        Some(held)
    }

    /// Holds the entries of all keys, or none of them.
    pub(in crate::store) fn hold_all(
        &mut self,
        keys: &[ObjectKey],
        now_ms: u64,
        request: Request,
    ) -> Option<Vec<Held>> {
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
                entry.set(Flag::Queued, false);
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

    /// A request begins that holds none of its blocks while it is served: [`Ledger::touch`],
    /// [`Ledger::seal_all`], and then [`Ledger::shrink_to`].
    pub(crate) fn tick(&mut self) {
        self.policy.tick();
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

    /// Uses one entry of such a request, if it is there.
    pub(crate) fn touch(&mut self, key: &ObjectKey, place: Place) -> bool {
        let Some(held) = self.hold_key(key, 0, &[]) else { return false };
        self.policy.touch(held.id, place);
        self.release(vec![held]);
        true
    }

    /// How long a held entry took to compute.
    pub(in crate::store) fn compute_us(&self, held: &Held) -> u32 {
        self.index.get(held.id).map_or(0, |entry| entry.compute_us)
    }

    /// What computing all of these took.
    pub(in crate::store) fn compute_time(&self, run: &[Held]) -> std::time::Duration {
        std::time::Duration::from_micros(run.iter().map(|held| u64::from(self.compute_us(held))).sum())
    }
}
