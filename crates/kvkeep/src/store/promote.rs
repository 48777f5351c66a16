//! One block on its way up: its pages, who waits for it, and what is prefetched.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::Shared;
use super::guard::{Pending, Pin};
use super::ledger::{self, Held, Written};
use super::loads::{Load, LoadState, Loads, Neighbours, Role, Wish};
use super::plan::{Plan, Whereabouts};
use super::tiers::{Models, Tiers};
use crate::block::{BlockKey, BlockMeta, Content};
use crate::clock::Deadline;
use crate::key::ObjectKey;
use crate::tier::ram::{PAGE_BYTES, pages_for};
use crate::tier::{Epoch, Located, Read, ReadTarget};

/// Prefetched blocks under way at a time: what is asked for now finds most of a tier free.
const AHEAD_AT_ONCE: usize = 2;

/// What a block needs on its way up.
#[derive(Clone)]
pub(super) struct Promoter {
    shared: Arc<Shared>,
    loads: Arc<Loads>,
    models: Arc<Models>,
}

/// Pages that a tier reads into. Dropping it ends the load without its block.
pub(super) struct Promotion {
    promoter: Promoter,
    load: Arc<Load>,
    pending: Option<Pending>,
    key: ObjectKey,
    located: Located,
    epoch: Epoch,
    waited: Duration,
    chain: Neighbours,
    bytes: u64,
    is_ahead: bool,
}

impl Tiers {
    pub(super) fn promoter(&self) -> Promoter {
        let (shared, loads, models) = (Arc::clone(self.shared()), Arc::clone(self.loads()), Arc::clone(self.models()));
        Promoter { shared, loads, models }
    }

    /// Begins to load these blocks of a plan, as many as may be in RAM before anybody asked for them; says how many.
    pub(super) fn fetch_ahead(&self, keys: &[ObjectKey], plan: &Plan, wanted: Range<usize>) -> usize {
        let mut left = self.shared().with(|ledger| ledger.ahead_limit_pages());
        let mut wishes = VecDeque::new();
        for position in wanted {
            let (Some(Whereabouts::Tier(number, located)), Some(key)) = (plan.places.get(position), keys.get(position))
            else {
                continue;
            };
            let pages = pages_for(to_usize(located.raw_bytes)).unwrap_or(u32::MAX);
            let Some(rest) = left.checked_sub(pages) else { break };
            left = rest;
            let Some(tier) = self.tier(*number) else { continue };
            let (tier, chain) = (Arc::clone(tier), Neighbours::of(keys, position));
            wishes.push_back(Wish {
                key: *key,
                tier,
                located: *located,
                epoch: plan.epoch,
                waited: Duration::ZERO,
                chain,
            });
        }
        let begun = wishes.len();
        let replaced = {
            let mut ahead = self.loads().ahead.lock();
            if ahead.closed {
                return 0;
            }
            // The newest wish is the most likely one; what was wished for before it shares the bound.
            let mut queue = wishes;
            queue.append(&mut ahead.queue);
            let kept = queue.len().min(begun.saturating_mul(4).max(1));
            let replaced = queue.split_off(kept);
            ahead.queue = queue;
            replaced
        };
        drop(replaced);
        self.promoter().pump();
        begun
    }
}

impl Promoter {
    pub(super) fn promotion(self, wish: &Wish, load: Arc<Load>, pending: Pending, is_ahead: bool) -> Promotion {
        Promotion {
            promoter: self,
            load,
            pending: Some(pending),
            key: wish.key,
            located: wish.located,
            epoch: wish.epoch,
            waited: wish.waited,
            chain: wish.chain,
            bytes: whole_pages(wish.located.raw_bytes),
            is_ahead,
        }
    }

    /// Begins what is prefetched next, unless somebody waits for something.
    pub(super) fn pump(&self) {
        loop {
            let wish = {
                let mut ahead = self.loads.ahead.lock();
                if ahead.demand > 0 || ahead.flying >= AHEAD_AT_ONCE {
                    return;
                }
                let Some(wish) = ahead.queue.pop_front() else { return };
                ahead.flying += 1;
                wish
            };
            if !self.begin_ahead(&wish) {
                self.loads.ahead.lock().flying -= 1;
            }
        }
    }

    /// Says whether it is under way.
    fn begin_ahead(&self, wish: &Wish) -> bool {
        let Role::Lead(load) = self.loads.enter(&wish.key, 0) else { return false };
        let bytes = whole_pages(wish.located.raw_bytes);
        let now_ms = self.shared.now_ms();
        let extent = self.shared.with(|ledger| {
            let is_here = ledger.resident(&[wish.key]) == [true];
            if is_here { None } else { ledger.reserve_ahead(wish.located.namespace, to_usize(bytes), now_ms) }
        });
        let Some(extent) = extent else {
            self.loads.leave(&wish.key, &load, LoadState::Failed);
            return false;
        };
        self.loads.begin(bytes, Deadline::never());
        let pending = Pending::new(Arc::clone(&self.shared), extent);
        wish.tier.read(vec![self.clone().promotion(wish, load, pending, true).into_read()]);
        true
    }
}

impl Promotion {
    pub(super) fn into_read(self) -> Read {
        let (key, namespace) = (BlockKey(self.key), self.located.namespace);
        Read { key, namespace, range: None, waited: self.waited, target: Box::new(self) }
    }

    /// Makes the block findable, with a pin for each that waits; then they are told.
    fn land(&mut self, meta: BlockMeta) {
        let Some((written, child)) = self.written(meta) else { return };
        let (shared, key, now_ms) = (Arc::clone(&self.promoter.shared), self.key, self.promoter.shared.now_ms());
        let namespace = self.located.namespace;
        let landing = std::mem::replace(&mut *self.load.state.lock(), LoadState::Landing);
        let waiters = if let LoadState::Flying(waiters) = landing { waiters } else { 0 };
        let held: Vec<Held> = shared.with(|ledger| {
            ledger.read_below(self.located.mark);
            if !ledger.seal_promoted(namespace, written, child.as_ref(), self.epoch) {
                return Vec::new();
            }
            (0..waiters).filter_map(|_| ledger.hold_key(&key, now_ms, &[])).collect()
        });
        let pins: Vec<Pin> = held.into_iter().map(|held| Pin::new(Arc::clone(&shared), vec![held])).collect();
        self.load.land(LoadState::Landed(pins));
    }

    /// With the key of the block behind it.
    fn written(&mut self, meta: BlockMeta) -> Option<(Written, Option<ObjectKey>)> {
        let BlockMeta { facts, content, .. } = meta;
        let bytes = to_usize(facts.raw_bytes);
        let (spec, parent, child) = match content {
            Content::Named(spec) => (Some(Arc::new(spec)), None, None),
            Content::Block { layout, model } => {
                self.promoter.models.lock().entry(facts.namespace).or_insert((layout, model));
                (None, self.chain.before, self.chain.behind)
            }
            Content::Nothing => return None,
        };
        let extent = self.pending.take()?.into_extent()?;
        let begins = spec.is_none() && parent.is_none();
        let entry = ledger::new_entry(self.key, extent, bytes, spec, facts.compute_us);
        let (entry, place) = (entry.begins(begins), self.chain.place);
        Some((Written { entry, expires_at_ms: facts.expires_at_ms, parent, place }, child))
    }
}

impl ReadTarget for Promotion {
    fn bytes_mut(&mut self) -> &mut [u8] {
        self.pending.as_mut().map_or(&mut [], Pending::bytes_mut)
    }

    fn complete(mut self: Box<Self>, read: Option<BlockMeta>) {
        if let Some(meta) = read {
            self.land(meta);
        }
    }
}

impl Drop for Promotion {
    fn drop(&mut self) {
        drop(self.pending.take());
        let Promoter { shared, loads, .. } = &self.promoter;
        if self.is_ahead {
            let pages = pages_for(to_usize(self.bytes)).unwrap_or(0);
            shared.with(|ledger| ledger.came_ahead(pages, Some(&self.key)));
        }
        {
            let mut state = self.load.state.lock();
            if matches!(*state, LoadState::Flying(_)) {
                *state = LoadState::Failed;
            }
        }
        self.load.landed.notify_all();
        loads.flying.lock().remove(&self.key);
        loads.end(self.bytes);
        if self.is_ahead {
            loads.ahead.lock().flying -= 1;
        }
        self.promoter.pump();
    }
}

pub(super) fn whole_pages(bytes: u64) -> u64 {
    bytes.next_multiple_of(PAGE_BYTES as u64)
}

pub(super) fn to_usize(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}
