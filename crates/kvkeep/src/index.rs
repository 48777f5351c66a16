//! Key → residency: which objects are there, where their payload lies, and who may
//! see them.
//!
//! Entries live in a slab addressed by 32-bit slots; the hash table holds slots only,
//! so a key is kept once. A map from key to a boxed entry was the alternative: it
//! costs another allocation and pointer for each block. An entry that is removed while
//! it is read is unlinked at once (nobody finds it any more) and keeps its slot and its
//! extent until the last reader is gone.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use hashbrown::HashTable;

use crate::eviction::EntryId;
use crate::key::{NamespaceId, ObjectKey};
use crate::tensor::{DType, Shape};
use crate::tier::ram::Extent;

/// `expires_at_ms` of what never expires.
pub(crate) const NEVER: u64 = u64::MAX;

/// What two tensors of a named entry look like; blocks have their namespace's layout instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PairSpec {
    pub(crate) k: (DType, Shape),
    pub(crate) v: (DType, Shape),
    /// Length of the prefix text the pair is stored under.
    pub(crate) prefix_bytes: usize,
    /// The caller's own mark.
    pub(crate) tag: u8,
}

/// One sealed object.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) key: ObjectKey,
    pub(crate) namespace: u32,
    pub(crate) extent: Extent,
    pub(crate) expires_at_ms: u64,
    /// Present in named entries alone.
    pub(crate) spec: Option<Arc<PairSpec>>,
    /// What it took to compute, in microseconds; 0 if nobody said.
    pub(crate) compute_us: u32,
    /// Can it be found?
    pub(crate) linked: bool,
}

/// All entries.
#[derive(Debug, Default)]
pub(crate) struct Index {
    table: HashTable<EntryId>,
    slots: Vec<Option<Entry>>,
    free_slots: Vec<EntryId>,
    namespaces: Namespaces,
}

/// Small numbers for namespaces, kept only while they have entries.
#[derive(Debug, Default)]
struct Namespaces {
    numbers: HashMap<NamespaceId, u32>,
    records: Vec<NamespaceRecord>,
    free_numbers: Vec<u32>,
}

#[derive(Debug)]
struct NamespaceRecord {
    id: NamespaceId,
    entries: usize,
    layers: u32,
    /// Length of a stored prefix text → linked entries under prefixes of that length.
    prefix_lengths: BTreeMap<usize, usize>,
}

impl Index {
    /// The entry under this key, whether expired or not.
    pub(crate) fn find(&self, key: &ObjectKey) -> Option<EntryId> {
        self.table.find(key.table_hash(), |id| self.has_key(*id, key)).copied()
    }

    pub(crate) fn get(&self, id: EntryId) -> Option<&Entry> {
        self.slots.get(id as usize)?.as_ref()
    }

    pub(crate) fn get_mut(&mut self, id: EntryId) -> Option<&mut Entry> {
        self.slots.get_mut(id as usize)?.as_mut()
    }

    /// Adds an entry under a key that is not in the index.
    pub(crate) fn insert(&mut self, entry: Entry) -> EntryId {
        self.namespaces.count(&entry, true);
        let key = entry.key;
        let id = self.free_slots.pop().unwrap_or_else(|| self.new_slot());
        if let Some(slot) = self.slots.get_mut(id as usize) {
            *slot = Some(entry);
        }
        let Self { table, slots, .. } = self;
        table.insert_unique(key.table_hash(), id, |id| {
            let entry = slots.get(*id as usize).and_then(Option::as_ref);
            entry.map_or(0, |entry| entry.key.table_hash())
        });
        id
    }

    /// Makes an entry unfindable. Its slot and extent stay until [`Index::take`].
    pub(crate) fn unlink(&mut self, id: EntryId) {
        let Self { table, slots, namespaces, .. } = self;
        let Some(Some(entry)) = slots.get_mut(id as usize) else { return };
        if std::mem::take(&mut entry.linked) {
            namespaces.count(entry, false);
            if let Ok(found) = table.find_entry(entry.key.table_hash(), |other| *other == id) {
                found.remove();
            }
        }
    }

    /// Takes an unlinked entry out.
    pub(crate) fn take(&mut self, id: EntryId) -> Option<Entry> {
        let entry = self.slots.get_mut(id as usize)?.take()?;
        self.free_slots.push(id);
        Some(entry)
    }

    /// The number of a namespace, new if need be.
    pub(crate) fn namespace(&mut self, id: NamespaceId) -> u32 {
        self.namespaces.number(id)
    }

    /// Entries that can be found.
    pub(crate) fn len(&self) -> usize {
        self.table.len()
    }

    /// Ids of all entries that can be found and satisfy `keep`.
    pub(crate) fn select(&self, keep: impl Fn(&Entry) -> bool) -> Vec<EntryId> {
        let live = |id: &EntryId| self.get(*id).is_some_and(&keep);
        self.table.iter().copied().filter(live).collect()
    }

    /// The number of a namespace that has entries.
    pub(crate) fn known_namespace(&self, id: NamespaceId) -> Option<u32> {
        self.namespaces.numbers.get(&id).copied()
    }

    /// One more than the highest layer stored in a namespace since it was last empty.
    pub(crate) fn layers(&self, id: NamespaceId) -> u32 {
        let record = self.known_namespace(id).and_then(|number| self.namespaces.records.get(number as usize));
        record.map_or(0, |record| record.layers)
    }

    /// Distinct lengths of the prefix texts stored in a namespace, up to `max_bytes`, shortest first.
    pub(crate) fn prefix_lengths(&self, id: NamespaceId, max_bytes: usize) -> Vec<usize> {
        let record = self.known_namespace(id).and_then(|number| self.namespaces.records.get(number as usize));
        record.map_or_else(Vec::new, |record| {
            record.prefix_lengths.range(..=max_bytes).map(|(length, _)| *length).collect()
        })
    }

    /// When the next entry expires; [`NEVER`] if none does.
    pub(crate) fn earliest_expiry_ms(&self) -> u64 {
        let live = self.table.iter().filter_map(|id| self.get(*id));
        live.map(|entry| entry.expires_at_ms).min().unwrap_or(NEVER)
    }

    /// Bytes of memory that the index itself has reserved.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.slots.capacity() * size_of::<Option<Entry>>()
            + self.free_slots.capacity() * size_of::<EntryId>()
            + self.table.allocation_size()
    }

    fn has_key(&self, id: EntryId, key: &ObjectKey) -> bool {
        self.get(id).is_some_and(|entry| entry.key == *key)
    }

    fn new_slot(&mut self) -> EntryId {
        // Grow by an eighth, not by half: slack counts as index memory.
        if self.slots.len() == self.slots.capacity() {
            self.slots.reserve_exact((self.slots.len() / 8).max(64));
        }
        self.slots.push(None);
        EntryId::try_from(self.slots.len() - 1).unwrap_or(EntryId::MAX)
    }
}

impl Namespaces {
    fn number(&mut self, id: NamespaceId) -> u32 {
        if let Some(number) = self.numbers.get(&id) {
            return *number;
        }
        let record = NamespaceRecord { id, entries: 0, layers: 0, prefix_lengths: BTreeMap::new() };
        let number = match self.free_numbers.pop() {
            Some(number) => {
                if let Some(slot) = self.records.get_mut(number as usize) {
                    *slot = record;
                }
                number
            }
            None => {
                self.records.push(record);
                u32::try_from(self.records.len() - 1).unwrap_or(u32::MAX)
            }
        };
        self.numbers.insert(id, number);
        number
    }

    /// Counts an entry in or out, and forgets a namespace with its last entry.
    fn count(&mut self, entry: &Entry, add: bool) {
        let Some(record) = self.records.get_mut(entry.namespace as usize) else { return };
        if let Some(spec) = &entry.spec {
            let entries = record.prefix_lengths.entry(spec.prefix_bytes).or_insert(0);
            *entries = if add { *entries + 1 } else { *entries - 1 };
            if *entries == 0 {
                record.prefix_lengths.remove(&spec.prefix_bytes);
            }
        }
        record.layers = record.layers.max(entry.key.layer() + 1);
        record.entries = if add { record.entries + 1 } else { record.entries - 1 };
        if record.entries == 0 {
            self.numbers.remove(&record.id);
            self.free_numbers.push(entry.namespace);
        }
    }
}
