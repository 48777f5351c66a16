//! What comes up from the tiers.
//!
//! - Single-flight: of those that want the same block at the same time one reads it; the others wait for that read.
//! - One deadline a request: whatever it waits for, it does not wait longer in all.
//! - Bounded: pages are taken and reads begun only for so many bytes at a time.
//! - What is asked for now goes before what is prefetched: that waits in a queue of its own while anybody waits.
//!
//! No lock is held while a tier is asked: `loads` has those of what is under way.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::Shared;
use super::guard::{Pending, Pin};
use super::ledger::{self, Held, Shortage, Written};
use super::loads::{Load, LoadState, Loads, Neighbours, Role, Wish};
use super::plan::{Plan, Whereabouts};
use super::tiers::{Models, Tiers};
use crate::block::{BlockKey, BlockMeta, Content};
use crate::clock::Deadline;
use crate::key::ObjectKey;
use crate::sync::{Condvar, Mutex};
use crate::tier::ram::{PAGE_BYTES, pages_for};
use crate::tier::{Epoch, Located, Read, ReadTarget, Tier};

/// Prefetched blocks under way at a time: what is asked for now finds most of a tier free.
const AHEAD_AT_ONCE: usize = 2;
/// Parts of payloads under way at a time.
const PARTS_AT_ONCE: usize = 8;

/// What a request waits for, in order.
enum Step {
    Here(Held),
    /// From the tier of this number, which moves so many bytes for it.
    Loading(Arc<Load>, (usize, u64), ObjectKey),
}

/// Pages that a tier reads into. Dropping it ends the load without its block.
struct Promotion {
    shared: Arc<Shared>,
    loads: Arc<Loads>,
    models: Arc<Models>,
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

/// A part of a payload that a tier reads.
struct Part {
    bytes: Vec<u8>,
    answer: Arc<Answer>,
}

/// Where a part is handed over.
#[derive(Default)]
struct Answer {
    /// The part, or that there is none, once that is known.
    part: Mutex<Option<Option<Vec<u8>>>>,
    known: Condvar,
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
            pump(self.loads(), shared, self.models());
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
                let promotion = self.promotion(wish, &load, pending, false);
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

    fn promotion(&self, wish: &Wish, load: &Arc<Load>, pending: Pending, is_ahead: bool) -> Promotion {
        Promotion {
            shared: Arc::clone(self.shared()),
            loads: Arc::clone(self.loads()),
            models: Arc::clone(self.models()),
            load: Arc::clone(load),
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
        pump(self.loads(), self.shared(), self.models());
        begun
    }

    /// Hands these bytes of the first `wanted` blocks of a plan to `each`, in order, until one is not there. Gives
    /// what is held of the run, and says how many blocks there were.
    pub(super) fn read_parts(
        &self,
        keys: &[ObjectKey],
        plan: Plan,
        wanted: usize,
        range: &Range<usize>,
        each: &mut impl FnMut(usize, &[u8]),
        deadline: Deadline,
    ) -> (Pin, usize) {
        let mut positions = Vec::new();
        let mut pin = Pin::new(Arc::clone(self.shared()), Vec::new());
        for (position, held) in plan.held {
            positions.push(position);
            pin.extend(vec![held]);
        }
        let mut reads: VecDeque<Option<Arc<Answer>>> = VecDeque::new();
        let (mut done, mut begun) = (0, 0);
        let mut held = positions.iter().enumerate().peekable();
        while done < wanted {
            while begun < wanted && reads.len() < PARTS_AT_ONCE {
                reads.push_back(self.begin_part(keys, (&plan.places, plan.waited), begun, range));
                begun += 1;
            }
            match reads.pop_front().flatten() {
                None => {
                    let Some((at, _)) = held.next_if(|(_, position)| **position == done) else { break };
                    let bytes = pin.bytes(at);
                    let part = range.start.min(bytes.len())..range.end.min(bytes.len());
                    each(done, bytes.get(part).unwrap_or_default());
                }
                Some(answer) => match answer.wait(deadline) {
                    Ok(Some(bytes)) => each(done, &bytes),
                    Ok(None) => break,
                    Err(()) => {
                        self.each().for_each(|tier| tier.gave_up_waiting());
                        break;
                    }
                },
            }
            done += 1;
        }
        let used = positions.iter().take_while(|position| **position < done).count();
        pin.truncate(used);
        (pin, done)
    }

    /// `None` if it is not in a tier.
    fn begin_part(
        &self,
        keys: &[ObjectKey],
        (places, waited): (&[Whereabouts], Duration),
        position: usize,
        range: &Range<usize>,
    ) -> Option<Arc<Answer>> {
        let (Some(Whereabouts::Tier(number, located)), Some(key)) = (places.get(position), keys.get(position)) else {
            return None;
        };
        let answer = Arc::<Answer>::default();
        let target = Box::new(Part { bytes: vec![0; range.len()], answer: Arc::clone(&answer) });
        let (key, namespace) = (BlockKey(*key), located.namespace);
        let mark = located.mark;
        self.tier(*number)?.read(vec![Read { key, namespace, range: Some(range.clone()), waited, target }]);
        self.shared().with(|ledger| ledger.read_below(mark));
        Some(answer)
    }
}

impl Answer {
    /// `Err` if the time is over.
    fn wait(&self, deadline: Deadline) -> Result<Option<Vec<u8>>, ()> {
        let mut part = self.part.lock();
        loop {
            if let Some(known) = part.take() {
                return Ok(known);
            }
            if deadline.is_over() {
                return Err(());
            }
            (part, _) = self.known.wait_timeout(part, deadline.left());
        }
    }

    /// What is said first counts.
    fn say(&self, said: Option<Vec<u8>>) {
        self.part.lock().get_or_insert(said);
        self.known.notify_all();
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

/// Begins what is prefetched next, unless somebody waits for something.
fn pump(loads: &Arc<Loads>, shared: &Arc<Shared>, models: &Arc<Models>) {
    loop {
        let wish = {
            let mut ahead = loads.ahead.lock();
            if ahead.demand > 0 || ahead.flying >= AHEAD_AT_ONCE {
                return;
            }
            let Some(wish) = ahead.queue.pop_front() else { return };
            ahead.flying += 1;
            wish
        };
        if !begin_ahead(loads, shared, models, &wish) {
            loads.ahead.lock().flying -= 1;
        }
    }
}

/// Says whether it is under way.
fn begin_ahead(loads: &Arc<Loads>, shared: &Arc<Shared>, models: &Arc<Models>, wish: &Wish) -> bool {
    let Role::Lead(load) = loads.enter(&wish.key, 0) else { return false };
    let bytes = whole_pages(wish.located.raw_bytes);
    let now_ms = shared.now_ms();
    let extent = shared.with(|ledger| {
        let is_here = ledger.resident(&[wish.key]) == [true];
        if is_here { None } else { ledger.reserve_ahead(wish.located.namespace, to_usize(bytes), now_ms) }
    });
    let Some(extent) = extent else {
        loads.leave(&wish.key, &load, LoadState::Failed);
        return false;
    };
    loads.begin(bytes, Deadline::never());
    let promotion = Promotion {
        shared: Arc::clone(shared),
        loads: Arc::clone(loads),
        models: Arc::clone(models),
        load,
        pending: Some(Pending::new(Arc::clone(shared), extent)),
        key: wish.key,
        located: wish.located,
        epoch: wish.epoch,
        waited: wish.waited,
        chain: wish.chain,
        bytes,
        is_ahead: true,
    };
    wish.tier.read(vec![promotion.into_read()]);
    true
}

impl Promotion {
    fn into_read(self) -> Read {
        let (key, namespace) = (BlockKey(self.key), self.located.namespace);
        Read { key, namespace, range: None, waited: self.waited, target: Box::new(self) }
    }

    /// Makes the block findable, with a pin for each that waits; then they are told.
    fn land(&mut self, meta: BlockMeta) {
        let Some((entry, parent, child)) = self.entry(meta) else { return };
        let (shared, key, now_ms) = (Arc::clone(&self.shared), self.key, self.shared.now_ms());
        let namespace = self.located.namespace;
        let landing = std::mem::replace(&mut *self.load.state.lock(), LoadState::Landing);
        let waiters = if let LoadState::Flying(waiters) = landing { waiters } else { 0 };
        let written = Written { entry, parent, place: self.chain.place };
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

    fn entry(&mut self, meta: BlockMeta) -> Option<(crate::index::Entry, Option<ObjectKey>, Option<ObjectKey>)> {
        let BlockMeta { facts, content, .. } = meta;
        let bytes = to_usize(facts.raw_bytes);
        let (spec, parent, child) = match content {
            Content::Named(spec) => (Some(Arc::new(spec)), None, None),
            Content::Block { layout, model } => {
                self.models.lock().entry(facts.namespace).or_insert((layout, model));
                (None, self.chain.before, self.chain.behind)
            }
            Content::Nothing => return None,
        };
        let extent = self.pending.take()?.into_extent()?;
        let begins = spec.is_none() && parent.is_none();
        let entry = ledger::new_entry(self.key, extent, bytes, facts.expires_at_ms, spec, facts.compute_us);
        Some((entry.begins(begins), parent, child))
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
        if self.is_ahead {
            let pages = pages_for(to_usize(self.bytes)).unwrap_or(0);
            self.shared.with(|ledger| ledger.came_ahead(pages, Some(&self.key)));
        }
        {
            let mut state = self.load.state.lock();
            if matches!(*state, LoadState::Flying(_)) {
                *state = LoadState::Failed;
            }
        }
        self.load.landed.notify_all();
        self.loads.flying.lock().remove(&self.key);
        self.loads.end(self.bytes);
        if self.is_ahead {
            self.loads.ahead.lock().flying -= 1;
        }
        pump(&self.loads, &self.shared, &self.models);
    }
}

impl ReadTarget for Part {
    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    fn complete(mut self: Box<Self>, read: Option<BlockMeta>) {
        let bytes = std::mem::take(&mut self.bytes);
        self.answer.say(read.map(|_| bytes));
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.answer.say(None);
    }
}

fn whole_pages(bytes: u64) -> u64 {
    bytes.next_multiple_of(PAGE_BYTES as u64)
}

fn to_usize(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}
