//! The tier by itself, over a simulated disk and a real one.

#![allow(clippy::cast_possible_truncation, clippy::allow_attributes, reason = "a test that panics fails")]

mod archive;
mod coded;
mod corruption;
mod encryption;
mod failure;
mod flushed;
mod format;
mod full;
mod power_cut;
mod recovery;
mod unreadable;
mod writing;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::crypt::Cipher;
use super::format::{Content, Kind, RecordMeta};
use super::pages::Pages;
use super::sim::Sim;
use super::{Disk, Options, Said, Taken};
use crate::block::{BlockKey, Facts};
use crate::clock::{Clock, ManualClock};
use crate::codec::{CodecId, Codecs};
use crate::error::Result;
use crate::key::{NamespaceId, ObjectKey};
use crate::layout::KvLayout;
use crate::tensor::{DType, PairSpec, Shape};
use crate::tier::Payload;

const MIB: u64 = 1 << 20;
const NOW_MS: u64 = 1_000_000;

struct Bytes(Pages);

impl Payload for Bytes {
    fn bytes(&self) -> &[u8] {
        self.0.bytes()
    }
}

/// Everything that a test knows of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Thing {
    number: u32,
    /// Other bytes under the same key; named things alone.
    version: u8,
    pages: u32,
    named: bool,
    expires_at_ms: u64,
}

fn block(number: u32, pages: u32) -> Thing {
    Thing { number, version: 0, pages, named: false, expires_at_ms: u64::MAX }
}

/// As a version: the bytes are such that a codec makes them shorter.
const SMOOTH: u8 = 128;

fn named(number: u32, version: u8, pages: u32) -> Thing {
    Thing { named: true, version, ..block(number, pages) }
}

fn namespace(number: u32) -> NamespaceId {
    NamespaceId::from_bytes([number as u8; 32])
}

impl Thing {
    fn key(&self) -> ObjectKey {
        let mut hash = [0u8; 32];
        for (at, byte) in hash.iter_mut().enumerate() {
            *byte = (self.number.wrapping_mul(0x9e37_79b9).rotate_left(at as u32 * 5) >> 3) as u8;
        }
        hash[28..].copy_from_slice(&self.number.to_le_bytes());
        ObjectKey::new(hash, if self.named { self.number % 7 } else { 0 })
    }

    fn payload_bytes(&self) -> usize {
        self.pages as usize * 4096 - 96
    }

    /// The payload in whole pages. Made once: tests without optimisation are slow at this.
    fn bytes(&self) -> Arc<Vec<u8>> {
        static MADE: Mutex<BTreeMap<Thing, Arc<Vec<u8>>>> = Mutex::new(BTreeMap::new());
        let mut made = MADE.lock().unwrap();
        Arc::clone(made.entry(*self).or_insert_with(|| Arc::new(self.make_bytes())))
    }

    fn make_bytes(&self) -> Vec<u8> {
        let seed = self.number.wrapping_mul(31).wrapping_add(u32::from(self.version) * 101);
        let noise = |i: u32| (i.wrapping_mul(seed | 1) >> 5) as u8;
        let steps = |i: u32| ((i / 200).wrapping_mul(seed | 1) >> 1) as u8;
        let is_smooth = self.version & SMOOTH != 0;
        let byte = |i| if is_smooth { steps(i) } else { noise(i) };
        let mut bytes: Vec<u8> = (0..self.payload_bytes() as u32).map(byte).collect();
        bytes.resize(self.pages as usize * 4096, 0);
        bytes
    }

    fn content(&self) -> Content {
        if self.named {
            let half = self.payload_bytes() / 2 / 64 * 64;
            let shape = |bytes| (DType::U8, Shape::new(&[1, bytes]).unwrap());
            let spec =
                PairSpec { k: shape(half), v: shape(self.payload_bytes() - half), prefix_bytes: 5, tag: self.version };
            return Content::Named(spec);
        }
        let layout = KvLayout::new(1, 1, self.payload_bytes() as u32 / 4, DType::F16).unwrap();
        Content::Block { layout: layout.with_block_tokens(1).unwrap(), model: "model".into() }
    }

    fn meta(&self) -> RecordMeta {
        RecordMeta {
            kind: if self.named { Kind::Named } else { Kind::Block },
            facts: Facts {
                expires_at_ms: self.expires_at_ms,
                compute_us: self.number,
                ..Facts::raw(self.key(), namespace(self.number % 3), self.payload_bytes() as u64)
            },
            stored_at_ms: NOW_MS,
            prefix_bytes: if self.named { 5 } else { 0 },
        }
    }

    fn store(&self, disk: &Disk) -> bool {
        disk.wait_for_queue().unwrap();
        self.offer(disk, true)
    }

    /// As a store does it: not taken if the queue is full.
    fn offer(&self, disk: &Disk, wait: bool) -> bool {
        let taken = disk.try_write(self.meta(), self.content(), Said::default(), wait, || {
            let mut pages = Pages::new(self.pages as usize);
            pages.bytes_mut().copy_from_slice(&self.bytes());
            Arc::new(Bytes(pages))
        });
        if taken == Taken::Full {
            disk.count_dropped();
        }
        taken == Taken::Queued
    }

    /// What a lookup finds: the whole payload, whatever its version.
    fn load(&self, disk: &Disk) -> Option<Vec<u8>> {
        let found = disk.find(&self.key())?;
        let mut pages = Pages::new(found.slot.raw_pages() as usize);
        let header = disk.read(&self.key(), &found, pages.bytes_mut())?;
        assert_eq!(header.meta.key.0, self.key());
        Some(pages.bytes().to_vec())
    }

    fn is_there(&self, disk: &Disk) -> bool {
        self.load(disk).inspect(|bytes| assert!(*bytes == *self.bytes(), "wrong bytes: {self:?}")).is_some()
    }
}

fn clock() -> Arc<dyn Clock> {
    Arc::new(ManualClock::at(NOW_MS))
}

fn open_with(sim: &Sim, capacity_bytes: u64, cipher: Option<Cipher>, clock: Arc<dyn Clock>) -> Result<Disk> {
    super::sim::open(sim, &options(Path::new("sim"), capacity_bytes), cipher, clock)
}

fn options(dir: &Path, capacity_bytes: u64) -> Options<'_> {
    let (flush_timeout, codecs) = (Duration::from_secs(60), Codecs::default());
    Options {
        dir,
        capacity_bytes,
        key_file: None,
        queue_bytes: 4 * MIB,
        at_once_bytes: MIB,
        flush_timeout,
        codecs,
        reports: None,
    }
}

fn open(sim: &Sim, capacity_bytes: u64) -> Disk {
    open_with(sim, capacity_bytes, None, clock()).unwrap()
}

/// A small, quick generator: tests must be repeatable.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    fn coin(&mut self) -> bool {
        self.next() & 1 == 1
    }
}
