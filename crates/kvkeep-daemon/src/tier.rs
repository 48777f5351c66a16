//! The tier: what a cache asks of the daemon, on the cache's threads. Nothing here waits longer than its deadline.
//!
//! The daemon's RAM is one for all processes, a cache's own RAM before it is not: what one process removes or replaces is
//! gone from the daemon and from its own RAM, and another process's RAM has what it has until it evicts that.

use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::Duration;

use kvkeep::tiers::{BlockKey, CodecId, Deadline, Epoch, Forget, Forgotten, Located, Offer, Read, Reports};
use kvkeep::{Error, NamespaceId, Process, Result, Tier, TierStats, Usage};

use crate::config::DaemonTierConfig;
use crate::link;
use crate::lock;
use crate::news;
use crate::reader::{self, READERS};
use crate::shared::{Counts, Shared};
use crate::wire::{Answer, Figures, Gone, MAX_KEYS, Purpose, Request};
use crate::writer::{self, WRITERS};

/// Its name in statistics and flags.
const NAME: &str = "daemon";
/// What one message of a removal may wait for.
const FORGET_TIME: Duration = Duration::from_secs(1);
/// Figures are not worth waiting for.
const FIGURES_TIME: Duration = Duration::from_millis(50);

/// A daemon's RAM, as a tier behind a cache's own.
pub struct DaemonTier {
    shared: Arc<Shared>,
    process: Process,
}

impl DaemonTier {
    /// The daemon on a socket. One that is not there now is no error: it is used as soon as it is.
    ///
    /// # Errors
    /// [`Error::Config`] if the daemon does not want this client, or there are no threads.
    pub fn open(config: &DaemonTierConfig) -> Result<Self> {
        let refused =
            |error: std::io::Error| Error::Config(format!("the daemon at {}: {error}", config.socket.display()));
        let shared = Arc::new(Shared::new(config.clone()));
        match link::establish(&shared) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => return Err(refused(error)),
            Err(error) => tracing::warn!(%error, "the daemon is not there: going on without until it is"),
        }
        let tier = Self { shared, process: Process::current() };
        tier.begin("kvkeep-daemon", link::keep).map_err(refused)?;
        for _ in 0..WRITERS {
            tier.begin("kvkeep-write", writer::run).map_err(refused)?;
        }
        for _ in 0..READERS {
            tier.begin("kvkeep-read", reader::run).map_err(refused)?;
        }
        Ok(tier)
    }

    /// Is the daemon there, as far as is known?
    #[must_use]
    pub fn works(&self) -> bool {
        self.is_here() && self.shared.is_up()
    }

    fn begin(&self, name: &str, work: fn(&Arc<Shared>)) -> std::io::Result<()> {
        let shared = Arc::clone(&self.shared);
        thread::Builder::new().name(name.to_owned()).spawn(move || work(&shared)).map(drop)
    }

    /// A forked child has none of the threads, and the connections are its parent's.
    fn is_here(&self) -> bool {
        self.process.is_current()
    }

    fn ask(&self, request: &Request, at_most: Duration) -> Option<Answer> {
        if self.is_here() { self.shared.ask(request, Deadline::after(at_most)) } else { None }
    }

    /// Takes one offer into the queue, or gives it back.
    fn take(&self, offer: Offer, deadline: Deadline) -> Option<Offer> {
        let (shared, bytes) = (&self.shared, offer.meta.stored_bytes);
        let is_lost = || shared.is_closed() || !shared.is_up();
        if is_lost() || offer.meta.codec != CodecId::RAW || bytes > shared.capacity_bytes.load(Ordering::SeqCst) {
            return Some(offer);
        }
        {
            let mut forgets = lock(&shared.forgets);
            if !forgets.allow(&offer.meta.key, offer.meta.namespace, offer.epoch) {
                return None;
            }
            if offer.meta.is_replaceable() {
                forgets.record(&Forget::Replaced(offer.meta.namespace, &[offer.meta.key]), offer.epoch);
            }
        }
        let mut writes = lock(&shared.writes);
        while writes.bytes > 0 && writes.bytes + bytes > shared.config.queue_bytes {
            if deadline.is_over() || is_lost() {
                return Some(offer);
            }
            (writes, _) = shared.written.wait_timeout(writes, deadline.left()).unwrap_or_else(PoisonError::into_inner);
        }
        if shared.is_closed() {
            return Some(offer);
        }
        shared.set_mark(offer.meta.key, offer.mark);
        writes.bytes += bytes;
        writes.queue.push_back(offer);
        drop(writes);
        shared.written.notify_all();
        None
    }

    /// Waits until what was offered is written, as long as that gets on.
    fn drain(&self, patience: Duration) -> Result<()> {
        let mut writes = lock(&self.shared.writes);
        while !writes.queue.is_empty() || writes.writing > 0 {
            let (done, blocks) = (writes.done, writes.queue.len());
            let waited = self.shared.written.wait_timeout_while(writes, patience, |writes| {
                writes.done == done && (!writes.queue.is_empty() || writes.writing > 0)
            });
            let (now, waited) = waited.unwrap_or_else(PoisonError::into_inner);
            if waited.timed_out() {
                return Err(Error::NotTaken { tier: NAME.to_owned(), blocks });
            }
            writes = now;
        }
        Ok(())
    }

    /// Waits until the listener has heard of everything so far.
    fn settle(&self, patience: Duration) {
        let number = {
            let mut news = lock(&self.shared.news);
            if news.reports.is_none() {
                return;
            }
            news.last_mark += 1;
            // Those of other clients come too.
            (u64::from(std::process::id()) << 32) | news.last_mark & 0xffff_ffff
        };
        let Ok(mut other) = link::connect(&self.shared.config, Purpose::Ask) else { return };
        let deadline = Deadline::after(patience);
        if other.channel.ask(&Request::Settle(number), deadline).is_err() {
            return;
        }
        let news = lock(&self.shared.news);
        let waits = self.shared.heard.wait_timeout_while(news, deadline.left(), |news| {
            news.mark != number && self.shared.is_up() && !self.shared.is_closed()
        });
        drop(waits);
    }
}

impl Tier for DaemonTier {
    fn name(&self) -> &str {
        NAME
    }

    fn locate(&self, namespace: NamespaceId, keys: &[BlockKey], deadline: Deadline) -> Vec<Option<Located>> {
        let mut located = Vec::with_capacity(keys.len());
        for keys in keys.chunks(MAX_KEYS) {
            let at_most = self.shared.config.deadline.min(deadline.left());
            match self.ask(&Request::Locate(namespace, keys.to_vec()), at_most) {
                Some(Answer::Located(some)) if some.len() == keys.len() => located.extend(some),
                _ => located.resize(located.len() + keys.len(), None),
            }
        }
        located.iter_mut().for_each(|located| *located = located.filter(|located| located.namespace == namespace));
        let found = keys.iter().zip(&mut located);
        self.shared.marks(found.filter_map(|(key, located)| Some((key, &mut located.as_mut()?.mark))));
        located
    }

    fn read(&self, reads: Vec<Read>) {
        let left = if self.works() { self.shared.reads.push(reads) } else { reads };
        left.into_iter().for_each(|read| read.target.complete(None));
    }

    fn offer(&self, offers: Vec<Offer>, deadline: Deadline) -> Vec<Offer> {
        if !self.is_here() {
            return offers;
        }
        let back: Vec<Offer> = offers.into_iter().filter_map(|offer| self.take(offer, deadline)).collect();
        Counts::add(&self.shared.counts.dropped, back.len() as u64);
        back
    }

    fn give_up(&self, _waited: Duration) -> usize {
        if !self.is_here() {
            return 0;
        }
        let mut writes = lock(&self.shared.writes);
        let given_up = std::mem::take(&mut writes.queue);
        writes.bytes -= given_up.iter().map(|offer| offer.meta.stored_bytes).sum::<u64>();
        writes.done += 1;
        drop(writes);
        self.shared.written.notify_all();
        Counts::add(&self.shared.counts.dropped, given_up.len() as u64);
        given_up.len()
    }

    fn deadline(&self) -> Option<Duration> {
        Some(self.shared.config.deadline)
    }

    fn forget(&self, what: &Forget<'_>, epoch: Epoch) -> Forgotten {
        let mut forgotten = Forgotten::default();
        if !self.is_here() {
            return forgotten;
        }
        let gone = {
            let mut forgets = lock(&self.shared.forgets);
            forgets.record(what, epoch);
            match what {
                Forget::Replaced(id, keys) => Gone::Replaced(*id, forgets.not_newer(keys, epoch)),
                what => Gone::of(what),
            }
        };
        for gone in gone.in_messages() {
            // Each one anew: a daemon that gets on is waited for.
            let deadline = Deadline::after(FORGET_TIME);
            let (keys, is_replaced) = (gone.keys(), matches!(gone, Gone::Replaced(..)));
            match self.shared.ask_to_forget(gone, deadline) {
                Some(Answer::Forgotten { .. }) if is_replaced => {}
                Some(Answer::Forgotten { found, entries }) => {
                    forgotten.found.extend(found);
                    forgotten.entries += entries;
                }
                _ if matches!(what, Forget::Keys(..)) => forgotten.found.resize(forgotten.found.len() + keys, false),
                _ => {}
            }
        }
        forgotten
    }

    fn flush(&self, patience: Duration) -> Result<()> {
        if !self.is_here() {
            return Ok(());
        }
        self.drain(patience)?;
        // A connection of its own: nobody waits behind a disk.
        if let Ok(mut other) = link::connect(&self.shared.config, Purpose::Ask)
            && let Ok(Answer::Done(Some(why))) = other.channel.ask(&Request::Flush, Deadline::after(patience))
        {
            return Err(Error::Tier { tier: NAME.to_owned(), doing: "flush", source: std::io::Error::other(why) });
        }
        self.settle(patience);
        Ok(())
    }

    fn close(&self) -> Result<()> {
        let flushed = if self.works() { self.flush(Duration::from_secs(5)) } else { Ok(()) };
        if self.is_here() {
            self.shared.close();
        }
        flushed
    }

    fn stats(&self) -> TierStats {
        let figures = match self.ask(&Request::Stats, FIGURES_TIME) {
            Some(Answer::Figures(figures)) => figures,
            _ => Figures { capacity_bytes: self.shared.capacity_bytes.load(Ordering::SeqCst), ..Figures::default() },
        };
        let counts = &self.shared.counts;
        let mut stats = TierStats::default();
        NAME.clone_into(&mut stats.name);
        stats.entries = figures.entries;
        stats.used_bytes = figures.used_bytes;
        stats.capacity_bytes = figures.capacity_bytes;
        stats.index_bytes = figures.index_bytes;
        stats.evictions = figures.evictions;
        stats.hits = Counts::get(&counts.hits);
        stats.read_bytes_total = Counts::get(&counts.read_bytes);
        stats.stored_total = Counts::get(&counts.stored);
        stats.written_bytes_total = Counts::get(&counts.written_bytes);
        stats.written_raw_bytes_total = stats.written_bytes_total;
        stats.dropped_total = Counts::get(&counts.dropped);
        stats.damaged_total = Counts::get(&counts.damaged);
        stats.timeouts_total = Counts::get(&counts.timeouts);
        stats.codec = "raw";
        if self.is_here() {
            stats.queued_bytes = lock(&self.shared.writes).bytes;
        }
        stats.failing = !self.works();
        stats
    }

    fn gave_up_waiting(&self) {
        Counts::add(&self.shared.counts.timeouts, 1);
        self.shared.lose();
    }

    fn report_to(&self, reports: Reports) {
        lock(&self.shared.news).reports = Some(reports);
        if let Err(error) = self.begin("kvkeep-listen", news::run) {
            tracing::warn!(%error, "nothing is told of the daemon's blocks");
        }
    }

    fn usage(&self) -> Vec<(NamespaceId, Usage)> {
        let Some(Answer::Usage(usage)) = self.ask(&Request::Usage, FIGURES_TIME) else { return Vec::new() };
        usage.into_iter().map(|(id, entries, bytes)| (id, Usage::new(entries, bytes))).collect()
    }

    fn prefix_lengths(&self, namespace: NamespaceId, max_bytes: usize) -> Vec<usize> {
        let request = Request::PrefixLengths(namespace, max_bytes as u64);
        let Some(Answer::Numbers(lengths)) = self.ask(&request, self.shared.config.deadline) else { return Vec::new() };
        lengths.into_iter().filter_map(|length| usize::try_from(length).ok()).collect()
    }

    fn layers(&self, namespace: NamespaceId) -> u32 {
        let Some(Answer::Numbers(layers)) = self.ask(&Request::Layers(namespace), self.shared.config.deadline) else {
            return 0;
        };
        layers.first().and_then(|layers| u32::try_from(*layers).ok()).unwrap_or(0)
    }
}

impl Drop for DaemonTier {
    fn drop(&mut self) {
        if self.is_here() {
            self.shared.close();
        }
    }
}

impl fmt::Debug for DaemonTier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DaemonTier").field("socket", &self.shared.config.socket).finish_non_exhaustive()
    }
}
