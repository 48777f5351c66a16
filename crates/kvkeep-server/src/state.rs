//! What all handlers share.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use kvkeep::{KvCache, Namespace};
use kvkeep_engine::Engine;

use crate::auth::Tenant;
use crate::config::ServerConfig;
use crate::error::{ApiError, ServerError};

/// Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct AppState {
    pub(crate) shared: Arc<Shared>,
}

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) engine: Engine,
    pub(crate) cache: KvCache,
    pub(crate) config: ServerConfig,
    /// Without a tenant.
    pub(crate) namespace: Namespace,
    pub(crate) started: Instant,
}

impl AppState {
    pub(crate) fn new(engine: Engine, cache: KvCache, config: ServerConfig) -> Result<Self, ServerError> {
        let namespace = engine.namespace(config.block_tokens)?;
        Ok(Self { shared: Arc::new(Shared { engine, cache, config, namespace, started: Instant::now() }) })
    }
}

/// Whoever asks, if the server knows them.
impl FromRequestParts<AppState> for Tenant {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, ApiError> {
        match &state.shared.config.api_keys {
            Some(keys) => keys.tenant(&parts.headers),
            None => Ok(Self::OPERATOR),
        }
    }
}

/// The operator: whoever else asks is refused.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Operator;

impl FromRequestParts<AppState> for Operator {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, ApiError> {
        let tenant = Tenant::from_request_parts(parts, state).await?;
        if tenant.is_operator() { Ok(Self) } else { Err(ApiError::Forbidden) }
    }
}
