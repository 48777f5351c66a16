//! A cache under an engine's own names of blocks: what [`crate::engine_ram`] and [`crate::engine_tier`] have in common.
//!
//! Invariant: names without which no chain can be made (none at all) are like names of nothing.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kvkeep::tiers::Codecs;
use kvkeep::{CacheConfig, Chain, DiskConfig, EventSink, KvCache, Namespace};
use kvkeep_remote::RemoteTier;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::convert::seconds;
use crate::engine_jobs::Key;
use crate::engine_news::News;
use crate::error::to_python;
use crate::open::{RawDaemon, daemon_tier, waiting};
use crate::remote::{self, Lookups, RawRemote};

#[derive(Debug)]
pub(crate) struct Blocks {
    pub(crate) cache: KvCache,
    namespace: Namespace,
    /// What came and went, if anybody asks.
    news: Option<Arc<News>>,
    /// The store over a network, which may be asked in the background.
    remote: Option<Arc<RemoteTier>>,
}

/// What is behind an engine's RAM, as `kvkeep._engines.settings` has it.
#[derive(Debug, FromPyObject)]
pub(crate) struct Behind {
    /// Directory, bytes, key file, codec.
    #[pyo3(item)]
    disk: Option<(PathBuf, u64, Option<PathBuf>, String)>,
    #[pyo3(item)]
    daemon: Option<RawDaemon>,
    #[pyo3(item)]
    remote: Option<RawRemote>,
    /// What may wait to be written to all of them.
    #[pyo3(item)]
    pub(crate) queue_bytes: u64,
}

/// News as Python has them: (tier, is removed, names)
pub(crate) type RawNews<'py> = Vec<(String, bool, Vec<Bound<'py, PyBytes>>)>;

impl Blocks {
    /// Opens the cache; `events` says whether somebody will ask what came and went. A load waits for `load`, and a flush for a
    /// sign of life for `flush`.
    pub(crate) fn open(
        py: Python<'_>,
        config: CacheConfig,
        behind: Behind,
        (load, flush): (Duration, Duration),
        namespace: Namespace,
        events: bool,
    ) -> PyResult<Self> {
        let Behind { disk, daemon, remote, queue_bytes } = behind;
        let tiers = u64::from(disk.is_some()) + u64::from(daemon.is_some()) + u64::from(remote.is_some());
        let queue_bytes = queue_bytes / tiers.max(1);
        let mut config = config.timeouts(load, flush);
        if let Some((dir, capacity_bytes, key_file, codec)) = disk {
            let codecs = Codecs::named(&codec).map_err(|error| to_python(&error))?;
            let disk = DiskConfig::new(dir, capacity_bytes).queue_bytes(queue_bytes).codecs(codecs);
            let disk = disk.read_timeout(load).flush_timeout(flush);
            config = config.disk(match key_file {
                Some(key_file) => disk.key_file(key_file),
                None => disk,
            });
        }
        if let Some(daemon) = daemon {
            config = config.tier_before_disk(daemon_tier(py, daemon, queue_bytes)?);
        }
        let remote = remote.map(|remote| remote::open(py, remote, queue_bytes, Lookups::Return)).transpose()?;
        if let Some(remote) = &remote {
            config = config.tier(Arc::clone(remote) as _);
        }
        let news = events.then(Arc::<News>::default);
        if let Some(news) = &news {
            config = config.events(Arc::clone(news) as Arc<dyn EventSink>);
        }
        let cache = waiting(py, move || KvCache::new(config))?.map_err(|error| to_python(&error))?;
        Ok(Self { cache, namespace, news, remote })
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

    /// The kind of tier that each of these would be read from: `daemon`, `disk` or `remote`.
    pub(crate) fn places(&self, keys: &[Key]) -> Vec<Option<&'static str>> {
        let kind = |name| match name {
            "daemon" => "daemon",
            "disk" => "disk",
            _ => "remote",
        };
        let Some(chain) = self.chain(keys) else { return Vec::new() };
        self.cache.where_lent(&chain).into_iter().map(|place| place.map(kind)).collect()
    }

    /// May more be there than was said, since a store is being asked?
    pub(crate) fn is_asking(&self) -> bool {
        self.remote.as_ref().is_some_and(|remote| remote.is_asking())
    }

    /// Removes all that the namespace has.
    pub(crate) fn clear(&self) {
        let own = self.cache.store_handle().own_namespace(&self.namespace);
        self.cache.clear_namespace(&own);
    }

    /// Keeps these on the engine's own disk before others, for so many seconds; says how many.
    pub(crate) fn retain(&self, py: Python<'_>, keys: &[Key], time: Option<f64>) -> PyResult<usize> {
        let time: Option<Duration> = seconds(time, "ttl_s")?;
        Ok(py.detach(|| self.chain(keys).map_or(0, |chain| self.cache.retain_lent(&chain, time))))
    }

    /// These are like others again.
    pub(crate) fn release(&self, py: Python<'_>, keys: &[Key]) {
        py.detach(|| self.chain(keys).iter().for_each(|chain| self.cache.release_lent(chain)));
    }
}
