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

use crate::store::{Listed, Name};

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

/// What an object is.
#[derive(Debug, Clone, Copy)]
enum What {
    /// Of this namespace; the rest its header will say.
    Heard(NamespaceId),
    Read(Located),
}

/// Keys are hashes already: eight of their bytes are one.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct KeyHasher(u64);

type ByKey<V> = HashMap<BlockKey, V, BuildHasherDefault<KeyHasher>>;

#[derive(Debug, Clone, Copy)]
struct Entry {
    /// Of the object in the store.
    bytes: u64,
    what: What,
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
    absent: HashMap<Name, Instant, BuildHasherDefault<KeyHasher>>,
    /// Until then everything that is in the store is known.
    complete_until: Option<Instant>,
}

impl What {
    fn namespace(&self) -> NamespaceId {
        match self {
            Self::Heard(namespace) => *namespace,
            Self::Read(located) => located.namespace,
        }
    }
}

impl Entry {
    fn name(&self, key: BlockKey) -> Name {
        Name { namespace: self.what.namespace(), key }
    }
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
    /// What is known of an object.
    pub(crate) fn look(&self, name: &Name, now_ms: u64, now: Instant) -> Known {
        match self.entries.get(&name.key) {
            // Somebody has written a key under the name of a namespace that it is not of.
            Some(entry) if entry.what.namespace() != name.namespace => Known::Unknown,
            Some(entry) if entry.expires_at_ms <= now_ms => Known::Absent,
            Some(Entry { what: What::Read(located), .. }) => Known::Here(*located),
            None if self.knows_all(now) => Known::Absent,
            None if self.absent.get(name).is_some_and(|until| now < *until) => Known::Absent,
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
        self.absent.remove(&Name { namespace: located.namespace, key });
        self.put(key, Entry { bytes, what: What::Read(located), expires_at_ms, is_own: true, number: 0 });
    }

    /// An object is there, and this is what its header says. What this process has written it knows better.
    pub(crate) fn learned(&mut self, key: BlockKey, bytes: u64, located: Located, expires_at_ms: u64) {
        self.absent.remove(&Name { namespace: located.namespace, key });
        let bytes = bytes.min(MAX_OBJECT_BYTES);
        let known = self.entries.get(&key).map(|entry| entry.what);
        if !matches!(known, Some(What::Read(known)) if known.namespace == located.namespace) {
            self.put(key, Entry { bytes, what: What::Read(located), expires_at_ms, is_own: false, number: 0 });
        }
    }

    /// An object may be there; what it is, its header will say.
    pub(crate) fn heard(&mut self, listed: Listed) {
        let Listed { name: Name { namespace, key }, bytes, expires_at_ms } = listed;
        self.absent.remove(&listed.name);
        if !self.entries.contains_key(&key) {
            let (bytes, what) = (bytes.min(MAX_OBJECT_BYTES), What::Heard(namespace));
            self.put(key, Entry { bytes, what, expires_at_ms, is_own: false, number: 0 });
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
    pub(crate) fn is_absent(&mut self, name: Name, now: Instant) {
        if self.entries.get(&name.key).is_some_and(|entry| entry.what.namespace() == name.namespace) {
            self.take(&name.key);
        }
        if self.absent.len() >= MAX_ABSENT {
            self.absent.clear();
        }
        self.absent.insert(name, now + ABSENT_FOR);
    }

    /// It is not known any more; gives the bytes of its object, if it was.
    pub(crate) fn take(&mut self, key: &BlockKey) -> Option<u64> {
        let entry = self.entries.remove(key)?;
        self.used_bytes -= entry.bytes;
        Some(entry.bytes)
    }

    /// Keys of a namespace, or of all.
    pub(crate) fn keys_of(&self, namespace: Option<NamespaceId>) -> Vec<BlockKey> {
        let is_of = |entry: &Entry| namespace.is_none_or(|id| entry.what.namespace() == id);
        self.entries.iter().filter(|(_, entry)| is_of(entry)).map(|(key, _)| *key).collect()
    }

    /// Takes out what has expired.
    pub(crate) fn take_expired(&mut self, now_ms: u64) -> Vec<(Name, u64)> {
        let is_over = |(_, entry): &(&BlockKey, &Entry)| entry.expires_at_ms <= now_ms;
        let over: Vec<(Name, u64)> =
            self.entries.iter().filter(is_over).map(|(key, entry)| (entry.name(*key), entry.bytes)).collect();
        over.iter().for_each(|(name, _)| _ = self.take(&name.key));
        over
    }

    /// Takes out what was used least lately, until so many bytes are left at most.
    pub(crate) fn evict_to(&mut self, most_bytes: u64) -> Vec<(Name, u64)> {
        let mut victims = Vec::new();
        while self.used_bytes > most_bytes {
            let Some((key, number)) = self.order.pop_front() else { break };
            if let Some(entry) = self.entries.get(&key).filter(|entry| entry.number == number) {
                victims.push((entry.name(key), entry.bytes));
                self.take(&key);
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
            + self.absent.capacity() * size_of::<(Name, Instant)>()
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

    fn name(number: u8) -> Name {
        Name { namespace: NamespaceId::from_bytes([1; 32]), key: key(number) }
    }

    fn listed(number: u8, bytes: u64) -> Listed {
        Listed { name: name(number), bytes, expires_at_ms: u64::MAX }
    }

    fn index(keys: std::ops::Range<u8>) -> Index {
        let mut index = Index::default();
        keys.for_each(|number| index.heard(listed(number, 10)));
        index
    }

    #[test]
    fn what_was_used_least_lately_goes_first_and_no_more_than_must() {
        let mut index = index(0..5);
        index.touch(&key(0));
        let victims: Vec<BlockKey> = index.evict_to(25).into_iter().map(|(name, _)| name.key).collect();
        assert_eq!(victims, [key(1), key(2), key(3)]);
        assert_eq!((index.used_bytes(), index.len()), (20, 2));
    }

    #[test]
    fn what_is_not_known_is_absent_only_while_all_is_known_or_it_was_asked_for() {
        let (mut index, now) = (index(0..1), Instant::now());
        let later = now + Duration::from_secs(2);
        assert_eq!(index.look(&name(7), 0, now), Known::Unknown);
        index.is_absent(name(7), now);
        assert_eq!((index.look(&name(7), 0, now), index.look(&name(7), 0, later)), (Known::Absent, Known::Unknown));
        index.is_complete(Some(now + Duration::from_secs(1)));
        assert_eq!((index.look(&name(8), 0, now), index.look(&name(8), 0, later)), (Known::Absent, Known::Unknown));
        assert_eq!(index.look(&name(0), 0, now), Known::Unknown, "there, and its header was not read");
        index.heard(listed(7, 1));
        assert_eq!(index.look(&name(7), 0, now), Known::Unknown, "what is heard of later is there");
    }

    #[test]
    fn a_list_takes_out_what_it_does_not_show_and_not_what_came_meanwhile() {
        let mut index = index(0..3);
        let began = index.begin_list();
        index.heard(listed(9, 10));
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
        index.heard(listed(9, u64::MAX));
        index.heard(listed(10, u64::MAX));
        assert_eq!(index.used_bytes(), 30 + 2 * MAX_OBJECT_BYTES);
        (0..10_000).for_each(|_| index.touch(&key(1)));
        assert!(index.order.len() < 2000, "{}", index.order.len());
    }

    #[test]
    fn what_has_expired_is_taken_out_and_no_longer_counts() {
        let mut index = index(0..2);
        index.heard(Listed { expires_at_ms: 500, ..listed(7, 10) });
        assert_eq!(index.take_expired(499), []);
        assert_eq!(index.look(&name(7), 500, Instant::now()), Known::Absent);
        assert_eq!(index.take_expired(500), [(name(7), 10)]);
        assert_eq!((index.used_bytes(), index.len()), (20, 2));
    }

    /// A name that pairs a key with a namespace which it is not of hid the object of the right name.
    #[test]
    fn a_key_under_the_name_of_another_namespace_hides_nothing() {
        let other = Name { namespace: NamespaceId::from_bytes([2; 32]), key: key(1) };
        let mut index = Index::default();
        index.heard(Listed { name: other, ..listed(1, 10) });
        index.is_complete(Some(Instant::now() + Duration::from_secs(9)));
        assert_eq!(index.look(&name(1), 0, Instant::now()), Known::Unknown);
    }
}
