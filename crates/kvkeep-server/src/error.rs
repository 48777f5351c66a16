//! What can go wrong: at the start, and in one request, there in the shape that clients of
//! OpenAI's API know.

use std::borrow::Cow;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use kvkeep::OneLine;
use kvkeep_engine::EngineError;
use serde::Serialize;
use utoipa::ToSchema;

/// A server that cannot be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// The address cannot be had.
    #[error("cannot listen at {address} (choose another --port, or stop what listens there)")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the operating system said.
        source: io::Error,
    },
    /// Others than this machine could ask without a key.
    #[error("{0} can be reached from other machines: give --api-key-file, or listen at 127.0.0.1")]
    KeysNeeded(SocketAddr),
    /// The key file cannot be read, or others can read it.
    #[error("cannot use the API key file {path}: {reason}")]
    KeyFile {
        /// The file.
        path: PathBuf,
        /// Why, and what to do.
        reason: String,
    },
    /// The key file is not one.
    #[error("the API key file is not right: {0}")]
    BadKeys(String),
    /// A setting makes no sense.
    #[error("{0}")]
    Config(String),
    /// An endpoint of KV events cannot be had.
    #[error("cannot publish KV events at {address} (choose another endpoint, or stop what listens there)")]
    KvEventsListen {
        /// The address.
        address: SocketAddr,
        /// What the operating system said.
        source: io::Error,
    },
    /// The operating system does not say where KV events are published.
    #[error("cannot tell where KV events are published")]
    KvEvents(#[source] io::Error),
    /// Others than this machine could read KV events.
    #[error(
        "{0} can be reached from other machines, and readers of KV events show no key: give --kv-events-anyone if \
         whoever reaches it may read them, or publish at 127.0.0.1"
    )]
    KvEventsOpen(SocketAddr),
    /// The operating system gives no more threads.
    #[error("cannot start the threads that answer")]
    Threads(#[source] io::Error),
    /// Not all that was cached is on the disk.
    #[error("the server has ended, but the cache could not be written")]
    Close(#[source] kvkeep::Error),
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
    #[error("this server answers under its own address alone: {0}")]
    Elsewhere(&'static str),
    #[error("{message}")]
    Invalid { message: String, param: Option<Cow<'static, str>> },
    /// In the words by which clients know it.
    #[error(
        "This model's maximum context length is {context_tokens} tokens, and the prompt is too long for it: it has \
         {prompt}. Shorten it, or start the server with a larger --context-tokens if the model can"
    )]
    TooLong { prompt: String, context_tokens: usize, param: &'static str },
    #[error("there is no {0} here")]
    NotFound(String),
    #[error("there is no model {asked:?} here: this server has {has:?}")]
    NoSuchModel { asked: String, has: String },
    #[error("this path does not answer this method: see /openapi.json")]
    Method,
    #[error("the body is larger than the {limit_bytes} bytes that this server takes")]
    TooLarge { limit_bytes: usize },
    #[error("the body must be JSON: send the header Content-Type: application/json")]
    MediaType,
    #[error("the body did not come in time: the whole of it must be here within {limit_s} s")]
    SlowBody { limit_s: u64 },
    /// What the cache is like now does not allow it.
    #[error("{0}")]
    Conflict(String),
    #[error("{0} is not supported by this server")]
    NotSupported(&'static str),
    #[error("too many requests are waiting: try again in {retry_after_s} s")]
    Busy { retry_after_s: u64 },
    /// The last places are kept for those who look after the server.
    #[error(
        "too many connections are open: try again in {retry_after_s} s, or start the server with more --connections"
    )]
    Crowded { retry_after_s: u64 },
    #[error("the request took longer than this server allows")]
    Timeout,
    #[error("the server is shutting down")]
    ShuttingDown,
    #[error("the server could not answer: {0}")]
    Internal(String),
}

const INVALID: &str = "invalid_request_error";

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
    param: Option<Cow<'static, str>>,
    code: Option<&'static str>,
}

impl ApiError {
    /// A value that cannot be used.
    pub(crate) fn invalid(param: &'static str, message: impl Into<String>) -> Self {
        Self::Invalid { message: message.into(), param: Some(Cow::Borrowed(param)) }
    }

    /// Something went wrong that the client cannot help.
    pub(crate) fn internal(error: &(dyn std::error::Error + 'static)) -> Self {
        Self::Internal(OneLine(error).to_string())
    }

    /// Status, type and code.
    fn kind(&self) -> (StatusCode, &'static str, Option<&'static str>) {
        match self {
            Self::Unauthorized => (StatusCode::UNAUTHORIZED, INVALID, Some("invalid_api_key")),
            Self::Elsewhere(_) => (StatusCode::FORBIDDEN, INVALID, Some("wrong_host")),
            Self::Forbidden => (StatusCode::FORBIDDEN, INVALID, Some("insufficient_permissions")),
            Self::Invalid { .. } => (StatusCode::BAD_REQUEST, INVALID, None),
            Self::NotFound(_) => (StatusCode::NOT_FOUND, INVALID, Some("not_found")),
            Self::TooLong { .. } => (StatusCode::BAD_REQUEST, INVALID, Some("context_length_exceeded")),
            Self::NoSuchModel { .. } => (StatusCode::NOT_FOUND, INVALID, Some("model_not_found")),
            Self::Method => (StatusCode::METHOD_NOT_ALLOWED, INVALID, Some("method_not_allowed")),
            Self::TooLarge { .. } => (StatusCode::PAYLOAD_TOO_LARGE, INVALID, Some("body_too_large")),
            Self::MediaType => (StatusCode::UNSUPPORTED_MEDIA_TYPE, INVALID, Some("unsupported_media_type")),
            Self::SlowBody { .. } => (StatusCode::REQUEST_TIMEOUT, INVALID, Some("slow_body")),
            Self::Conflict(_) => (StatusCode::CONFLICT, INVALID, Some("conflict")),
            Self::NotSupported(_) => (StatusCode::NOT_IMPLEMENTED, INVALID, Some("not_supported")),
            Self::Busy { .. } => (StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", Some("queue_full")),
            Self::Crowded { .. } => (StatusCode::SERVICE_UNAVAILABLE, "rate_limit_error", Some("too_many_connections")),
            Self::Timeout => (StatusCode::GATEWAY_TIMEOUT, "server_error", Some("timeout")),
            Self::ShuttingDown => (StatusCode::SERVICE_UNAVAILABLE, "server_error", Some("shutting_down")),
            Self::Internal(_) => (StatusCode::INTERNAL_SERVER_ERROR, "server_error", None),
        }
    }

    pub(crate) fn body(&self) -> ErrorBody {
        let (_, r#type, code) = self.kind();
        let param = match self {
            Self::Invalid { param, .. } => param.clone(),
            Self::TooLong { param, .. } => Some(Cow::Borrowed(*param)),
            Self::NoSuchModel { .. } => Some(Cow::Borrowed("model")),
            _ => None,
        };
        ErrorBody { error: ErrorDetail { message: self.to_string(), r#type, param, code } }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.kind().0, Json(self.body())).into_response();
        let headers = response.headers_mut();
        match self {
            Self::Busy { retry_after_s } => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from(retry_after_s));
            }
            Self::Crowded { retry_after_s } => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from(retry_after_s));
                headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            Self::Unauthorized => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"kvkeep\""));
            }
            _ => (),
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
            | EngineError::NoGuard
            | EngineError::Sampling(_)
            | EngineError::UnknownToken { .. } => Self::Invalid { message: OneLine(&error).to_string(), param: None },
            error => Self::internal(&error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error;

    use super::*;

    /// Each variant once. The match has no wildcard: a new variant has to be added here, too.
    fn every() -> Vec<ServerError> {
        let (cause, address) = (|| io::Error::other("the cause"), SocketAddr::from(([127, 0, 0, 1], 80)));
        let disk = kvkeep::Error::Disk { dir: "d".into(), doing: "flush", source: cause() };
        let all = vec![
            ServerError::Listen { address, source: cause() },
            ServerError::KeysNeeded(address),
            ServerError::KeyFile { path: "p".into(), reason: "r".into() },
            ServerError::BadKeys("k".into()),
            ServerError::Config("c".into()),
            ServerError::Threads(cause()),
            ServerError::Close(disk),
            ServerError::Engine(EngineError::ReadModel { path: "p".into(), source: cause() }),
            ServerError::KvEventsListen { address, source: cause() },
            ServerError::KvEvents(cause()),
            ServerError::KvEventsOpen(address),
        ];
        let number = |error: &ServerError| match error {
            ServerError::Listen { .. } => 0,
            ServerError::KeysNeeded(_) => 1,
            ServerError::KeyFile { .. } => 2,
            ServerError::BadKeys(_) => 3,
            ServerError::Config(_) => 4,
            ServerError::Threads(_) => 5,
            ServerError::Close(_) => 6,
            ServerError::Engine(_) => 7,
            ServerError::KvEventsListen { .. } => 8,
            ServerError::KvEvents(_) => 9,
            ServerError::KvEventsOpen(_) => 10,
        };
        assert!(all.iter().map(number).eq(0..11));
        all
    }

    /// What the server could not write at its end was said three times.
    #[test]
    fn every_error_says_its_cause_once() {
        for error in every() {
            let line = OneLine(&error).to_string();
            assert_eq!(line.matches("the cause").count(), usize::from(error.source().is_some()), "{line}");
            assert!(!error.to_string().contains("the cause"), "{error}");
        }
    }
}
