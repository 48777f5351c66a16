//! A request's body: JSON of a known shape, bounded in size and in time.
//!
//! It is read last, after whoever asks is known: a stranger's body takes no memory.

use std::borrow::Cow;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{FromRequest, Request};
use axum::http::HeaderMap;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use futures_util::StreamExt;
use serde::de::DeserializeOwned;

use crate::config::ServerConfig;
use crate::connections::Place;
use crate::error::ApiError;
use crate::state::AppState;

/// As many times the limit are read and dropped, so that a client that only writes gets to read
/// that its body is too large; then the connection is cut.
const DRAINED: usize = 8;

/// A body of this shape. Fields that the shape does not know are ignored.
#[derive(Debug)]
pub(crate) struct JsonBody<T>(pub(crate) T);

impl<T: DeserializeOwned> FromRequest<AppState> for JsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, ApiError> {
        let config = &state.shared.config;
        if !is_json(request.headers()) {
            return Err(ApiError::MediaType);
        }
        let bytes = read(request, config).await?;
        let mut json = serde_json::Deserializer::from_slice(&bytes);
        let parsed = serde_path_to_error::deserialize(&mut json).map_err(|error| {
            let param = Some(error.path().to_string()).filter(|path| path != ".").map(Cow::Owned);
            let message = match &param {
                Some(param) => format!("{param}: {}", error.inner()),
                None => format!("the body is not the JSON that is expected: {}", error.inner()),
            };
            ApiError::Invalid { message, param }
        })?;
        let invalid =
            |error| ApiError::Invalid { message: format!("the body is not one JSON value: {error}"), param: None };
        json.end().map_err(invalid)?;
        Ok(Self(parsed))
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    let value = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    value.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case("application/json")
}

async fn read(request: Request, config: &ServerConfig) -> Result<Vec<u8>, ApiError> {
    let limit_bytes = config.body_bytes;
    let announced = request.headers().get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    if announced.is_some_and(|bytes| bytes > limit_bytes.saturating_mul(DRAINED)) {
        return Err(ApiError::TooLarge { limit_bytes });
    }
    let expected = announced.unwrap_or(0).min(limit_bytes);
    let place = request.extensions().get::<Arc<Place>>().cloned();
    let moved = || {
        if let Some(place) = &place {
            place.connection.moved();
        }
    };
    let read = read_bounded(request.into_body(), expected, limit_bytes, moved);
    let limit_s = config.client_timeout.as_secs();
    let bytes = tokio::time::timeout(config.client_timeout, read).await.unwrap_or(Err(ApiError::SlowBody { limit_s }));
    if let Some(place) = &place {
        place.connection.received();
    }
    bytes
}

/// Calls `moved` whenever something has come.
async fn read_bounded(body: Body, expected: usize, limit_bytes: usize, moved: impl Fn()) -> Result<Vec<u8>, ApiError> {
    let broken = |error| ApiError::Invalid { message: format!("the body broke off: {error}"), param: None };
    let mut stream = body.into_data_stream();
    let mut bytes = Vec::with_capacity(expected);
    let mut total = 0usize;
    while let Some(piece) = stream.next().await {
        let piece = piece.map_err(broken)?;
        moved();
        total += piece.len();
        if total <= limit_bytes {
            bytes.extend_from_slice(&piece);
        } else if total > limit_bytes.saturating_mul(DRAINED) {
            break;
        } else {
            bytes = Vec::new();
        }
    }
    if total > limit_bytes { Err(ApiError::TooLarge { limit_bytes }) } else { Ok(bytes) }
}
