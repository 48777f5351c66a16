//! The store: sealed objects under keys, in one arena, under one cap, and the tiers behind it. Both front doors
//! ([`KvCache`](crate::KvCache) by tokens, [`SimpleKvCache`](crate::SimpleKvCache) by prefix text) only make keys for
//! it.
//!
//! - `ledger` is everything under the one lock: index, policy, free pages. It does no I/O and asks no tier.
//! - `plan` says what of a chain lies where, and what is worth loading. `fetch` brings it up, `demote` takes it down.
//! - `storing` makes room for what is missing, and seals it. `remove` takes out what is not to be found any more.
//! - `host` serves it all by key, for a process that shares its RAM with others.
//! - `guard` has what callers hold: [`Pending`] to write, [`Pin`] to read. `lease` has pins for holders elsewhere.
//!
//! The lock is never held while payload bytes are copied, while a tier is asked, or while something is logged or
//! published. Shards with a lock each were the alternative: the blocks of one prompt would lie in all of them, and a
//! lookup of 512 blocks takes one lock 512 times over instead of once.

mod demote;
mod fetch;
pub(crate) mod gate;
mod give_back;
mod guard;
#[cfg(feature = "disk")]
mod host;
mod lease;
pub(crate) mod ledger;
mod lent;
mod loads;
mod memory;
mod meter;
mod parts;
mod patience;
mod plan;
mod promote;
mod remove;
mod retained;
mod storing;
#[cfg(test)]
#[cfg(feature = "disk")]
mod tests;
mod tiers;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::chain::Chain;
use crate::clock::{Clock, Deadline};
use crate::config::CacheConfig;
use crate::error::{Error, Result};
use crate::event::{Announcer, Reports};
use crate::key::{Namespace, NamespaceId, ObjectKey, PrefixHash};
use crate::namespaces::{NamespaceUsage, Usage};
use crate::process::Process;
use crate::record::TraceRecorder;
use crate::stats::Stats;
use crate::sync::{Condvar, Mutex, MutexGuard};
use crate::tier::Tier;
use crate::tier::ram::{self, Arena};

use give_back::GiveBack;
pub(crate) use guard::{Pending, Pin, PrivatePin};
#[cfg(feature = "disk")]
pub use host::{Host, HostedRoom, HostedRun, Offered};
use lease::Leases;
pub use lease::{Lease, LeaseId, Leased};
use ledger::{Ledger, News};
pub(crate) use ledger::{OnPresent, Request, Terms, Wanted};
pub use memory::Ram;
pub(crate) use plan::Loaded;
use retained::Retained;
pub(crate) use storing::{Reserved, Sealing};
use tiers::Tiers;

/// The name of the first tier.
const RAM: &str = "ram";

/// Keyed, sealed objects in RAM and, if configured, in tiers behind it, each under a cap. Cheap to clone:
/// clones share everything. Dropping the last clone closes the tiers.
///
/// Make one and put both front doors over it, or let each door make its own.
#[derive(Clone)]
pub struct Store {
    shared: Arc<Shared>,
    /// Not part of `shared`, which pins keep alive: with the last clone it closes.
    tiers: Option<Arc<Tiers>>,
    /// Not part of `shared` either: they hold pins.
    leases: Arc<Leases>,
}

/// What all clones, pins and pending objects share.
pub(crate) struct Shared {
    /// Comes before the locks of tiers, which nobody takes while this is held.
    ledger: Mutex<Ledger>,
    /// Pages have become free.
    room: Condvar,
    arena: Arena,
    clock: Arc<dyn Clock>,
    default_ttl: Option<Duration>,
    recorder: Option<Arc<TraceRecorder>>,
    /// The one that may use it.
    process: Process,
    given_back: GiveBack,
    announced: Option<Announced>,
    /// A hint: looking at it costs a hit less than the lock.
    has_offers: AtomicBool,
    /// Its lock is taken alone.
    retained: Retained,
    /// How long the ledger's lock was held, each time.
    #[cfg(test)]
    holds: std::sync::Mutex<crate::tests::Slices>,
}

/// Who tells the listener, and where RAM reports.
struct Announced {
    announcer: Arc<Announcer>,
    ram: Reports,
}

/// What was taken out of the cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Removed {
    /// Entries that can no longer be found.
    pub entries: u64,
    /// Their bytes, in whole pages. Pinned ones are freed when the last pin is dropped.
    pub bytes: u64,
}

impl Shared {
    /// # Errors
    /// [`Error::Forked`] in a child of the process that made it.
    fn check(&self) -> Result<()> {
        if self.process.is_current() { Ok(()) } else { Err(Error::Forked) }
    }

    pub(crate) fn new(
        ledger: Ledger,
        arena: Arena,
        clock: Arc<dyn Clock>,
        default_ttl: Option<Duration>,
        recorder: Option<Arc<TraceRecorder>>,
        announcer: Option<Arc<Announcer>>,
    ) -> Self {
        let mut ledger = ledger;
        let announced = announcer.map(|announcer| Announced { ram: announcer.reports(RAM), announcer });
        if announced.is_some() {
            ledger.keep_journal();
        }
        Self {
            ledger: Mutex::new(ledger),
            room: Condvar::default(),
            arena,
            clock,
            default_ttl,
            recorder,
            announced,
            has_offers: AtomicBool::new(false),
            retained: Retained::default(),
            process: Process::current(),
            given_back: GiveBack::default(),
            #[cfg(test)]
            holds: std::sync::Mutex::default(),
        }
    }

    /// The one place that locks the ledger, changes it, unlocks it, and then says what happened.
    pub(crate) fn with<T>(&self, change: impl FnOnce(&mut Ledger) -> T) -> T {
        let mut ledger = self.ledger.lock();
        #[cfg(test)]
        let _hold = crate::tests::Hold::begin(&self.holds);
        let result = change(&mut ledger);
        if ledger.has_news() {
            self.tell(ledger);
        }
        result
    }

    /// Not part of a hit, which has no news.
    #[cold]
    fn tell(&self, mut ledger: MutexGuard<'_, Ledger>) {
        let News { freed, has_offers, changes } = ledger.take_news();
        if let (Some(announced), false) = (&self.announced, changes.is_empty()) {
            // In the order in which they happen. Nobody is told here.
            announced.ram.changed(changes);
        }
        drop(ledger);
        if has_offers {
            self.has_offers.store(true, Ordering::Release);
        }
        if freed {
            self.room.notify_all();
        }
    }

    /// Has the ledger something to offer to the tiers? Whoever asks offers it.
    fn has_offers(&self) -> bool {
        self.has_offers.load(Ordering::Relaxed) && self.has_offers.swap(false, Ordering::Acquire)
    }

    /// Waits until pages have become free that writes under way have now; says whether the time is over.
    fn wait_for_room(&self, deadline: Deadline) -> bool {
        let mut ledger = self.ledger.lock();
        if !ledger.is_room_coming() {
            return deadline.is_over();
        }
        ledger.waiting += 1;
        let (mut ledger, _) = self.room.wait_timeout(ledger, deadline.left());
        ledger.waiting -= 1;
        deadline.is_over()
    }

    fn now_ms(&self) -> u64 {
        self.clock.now_ms()
    }

    fn announcer(&self) -> Option<&Arc<Announcer>> {
        self.announced.as_ref().map(|announced| &announced.announcer)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Some(announcer) = self.announcer().filter(|_| self.process.is_current()) {
            announcer.close();
        }
    }
}

impl Store {
    /// Opens a store. Address space is reserved now, memory is committed as it is used. A disk
    /// tier is read as far as it takes to know what is there.
    ///
    /// # Errors
    /// [`Error::Config`] for a capacity below one page (4 KiB) or beyond 16 TiB, or a disk
    /// tier below 1 MiB; [`Error::Memory`] if it cannot be reserved; [`Error::Disk`],
    /// [`Error::DiskLocked`], [`Error::DiskRefused`] if the disk tier cannot be opened.
    pub fn new(config: CacheConfig) -> Result<Self> {
        let (arena, pages) = ram::reserve_as(config.capacity_bytes, config.is_shared)?;
        let ledger = Ledger::new(pages, config.policy, &config.quotas);
        let clock = Arc::clone(&config.clock);
        let announcer = config.sink.clone().map(Announcer::new);
        let shared = Arc::new(Shared::new(ledger, arena, clock, config.ttl, config.recorder.clone(), announcer));
        let leases = Arc::new(Leases::new(lease_epoch(&*config.clock), config.capacity_bytes));
        let quotas: Vec<NamespaceId> = config.quotas.iter().map(|(namespace, _)| *namespace).collect();
        let tiers = Tiers::open(config, &shared)?.map(Arc::new);
        if let Some(tiers) = &tiers {
            // What a lossy codec keeps has a name of its own, and the share of the namespace it is of.
            let own = |id: NamespaceId| tiers.each().filter_map(|tier| tier.lossy(id)).fold(id, NamespaceId::through);
            shared.with(|ledger| quotas.iter().for_each(|id| ledger.is_also(*id, own(*id))));
        }
        if let Some(announcer) = shared.announcer() {
            announcer.start();
        }
        Ok(Self { tiers, shared, leases })
    }

    /// A prompt's blocks, by the names under which they are kept here: those of [`Chain::with_codec`], where a tier has a
    /// lossy codec. What has been through one, and what was computed behind that, is not what other caches mean by the
    /// name of the prompt.
    #[must_use]
    pub fn own<'a>(&self, chain: &'a Chain) -> Cow<'a, Chain> {
        let codecs = self.lossy(chain.namespace());
        let own = |chain: Chain, codec: &&'static str| chain.with_codec(codec);
        if codecs.is_empty() { Cow::Borrowed(chain) } else { Cow::Owned(codecs.iter().fold(chain.clone(), own)) }
    }

    /// A namespace by the name under which it is kept here: as [`Store::own`].
    #[must_use]
    pub fn own_namespace(&self, namespace: &Namespace) -> Namespace {
        self.lossy(namespace).iter().fold(namespace.clone(), |namespace, codec| namespace.with_codec(codec))
    }

    /// Does no tier change the bits of this namespace's blocks?
    pub(crate) fn is_exact(&self, namespace: &Namespace) -> bool {
        self.lossy(namespace).is_empty()
    }

    /// The lossy codecs of the tiers, for blocks of this namespace.
    fn lossy(&self, namespace: &Namespace) -> Vec<&'static str> {
        if !namespace.layout().may_be_lossy() {
            return Vec::new();
        }
        self.each_tier().filter_map(|tier| tier.lossy(namespace.root())).collect()
    }

    /// This store, in the process that made it.
    ///
    /// # Errors
    /// [`Error::Forked`] in a child: see [`Process`].
    pub(crate) fn here(&self) -> Result<&Self> {
        self.shared.check().map(|()| self)
    }

    /// Counters and sizes as of now; all zero in a child of the process that made it. Sweeps what has expired first.
    #[must_use]
    pub fn stats(&self) -> Stats {
        if self.here().is_err() {
            return Stats::default();
        }
        self.end_expired();
        self.sweep_ram();
        let stats = self.shared.with(|ledger| ledger.stats());
        Stats { tiers: self.tiers.as_ref().map_or_else(Vec::new, |tiers| tiers.stats()), ..stats }
    }

    /// What each namespace takes of RAM and the tiers now, ordered by id. Counted as entries come and
    /// go, so it costs no more than there are namespaces.
    #[must_use]
    pub fn usage(&self) -> Vec<NamespaceUsage> {
        if self.here().is_err() {
            return Vec::new();
        }
        let in_ram: Vec<_> = self.shared.with(|ledger| ledger.index().namespaces().usage().collect());
        let below = self.each_tier().map(|tier| (tier.name().to_owned(), tier.usage()));
        let by_tier: Vec<_> = std::iter::once((RAM.to_owned(), in_ram)).chain(below).collect();
        let none: Vec<_> = by_tier.iter().map(|(name, _)| (name.clone(), Usage::default())).collect();
        let mut usage: BTreeMap<NamespaceId, Vec<(String, Usage)>> = BTreeMap::new();
        for (number, (_, of_tier)) in by_tier.into_iter().enumerate() {
            for (id, taken) in of_tier {
                if let Some((_, of)) = usage.entry(id).or_insert_with(|| none.clone()).get_mut(number) {
                    *of = taken;
                }
            }
        }
        usage.into_iter().map(|(id, tiers)| NamespaceUsage { id, tiers }).collect()
    }

    /// Makes everything stored so far durable: after a crash it is there, unless it was
    /// evicted, removed, or expired meanwhile.
    ///
    /// # Errors
    /// [`Error::NoDisk`] without a disk tier, [`Error::Disk`] if it fails: then some of it may
    /// be lost in a crash; [`Error::Forked`] in a child of the process that made it.
    pub fn flush(&self) -> Result<()> {
        self.here()?.tiers.as_ref().ok_or(Error::NoDisk)?.flush()
    }

    /// Flushes the tiers and gives up this clone. It closes nothing while another clone or front door lives. With the
    /// last of them the tiers are flushed again and closed: then the directory of a disk tier is free for this or
    /// another process to open. Dropping a clone without this call closes the tiers in the same way, but can only log what
    /// goes wrong.
    ///
    /// # Errors
    /// [`Error::Disk`] if it fails: then some of what was stored may not be on the disk; [`Error::Forked`] in a
    /// child of the process that made it, where nothing happens to it.
    pub fn close(self) -> Result<()> {
        match &self.here()?.tiers {
            Some(tiers) => tiers.flush(),
            None => Ok(()),
        }
    }

    /// Drops everything whose TTL has run out and says how many entries of the RAM tier that
    /// were. Stores and [`Store::stats`] do it by themselves; a quiet cache may want a timer.
    pub fn sweep(&self) -> u64 {
        if self.here().is_err() {
            return 0;
        }
        self.end_expired();
        self.each_tier().for_each(|tier| tier.sweep());
        self.sweep_ram()
    }

    /// Remembers what the blocks of a namespace look like: their headers in the tiers say so, and events.
    pub(crate) fn describe(&self, namespace: &Namespace) {
        if let Some(announcer) = self.shared.announcer() {
            announcer.describe(namespace.id(), namespace.layout().block_tokens());
        }
        if let Some(tiers) = &self.tiers {
            tiers.describe(namespace);
        }
    }

    /// Does a listener want the tokens of blocks?
    pub(crate) fn wants_tokens(&self) -> bool {
        self.shared.announcer().is_some_and(|announcer| announcer.wants_tokens())
    }

    /// Tells the announcer what it cannot see: the tokens of blocks that may come, and what is before each.
    pub(crate) fn expect(&self, chain: &Chain, first_block: usize) {
        if let Some(announcer) = self.shared.announcer() {
            announcer.expect(chain.namespace().id(), chain.before(first_block), chain.blocks_from(first_block));
        }
    }

    pub(crate) fn prefix_lengths(&self, id: NamespaceId, max_bytes: usize) -> Vec<usize> {
        let mut lengths = self.shared.with(|ledger| ledger.index().namespaces().prefix_lengths(id, max_bytes));
        if self.tiers.is_some() {
            lengths.extend(self.each_tier().flat_map(|tier| tier.prefix_lengths(id, max_bytes)));
            lengths.sort_unstable();
            lengths.dedup();
        }
        lengths
    }

    /// Layers of a named cache: one more than the highest one stored.
    pub(crate) fn layers(&self, id: NamespaceId) -> u32 {
        // In this order: meanwhile something may go down, and is then found there.
        let here = self.shared.with(|ledger| ledger.index().namespaces().layers(id));
        self.each_tier().map(|tier| tier.layers(id)).fold(here, u32::max)
    }

    /// The length that goes with the first of these prefixes of which any layer is there.
    pub(crate) fn first_stored(&self, id: NamespaceId, prefixes: &[(usize, PrefixHash)]) -> Option<usize> {
        let now_ms = self.shared.now_ms();
        let layers = self.layers(id);
        let stored = |prefix: &PrefixHash| {
            let keys: Vec<ObjectKey> = (0..layers).map(|layer| prefix.key(layer)).collect();
            self.shared.with(|ledger| keys.iter().any(|key| ledger.find_live(key, now_ms).is_some()))
                || self.tiers.as_ref().is_some_and(|tiers| tiers.hold_any(id, &keys))
        };
        prefixes.iter().find(|(_, prefix)| stored(prefix)).map(|(length, _)| *length)
    }

    /// Counts a pin as a request after the fact.
    pub(crate) fn count(&self, pin: &Pin, request: Request) {
        self.shared.with(|ledger| ledger.count(request, pin.held(), pin.len()));
        self.offer();
    }

    /// Writes a request of the token door to the trace, if there is one.
    pub(crate) fn record(&self, tokens: usize, keys: &[ObjectKey]) {
        if let Some(recorder) = &self.shared.recorder {
            recorder.request(self.shared.now_ms(), tokens, keys.iter().map(ObjectKey::table_hash));
        }
    }

    /// Offers to the tiers what the ledger says.
    fn offer(&self) {
        if let Some(tiers) = &self.tiers {
            tiers.offer(Deadline::over());
        }
    }

    fn each_tier(&self) -> impl Iterator<Item = &Arc<dyn Tier>> {
        self.tiers.iter().flat_map(|tiers| tiers.each())
    }

    fn sweep_ram(&self) -> u64 {
        let now_ms = self.shared.now_ms();
        let mut swept = 0;
        loop {
            // In slices: between two of them others get the lock.
            let dropped = self.shared.with(|ledger| ledger.sweep(now_ms));
            swept += dropped as u64;
            if dropped < ledger::SLICE {
                return swept;
            }
        }
    }
}

/// Tells this store's leases from those of others, also of one that was there before a restart.
fn lease_epoch(clock: &dyn Clock) -> u64 {
    use std::hash::{BuildHasher, RandomState};
    // Keyed by what the system drew for this process and this call.
    RandomState::new().hash_one(clock.now_us())
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Store").field(&self.stats()).finish()
    }
}
