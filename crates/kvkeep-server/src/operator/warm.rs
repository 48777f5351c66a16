//! Reading a prompt before anybody asks with it. It waits in the queue as every request does.

use std::sync::Arc;

use axum::extract::State;
use axum::{Extension, Json};
use kvkeep_engine::GenerateOptions;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{blocking, prefixes};
use crate::auth::Tenant;
use crate::describe::{BodyErrors, OperatorErrors, QueueErrors};
use crate::error::{ApiError, ErrorBody};
use crate::extract::JsonBody;
use crate::front::RequestId;
use crate::openai::{Message, prompt, salt};
use crate::scheduler::{Arrived, Event, Job};
use crate::served::{Endpoint, Served};
use crate::state::{AppState, Operator};

/// A prompt: `messages` or `prompt`, not both.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"prompt": "You are a librarian. You answer visitors in one short sentence."}))]
pub(super) struct WarmRequest {
    /// As in /v1/chat/completions
    #[schema(min_items = 1)]
    messages: Option<Vec<Message>>,
    /// As in /v1/completions, as one text
    prompt: Option<String>,
    /// As those who will ask send it
    #[schema(max_length = 256)]
    cache_salt: Option<String>,
    /// Whose key those who will ask have; the operator's without it
    tenant: Option<String>,
    /// Keep it in RAM
    #[serde(default)]
    pin: bool,
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct WarmAnswer {
    prompt_tokens: usize,
    /// Were cached already.
    cached_tokens: usize,
    computed_tokens: usize,
    /// From the request to the end, the queue included.
    seconds: f64,
    /// Its id in /cache/prefixes; null if the prompt is shorter than a block.
    prefix: Option<String>,
}

/// Read a prompt, so that the next request with it is warm
///
/// Nothing is answered. It waits in the queue beside all other requests.
#[utoipa::path(post, path = "/cache/warm", tag = "operator", request_body = WarmRequest, responses(
    (status = 200, description = "It is in the cache", body = WarmAnswer),
    BodyErrors,
    OperatorErrors,
    (status = 409, description = "It is in the cache, and cannot be pinned", body = ErrorBody),
    QueueErrors,
))]
pub(super) async fn warm(
    _: Operator,
    State(state): State<AppState>,
    Extension(id): Extension<RequestId>,
    JsonBody(request): JsonBody<WarmRequest>,
) -> Result<Json<WarmAnswer>, ApiError> {
    let arrived = Arrived::now();
    salt(request.cache_salt.as_ref())?;
    let tenant = tenant(&state, request.tenant.as_deref())?;
    let (prompt, param) = match (request.messages, request.prompt) {
        (Some(messages), None) => (prompt::of_chat(&state, messages).await?, "messages"),
        (None, Some(text)) => (prompt::of_text(&state, text).await?, "prompt"),
        _ => return Err(ApiError::invalid("prompt", "give messages or prompt, and not both")),
    };
    prompt::room(&state, prompt.len(), param)?;
    let job = Job {
        id: format!("warm-{id}"),
        endpoint: Endpoint::Warm,
        namespace: tenant.namespace(&state.shared.namespace, request.cache_salt.as_deref()),
        tenant,
        prompt: Arc::from(prompt),
        // The first token falls out of the prompt's computation: nothing is decoded.
        options: GenerateOptions::greedy(1),
        stop: Vec::new(),
        top_logprobs: None,
        arrived,
    };
    let served = run(&state, job).await?;
    let prefix = served.prefix();
    if let (Some(id), true) = (prefix, request.pin) {
        blocking(move || prefixes::pin_prefix(&state, id)).await?;
    }
    Ok(Json(WarmAnswer {
        prompt_tokens: served.prompt.len(),
        cached_tokens: served.cached_tokens(),
        computed_tokens: served.computed_tokens(),
        seconds: served.total.as_secs_f64(),
        prefix: prefix.map(|id| id.to_string()),
    }))
}

/// An operator may warm for everybody who has a key.
fn tenant(state: &AppState, name: Option<&str>) -> Result<Tenant, ApiError> {
    let Some(name) = name else { return Ok(Tenant::OPERATOR) };
    let known = state.shared.config.api_keys.as_ref().and_then(|keys| keys.named(name));
    known.ok_or_else(|| ApiError::invalid("tenant", format!("no key of this server belongs to a tenant {name:?}")))
}

async fn run(state: &AppState, job: Job) -> Result<Served, ApiError> {
    let mut ticket = state.submit(vec![job])?;
    loop {
        if let (_, Event::End(ended)) = ticket.next().await {
            return ended.map(|served| *served);
        }
    }
}
