//! A disk in memory that forgets, fails and hangs on request: for tests.
//!
//! It has a live image, which is what is read, and a durable one, which is what a power cut
//! leaves: synced pages for sure, others perhaps. Its operations are numbered, so that a test
//! can cut the power at each of them.

#![allow(clippy::cast_possible_truncation, clippy::allow_attributes, reason = "a test that panics fails")]

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use super::crypt::Cipher;
use super::io::{Backend, DiskFile, FileSize};
use super::{Disk, Options};
use crate::clock::{Clock, ManualClock};
use crate::error::Result;

const PAGE: usize = 4096;

/// A simulated disk; clones are the same disk.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sim(Arc<(Mutex<Image>, Condvar)>);

#[derive(Debug, Default)]
struct Image {
    live: BTreeMap<String, u64>,
    durable: BTreeMap<String, u64>,
    inodes: HashMap<u64, Inode>,
    last_inode: u64,
    operations: u64,
    /// Those that made something durable.
    syncs: Vec<u64>,
    cut_at: Option<u64>,
    space_bytes: Option<u64>,
    /// Is it a quota that runs out, and not the disk?
    quota: bool,
    /// Files get their space when they are written, not before.
    sparse: bool,
    /// Removed files give nothing back, and take so much.
    snapshot: Option<u64>,
    fail_reads: bool,
    /// Pages of a file that cannot be read.
    bad_pages: BTreeSet<(String, u64)>,
    /// Files that cannot be opened.
    shut: BTreeSet<String>,
    fail_writes: bool,
    /// What is written gets there, and an error is returned all the same.
    fail_behind_writes: bool,
    gone: bool,
    hang: bool,
    waiting: usize,
    peak_bytes: u64,
    /// Each read takes so long, in real time.
    delay: Duration,
    /// Reading takes so long for each page.
    slow: Option<(Arc<ManualClock>, u64)>,
}

#[derive(Debug, Default, Clone)]
struct Inode {
    live: Vec<u8>,
    durable: Vec<u8>,
    allocated: u64,
}

#[derive(Debug)]
struct SimFile(Sim, u64);

impl Sim {
    /// The power goes at this operation: it and all after it fail.
    pub(crate) fn cut_at(&self, operation: u64) {
        self.image().cut_at = Some(operation);
    }

    pub(crate) fn operations(&self) -> u64 {
        self.image().operations
    }

    /// The operations so far that made something durable.
    pub(crate) fn syncs(&self) -> Vec<u64> {
        self.image().syncs.clone()
    }

    pub(crate) fn space_bytes(&self, bytes: Option<u64>) {
        self.image().space_bytes = bytes;
    }

    pub(crate) fn quota(&self, quota: bool) {
        self.image().quota = quota;
    }

    pub(crate) fn sparse(&self, sparse: bool) {
        self.image().sparse = sparse;
    }

    /// From now on what is removed goes on taking space.
    pub(crate) fn take_snapshot(&self) {
        self.image().snapshot = Some(0);
    }

    pub(crate) fn fail_reads(&self, fail: bool) {
        self.image().fail_reads = fail;
    }

    /// This page of a file cannot be read from now on.
    pub(crate) fn lose_page(&self, name: &str, page: u64) {
        self.image().bad_pages.insert((name.to_owned(), page));
    }

    /// This file cannot be opened from now on.
    pub(crate) fn shut(&self, name: &str) {
        self.image().shut.insert(name.to_owned());
    }

    pub(crate) fn fail_writes(&self, fail: bool) {
        self.image().fail_writes = fail;
    }

    pub(crate) fn fail_behind_writes(&self, fail: bool) {
        self.image().fail_behind_writes = fail;
    }

    pub(crate) fn vanish(&self, gone: bool) {
        self.image().gone = gone;
    }

    /// Everything waits until this is taken back.
    pub(crate) fn hang(&self, hang: bool) {
        self.image().hang = hang;
        self.0.1.notify_all();
    }

    /// Each read takes so long from now on, in real time.
    pub(crate) fn delay_reads(&self, delay: Duration) {
        self.image().delay = delay;
    }

    /// Each page read moves this clock on.
    pub(crate) fn slow_reads(&self, clock: Arc<ManualClock>, ms_a_page: u64) {
        self.image().slow = Some((clock, ms_a_page));
    }

    /// The most bytes that files ever took.
    pub(crate) fn peak_bytes(&self) -> u64 {
        self.image().peak_bytes
    }

    pub(crate) fn used_bytes(&self) -> u64 {
        self.image().used_bytes()
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.image().live.keys().cloned().collect()
    }

    pub(crate) fn get(&self, name: &str) -> Option<Vec<u8>> {
        let image = self.image();
        image.live.get(name).map(|inode| image.inodes[inode].live.clone())
    }

    pub(crate) fn put(&self, name: &str, bytes: Vec<u8>) {
        let mut image = self.image();
        let inode = image.new_inode();
        let allocated = bytes.len() as u64;
        image.inodes.insert(inode, Inode { durable: bytes.clone(), live: bytes, allocated });
        image.live.insert(name.to_owned(), inode);
        image.durable.insert(name.to_owned(), inode);
    }

    pub(crate) fn delete(&self, name: &str) {
        let mut image = self.image();
        image.live.remove(name);
        image.durable.remove(name);
    }

    /// The same files on a disk of their own.
    pub(crate) fn copy(&self) -> Self {
        let copy = Self::default();
        for name in self.names() {
            copy.put(&name, self.get(&name).unwrap());
        }
        copy
    }

    /// What a power cut leaves. `coin` says of each page and name that was not synced whether
    /// it got there.
    pub(crate) fn after_power_cut(&self, mut coin: impl FnMut() -> bool) -> Self {
        let image = self.image();
        let left = Self::default();
        let names: BTreeSet<&String> = image.live.keys().chain(image.durable.keys()).collect();
        for name in names {
            let (live, durable) = (image.live.get(name), image.durable.get(name));
            let inode = if live == durable || coin() { live } else { durable };
            let Some(inode) = inode else { continue };
            let Inode { live, durable, .. } = &image.inodes[inode];
            let mut bytes = durable.clone();
            if bytes.len() != live.len() && coin() {
                bytes.resize(live.len(), 0);
            }
            for (at, page) in bytes.chunks_mut(PAGE).enumerate() {
                let newer = live.get(at * PAGE..at * PAGE + page.len());
                if let Some(newer) = newer.filter(|newer| *newer != page)
                    && coin()
                {
                    page.copy_from_slice(newer);
                }
            }
            left.put(name, bytes);
        }
        left
    }

    /// Operations that hang.
    pub(crate) fn waiting(&self) -> usize {
        self.image().waiting
    }

    fn wait<'a>(&'a self, mut image: MutexGuard<'a, Image>) -> MutexGuard<'a, Image> {
        image.waiting += 1;
        while image.hang {
            image = self.0.1.wait(image).unwrap();
        }
        image.waiting -= 1;
        image
    }

    fn image(&self) -> MutexGuard<'_, Image> {
        self.0.0.lock().unwrap()
    }

    /// One operation that changes something.
    fn change<T>(&self, action: impl FnOnce(&mut Image) -> io::Result<T>) -> io::Result<T> {
        let mut image = self.image();
        image = self.wait(image);
        image.operations += 1;
        let cut = image.cut_at.is_some_and(|cut| image.operations >= cut);
        if cut || image.fail_writes {
            return Err(io::Error::other("the disk fails"));
        }
        if image.gone {
            return Err(io::ErrorKind::NotFound.into());
        }
        let result = action(&mut image);
        image.peak_bytes = image.peak_bytes.max(image.used_bytes());
        result
    }
}

/// A tier over a simulated disk, which is found again after it vanished.
pub(crate) fn open(sim: &Sim, options: &Options<'_>, cipher: Option<Cipher>, clock: Arc<dyn Clock>) -> Result<Disk> {
    let again = sim.clone();
    let opener = Box::new(move || {
        again.vanish(false);
        Ok(Arc::new(again.clone()) as Arc<dyn Backend>)
    });
    Disk::over(Arc::new(sim.clone()), opener, options, cipher.map(Arc::new), clock)
}

impl Image {
    fn new_inode(&mut self) -> u64 {
        self.last_inode += 1;
        self.last_inode
    }

    fn used_bytes(&self) -> u64 {
        self.live.values().map(|inode| self.inodes[inode].allocated).sum()
    }

    fn grow(&mut self, inode: u64, bytes: u64) -> io::Result<()> {
        let others = self.used_bytes() - self.inodes[&inode].allocated.min(self.used_bytes());
        if self.space_bytes.is_some_and(|space| others + bytes + self.snapshot.unwrap_or(0) > space) {
            let full = if self.quota { io::ErrorKind::QuotaExceeded } else { io::ErrorKind::StorageFull };
            return Err(full.into());
        }
        let inode = self.inodes.get_mut(&inode).unwrap();
        inode.allocated = inode.allocated.max(bytes);
        if inode.live.len() < bytes as usize {
            inode.live.resize(bytes as usize, 0);
        }
        Ok(())
    }
}

impl Backend for Sim {
    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.names())
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let inode = self.change(|image| {
            if image.live.contains_key(name) {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            let inode = image.new_inode();
            image.inodes.insert(inode, Inode::default());
            image.live.insert(name.to_owned(), inode);
            Ok(inode)
        })?;
        Ok(Arc::new(SimFile(self.clone(), inode)))
    }

    fn open(&self, name: &str, _write: bool) -> io::Result<Arc<dyn DiskFile>> {
        let image = self.image();
        let inode = image.live.get(name).copied().ok_or(io::ErrorKind::NotFound)?;
        if image.shut.contains(name) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        Ok(Arc::new(SimFile(self.clone(), inode)))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.change(|image| {
            let inode = image.live.remove(from).ok_or(io::ErrorKind::NotFound)?;
            image.live.insert(to.to_owned(), inode);
            Ok(())
        })
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.change(|image| {
            let inode = image.live.remove(name).ok_or(io::ErrorKind::NotFound)?;
            let allocated = image.inodes[&inode].allocated;
            image.snapshot = image.snapshot.map(|held| held + allocated);
            Ok(())
        })
    }

    fn sync_dir(&self) -> io::Result<()> {
        self.change(|image| {
            image.durable = image.live.clone();
            image.syncs.push(image.operations);
            Ok(())
        })
    }

    fn check(&self) -> io::Result<()> {
        if self.image().gone { Err(io::ErrorKind::NotFound.into()) } else { Ok(()) }
    }
}

impl DiskFile for SimFile {
    fn read(&self, into: &mut [&mut [u8]], at: u64) -> io::Result<()> {
        let delay = self.0.image().delay;
        std::thread::sleep(delay);
        let mut image = self.0.image();
        image = self.0.wait(image);
        let wanted = at / PAGE as u64..(at + into.iter().map(|buffer| buffer.len() as u64).sum::<u64>()) / PAGE as u64;
        let bad = |(name, page): &(String, u64)| image.live.get(name) == Some(&self.1) && wanted.contains(page);
        if image.fail_reads || image.bad_pages.iter().any(bad) {
            return Err(io::Error::other("the disk fails"));
        }
        let mut at = at as usize;
        let mut pages = 0;
        for buffer in into {
            let bytes = image.inodes[&self.1].live.get(at..at + buffer.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
            buffer.copy_from_slice(bytes);
            at += buffer.len();
            pages += buffer.len() as u64 / PAGE as u64;
        }
        if let Some((clock, ms_a_page)) = &image.slow {
            clock.advance(Duration::from_millis(pages * ms_a_page));
        }
        Ok(())
    }

    fn write(&self, from: &[&[u8]], at: u64) -> io::Result<()> {
        self.0.change(|image| {
            let mut at = at as usize;
            for buffer in from {
                let end = at + buffer.len();
                if image.inodes[&self.1].live.len() < end {
                    image.grow(self.1, end as u64)?;
                }
                image.inodes.get_mut(&self.1).unwrap().live[at..end].copy_from_slice(buffer);
                at = end;
            }
            if image.fail_behind_writes { Err(io::Error::other("the disk fails")) } else { Ok(()) }
        })
    }

    fn sync(&self) -> io::Result<()> {
        self.0.change(|image| {
            let inode = image.inodes.get_mut(&self.1).unwrap();
            inode.durable = inode.live.clone();
            image.syncs.push(image.operations);
            Ok(())
        })
    }

    fn allocate(&self, bytes: u64) -> io::Result<()> {
        self.0.change(|image| if image.sparse { Ok(()) } else { image.grow(self.1, bytes) })
    }

    fn truncate(&self, bytes: u64) -> io::Result<()> {
        self.0.change(|image| {
            let inode = image.inodes.get_mut(&self.1).unwrap();
            inode.live.truncate(bytes as usize);
            inode.allocated = bytes;
            Ok(())
        })
    }

    fn size(&self) -> io::Result<FileSize> {
        let image = self.0.image();
        let inode = &image.inodes[&self.1];
        Ok(FileSize { bytes: inode.live.len() as u64, allocated_bytes: inode.allocated })
    }
}
