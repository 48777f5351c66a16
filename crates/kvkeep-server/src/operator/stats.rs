//! What the cache and the server are like now, and what became of the last requests.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use axum::Json;
use axum::extract::State;
use kvkeep::{NamespaceId, NamespaceUsage, TierStats, Usage};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{Params, limit};
use crate::auth::{ApiKeys, Tenant};
use crate::describe::OperatorErrors;
use crate::error::{ApiError, ErrorBody};
use crate::recent::{Ended, Times};
use crate::served::{Outcome, TokensIn};
use crate::state::{AppState, Operator};

/// The server and its cache as of now.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct CacheStats {
    model: String,
    uptime_seconds: f64,
    /// Tokens of a block: what a prompt has cached is a multiple of it.
    block_tokens: u32,
    /// The most tokens of a prompt and its answer together.
    context_tokens: usize,
    tokens: Tokens,
    /// Of the tokens asked for, those that did not have to be computed: from 0 to 1.
    token_hit_rate: f64,
    /// What computing took when it was stored, of everything that was found.
    prefill_seconds_saved: f64,
    ttft_ms: Ttft,
    ram: Ram,
    /// The tiers behind RAM, in the order in which they are asked.
    tiers: Vec<TierInfo>,
    requests: Requests,
}

/// Tokens of prompts since the start, by what gave their KV. Prompts that were not read, such as those of
/// requests that were cancelled in the queue, are not counted.
#[derive(Debug, Serialize, ToSchema)]
struct Tokens {
    /// All of them.
    requested: u64,
    /// Those whose KV was cached: all tiers, `ram` first.
    tiers: Vec<TokensIn>,
    computed: u64,
}

/// Times to the first token of the last requests.
#[derive(Debug, Serialize, ToSchema)]
struct Ttft {
    /// Less than half of the prompt was cached.
    cold: TimesMs,
    /// At least half of it was.
    warm: TimesMs,
    /// All first tokens together.
    total: f64,
    /// What the same ones would have taken if nothing had been cached: by what computing took, when it was
    /// stored, of all that was found.
    total_if_cold: f64,
}

/// Milliseconds; null if there were none.
#[derive(Debug, Serialize, ToSchema)]
struct TimesMs {
    count: usize,
    p50: Option<f64>,
    p99: Option<f64>,
}

#[derive(Debug, Serialize, ToSchema)]
struct Ram {
    used_bytes: u64,
    capacity_bytes: u64,
    /// Cannot be evicted now: in use, pinned, or being written.
    held_bytes: u64,
    entries: u64,
    evictions: u64,
    /// Tokens of pinned prefixes.
    pinned_tokens: usize,
}

/// A tier behind RAM.
#[derive(Debug, Serialize, ToSchema)]
struct TierInfo {
    /// `disk`.
    name: String,
    used_bytes: u64,
    capacity_bytes: u64,
    entries: u64,
    evictions: u64,
    /// Waits to be written.
    queued_bytes: u64,
    /// Does it fail now? Then it is tried again, ever more seldom.
    failing: bool,
    /// Records that were not what they should be: each was a miss.
    damaged: u64,
    /// As measured; 0 before the first load.
    load_bytes_per_s: u64,
    /// Is what lies there encrypted?
    encrypted: bool,
    /// Writes what goes there.
    codec: String,
    /// How many times as long what was written was before its codec.
    codec_ratio: f64,
    /// Bytes that codecs have spared so far.
    saved_bytes: u64,
}

#[derive(Debug, Serialize, ToSchema)]
struct Requests {
    running: usize,
    queued: usize,
    /// Answered at once, at most.
    parallel: usize,
    /// Wait, at most.
    queue: usize,
    /// Answered to their end.
    served: u64,
    cancelled: u64,
    /// Sent away because the queue was full.
    rejected: u64,
    /// The server could not answer, or not in time.
    failed: u64,
}

/// What each namespace takes.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Namespaces {
    namespaces: Vec<NamespaceInfo>,
}

#[derive(Debug, Serialize, ToSchema)]
struct NamespaceInfo {
    #[schema(pattern = "^[0-9a-f]{64}$")]
    id: String,
    /// Whose it is; null is the operator's, or that of a namespace that is not known.
    tenant: Option<String>,
    /// Does a request have to bring a `cache_salt` to see it?
    cache_salt: bool,
    /// False: it is in the cache, and no request in it was seen since the start, or not lately.
    known: bool,
    /// `ram` first, then those behind it.
    tiers: Vec<TierUsage>,
}

#[derive(Debug, Serialize, ToSchema)]
struct TierUsage {
    name: String,
    entries: u64,
    bytes: u64,
}

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct RequestsParams {
    /// Only those with a higher `seq`
    #[param(minimum = 0)]
    after: Option<i64>,
    /// The newest of them, at most so many
    #[param(minimum = 1, maximum = 500, default = 50)]
    limit: Option<usize>,
}

/// The last requests, the newest last.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct RecentRequests {
    requests: Vec<RequestInfo>,
}

#[derive(Debug, Serialize, ToSchema)]
struct RequestInfo {
    /// 1 for the first since the start.
    seq: u64,
    /// As the answer names it.
    id: String,
    /// Since its end.
    seconds_ago: f64,
    /// Null is the operator.
    tenant: Option<String>,
    /// `chat`, `completion`, or `warm`.
    endpoint: &'static str,
    prompt_tokens: usize,
    /// Those whose KV was cached, by the tier that gave it.
    tiers: Vec<TokensIn>,
    cached_tokens: usize,
    computed_tokens: usize,
    completion_tokens: usize,
    queued_ms: f64,
    ttft_ms: Option<f64>,
    /// What `ttft_ms` would have been if nothing had been cached.
    ttft_if_cold_ms: Option<f64>,
    total_ms: f64,
    /// `stop`, `length`, `cancelled`, `timed_out`, or `failed`.
    outcome: &'static str,
}

/// The server and its cache as of now
#[utoipa::path(get, path = "/cache/stats", tag = "operator", responses(
    (status = 200, description = "As of now", body = CacheStats),
    OperatorErrors,
))]
pub(super) async fn stats(_: Operator, State(state): State<AppState>) -> Json<CacheStats> {
    let shared = &state.shared;
    let (observed, stats) = (&shared.observed, shared.cache.stats());
    let tokens = observed.metrics.tokens();
    let (cold, warm, (total, total_if_cold)) = {
        let recent = observed.recent();
        (recent.ttft(false), recent.ttft(true), recent.first_tokens())
    };
    let load = shared.scheduler.load();
    let ended = |outcomes: &[Outcome]| observed.metrics.requests(outcomes);
    Json(CacheStats {
        model: shared.model.clone(),
        uptime_seconds: shared.started.elapsed().as_secs_f64(),
        block_tokens: shared.config.block_tokens,
        context_tokens: shared.config.context_tokens,
        token_hit_rate: ratio(tokens.cached(), tokens.requested()),
        tokens: Tokens { requested: tokens.requested(), tiers: tokens.tiers, computed: tokens.computed },
        prefill_seconds_saved: stats.time_saved.as_secs_f64(),
        ttft_ms: Ttft { cold: cold.into(), warm: warm.into(), total: ms(total), total_if_cold: ms(total_if_cold) },
        ram: Ram {
            used_bytes: stats.used_bytes,
            capacity_bytes: stats.capacity_bytes,
            held_bytes: stats.held_bytes,
            entries: stats.entries,
            evictions: stats.evictions,
            pinned_tokens: shared.cache.store_handle().leased().tokens,
        },
        tiers: stats.tiers.iter().map(TierInfo::from).collect(),
        requests: Requests {
            running: load.running,
            queued: load.queued,
            parallel: shared.config.parallel,
            queue: shared.config.queue,
            served: ended(&[Outcome::Stop, Outcome::Length]),
            cancelled: ended(&[Outcome::Cancelled]),
            rejected: load.rejected,
            failed: ended(&[Outcome::Failed, Outcome::TimedOut]),
        },
    })
}

/// What each namespace takes of each tier
#[utoipa::path(get, path = "/cache/namespaces", tag = "operator", responses(
    (status = 200, description = "As of now", body = Namespaces),
    OperatorErrors,
))]
pub(super) async fn namespaces(_: Operator, State(state): State<AppState>) -> Json<Namespaces> {
    let names = names(&state);
    let tier = |(name, of): (String, Usage)| TierUsage { name, entries: of.entries, bytes: of.bytes };
    let info = |usage: NamespaceUsage| {
        let name = names.get(&usage.id);
        NamespaceInfo {
            id: usage.id.to_string(),
            tenant: name.and_then(|(tenant, _)| tenant.name().map(str::to_owned)),
            cache_salt: name.is_some_and(|(_, salted)| *salted),
            known: name.is_some(),
            tiers: usage.tiers.into_iter().map(tier).collect(),
        }
    };
    let usage = state.shared.cache.store_handle().usage();
    Json(Namespaces { namespaces: usage.into_iter().map(info).collect() })
}

/// What became of the last requests
#[utoipa::path(get, path = "/cache/requests", tag = "operator", params(RequestsParams), responses(
    (status = 200, description = "The newest last", body = RecentRequests),
    (status = 400, description = "A parameter is wrong", body = ErrorBody),
    OperatorErrors,
))]
pub(super) async fn requests(
    _: Operator,
    State(state): State<AppState>,
    Params(params): Params<RequestsParams>,
) -> Result<Json<RecentRequests>, ApiError> {
    let limit = limit(params.limit, 50, 500)?;
    let after = u64::try_from(params.after.unwrap_or(0));
    let after = after.map_err(|_| ApiError::invalid("after", "after must not be negative"))?;
    let ended = state.shared.observed.recent().after(after, limit);
    Ok(Json(RecentRequests { requests: ended.into_iter().map(RequestInfo::from).collect() }))
}

/// Namespaces whose tenant is known, and whether they have a salt: those of all keys, and those in
/// which requests were seen.
fn names(state: &AppState) -> HashMap<NamespaceId, (Tenant, bool)> {
    let shared = &state.shared;
    let with_keys = shared.config.api_keys.iter().flat_map(ApiKeys::tenants);
    let tenants = std::iter::once(&Tenant::OPERATOR).chain(with_keys);
    let plain = |tenant: &Tenant| tenant.namespace(&shared.namespace, None).id();
    let mut names: HashMap<_, _> = tenants.map(|tenant| (plain(tenant), (tenant.clone(), false))).collect();
    for root in shared.observed.prefixes().roots() {
        let salted = plain(&root.tenant) != root.namespace.id();
        names.insert(root.namespace.id(), (root.tenant.clone(), salted));
    }
    names
}

impl From<&TierStats> for TierInfo {
    fn from(tier: &TierStats) -> Self {
        Self {
            name: tier.name.clone(),
            used_bytes: tier.used_bytes,
            capacity_bytes: tier.capacity_bytes,
            entries: tier.entries,
            evictions: tier.evictions,
            queued_bytes: tier.queued_bytes,
            failing: tier.failing,
            damaged: tier.damaged_total,
            load_bytes_per_s: tier.load_bytes_per_s,
            encrypted: tier.encrypted,
            codec: tier.codec.to_owned(),
            codec_ratio: tier.codec_ratio(),
            saved_bytes: tier.saved_bytes_total(),
        }
    }
}

impl From<Times> for TimesMs {
    fn from(times: Times) -> Self {
        Self { count: times.count, p50: times.p50.map(ms), p99: times.p99.map(ms) }
    }
}

impl From<Ended> for RequestInfo {
    fn from(ended: Ended) -> Self {
        Self {
            seq: ended.seq,
            seconds_ago: SystemTime::now().duration_since(ended.at).unwrap_or_default().as_secs_f64(),
            id: ended.id,
            tenant: ended.tenant.name().map(str::to_owned),
            endpoint: ended.endpoint.name(),
            prompt_tokens: ended.prompt_tokens,
            tiers: ended.tiers,
            cached_tokens: ended.cached_tokens,
            computed_tokens: ended.computed_tokens,
            completion_tokens: ended.completion_tokens,
            queued_ms: ms(ended.queued),
            ttft_ms: ended.ttft.map(ms),
            ttft_if_cold_ms: ended.cold_ttft.map(ms),
            total_ms: ms(ended.total),
            outcome: ended.outcome.name(),
        }
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

#[expect(clippy::cast_precision_loss, reason = "for people to read")]
fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}
