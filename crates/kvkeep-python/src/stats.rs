//! The store's counters as a Python dict.

use kvkeep::Stats;
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// Every counter under the library's name for it, and what follows from them.
pub(crate) fn to_dict<'py>(py: Python<'py>, stats: &Stats) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    for (name, value) in [
        ("total_requests", stats.total_requests()),
        ("hits", stats.hits),
        ("misses", stats.misses),
        ("evictions", stats.evictions),
        ("expirations", stats.expirations),
        ("rejections", stats.rejections),
        ("removals", stats.removals),
        ("stored_total", stats.stored_total),
        ("requested_tokens_total", stats.requested_tokens_total),
        ("cached_tokens_total", stats.cached_tokens_total),
        ("entries", stats.entries),
        ("used_bytes", stats.used_bytes),
        ("held_bytes", stats.held_bytes),
        ("capacity_bytes", stats.capacity_bytes),
        ("index_bytes", stats.index_bytes),
    ] {
        dict.set_item(name, value)?;
    }
    for (name, value) in [
        ("hit_rate_percent", stats.hit_rate_percent()),
        ("token_hit_rate_percent", stats.token_hit_rate_percent()),
        ("size_mb", stats.size_mb()),
        ("max_size_mb", stats.max_size_mb()),
        ("size_percent", stats.size_percent()),
        ("time_saved_seconds", stats.time_saved_seconds()),
    ] {
        dict.set_item(name, value)?;
    }
    Ok(dict)
}
