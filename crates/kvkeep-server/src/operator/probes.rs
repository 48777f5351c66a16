//! Is it up, does it take requests, and how is it doing, for machines that ask.

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;

use crate::describe::{OpenErrors, OperatorErrors};
use crate::error::ApiError;
use crate::kv_events::KvEventsMeter;
use crate::metrics::{self, Now};
use crate::state::{AppState, Operator};

/// The process runs.
#[utoipa::path(get, path = "/health", tag = "operator", security(()), responses(
    (status = 200, description = "The process runs"),
    OpenErrors,
))]
pub(super) async fn health() -> StatusCode {
    StatusCode::OK
}

/// Requests are taken.
///
/// Not so while the server ends, or while its queue is full.
#[utoipa::path(get, path = "/ready", tag = "operator", security(()), responses(
    (status = 200, description = "Requests are taken"),
    (status = 503, description = "The queue is full, or the server is shutting down"),
    OpenErrors,
))]
pub(super) async fn ready(State(state): State<AppState>) -> StatusCode {
    let (load, config) = (state.shared.scheduler.load(), &state.shared.config);
    let full = load.running + load.queued >= config.parallel + config.queue;
    if load.closed || full { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK }
}

/// Figures for Prometheus, in OpenMetrics' text format.
#[utoipa::path(get, path = "/metrics", tag = "operator", responses(
    (status = 200, description = "All figures", body = String, content_type = "application/openmetrics-text"),
    OperatorErrors,
))]
pub(super) async fn metrics(_: Operator, State(state): State<AppState>) -> Result<impl IntoResponse, ApiError> {
    let shared = &state.shared;
    let load = shared.scheduler.load();
    let now = Now {
        model: &shared.model,
        uptime: shared.started.elapsed(),
        stats: shared.cache.stats(),
        running: load.running,
        waiting: load.queued,
        parallel: shared.config.parallel,
        queue: shared.config.queue,
        rejected: load.rejected,
        pinned_tokens: shared.cache.store_handle().leased().tokens,
        kv_events: shared.config.kv_events.as_ref().map(KvEventsMeter::counts),
    };
    let text = shared.observed.metrics.text(&now).map_err(|error| ApiError::internal(&error))?;
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text))
}
