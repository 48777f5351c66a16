//! The adaptive policy: keeps what is likely to be used again soonest for the room it takes,
//! judged by rates of reuse that it learns while it runs ([`Rates`]).
//!
//! Invariants: only leaves are candidates, so a block never goes before one that needs it; an
//! entry is in `leaves` exactly if it is resident, not held and has no resident child.
//!
//! A few leaves are drawn at random, the worst goes, and the next worst are compared again the
//! next time. An exact order was the alternative: every rate that is learned would move every entry.

use super::ghosts::{Buckets, tag};
use super::list::NONE;
use super::rates::{Kind, Rates};
use super::{Arrival, Departure, EntryId, Place, Policy};
use crate::slots::Slots;

/// Leaves that are drawn for each victim, and the worst of earlier draws that are compared again:
/// 8 of each gain 0.1 points on chats and cost 80 ns a touch more.
const DRAWN: usize = 4;
const KEPT: usize = 6;
const MAX_TOUCHES: u8 = 15;
/// Evictions that are remembered for each resident.
const REMEMBERED: usize = 2;

#[derive(Debug)]
pub(crate) struct Adaptive {
    slots: Slots<Slot>,
    leaves: Vec<EntryId>,
    ghosts: Buckets<8>,
    rates: Rates,
    resident: usize,
    /// Touches so far: the unit of age.
    clock: u32,
    /// The clock when the current request began: its blocks have one age.
    now: u32,
    /// The slot whose age is looked at next.
    cursor: EntryId,
    end: EntryId,
    random: u64,
    /// The worst leaves of earlier draws, and the parent of the last victim.
    candidates: Vec<EntryId>,
    chosen: Option<EntryId>,
    /// Has a request begun since something was stored?
    ticked: bool,
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    tag: u32,
    parent: EntryId,
    /// Where it is in `leaves`.
    leaf: u32,
    last: u32,
    children: u32,
    /// Told apart from the slot's earlier tenants.
    generation: u8,
    parent_generation: u8,
    kind: Kind,
    state: State,
}

/// Touches and whether resident and held, in one byte: slots are index memory.
#[derive(Debug, Clone, Copy)]
struct State(u8);

/// A request's blocks that had been here before, as far as evictions are remembered.
#[derive(Debug, Clone, Copy, Default)]
struct Known {
    blocks: u32,
    touches: u8,
}

const EMPTY: Slot = Slot {
    tag: 0,
    parent: NONE,
    leaf: NONE,
    last: 0,
    children: 0,
    generation: 0,
    parent_generation: 0,
    kind: Kind::FIRST,
    state: State(0),
};

impl State {
    const HERE: u8 = 64;
    const HELD: u8 = 128;

    fn here(touches: u8) -> Self {
        Self(touches.min(MAX_TOUCHES) | Self::HERE)
    }

    fn is_here(self) -> bool {
        self.0 & Self::HERE != 0
    }

    fn may_go(self) -> bool {
        self.0 & (Self::HERE | Self::HELD) == Self::HERE
    }

    fn touches(self) -> u8 {
        self.0 & MAX_TOUCHES
    }

    fn set_held(&mut self, held: bool) {
        self.0 = if held { self.0 | Self::HELD } else { self.0 & !Self::HELD };
    }

    fn touch(&mut self) {
        if self.touches() < MAX_TOUCHES {
            self.0 += 1;
        }
    }
}

impl Adaptive {
    pub(crate) fn new() -> Self {
        Self {
            slots: Slots::default(),
            leaves: Vec::new(),
            ghosts: Buckets::default(),
            rates: Rates::new(),
            resident: 0,
            clock: 0,
            now: 0,
            cursor: 0,
            end: 0,
            random: 0x9e37_79b9_7f4a_7c15,
            candidates: Vec::with_capacity(KEPT + 1),
            chosen: None,
            ticked: false,
        }
    }

    /// A request begins.
    fn begin(&mut self) {
        self.chosen = None;
        self.rates.ended(self.clock.wrapping_sub(self.now));
        self.now = self.clock;
    }

    /// What each touch costs: the clock, and a look at the age of one entry and one ghost.
    fn look_around(&mut self) {
        self.clock = self.clock.wrapping_add(1);
        self.cursor = if self.cursor + 1 < self.end { self.cursor + 1 } else { 0 };
        if let Some(slot) = self.slots.get(self.cursor).filter(|slot| slot.state.is_here()) {
            self.rates.waits(slot.kind, self.now.wrapping_sub(slot.last), self.end);
        }
        if let Some(ghost) = self.ghosts.look() {
            let stands_for = u32::try_from(self.ghosts.places()).unwrap_or(u32::MAX);
            let (kind, last) = opened(ghost);
            self.rates.waits(kind, self.now.wrapping_sub(last), stands_for);
        }
        self.rates.learn(self.resident + self.ghosts.places());
    }

    /// Which of a run were here before? A block that was seen was seen with all before it, so
    /// the deepest memory speaks for the rest, some of which may be forgotten.
    fn recall(&mut self, run: &[(EntryId, Arrival)]) -> Known {
        let mut known = Known::default();
        for (_, arrival) in run {
            let Some(ghost) = self.ghosts.take(tag(arrival.fingerprint)) else { continue };
            let (kind, last) = opened(ghost);
            self.rates.reused(kind, self.now.wrapping_sub(last));
            known = Known { blocks: arrival.place.depth + 1, touches: kind.touches() + 1 };
        }
        known
    }

    fn add(&mut self, id: EntryId, arrival: &Arrival, known: Known) {
        self.look_around();
        let mut place = arrival.place;
        place.found = place.found.max(known.blocks);
        let touches = if place.depth < known.blocks { known.touches } else { 0 };
        let (parent, parent_generation) = self.adopt(arrival.parent);
        let (tag, last) = (tag(arrival.fingerprint), self.now);
        let (kind, state) = (Kind::of(touches, place), State::here(touches));
        self.end = self.end.max(id + 1);
        let Some(slot) = self.slots.grow(id, EMPTY) else { return };
        // Its children came before it, its former tenant left no trace but the generation.
        let Slot { children, generation, .. } = *slot;
        *slot = Slot { tag, parent, leaf: NONE, last, children, generation, parent_generation, kind, state };
        self.resident += 1;
        self.list(id);
    }

    /// One child more; says how to recognise the parent.
    fn adopt(&mut self, parent: Option<EntryId>) -> (EntryId, u8) {
        let Some(id) = parent else { return (NONE, 0) };
        self.unlist(id);
        let Some(slot) = self.slots.grow(id, EMPTY) else { return (NONE, 0) };
        slot.children += 1;
        (id, slot.generation)
    }

    /// One child less, if the parent is still who it was.
    fn leave(&mut self, parent: EntryId, generation: u8) {
        let Some(slot) = self.slots.get_mut(parent).filter(|slot| slot.generation == generation) else { return };
        slot.children = slot.children.saturating_sub(1);
        self.list(parent);
        // Often the next one.
        self.candidates.truncate(KEPT);
        self.candidates.push(parent);
    }

    /// Makes it a candidate, if it is a leaf that may go.
    fn list(&mut self, id: EntryId) {
        let place = u32::try_from(self.leaves.len()).unwrap_or(NONE);
        let Some(slot) = self.slots.get_mut(id) else { return };
        if slot.state.may_go() && slot.children == 0 && slot.leaf == NONE {
            slot.leaf = place;
            self.leaves.push(id);
        }
    }

    fn unlist(&mut self, id: EntryId) {
        let Some(slot) = self.slots.get_mut(id).filter(|slot| slot.leaf != NONE) else { return };
        let place = std::mem::replace(&mut slot.leaf, NONE);
        self.leaves.swap_remove(place as usize);
        if let Some(moved) = self.leaves.get(place as usize).and_then(|id| self.slots.get_mut(*id)) {
            moved.leaf = place;
        }
    }

    fn random_leaf(&mut self) -> Option<EntryId> {
        // xorshift64 (Marsaglia 2003): the same draws in every run.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let place = ((self.random >> 32) * self.leaves.len() as u64) >> 32;
        self.leaves.get(usize::try_from(place).unwrap_or(0)).copied()
    }

    /// What it is worth, and how old it is, if it may go.
    fn judge(&self, id: EntryId) -> Option<Judged> {
        let slot = self.slots.get(id).filter(|slot| slot.leaf != NONE)?;
        let age = self.now.wrapping_sub(slot.last);
        Some(Judged { worth: self.rates.worth(slot.kind, age), age, id })
    }

    fn choose(&mut self) -> Option<EntryId> {
        let mut worst = Worst::default();
        if self.leaves.len() <= KEPT + DRAWN {
            self.leaves.iter().filter_map(|id| self.judge(*id)).for_each(|judged| worst.add(judged));
        } else {
            self.candidates.iter().filter_map(|id| self.judge(*id)).for_each(|judged| worst.add(judged));
            for _ in 0..DRAWN {
                self.random_leaf().and_then(|id| self.judge(id)).into_iter().for_each(|judged| worst.add(judged));
            }
        }
        self.candidates.clear();
        self.candidates.extend(worst.ids());
        self.candidates.first().copied().or_else(|| self.any())
    }

    /// Where every leaf is held, something that others need has to go all the same:
    /// a cache that can evict must.
    fn any(&self) -> Option<EntryId> {
        (0..self.end).find(|id| self.slots.get(*id).is_some_and(|slot| slot.state.may_go()))
    }

    fn set_held(&mut self, id: EntryId, held: bool) {
        self.chosen = None;
        if let Some(slot) = self.slots.get_mut(id) {
            slot.state.set_held(held);
        }
        if held { self.unlist(id) } else { self.list(id) }
    }
}

/// A leaf that may go.
#[derive(Debug, Clone, Copy)]
struct Judged {
    worth: f32,
    age: u32,
    id: EntryId,
}

/// The [`KEPT`] worst of all that are added, the worst first.
#[derive(Debug, Default)]
struct Worst([Option<Judged>; KEPT]);

impl Worst {
    fn add(&mut self, mut judged: Judged) {
        for place in &mut self.0 {
            match place {
                Some(other) if other.id == judged.id => return,
                Some(other) if judged.goes_before(other) => std::mem::swap(other, &mut judged),
                Some(_) => {}
                None => {
                    *place = Some(judged);
                    return;
                }
            }
        }
    }

    fn ids(&self) -> impl Iterator<Item = EntryId> {
        self.0.iter().flatten().map(|judged| judged.id)
    }
}

impl Judged {
    fn goes_before(&self, other: &Self) -> bool {
        self.worth < other.worth || (self.worth == other.worth && self.age > other.age)
    }
}

/// What a ghost keeps: the time of its last use, with the kind in the lowest bits.
fn closed(kind: Kind, last: u32) -> u32 {
    last & !Kind::MASK | u32::from(kind.number())
}

fn opened(ghost: u32) -> (Kind, u32) {
    let [number, ..] = (ghost & Kind::MASK).to_le_bytes();
    (Kind::from_number(number), ghost & !Kind::MASK)
}

impl Policy for Adaptive {
    fn tick(&mut self) {
        self.ticked = true;
        self.begin();
    }

    fn insert_run(&mut self, run: &[(EntryId, Arrival)]) {
        self.chosen = None;
        // Whoever stores without looking up makes time pass as well.
        if !std::mem::take(&mut self.ticked) {
            self.begin();
        }
        let known = self.recall(run);
        run.iter().rev().for_each(|(id, arrival)| self.add(*id, arrival, known));
    }

    fn link(&mut self, id: EntryId, parent: EntryId) {
        self.chosen = None;
        let Some(slot) = self.slots.get(id).filter(|slot| slot.state.is_here()).copied() else { return };
        let known = self.slots.get(slot.parent).is_some_and(|parent| parent.generation == slot.parent_generation);
        if known {
            return;
        }
        let (parent, parent_generation) = self.adopt(Some(parent));
        if let Some(slot) = self.slots.get_mut(id) {
            (slot.parent, slot.parent_generation) = (parent, parent_generation);
        }
    }

    fn touch(&mut self, id: EntryId, place: Place) {
        self.chosen = None;
        self.look_around();
        let Some(slot) = self.slots.get_mut(id) else { return };
        self.rates.reused(slot.kind, self.now.wrapping_sub(slot.last));
        slot.state.touch();
        slot.kind = Kind::of(slot.state.touches(), place);
        slot.last = self.now;
    }

    fn hold(&mut self, id: EntryId) {
        self.set_held(id, true);
    }

    fn release(&mut self, id: EntryId) {
        self.set_held(id, false);
    }

    fn remove(&mut self, id: EntryId, why: Departure) {
        self.chosen = None;
        self.unlist(id);
        let Some(slot) = self.slots.get_mut(id).filter(|slot| slot.state.is_here()) else { return };
        let gone = *slot;
        *slot = Slot { generation: gone.generation.wrapping_add(1), ..EMPTY };
        self.resident -= 1;
        if why == Departure::Evicted {
            self.ghosts.add(gone.tag, closed(gone.kind, gone.last), REMEMBERED * self.resident);
        }
        self.leave(gone.parent, gone.parent_generation);
    }

    fn victim(&mut self) -> Option<EntryId> {
        if self.chosen.is_none() {
            self.chosen = self.choose();
        }
        self.chosen
    }

    fn memory_bytes(&self) -> usize {
        self.slots.memory_bytes()
            + self.leaves.capacity() * size_of::<EntryId>()
            + self.ghosts.memory_bytes()
            + self.rates.memory_bytes()
    }
}
