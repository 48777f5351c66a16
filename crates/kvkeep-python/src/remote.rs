//! A store that several nodes share, as a tier of a cache: settings from Python, checked.
//!
//! Nothing is read from the environment here: what stores are told (keys of S3, say) comes with the settings.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use kvkeep::tiers::Codecs;
use kvkeep_remote::{RemoteConfig, RemoteTier};
use pyo3::prelude::*;

use crate::convert::{seconds, some_seconds};
use crate::error::{raise, to_python};
use crate::open::waiting;

/// As the dataclass `RemoteConfig` has it.
#[derive(Debug, FromPyObject)]
pub(crate) struct RawRemote {
    #[pyo3(item)]
    url: String,
    #[pyo3(item)]
    prefix: String,
    #[pyo3(item)]
    size_gb: f64,
    #[pyo3(item)]
    deadline_seconds: f64,
    #[pyo3(item)]
    ttl_seconds: Option<f64>,
    #[pyo3(item)]
    key_file: Option<PathBuf>,
    #[pyo3(item)]
    codec: String,
    #[pyo3(item)]
    variables: HashMap<String, String>,
}

/// What a lookup does while the store says what it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lookups {
    Wait,
    /// It looks again.
    Return,
}

/// Opens it; what waits to be written takes `queue_bytes` of RAM at most.
pub(crate) fn open(py: Python<'_>, raw: RawRemote, queue_bytes: u64, lookups: Lookups) -> PyResult<Arc<RemoteTier>> {
    let mut config = config(raw)?.queue_bytes(queue_bytes);
    if lookups == Lookups::Return {
        config = config.never_waits();
    }
    let opened = waiting(py, move || RemoteTier::open(&config))?;
    Ok(Arc::new(opened.map_err(|error| to_python(&error))?))
}

fn config(raw: RawRemote) -> PyResult<RemoteConfig> {
    let RawRemote { url, prefix, size_gb, deadline_seconds, ttl_seconds, key_file, codec, variables } = raw;
    if !(size_gb.is_finite() && size_gb > 0.0) {
        return Err(raise("ConfigError", &format!("RemoteConfig.size_gb is {size_gb}: give a number above 0")));
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates, and is above 0")]
    let capacity_bytes = (size_gb * f64::from(1 << 30)) as u64;
    let mut config = RemoteConfig::new(url)
        .prefix(prefix)
        .capacity_bytes(capacity_bytes)
        .deadline(some_seconds(deadline_seconds, "RemoteConfig.deadline_seconds")?)
        .ttl(seconds(ttl_seconds, "RemoteConfig.ttl_seconds")?)
        .codecs(Codecs::named(&codec).map_err(|error| to_python(&error))?)
        .variables(variables);
    if let Some(key_file) = key_file {
        config = config.key_file(key_file);
    }
    Ok(config)
}
