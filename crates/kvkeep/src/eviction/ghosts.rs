//! What was evicted not long ago: fingerprints in the order of their eviction, the oldest
//! forgotten first. Bounded by whoever owns it.
//!
//! A fingerprint that was taken back leaves a stale place in the queue, recognised by its
//! number; the queue is swept when more than half of it is stale.

use std::collections::VecDeque;

use hashbrown::HashTable;

use super::rates::Kind;

#[derive(Debug)]
pub(super) struct Ghosts<T = ()> {
    table: HashTable<Ghost<T>>,
    /// Fingerprints and the numbers of their eviction.
    queue: VecDeque<(u64, u32)>,
    next: u32,
}

#[derive(Debug)]
struct Ghost<T> {
    fingerprint: u64,
    number: u32,
    memory: T,
}

impl<T> Ghosts<T> {
    pub(super) fn new() -> Self {
        Self { table: HashTable::new(), queue: VecDeque::new(), next: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.table.len()
    }

    /// Remembers an eviction; the oldest memories beyond `max` go.
    pub(super) fn add(&mut self, fingerprint: u64, memory: T, max: usize) {
        self.take(fingerprint);
        self.next = self.next.wrapping_add(1);
        let number = self.next;
        let ghost = Ghost { fingerprint, number, memory };
        self.table.insert_unique(fingerprint, ghost, |ghost| ghost.fingerprint);
        self.queue.push_back((fingerprint, number));
        self.shrink(max);
    }

    /// What was remembered of it, if it was evicted not long ago. Forgets it.
    pub(super) fn take(&mut self, fingerprint: u64) -> Option<T> {
        let found = self.table.find_entry(fingerprint, |ghost| ghost.fingerprint == fingerprint);
        found.ok().map(|ghost| ghost.remove().0.memory)
    }

    /// Forgets the oldest beyond `max`.
    pub(super) fn shrink(&mut self, max: usize) {
        while self.table.len() > max {
            let Some(oldest) = self.queue.pop_front() else { return };
            if let Ok(ghost) = self.table.find_entry(oldest.0, |ghost| ghost.number == oldest.1) {
                ghost.remove();
            }
        }
        if self.queue.len() > 2 * self.table.len() + 16 {
            let Self { table, queue, .. } = self;
            queue.retain(|old| table.find(old.0, |ghost| ghost.number == old.1).is_some());
        }
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.table.allocation_size() + self.queue.capacity() * size_of::<(u64, u32)>()
    }
}

/// A sample of what was evicted: one key in [`Sampled::RATE`], 8 bytes each, in buckets of eight
/// of which the oldest makes room. As many as there are resident entries, so that the sample
/// reaches back over [`Sampled::RATE`] times as many evictions.
#[derive(Debug, Default)]
pub(super) struct Sampled {
    ghosts: Vec<SampledGhost>,
    cursor: usize,
}

/// A key's tag (0: nobody), and when it was used last and its kind in one word.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct SampledGhost {
    tag: u32,
    last_and_kind: u32,
}

const BUCKET: usize = 8;
/// Bits of a kind; the age gives up as many.
const KIND_BITS: u32 = 6;

impl SampledGhost {
    pub(super) fn kind(self) -> Kind {
        let [number, ..] = (self.last_and_kind & ((1 << KIND_BITS) - 1)).to_le_bytes();
        Kind::from_number(number)
    }

    pub(super) fn age(self, now: u32) -> u32 {
        now.wrapping_sub(self.last_and_kind >> KIND_BITS << KIND_BITS)
    }
}

impl Sampled {
    pub(super) const RATE: u32 = 4;

    /// Remembers an eviction, if it is in the sample.
    pub(super) fn add(&mut self, tag: u32, kind: Kind, last: u32, now: u32, resident: usize) {
        if !Self::samples(tag) {
            return;
        }
        // When the cache has grown, what is known starts anew: it grows while nothing is evicted.
        let wanted = resident.div_ceil(BUCKET) * BUCKET;
        if wanted > self.ghosts.len() + self.ghosts.len() / 4 {
            self.ghosts = vec![SampledGhost::default(); wanted];
            self.cursor = 0;
        }
        let last_and_kind = last >> KIND_BITS << KIND_BITS | u32::from(kind.number());
        let age = |ghost: &SampledGhost| if ghost.tag == 0 { u32::MAX } else { ghost.age(now) };
        if let Some(oldest) = self.bucket(tag).iter_mut().max_by_key(|ghost| age(ghost)) {
            *oldest = SampledGhost { tag, last_and_kind };
        }
    }

    /// What is remembered of it. Forgets it.
    pub(super) fn take(&mut self, tag: u32) -> Option<SampledGhost> {
        if !Self::samples(tag) {
            return None;
        }
        self.bucket(tag).iter_mut().find(|ghost| ghost.tag == tag).map(std::mem::take)
    }

    /// The next place, if somebody is there.
    pub(super) fn look(&mut self) -> Option<SampledGhost> {
        self.cursor = if self.cursor + 1 < self.ghosts.len() { self.cursor + 1 } else { 0 };
        self.ghosts.get(self.cursor).copied().filter(|ghost| ghost.tag != 0)
    }

    /// Evictions that a look at one place stands for.
    pub(super) fn stands_for(&self) -> u32 {
        u32::try_from(self.covers()).unwrap_or(u32::MAX)
    }

    /// Evictions that are covered when the sample is full.
    pub(super) fn covers(&self) -> usize {
        self.ghosts.len() * Self::RATE as usize
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.ghosts.capacity() * size_of::<SampledGhost>()
    }

    fn samples(tag: u32) -> bool {
        tag != 0 && tag.is_multiple_of(Self::RATE)
    }

    fn bucket(&mut self, tag: u32) -> &mut [SampledGhost] {
        let buckets = (self.ghosts.len() / BUCKET) as u64;
        let bucket = (u64::from(tag.wrapping_mul(0x9e37_79b1)) * buckets) >> 32;
        let first = usize::try_from(bucket).unwrap_or(0) * BUCKET;
        self.ghosts.get_mut(first..first + BUCKET).unwrap_or_default()
    }
}
