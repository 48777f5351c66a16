//! Key → place on the disk, in memory.
//!
//! A slot keeps 12 of a key's 32 bytes: the whole key stands in the record's header and is
//! compared before anything is served, so that two keys with the same 12 bytes cost a miss
//! and never a wrong answer. Slots lie in the hash table itself, without a slab beside it.

use std::sync::Arc;

use super::format::{Kind, PAGE_BYTES, RecordMeta};
use super::segment::Segment;
use crate::codec::CodecId;
use crate::event::{Reports, Short};
use crate::key::{NamespaceId, ObjectKey};
use crate::namespaces::{Closed, Namespaces};
use crate::table::Table;

/// 12 bytes of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Fingerprint([u32; 3]);

/// Number of an open segment in this process: small, reused.
pub(crate) type SegmentNumber = u16;

/// One record that can be found.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slot {
    fingerprint: Fingerprint,
    pub(crate) expires_at_ms: u64,
    pub(crate) page: u32,
    pub(crate) payload_pages: u32,
    /// The codec's number, and behind it 24 bits with the pages of the block; 0 for those that are as they were.
    coded: u32,
    pub(crate) namespace: u32,
    pub(crate) compute_us: u32,
    /// Of a named one, the bytes of its prefix text; of a block, when it was last used.
    extra: u32,
    pub(crate) segment: SegmentNumber,
    /// What it was written as: whoever admitted it knows.
    pub(crate) mark: u8,
    flags: u8,
}

const RAW_PAGES_BITS: u32 = 24;
const MAX_CODED_PAGES: u32 = (1 << RAW_PAGES_BITS) - 1;
/// It is a named one.
const NAMED: u8 = 1;
/// Read since it was written here.
const READ: u8 = 2;

/// Records that were taken out of the index.
#[derive(Debug)]
pub(crate) struct Records(Table<Slot>);

impl Records {
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}

/// Where a record is, with what it takes to read it.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub(crate) segment: Arc<Segment>,
    pub(crate) namespace: NamespaceId,
    pub(crate) slot: Slot,
}

/// All records that can be found, and the segments they lie in.
#[derive(Debug, Default)]
pub(crate) struct DiskIndex {
    table: Table<Slot>,
    segments: Vec<SegmentSlot>,
    namespaces: Namespaces,
    /// Records written and reads: the unit of age.
    clock: u32,
    /// Of all blocks, when a segment was last forgotten; `None` before that.
    mean_age: Option<u32>,
    /// What is summed up for it: ages, and blocks.
    ages: (u64, u64),
    /// Who is told of the blocks that come and go here.
    reports: Option<Reports>,
}

/// What a segment's number stands for.
#[derive(Debug)]
enum SegmentSlot {
    Free,
    Open(Arc<Segment>),
    /// It is gone, and there may be records of it left to remove.
    Closed,
}

/// Work that is done while the lock is held: places of the table that are looked at, and a removal as so many of them.
const SLICE: usize = 1 << 12;
const REMOVAL: usize = 8;

impl Fingerprint {
    pub(crate) fn of(key: &ObjectKey) -> Self {
        let [a, b, c, d, e, f, g, h] = key.table_hash().to_le_bytes();
        let third = key.hash().get(8..12).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes);
        Self([u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]), third])
    }

    fn table_hash(self) -> u64 {
        let Self([low, high, _]) = self;
        u64::from(high) << 32 | u64::from(low)
    }

    /// As listeners are told of a block: those bytes again.
    fn short(self) -> Short {
        let [[a, b, c, d], [e, f, g, h], [i, j, k, l]] = self.0.map(u32::to_le_bytes);
        [a, b, c, d, e, f, g, h, i, j, k, l]
    }
}

/// `None` for a block that no codec takes: it is too large.
fn coded(meta: &RecordMeta) -> Option<u32> {
    if meta.codec == CodecId::RAW {
        return Some(0);
    }
    let pages =
        u32::try_from(meta.raw_bytes.div_ceil(PAGE_BYTES as u64)).ok().filter(|pages| *pages <= MAX_CODED_PAGES)?;
    Some(u32::from(meta.codec.0) << RAW_PAGES_BITS | pages)
}

impl Slot {
    /// The codec of its payload.
    pub(crate) fn codec(&self) -> CodecId {
        CodecId(u8::try_from(self.coded >> RAW_PAGES_BITS).unwrap_or(0))
    }

    /// Pages of the block itself.
    pub(crate) fn raw_pages(&self) -> u32 {
        if self.coded == 0 { self.payload_pages } else { self.coded & MAX_CODED_PAGES }
    }

    /// Bytes of its pages on the disk: the payload's and the header's.
    fn record_bytes(&self) -> u64 {
        (u64::from(self.payload_pages) + 1) * PAGE_BYTES as u64
    }

    fn prefix_bytes(&self) -> Option<usize> {
        self.is_named().then_some(self.extra as usize)
    }

    pub(crate) fn is_named(&self) -> bool {
        self.flags & NAMED != 0
    }

    fn was_read(&self) -> bool {
        self.flags & READ != 0
    }
}

impl DiskIndex {
    /// Reports from now on.
    pub(crate) fn report_to(&mut self, reports: Reports) {
        self.reports = Some(reports);
    }

    /// Gives a segment a number; `None` if there are too many.
    pub(crate) fn add_segment(&mut self, segment: Arc<Segment>) -> Option<SegmentNumber> {
        let number = match self.segments.iter().position(|slot| matches!(slot, SegmentSlot::Free)) {
            Some(free) => free,
            None => {
                self.segments.push(SegmentSlot::Free);
                self.segments.len() - 1
            }
        };
        *self.segments.get_mut(number)? = SegmentSlot::Open(segment);
        SegmentNumber::try_from(number).ok()
    }

    /// Nothing in a segment can be found any more. Its number stays taken until [`DiskIndex::free_segment`].
    pub(crate) fn close_segment(&mut self, number: SegmentNumber) {
        if let Some(segment) = self.segments.get_mut(usize::from(number)) {
            *segment = SegmentSlot::Closed;
        }
    }

    /// Another segment may have this number: no record has it any more.
    pub(crate) fn free_segment(&mut self, number: SegmentNumber) {
        if let Some(segment) = self.segments.get_mut(usize::from(number)) {
            *segment = SegmentSlot::Free;
        }
    }

    /// Removes what goes of the next places of the table; says how many, and where to go on, if there is more. Sums up
    /// the ages of what stays.
    pub(crate) fn remove_some(&mut self, from: u64, goes: impl Fn(&Slot) -> bool) -> (usize, Option<u64>) {
        let Self { table, namespaces, clock, ages, reports, .. } = self;
        let (mut removed, mut next, mut looked) = (0, Some(from), 0);
        while looked + removed * REMOVAL < SLICE
            && let Some(place) = next
        {
            looked += 1;
            next = table.after(place);
            let Some(slot) = table.at(place) else { continue };
            if !goes(slot) {
                if !slot.is_named() {
                    *ages = (ages.0 + u64::from(clock.wrapping_sub(slot.extra)), ages.1 + 1);
                }
            } else if let Some(slot) = table.remove_at(place) {
                slot_went(&slot, namespaces, reports.as_ref());
                removed += 1;
            }
        }
        if next.is_some() {
            return (removed, next);
        }
        let (sum, blocks) = std::mem::take(&mut self.ages);
        self.mean_age = sum.checked_div(blocks).and_then(|mean| u32::try_from(mean).ok());
        (removed, None)
    }

    /// The live record under a key. One that has expired goes.
    pub(crate) fn find(&mut self, key: &ObjectKey, now_ms: u64) -> Option<Found> {
        let slot = *self.get(Fingerprint::of(key))?;
        if slot.expires_at_ms <= now_ms {
            self.remove(key);
            return None;
        }
        let SegmentSlot::Open(segment) = self.segments.get(usize::from(slot.segment))? else { return None };
        let segment = Arc::clone(segment);
        Some(Found { segment, namespace: self.namespaces.id(slot.namespace)?, slot })
    }

    /// Is a live record there?
    pub(crate) fn contains(&self, key: &ObjectKey, now_ms: u64) -> bool {
        let live = self.get(Fingerprint::of(key)).filter(|slot| slot.expires_at_ms > now_ms);
        live.is_some_and(|slot| {
            let is_open = matches!(self.segments.get(usize::from(slot.segment)), Some(SegmentSlot::Open(_)));
            is_open && self.namespaces.id(slot.namespace).is_some()
        })
    }

    /// Makes room for so many more records at once.
    pub(crate) fn reserve(&mut self, records: usize) {
        self.table.reserve(records, |slot| slot.fingerprint.table_hash());
    }

    /// Puts a record in place of what was there under its key.
    pub(crate) fn insert(&mut self, meta: &RecordMeta, segment: SegmentNumber, page: u32, mark: u8) {
        self.remove(&meta.key.0);
        let (Some(payload_pages), Some(coded)) = (meta.payload_pages(), coded(meta)) else { return };
        let namespace = self.namespaces.number(meta.namespace);
        self.clock = self.clock.wrapping_add(1);
        let named = meta.kind == Kind::Named;
        let slot = Slot {
            fingerprint: Fingerprint::of(&meta.key.0),
            expires_at_ms: meta.expires_at_ms,
            page,
            payload_pages,
            coded,
            namespace,
            compute_us: meta.compute_us,
            extra: if named { meta.prefix_bytes } else { self.clock },
            segment,
            mark,
            flags: if named { NAMED } else { 0 },
        };
        self.namespaces.add(namespace, slot.record_bytes(), meta.key.layer(), slot.prefix_bytes());
        if let (Some(reports), false) = (&self.reports, named) {
            reports.block_came(meta.key.0.block_hash(), meta.namespace);
        }
        self.table.insert_unique(slot.fingerprint.table_hash(), slot, |slot| slot.fingerprint.table_hash());
    }

    /// Says whether the key was there.
    pub(crate) fn remove(&mut self, key: &ObjectKey) -> bool {
        let fingerprint = Fingerprint::of(key);
        let Some(slot) = self.table.remove(fingerprint.table_hash(), |slot| slot.fingerprint == fingerprint) else {
            return false;
        };
        slot_went(&slot, &mut self.namespaces, self.reports.as_ref());
        true
    }

    /// Removes the record under a key if it is still the one at this place.
    pub(crate) fn remove_at(&mut self, key: &ObjectKey, slot: &Slot) -> bool {
        let now = self.get(Fingerprint::of(key));
        let same = now.is_some_and(|now| now.segment == slot.segment && now.page == slot.page);
        same && self.remove(key)
    }

    /// Nothing in a namespace can be found any more. Its records stay until they are removed, and then it is freed
    /// ([`DiskIndex::free_namespace`]).
    pub(crate) fn close_namespace(&mut self, id: NamespaceId) -> Option<Closed> {
        self.namespaces.close(id)
    }

    /// Another namespace may have its number: no record has it any more.
    pub(crate) fn free_namespace(&mut self, closed: &Closed) {
        self.namespaces.free(closed);
    }

    /// Takes all records out, to be dropped without a lock after [`DiskIndex::report_gone`]. Segments stay.
    pub(crate) fn clear(&mut self) -> Records {
        self.namespaces.clear();
        Records(std::mem::take(&mut self.table))
    }

    /// The directory is another one.
    pub(crate) fn forget_everything(&mut self) -> Records {
        // A clearing may still be going on in the old one.
        let records = self.clear();
        let (namespaces, reports) = (std::mem::take(&mut self.namespaces), self.reports.take());
        *self = Self { namespaces, reports, ..Self::default() };
        records
    }

    /// Reports that the next of these are gone, but for those that have come again since; says where to go on, if there
    /// is more.
    pub(crate) fn report_gone(&self, records: &Records, from: u64) -> Option<u64> {
        let reports = self.reports.as_ref()?;
        let Records(gone) = records;
        let (mut shorts, mut next, mut looked) = (Vec::new(), Some(from), 0);
        while looked + shorts.len() * REMOVAL < SLICE
            && let Some(place) = next
        {
            looked += 1;
            next = gone.after(place);
            let slot = gone.at(place).filter(|slot| !slot.is_named() && self.get(slot.fingerprint).is_none());
            shorts.extend(slot.map(|slot| slot.fingerprint.short()));
        }
        reports.went_each(&shorts);
        next
    }

    /// A record was read.
    pub(crate) fn heat(&mut self, key: &ObjectKey) {
        self.clock = self.clock.wrapping_add(1);
        let fingerprint = Fingerprint::of(key);
        if let Some(slot) = self.table.find_mut(fingerprint.table_hash(), |slot| slot.fingerprint == fingerprint) {
            slot.flags |= READ;
            if !slot.is_named() {
                slot.extra = self.clock;
            }
        }
    }

    /// How long ago a record at this place was used, if it is worth writing again when its segment goes: a block that was
    /// used more recently than most, a named record that was read.
    pub(crate) fn kept_age(&self, key: &ObjectKey, segment: SegmentNumber, page: u32) -> Option<u32> {
        let slot = self.at(key, segment, page)?;
        if slot.is_named() {
            return slot.was_read().then_some(0);
        }
        let age = self.clock.wrapping_sub(slot.extra);
        (age < self.mean_age.unwrap_or(self.clock / 2)).then_some(age)
    }

    /// A record was written again at another place; says whether it still was at the old one.
    pub(crate) fn relocate(&mut self, key: &ObjectKey, from: (SegmentNumber, u32), to: (SegmentNumber, u32)) -> bool {
        let fingerprint = Fingerprint::of(key);
        let Some(slot) = self.table.find_mut(fingerprint.table_hash(), |slot| slot.fingerprint == fingerprint) else {
            return false;
        };
        let there = (slot.segment, slot.page) == from;
        if there {
            (slot.segment, slot.page) = to;
            slot.flags &= !READ;
        }
        there
    }

    /// The slot of a key, if it still is at this place.
    pub(crate) fn at(&self, key: &ObjectKey, segment: SegmentNumber, page: u32) -> Option<&Slot> {
        self.get(Fingerprint::of(key)).filter(|slot| slot.segment == segment && slot.page == page)
    }

    pub(crate) fn len(&self) -> usize {
        self.table.len()
    }

    pub(crate) fn namespaces(&self) -> &Namespaces {
        &self.namespaces
    }

    /// Bytes of memory that the index has reserved.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.table.allocation_size()
    }

    fn get(&self, fingerprint: Fingerprint) -> Option<&Slot> {
        self.table.find(fingerprint.table_hash(), |slot| slot.fingerprint == fingerprint)
    }
}

/// What a slot stood for can no longer be found.
fn slot_went(slot: &Slot, namespaces: &mut Namespaces, reports: Option<&Reports>) {
    namespaces.remove(slot.namespace, slot.record_bytes(), slot.prefix_bytes());
    if let (Some(reports), false) = (reports, slot.is_named()) {
        reports.went_short(slot.fingerprint.short());
    }
}
