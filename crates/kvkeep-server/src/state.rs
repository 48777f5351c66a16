//! What all handlers share.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::FromRequestParts;
use axum::http::HeaderMap;
use axum::http::request::Parts;
use kvkeep::{KvCache, Namespace};
use kvkeep_engine::Engine;

use crate::auth::Tenant;
use crate::config::ServerConfig;
use crate::connections::Place;
use crate::error::{ApiError, ServerError};
use crate::observed::Observed;
use crate::scheduler::Scheduler;
use crate::served::Served;

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
    pub(crate) observed: Observed,
    pub(crate) scheduler: Scheduler,
    /// What the model is called here.
    pub(crate) model: String,
    /// What it may be called too.
    pub(crate) aliases: Vec<String>,
}

impl AppState {
    pub(crate) fn new(engine: Engine, cache: KvCache, config: ServerConfig) -> Result<Self, ServerError> {
        // By the name that the cache's own statistics have for it.
        let namespace = cache.store_handle().own_namespace(&engine.namespace(config.block_tokens)?);
        let model = config.model_name.clone().unwrap_or_else(|| engine.model_name().to_owned());
        let mut aliases = config.model_aliases.clone();
        aliases.retain(|alias| *alias != model && !alias.is_empty());
        let tiers = cache.stats().tiers.into_iter().map(|tier| tier.name);
        let observed = Observed::new(std::iter::once("ram".to_owned()).chain(tiers));
        let (started, scheduler) = (Instant::now(), Scheduler::default());
        let shared = Shared { engine, cache, config, namespace, started, observed, scheduler, model, aliases };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Whose key these headers show. Without keys everybody is the operator.
    pub(crate) fn tenant(&self, headers: &HeaderMap) -> Result<Tenant, ApiError> {
        match &self.shared.config.api_keys {
            Some(keys) => keys.tenant(headers),
            None => Ok(Tenant::OPERATOR),
        }
    }

    /// A request has ended. Everything that is counted or listed comes from here.
    pub(crate) fn observe(&self, served: &Served) {
        self.shared.observed.observe(served);
        if self.shared.config.log_prompts {
            let prompt = self.shared.engine.tokenizer().decode(&served.prompt);
            tracing::info!(id = served.id, prompt, "asked");
        }
        let ms = |time: Duration| time.as_millis();
        let gave = served.tiers.iter().filter(|(_, tokens)| *tokens > 0);
        let tiers = gave.map(|(name, tokens)| format!("{name} {tokens}")).collect::<Vec<_>>().join(", ");
        tracing::info!(
            id = served.id,
            endpoint = ?served.endpoint,
            tenant = served.tenant.name(),
            prompt_tokens = served.prompt.len(),
            cached_tokens = served.cached_tokens(),
            tiers,
            completion_tokens = served.completion_tokens,
            queued_ms = ms(served.queued),
            ttft_ms = served.ttft.map(|ttft| u64::try_from(ms(ttft)).unwrap_or(u64::MAX)),
            total_ms = ms(served.total),
            outcome = ?served.outcome,
            "served"
        );
    }
}

/// Whoever asks, if the server knows them.
impl FromRequestParts<AppState> for Tenant {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, ApiError> {
        let tenant = state.tenant(&parts.headers)?;
        if let Some(place) = parts.extensions.get::<Arc<Place>>() {
            place.connection.showed_key();
        }
        Ok(tenant)
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
