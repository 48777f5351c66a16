//! Key → residency: which objects are there, where their payload lies, and who may
//! see them.
//!
//! Entries live in a slab addressed by 32-bit slots; the hash table holds slots only,
//! so a key is kept once. A map from key to a boxed entry was the alternative: it
//! costs another allocation and pointer for each block. An entry that is removed while
//! it is read is unlinked at once (nobody finds it any more) and keeps its slot and its
//! extent until the last reader is gone.

mod expiries;

use std::sync::Arc;

use expiries::Expiries;

use crate::eviction::EntryId;
use crate::key::{NamespaceId, ObjectKey};
use crate::namespaces::Namespaces;
use crate::slots::Slots;
use crate::table::Table;
use crate::tensor::PairSpec;
use crate::tier::ram::{Extent, page_bytes};

/// `expires_at_ms` of what never expires.
pub(crate) const NEVER: u64 = u64::MAX;

/// One sealed object.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) key: ObjectKey,
    pub(crate) namespace: u32,
    pub(crate) extent: Extent,
    /// Present in named entries alone.
    pub(crate) spec: Option<Arc<PairSpec>>,
    /// What it took to compute, in microseconds; 0 if nobody said.
    pub(crate) compute_us: u32,
    /// Bytes of its last page behind the payload.
    pub(crate) slack_bytes: u16,
    /// Every [`Flag`] that it has.
    flags: u8,
    /// Can it be found?
    pub(crate) linked: bool,
    /// Where it stands among what expires.
    expiry_at: u32,
}

// No byte of an entry is free: one more, and all take 8 more.
#[cfg(target_pointer_width = "64")]
const _: () = assert!(size_of::<Option<Entry>>() == 72);

/// What else is true of an entry. Each is a bit of one byte: entries are index memory.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Flag {
    /// One of its readers is a queued write, which is no use of it and does not keep it.
    Queued = 1,
    /// It was chosen to go, and can be found until it does.
    Departing = 2,
    /// A flush waits until every tier has it.
    Flushing = 4,
    /// It is the first block of a prompt.
    Begins = 8,
    /// It came before anybody asked for it.
    Ahead = 16,
}

/// All entries.
#[derive(Debug, Default)]
pub(crate) struct Index {
    table: Table<EntryId>,
    slots: Slots<Option<Entry>>,
    free_slots: Vec<EntryId>,
    namespaces: Namespaces,
    expiries: Expiries,
}

impl Entry {
    /// An entry that can be found once it is in the index.
    pub(crate) fn new(
        key: ObjectKey,
        extent: Extent,
        slack_bytes: u16,
        spec: Option<Arc<PairSpec>>,
        compute_us: u32,
    ) -> Self {
        Self {
            key,
            namespace: 0,
            extent,
            spec,
            compute_us,
            slack_bytes,
            flags: 0,
            linked: true,
            expiry_at: expiries::NOWHERE,
        }
    }

    /// The same, the first block of a prompt or not.
    pub(crate) fn begins(mut self, begins: bool) -> Self {
        self.set(Flag::Begins, begins);
        self
    }

    pub(crate) fn is(&self, flag: Flag) -> bool {
        self.flags & flag as u8 != 0
    }

    pub(crate) fn set(&mut self, flag: Flag, is: bool) {
        self.flags = if is { self.flags | flag as u8 } else { self.flags & !(flag as u8) };
    }

    /// Was it so? It is not any more.
    pub(crate) fn take(&mut self, flag: Flag) -> bool {
        let was = self.is(flag);
        self.set(flag, false);
        was
    }

    /// Bytes of the payload.
    pub(crate) fn payload_bytes(&self) -> u64 {
        self.page_bytes() - u64::from(self.slack_bytes)
    }

    /// Bytes of its pages.
    pub(crate) fn page_bytes(&self) -> u64 {
        page_bytes(self.extent.pages())
    }

    /// Is it in use, so that it must not be evicted?
    pub(crate) fn is_pinned(&self) -> bool {
        self.extent.readers() > u32::from(self.is(Flag::Queued))
    }

    fn prefix_bytes(&self) -> Option<usize> {
        self.spec.as_ref().map(|spec| spec.prefix_bytes)
    }
}

impl Index {
    /// The entry under this key, whether expired or not.
    pub(crate) fn find(&self, key: &ObjectKey) -> Option<EntryId> {
        self.table.find(key.table_hash(), |id| self.has_key(*id, key)).copied()
    }

    pub(crate) fn get(&self, id: EntryId) -> Option<&Entry> {
        self.slots.get(id)?.as_ref()
    }

    pub(crate) fn get_mut(&mut self, id: EntryId) -> Option<&mut Entry> {
        self.slots.get_mut(id)?.as_mut()
    }

    /// An entry that has not expired.
    pub(crate) fn live_mut(&mut self, id: EntryId, now_ms: u64) -> Option<&mut Entry> {
        let Self { slots, expiries, .. } = self;
        let entry = slots.get_mut(id)?.as_mut()?;
        (expiries.time(entry.expiry_at) > now_ms).then_some(entry)
    }

    pub(crate) fn expires_at_ms(&self, entry: &Entry) -> u64 {
        self.expiries.time(entry.expiry_at)
    }

    /// Adds an entry under a key that is not in the index.
    pub(crate) fn insert(&mut self, entry: Entry, expires_at_ms: u64) -> EntryId {
        self.namespaces.add(entry.namespace, entry.page_bytes(), entry.key.layer(), entry.prefix_bytes());
        let key = entry.key;
        let id = self.free_slots.pop().unwrap_or_else(|| self.new_slot());
        if let Some(slot) = self.slots.get_mut(id) {
            *slot = Some(entry);
        }
        self.expiries.add(&mut self.slots, id, expires_at_ms);
        let Self { table, slots, .. } = self;
        table.insert_unique(key.table_hash(), id, |id| {
            let entry = slots.get(*id).and_then(Option::as_ref);
            entry.map_or(0, |entry| entry.key.table_hash())
        });
        id
    }

    /// Makes an entry unfindable. Its slot and extent stay until [`Index::take`].
    pub(crate) fn unlink(&mut self, id: EntryId) {
        let Self { table, slots, namespaces, expiries, .. } = self;
        let Some(Some(entry)) = slots.get_mut(id) else { return };
        if std::mem::take(&mut entry.linked) {
            let (namespace, key) = (entry.namespace, entry.key);
            let (bytes, prefix_bytes) = (entry.page_bytes(), entry.prefix_bytes());
            expiries.remove(slots, id);
            namespaces.remove(namespace, bytes, prefix_bytes);
            table.remove(key.table_hash(), |other| *other == id);
        }
    }

    /// Takes an unlinked entry out.
    pub(crate) fn take(&mut self, id: EntryId) -> Option<Entry> {
        let entry = self.slots.get_mut(id)?.take()?;
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

    /// Ids of the entries in the next `slots` slots that can be found and satisfy `keep`, and the slot to go on with,
    /// if there is more. What comes meanwhile may be left out.
    pub(crate) fn select_some(
        &self,
        from: EntryId,
        slots: usize,
        keep: impl Fn(&Entry) -> bool,
    ) -> (Vec<EntryId>, Option<EntryId>) {
        let next = from.saturating_add(EntryId::try_from(slots).unwrap_or(EntryId::MAX));
        let live = |id: &EntryId| self.get(*id).is_some_and(|entry| entry.linked && keep(entry));
        ((from..next).filter(live).collect(), ((next as usize) < self.slots.len()).then_some(next))
    }

    /// The namespaces of the entries.
    pub(crate) fn namespaces(&self) -> &Namespaces {
        &self.namespaces
    }

    /// The entry that expires first, if it has by now.
    pub(crate) fn next_expired(&self, now_ms: u64) -> Option<EntryId> {
        self.expiries.first().filter(|(expires_at_ms, _)| *expires_at_ms <= now_ms).map(|(_, id)| id)
    }

    /// Bytes of memory that the index itself has reserved.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.slots.memory_bytes()
            + self.free_slots.capacity() * size_of::<EntryId>()
            + self.table.allocation_size()
            + self.expiries.memory_bytes()
    }

    fn has_key(&self, id: EntryId, key: &ObjectKey) -> bool {
        self.get(id).is_some_and(|entry| entry.key == *key)
    }

    fn new_slot(&mut self) -> EntryId {
        self.slots.push(None);
        EntryId::try_from(self.slots.len() - 1).unwrap_or(EntryId::MAX)
    }
}

/// Adds one. Grows by an eighth, not to the double: slack counts as index memory.
fn push<T>(values: &mut Vec<T>, value: T) {
    if values.len() == values.capacity() {
        values.reserve_exact((values.len() / 8).max(64));
    }
    values.push(value);
}
