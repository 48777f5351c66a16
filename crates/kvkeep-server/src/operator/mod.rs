//! What the operator asks: is it up, what is in the cache, and to change that.

mod prefixes;
mod probes;
mod stats;
mod warm;

use axum::extract::rejection::QueryRejection;
use axum::extract::{FromRequestParts, Query};
use axum::http::request::Parts;
use kvkeep::BlockHash;
use serde::de::DeserializeOwned;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::error::ApiError;
use crate::state::AppState;

pub(crate) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(probes::health))
        .routes(routes!(probes::ready))
        .routes(routes!(probes::metrics))
        .routes(routes!(stats::stats))
        .routes(routes!(stats::namespaces))
        .routes(routes!(stats::requests))
        .routes(routes!(prefixes::list))
        .routes(routes!(prefixes::pin))
        .routes(routes!(prefixes::unpin))
        .routes(routes!(prefixes::remove))
        .routes(routes!(prefixes::clear))
        .routes(routes!(warm::warm))
}

/// What stands behind the `?`, in this shape.
#[derive(Debug)]
struct Params<T>(T);

impl<T: DeserializeOwned> FromRequestParts<AppState> for Params<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, ApiError> {
        let invalid = |error: QueryRejection| ApiError::Invalid { message: error.body_text(), param: None };
        Query::from_request_parts(parts, state).await.map(|Query(params)| Self(params)).map_err(invalid)
    }
}

/// At most so many, if it is not more than is given at once.
fn limit(asked: Option<usize>, usual: usize, most: usize) -> Result<usize, ApiError> {
    match asked.unwrap_or(usual) {
        limit if (1..=most).contains(&limit) => Ok(limit),
        _ => Err(ApiError::invalid("limit", format!("limit must be from 1 to {most}"))),
    }
}

/// The name of a prefix.
fn prefix_id(text: &str) -> Result<BlockHash, ApiError> {
    text.parse().map_err(|error: kvkeep::Error| ApiError::invalid("prefix", error.to_string()))
}

/// Runs what may wait for the disk or takes its time, off the threads that listen.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let outcome = tokio::task::spawn_blocking(work).await;
    outcome.unwrap_or_else(|error| Err(ApiError::internal(&error)))
}
