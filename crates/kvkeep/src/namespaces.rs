//! Small numbers for namespaces, kept only while they have entries, and what a tier
//! knows of each: how many entries and bytes, how many layers, and how long the stored
//! prefix texts are. All of it is counted as entries come and go, never by looking at them.
//!
//! Both tiers number their namespaces for themselves: an entry then carries 4 bytes
//! instead of 32.

use std::collections::{BTreeMap, HashMap};

use crate::key::NamespaceId;

/// Namespaces with entries.
#[derive(Debug, Default)]
pub(crate) struct Namespaces {
    numbers: HashMap<NamespaceId, u32>,
    records: Vec<Record>,
    free_numbers: Vec<u32>,
}

/// A namespace that was closed: nothing in it can be found, and its number stays taken until [`Namespaces::free`].
#[cfg(feature = "disk")]
#[derive(Debug)]
pub(crate) struct Closed {
    pub(crate) number: u32,
    /// Those that are still to be removed.
    pub(crate) entries: u64,
}

/// What one namespace takes of each tier now.
///
/// The bytes of all namespaces together are less than the `used_bytes` of [`Stats`](crate::Stats): in RAM by what is
/// being written, or removed and still read; on the disk by indexes of segments and by records
/// that were replaced or removed and whose segment is still there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct NamespaceUsage {
    /// Which namespace.
    pub id: NamespaceId,
    /// Entries in RAM that can be found.
    pub ram_entries: u64,
    /// Their bytes, in whole pages.
    pub ram_bytes: u64,
    /// Records on the disk that can be found.
    pub disk_entries: u64,
    /// Their bytes, in whole pages, with their headers.
    pub disk_bytes: u64,
}

#[derive(Debug)]
struct Record {
    /// `None` once it was closed.
    id: Option<NamespaceId>,
    entries: u64,
    bytes: u64,
    layers: u32,
    /// Length of a stored prefix text → entries under prefixes of that length.
    prefix_lengths: BTreeMap<usize, usize>,
}

impl NamespaceUsage {
    /// Nothing of this namespace.
    #[must_use]
    pub fn none(id: NamespaceId) -> Self {
        Self { id, ram_entries: 0, ram_bytes: 0, disk_entries: 0, disk_bytes: 0 }
    }
}

impl Namespaces {
    /// The number of a namespace, new if need be.
    pub(crate) fn number(&mut self, id: NamespaceId) -> u32 {
        if let Some(number) = self.numbers.get(&id) {
            return *number;
        }
        let record = Record { id: Some(id), entries: 0, bytes: 0, layers: 0, prefix_lengths: BTreeMap::new() };
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

    /// The number of a namespace that has entries.
    pub(crate) fn known(&self, id: NamespaceId) -> Option<u32> {
        self.numbers.get(&id).copied()
    }

    /// The namespace with this number, unless it was closed.
    pub(crate) fn id(&self, number: u32) -> Option<NamespaceId> {
        self.records.get(number as usize)?.id
    }

    /// From now on its entries are nobody's: whoever counts in more for this id gets another number.
    #[cfg(feature = "disk")]
    pub(crate) fn close(&mut self, id: NamespaceId) -> Option<Closed> {
        let number = self.numbers.remove(&id)?;
        let record = self.records.get_mut(number as usize)?;
        record.id = None;
        Some(Closed { number, entries: record.entries })
    }

    /// No entry is there any more. What was closed before stays so until it is freed.
    #[cfg(feature = "disk")]
    pub(crate) fn clear(&mut self) {
        self.free_numbers.extend(self.numbers.drain().map(|(_, number)| number));
        for record in &mut self.records {
            (record.id, record.entries, record.bytes) = (None, 0, 0);
        }
    }

    /// No entry has this number any more.
    #[cfg(feature = "disk")]
    pub(crate) fn free(&mut self, closed: &Closed) {
        self.free_numbers.push(closed.number);
    }

    /// Counts an entry of so many bytes in.
    pub(crate) fn add(&mut self, number: u32, bytes: u64, layer: u32, prefix_bytes: Option<usize>) {
        let Some(record) = self.records.get_mut(number as usize) else { return };
        record.entries += 1;
        record.bytes += bytes;
        record.layers = record.layers.max(layer + 1);
        if let Some(bytes) = prefix_bytes {
            *record.prefix_lengths.entry(bytes).or_insert(0) += 1;
        }
    }

    /// Counts an entry out, and forgets a namespace with its last entry.
    pub(crate) fn remove(&mut self, number: u32, bytes: u64, prefix_bytes: Option<usize>) {
        let Some(record) = self.records.get_mut(number as usize) else { return };
        if let Some(bytes) = prefix_bytes
            && let Some(entries) = record.prefix_lengths.get_mut(&bytes)
        {
            *entries -= 1;
            if *entries == 0 {
                record.prefix_lengths.remove(&bytes);
            }
        }
        record.entries -= 1;
        record.bytes -= bytes;
        if let (0, Some(id)) = (record.entries, record.id) {
            self.numbers.remove(&id);
            self.free_numbers.push(number);
        }
    }

    /// One more than the highest layer stored in a namespace since it was last empty.
    pub(crate) fn layers(&self, id: NamespaceId) -> u32 {
        self.record(id).map_or(0, |record| record.layers)
    }

    /// Distinct lengths of the prefix texts stored in a namespace, up to `max_bytes`, shortest first.
    pub(crate) fn prefix_lengths(&self, id: NamespaceId, max_bytes: usize) -> Vec<usize> {
        self.record(id).map_or_else(Vec::new, |record| {
            record.prefix_lengths.range(..=max_bytes).map(|(length, _)| *length).collect()
        })
    }

    /// Entries and bytes of each namespace, in no order.
    pub(crate) fn usage(&self) -> impl Iterator<Item = (NamespaceId, u64, u64)> {
        let record = |(id, number): (&NamespaceId, &u32)| {
            let record = self.records.get(*number as usize)?;
            Some((*id, record.entries, record.bytes))
        };
        self.numbers.iter().filter_map(record)
    }

    fn record(&self, id: NamespaceId) -> Option<&Record> {
        self.records.get(self.known(id)? as usize)
    }
}
