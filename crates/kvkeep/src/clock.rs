//! Time, as a value that is passed in: the library never reads a clock that its
//! owner did not give it.
//!
//! Milliseconds since the Unix epoch rather than `Instant`, because an expiry has
//! to mean the same after a restart.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A source of time for TTLs.
pub trait Clock: Send + Sync + fmt::Debug {
    /// Milliseconds since the Unix epoch. Must not go backwards.
    fn now_ms(&self) -> u64;

    /// The same in microseconds, for measuring how long a load takes.
    fn now_us(&self) -> u64 {
        self.now_ms().saturating_mul(1000)
    }
}

/// Wall-clock time at creation, carried forward by a clock that only runs forward, so that a
/// step of the system clock neither expires everything nor keeps it for ever. Time that the
/// machine sleeps counts, on Linux.
#[derive(Debug)]
pub struct SystemClock {
    base_ms: u64,
    started_ms: u64,
    started: Instant,
}

/// A clock that moves only when told to, for tests and simulations.
#[derive(Debug, Default)]
pub struct ManualClock {
    now_ms: AtomicU64,
}

/// When somebody waits no longer. Real time, whatever the cache's [`Clock`] says: waiting is real.
#[derive(Debug, Clone, Copy)]
pub struct Deadline(Option<Instant>);

/// A moment in real time, to see how long ago it was.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moment(Instant);

impl Deadline {
    /// In so long from now.
    #[must_use]
    pub fn after(at_most: Duration) -> Self {
        Self(Instant::now().checked_add(at_most))
    }

    /// There is none.
    #[must_use]
    pub fn never() -> Self {
        Self(None)
    }

    /// It is over already.
    #[must_use]
    pub fn over() -> Self {
        Self::after(Duration::ZERO)
    }

    /// The time that is left; a year where there is no end.
    #[must_use]
    pub fn left(&self) -> Duration {
        self.0.map_or(Duration::from_secs(365 * 24 * 3600), |at| at.saturating_duration_since(Instant::now()))
    }

    /// Is it over?
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.0.is_some_and(|at| at <= Instant::now())
    }
}

impl Moment {
    pub(crate) fn now() -> Self {
        Self(Instant::now())
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.0.elapsed()
    }
}

impl SystemClock {
    /// A clock that starts at the system's current time.
    #[must_use]
    pub fn new() -> Self {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { base_ms: duration_ms(since_epoch), started_ms: running_ms(), started: Instant::now() }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    fn now_ms(&self) -> u64 {
        self.base_ms.saturating_add(running_ms().saturating_sub(self.started_ms))
    }

    fn now_us(&self) -> u64 {
        let elapsed = u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.base_ms.saturating_mul(1000).saturating_add(elapsed)
    }
}

impl ManualClock {
    /// A clock that stands at `now_ms`.
    #[must_use]
    pub fn at(now_ms: u64) -> Self {
        Self { now_ms: AtomicU64::new(now_ms) }
    }

    /// Moves the clock forward.
    pub fn advance(&self, by: Duration) {
        self.now_ms.fetch_add(duration_ms(by), Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn now_ms(&self) -> u64 {
        self.now_ms.load(Ordering::SeqCst)
    }
}

/// Milliseconds since the machine was started.
#[cfg(target_os = "linux")]
fn running_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let (seconds, nanos) = (u64::try_from(now.tv_sec).unwrap_or(0), u64::try_from(now.tv_nsec).unwrap_or(0));
    seconds.saturating_mul(1000).saturating_add(nanos / 1_000_000)
}

/// Milliseconds since some moment of this process.
#[cfg(not(target_os = "linux"))]
fn running_ms() -> u64 {
    static FIRST: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    duration_ms(FIRST.get_or_init(Instant::now).elapsed())
}

/// A duration in whole milliseconds, saturating: a TTL of a million years never expires.
pub(crate) fn duration_ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
