//! A cache under an engine's own names of blocks: what [`crate::engine_ram`] and [`crate::engine_tier`] have in common.
//!
//! Invariant: names without which no chain can be made (none at all) are like names of nothing.

use std::sync::Arc;
use std::time::Duration;

use kvkeep::{CacheConfig, Chain, EventSink, KvCache, Namespace};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::convert::seconds;
use crate::engine_jobs::Key;
use crate::engine_news::News;

#[derive(Debug)]
pub(crate) struct Blocks {
    pub(crate) cache: KvCache,
    namespace: Namespace,
    /// What came and went, if anybody asks.
    news: Option<Arc<News>>,
}

/// News as Python has them: (tier, is removed, names)
pub(crate) type RawNews<'py> = Vec<(String, bool, Vec<Bound<'py, PyBytes>>)>;

impl Blocks {
    /// Opens the cache; `events` says whether somebody will ask what came and went.
    pub(crate) fn open(config: CacheConfig, namespace: Namespace, events: bool) -> kvkeep::Result<Self> {
        let news = events.then(Arc::<News>::default);
        let config = match &news {
            Some(news) => config.events(Arc::clone(news) as Arc<dyn EventSink>),
            None => config,
        };
        Ok(Self { cache: KvCache::new(config)?, namespace, news })
    }

    pub(crate) fn chain<K: AsRef<[u8]>>(&self, keys: &[K]) -> Option<Chain> {
        Chain::external(&self.namespace, keys).ok()
    }

    /// These may come to a tier.
    pub(crate) fn expect(&self, keys: &[Key]) {
        if let (Some(news), Some(chain)) = (&self.news, self.chain(keys)) {
            let own = self.cache.store_handle().own(&chain);
            news.expect(own.hashes().zip(keys.iter().cloned()));
        }
    }

    /// What came and went since this was last asked, in order.
    pub(crate) fn take_events<'py>(&self, py: Python<'py>) -> RawNews<'py> {
        let items = py.detach(|| self.news.as_ref().map(|news| news.take()).unwrap_or_default());
        let names = |keys: Vec<Key>| keys.iter().map(|key| PyBytes::new(py, key)).collect();
        items.into_iter().map(|item| (item.tier.to_string(), item.is_removed, names(item.keys))).collect()
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
