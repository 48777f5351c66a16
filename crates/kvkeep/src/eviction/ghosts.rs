//! What was evicted not long ago, bounded: exactly and in order ([`Ghosts`]), or small and
//! about in order ([`Buckets`]).
//!
//! In the exact one a tag that was taken back leaves a gap in the queue; the queue is swept when
//! a third of it is gaps. Tags have 32 bits: one eviction in some ten thousand is taken for
//! another one, which costs a policy nothing but a good guess.

use std::collections::VecDeque;

use hashbrown::HashTable;

/// Exact, and 10 to 22 bytes each: a queue of tags, and a table of their places in it.
#[derive(Debug)]
pub(super) struct Ghosts {
    /// Places, counted from the first eviction since the last sweep.
    table: HashTable<u32>,
    /// Oldest first; 0 is a gap.
    queue: VecDeque<u32>,
    /// The place of the oldest.
    first: u32,
}

impl Ghosts {
    pub(super) fn new() -> Self {
        Self { table: HashTable::new(), queue: VecDeque::new(), first: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.table.len()
    }

    /// Remembers an eviction.
    pub(super) fn add(&mut self, tag: u32) {
        self.take(tag);
        if self.queue.len() > self.len() + self.len() / 2 + 16 {
            self.sweep();
        }
        let Self { table, queue, first } = self;
        let place = first.wrapping_add(u32::try_from(queue.len()).unwrap_or(0));
        queue.push_back(tag);
        table.insert_unique(hash(tag), place, |place| hash(at(queue, *first, *place)));
    }

    /// Was it evicted not long ago? Forgets it.
    pub(super) fn take(&mut self, tag: u32) -> bool {
        let Self { table, queue, first } = self;
        let Ok(found) = table.find_entry(hash(tag), |place| at(queue, *first, *place) == tag) else { return false };
        let (place, _) = found.remove();
        if let Some(gap) = queue.get_mut(place.wrapping_sub(*first) as usize) {
            *gap = 0;
        }
        true
    }

    /// Forgets the oldest beyond `max`.
    pub(super) fn shrink(&mut self, max: usize) {
        while self.table.len() > max {
            let Some(tag) = self.queue.front().copied() else { return };
            if tag != 0 {
                self.take(tag);
            }
            self.queue.pop_front();
            self.first = self.first.wrapping_add(1);
        }
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.table.allocation_size() + self.queue.capacity() * size_of::<u32>()
    }

    /// Closes the gaps, and gives back room that is not needed any more.
    fn sweep(&mut self) {
        let Self { table, queue, first } = self;
        queue.retain(|tag| *tag != 0);
        queue.shrink_to(queue.len() + queue.len() / 2);
        table.clear();
        table.shrink_to(queue.len(), |_| 0);
        *first = 0;
        for (place, tag) in (0u32..).zip(queue.iter()) {
            table.insert_unique(hash(*tag), place, |place| hash(at(queue, 0, *place)));
        }
    }
}

fn at(queue: &VecDeque<u32>, first: u32, place: u32) -> u32 {
    queue.get(place.wrapping_sub(first) as usize).copied().unwrap_or(0)
}

/// 32 bits that stand for a key of which 64 are known; never 0.
pub(super) fn tag(fingerprint: u64) -> u32 {
    let [a, b, c, d, e, f, g, h] = fingerprint.to_le_bytes();
    (u32::from_le_bytes([a, b, c, d]) ^ u32::from_le_bytes([e, f, g, h]).rotate_left(7)).max(1)
}

/// Tags are uniform; a table wants its bits in the upper half too.
fn hash(tag: u32) -> u64 {
    u64::from(tag).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Some of what was evicted: 8 bytes each, in buckets of `BUCKET` from the newest to the oldest.
/// The larger the buckets, the nearer to one queue, and the longer the search.
#[derive(Debug, Default)]
pub(super) struct Buckets<const BUCKET: usize> {
    ghosts: Vec<Ghost>,
    cursor: usize,
}

/// A key's tag (0: nobody), and when it was used last; a policy may keep a note in the lowest bits. Two numbers, because a list
/// of such zeros comes from the system as it is: it is made in no time, under the lock, for a million of them, too.
type Ghost = [u32; 2];

impl<const BUCKET: usize> Buckets<BUCKET> {
    /// Remembers an eviction among `wanted` others.
    pub(super) fn add(&mut self, tag: u32, last: u32, wanted: usize) {
        // When the cache has grown, what is known starts anew: it grows while nothing is evicted.
        let wanted = wanted.div_ceil(BUCKET).max(1) * BUCKET;
        if wanted > self.ghosts.len() + self.ghosts.len() / 4 {
            self.ghosts = vec![[0; 2]; wanted];
            self.cursor = 0;
        }
        let bucket = self.bucket(tag);
        let end = bucket.iter().position(|[tag, _]| *tag == 0).unwrap_or(BUCKET - 1);
        if let Some(newer) = bucket.get_mut(..=end) {
            newer.rotate_right(1);
            newer.iter_mut().take(1).for_each(|first| *first = [tag, last]);
        }
    }

    /// When it was used last, if that is remembered. Forgets it.
    pub(super) fn take(&mut self, tag: u32) -> Option<u32> {
        if tag == 0 {
            return None;
        }
        self.bucket(tag).iter_mut().find(|[of, _]| *of == tag).map(|ghost| std::mem::take(ghost)[1])
    }

    /// The next place, if somebody is there.
    pub(super) fn look(&mut self) -> Option<u32> {
        self.cursor = if self.cursor + 1 < self.ghosts.len() { self.cursor + 1 } else { 0 };
        self.ghosts.get(self.cursor).filter(|[tag, _]| *tag != 0).map(|[_, last]| *last)
    }

    /// Places, taken or not.
    pub(super) fn places(&self) -> usize {
        self.ghosts.len()
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.ghosts.capacity() * size_of::<Ghost>()
    }

    fn bucket(&mut self, tag: u32) -> &mut [Ghost] {
        let buckets = (self.ghosts.len() / BUCKET) as u64;
        let bucket = (u64::from(tag.wrapping_mul(0x9e37_79b1)) * buckets) >> 32;
        let first = usize::try_from(bucket).unwrap_or(0) * BUCKET;
        self.ghosts.get_mut(first..first + BUCKET).unwrap_or_default()
    }
}
