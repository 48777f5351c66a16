//! The disk tier without bytes: the same segments, evicted in the same order, with the same records written again.
//!
//! A policy of its own, which evicts block by block, was the alternative: it hits up to 15 points more than a log of
//! segments does, and what a replay promises must be what a cache keeps.

use std::collections::VecDeque;

use hashbrown::HashTable;

use crate::key::ObjectKey;

/// As the log does it: segments of a cap, and of a new segment the part that may be written again.
const SEGMENTS: usize = 32;
const REINSERT_PARTS: (usize, usize) = (3, 4);

#[derive(Debug)]
pub(super) struct Segments {
    capacity_blocks: usize,
    segment_blocks: usize,
    records: HashTable<Record>,
    /// Oldest first; the last one is being written.
    segments: VecDeque<Segment>,
    next: u64,
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
struct Record {
    key: ObjectKey,
    segment: u64,
    /// What it was written as.
    mark: u8,
    last_used: u64,
}

impl Segments {
    pub(super) fn new(capacity_blocks: usize) -> Self {
        Self {
            capacity_blocks,
            segment_blocks: (capacity_blocks / SEGMENTS).max(1),
            records: HashTable::new(),
            segments: VecDeque::new(),
            next: 0,
            clock: 0,
            mean_age: None,
            written_blocks: 0,
            reinserted_blocks: 0,
        }
    }

    pub(super) fn holds(&self, key: &ObjectKey) -> bool {
        self.records.find(key.table_hash(), |record| record.key == *key).is_some()
    }

    /// Reads a record; gives its mark.
    pub(super) fn read(&mut self, key: &ObjectKey) -> Option<u8> {
        let record = self.records.find_mut(key.table_hash(), |record| record.key == *key)?;
        self.clock += 1;
        record.last_used = self.clock;
        Some(record.mark)
    }

    /// Writes what RAM hands down, unless it is here; says whether it is new. `resident` says what is in RAM.
    pub(super) fn offer(&mut self, key: ObjectKey, mark: u8, resident: impl Fn(&ObjectKey) -> bool) -> bool {
        if self.holds(&key) {
            return false;
        }
        if !self.has_room() {
            self.rotate(resident);
        }
        self.clock += 1;
        self.append(Record { key, segment: 0, mark, last_used: self.clock });
        self.written_blocks += 1;
        true
    }

    fn has_room(&self) -> bool {
        self.segments.back().is_some_and(|active| active.keys.len() < self.segment_blocks)
    }

    fn append(&mut self, record: Record) {
        let Some(active) = self.segments.back_mut() else { return };
        active.keys.push(record.key);
        let record = Record { segment: active.number, ..record };
        self.records.insert_unique(record.key.table_hash(), record, |record| record.key.table_hash());
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
            let is_here = |record: &Record| record.key == key && record.segment == oldest.number;
            let Ok(found) = self.records.find_entry(key.table_hash(), is_here) else { continue };
            let record = found.remove().0;
            let (is_resident, age) = (resident(&key), self.clock - record.last_used);
            if is_resident || age < mean_age {
                kept.push((if is_resident { 0 } else { age }, record));
            }
        }
        kept.sort_by_key(|(age, _)| *age);
        let budget = self.segment_blocks / REINSERT_PARTS.1 * REINSERT_PARTS.0;
        for (_, record) in kept.into_iter().take(budget) {
            if self.has_room() {
                self.append(record);
                self.reinserted_blocks += 1;
            }
        }
        let ages: u64 = self.records.iter().map(|record| self.clock - record.last_used).sum();
        self.mean_age = ages.checked_div(self.records.len() as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_go_what_is_used_stays_and_the_capacity_holds() {
        let mut disk = Segments::new(320);
        let (hot, cold, in_ram) = (ObjectKey::numbered(9_000), ObjectKey::numbered(9_001), ObjectKey::numbered(9_002));
        [hot, cold, in_ram].into_iter().for_each(|key| assert!(disk.offer(key, 7, |_| false)));
        for number in 0..5_000 {
            disk.offer(ObjectKey::numbered(number), 0, |key| *key == in_ram);
            assert_eq!(disk.read(&hot), Some(7));
            assert!(disk.records.len() <= 320);
        }
        assert!(disk.holds(&hot) && disk.holds(&in_ram) && !disk.holds(&cold));
        assert!(disk.records.len() > 280, "{}", disk.records.len());
        assert!(disk.reinserted_blocks > 10 && disk.written_blocks == 5_003);
    }
}
