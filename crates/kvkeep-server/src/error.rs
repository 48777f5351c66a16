//! What can go wrong: at the start, and in one request, there in the shape that clients of
//! OpenAI's API know.

use std::io;
use std::net::SocketAddr;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use kvkeep_engine::EngineError;
use serde::Serialize;
use utoipa::ToSchema;

/// A server that cannot be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// The address cannot be had.
    #[error("cannot listen at {address}: {source}; choose another --port, or stop what listens there")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the operating system said.
        source: io::Error,
    },
    /// Others than this machine could ask without a key.
    #[error("{0} can be reached from other machines: give --api-key-file, or listen at 127.0.0.1")]
    KeysNeeded(SocketAddr),
    /// The key file is not one.
    #[error("the API key file is not right: {0}")]
    BadKeys(String),
    /// A setting makes no sense.
    #[error("{0}")]
    Config(String),
    /// The engine refused.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// A request that is not answered.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApiError {
    #[error("no valid API key: send the header Authorization: Bearer KEY with a key that this server knows")]
    Unauthorized,
    #[error("this key may not see or change the cache: use the operator's")]
    Forbidden,
    #[error("{message}")]
    Invalid { message: String, param: Option<&'static str> },
    #[error("there is no {0} here")]
    NotFound(String),
    #[error("{0} is not supported by this server")]
    NotSupported(&'static str),
    #[error("too many requests are waiting: try again in {retry_after_s} s")]
    Busy { retry_after_s: u64 },
    #[error("the request took longer than this server allows")]
    Timeout,
    #[error("the server is shutting down")]
    ShuttingDown,
    #[error("the server could not answer: {0}")]
    Internal(String),
}

/// OpenAI's shape of an error.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ErrorBody {
    error: ErrorDetail,
}

#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ErrorDetail {
    message: String,
    r#type: &'static str,
    /// The parameter that is wrong.
    param: Option<&'static str>,
    code: Option<&'static str>,
}

impl ApiError {
    /// A value that cannot be used.
    pub(crate) fn invalid(param: &'static str, message: impl Into<String>) -> Self {
        Self::Invalid { message: message.into(), param: Some(param) }
    }

    /// Status, type and code.
    fn kind(&self) -> (StatusCode, &'static str, Option<&'static str>) {
        match self {
            Self::Unauthorized => (StatusCode::UNAUTHORIZED, "invalid_request_error", Some("invalid_api_key")),
            Self::Forbidden => (StatusCode::FORBIDDEN, "invalid_request_error", Some("insufficient_permissions")),
            Self::Invalid { .. } => (StatusCode::BAD_REQUEST, "invalid_request_error", None),
            Self::NotFound(_) => (StatusCode::NOT_FOUND, "invalid_request_error", Some("not_found")),
            Self::NotSupported(_) => (StatusCode::NOT_IMPLEMENTED, "invalid_request_error", Some("not_supported")),
            Self::Busy { .. } => (StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", Some("queue_full")),
            Self::Timeout => (StatusCode::GATEWAY_TIMEOUT, "server_error", Some("timeout")),
            Self::ShuttingDown => (StatusCode::SERVICE_UNAVAILABLE, "server_error", Some("shutting_down")),
            Self::Internal(_) => (StatusCode::INTERNAL_SERVER_ERROR, "server_error", None),
        }
    }

    pub(crate) fn body(&self) -> ErrorBody {
        let (_, r#type, code) = self.kind();
        let param = if let Self::Invalid { param, .. } = self { *param } else { None };
        ErrorBody { error: ErrorDetail { message: self.to_string(), r#type, param, code } }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.kind().0, Json(self.body())).into_response();
        if let Self::Busy { retry_after_s } = self {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(retry_after_s));
        }
        response
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::ContextOverflow { .. }
            | EngineError::EmptyTokens
            | EngineError::NoChatTemplate
            | EngineError::ChatTemplate(_)
            | EngineError::Sampling(_)
            | EngineError::UnknownToken { .. } => Self::Invalid { message: error.to_string(), param: None },
            error => Self::Internal(error.to_string()),
        }
    }
}
