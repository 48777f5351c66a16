//! Blocks in plain memory: the simplest tier, for tests and for trying out what needs a second one.
//!
//! The oldest blocks go first when the cap is reached. Everything is done in place, by whoever calls.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::{Epoch, Forget, Forgets, Forgotten, Located, Offer, Read, Tier};
use crate::block::{BlockKey, BlockMeta, Content};
use crate::clock::{Clock, Deadline};
use crate::codec::Codecs;
use crate::error::Result;
use crate::event::Reports;
use crate::key::NamespaceId;
use crate::namespaces::Usage;
use crate::stats::TierStats;
use crate::sync::Mutex;

/// A tier of so many bytes in memory.
pub struct MemoryTier {
    name: String,
    capacity_bytes: u64,
    clock: Arc<dyn Clock>,
    codecs: Codecs,
    blocks: Mutex<Blocks>,
}

#[derive(Default)]
struct Blocks {
    by_key: HashMap<BlockKey, Kept>,
    /// In the order of their coming; what is gone stays until its turn.
    order: VecDeque<(BlockKey, u64)>,
    last_number: u64,
    forgets: Forgets,
    stats: TierStats,
    reports: Option<Reports>,
    is_closed: bool,
}

struct Kept {
    number: u64,
    /// Of the stored form.
    meta: BlockMeta,
    mark: u8,
    bytes: Arc<[u8]>,
}

impl MemoryTier {
    /// An empty one.
    #[must_use]
    pub fn new(name: impl Into<String>, capacity_bytes: u64, clock: Arc<dyn Clock>) -> Self {
        Self { name: name.into(), capacity_bytes, clock, codecs: Codecs::default(), blocks: Mutex::default() }
    }

    /// Encodes with these codecs.
    #[must_use]
    pub fn codecs(mut self, codecs: Codecs) -> Self {
        self.codecs = codecs;
        self
    }

    /// The block under a key, if it has not expired.
    fn get(&self, read: &Read) -> Option<(BlockMeta, Arc<[u8]>)> {
        let now_ms = self.clock.now_ms();
        let blocks = self.blocks.lock();
        let kept = blocks.by_key.get(&read.key)?;
        let is_right = kept.meta.namespace == read.namespace && kept.meta.expires_at_ms > now_ms;
        is_right.then(|| (kept.meta.clone(), Arc::clone(&kept.bytes)))
    }

    /// Hands over what is wanted, followed by zeros; says whether there was room for it.
    fn decode(&self, meta: &BlockMeta, stored: &[u8], read: &mut Read) -> bool {
        let Read { range, target, .. } = read;
        target.fill(&mut |bytes| meta.decode(&self.codecs, stored, range.clone(), bytes))
    }

    fn take(&self, offer: &Offer) -> Option<bool> {
        let now_ms = self.clock.now_ms();
        let encoded = offer.meta.encoded(&self.codecs, offer.payload.bytes());
        let meta = encoded.as_ref().map_or(&offer.meta, |(meta, _)| meta);
        let bytes = encoded.as_ref().map_or_else(|| offer.payload.bytes(), |(_, bytes)| bytes);
        let mut blocks = self.blocks.lock();
        if blocks.is_closed || meta.stored_bytes > self.capacity_bytes {
            return None;
        }
        if !blocks.forgets.allow(&meta.key, meta.namespace, offer.epoch) {
            return Some(false);
        }
        let is_there = blocks.by_key.get(&meta.key).is_some_and(|kept| kept.meta.expires_at_ms > now_ms);
        if is_there && !meta.is_replaceable() {
            return Some(false);
        }
        if meta.is_replaceable() {
            blocks.forgets.record(&Forget::Replaced(meta.namespace, &[meta.key]), offer.epoch);
        }
        blocks.remove(&meta.key);
        while blocks.stats.used_bytes + meta.stored_bytes > self.capacity_bytes {
            let (key, number) = blocks.order.pop_front()?;
            if blocks.by_key.get(&key).is_some_and(|kept| kept.number == number) {
                blocks.remove(&key);
                blocks.stats.evictions += 1;
            }
        }
        blocks.insert(meta, offer.mark, bytes);
        Some(true)
    }
}

impl Blocks {
    fn insert(&mut self, meta: &BlockMeta, mark: u8, bytes: &[u8]) {
        let stored = usize::try_from(meta.stored_bytes).unwrap_or(usize::MAX).min(bytes.len());
        self.last_number += 1;
        let (number, key) = (self.last_number, meta.key);
        let bytes = bytes.get(..stored).unwrap_or_default().into();
        self.by_key.insert(key, Kept { number, meta: meta.clone(), mark, bytes });
        self.order.push_back((key, number));
        self.reports.iter().for_each(|reports| reports.came(meta));
        self.stats.used_bytes += meta.stored_bytes;
        self.stats.stored_total += 1;
        self.stats.written_bytes_total += meta.stored_bytes;
        self.stats.written_raw_bytes_total += meta.raw_bytes;
    }

    fn remove(&mut self, key: &BlockKey) -> bool {
        let kept = self.by_key.remove(key);
        self.reports.iter().for_each(|reports| reports.went(key));
        self.stats.used_bytes -= kept.as_ref().map_or(0, |kept| kept.meta.stored_bytes);
        kept.is_some()
    }

    fn remove_where(&mut self, goes: impl Fn(&BlockMeta) -> bool) -> u64 {
        let gone: Vec<BlockKey> =
            self.by_key.iter().filter(|(_, kept)| goes(&kept.meta)).map(|(key, _)| *key).collect();
        gone.iter().for_each(|key| _ = self.remove(key));
        gone.len() as u64
    }
}

impl Tier for MemoryTier {
    fn name(&self) -> &str {
        &self.name
    }

    fn locate(&self, _namespace: NamespaceId, keys: &[BlockKey], _deadline: Deadline) -> Vec<Option<Located>> {
        let now_ms = self.clock.now_ms();
        let blocks = self.blocks.lock();
        let located = |key: &BlockKey| {
            let Kept { meta, mark, .. } = blocks.by_key.get(key).filter(|kept| kept.meta.expires_at_ms > now_ms)?;
            Some(Located::of(meta, *mark))
        };
        keys.iter().map(located).collect()
    }

    fn read(&self, reads: Vec<Read>) {
        for mut read in reads {
            let got = self.get(&read).filter(|(meta, bytes)| self.decode(meta, bytes, &mut read));
            if let Some((meta, _)) = &got {
                let mut blocks = self.blocks.lock();
                blocks.stats.hits += 1;
                blocks.stats.read_bytes_total += meta.stored_bytes;
            }
            read.target.complete(got.map(|(meta, _)| meta.decoded()));
        }
    }

    fn offer(&self, offers: Vec<Offer>, _deadline: Deadline) -> Vec<Offer> {
        let mut back = Vec::new();
        for offer in offers {
            match self.take(&offer) {
                Some(is_new) => offer.payload.written(is_new),
                None => back.push(offer),
            }
        }
        self.blocks.lock().stats.dropped_total += back.len() as u64;
        back
    }

    fn forget(&self, what: &Forget<'_>, epoch: Epoch) -> Forgotten {
        let mut blocks = self.blocks.lock();
        blocks.forgets.record(what, epoch);
        match what {
            Forget::Replaced(_, keys) => {
                let keys = blocks.forgets.not_newer(keys, epoch);
                keys.iter().for_each(|key| _ = blocks.remove(key));
                Forgotten::default()
            }
            Forget::Keys(_, keys) => {
                let found: Vec<bool> = keys.iter().map(|key| blocks.remove(key)).collect();
                let entries = found.iter().filter(|found| **found).count() as u64;
                Forgotten { found, entries }
            }
            Forget::Namespace(id) => {
                Forgotten { entries: blocks.remove_where(|meta| meta.namespace == *id), ..Forgotten::default() }
            }
            Forget::All => Forgotten { entries: blocks.remove_where(|_| true), ..Forgotten::default() },
        }
    }

    fn flush(&self, _patience: Duration) -> Result<()> {
        Ok(())
    }

    fn close(&self) -> Result<()> {
        self.blocks.lock().is_closed = true;
        Ok(())
    }

    fn stats(&self) -> TierStats {
        let blocks = self.blocks.lock();
        TierStats {
            name: self.name.clone(),
            entries: blocks.by_key.len() as u64,
            capacity_bytes: self.capacity_bytes,
            codec: self.codecs.name(),
            ..blocks.stats.clone()
        }
    }

    fn lossy(&self, namespace: NamespaceId) -> Option<&'static str> {
        self.codecs.lossy(namespace)
    }

    fn sweep(&self) {
        let now_ms = self.clock.now_ms();
        self.blocks.lock().remove_where(|meta| meta.expires_at_ms <= now_ms);
    }

    fn report_to(&self, reports: Reports) {
        let mut blocks = self.blocks.lock();
        blocks.by_key.values().for_each(|kept| reports.came(&kept.meta));
        blocks.reports = Some(reports);
    }

    fn usage(&self) -> Vec<(NamespaceId, Usage)> {
        let mut usage: HashMap<NamespaceId, Usage> = HashMap::new();
        for kept in self.blocks.lock().by_key.values() {
            let of = usage.entry(kept.meta.namespace).or_default();
            of.entries += 1;
            of.bytes += kept.meta.stored_bytes;
        }
        usage.into_iter().collect()
    }

    fn prefix_lengths(&self, namespace: NamespaceId, max_bytes: usize) -> Vec<usize> {
        let blocks = self.blocks.lock();
        let length = |kept: &Kept| match &kept.meta.content {
            Content::Named(spec) if kept.meta.namespace == namespace => Some(spec.prefix_bytes),
            _ => None,
        };
        let lengths = blocks.by_key.values().filter_map(length).filter(|length| *length <= max_bytes);
        let lengths: std::collections::BTreeSet<usize> = lengths.collect();
        lengths.into_iter().collect()
    }

    fn layers(&self, namespace: NamespaceId) -> u32 {
        let blocks = self.blocks.lock();
        let of = |kept: &&Kept| kept.meta.namespace == namespace;
        blocks.by_key.values().filter(of).map(|kept| kept.meta.key.layer() + 1).max().unwrap_or(0)
    }
}

impl fmt::Debug for MemoryTier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryTier").field("name", &self.name).finish_non_exhaustive()
    }
}
