//! What is remembered of requests that have ended: figures, the last of them, and which prefixes
//! they had in common.
//!
//! Each part has a lock of its own; none is held while another is taken, or while the cache is
//! asked.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::metrics::Metrics;
use crate::prefixes::{Limits, PrefixTree};
use crate::recent::Recent;
use crate::served::Served;

#[derive(Debug)]
pub(crate) struct Observed {
    pub(crate) metrics: Metrics,
    recent: Mutex<Recent>,
    prefixes: Mutex<PrefixTree>,
}

impl Observed {
    /// Of a cache with tiers of these names, RAM's among them.
    pub(crate) fn new(tiers: impl Iterator<Item = String>) -> Self {
        Self {
            metrics: Metrics::new(tiers),
            recent: Mutex::default(),
            prefixes: Mutex::new(PrefixTree::new(Limits::default())),
        }
    }

    /// A request has ended.
    pub(crate) fn observe(&self, served: &Served) {
        self.metrics.observe(served);
        self.recent().push(served);
        if served.was_read() {
            let hashes = served.hashes();
            let (namespace, tenant) = (&served.namespace, &served.tenant);
            self.prefixes().insert_hashed(namespace, tenant, served.reusable(), &hashes, Instant::now());
        }
    }

    pub(crate) fn recent(&self) -> MutexGuard<'_, Recent> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn prefixes(&self) -> MutexGuard<'_, PrefixTree> {
        self.prefixes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
