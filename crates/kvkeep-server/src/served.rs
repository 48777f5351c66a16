//! What became of one request: the one source of metrics, of the list of recent requests and
//! of the tree of prefixes.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use kvkeep::Namespace;

use crate::auth::Tenant;

/// A request that has ended.
#[derive(Debug, Clone)]
pub(crate) struct Served {
    /// As the answer names it: `chatcmpl-...`, `cmpl-...`, `warm-...`.
    pub(crate) id: String,
    pub(crate) endpoint: Endpoint,
    pub(crate) tenant: Tenant,
    pub(crate) namespace: Namespace,
    pub(crate) arrived: SystemTime,
    pub(crate) prompt: Arc<[u32]>,
    /// Tokens of the prompt whose KV was in RAM.
    pub(crate) ram_tokens: usize,
    /// Tokens behind those whose KV was loaded from the disk.
    pub(crate) disk_tokens: usize,
    pub(crate) completion_tokens: usize,
    /// From its arrival until a thread took it.
    pub(crate) queued: Duration,
    /// From its arrival to its first token, if it came to that.
    pub(crate) ttft: Option<Duration>,
    /// Computing the part of the prompt that was not cached.
    pub(crate) prefill: Duration,
    /// From its arrival to its end.
    pub(crate) total: Duration,
    pub(crate) outcome: Outcome,
}

impl Served {
    /// Why an answer ended, as OpenAI's API says it.
    pub(crate) fn finish_reason(&self) -> &'static str {
        if self.outcome == Outcome::Length { "length" } else { "stop" }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Endpoint {
    Chat,
    Completion,
    Warm,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Outcome {
    /// The model ended the answer, or a stop sequence did.
    Stop,
    /// The most tokens that were asked for, or that fit, were answered.
    Length,
    /// The client went away.
    Cancelled,
    /// It took too long.
    TimedOut,
    /// The server could not answer.
    Failed,
}
