//! A store by key, for a process that shares its RAM with others: what a tier elsewhere asks, this answers.
//!
//! Invariants:
//! - Its memory is a file that other processes map, and that none of them can write to.
//! - What is held stays where it is until the run is dropped. What is being written is found by nobody before it is sealed.
//! - What was removed since a write began does not come back by it: whoever asked for the removal, and whoever writes.
//!
//! An index of the sharing process's own was the alternative: a second policy, a second cap, and a second set of races.

use std::sync::Arc;
use std::time::Duration;

use super::Store;
use super::guard::{Pending, Pin};
use super::ledger::{self, Gone, Ledger, OnPresent, Request, Written};
use super::memory::Ram;
use super::tiers::Models;
use crate::block::{BlockKey, BlockMeta, Content};
use crate::clock::Deadline;
use crate::config::{CacheConfig, WritePolicy};
use crate::error::Result;
use crate::eviction::{Place, Priority};
use crate::key::{NamespaceId, ObjectKey};
use crate::namespaces::NamespaceUsage;
use crate::stats::Stats;
use crate::tier::{Epoch, Forget, Forgotten, Located};

/// A store whose RAM other processes read. Cheap to clone: clones share everything.
#[derive(Debug, Clone)]
pub struct Host {
    store: Store,
    models: Arc<Models>,
}

/// Blocks that stay where they are while this lives.
#[derive(Debug)]
pub struct HostedRun {
    _pins: Vec<Pin>,
    blocks: Vec<Option<(usize, BlockMeta)>>,
}

/// Pages for a block that is being written. Dropped, they are free again.
#[derive(Debug)]
pub struct HostedRoom {
    pending: Pending,
    meta: BlockMeta,
    epoch: Epoch,
}

/// What became of a block that was offered.
#[derive(Debug)]
#[non_exhaustive]
pub enum Offered {
    /// It is there already.
    There,
    /// Room for it.
    Room(Box<HostedRoom>),
    /// There is none, and none to come.
    Refused,
}

impl Host {
    /// Opens a store whose RAM is a file for other processes. Memory that was used once stays with it: the system does
    /// not take back what nobody may write.
    ///
    /// # Errors
    /// As [`Store::new`]; [`Error::Memory`](crate::Error::Memory) where the system has no such files.
    pub fn new(config: CacheConfig) -> Result<Self> {
        let store = Store::new(CacheConfig { is_shared: true, ..config })?;
        let models = store.tiers.as_ref().map_or_else(Arc::default, |tiers| Arc::clone(tiers.models()));
        Ok(Self { store, models })
    }

    /// Its memory.
    #[must_use]
    pub fn ram(&self) -> Ram {
        self.store.ram()
    }

    /// Counters and sizes as of now.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.store.stats()
    }

    /// What each namespace takes.
    #[must_use]
    pub fn usage(&self) -> Vec<NamespaceUsage> {
        self.store.usage()
    }

    /// Lengths of the prefix texts of a namespace up to `max_bytes`, shortest first.
    #[must_use]
    pub fn prefix_lengths(&self, namespace: NamespaceId, max_bytes: usize) -> Vec<usize> {
        self.store.prefix_lengths(namespace, max_bytes)
    }

    /// One more than the highest layer of a namespace.
    #[must_use]
    pub fn layers(&self, namespace: NamespaceId) -> u32 {
        self.store.layers(namespace)
    }

    /// Drops what has expired.
    pub fn sweep(&self) {
        self.store.sweep();
    }

    /// Makes everything durable, where there is a disk.
    ///
    /// # Errors
    /// As [`Store::flush`].
    pub fn flush(&self) -> Result<()> {
        if self.store.tiers.is_some() { self.store.flush() } else { Ok(()) }
    }

    /// Waits until listeners were told of all that has happened, so long at most.
    pub fn settle_events(&self, at_most: Duration) {
        if let Some(announcer) = self.store.shared.announcer() {
            announcer.settle_until(Deadline::after(at_most));
        }
    }

    /// Which of these keys of a namespace are there, one answer a key.
    #[must_use]
    pub fn locate(&self, namespace: NamespaceId, keys: &[BlockKey], deadline: Deadline) -> Vec<Option<Located>> {
        let now_ms = self.store.shared.now_ms();
        let mut located: Vec<Option<Located>> = self.store.shared.with(|ledger| {
            let mut find = |key: &BlockKey| {
                let id = ledger.find_live(&key.0, now_ms)?;
                Some(Located::of(&ledger.describe(id)?, 0))
            };
            keys.iter().map(&mut find).collect()
        });
        for tier in self.store.each_tier() {
            let missing: Vec<usize> = (0..keys.len()).filter(|at| matches!(located.get(*at), Some(None))).collect();
            let names: Vec<BlockKey> = missing.iter().filter_map(|at| keys.get(*at)).copied().collect();
            for (at, found) in missing.into_iter().zip(tier.locate(namespace, &names, deadline)) {
                located
                    .iter_mut()
                    .skip(at)
                    .take(1)
                    .for_each(|place| *place = found.map(|found| Located { mark: 0, ..found }));
            }
        }
        located
    }

    /// Holds those of these blocks that are there, in these namespaces; what lies on the disk alone comes up first, if
    /// that is worth it. A request.
    #[must_use]
    pub fn hold(&self, wanted: &[(BlockKey, NamespaceId)]) -> HostedRun {
        let (mut pins, mut blocks) = (Vec::new(), Vec::with_capacity(wanted.len()));
        for run in wanted.chunk_by(|one, next| one.1 == next.1) {
            let keys: Vec<ObjectKey> = run.iter().map(|(key, _)| key.0).collect();
            let (Some((_, namespace)), mut from) = (run.first(), 0) else { continue };
            while let Some(rest) = keys.get(from..).filter(|rest| !rest.is_empty()) {
                let (pin, _) = self.store.pin_run(*namespace, rest, Request::Named);
                // What comes next after a gap is looked for behind it.
                let found = pin.len();
                blocks.extend(self.places(&pin));
                if found < rest.len() {
                    blocks.push(None);
                }
                from += found + 1;
                pins.push(pin);
            }
        }
        for (block, (_, namespace)) in blocks.iter_mut().zip(wanted) {
            if block.as_ref().is_some_and(|(_, meta)| meta.namespace != *namespace) {
                *block = None;
            }
        }
        HostedRun { _pins: pins, blocks }
    }

    /// Where the blocks of a pin lie, and what they are.
    fn places(&self, pin: &Pin) -> Vec<Option<(usize, BlockMeta)>> {
        let described: Vec<_> = self
            .store
            .shared
            .with(|ledger| pin.held().iter().map(|held| (held.grant.offset(), ledger.describe(held.id))).collect());
        let models = self.models.lock();
        let known = |(offset, meta): (usize, Option<BlockMeta>)| {
            let mut meta = meta?;
            if meta.content == Content::Nothing {
                let (layout, model) = models.get(&meta.namespace).cloned()?;
                meta.content = Content::Block { layout, model };
            }
            Some((offset, meta))
        };
        described.into_iter().map(known).collect()
    }

    /// Makes room for blocks that are not there.
    #[must_use]
    pub fn begin(&self, metas: Vec<BlockMeta>) -> Vec<Offered> {
        let epoch = self.store.shared.with(|ledger| ledger.epoch());
        let is_there = |meta: &BlockMeta| {
            let deadline = Deadline::after(super::tiers::LOOK_TIMEOUT);
            self.locate(meta.namespace, &[meta.key], deadline).iter().any(Option::is_some)
        };
        let begin = |meta: BlockMeta| {
            let is_there = is_there(&meta);
            self.begin_one(meta, is_there, epoch)
        };
        metas.into_iter().map(begin).collect()
    }

    fn begin_one(&self, meta: BlockMeta, is_there: bool, epoch: Epoch) -> Offered {
        let is_whole = meta.stored_bytes == meta.raw_bytes && meta.content.raw_bytes() == Some(meta.raw_bytes);
        let Some(bytes) = usize::try_from(meta.raw_bytes).ok().filter(|bytes| is_whole && *bytes > 0) else {
            return Offered::Refused;
        };
        if is_there {
            return Offered::There;
        }
        if let Content::Block { layout, model } = &meta.content {
            self.models.lock().entry(meta.namespace).or_insert_with(|| (*layout, model.clone()));
            if let Some(announcer) = self.store.shared.announcer() {
                announcer.describe(meta.namespace, layout.block_tokens());
            }
        }
        let made = self.store.reserve_all(meta.namespace, &[bytes]).ok().and_then(|mut made| made.pop());
        made.map_or(Offered::Refused, |pending| Offered::Room(Box::new(HostedRoom { pending, meta, epoch })))
    }

    /// Makes written blocks findable; says for each whether it is new. One that was removed meanwhile is not there.
    pub fn seal(&self, rooms: Vec<HostedRoom>) -> Vec<bool> {
        let keys: Vec<ObjectKey> = rooms.iter().map(|room| room.meta.key.0).collect();
        let through = self.store.tiers.as_ref().is_some_and(|tiers| tiers.write_policy() == WritePolicy::Through);
        let new = rooms.into_iter().map(|mut room| {
            room.pending.clear_from(usize::try_from(room.meta.raw_bytes).unwrap_or(usize::MAX));
            self.store.shared.with(|ledger| seal_one(ledger, room))
        });
        let new: Vec<bool> = new.collect();
        if through {
            self.store.shared.with(|ledger| keys.iter().for_each(|key| ledger.offer_run(&[*key])));
        }
        self.store.offer();
        new
    }

    /// These are gone, for everybody who reads here.
    pub fn forget(&self, what: &Forget<'_>) -> Forgotten {
        let shared = &self.store.shared;
        let gone = match what {
            Forget::Keys(id, keys) | Forget::Replaced(id, keys) => Gone::Keys(*id, keys.to_vec()),
            Forget::Namespace(id) => Gone::Namespace(*id),
            Forget::All => Gone::All,
        };
        // A write that has begun ends before this or does not come back: without tiers nothing else counts removals.
        let epoch = shared.with(|ledger| ledger.forget(gone));
        let forgotten = match what {
            Forget::Keys(id, keys) | Forget::Replaced(id, keys) => {
                let keys: Vec<ObjectKey> = keys.iter().map(|key| key.0).collect();
                let (removed, found) = self.store.remove(*id, &keys);
                Forgotten { found, entries: removed.entries }
            }
            Forget::Namespace(id) => {
                Forgotten { entries: self.store.clear_namespace(*id).entries, ..Forgotten::default() }
            }
            Forget::All => Forgotten { entries: self.store.clear().entries, ..Forgotten::default() },
        };
        shared.with(|ledger| ledger.has_forgotten(epoch));
        forgotten
    }
}

fn seal_one(ledger: &mut Ledger, room: HostedRoom) -> bool {
    let HostedRoom { pending, meta, epoch } = room;
    let (key, namespace) = (meta.key.0, meta.namespace);
    let Some(extent) = pending.into_extent() else { return false };
    if !ledger.may_come_up(&key, namespace, epoch) {
        ledger.abandon(extent);
        return false;
    }
    let spec = if let Content::Named(spec) = &meta.content { Some(Arc::new(*spec)) } else { None };
    let bytes = usize::try_from(meta.raw_bytes).unwrap_or(usize::MAX);
    let entry = ledger::new_entry(key, extent, bytes, spec, meta.compute_us).begins(meta.begins);
    let written = Written {
        entry,
        expires_at_ms: meta.expires_at_ms,
        parent: None,
        place: Place::of(usize::from(!meta.begins), 1, 0),
    };
    // What replaces something was removed before it is offered: whoever offers an older value finds this one there.
    ledger.seal_all(namespace, std::iter::once(written), OnPresent::Keep, Priority::default()) > 0
}

impl HostedRun {
    /// For each block that was wanted, where it begins in the memory, in bytes, and what it is.
    #[must_use]
    pub fn blocks(&self) -> &[Option<(usize, BlockMeta)>] {
        &self.blocks
    }
}

impl HostedRoom {
    /// What is to be written.
    #[must_use]
    pub fn meta(&self) -> &BlockMeta {
        &self.meta
    }

    /// A part of its pages.
    pub fn part_mut(&mut self, at: usize, bytes: usize) -> Option<&mut [u8]> {
        let end = at.checked_add(bytes).filter(|end| *end as u64 <= self.meta.raw_bytes)?;
        Some(self.pending.part_mut(at..end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::Facts;
    use crate::layout::KvLayout;

    const BYTES: usize = 6000;

    fn host(pages: u64) -> Host {
        Host::new(CacheConfig::new(pages * 4096)).unwrap()
    }

    fn meta(number: u64, namespace: &str) -> BlockMeta {
        let layout = KvLayout::opaque(u32::try_from(BYTES).unwrap(), 1).unwrap();
        let facts = Facts {
            compute_us: 7,
            ..Facts::raw(ObjectKey::numbered(number), NamespaceId::named(namespace), BYTES as u64)
        };
        BlockMeta { facts, begins: number == 0, content: Content::Block { layout, model: "m".into() } }
    }

    fn room(host: &Host, meta: BlockMeta) -> HostedRoom {
        match host.begin(vec![meta]).pop() {
            Some(Offered::Room(room)) => *room,
            other => panic!("{other:?}"),
        }
    }

    fn store(host: &Host, number: u64) {
        let mut room = room(host, meta(number, "n"));
        room.part_mut(0, BYTES).unwrap().fill(u8::try_from(number).unwrap());
        assert_eq!(host.seal(vec![room]), [true]);
    }

    fn wanted(number: u64) -> (BlockKey, NamespaceId) {
        (meta(number, "n").key, NamespaceId::named("n"))
    }

    #[test]
    fn what_is_sealed_is_held_where_it_lies_and_described_as_it_was_offered() {
        let host = host(16);
        (0..3).for_each(|number| store(&host, number));
        let run = host.hold(&[wanted(2), wanted(9), wanted(0)]);
        let blocks: Vec<_> = run.blocks().iter().map(|block| block.as_ref().map(|(_, meta)| meta.clone())).collect();
        assert_eq!(blocks, [Some(meta(2, "n")), None, Some(meta(0, "n"))]);
        assert_eq!(host.stats().held_bytes, 4 * 4096);
        drop(run);
        assert_eq!(host.stats().held_bytes, 0);
        let foreign = (meta(2, "n").key, NamespaceId::named("other"));
        assert!(host.hold(&[foreign]).blocks()[0].is_none());
        assert!(matches!(host.begin(vec![meta(2, "n")]).pop(), Some(Offered::There)));
    }

    #[test]
    fn what_was_removed_while_it_was_written_does_not_come_back() {
        for what in [
            Forget::Keys(NamespaceId::named("n"), &[meta(1, "n").key]),
            Forget::Namespace(NamespaceId::named("n")),
            Forget::All,
        ] {
            let host = host(16);
            let late = room(&host, meta(1, "n"));
            host.forget(&what);
            assert_eq!(host.seal(vec![late]), [false], "{what:?}");
            assert_eq!(host.stats().used_bytes, 0);
            store(&host, 1);
        }
    }

    #[test]
    fn what_is_being_written_is_found_by_nobody_and_free_when_it_is_dropped() {
        let host = host(4);
        let one = room(&host, meta(1, "n"));
        assert!(host.hold(&[wanted(1)]).blocks()[0].is_none());
        let two = room(&host, meta(2, "n"));
        assert!(matches!(host.begin(vec![meta(3, "n")]).pop(), Some(Offered::Refused)), "all is being written");
        drop((one, two));
        assert_eq!(host.stats().used_bytes, 0);
    }

    #[test]
    fn a_description_that_lies_about_its_size_is_refused() {
        let host = host(16);
        let facts = Facts { raw_bytes: 5000, stored_bytes: 5000, ..meta(1, "n").facts };
        assert!(matches!(host.begin(vec![BlockMeta { facts, ..meta(1, "n") }]).pop(), Some(Offered::Refused)));
        let mut room = room(&host, meta(1, "n"));
        assert!(room.part_mut(BYTES - 1, 2).is_none() && room.part_mut(usize::MAX, 2).is_none());
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn nobody_else_can_write_to_its_memory() {
        use std::os::fd::AsFd;
        let host = host(16);
        store(&host, 1);
        let ram = host.ram();
        let file = std::fs::File::from(ram.file().unwrap().as_fd().try_clone_to_owned().unwrap());
        let written = std::os::unix::fs::FileExt::write_at(&file, &[1], 0);
        assert!(written.is_err() && file.set_len(0).is_err());
    }
}
