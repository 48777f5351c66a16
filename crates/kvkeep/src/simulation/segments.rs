//! The disk tier without bytes: the same segments, evicted in the same order, with the same records written again.
//!
//! A policy of its own, which evicts block by block, was the alternative: it hits up to 15 points more than a log of
//! segments does, and what a replay promises must be what a cache keeps.

use std::collections::{HashMap, VecDeque};

use crate::key::ObjectKey;

/// As the log does it: segments of a cap, and of a new segment the part that may be written again.
const SEGMENTS: usize = 32;
const REINSERT_PARTS: (usize, usize) = (3, 4);

#[derive(Debug)]
pub(super) struct Segments {
    capacity_blocks: usize,
    segment_blocks: usize,
    places: HashMap<ObjectKey, Place>,
    /// Oldest first; the last one is being written.
    segments: VecDeque<Segment>,
    next: u64,
    /// Records that are in RAM and were not written again when their segment went: RAM hands them down once more when it
    /// evicts them.
    waiting: HashMap<ObjectKey, u8>,
    /// Records written and reads.
    clock: u64,
    /// Of all records, when a segment last went.
    mean_age: Option<u64>,
    pub(super) written_blocks: u64,
    pub(super) reinserted_blocks: u64,
}

#[derive(Debug)]
struct Segment {
    number: u64,
    keys: Vec<ObjectKey>,
}

#[derive(Debug, Clone, Copy)]
struct Place {
    segment: u64,
    /// What it was written as.
    kind: u8,
    last_used: u64,
}

impl Segments {
    pub(super) fn new(capacity_blocks: usize) -> Self {
        Self {
            capacity_blocks,
            segment_blocks: (capacity_blocks / SEGMENTS).max(1),
            places: HashMap::new(),
            segments: VecDeque::new(),
            next: 0,
            waiting: HashMap::new(),
            clock: 0,
            mean_age: None,
            written_blocks: 0,
            reinserted_blocks: 0,
        }
    }

    /// Is it here, or will it be handed down when RAM evicts it?
    pub(super) fn holds(&self, key: &ObjectKey) -> bool {
        self.places.contains_key(key) || self.waiting.contains_key(key)
    }

    /// Reads a record; gives its kind.
    pub(super) fn read(&mut self, key: &ObjectKey) -> Option<u8> {
        let place = self.places.get_mut(key)?;
        self.clock += 1;
        place.last_used = self.clock;
        Some(place.kind)
    }

    /// Writes a record. `resident` says what is in RAM.
    pub(super) fn write(&mut self, key: ObjectKey, kind: u8, resident: impl Fn(&ObjectKey) -> bool) {
        if !self.has_room() {
            self.rotate(resident);
        }
        self.clock += 1;
        self.append(key, Place { segment: 0, kind, last_used: self.clock });
        self.written_blocks += 1;
    }

    /// Writes what RAM has evicted meanwhile and is not here any more.
    pub(super) fn take_evicted(&mut self, resident: impl Fn(&ObjectKey) -> bool) {
        let mut evicted: Vec<(ObjectKey, u8)> = self.waiting.extract_if(|key, _| !resident(key)).collect();
        // The same in every run.
        evicted.sort_by_key(|(key, _)| *key.hash());
        for (key, kind) in evicted {
            self.write(key, kind, &resident);
        }
    }

    fn has_room(&self) -> bool {
        self.segments.back().is_some_and(|active| active.keys.len() < self.segment_blocks)
    }

    fn append(&mut self, key: ObjectKey, place: Place) {
        let Some(active) = self.segments.back_mut() else { return };
        active.keys.push(key);
        self.places.insert(key, Place { segment: active.number, ..place });
    }

    fn rotate(&mut self, resident: impl Fn(&ObjectKey) -> bool) {
        // Room for this one, and for one more.
        while self.sealed_blocks() + self.segment_blocks > self.capacity_blocks && !self.segments.is_empty() {
            self.evict_oldest(|_| false);
        }
        self.segments.push_back(Segment { number: self.next, keys: Vec::new() });
        self.next += 1;
        while self.sealed_blocks() + 2 * self.segment_blocks > self.capacity_blocks && self.segments.len() > 1 {
            self.evict_oldest(&resident);
        }
    }

    /// What is dead in a segment takes room until that goes.
    fn sealed_blocks(&self) -> usize {
        let sealed = |segment: &&Segment| segment.number + 1 != self.next || !self.has_room();
        self.segments.iter().filter(sealed).map(|segment| segment.keys.len()).sum()
    }

    /// What is in RAM is written again, and what was used more recently than most.
    fn evict_oldest(&mut self, resident: impl Fn(&ObjectKey) -> bool) {
        let Some(oldest) = self.segments.pop_front() else { return };
        let mean_age = self.mean_age.unwrap_or(self.clock / 2);
        let mut kept = Vec::new();
        for key in oldest.keys {
            let Some(place) = self.places.get(&key).copied().filter(|place| place.segment == oldest.number) else {
                continue;
            };
            self.places.remove(&key);
            let age = self.clock - place.last_used;
            let in_ram = resident(&key);
            if in_ram || age < mean_age {
                kept.push((if in_ram { 0 } else { age }, key, place));
            }
        }
        kept.sort_by_key(|(age, ..)| *age);
        let mut budget = self.segment_blocks / REINSERT_PARTS.1 * REINSERT_PARTS.0;
        for (_, key, place) in kept {
            if budget > 0 && self.has_room() {
                budget -= 1;
                self.append(key, place);
                self.reinserted_blocks += 1;
            } else if resident(&key) {
                self.waiting.insert(key, place.kind);
            }
        }
        let ages: u64 = self.places.values().map(|place| self.clock - place.last_used).sum();
        self.mean_age = ages.checked_div(self.places.len() as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_go_what_is_used_stays_and_the_capacity_holds() {
        let mut disk = Segments::new(320);
        let (hot, cold, in_ram) = (ObjectKey::numbered(9_000), ObjectKey::numbered(9_001), ObjectKey::numbered(9_002));
        [hot, cold, in_ram].into_iter().for_each(|key| disk.write(key, 7, |_| false));
        for number in 0..5_000 {
            disk.write(ObjectKey::numbered(number), 0, |key| *key == in_ram);
            assert_eq!(disk.read(&hot), Some(7));
            assert!(disk.places.len() <= 320);
        }
        assert!(disk.holds(&hot) && disk.holds(&in_ram) && !disk.holds(&cold));
        assert!(disk.places.len() > 280, "{}", disk.places.len());
        assert!(disk.reinserted_blocks > 10 && disk.written_blocks == 5_003);
    }
}
