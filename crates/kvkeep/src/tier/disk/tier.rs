//! The disk as a [`Tier`]: batches, threads that read, and what is forgotten when.
//!
//! Invariant: the disk is called silent only if a read that has begun does not return. Reads that wait in the queue
//! here say nothing of the disk.

use std::sync::Arc;
use std::time::Duration;

use super::format::{CipherKind, Content, Kind, PAGE_BYTES, Place, RecordHeader, RecordMeta};
use super::pace::Burst;
use super::pages::Pages;
use super::readers::Readers;
use super::{Disk, Options, Resident, Said, Taken};
use crate::block::{BlockKey, BlockMeta};
use crate::clock::{Clock, Deadline, Moment};
use crate::codec::CodecId;
use crate::config::DiskConfig;
use crate::error::{OneLine, Result};
use crate::event::Reports;
use crate::key::{NamespaceId, ObjectKey};
use crate::namespaces::NamespaceUsage;
use crate::stats::TierStats;
use crate::sync::Mutex;
use crate::tier::{Epoch, Forget, Forgets, Forgotten, Located, Offer, Payload, Read, Tier};

/// What waits to be written is at most this part of RAM.
const QUEUE_DIVISOR: u64 = 8;
/// What is written at once is at most this part of RAM: it cannot be given up.
const AT_ONCE_DIVISOR: u64 = 16;
/// Behind no RAM, this part of the queue.
const QUEUE_PARTS_AT_ONCE: u64 = 4;
/// More at once makes a disk no faster.
const MAX_AT_ONCE_BYTES: u64 = 8 << 20;

/// The open tier. Dropping it closes it.
#[derive(Debug)]
pub(crate) struct DiskTier {
    disk: Arc<Disk>,
    readers: Mutex<Readers>,
    /// Comes before the disk's own lock, so that nothing is offered between a look at it and its being queued.
    forgets: Mutex<Forgets>,
    reading: Arc<Mutex<Reading>>,
    read_timeout: Duration,
}

/// Reads that have begun.
#[derive(Debug, Default)]
struct Reading {
    active: usize,
    /// When one returned last, or the first of them began.
    moved: Option<Moment>,
    is_silent: bool,
    burst: Burst,
}

/// A payload in pages of its own: what was lent does not lie as the disk wants it.
struct Copied {
    pages: Pages,
    lent: Arc<dyn Payload>,
}

impl Payload for Copied {
    fn bytes(&self) -> &[u8] {
        self.pages.bytes()
    }

    fn written(&self, is_new: bool) {
        self.lent.written(is_new);
    }
}

impl DiskTier {
    /// Opens a directory and whatever lies in it, for a RAM tier of so many bytes. Reports what it finds.
    pub(crate) fn open(
        config: &DiskConfig,
        ram_bytes: u64,
        clock: Arc<dyn Clock>,
        reports: Option<Reports>,
    ) -> Result<Self> {
        let options = Options { reports, ..Self::options(config, ram_bytes) };
        Ok(Self::over(Disk::open(&options, clock)?, config.read_timeout))
    }

    pub(crate) fn options(config: &DiskConfig, ram_bytes: u64) -> Options<'_> {
        Options {
            dir: &config.dir,
            capacity_bytes: config.capacity_bytes,
            key_file: config.key_file.as_deref(),
            queue_bytes: config.queue_bytes.unwrap_or(ram_bytes / QUEUE_DIVISOR),
            at_once_bytes: at_once_bytes(config, ram_bytes).min(MAX_AT_ONCE_BYTES),
            flush_timeout: config.flush_timeout,
            codecs: config.codecs.clone(),
            reports: None,
        }
    }

    pub(crate) fn over(disk: Disk, read_timeout: Duration) -> Self {
        Self {
            disk: Arc::new(disk),
            readers: Mutex::new(Readers::start()),
            forgets: Mutex::default(),
            reading: Arc::default(),
            read_timeout,
        }
    }

    /// Says who knows what is in RAM.
    pub(crate) fn set_resident(&self, resident: Resident) {
        self.disk.set_resident(resident);
    }

    /// Is the disk silent: for longer than `at_most`, or found so before?
    fn is_silent(&self, at_most: Duration) -> bool {
        let found_now = {
            let mut reading = self.reading.lock();
            if reading.is_silent {
                return true;
            }
            let silent_for = reading.moved.filter(|_| reading.active > 0).map_or(Duration::ZERO, |at| at.elapsed());
            reading.is_silent = silent_for >= at_most;
            reading.is_silent
        };
        if found_now {
            self.disk.read_hangs();
        }
        found_now
    }

    /// Takes one offer, if there is room and nothing newer is known of its key.
    fn offer_one(&self, offer: &Offer) -> Taken {
        let meta = &offer.meta;
        let record = record_meta(meta, self.disk.shared.now_ms());
        let payload = || aligned(&offer.payload);
        let said = Said { mark: offer.mark, begins: meta.begins };
        let mut forgets = self.forgets.lock();
        if !forgets.allow(&meta.key, meta.namespace, offer.epoch) {
            return Taken::Outdated;
        }
        // An older value is hidden before a newer one is offered: what can be found is this one. Each flush wrote it again.
        if meta.is_replaceable() && self.disk.holds(&meta.key.0) {
            return Taken::There;
        }
        let taken = self.disk.try_write(record, meta.content.clone(), said, false, payload);
        if meta.is_replaceable() && taken == Taken::Queued {
            // An older value may still be on its way here.
            forgets.record(&Forget::Replaced(&[meta.key]), offer.epoch);
        }
        taken
    }
}

/// A tier behind no RAM has its queue to go by: else each small block is a write of its own.
fn at_once_bytes(config: &DiskConfig, ram_bytes: u64) -> u64 {
    match config.queue_bytes {
        Some(queue_bytes) if ram_bytes <= PAGE_BYTES as u64 => queue_bytes / QUEUE_PARTS_AT_ONCE,
        _ => ram_bytes / AT_ONCE_DIVISOR,
    }
}

/// As the disk wants it: whole pages, at the beginning of a page.
fn aligned(lent: &Arc<dyn Payload>) -> Arc<dyn Payload> {
    let bytes = lent.bytes();
    if bytes.as_ptr().align_offset(PAGE_BYTES) == 0 && bytes.len().is_multiple_of(PAGE_BYTES) {
        return Arc::clone(lent);
    }
    let mut pages = Pages::new(bytes.len().div_ceil(PAGE_BYTES));
    pages.bytes_mut().iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    Arc::new(Copied { pages, lent: Arc::clone(lent) })
}

fn keys_of(keys: &[BlockKey]) -> Vec<ObjectKey> {
    keys.iter().map(|key| key.0).collect()
}

/// Reads one block; what was read is right, or it is a miss. And how many bytes came as they are; `None` if they were decoded.
fn read(disk: &Disk, read: &mut Read) -> (Option<BlockMeta>, Option<u64>) {
    let found = disk.find(&read.key.0).filter(|found| found.namespace == read.namespace);
    let Some(found) = found else { return (None, Some(0)) };
    let header = match &read.range {
        None => disk.read(&read.key.0, &found, read.target.bytes_mut()),
        Some(range) => disk.read_part(&read.key.0, &found, range, read.target.bytes_mut()),
    };
    let is_raw = found.slot.codec() == CodecId::RAW;
    let bytes = is_raw.then(|| header.as_ref().map_or(0, |header| header.meta.stored_bytes));
    let meta = header.map(|mut header| {
        // The index knows better than the record, which may be from under a wrong clock.
        header.meta = header.meta.expiring(found.slot.expires_at_ms);
        block_meta(header).decoded()
    });
    (meta, bytes)
}

/// One page that says what a block is and what its bytes must be: for tiers that keep a block as one message. It is a
/// record's header as docs/format.md describes it, of no place. `None` for a block that no header can describe.
#[must_use]
pub fn encode_header(meta: &BlockMeta, payload: &[u8]) -> Option<Vec<u8>> {
    let record = record_meta(meta, 0);
    if matches!(meta.content, Content::Nothing) || payload.len() as u64 != meta.stored_bytes {
        return None;
    }
    let list = record.sums(payload);
    let place = Place { store_id: [0; 16], segment: 0, page: 0 };
    let (cipher, nonce, content) = (CipherKind::None, [0; 24], meta.content.clone());
    let header = RecordHeader { meta: record, place, durable_pages: 0, cipher, nonce, content, list };
    let mut page = vec![0; PAGE_BYTES];
    header.encode(&mut page);
    RecordHeader::decode(&page).is_some_and(|again| again == header).then_some(page)
}

/// The block that [`encode_header`] wrote of, if it is the one that is wanted and every byte of its payload is right.
#[must_use]
pub fn decode_header(header: &[u8], key: &BlockKey, namespace: NamespaceId, payload: &[u8]) -> Option<BlockMeta> {
    let header = RecordHeader::decode(header)?;
    let is_wanted = header.meta.key == *key && header.meta.namespace == namespace;
    let is_whole = header.meta.stored_bytes == payload.len() as u64 && header.meta.sums(payload) == header.list;
    (is_wanted && is_whole && header.cipher == CipherKind::None).then(|| block_meta(header))
}

pub(super) fn record_meta(meta: &BlockMeta, stored_at_ms: u64) -> RecordMeta {
    let prefix_bytes = match &meta.content {
        Content::Named(spec) => u32::try_from(spec.prefix_bytes).unwrap_or(u32::MAX),
        Content::Block { .. } | Content::Nothing => 0,
    };
    let kind = if meta.is_replaceable() { Kind::Named } else { Kind::Block };
    RecordMeta { kind, facts: meta.facts, stored_at_ms, prefix_bytes }
}

pub(super) fn block_meta(header: RecordHeader) -> BlockMeta {
    BlockMeta { facts: header.meta.facts, begins: false, content: header.content }
}

impl Tier for DiskTier {
    fn name(&self) -> &str {
        "disk"
    }

    fn locate(&self, keys: &[BlockKey], _deadline: Deadline) -> Vec<Option<Located>> {
        if self.is_silent(self.read_timeout) {
            return vec![None; keys.len()];
        }
        let located = |found: Option<super::Found>| {
            let found = found?;
            let bytes = |pages: u32| u64::from(pages) * PAGE_BYTES as u64;
            Some(Located {
                namespace: found.namespace,
                raw_bytes: bytes(found.slot.raw_pages()),
                stored_bytes: bytes(found.slot.payload_pages),
                codec: found.slot.codec(),
                compute_us: found.slot.compute_us,
                mark: found.slot.mark,
            })
        };
        self.disk.find_each(&keys_of(keys)).into_iter().map(located).collect()
    }

    fn read(&self, reads: Vec<Read>) {
        let readers = self.readers.lock();
        for mut wanted in reads {
            let (disk, reading) = (Arc::clone(&self.disk), Arc::clone(&self.reading));
            readers.submit(Box::new(move || {
                {
                    let mut reading = reading.lock();
                    if reading.active == 0 {
                        reading.moved = Some(Moment::now());
                    }
                    reading.active += 1;
                    reading.burst.begin();
                }
                let (meta, bytes) = read(&disk, &mut wanted);
                let is_back = {
                    let mut reading = reading.lock();
                    reading.active -= 1;
                    reading.moved = Some(Moment::now());
                    let is_last = reading.active == 0;
                    reading.burst.end(bytes, is_last, &disk.shared.pace);
                    std::mem::take(&mut reading.is_silent)
                };
                if is_back {
                    disk.read_returns();
                }
                drop(disk);
                wanted.target.complete(meta);
            }));
        }
    }

    fn offer(&self, offers: Vec<Offer>, deadline: Deadline) -> Vec<Offer> {
        let mut back = Vec::new();
        for offer in offers {
            let taken = loop {
                match self.offer_one(&offer) {
                    Taken::Full if self.disk.wait_for_room(deadline) => {}
                    taken => break taken,
                }
            };
            match taken {
                Taken::Queued | Taken::Outdated => {}
                Taken::There => offer.payload.written(false),
                Taken::Full => {
                    self.disk.count_dropped();
                    back.push(offer);
                }
            }
        }
        back
    }

    fn give_up(&self, waited: Duration) -> usize {
        self.disk.look_for_silence(waited);
        self.disk.cancel_writes()
    }

    fn forget(&self, what: &Forget<'_>, epoch: Epoch) -> Forgotten {
        let mut forgets = self.forgets.lock();
        forgets.record(what, epoch);
        match what {
            Forget::Keys(keys) => {
                let found = self.disk.remove(&keys_of(keys));
                let entries = found.iter().filter(|found| **found).count() as u64;
                Forgotten { found, entries }
            }
            Forget::Replaced(keys) => {
                self.disk.hide(&keys_of(&forgets.not_newer(keys, epoch)));
                Forgotten::default()
            }
            Forget::Namespace(id) => Forgotten { entries: self.disk.clear(Some(*id)), ..Forgotten::default() },
            Forget::All => Forgotten { entries: self.disk.clear(None), ..Forgotten::default() },
        }
    }

    fn flush(&self, _patience: Duration) -> Result<()> {
        self.disk.flush()
    }

    fn close(&self) -> Result<()> {
        if !self.disk.is_here() {
            return Ok(());
        }
        let closed = self.disk.close();
        self.readers.lock().close(!self.is_stuck());
        closed
    }

    fn stats(&self) -> TierStats {
        self.is_silent(self.read_timeout);
        TierStats { name: self.name().to_owned(), ..self.disk.stats() }
    }

    fn touch(&self, keys: &[BlockKey]) {
        self.disk.heat_each(&keys_of(keys));
    }

    fn gave_up_waiting(&self) {
        // The read began a little later than whoever waited for it.
        self.is_silent(self.read_timeout / 4 * 3);
    }

    fn is_stuck(&self) -> bool {
        self.disk.hangs()
    }

    fn sweep(&self) {
        self.disk.sweep();
    }

    fn report_to(&self, reports: Reports) {
        self.disk.shared.state.lock().index.report_to(reports);
    }

    fn usage(&self) -> Vec<NamespaceUsage> {
        let of = |(id, entries, bytes)| NamespaceUsage {
            disk_entries: entries,
            disk_bytes: bytes,
            ..NamespaceUsage::none(id)
        };
        self.disk.usage().into_iter().map(of).collect()
    }

    fn lossy(&self, namespace: NamespaceId) -> Option<&'static str> {
        self.disk.shared.codecs.lossy(namespace)
    }

    fn prefix_lengths(&self, namespace: NamespaceId, max_bytes: usize) -> Vec<usize> {
        self.disk.prefix_lengths(namespace, max_bytes)
    }

    fn layers(&self, namespace: NamespaceId) -> u32 {
        self.disk.layers(namespace)
    }
}

impl Drop for DiskTier {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::warn!(error = %OneLine(&error), "the disk tier was not closed cleanly");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::Facts;
    use crate::layout::KvLayout;
    use crate::tensor::DType;

    #[test]
    fn a_block_as_one_message_is_itself_again_and_nothing_else_is() {
        let layout = KvLayout::new(2, 1, 8, DType::U8).unwrap().with_block_tokens(4).unwrap();
        let payload: Vec<u8> = (0..128).collect();
        let namespace = NamespaceId::named("n");
        let meta = BlockMeta {
            facts: Facts { expires_at_ms: 5, compute_us: 9, ..Facts::raw(ObjectKey::numbered(7), namespace, 128) },
            begins: false,
            content: Content::Block { layout, model: "m".into() },
        };
        let header = encode_header(&meta, &payload).unwrap();
        assert_eq!(decode_header(&header, &meta.key, namespace, &payload), Some(meta.clone()));
        let other = BlockKey(ObjectKey::numbered(8));
        assert_eq!(decode_header(&header, &other, namespace, &payload), None);
        assert_eq!(decode_header(&header, &meta.key, NamespaceId::named("m"), &payload), None);
        for at in 0..payload.len() {
            let mut flipped = payload.clone();
            flipped[at] ^= 1;
            assert_eq!(decode_header(&header, &meta.key, namespace, &flipped), None);
        }
        for at in 0..header.len() {
            let mut flipped = header.clone();
            flipped[at] ^= 1;
            assert_eq!(decode_header(&flipped, &meta.key, namespace, &payload), None);
        }
        assert_eq!(decode_header(&header, &meta.key, namespace, &payload[1..]), None);
        assert_eq!(encode_header(&meta, &payload[1..]), None);
    }
}
