//! A cache that can be closed, and the settings that both doors open one with.
//!
//! With a disk tier, closing writes what is in RAM, leaves a clean directory and lets go of it.
//! Calls under way keep the cache open until they return: each has a clone.
//!
//! What may wait for a disk (opening, flushing, closing) is done by a thread of its own, while the caller's looks
//! for signals: Ctrl-C ends the call at once, and the work goes on behind it. It borrows nothing of the caller's.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use kvkeep::tiers::Codecs;
use kvkeep::{CacheConfig, DiskConfig, WritePolicy};
use pyo3::prelude::*;

use crate::convert::{policy, seconds, some_seconds};
use crate::error::{raise, to_python};
use crate::fork::Here;
use crate::remote::{self, Lookups, RawRemote};
use crate::tokens::Namespace;

/// Directory, GiB, when it is written (`through` or `back`), what is admitted, key file, seconds to wait for a disk
/// that gets nothing done.
pub(crate) type RawDisk = (PathBuf, f64, String, String, Option<PathBuf>, f64, String);

/// What both doors open a cache with.
#[derive(Debug, FromPyObject)]
pub(crate) struct Settings {
    #[pyo3(item)]
    max_size_gb: f64,
    #[pyo3(item)]
    default_ttl_seconds: Option<f64>,
    #[pyo3(item)]
    policy: String,
    /// Namespaces and the weights of their shares.
    #[pyo3(item)]
    quotas: Vec<(Py<Namespace>, f64)>,
    #[pyo3(item)]
    disk: Option<RawDisk>,
    #[pyo3(item)]
    remote: Option<RawRemote>,
    #[pyo3(item)]
    daemon: Option<RawDaemon>,
}

/// The socket of a daemon, and the file that says who this is.
pub(crate) type RawDaemon = (PathBuf, Option<PathBuf>);

/// What waits to be written to a daemon or to a store over a network is at most this part of RAM.
const QUEUE_DIVISOR: u64 = 8;
/// How often a thread that waits looks for signals.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// A cache of the process that made it, until it is closed.
#[derive(Debug)]
pub(crate) struct Open<T> {
    /// Held to clone or take it only.
    cache: Here<Mutex<Option<T>>>,
    /// A hit may then have to wait for a disk or a network.
    pub(crate) may_wait: bool,
}

impl<T: Clone + Send + 'static> Open<T> {
    /// Opens a cache; a disk tier is read with the GIL released.
    pub(crate) fn new(
        py: Python<'_>,
        settings: Settings,
        open: impl FnOnce(CacheConfig) -> kvkeep::Result<T> + Send + 'static,
    ) -> PyResult<Self> {
        let Settings { max_size_gb, default_ttl_seconds, policy: name, quotas, disk, remote, daemon } = settings;
        let ttl = seconds(default_ttl_seconds, "default_ttl_seconds")?;
        let config = CacheConfig::from_gib(max_size_gb).map_err(|error| to_python(&error))?;
        let mut config = config.ttl(ttl).policy(policy(&name)?);
        for (namespace, weight) in quotas {
            config = config.quota(namespace.get().namespace_id(), weight).map_err(|error| to_python(&error))?;
        }
        let may_wait = disk.is_some() || remote.is_some() || daemon.is_some();
        if let Some(disk) = disk {
            config = config.disk(disk_config(disk)?);
        }
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "checked above; of bytes, not exact"
        )]
        let queue_bytes = (max_size_gb * f64::from(1 << 30)) as u64 / QUEUE_DIVISOR;
        if let Some(daemon) = daemon {
            config = config.tier_before_disk(daemon_tier(py, daemon, queue_bytes)?);
        }
        if let Some(remote) = remote {
            config = config.tier(remote::open(py, remote, queue_bytes, Lookups::Wait)?);
        }
        let opened = if may_wait { waiting(py, || open(config))? } else { open(config) };
        let cache = opened.map_err(|error| to_python(&error))?;
        Ok(Self { cache: Here::new(Mutex::new(Some(cache))), may_wait })
    }

    pub(crate) fn get(&self) -> PyResult<T> {
        let cache = self.cache.get()?.lock().unwrap_or_else(PoisonError::into_inner).clone();
        cache.ok_or_else(|| raise("ClosedError", "this cache is closed: make a new one"))
    }

    /// Closes it; a second time does nothing.
    pub(crate) fn close(
        &self,
        py: Python<'_>,
        close: impl FnOnce(T) -> kvkeep::Result<()> + Send + 'static,
    ) -> PyResult<()> {
        let cache = self.cache.get()?.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(cache) = cache else { return Ok(()) };
        self.waiting(py, || close(cache))?.map_err(|error| to_python(&error))
    }

    /// Makes everything durable.
    pub(crate) fn flush(
        &self,
        py: Python<'_>,
        flush: impl FnOnce(&T) -> kvkeep::Result<()> + Send + 'static,
    ) -> PyResult<()> {
        let cache = self.get()?;
        self.waiting(py, move || flush(&cache))?.map_err(|error| to_python(&error))
    }

    fn waiting<R: Send + 'static>(&self, py: Python<'_>, work: impl FnOnce() -> R + Send + 'static) -> PyResult<R> {
        if self.may_wait { waiting(py, work) } else { Ok(py.detach(work)) }
    }
}

/// Runs `work` on another thread and waits for it, unless a signal's handler raises.
pub(crate) fn waiting<R: Send + 'static>(py: Python<'_>, work: impl FnOnce() -> R + Send + 'static) -> PyResult<R> {
    let (answer, mut answered) = mpsc::sync_channel(1);
    // Nobody waits any more for an answer that cannot be sent.
    let run = move || drop(answer.send(work()));
    thread::Builder::new().name("kvkeep-wait".to_owned()).spawn(run)?;
    loop {
        let (again, answer) = py.detach(move || {
            let answer = answered.recv_timeout(LOOK_EVERY);
            (answered, answer)
        });
        answered = again;
        match answer {
            Ok(answer) => return Ok(answer),
            Err(RecvTimeoutError::Timeout) => py.check_signals()?,
            Err(RecvTimeoutError::Disconnected) => return Err(raise("KvkeepError", "a thread of kvkeep panicked")),
        }
    }
}

/// Says whether a signal's handler raised; the exception is set. For [`kvkeep::StoreOptions::stop`].
pub(crate) fn interrupted() -> bool {
    Python::attach(|py| py.check_signals().map_err(|raised| raised.restore(py)).is_err())
}

/// A daemon's RAM; what waits to be written to it takes `queue_bytes` at most.
pub(crate) fn daemon_tier(
    py: Python<'_>,
    (socket, token_file): RawDaemon,
    queue_bytes: u64,
) -> PyResult<Arc<dyn kvkeep::Tier>> {
    let open = move || connect(&socket, token_file.as_deref(), queue_bytes);
    waiting(py, open)?.map_err(|error| to_python(&error))
}

#[cfg(target_os = "linux")]
fn connect(socket: &Path, token_file: Option<&Path>, queue_bytes: u64) -> kvkeep::Result<Arc<dyn kvkeep::Tier>> {
    use kvkeep_daemon::{DaemonTier, DaemonTierConfig, read_token};
    let mut config = DaemonTierConfig::new(socket).queue_bytes(queue_bytes);
    if let Some(file) = token_file {
        let (name, token) = read_token(file)?;
        config = config.tenant(name, token);
    }
    Ok(Arc::new(DaemonTier::open(&config)?))
}

#[cfg(not(target_os = "linux"))]
fn connect(_: &Path, _: Option<&Path>, _: u64) -> kvkeep::Result<Arc<dyn kvkeep::Tier>> {
    Err(kvkeep::Error::Config("a daemon needs Linux: leave it out".to_owned()))
}

fn disk_config((dir, size_gb, write, admission, key_file, flush_timeout, codec): RawDisk) -> PyResult<DiskConfig> {
    let write_policy = match write.as_str() {
        "through" => WritePolicy::Through,
        "back" => WritePolicy::Back,
        other => return Err(raise("ConfigError", &format!("disk_write is {other:?}: give 'through' or 'back'"))),
    };
    let admission = admission.parse().map_err(|error| to_python(&error))?;
    let config = DiskConfig::from_gib(dir, size_gb).map_err(|error| to_python(&error))?;
    let flush_timeout = some_seconds(flush_timeout, "disk_flush_timeout_seconds")?;
    let codecs = Codecs::named(&codec).map_err(|error| to_python(&error))?;
    let config = config.write_policy(write_policy).admission(admission).flush_timeout(flush_timeout).codecs(codecs);
    Ok(match key_file {
        Some(key_file) => config.key_file(key_file),
        None => config,
    })
}
