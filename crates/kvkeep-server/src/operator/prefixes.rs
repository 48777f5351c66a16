//! The tree of prefixes: what is in it, and keeping or dropping a branch of it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use kvkeep::{BlockHash, Chain, Error, NamespaceId, Removed, Residency};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{Params, blocking, limit, prefix_id};
use crate::describe::{BodyErrors, OperatorErrors};
use crate::error::{ApiError, ErrorBody};
use crate::extract::JsonBody;
use crate::prefixes::{BranchView, Path};
use crate::served::TokensIn;
use crate::state::{AppState, Operator};

/// The text of a branch begins in so many of its tokens, and is cut to so many characters.
const TEXT_TOKENS: usize = 96;
const TEXT_CHARS: usize = 320;

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct PrefixesParams {
    /// At most so many, the most used first
    #[param(minimum = 1, maximum = 4096, default = 200)]
    limit: Option<usize>,
}

/// Branches of the tree, the most used first; the parent of each is among those before it.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Prefixes {
    prefixes: Vec<PrefixInfo>,
}

/// A run of blocks that requests had in common.
#[derive(Debug, Serialize, ToSchema)]
struct PrefixInfo {
    /// Names the whole prompt up to the end of this branch.
    #[schema(pattern = "^[0-9a-f]{64}$")]
    id: String,
    /// The branch before it; null at the beginning of a prompt.
    parent: Option<String>,
    namespace: String,
    /// Null is the operator.
    tenant: Option<String>,
    /// Where in the prompt the branch begins.
    first_token: usize,
    /// Tokens of the branch itself.
    tokens: usize,
    /// Requests that went through it.
    requests: u64,
    /// Since the last of them.
    last_used_seconds: f64,
    /// Where its tokens are now: of each tier, `ram` first, those that it has. What several tiers have counts for each.
    tiers: Vec<TokensIn>,
    /// Of its tokens, those that are in any tier.
    cached_tokens: usize,
    pinned: bool,
    /// How its text begins.
    text: String,
}

/// A branch of the tree.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct PrefixRequest {
    /// An `id` of /cache/prefixes
    #[schema(pattern = "^[0-9a-f]{64}$")]
    prefix: String,
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct PinAnswer {
    /// From the first token of the prompt on.
    pinned_tokens: usize,
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct UnpinAnswer {}

/// What to clear.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ClearRequest {
    /// Its 64 hexadecimal digits; without it everything is cleared.
    #[schema(pattern = "^[0-9a-f]{64}$")]
    namespace: Option<String>,
}

#[derive(Debug, Default, Serialize, ToSchema)]
pub(super) struct RemovedAnswer {
    /// Blocks that can no longer be found.
    entries: u64,
    /// Of RAM that this frees.
    bytes: u64,
}

/// Which prefixes requests had in common
///
/// A compressed tree over blocks of tokens, since the start of the server. Bounded: the coldest branches are
/// forgotten first.
#[utoipa::path(get, path = "/cache/prefixes", operation_id = "list_prefixes", tag = "operator", params(PrefixesParams), responses(
    (status = 200, description = "The most used first", body = Prefixes),
    (status = 400, description = "A parameter is wrong", body = ErrorBody),
    OperatorErrors,
))]
pub(super) async fn list(
    _: Operator,
    State(state): State<AppState>,
    Params(params): Params<PrefixesParams>,
) -> Result<Json<Prefixes>, ApiError> {
    let limit = limit(params.limit, 200, 4096)?;
    blocking(move || {
        let views = state.shared.observed.prefixes().hottest(limit, TEXT_TOKENS);
        let residencies = residencies(&state, &views)?;
        let info = |view| info(&state, view, &residencies);
        Ok(Json(Prefixes { prefixes: views.iter().map(info).collect() }))
    })
    .await
}

/// Keep a prefix in RAM
///
/// Everything from the first token of the prompt to the end of the branch; loaded from the disk if need be. All
/// pins together may hold half of the RAM tier.
#[utoipa::path(post, path = "/cache/pin", tag = "operator", request_body = PrefixRequest, responses(
    (status = 200, description = "It is pinned", body = PinAnswer),
    BodyErrors,
    OperatorErrors,
    (status = 404, description = "There is no such prefix", body = ErrorBody),
    (status = 409, description = "Parts of it were evicted, or pins would hold too much", body = ErrorBody),
))]
pub(super) async fn pin(
    _: Operator,
    State(state): State<AppState>,
    JsonBody(request): JsonBody<PrefixRequest>,
) -> Result<Json<PinAnswer>, ApiError> {
    let id = prefix_id(&request.prefix)?;
    let pinned_tokens = blocking(move || pin_prefix(&state, id)).await?;
    Ok(Json(PinAnswer { pinned_tokens }))
}

/// Let a pinned prefix be evicted again
#[utoipa::path(post, path = "/cache/unpin", tag = "operator", request_body = PrefixRequest, responses(
    (status = 200, description = "It is not pinned any more", body = UnpinAnswer),
    BodyErrors,
    OperatorErrors,
    (status = 404, description = "It was not pinned", body = ErrorBody),
))]
pub(super) async fn unpin(
    _: Operator,
    State(state): State<AppState>,
    JsonBody(request): JsonBody<PrefixRequest>,
) -> Result<Json<UnpinAnswer>, ApiError> {
    let id = prefix_id(&request.prefix)?;
    let observed = &state.shared.observed;
    let was_pinned = unpin_prefix(&state, id);
    observed.prefixes().set_pinned(id, false);
    if was_pinned { Ok(Json(UnpinAnswer {})) } else { Err(ApiError::NotFound(format!("pinned prefix {id}"))) }
}

/// Remove a branch and what is behind it
///
/// What it shares with other prompts, before it, stays. Pins on it are let go. Answers stored behind it can no
/// longer be found either.
#[utoipa::path(post, path = "/cache/remove", tag = "operator", request_body = PrefixRequest, responses(
    (status = 200, description = "It is removed", body = RemovedAnswer),
    BodyErrors,
    OperatorErrors,
    (status = 404, description = "There is no such prefix", body = ErrorBody),
))]
pub(super) async fn remove(
    _: Operator,
    State(state): State<AppState>,
    JsonBody(request): JsonBody<PrefixRequest>,
) -> Result<Json<RemovedAnswer>, ApiError> {
    let id = prefix_id(&request.prefix)?;
    blocking(move || remove_branch(&state, id)).await.map(Json)
}

/// Remove everything, or a namespace
#[utoipa::path(post, path = "/cache/clear", tag = "operator", request_body = ClearRequest, responses(
    (status = 200, description = "It is removed", body = RemovedAnswer),
    BodyErrors,
    OperatorErrors,
))]
pub(super) async fn clear(
    _: Operator,
    State(state): State<AppState>,
    JsonBody(request): JsonBody<ClearRequest>,
) -> Result<Json<RemovedAnswer>, ApiError> {
    let parsed = request.namespace.map(|text| text.parse::<NamespaceId>()).transpose();
    let namespace = parsed.map_err(|error| ApiError::invalid("namespace", error.to_string()))?;
    blocking(move || {
        let observed = &state.shared.observed;
        observed.prefixes().clear(namespace);
        // The leases of what is cleared end with it.
        let cache = &state.shared.cache;
        Ok(Json(namespace.map_or_else(|| cache.clear(), |id| cache.clear_namespace(id)).into()))
    })
    .await
}

/// Where the blocks of each path are, by the name of its last branch: asked for once for all branches
/// of a path.
fn residencies(state: &AppState, views: &[BranchView]) -> Result<HashMap<BlockHash, Arc<Residency>>, ApiError> {
    let (observed, cache) = (&state.shared.observed, &state.shared.cache);
    let inner: HashSet<BlockHash> = views.iter().filter_map(|view| view.parent).collect();
    let mut residencies = HashMap::new();
    for view in views.iter().rev() {
        if !inner.contains(&view.id) {
            // Another request may have had the branch forgotten meanwhile.
            let path = observed.prefixes().path(view.id);
            let residency = path.map(|path| cache.residency(&path.namespace, &path.tokens)).transpose();
            let residency = residency.map_err(|error| ApiError::internal(&error))?.unwrap_or_default();
            residencies.insert(view.id, Arc::new(residency));
        }
        if let (Some(residency), Some(parent)) = (residencies.get(&view.id).cloned(), view.parent) {
            residencies.insert(parent, residency);
        }
    }
    Ok(residencies)
}

fn info(state: &AppState, view: &BranchView, residencies: &HashMap<BlockHash, Arc<Residency>>) -> PrefixInfo {
    let residency = residencies.get(&view.id).cloned().unwrap_or_default();
    let block_tokens = state.shared.namespace.layout().block_tokens();
    let blocks = view.first_token / block_tokens..(view.first_token + view.tokens) / block_tokens;
    let in_tier = |name: &str| {
        let tokens = residency.tokens_in(name, blocks.clone()) as u64;
        TokensIn { name: name.to_owned(), tokens }
    };
    let text = state.shared.engine.tokenizer().decode(&view.begin);
    PrefixInfo {
        id: view.id.to_string(),
        parent: view.parent.map(|parent| parent.to_string()),
        namespace: view.namespace.to_string(),
        tenant: view.tenant.name().map(str::to_owned),
        first_token: view.first_token,
        tokens: view.tokens,
        requests: view.requests,
        last_used_seconds: view.last_used.elapsed().as_secs_f64(),
        tiers: residency.tiers().map(in_tier).collect(),
        cached_tokens: residency.tokens_anywhere(blocks.clone()),
        pinned: view.pinned,
        text: text.chars().take(TEXT_CHARS).collect(),
    }
}

/// Lets go of the lease that is owned by a prefix; says whether there was one.
fn unpin_prefix(state: &AppState, id: BlockHash) -> bool {
    let owner = id.to_string();
    state.shared.cache.store_handle().end_leases(|lease| lease.owner == owner) > 0
}

/// Pins a prefix by a lease that it owns; says how many tokens that are.
pub(super) fn pin_prefix(state: &AppState, id: BlockHash) -> Result<usize, ApiError> {
    let (observed, cache) = (&state.shared.observed, &state.shared.cache);
    let no_such = || ApiError::NotFound(format!("prefix {id}"));
    let Path { namespace, tokens, .. } = observed.prefixes().path(id).ok_or_else(no_such)?;
    let internal = |error: kvkeep::Error| ApiError::internal(&error);
    let (chain, leases, owner) =
        (Chain::of(&namespace, &tokens).map_err(internal)?, cache.store_handle(), id.to_string());
    let lease = leases.lease(&chain, owner.clone(), None).map_err(|error| match error {
        Error::LeasesFull { needed_bytes, limit_bytes } => ApiError::Conflict(format!(
            "pins would hold {needed_bytes} bytes, and may hold {limit_bytes}, half of RAM: unpin another prefix first"
        )),
        other => internal(other),
    })?;
    if lease.tokens < tokens.len() {
        leases.end_lease(lease.id);
        let (cached, all) = (lease.tokens, tokens.len());
        let message = format!("{} of {all} tokens of this prefix were evicted: warm it first", all - cached);
        return Err(ApiError::Conflict(message));
    }
    // Pinned twice is pinned once: the older one goes.
    leases.end_leases(|other| other.owner == owner && other.id < lease.id);
    if !observed.prefixes().set_pinned(id, true) {
        // It was removed meanwhile.
        leases.end_lease(lease.id);
        return Err(no_such());
    }
    Ok(lease.tokens)
}

fn remove_branch(state: &AppState, id: BlockHash) -> Result<RemovedAnswer, ApiError> {
    let (observed, cache) = (&state.shared.observed, &state.shared.cache);
    let first_token = observed.prefixes().path(id).map(|path| path.first_token);
    let first_token = first_token.ok_or_else(|| ApiError::NotFound(format!("prefix {id}")))?;
    let branches = observed.prefixes().subtree(id);
    let mut removed = RemovedAnswer::default();
    for branch in branches {
        unpin_prefix(state, branch);
        // From the root of what goes on, by each of its ends.
        let path = { Some(observed.prefixes()).filter(|tree| tree.is_leaf(branch)).and_then(|tree| tree.path(branch)) };
        if let Some(Path { namespace, tokens, .. }) = path {
            let gone = cache.remove_from(&namespace, &tokens, first_token);
            let gone = gone.map_err(|error| ApiError::internal(&error))?;
            removed.entries += gone.entries;
            removed.bytes += gone.bytes;
        }
    }
    observed.prefixes().remove(id);
    Ok(removed)
}

impl From<Removed> for RemovedAnswer {
    fn from(removed: Removed) -> Self {
        Self { entries: removed.entries, bytes: removed.bytes }
    }
}
