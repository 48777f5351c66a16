//! A hash table in parts, which grows by one part at a time: no insertion moves more than a part of it (linear hashing:
//! Litwin, VLDB 1980).
//!
//! Invariant: a value lies in the part that its hash names. It is named by as many bits as there are parts for; where that
//! part is not there yet, by one bit less.
//!
//! One table was the alternative: where it grows, one insertion moves all of it, which at a million values held a lock
//! for tens of milliseconds. 256 parts from the beginning lost, too: the first look-ups of a small cache, which find nothing of
//! it in the processor's caches, then touch a part each.

use hashbrown::HashTable;

/// Values of a part on average, when one more part is made. Parts have from one to two times as many, which fit
/// tables of 512 and 1,024 buckets.
const PART_VALUES: usize = 400;
/// The part is named by these bits of the hash and those above: within a part the table goes by the lowest and the highest.
const PART_SHIFT: u32 = 40;
/// A place is the number of a part, and behind it that of a bucket.
#[cfg(feature = "disk")]
const BUCKET_BITS: u32 = 40;

/// Values that know their own hash.
#[derive(Debug)]
pub(crate) struct Table<T> {
    /// At least one.
    parts: Vec<HashTable<T>>,
    /// One less than the next power of two from the number of parts on.
    mask: usize,
    len: usize,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self { parts: vec![HashTable::new()], mask: 0, len: 0 }
    }
}

impl<T> Table<T> {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn find(&self, hash: u64, is_it: impl FnMut(&T) -> bool) -> Option<&T> {
        self.parts.get(self.part_of(hash))?.find(hash, is_it)
    }

    pub(crate) fn find_mut(&mut self, hash: u64, is_it: impl FnMut(&T) -> bool) -> Option<&mut T> {
        let part = self.part_of(hash);
        self.parts.get_mut(part)?.find_mut(hash, is_it)
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.parts.iter_mut().flatten()
    }

    /// Adds a value that is not there. `rehash` gives the hash of any value.
    pub(crate) fn insert_unique(&mut self, hash: u64, value: T, rehash: impl Fn(&T) -> u64) {
        if self.len >= self.parts.len() * PART_VALUES {
            self.split(&rehash);
        }
        let part = self.part_of(hash);
        let Some(part) = self.parts.get_mut(part) else { return };
        part.insert_unique(hash, value, rehash);
        self.len += 1;
    }

    pub(crate) fn remove(&mut self, hash: u64, is_it: impl FnMut(&T) -> bool) -> Option<T> {
        let part = self.part_of(hash);
        let (value, _) = self.parts.get_mut(part)?.find_entry(hash, is_it).ok()?.remove();
        self.len -= 1;
        Some(value)
    }

    /// Bytes of memory that are reserved.
    pub(crate) fn allocation_size(&self) -> usize {
        let headers = self.parts.capacity() * size_of::<HashTable<T>>();
        self.parts.iter().map(HashTable::allocation_size).sum::<usize>() + headers
    }

    /// The part of a hash.
    fn part_of(&self, hash: u64) -> usize {
        let part = (hash >> PART_SHIFT) as usize & self.mask;
        if part < self.parts.len() { part } else { part & (self.mask >> 1) }
    }

    /// Makes one part more, of values that one part had for two.
    fn split(&mut self, rehash: impl Fn(&T) -> u64) {
        let new = self.parts.len();
        self.mask = (new + 1).next_power_of_two() - 1;
        let both = self.parts.get_mut(new & (self.mask >> 1)).map(std::mem::take).unwrap_or_default();
        // Halves are not quite equal, and no half is to grow now.
        let half = both.len() / 2 + both.len() / 16;
        self.parts.push(HashTable::with_capacity(half));
        if let Some(old) = self.parts.get_mut(new & (self.mask >> 1)) {
            *old = HashTable::with_capacity(half);
        }
        for value in both {
            let hash = rehash(&value);
            let part = self.part_of(hash);
            if let Some(part) = self.parts.get_mut(part) {
                part.insert_unique(hash, value, &rehash);
            }
        }
    }
}

/// To look at all values in slices. Where the table grows meanwhile, a walk may pass over some and see some twice.
#[cfg(feature = "disk")]
impl<T> Table<T> {
    /// Makes room for so many more at once, with a little to spare: no part has exactly its share.
    pub(crate) fn reserve(&mut self, values: usize, rehash: impl Fn(&T) -> u64) {
        let all = self.len + values;
        while self.parts.len() * PART_VALUES < all {
            self.split(&rehash);
        }
        let each = all / self.parts.len() + all / self.parts.len() / 8;
        self.parts.iter_mut().for_each(|part| part.reserve(each.saturating_sub(part.len()), &rehash));
    }

    #[cfg(test)]
    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.parts.iter().flatten()
    }

    /// The value at a place, if there is one. The first place is 0.
    pub(crate) fn at(&self, place: u64) -> Option<&T> {
        let (part, bucket) = part_and_bucket(place);
        self.parts.get(part)?.get_bucket(bucket)
    }

    pub(crate) fn remove_at(&mut self, place: u64) -> Option<T> {
        let (part, bucket) = part_and_bucket(place);
        let (value, _) = self.parts.get_mut(part)?.get_bucket_entry(bucket).ok()?.remove();
        self.len -= 1;
        Some(value)
    }

    /// The place behind one; `None` behind the last.
    pub(crate) fn after(&self, place: u64) -> Option<u64> {
        let (part, bucket) = part_and_bucket(place);
        if self.parts.get(part).is_some_and(|part| bucket + 1 < part.num_buckets()) {
            return Some(place + 1);
        }
        let behind = self.parts.iter().enumerate().skip(part + 1);
        let next = behind.filter(|(_, part)| part.num_buckets() > 0).map(|(number, _)| number).next()?;
        Some((next as u64) << BUCKET_BITS)
    }
}

#[cfg(feature = "disk")]
fn part_and_bucket(place: u64) -> (usize, usize) {
    ((place >> BUCKET_BITS) as usize, (place & ((1 << BUCKET_BITS) - 1)) as usize)
}

#[cfg(all(test, feature = "disk"))]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn hash(value: &u64) -> u64 {
        value.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ value.rotate_left(29)
    }

    /// Against a plain map, with removals of both kinds and looks at all of it in between.
    #[test]
    fn what_is_in_it_is_found_and_a_walk_sees_each_value_once() {
        let (mut table, mut map) = (Table::default(), HashMap::new());
        let mut state = 7u64;
        for round in 0..40_000u64 {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            let value = state >> 50;
            if map.insert(value, round).is_none() {
                assert!(table.find(hash(&value), |other| *other == value).is_none());
                table.insert_unique(hash(&value), value, hash);
            } else if state & 1 == 0 {
                map.remove(&value);
                assert_eq!(table.remove(hash(&value), |other| *other == value), Some(value));
            }
            if round % 8_000 == 0 {
                let (mut seen, mut place, mut places) = (Vec::new(), Some(0), 0);
                while let Some(at) = place {
                    seen.extend(table.at(at).copied());
                    place = table.after(at);
                    places += 1;
                }
                seen.sort_unstable();
                let mut all: Vec<u64> = map.keys().copied().collect();
                all.sort_unstable();
                assert!(seen == all && places >= all.len() && table.len() == map.len());
                assert_eq!(table.iter().count(), map.len());
            }
        }
        let mut place = Some(0);
        while let Some(at) = place {
            if let Some(value) = table.remove_at(at) {
                assert!(map.remove(&value).is_some());
            }
            place = table.after(at);
        }
        assert!(map.is_empty() && table.len() == 0 && table.remove_at(0).is_none());
    }

    /// Where one table grows, one insertion moved all of a million values.
    #[test]
    fn no_insertion_moves_more_than_a_part() {
        let mut table = Table::default();
        let moved = std::cell::Cell::new(0);
        let mut most = 0;
        for value in 0..200_000u64 {
            moved.set(0);
            table.insert_unique(hash(&value), value, |value| {
                moved.set(moved.get() + 1);
                hash(value)
            });
            most = most.max(moved.get());
        }
        assert!((100..200_000 / 100).contains(&most), "{most} at once");
    }
}
