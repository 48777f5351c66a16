//! Every policy against what it promises, and the classic ones against models so plain that they
//! are plainly right: vectors that are searched from end to end.

use std::collections::HashMap;

use proptest::prelude::*;

use super::{Arrival, Departure, EntryId, Place, Policy, PolicyKind};

/// The policy as a cache of `capacity` keys would drive it.
struct Driven {
    policy: Box<dyn Policy>,
    resident: HashMap<u64, EntryId>,
    keys: HashMap<EntryId, u64>,
    free: Vec<EntryId>,
    capacity: usize,
}

fn fingerprint(key: u64) -> u64 {
    (key + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

impl Driven {
    fn new(kind: PolicyKind, capacity: usize) -> Self {
        let free = (0..EntryId::try_from(capacity).unwrap()).rev().collect();
        Self { policy: kind.make(), resident: HashMap::new(), keys: HashMap::new(), free, capacity }
    }

    /// Was it there?
    fn access(&mut self, key: u64, parent: Option<u64>) -> bool {
        self.policy.tick();
        let place = Place { depth: 0, blocks: 1, found: 0 };
        if let Some(id) = self.resident.get(&key) {
            self.policy.hold(*id);
            self.policy.touch(*id, place);
            self.policy.release(*id);
            return true;
        }
        if self.resident.len() == self.capacity {
            self.evict().unwrap();
        }
        let id = self.free.pop().unwrap();
        let parent = parent.and_then(|parent| self.resident.get(&parent).copied());
        self.policy.insert_run(&[(id, Arrival { fingerprint: fingerprint(key), parent, place })]);
        self.resident.insert(key, id);
        self.keys.insert(id, key);
        false
    }

    fn evict(&mut self) -> Option<u64> {
        let id = self.policy.victim()?;
        assert_eq!(self.policy.victim(), Some(id), "asked again, the answer is the same");
        Some(self.remove(id, Departure::Evicted))
    }

    fn remove(&mut self, id: EntryId, why: Departure) -> u64 {
        self.policy.remove(id, why);
        self.free.push(id);
        let key = self.keys.remove(&id).expect("the victim is resident");
        self.resident.remove(&key);
        key
    }
}

/// A model: says whether the key was there, and keeps at most `capacity`.
trait Model {
    fn access(&mut self, key: u64) -> bool;
}

/// Oldest first.
#[derive(Default)]
struct PlainLru(Vec<u64>, usize);

impl Model for PlainLru {
    fn access(&mut self, key: u64) -> bool {
        let hit = take(&mut self.0, key);
        if !hit && self.0.len() == self.1 {
            self.0.remove(0);
        }
        self.0.push(key);
        hit
    }
}

/// All times at which a key was used; LRU-2 with a memory that never ends.
#[derive(Default)]
struct PlainLru2(HashMap<u64, Vec<u64>>, Vec<u64>, u64, usize);

impl Model for PlainLru2 {
    fn access(&mut self, key: u64) -> bool {
        let Self(times, resident, now, capacity) = self;
        *now += 1;
        let hit = resident.contains(&key);
        if !hit && resident.len() == *capacity {
            let age = |key: &u64| {
                let uses = &times[key];
                (if uses.len() > 1 { uses[uses.len() - 2] } else { 0 }, uses[uses.len() - 1])
            };
            let victim = resident.iter().copied().min_by_key(age).unwrap();
            take(resident, victim);
        }
        if !hit {
            resident.push(key);
        }
        times.entry(key).or_default().push(*now);
        hit
    }
}

/// Queues oldest first, with the uses since a key came into its queue.
#[derive(Default)]
struct PlainS3Fifo {
    small: Vec<(u64, u8)>,
    main: Vec<(u64, u8)>,
    ghosts: Vec<u64>,
    capacity: usize,
}

impl PlainS3Fifo {
    fn evict_main(&mut self) {
        loop {
            let (old, uses) = self.main.remove(0);
            if uses == 0 {
                return;
            }
            self.main.push((old, uses - 1));
        }
    }
}

impl Model for PlainS3Fifo {
    fn access(&mut self, key: u64) -> bool {
        if let Some(found) = self.small.iter_mut().chain(&mut self.main).find(|(other, _)| *other == key) {
            found.1 = (found.1 + 1).min(3);
            return true;
        }
        while self.small.len() + self.main.len() == self.capacity {
            let main_capacity = self.capacity - self.capacity / 10;
            if self.small.len() <= self.capacity / 10 && !self.main.is_empty() {
                self.evict_main();
                continue;
            }
            let (old, uses) = self.small.remove(0);
            if uses > 0 {
                self.main.push((old, 0));
                if self.main.len() > main_capacity {
                    self.evict_main();
                }
            } else {
                self.ghosts.push(old);
                self.ghosts.drain(..self.ghosts.len().saturating_sub(main_capacity));
            }
        }
        let queue = if take(&mut self.ghosts, key) { &mut self.main } else { &mut self.small };
        queue.push((key, 0));
        false
    }
}

/// The four lists of the paper, oldest first, with memories as large as the cache.
#[derive(Default)]
struct PlainArc {
    t1: Vec<u64>,
    t2: Vec<u64>,
    b1: Vec<u64>,
    b2: Vec<u64>,
    p: f64,
    c: usize,
}

impl PlainArc {
    fn replace(&mut self) {
        if self.t1.len() + self.t2.len() < self.c {
            return;
        }
        if !self.t1.is_empty() && (self.t1.len() as f64 > self.p || self.t2.is_empty()) {
            let old = self.t1.remove(0);
            self.b1.push(old);
        } else {
            let old = self.t2.remove(0);
            self.b2.push(old);
        }
        self.b1.drain(..self.b1.len().saturating_sub(self.c));
        self.b2.drain(..self.b2.len().saturating_sub(self.c));
    }
}

impl Model for PlainArc {
    fn access(&mut self, key: u64) -> bool {
        if take(&mut self.t1, key) || take(&mut self.t2, key) {
            self.t2.push(key);
            return true;
        }
        // Room is made before the cache knows what comes, so the border moves afterwards.
        self.replace();
        let (b1, b2) = (self.b1.len() as f64, self.b2.len() as f64);
        if take(&mut self.b1, key) {
            self.p = (self.p + (b2 / b1).max(1.0)).min(self.c as f64);
            self.t2.push(key);
        } else if take(&mut self.b2, key) {
            self.p = (self.p - (b1 / b2).max(1.0)).max(0.0);
            self.t2.push(key);
        } else {
            self.t1.push(key);
        }
        false
    }
}

fn take(list: &mut Vec<u64>, key: u64) -> bool {
    let place = list.iter().position(|other| *other == key);
    place.map(|place| list.remove(place)).is_some()
}

fn agrees(kind: PolicyKind, mut model: impl Model, capacity: usize, keys: &[u64]) -> Result<(), TestCaseError> {
    let mut driven = Driven::new(kind, capacity);
    for (at, key) in keys.iter().enumerate() {
        prop_assert_eq!(driven.access(*key, None), model.access(*key), "{} at access {}", kind.name(), at);
    }
    Ok(())
}

fn keys() -> impl Strategy<Value = Vec<u64>> {
    prop::collection::vec(prop_oneof![0u64..6, 0u64..30], 1..300)
}

proptest! {
    #[test]
    fn lru_agrees_with_a_plain_model(keys in keys(), capacity in 1usize..12) {
        agrees(PolicyKind::Lru, PlainLru(Vec::new(), capacity), capacity, &keys)?;
    }

    #[test]
    fn lru2_agrees_with_a_plain_model(keys in keys(), capacity in 4usize..12) {
        // Larger than the memory of what was evicted could matter.
        agrees(PolicyKind::Lru2, PlainLru2(HashMap::new(), Vec::new(), 0, capacity), capacity, &keys)?;
    }

    #[test]
    fn s3fifo_agrees_with_a_plain_model(keys in keys(), capacity in 2usize..12) {
        agrees(PolicyKind::S3Fifo, PlainS3Fifo { capacity, ..PlainS3Fifo::default() }, capacity, &keys)?;
    }

    #[test]
    fn arc_agrees_with_a_plain_model(keys in keys(), capacity in 2usize..12) {
        agrees(PolicyKind::Arc, PlainArc { c: capacity, ..PlainArc::default() }, capacity, &keys)?;
    }

    /// Whatever happens: what is held stays, what is there goes once, nothing is left over.
    #[test]
    fn what_is_held_is_never_a_victim_and_everything_else_drains(
        ops in prop::collection::vec((0u8..6, 0u64..24), 1..300),
        capacity in 1usize..12,
    ) {
        for kind in PolicyKind::ALL {
            let mut driven = Driven::new(kind, capacity);
            let mut held: Vec<u64> = Vec::new();
            for (op, key) in &ops {
                match (op, driven.resident.get(key).copied()) {
                    (0, Some(id)) if !held.contains(key) && held.len() + 1 < capacity => {
                        driven.policy.hold(id);
                        held.push(*key);
                    }
                    (1, Some(id)) if take(&mut held, *key) => driven.policy.release(id),
                    (2, Some(id)) => {
                        take(&mut held, *key);
                        driven.remove(id, Departure::Removed);
                    }
                    (3.., _) if !held.contains(key) => {
                        driven.access(*key, (*key > 0).then_some(*key / 2));
                    }
                    _ => {}
                }
                if let Some(victim) = driven.policy.victim() {
                    prop_assert!(!held.contains(&driven.keys[&victim]), "{}", kind.name());
                }
            }
            let free = driven.resident.len() - held.len();
            let drained = std::iter::from_fn(|| driven.evict()).count();
            prop_assert_eq!(drained, free, "{}", kind.name());
            for key in held {
                driven.policy.release(driven.resident[&key]);
            }
            std::iter::from_fn(|| driven.evict()).for_each(drop);
            prop_assert!(driven.resident.is_empty(), "{}", kind.name());
        }
    }
}

#[test]
fn the_memory_of_a_policy_is_bounded_by_what_is_resident() {
    // Adaptive's sums do not grow with the cache: below 250 blocks they take more.
    for (kind, capacity) in PolicyKind::ALL.into_iter().flat_map(|kind| [(kind, 250), (kind, 4_000)]) {
        let mut driven = Driven::new(kind, capacity);
        let mut random = 1u64;
        for new in 0..60_000u64 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let key = if random >> 62 == 0 { new } else { (random >> 40) % (capacity as u64 * 3 / 2) };
            driven.access(key, None);
        }
        let each = driven.policy.memory_bytes() / capacity;
        assert!(each < 64, "{}: {each} bytes an entry of {capacity}", kind.name());
    }
}
