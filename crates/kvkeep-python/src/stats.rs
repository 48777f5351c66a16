//! The store's counters as a Python dict.

use kvkeep::{Stats, TierStats};
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
        ("size_mb", stats.size_mib()),
        ("max_size_mb", stats.max_size_mib()),
        ("size_percent", stats.size_percent()),
        ("time_saved_seconds", stats.time_saved_seconds()),
    ] {
        dict.set_item(name, value)?;
    }
    dict.set_item("disk", stats.tier("disk").map(|disk| tier_to_dict(py, disk)).transpose()?)?;
    let tiers = PyDict::new(py);
    for tier in &stats.tiers {
        tiers.set_item(&tier.name, tier_to_dict(py, tier)?)?;
    }
    dict.set_item("tiers", tiers)?;
    Ok(dict)
}

fn tier_to_dict<'py>(py: Python<'py>, stats: &TierStats) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    for (name, value) in [
        ("entries", stats.entries),
        ("used_bytes", stats.used_bytes),
        ("capacity_bytes", stats.capacity_bytes),
        ("index_bytes", stats.index_bytes),
        ("queued_bytes", stats.queued_bytes),
        ("hits", stats.hits),
        ("stored_total", stats.stored_total),
        ("written_bytes_total", stats.written_bytes_total),
        ("written_raw_bytes_total", stats.written_raw_bytes_total),
        ("read_bytes_total", stats.read_bytes_total),
        ("dropped_total", stats.dropped_total),
        ("not_admitted_total", stats.not_admitted_total),
        ("evictions", stats.evictions),
        ("reinserted_total", stats.reinserted_total),
        ("damaged_total", stats.damaged_total),
        ("read_errors_total", stats.read_errors_total),
        ("write_errors_total", stats.write_errors_total),
        ("timeouts_total", stats.timeouts_total),
        ("not_worth_tokens_total", stats.not_worth_tokens_total),
        ("foreign_files", stats.foreign_files),
        ("load_bytes_per_s", stats.load_bytes_per_s),
    ] {
        dict.set_item(name, value)?;
    }
    dict.set_item("codec", stats.codec)?;
    dict.set_item("codec_ratio", stats.codec_ratio())?;
    dict.set_item("failing", stats.failing)?;
    Ok(dict)
}
