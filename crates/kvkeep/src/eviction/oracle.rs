//! The adaptive policy written a second time, as plainly as can be: no lists, no packed bytes, no
//! counts that are kept up to date; whatever is asked is searched for. Both make the same draws,
//! so every victim has to be the same. What a block is worth is checked apart from that, against
//! all ages at which one could stop waiting.

use std::collections::HashMap;

use super::ghosts::tag;
use super::rates::{Kind, Rates};
use super::{Arrival, Departure, EntryId, Place, Policy, PolicyKind};

const DRAWN: usize = 4;
const KEPT: usize = 6;
const BUCKET: usize = 8;
const REMEMBERED: usize = 2;

#[derive(Clone, Copy)]
struct Block {
    tag: u32,
    /// The slot of the block before it, and which of that slot's tenants it is.
    parent: Option<(usize, u64)>,
    kind: Kind,
    touches: u8,
    last: u32,
    held: bool,
}

#[derive(Clone, Copy)]
struct Ghost {
    tag: u32,
    kind: Kind,
    last: u32,
}

#[derive(Default)]
struct Plain {
    rates: Option<Rates>,
    slots: Vec<Option<Block>>,
    /// How many tenants each slot has lost.
    tenants: HashMap<usize, u64>,
    leaves: Vec<usize>,
    buckets: Vec<[Option<Ghost>; BUCKET]>,
    ghost_cursor: usize,
    cursor: usize,
    clock: u32,
    now: u32,
    random: u64,
    candidates: Vec<usize>,
}

impl Plain {
    fn new() -> Self {
        Self { rates: Some(Rates::new()), random: 0x9e37_79b9_7f4a_7c15, ..Self::default() }
    }

    fn rates(&mut self) -> &mut Rates {
        self.rates.as_mut().unwrap()
    }

    fn tenant(&self, slot: usize) -> u64 {
        self.tenants.get(&slot).copied().unwrap_or(0)
    }

    fn is_leaf(&self, slot: usize) -> bool {
        let me = (slot, self.tenant(slot));
        let free = self.slots[slot].is_some_and(|block| !block.held);
        free && !self.slots.iter().flatten().any(|block| block.parent == Some(me))
    }

    fn find_leaves(&mut self) {
        while let Some(at) = self.leaves.iter().position(|slot| !self.is_leaf(*slot)) {
            self.leaves.swap_remove(at);
        }
        let new = (0..self.slots.len()).filter(|slot| self.is_leaf(*slot) && !self.leaves.contains(slot));
        self.leaves.extend(new.collect::<Vec<_>>());
    }

    fn tick(&mut self) {
        let blocks = self.clock - self.now;
        self.rates().ended(blocks);
        self.now = self.clock;
    }

    fn look_around(&mut self) {
        let (now, all) = (self.now, self.slots.len());
        self.clock += 1;
        self.cursor = if self.cursor + 1 < all { self.cursor + 1 } else { 0 };
        if let Some(block) = self.slots.get(self.cursor).copied().flatten() {
            self.rates().waits(block.kind, now - block.last, u32::try_from(all).unwrap());
        }
        let places = self.buckets.len() * BUCKET;
        self.ghost_cursor = if self.ghost_cursor + 1 < places { self.ghost_cursor + 1 } else { 0 };
        let (bucket, place) = (self.ghost_cursor / BUCKET, self.ghost_cursor % BUCKET);
        if let Some(ghost) = self.buckets.get(bucket).and_then(|bucket| bucket[place]) {
            self.rates().waits(ghost.kind, now - ghost.last, u32::try_from(places).unwrap());
        }
        let known = self.slots.iter().flatten().count() + places;
        self.rates().learn(known);
    }

    fn bucket(&mut self, tag: u32) -> Option<&mut [Option<Ghost>; BUCKET]> {
        let number = (u64::from(tag.wrapping_mul(0x9e37_79b1)) * self.buckets.len() as u64) >> 32;
        self.buckets.get_mut(usize::try_from(number).unwrap())
    }

    fn insert_run(&mut self, run: &[(EntryId, Arrival)]) {
        let (mut known_blocks, mut known_touches) = (0, 0);
        for (_, arrival) in run {
            let tag = tag(arrival.fingerprint);
            let ghost = self.bucket(tag).and_then(|bucket| {
                bucket.iter_mut().find(|ghost| ghost.is_some_and(|ghost| ghost.tag == tag)).and_then(Option::take)
            });
            if let Some(ghost) = ghost {
                let age = self.now - ghost.last;
                self.rates().reused(ghost.kind, age);
                (known_blocks, known_touches) = (arrival.place.depth + 1, ghost.kind.touches() + 1);
            }
        }
        for (id, arrival) in run.iter().rev() {
            self.look_around();
            let place = Place { found: arrival.place.found.max(known_blocks), ..arrival.place };
            let touches = if place.depth < known_blocks { known_touches } else { 0 };
            let parent = arrival.parent.map(|parent| (parent as usize, self.tenant(parent as usize)));
            let (tag, kind, last) = (tag(arrival.fingerprint), Kind::of(touches, place), self.now);
            let slot = *id as usize;
            self.slots.resize(self.slots.len().max(slot + 1), None);
            self.slots[slot] = Some(Block { tag, parent, kind, touches, last, held: false });
            self.find_leaves();
        }
    }

    fn touch(&mut self, id: EntryId, place: Place) {
        self.look_around();
        let block = self.slots[id as usize].unwrap();
        let age = self.now - block.last;
        self.rates().reused(block.kind, age);
        let touches = (block.touches + 1).min(15);
        let kind = Kind::of(touches, place);
        self.slots[id as usize] = Some(Block { touches, kind, last: self.now, ..block });
    }

    fn set_held(&mut self, id: EntryId, held: bool) {
        self.slots[id as usize].as_mut().unwrap().held = held;
        self.find_leaves();
    }

    fn remove(&mut self, id: EntryId) {
        let gone = self.slots[id as usize].take().unwrap();
        *self.tenants.entry(id as usize).or_default() += 1;
        self.find_leaves();
        self.remember(Ghost { tag: gone.tag, kind: gone.kind, last: gone.last / 64 * 64 });
        if let Some((slot, _)) = gone.parent.filter(|(slot, tenant)| self.tenant(*slot) == *tenant) {
            self.candidates.truncate(KEPT);
            self.candidates.push(slot);
        }
    }

    fn remember(&mut self, ghost: Ghost) {
        let wanted = (REMEMBERED * self.slots.iter().flatten().count()).div_ceil(BUCKET).max(1) * BUCKET;
        let places = self.buckets.len() * BUCKET;
        if wanted > places + places / 4 {
            self.buckets = vec![[None; BUCKET]; wanted / BUCKET];
            self.ghost_cursor = 0;
        }
        let bucket = self.bucket(ghost.tag).unwrap();
        let end = bucket.iter().position(Option::is_none).unwrap_or(BUCKET - 1);
        bucket[..=end].rotate_right(1);
        bucket[0] = Some(ghost);
    }

    fn draw(&mut self) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let place = ((self.random >> 32) * self.leaves.len() as u64) >> 32;
        self.leaves[usize::try_from(place).unwrap()]
    }

    fn victim(&mut self) -> Option<EntryId> {
        if self.leaves.len() <= KEPT + DRAWN {
            self.candidates.clone_from(&self.leaves);
        } else {
            for _ in 0..DRAWN {
                let leaf = self.draw();
                self.candidates.push(leaf);
            }
        }
        let mut judged: Vec<(f32, u32, usize)> = Vec::new();
        for slot in std::mem::take(&mut self.candidates) {
            if self.leaves.contains(&slot) && judged.iter().all(|(.., other)| *other != slot) {
                let Block { kind, last, .. } = self.slots[slot].unwrap();
                let age = self.now - last;
                judged.push((self.rates().worth(kind, age), age, slot));
            }
        }
        judged.sort_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)));
        self.candidates = judged.into_iter().map(|(.., slot)| slot).take(KEPT).collect();
        let any = || self.slots.iter().position(|slot| slot.is_some_and(|block| !block.held));
        let chosen = self.candidates.first().copied().or_else(any)?;
        Some(EntryId::try_from(chosen).unwrap())
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

/// Both policies, as the store drives them: what a request finds is held until the rest is stored.
struct Pair {
    policy: Box<dyn Policy>,
    plain: Plain,
    index: HashMap<u64, EntryId>,
    free: Vec<EntryId>,
    evicted: usize,
}

impl Pair {
    fn request(&mut self, blocks: &[u64]) {
        self.policy.tick();
        self.plain.tick();
        let found: Vec<EntryId> = blocks.iter().map_while(|block| self.index.get(block).copied()).collect();
        let place = |depth| Place::of(depth, blocks.len(), found.len());
        found.iter().for_each(|id| self.set_held(*id, true));
        for (depth, id) in found.iter().enumerate() {
            self.policy.touch(*id, place(depth));
            self.plain.touch(*id, place(depth));
        }
        let mut run = Vec::new();
        let mut parent = found.last().copied();
        for (depth, block) in blocks.iter().enumerate().skip(found.len()) {
            // What is there behind a gap keeps its parent.
            let id = match self.index.get(block) {
                Some(id) => *id,
                None => {
                    let Some(id) = self.room() else { break };
                    let fingerprint = (block + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                    run.push((id, *block, Arrival { fingerprint, parent, place: place(depth) }));
                    id
                }
            };
            parent = Some(id);
        }
        self.index.extend(run.iter().map(|(id, block, _)| (*block, *id)));
        let run: Vec<(EntryId, Arrival)> = run.into_iter().map(|(id, _, arrival)| (id, arrival)).collect();
        self.policy.insert_run(&run);
        self.plain.insert_run(&run);
        found.iter().rev().for_each(|id| self.set_held(*id, false));
    }

    fn set_held(&mut self, id: EntryId, held: bool) {
        if held {
            self.policy.hold(id);
        } else {
            self.policy.release(id);
        }
        self.plain.set_held(id, held);
    }

    fn room(&mut self) -> Option<EntryId> {
        if let Some(id) = self.free.pop() {
            return Some(id);
        }
        let victim = self.policy.victim();
        assert_eq!(victim, self.plain.victim(), "after {} evictions", self.evicted);
        let id = victim?;
        self.policy.remove(id, Departure::Evicted);
        self.plain.remove(id);
        self.index.retain(|_, other| *other != id);
        self.evicted += 1;
        Some(id)
    }
}

#[test]
fn every_victim_of_the_adaptive_policy_is_that_of_a_plain_one() {
    for seed in 0..4 {
        let mut random = Random(seed);
        let capacity: EntryId = [12, 30, 45, 60][usize::try_from(seed).unwrap()];
        let mut pair = Pair {
            policy: PolicyKind::Adaptive.make(),
            plain: Plain::new(),
            index: HashMap::new(),
            free: (0..capacity).rev().collect(),
            evicted: 0,
        };
        for _ in 0..500 {
            // Sessions that grow, under a few prompts that they share; some never come back.
            let sessions = 40 + 8 * random.below(6);
            let session = random.below(sessions);
            let length = 2 + random.below(4) + session % 5;
            let shared = (0..2).map(|depth| (session % 3) << 8 | depth);
            let own = (2..length).map(|depth| (session + 1) << 16 | depth);
            pair.request(&shared.chain(own).collect::<Vec<_>>());
        }
        assert!(pair.evicted > 300, "{}", pair.evicted);
    }
}

/// Where the bins of ages begin: one for each doubling from 128 touches on.
fn begins() -> Vec<f64> {
    std::iter::once(1.0).chain((1..=26).map(|bin| 64.0 * 2f64.powi(bin))).collect()
}

/// The best uses per time over all bins at whose end one could stop waiting.
fn best(rates: &[f64], begins: &[f64]) -> f64 {
    let (mut uses, mut time, mut left, mut best) = (0.0, 0.0, 1.0, 0.0f64);
    for (rate, bounds) in rates.iter().zip(begins.windows(2)) {
        let stays = (-rate * (bounds[1] - bounds[0])).exp();
        uses += left * (1.0 - stays);
        time += left * (1.0 - stays) / rate;
        left *= stays;
        best = best.max(uses / time);
    }
    best
}

#[test]
fn what_a_block_is_worth_is_the_best_of_all_ages_at_which_to_stop_waiting() {
    const BINS: usize = 26;
    let begins = begins();
    let (mut random, mut rates) = (Random(3), Rates::new());
    // Bins for all ages.
    (0..512).for_each(|_| rates.learn(1 << 30));
    // Two kinds of one family, which differ in the length of the request alone; one of another family, touched as
    // often; and one that was never touched.
    let kinds = [(1, 6, 6), (1, 100, 100), (1, 100, 0), (0, 100, 0)]
        .map(|(touches, blocks, found)| Kind::of(touches, Place { depth: 0, blocks, found }));
    let mut sums = [[(0.0f64, 0.0f64); BINS]; 4];
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an age below 2^32")]
    let age = |bin: usize| begins[bin] as u32;
    for _ in 0..9_000 {
        let which = usize::try_from(random.below(4)).unwrap();
        let bin = usize::try_from(random.below(if which == 0 { 13 } else { 16 })).unwrap();
        let waited = u32::try_from(random.below(9_000)).unwrap();
        rates.reused(kinds[which], age(bin));
        rates.waits(kinds[which], age(bin), waited);
        rates.ended(30);
        sums[which][bin].0 += 1.0;
        sums[which][bin].1 += f64::from(waited);
    }
    (0..600).for_each(|_| rates.learn(1 << 30));
    let lean = 0.5 * 30.0;
    let leaning = |(uses, waited): (f64, f64), rate: f64| (uses + lean) / (waited + lean / rate);
    // A quarter of what is seen in a bin counts in each of its neighbours.
    let spread = |which: usize, bin: usize| {
        let near = [(Some(bin), 1.0), (bin.checked_sub(1), 0.25), (Some(bin + 1), 0.25)];
        let near = near.into_iter().filter_map(|(bin, part)| Some((sums[which].get(bin?)?, part)));
        near.fold((0.0, 0.0), |sum, (seen, part)| (sum.0 + part * seen.0, sum.1 + part * seen.1))
    };
    let together = |kinds: &[usize], bin: usize| {
        let sums = kinds.iter().map(|which| spread(*which, bin));
        sums.fold((0.0, 0.0), |sum, (uses, waited)| (sum.0 + uses, sum.1 + waited))
    };
    let families: [&[usize]; 4] = [&[0, 1], &[0, 1], &[2], &[3]];
    let touched_alike: [&[usize]; 4] = [&[0, 1, 2], &[0, 1, 2], &[0, 1, 2], &[3]];
    for (which, kind) in kinds.into_iter().enumerate() {
        let of_bin = |bin: usize| {
            let common = leaning(together(&[0, 1, 2, 3], bin), 0.1 / begins[bin]);
            let touched = leaning(together(touched_alike[which], bin), common);
            leaning(spread(which, bin), leaning(together(families[which], bin), touched))
        };
        let expected: Vec<f64> = (0..BINS).map(of_bin).collect();
        let near = |worth: f32, best: f64| (f64::from(worth) - best).abs() < 0.01 * best;
        for bin in 1..BINS - 1 {
            let (here, next) = (best(&expected[bin..], &begins[bin..]), best(&expected[bin + 1..], &begins[bin + 1..]));
            let worth = rates.worth(kind, age(bin));
            assert!(near(worth, here), "kind {which}, bin {bin}: {worth} for {here}");
            let between = rates.worth(kind, age(bin) + age(bin) / 4);
            assert!(near(between, 0.75 * here + 0.25 * next), "kind {which}, after bin {bin}: {between}");
        }
    }
}

/// A cache for 500 blocks read long prompts that never came back. Each kind of block that was never used had to learn
/// by itself that it is not worth keeping: over 1,500 requests, adaptive hit 2 points less than LRU-2.
#[test]
fn what_never_used_blocks_did_is_known_of_every_kind_of_them() {
    let mut rates = Rates::new();
    let kind = |touches, blocks| Kind::of(touches, Place { depth: 0, blocks, found: 0 });
    for _ in 0..512 {
        rates.ended(100);
        [0, 1].iter().for_each(|touches| rates.waits(kind(*touches, 100), 400, 500));
        rates.reused(kind(1, 100), 400);
        rates.learn(500);
    }
    let unseen = |touches| rates.worth(Kind::of(touches, Place { depth: 0, blocks: 6, found: 6 }), 400);
    assert!(unseen(0) < 0.5 * unseen(1), "{} for {}", unseen(0), unseen(1));
}
