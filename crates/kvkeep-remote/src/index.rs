//! What this node knows of the store: which objects are there, what they are, and what is not there. Pure: no I/O.
//!
//! Invariants:
//! - What was removed here is not found here, whatever the store still says.
//! - What is counted as used is never less than what lies in the store of what is known here.
//!
//! A Bloom filter was the alternative: it would take a tenth of the memory, and could neither evict nor forget.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::time::{Duration, Instant};

use kvkeep::NamespaceId;
use kvkeep::tiers::{BlockKey, Located};

use crate::store::Listed;

/// How long it is believed that something is not there.
const ABSENT_FOR: Duration = Duration::from_secs(1);
/// Keys more than these are not remembered as absent.
const MAX_ABSENT: usize = 1 << 16;

/// No object is larger, whatever a store says of one: it would drive out all others.
const MAX_OBJECT_BYTES: u64 = 1 << 30;

/// Where a block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Known {
    Here(Located),
    Absent,
    /// The store has to be asked.
    Unknown,
}

/// Keys are hashes already: eight of their bytes are one.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct KeyHasher(u64);

type ByKey<V> = HashMap<BlockKey, V, BuildHasherDefault<KeyHasher>>;

#[derive(Debug, Clone, Copy)]
struct Entry {
    /// Of the object in the store.
    bytes: u64,
    /// What the header says, once it was read.
    located: Option<Located>,
    expires_at_ms: u64,
    /// Did this process write it?
    is_own: bool,
    /// Of its last use.
    number: u64,
}

/// What is known.
#[derive(Debug, Default)]
pub(crate) struct Index {
    entries: ByKey<Entry>,
    /// By last use; what is out of date stays until its turn.
    order: VecDeque<(BlockKey, u64)>,
    last_number: u64,
    used_bytes: u64,
    absent: ByKey<Instant>,
    /// Until then everything that is in the store is known.
    complete_until: Option<Instant>,
}

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        if let Some(first) = bytes.first_chunk::<8>() {
            self.0 ^= u64::from_le_bytes(*first);
        }
    }

    fn write_u32(&mut self, layer: u32) {
        self.0 = self.0.wrapping_add(u64::from(layer).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    }

    fn write_usize(&mut self, _length: usize) {}
}

impl Index {
    /// What is known of a key.
    pub(crate) fn look(&self, key: &BlockKey, now_ms: u64, now: Instant) -> Known {
        match self.entries.get(key) {
            Some(entry) if entry.expires_at_ms <= now_ms => Known::Absent,
            Some(Entry { located: Some(located), .. }) => Known::Here(*located),
            None if self.knows_all(now) => Known::Absent,
            None if self.absent.get(key).is_some_and(|until| now < *until) => Known::Absent,
            Some(_) | None => Known::Unknown,
        }
    }

    /// Is it there, as far as anybody knows here, and not expired?
    pub(crate) fn contains(&self, key: &BlockKey, now_ms: u64) -> bool {
        self.entries.get(key).is_some_and(|entry| entry.expires_at_ms > now_ms)
    }

    /// And was it this process that wrote it?
    pub(crate) fn has_written(&self, key: &BlockKey, now_ms: u64) -> bool {
        self.entries.get(key).is_some_and(|entry| entry.is_own && entry.expires_at_ms > now_ms)
    }

    /// This process has written it.
    pub(crate) fn written(&mut self, key: BlockKey, bytes: u64, located: Located, expires_at_ms: u64) {
        self.absent.remove(&key);
        self.put(key, Entry { bytes, located: Some(located), expires_at_ms, is_own: true, number: 0 });
    }

    /// An object is there, and this is what its header says. What this process has written it knows better.
    pub(crate) fn learned(&mut self, key: BlockKey, bytes: u64, located: Located, expires_at_ms: u64) {
        self.absent.remove(&key);
        let bytes = bytes.min(MAX_OBJECT_BYTES);
        if self.entries.get(&key).is_none_or(|entry| entry.located.is_none()) {
            self.put(key, Entry { bytes, located: Some(located), expires_at_ms, is_own: false, number: 0 });
        }
    }

    /// An object may be there; what it is, its header will say.
    pub(crate) fn heard(&mut self, listed: Listed) {
        self.absent.remove(&listed.key);
        if !self.entries.contains_key(&listed.key) {
            let (key, bytes) = (listed.key, listed.bytes.min(MAX_OBJECT_BYTES));
            self.put(key, Entry { bytes, located: None, expires_at_ms: u64::MAX, is_own: false, number: 0 });
        }
    }

    fn put(&mut self, key: BlockKey, entry: Entry) {
        self.last_number += 1;
        let number = self.last_number;
        self.used_bytes += entry.bytes;
        let before = self.entries.insert(key, Entry { number, ..entry });
        self.used_bytes -= before.map_or(0, |before| before.bytes);
        self.order.push_back((key, number));
        self.tidy();
    }

    /// It was used.
    pub(crate) fn touch(&mut self, key: &BlockKey) {
        if let Some(entry) = self.entries.get_mut(key) {
            self.last_number += 1;
            entry.number = self.last_number;
            self.order.push_back((*key, self.last_number));
            self.tidy();
        }
    }

    /// What is out of date takes no more than what is not.
    fn tidy(&mut self) {
        if self.order.len() > 2 * self.entries.len() + 1024 {
            let entries = &self.entries;
            self.order.retain(|(key, number)| entries.get(key).is_some_and(|entry| entry.number == *number));
        }
    }

    /// It is not there.
    pub(crate) fn is_absent(&mut self, key: BlockKey, now: Instant) {
        self.take(&key);
        if self.absent.len() >= MAX_ABSENT {
            self.absent.clear();
        }
        self.absent.insert(key, now + ABSENT_FOR);
    }

    /// It is not known any more; gives the bytes of its object, if it was.
    pub(crate) fn take(&mut self, key: &BlockKey) -> Option<u64> {
        let entry = self.entries.remove(key)?;
        self.used_bytes -= entry.bytes;
        Some(entry.bytes)
    }

    /// Keys of a namespace, or of all. Of some it is not known what they belong to.
    pub(crate) fn keys_of(&self, namespace: Option<NamespaceId>) -> Vec<BlockKey> {
        let is_of =
            |entry: &Entry| namespace.is_none_or(|id| entry.located.is_some_and(|located| located.namespace == id));
        self.entries.iter().filter(|(_, entry)| is_of(entry)).map(|(key, _)| *key).collect()
    }

    /// The namespace of an object, if that is known.
    pub(crate) fn namespace_of(&self, key: &BlockKey) -> Option<NamespaceId> {
        self.entries.get(key)?.located.map(|located| located.namespace)
    }

    /// Takes out what was used least lately, until so many bytes are left at most.
    pub(crate) fn evict_to(&mut self, most_bytes: u64) -> Vec<(BlockKey, u64)> {
        let mut victims = Vec::new();
        while self.used_bytes > most_bytes {
            let Some((key, number)) = self.order.pop_front() else { break };
            if self.entries.get(&key).is_some_and(|entry| entry.number == number) {
                victims.extend(self.take(&key).map(|bytes| (key, bytes)));
            }
        }
        victims
    }

    /// Is everything known that is there?
    pub(crate) fn knows_all(&self, now: Instant) -> bool {
        self.complete_until.is_some_and(|until| now < until)
    }

    /// Everything is known until then, or not any more.
    pub(crate) fn is_complete(&mut self, until: Option<Instant>) {
        self.complete_until = until;
    }

    /// A list of everything begins: what it does not show by its end, and was there now, is gone.
    pub(crate) fn begin_list(&self) -> u64 {
        self.last_number
    }

    /// A list that began then showed exactly these keys; gives those that are gone.
    pub(crate) fn end_list(&mut self, began: u64, shown: &ByKey<()>) -> Vec<BlockKey> {
        let is_gone = |(key, entry): &(&BlockKey, &Entry)| entry.number <= began && !shown.contains_key(*key);
        let gone: Vec<BlockKey> = self.entries.iter().filter(is_gone).map(|(key, _)| *key).collect();
        gone.iter().for_each(|key| _ = self.take(key));
        gone
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn used_bytes(&self) -> u64 {
        self.used_bytes
    }

    /// Memory that it takes.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.entries.capacity() * size_of::<(BlockKey, Entry)>()
            + self.order.capacity() * size_of::<(BlockKey, u64)>()
            + self.absent.capacity() * size_of::<(BlockKey, Instant)>()
    }
}

/// Keys that a list has shown.
pub(crate) type Shown = ByKey<()>;

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: u8) -> BlockKey {
        BlockKey::new([number; 32], 0)
    }

    fn index(keys: std::ops::Range<u8>) -> Index {
        let mut index = Index::default();
        keys.for_each(|number| index.heard(Listed { key: key(number), bytes: 10 }));
        index
    }

    #[test]
    fn what_was_used_least_lately_goes_first_and_no_more_than_must() {
        let mut index = index(0..5);
        index.touch(&key(0));
        let victims: Vec<BlockKey> = index.evict_to(25).into_iter().map(|(key, _)| key).collect();
        assert_eq!(victims, [key(1), key(2), key(3)]);
        assert_eq!((index.used_bytes(), index.len()), (20, 2));
    }

    #[test]
    fn what_is_not_known_is_absent_only_while_all_is_known_or_it_was_asked_for() {
        let (mut index, now) = (index(0..1), Instant::now());
        let later = now + Duration::from_secs(2);
        assert_eq!(index.look(&key(7), 0, now), Known::Unknown);
        index.is_absent(key(7), now);
        assert_eq!((index.look(&key(7), 0, now), index.look(&key(7), 0, later)), (Known::Absent, Known::Unknown));
        index.is_complete(Some(now + Duration::from_secs(1)));
        assert_eq!((index.look(&key(8), 0, now), index.look(&key(8), 0, later)), (Known::Absent, Known::Unknown));
        assert_eq!(index.look(&key(0), 0, now), Known::Unknown, "there, and its header was not read");
        index.heard(Listed { key: key(7), bytes: 1 });
        assert_eq!(index.look(&key(7), 0, now), Known::Unknown, "what is heard of later is there");
    }

    #[test]
    fn a_list_takes_out_what_it_does_not_show_and_not_what_came_meanwhile() {
        let mut index = index(0..3);
        let began = index.begin_list();
        index.heard(Listed { key: key(9), bytes: 10 });
        let shown: Shown = [(key(1), ())].into_iter().collect();
        let mut gone = index.end_list(began, &shown);
        gone.sort_by_key(|key| *key.hash());
        assert_eq!(gone, [key(0), key(2)]);
        assert_eq!(index.used_bytes(), 20);
    }

    /// A number that a store gets wrong drove out everything else.
    #[test]
    fn sizes_that_no_object_has_are_not_believed_and_uses_do_not_pile_up() {
        let mut index = index(0..3);
        index.heard(Listed { key: key(9), bytes: u64::MAX });
        index.heard(Listed { key: key(10), bytes: u64::MAX });
        assert_eq!(index.used_bytes(), 30 + 2 * MAX_OBJECT_BYTES);
        (0..10_000).for_each(|_| index.touch(&key(1)));
        assert!(index.order.len() < 2000, "{}", index.order.len());
    }
}
