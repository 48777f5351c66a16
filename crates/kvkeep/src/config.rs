//! Settings of a store: explicit, checked when the store opens, never read from
//! the environment.

use std::sync::Arc;
use std::time::Duration;

use crate::clock::{Clock, SystemClock};
use crate::error::{Error, Result};
use crate::eviction::PolicyKind;

/// Bytes in a GiB. `max_size_gb` and `size_mb` count in powers of two, as memory is sold.
const GIB: f64 = 1024.0 * 1024.0 * 1024.0;

/// Settings of a [`Store`](crate::Store).
#[derive(Debug, Clone)]
pub struct CacheConfig {
    pub(crate) capacity_bytes: u64,
    pub(crate) ttl: Option<Duration>,
    pub(crate) policy: PolicyKind,
    pub(crate) clock: Arc<dyn Clock>,
}

impl CacheConfig {
    /// A RAM tier of at most `capacity_bytes`, in whole pages of 4 KiB. Nothing expires.
    #[must_use]
    pub fn new(capacity_bytes: u64) -> Self {
        Self { capacity_bytes, ttl: None, policy: PolicyKind::default(), clock: Arc::new(SystemClock::new()) }
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

    /// What goes first when room is needed.
    #[must_use]
    pub fn policy(mut self, policy: PolicyKind) -> Self {
        self.policy = policy;
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
}

impl StoreOptions {
    /// Options with a TTL of their own.
    #[must_use]
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = Some(ttl);
        self
    }

    /// Options that report the time it took to compute the KV.
    #[must_use]
    pub fn compute_time(mut self, compute_time: Duration) -> Self {
        self.compute_time = Some(compute_time);
        self
    }
}
