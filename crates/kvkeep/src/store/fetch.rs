//! What comes up from the tiers.
//!
//! - Single-flight: of those that want the same block at the same time one reads it; the others wait for that read.
//! - One deadline a request: whatever it waits for, it does not wait longer in all.
//! - Bounded: pages are taken and reads begun only for so many bytes at a time.
//! - What is asked for now goes before what is prefetched: that waits in a queue of its own while anybody waits.
//!
//! No lock is held while a tier is asked: `loads` has those of what is under way.

use std::sync::Arc;
use std::time::Duration;

use super::guard::{Pending, Pin};
use super::ledger::{self, Held, Shortage};
use super::loads::{Load, LoadState, Neighbours, Role, Wish};
use super::plan::{Plan, Whereabouts};
use super::promote::{to_usize, whole_pages};
use super::tiers::Tiers;
use crate::clock::Deadline;
use crate::key::ObjectKey;
use crate::tier::{Epoch, Located, Read, Tier};

/// What a request waits for, in order.
enum Step {
    Here(Held),
    /// From the tier of this number, which moves so many bytes for it.
    Loading(Arc<Load>, (usize, u64), ObjectKey),
}

impl Tiers {
    /// The longest run of the first `wanted` blocks of a plan, pinned, after what is not in RAM has been loaded.
    pub(super) fn fetch(&self, keys: &[ObjectKey], plan: Plan, wanted: usize, deadline: Deadline) -> Pin {
        let shared = self.shared();
        let mut run = Pin::new(Arc::clone(shared), Vec::new());
        let (mut kept, rest): (Vec<_>, Vec<_>) = plan.held.into_iter().partition(|(position, _)| *position < wanted);
        drop(Pin::new(Arc::clone(shared), rest.into_iter().map(|(_, held)| held).collect()));
        if kept.len() == wanted {
            run.extend(kept.into_iter().map(|(_, held)| held).collect());
            return run;
        }
        self.loads().ahead.lock().demand += 1;
        let begin_us = shared.clock.now_us();
        let mut steps = Vec::with_capacity(wanted);
        let mut batch = Batch::default();
        kept.reverse();
        for (position, place) in plan.places.iter().enumerate().take(wanted) {
            if kept.last().is_some_and(|(at, _)| *at == position) {
                steps.extend(kept.pop().map(|(_, held)| Step::Here(held)));
                continue;
            }
            let (Whereabouts::Tier(tier, located), Some(key)) = (place, keys.get(position)) else { break };
            let (place, since) = ((*tier, *located), (plan.epoch, plan.waited));
            let step = self.begin_load(keys, position, key, place, since, deadline, &mut batch);
            match step {
                Some(step) => steps.push(step),
                None => break,
            }
        }
        batch.send();
        let leftover = kept.into_iter().map(|(_, held)| held).collect();
        self.collect(&mut run, steps, deadline, begin_us);
        drop(Pin::new(Arc::clone(shared), leftover));
        let last_demand = {
            let mut ahead = self.loads().ahead.lock();
            ahead.demand -= 1;
            ahead.demand == 0
        };
        if last_demand {
            self.promoter().pump();
        }
        run
    }

    /// Joins a load of a block, finds it in RAM, or begins to load it. `None` if there is no room or no time.
    #[expect(clippy::too_many_arguments, reason = "one block of one request")]
    fn begin_load(
        &self,
        keys: &[ObjectKey],
        position: usize,
        key: &ObjectKey,
        (number, located): (usize, Located),
        (epoch, waited): (Epoch, Duration),
        deadline: Deadline,
        batch: &mut Batch,
    ) -> Option<Step> {
        let load = loop {
            match self.loads().enter(key, 1) {
                Role::Lead(load) => break load,
                Role::Join(load) if load.join() => {
                    return Some(Step::Loading(load, (number, located.stored_bytes), *key));
                }
                // It is over: its block is in RAM, or it is for us to try.
                Role::Join(_) => {
                    let now_ms = self.shared().now_ms();
                    if let Some(held) = self.shared().with(|ledger| ledger.hold_key(key, now_ms, &[])) {
                        return Some(Step::Here(held));
                    }
                    crate::sync::thread::yield_now();
                }
            }
        };
        let tier = Arc::clone(self.tier(number)?);
        let wish = Wish { key: *key, tier, located, epoch, waited, chain: Neighbours::of(keys, position) };
        self.lead(&wish, load, number, deadline, batch)
    }

    fn lead(&self, wish: &Wish, load: Arc<Load>, number: usize, deadline: Deadline, batch: &mut Batch) -> Option<Step> {
        let (shared, key) = (self.shared(), wish.key);
        let bytes = whole_pages(wish.located.raw_bytes);
        if !self.loads().has_room(bytes) {
            batch.send();
        }
        if !self.loads().begin(bytes, deadline) {
            self.loads().leave(&key, &load, LoadState::Failed);
            return None;
        }
        let now_ms = shared.now_ms();
        let attempt = |ledger: &mut ledger::Ledger| match ledger.hold_key(&key, now_ms, &[]) {
            Some(held) => Room::Here(held),
            None => match ledger.reserve_one(wish.located.namespace, to_usize(bytes), now_ms) {
                Ok(extent) => Room::Pages(Pending::new(Arc::clone(shared), extent)),
                Err(shortage) => Room::None(shortage),
            },
        };
        let shortage = |room: &Room| if let Room::None(shortage) = room { Some(*shortage) } else { None };
        let mut room = shared.with(attempt);
        // What goes is mostly in a tier already, which lets go of its pages at once.
        self.offer(Deadline::over());
        if shortage(&room) == Some(Shortage::Coming) {
            room = shared.with(attempt);
        }
        if shortage(&room) == Some(Shortage::Coming) {
            // What waits to be written needs no reads; but others may wait for what is in the batch.
            batch.send();
            room = self.wait_for_room(room, self.room_deadline(deadline), attempt, shortage);
        }
        match room {
            Room::Pages(pending) => {
                let promotion = self.promoter().promotion(wish, Arc::clone(&load), pending, false);
                batch.add(Arc::clone(&wish.tier), promotion.into_read());
                Some(Step::Loading(load, (number, wish.located.stored_bytes), key))
            }
            Room::Here(held) => {
                // For those who have joined since: they look again.
                self.loads().leave(&key, &load, LoadState::Failed);
                self.loads().end(bytes);
                Some(Step::Here(held))
            }
            Room::None(_) => {
                self.loads().leave(&key, &load, LoadState::Failed);
                self.loads().end(bytes);
                None
            }
        }
    }

    /// Waits for the steps in order, as far as they come in time, and measures.
    fn collect(&self, run: &mut Pin, steps: Vec<Step>, deadline: Deadline, begin_us: u64) {
        let mut loaded = vec![0u64; self.each().count()];
        let mut steps = steps.into_iter();
        for step in steps.by_ref() {
            match step {
                Step::Here(held) => run.extend(vec![held]),
                Step::Loading(load, (tier, stored_bytes), key) => {
                    match load.wait(deadline).or_else(|| self.pin_one(&key)) {
                        Some(pin) => {
                            if let Some(bytes) = loaded.get_mut(tier) {
                                *bytes += stored_bytes;
                            }
                            run.absorb(pin);
                        }
                        None => {
                            if deadline.is_over() {
                                self.each().for_each(|tier| tier.gave_up_waiting());
                            }
                            break;
                        }
                    }
                }
            }
        }
        // What comes later stays in RAM for the next one; nobody here waits for it.
        let mut unused = Vec::new();
        for step in steps {
            match step {
                Step::Here(held) => unused.push(held),
                Step::Loading(load, ..) => drop(load.wait(Deadline::over())),
            }
        }
        drop(Pin::new(Arc::clone(self.shared()), unused));
        let us = self.shared().clock.now_us().saturating_sub(begin_us);
        let mut from = loaded.iter().enumerate().filter(|(_, bytes)| **bytes > 0);
        // Of several tiers nobody knows which one took how long.
        if let (Some((tier, bytes)), None) = (from.next(), from.next())
            && let Some(rate) = self.rate(tier)
        {
            rate.measured(*bytes, us);
        }
    }

    /// A block that has come to RAM by another way.
    fn pin_one(&self, key: &ObjectKey) -> Option<Pin> {
        let now_ms = self.shared().now_ms();
        let held = self.shared().with(|ledger| ledger.hold_key(key, now_ms, &[]))?;
        Some(Pin::new(Arc::clone(self.shared()), vec![held]))
    }
}

/// What there is for a block.
enum Room {
    Here(Held),
    Pages(Pending),
    None(Shortage),
}

/// Reads that go to their tier together.
#[derive(Default)]
struct Batch {
    tier: Option<Arc<dyn Tier>>,
    reads: Vec<Read>,
}

impl Batch {
    fn add(&mut self, tier: Arc<dyn Tier>, read: Read) {
        if self.tier.as_ref().is_some_and(|last| !Arc::ptr_eq(last, &tier)) {
            self.send();
        }
        self.tier = Some(tier);
        self.reads.push(read);
    }

    fn send(&mut self) {
        if let Some(tier) = self.tier.take() {
            tier.read(std::mem::take(&mut self.reads));
        }
    }
}
