//! The listener and the routes.
//!
//! An accept loop of our own over hyper: `axum::serve` bounds neither connections nor the time
//! that a client takes for its headers.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::http::Uri;
use axum::middleware::from_fn_with_state;
use axum::routing::get;
use axum::{Json, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use kvkeep::KvCache;
use kvkeep_engine::Engine;
use rustix::net::sockopt::set_tcp_user_timeout;
use tokio::net::{TcpListener, TcpStream};
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;

use crate::auth::Tenant;
use crate::config::ServerConfig;
use crate::connections::{Connections, Place};
use crate::describe::Description;
use crate::error::{ApiError, ServerError};
use crate::front::Front;
use crate::half_closed::Wire;
use crate::state::AppState;
use crate::worker::Workers;
use crate::{dashboard, guard, openai, operator};

/// Of a request's headers, about: hyper lets its buffer grow to some times this.
const HEADER_BYTES: usize = 64 << 10;
/// After a failed accept, such as one file too many.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// What is cancelled ends within its next batch of tokens.
const CANCEL_GRACE: Duration = Duration::from_secs(5);

/// A server that listens and does not answer yet.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    state: AppState,
    workers: Workers,
}

impl Server {
    /// Begins to listen.
    ///
    /// # Errors
    /// [`ServerError`]; each variant says what to do.
    pub async fn bind(engine: Engine, cache: KvCache, config: ServerConfig) -> Result<Self, ServerError> {
        let address = config.address;
        if config.api_keys.is_none() && !address.ip().is_loopback() {
            return Err(ServerError::KeysNeeded(address));
        }
        let listener = TcpListener::bind(address).await.map_err(|source| ServerError::Listen { address, source })?;
        let state = AppState::new(engine, cache, config)?;
        let workers = Workers::start(&state)?;
        Ok(Self { listener, state, workers })
    }

    /// Where it listens; the port is a real one even if 0 was asked for.
    ///
    /// # Errors
    /// [`ServerError::Listen`] if the operating system does not say.
    pub fn address(&self) -> Result<SocketAddr, ServerError> {
        let address = self.state.shared.config.address;
        self.listener.local_addr().map_err(|source| ServerError::Listen { address, source })
    }

    /// Answers until `shutdown` is over, then ends what is under way and writes the cache to its
    /// disk tier.
    ///
    /// # Errors
    /// [`ServerError::Close`] if not all that was cached could be written.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<(), ServerError> {
        let Self { listener, state, workers } = self;
        let open = accept(listener, &state, shutdown).await;
        state.shared.scheduler.close();
        let mut ended = pin!(open.shutdown());
        if tokio::time::timeout(state.shared.config.shutdown_grace, &mut ended).await.is_err() {
            tracing::warn!("answers still under way are cancelled");
            state.cancel_all();
            // Whoever does not read its answer is left.
            drop(tokio::time::timeout(CANCEL_GRACE, &mut ended).await);
        }
        let closed = tokio::task::spawn_blocking(move || {
            state.cancel_all();
            workers.join();
            state.shared.cache.clone().close()
        });
        match closed.await {
            Ok(closed) => closed.map_err(ServerError::Close),
            Err(error) => {
                Err(ServerError::Config(format!("the cache could not be closed: {}", kvkeep::OneLine(&error))))
            }
        }
    }
}

/// Takes connections until `shutdown` is over; says which are open.
async fn accept(listener: TcpListener, state: &AppState, shutdown: impl Future<Output = ()>) -> GracefulShutdown {
    let config = &state.shared.config;
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(config.client_timeout).max_buf_size(HEADER_BYTES);
    let router = router(state.clone());
    let (open, connections) = (GracefulShutdown::new(), Connections::new(config.connections));
    let mut shutdown = pin!(shutdown);
    loop {
        let (stream, place) = tokio::select! {
            () = &mut shutdown => return open,
            next = next(&listener, &connections, config.client_timeout) => next,
        };
        let connection = Arc::clone(&place.connection);
        let wire = TokioIo::new(Wire::new(stream, Arc::clone(&connection)));
        let served = open.watch(http.serve_connection(wire, Front::new(router.clone(), Arc::new(place))));
        tokio::spawn(async move {
            let ended = tokio::select! {
                ended = served => ended,
                () = connection.closed() => Ok(()),
            };
            if let Err(error) = ended {
                tracing::debug!(%error, "a connection broke off");
            }
        });
    }
}

async fn next(listener: &TcpListener, connections: &Arc<Connections>, client_timeout: Duration) -> (TcpStream, Place) {
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                // Tokens go out one by one: none waits for the next to fill a packet.
                drop(stream.set_nodelay(true));
                // Whoever does not read, or is gone without a word, is cut off by the kernel.
                let milliseconds = u32::try_from(client_timeout.as_millis()).unwrap_or(u32::MAX);
                if let Err(error) = set_tcp_user_timeout(&stream, milliseconds) {
                    tracing::debug!(%error, "a client that does not read is not cut off");
                }
                return (stream, connections.enter(peer.ip()).await);
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn router(state: AppState) -> Router {
    let (router, description) = OpenApiRouter::with_openapi(Description::openapi())
        .merge(openai::routes())
        .merge(operator::routes())
        .merge(dashboard::routes())
        .split_for_parts();
    router
        .route("/openapi.json", get(|| async { Json(description) }))
        .fallback(|_: Tenant, uri: Uri| async move { ApiError::NotFound(uri.path().to_owned()) })
        .method_not_allowed_fallback(|_: Tenant| async { ApiError::Method })
        .layer(from_fn_with_state(state.clone(), guard::check))
        .with_state(state)
}
