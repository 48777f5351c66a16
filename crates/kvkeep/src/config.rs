//! Settings of a store: explicit, checked when the store opens, never read from
//! the environment.

#[cfg(feature = "disk")]
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::clock::{Clock, SystemClock};
#[cfg(feature = "disk")]
use crate::codec::Codecs;
use crate::error::{Error, Result};
use crate::event::EventSink;
#[cfg(feature = "disk")]
use crate::eviction::Admission;
use crate::eviction::{PolicyKind, Priority};
use crate::key::NamespaceId;
use crate::record::TraceRecorder;
use crate::tier::Tier;

/// Bytes in a GiB. `max_size_gb` and `size_mb` count in powers of two, as memory is sold.
const GIB: f64 = 1024.0 * 1024.0 * 1024.0;

/// How long a request waits for tiers.
pub(crate) const READ_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a flush waits for a sign of life.
pub(crate) const FLUSH_TIMEOUT: Duration = Duration::from_secs(30);

/// Settings of a [`Store`](crate::Store).
#[derive(Debug, Clone)]
pub struct CacheConfig {
    pub(crate) capacity_bytes: u64,
    pub(crate) ttl: Option<Duration>,
    pub(crate) policy: PolicyKind,
    pub(crate) quotas: Vec<(NamespaceId, f64)>,
    pub(crate) recorder: Option<Arc<TraceRecorder>>,
    pub(crate) clock: Arc<dyn Clock>,
    #[cfg(feature = "disk")]
    pub(crate) disk: Option<DiskConfig>,
    /// Those before the disk, and those behind it.
    pub(crate) near: Vec<Arc<dyn Tier>>,
    pub(crate) tiers: Vec<Arc<dyn Tier>>,
    pub(crate) timeouts: (Duration, Duration),
    /// Other processes will map its memory.
    pub(crate) is_shared: bool,
    pub(crate) sink: Option<Arc<dyn EventSink>>,
}

/// Settings of a disk tier: a directory of its own, and a cap.
#[cfg(feature = "disk")]
#[derive(Debug, Clone)]
pub struct DiskConfig {
    pub(crate) dir: PathBuf,
    pub(crate) capacity_bytes: u64,
    pub(crate) write_policy: WritePolicy,
    pub(crate) admission: Admission,
    pub(crate) key_file: Option<PathBuf>,
    pub(crate) queue_bytes: Option<u64>,
    pub(crate) read_timeout: Duration,
    pub(crate) flush_timeout: Duration,
    pub(crate) codecs: Codecs,
}

/// When what is stored goes to the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum WritePolicy {
    /// At once, in the background: what is evicted from RAM is on the disk already.
    #[default]
    Through,
    /// When it is evicted from RAM: what is gone before that is never written.
    Back,
}

#[cfg(feature = "disk")]
impl DiskConfig {
    /// A disk tier of at most `capacity_bytes` (at least 1 MiB) in `dir`, which is created
    /// if need be and belongs to one process at a time.
    pub fn new(dir: impl AsRef<Path>, capacity_bytes: u64) -> Self {
        Self {
            dir: dir.as_ref().to_owned(),
            capacity_bytes,
            write_policy: WritePolicy::default(),
            admission: Admission::default(),
            key_file: None,
            queue_bytes: None,
            read_timeout: READ_TIMEOUT,
            flush_timeout: FLUSH_TIMEOUT,
            codecs: Codecs::if_it_pays(),
        }
    }

    /// A disk tier of `gib` GiB.
    ///
    /// # Errors
    /// [`Error::Config`] if `gib` is not a positive, finite number that fits 64 bits of bytes.
    pub fn from_gib(dir: impl AsRef<Path>, gib: f64) -> Result<Self> {
        Ok(Self::new(dir, gib_to_bytes(gib)?))
    }

    /// When what is stored goes to the disk.
    #[must_use]
    pub fn write_policy(mut self, write_policy: WritePolicy) -> Self {
        self.write_policy = write_policy;
        self
    }

    /// What is written to the disk at all: everything, unless said otherwise. The rule holds for both write policies,
    /// and also when the cache is flushed or closed: what is not admitted is not durable. With
    /// write-through the rule is asked when something is stored and at each use until it is written. With write-back
    /// it is asked when RAM evicts.
    #[must_use]
    pub fn admission(mut self, admission: Admission) -> Self {
        self.admission = admission;
        self
    }

    /// Encrypts payloads with XChaCha20-Poly1305 under the key in this file: 32 bytes or 64
    /// hexadecimal digits, readable by its owner alone.
    #[must_use]
    pub fn key_file(mut self, key_file: impl AsRef<Path>) -> Self {
        self.key_file = Some(key_file.as_ref().to_owned());
        self
    }

    /// Bytes that may wait to be written, pinned in RAM; an eighth of the RAM tier unless
    /// said otherwise. What comes while the queue is full is not written and counted.
    #[must_use]
    pub fn queue_bytes(mut self, queue_bytes: u64) -> Self {
        self.queue_bytes = Some(queue_bytes);
        self
    }

    /// How blocks are encoded on the disk; [`Codecs::if_it_pays`] unless said otherwise: without loss, if that makes them come
    /// sooner. A directory may hold blocks of several
    /// codecs, and is read with all of them; those of a codec that is not known here are misses.
    #[must_use]
    pub fn codecs(mut self, codecs: Codecs) -> Self {
        self.codecs = codecs;
        self
    }

    /// How long a request waits for the disk before it goes on without; 5 s unless said otherwise.
    #[must_use]
    pub fn read_timeout(mut self, read_timeout: Duration) -> Self {
        self.read_timeout = read_timeout;
        self
    }

    /// How long flushing and closing wait for a disk that gets nothing done, not one record and not
    /// one sync, before they end with an error; 30 s unless said otherwise. A disk that is slow
    /// and gets on is waited for as long as it takes. Zero is refused when the cache is made.
    #[must_use]
    pub fn flush_timeout(mut self, flush_timeout: Duration) -> Self {
        self.flush_timeout = flush_timeout;
        self
    }
}

impl CacheConfig {
    /// A RAM tier of at most `capacity_bytes`, in whole pages of 4 KiB. Nothing expires.
    #[must_use]
    pub fn new(capacity_bytes: u64) -> Self {
        Self {
            capacity_bytes,
            ttl: None,
            policy: PolicyKind::default(),
            quotas: Vec::new(),
            recorder: None,
            clock: Arc::new(SystemClock::new()),
            #[cfg(feature = "disk")]
            disk: None,
            near: Vec::new(),
            tiers: Vec::new(),
            timeouts: (READ_TIMEOUT, FLUSH_TIMEOUT),
            is_shared: false,
            sink: None,
        }
    }

    /// No RAM of its own: blocks go between the tiers and memory that an engine lends
    /// ([`KvCache::write_lent`](crate::KvCache::write_lent), [`KvCache::read_lent`](crate::KvCache::read_lent)).
    /// Whatever else is stored is refused. Give a disk tier its `queue_bytes`: it cannot be a part of RAM.
    #[must_use]
    pub fn without_ram() -> Self {
        Self::new(crate::tier::ram::PAGE_BYTES as u64)
    }

    /// A RAM tier of `gib` GiB.
    ///
    /// # Errors
    /// [`Error::Config`] if `gib` is not a positive, finite number that fits 64 bits of bytes.
    pub fn from_gib(gib: f64) -> Result<Self> {
        Ok(Self::new(gib_to_bytes(gib)?))
    }

    /// Default time to live of everything stored; `None` keeps entries until they are evicted.
    #[must_use]
    pub fn ttl(mut self, ttl: Option<Duration>) -> Self {
        self.ttl = ttl;
        self
    }

    /// A disk tier behind the RAM tier.
    #[cfg(feature = "disk")]
    #[must_use]
    pub fn disk(mut self, disk: DiskConfig) -> Self {
        self.disk = Some(disk);
        self
    }

    /// A tier that is faster than a disk, such as the RAM of a daemon: behind RAM and those given before, and before the disk.
    #[must_use]
    pub fn tier_before_disk(mut self, tier: Arc<dyn Tier>) -> Self {
        self.near.push(tier);
        self
    }

    /// How long a request waits for the tiers, and a flush for one sign of life; 5 s and 30 s unless said otherwise. Where there
    /// is a disk, its own settings hold for all tiers.
    #[must_use]
    pub fn timeouts(mut self, request: Duration, flush: Duration) -> Self {
        self.timeouts = (request, flush);
        self
    }

    /// Another tier, behind RAM, the disk and those given before.
    #[must_use]
    pub fn tier(mut self, tier: Arc<dyn Tier>) -> Self {
        self.tiers.push(tier);
        self
    }

    /// Tells a listener which blocks come to which tier and go from it. Without one nothing is kept for it; with one,
    /// some 150 bytes for each block that is anywhere.
    #[must_use]
    pub fn events(mut self, sink: Arc<dyn EventSink>) -> Self {
        self.sink = Some(sink);
        self
    }

    /// What goes first when room is needed.
    #[must_use]
    pub fn policy(mut self, policy: PolicyKind) -> Self {
        self.policy = policy;
        self
    }

    /// A share of the capacity for a namespace: its weight over the sum of all weights. All
    /// namespaces without a quota count as 1 together. When room is needed, it is taken from the namespace that
    /// is furthest over its share. So nobody loses what is within its share, and everybody may use what
    /// nobody else needs. A namespace that wants more than its share while nobody else has more than theirs is
    /// refused the rest: [`Rejection::OverQuota`](crate::Rejection::OverQuota). Works with every policy.
    ///
    /// # Errors
    /// [`Error::Config`] if the weight is not a positive, finite number, or the namespace has a
    /// quota already.
    pub fn quota(mut self, namespace: NamespaceId, weight: f64) -> Result<Self> {
        if !(weight > 0.0 && weight.is_finite()) {
            return Err(Error::Config(format!("a quota of weight {weight} is none: give a positive, finite number")));
        }
        if self.quotas.iter().any(|(other, _)| *other == namespace) {
            return Err(Error::Config(format!("the namespace {namespace} has a quota already: give it once")));
        }
        self.quotas.push((namespace, weight));
        Ok(self)
    }

    /// Writes every request of the token door to a trace that `kvkeep replay` reads.
    #[must_use]
    pub fn record(mut self, recorder: Arc<TraceRecorder>) -> Self {
        self.recorder = Some(recorder);
        self
    }

    /// Another source of time, for tests and simulations.
    #[must_use]
    pub fn clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = clock;
        self
    }
}

/// GiB to whole bytes; refuses NaN, infinities, zero, negative and overflowing sizes.
fn gib_to_bytes(gib: f64) -> Result<u64> {
    let bytes = gib * GIB;
    if !(1.0..9.0e18).contains(&bytes) {
        return Err(Error::Config(format!(
            "a size of {gib} GiB makes no cache: give a positive, finite number such as 10"
        )));
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "checked just above: positive, below 2^63, not NaN"
    )]
    Ok(bytes as u64)
}

/// What a caller may say about one store.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoreOptions {
    /// Time to live of what is stored now; `None` takes the cache's default.
    pub ttl: Option<Duration>,
    /// How long it took to compute what is stored now, all of it together. Every
    /// later hit counts its share as time saved. `None` saves nothing: the cache
    /// never guesses.
    pub compute_time: Option<Duration>,
    /// A mark of the caller's own, kept with what the named door stores now and handed
    /// back with every hit; the cache does not look at it. A binding keeps here what
    /// kind of tensor came in.
    pub tag: u8,
    /// How long what is stored now, and the blocks before it, are kept compared to others.
    pub priority: Priority,
    /// Asked now and then while much is copied.
    pub stop: Option<Stop>,
}

/// Says whether a store should end now, with [`Error::Stopped`] and nothing stored. Asked each time 64 MiB have been
/// copied. A binding looks here whether somebody pressed Ctrl-C.
#[derive(Debug, Clone, Copy)]
pub struct Stop(pub fn() -> bool);

impl PartialEq for Stop {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::fn_addr_eq(self.0, other.0)
    }
}

impl Eq for Stop {}

/// Counts what was copied, and asks whether to go on.
#[derive(Debug)]
pub(crate) struct Copied {
    stop: Option<Stop>,
    bytes: usize,
}

impl Copied {
    /// Bytes copied between two questions: some 20 ms.
    pub(crate) const STEP_BYTES: usize = 64 << 20;

    /// # Errors
    /// [`Error::Stopped`].
    pub(crate) fn add(&mut self, bytes: usize) -> Result<()> {
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes < Self::STEP_BYTES {
            return Ok(());
        }
        self.bytes = 0;
        match self.stop {
            Some(Stop(stop)) if stop() => Err(Error::Stopped),
            _ => Ok(()),
        }
    }
}

impl StoreOptions {
    /// Options with a TTL of their own.
    #[must_use]
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = Some(ttl);
        self
    }

    /// Options with a priority of their own.
    #[must_use]
    pub fn priority(mut self, priority: Priority) -> Self {
        self.priority = priority;
        self
    }

    /// Options that report the time it took to compute the KV.
    #[must_use]
    pub fn compute_time(mut self, compute_time: Duration) -> Self {
        self.compute_time = Some(compute_time);
        self
    }

    /// Options that say when to stop.
    #[must_use]
    pub fn stop(mut self, stop: fn() -> bool) -> Self {
        self.stop = Some(Stop(stop));
        self
    }

    pub(crate) fn copied(&self) -> Copied {
        Copied { stop: self.stop, bytes: 0 }
    }

    /// Options with a mark of the caller's own.
    #[must_use]
    pub fn tag(mut self, tag: u8) -> Self {
        self.tag = tag;
        self
    }
}
