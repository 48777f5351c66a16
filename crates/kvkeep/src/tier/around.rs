//! Tiers around another tier: they change one thing and pass on the rest.
//!
//! - [`Meter`] counts calls, bytes and misses.
//! - [`Limit`] lets so many reads be under way at a time, and no more.
//! - [`Fault`] fails or delays on request, for tests.
//!
//! One tier with all of it as options was the alternative: then every tier has to be trusted to use them alike.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::{Epoch, Forget, Forgotten, Located, Offer, Read, ReadTarget, Tier};
use crate::block::{BlockKey, BlockMeta};
use crate::clock::Deadline;
use crate::error::Result;
use crate::event::Reports;
use crate::key::NamespaceId;
use crate::namespaces::Usage;
use crate::stats::TierStats;
use crate::sync::Mutex;

/// Passes these calls on to `self.inner`.
macro_rules! pass_on {
    () => {
        fn name(&self) -> &str {
            self.inner.name()
        }
        fn give_up(&self, waited: Duration) -> usize {
            self.inner.give_up(waited)
        }
        fn deadline(&self) -> Option<Duration> {
            self.inner.deadline()
        }
        fn forget(&self, what: &Forget<'_>, epoch: Epoch) -> Forgotten {
            self.inner.forget(what, epoch)
        }
        fn close(&self) -> Result<()> {
            self.inner.close()
        }
        fn touch(&self, keys: &[BlockKey]) {
            self.inner.touch(keys);
        }
        fn stats(&self) -> TierStats {
            self.inner.stats()
        }
        fn gave_up_waiting(&self) {
            self.inner.gave_up_waiting();
        }
        fn is_stuck(&self) -> bool {
            self.inner.is_stuck()
        }
        fn sweep(&self) {
            self.inner.sweep();
        }
        fn report_to(&self, reports: Reports) {
            self.inner.report_to(reports);
        }
        fn usage(&self) -> Vec<(NamespaceId, Usage)> {
            self.inner.usage()
        }
        fn lossy(&self, namespace: NamespaceId) -> Option<&'static str> {
            self.inner.lossy(namespace)
        }
        fn prefix_lengths(&self, namespace: NamespaceId, max_bytes: usize) -> Vec<usize> {
            self.inner.prefix_lengths(namespace, max_bytes)
        }
        fn layers(&self, namespace: NamespaceId) -> u32 {
            self.inner.layers(namespace)
        }
    };
}

/// Counts what goes through.
#[derive(Debug)]
pub struct Meter {
    inner: Arc<dyn Tier>,
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    located: AtomicU64,
    reads: AtomicU64,
    misses: AtomicU64,
    read_bytes: AtomicU64,
    offers: AtomicU64,
    refused: AtomicU64,
}

/// What a [`Meter`] has counted so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Metered {
    /// Keys asked for.
    pub located_keys: u64,
    /// Reads that have ended.
    pub reads: u64,
    /// Those of them that were misses.
    pub misses: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Blocks offered.
    pub offers: u64,
    /// Those of them that came back.
    pub refused: u64,
}

/// The memory of a read that a [`Meter`] counts.
struct MeteredTarget {
    inner: Box<dyn ReadTarget>,
    /// Of a part.
    part_bytes: Option<usize>,
    counts: Arc<Counts>,
}

impl Meter {
    /// Around this tier.
    #[must_use]
    pub fn new(inner: Arc<dyn Tier>) -> Self {
        Self { inner, counts: Arc::default() }
    }

    /// What was counted so far.
    #[must_use]
    pub fn counts(&self) -> Metered {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let counts = &self.counts;
        Metered {
            located_keys: get(&counts.located),
            reads: get(&counts.reads),
            misses: get(&counts.misses),
            read_bytes: get(&counts.read_bytes),
            offers: get(&counts.offers),
            refused: get(&counts.refused),
        }
    }
}

impl ReadTarget for MeteredTarget {
    fn bytes_mut(&mut self) -> &mut [u8] {
        self.inner.bytes_mut()
    }

    fn fill(&mut self, copy: &mut dyn FnMut(&mut [u8]) -> bool) -> bool {
        self.inner.fill(copy)
    }

    fn complete(self: Box<Self>, read: Option<BlockMeta>) {
        self.counts.reads.fetch_add(1, Ordering::Relaxed);
        match &read {
            Some(meta) => {
                let bytes = self.part_bytes.map_or(meta.raw_bytes, |bytes| bytes as u64);
                self.counts.read_bytes.fetch_add(bytes, Ordering::Relaxed)
            }
            None => self.counts.misses.fetch_add(1, Ordering::Relaxed),
        };
        self.inner.complete(read);
    }
}

impl Tier for Meter {
    pass_on!();

    fn locate(&self, namespace: NamespaceId, keys: &[BlockKey], deadline: Deadline) -> Vec<Option<Located>> {
        self.counts.located.fetch_add(keys.len() as u64, Ordering::Relaxed);
        self.inner.locate(namespace, keys, deadline)
    }

    fn read(&self, reads: Vec<Read>) {
        let metered = |read: Read| {
            let part_bytes = read.range.as_ref().map(ExactSizeIterator::len);
            let target = Box::new(MeteredTarget { inner: read.target, part_bytes, counts: Arc::clone(&self.counts) });
            Read { target, ..read }
        };
        self.inner.read(reads.into_iter().map(metered).collect());
    }

    fn offer(&self, offers: Vec<Offer>, deadline: Deadline) -> Vec<Offer> {
        self.counts.offers.fetch_add(offers.len() as u64, Ordering::Relaxed);
        let back = self.inner.offer(offers, deadline);
        self.counts.refused.fetch_add(back.len() as u64, Ordering::Relaxed);
        back
    }

    fn flush(&self, patience: Duration) -> Result<()> {
        self.inner.flush(patience)
    }
}

/// Lets so many reads be under way.
#[derive(Debug)]
pub struct Limit {
    inner: Arc<dyn Tier>,
    turns: Arc<Turns>,
}

#[derive(Debug)]
struct Turns {
    most: usize,
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    under_way: usize,
    reads: VecDeque<Read>,
}

/// The memory of a read that a [`Limit`] counts. When it goes, the next read begins.
struct LimitedTarget {
    inner: Option<Box<dyn ReadTarget>>,
    tier: Arc<dyn Tier>,
    turns: Arc<Turns>,
}

impl Limit {
    /// At most `most` reads of this tier at a time, and at least one.
    #[must_use]
    pub fn new(inner: Arc<dyn Tier>, most: usize) -> Self {
        Self { inner, turns: Arc::new(Turns { most: most.max(1), waiting: Mutex::default() }) }
    }

    /// Begins reads that wait, as many as may be under way.
    fn begin(tier: &Arc<dyn Tier>, turns: &Arc<Turns>) {
        let next: Vec<Read> = {
            let mut waiting = turns.waiting.lock();
            let free = turns.most.saturating_sub(waiting.under_way).min(waiting.reads.len());
            waiting.under_way += free;
            waiting.reads.drain(..free).collect()
        };
        let limited = |read: Read| {
            let (tier, turns) = (Arc::clone(tier), Arc::clone(turns));
            Read { target: Box::new(LimitedTarget { inner: Some(read.target), tier, turns }), ..read }
        };
        if !next.is_empty() {
            tier.read(next.into_iter().map(limited).collect());
        }
    }
}

impl ReadTarget for LimitedTarget {
    fn bytes_mut(&mut self) -> &mut [u8] {
        self.inner.as_mut().map_or(&mut [], |inner| inner.bytes_mut())
    }

    fn fill(&mut self, copy: &mut dyn FnMut(&mut [u8]) -> bool) -> bool {
        self.inner.as_mut().is_some_and(|inner| inner.fill(copy))
    }

    fn complete(mut self: Box<Self>, read: Option<BlockMeta>) {
        if let Some(inner) = self.inner.take() {
            inner.complete(read);
        }
    }
}

impl Drop for LimitedTarget {
    fn drop(&mut self) {
        drop(self.inner.take());
        self.turns.waiting.lock().under_way -= 1;
        Limit::begin(&self.tier, &self.turns);
    }
}

impl Tier for Limit {
    pass_on!();

    fn locate(&self, namespace: NamespaceId, keys: &[BlockKey], deadline: Deadline) -> Vec<Option<Located>> {
        self.inner.locate(namespace, keys, deadline)
    }

    fn read(&self, reads: Vec<Read>) {
        self.turns.waiting.lock().reads.extend(reads);
        Self::begin(&self.inner, &self.turns);
    }

    fn offer(&self, offers: Vec<Offer>, deadline: Deadline) -> Vec<Offer> {
        self.inner.offer(offers, deadline)
    }

    fn flush(&self, patience: Duration) -> Result<()> {
        self.inner.flush(patience)
    }
}

/// Fails on request.
#[derive(Debug)]
pub struct Fault {
    inner: Arc<dyn Tier>,
    fails_reads: AtomicBool,
    fails_offers: AtomicBool,
    is_away: AtomicBool,
}

impl Fault {
    /// Around this tier; nothing fails yet.
    #[must_use]
    pub fn new(inner: Arc<dyn Tier>) -> Self {
        let no = || AtomicBool::new(false);
        Self { inner, fails_reads: no(), fails_offers: no(), is_away: no() }
    }

    /// Every read is a miss from now on, or not any more.
    pub fn fail_reads(&self, fails: bool) {
        self.fails_reads.store(fails, Ordering::Relaxed);
    }

    /// Nothing that is offered is taken from now on, or not any more.
    pub fn fail_offers(&self, fails: bool) {
        self.fails_offers.store(fails, Ordering::Relaxed);
    }

    /// Nothing is found from now on, or not any more.
    pub fn go_away(&self, is_away: bool) {
        self.is_away.store(is_away, Ordering::Relaxed);
    }
}

impl Tier for Fault {
    pass_on!();

    fn locate(&self, namespace: NamespaceId, keys: &[BlockKey], deadline: Deadline) -> Vec<Option<Located>> {
        if self.is_away.load(Ordering::Relaxed) {
            return vec![None; keys.len()];
        }
        self.inner.locate(namespace, keys, deadline)
    }

    fn read(&self, reads: Vec<Read>) {
        if self.fails_reads.load(Ordering::Relaxed) {
            return reads.into_iter().for_each(|read| read.target.complete(None));
        }
        self.inner.read(reads);
    }

    fn offer(&self, offers: Vec<Offer>, deadline: Deadline) -> Vec<Offer> {
        if self.fails_offers.load(Ordering::Relaxed) { offers } else { self.inner.offer(offers, deadline) }
    }

    fn flush(&self, patience: Duration) -> Result<()> {
        self.inner.flush(patience)
    }
}
