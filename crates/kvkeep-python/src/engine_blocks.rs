//! A cache under an engine's own names of blocks: what [`crate::engine_ram`] and [`crate::engine_tier`] have in common.
//!
//! Invariant: names without which no chain can be made (none at all) are like names of nothing.

use std::time::Duration;

use kvkeep::{Chain, KvCache, Namespace};
use pyo3::prelude::*;

use crate::convert::seconds;
use crate::engine_jobs::Key;

#[derive(Debug)]
pub(crate) struct Blocks {
    pub(crate) cache: KvCache,
    namespace: Namespace,
}

impl Blocks {
    pub(crate) fn new(cache: KvCache, namespace: Namespace) -> Self {
        Self { cache, namespace }
    }

    pub(crate) fn chain<K: AsRef<[u8]>>(&self, keys: &[K]) -> Option<Chain> {
        Chain::external(&self.namespace, keys).ok()
    }

    /// Which of these the disk has.
    pub(crate) fn has(&self, keys: &[Key]) -> Vec<bool> {
        self.chain(keys).map_or_else(Vec::new, |chain| self.cache.has_lent(&chain))
    }

    /// Keeps these on the disk before others, for so many seconds; says how many.
    pub(crate) fn retain(&self, py: Python<'_>, keys: &[Key], time: Option<f64>) -> PyResult<usize> {
        let time: Option<Duration> = seconds(time, "ttl_s")?;
        Ok(py.detach(|| self.chain(keys).map_or(0, |chain| self.cache.retain_lent(&chain, time))))
    }

    /// These are like others again.
    pub(crate) fn release(&self, py: Python<'_>, keys: &[Key]) {
        py.detach(|| self.chain(keys).iter().for_each(|chain| self.cache.release_lent(chain)));
    }
}
