//! The listener and the routes.

use std::net::SocketAddr;

use axum::Router;
use axum::http::Uri;
use kvkeep::KvCache;
use kvkeep_engine::Engine;
use tokio::net::TcpListener;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;

use crate::config::ServerConfig;
use crate::error::{ApiError, ServerError};
use crate::state::AppState;
use crate::{dashboard, openai, operator};

/// A server that listens and does not answer yet.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    state: AppState,
}

#[derive(Debug, OpenApi)]
#[openapi(info(title = "kvkeep", description = "An OpenAI-compatible server whose prompts stay warm."))]
struct Description;

impl Server {
    /// Begins to listen.
    ///
    /// # Errors
    /// [`ServerError::KeysNeeded`], [`ServerError::Listen`], [`ServerError::Config`], [`ServerError::Engine`].
    pub async fn bind(engine: Engine, cache: KvCache, config: ServerConfig) -> Result<Self, ServerError> {
        let address = config.address;
        if config.api_keys.is_none() && !address.ip().is_loopback() {
            return Err(ServerError::KeysNeeded(address));
        }
        let state = AppState::new(engine, cache, config)?;
        let listener = TcpListener::bind(address).await.map_err(|source| ServerError::Listen { address, source })?;
        Ok(Self { listener, state })
    }

    /// Where it listens; the port is a real one even if 0 was asked for.
    ///
    /// # Errors
    /// [`ServerError::Listen`] if the operating system does not say.
    pub fn address(&self) -> Result<SocketAddr, ServerError> {
        let address = self.state.shared.config.address;
        self.listener.local_addr().map_err(|source| ServerError::Listen { address, source })
    }

    /// Answers until `shutdown` is over, then ends what is under way and flushes the cache.
    ///
    /// # Errors
    /// [`ServerError::Listen`] if the listener fails.
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send + 'static) -> Result<(), ServerError> {
        let address = self.state.shared.config.address;
        let served = axum::serve(self.listener, router(self.state)).with_graceful_shutdown(shutdown).await;
        served.map_err(|source| ServerError::Listen { address, source })
    }
}

fn router(state: AppState) -> Router {
    let (router, _description) = OpenApiRouter::with_openapi(Description::openapi())
        .merge(openai::routes())
        .merge(operator::routes())
        .merge(dashboard::routes())
        .split_for_parts();
    router.fallback(|uri: Uri| async move { ApiError::NotFound(uri.path().to_owned()) }).with_state(state)
}
