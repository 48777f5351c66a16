//! What became of one request: the one source of metrics, of the list of recent requests and
//! of the tree of prefixes.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use kvkeep::{BlockHash, Chain, Namespace};
use serde::Serialize;
use utoipa::ToSchema;

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
    /// Tokens of the prompt whose KV was cached, by the name of the tier that gave it.
    pub(crate) tiers: Vec<(String, usize)>,
    pub(crate) completion_tokens: usize,
    /// From its arrival until a thread took it.
    pub(crate) queued: Duration,
    /// From its arrival to its first token, if it came to that.
    pub(crate) ttft: Option<Duration>,
    /// What `ttft` would have been if nothing had been cached.
    pub(crate) cold_ttft: Option<Duration>,
    /// Computing the part of the prompt that was not cached.
    pub(crate) prefill: Duration,
    /// From its arrival to its end.
    pub(crate) total: Duration,
    pub(crate) outcome: Outcome,
    /// The blocks of the prompt that the cache can hold, if it was asked.
    pub(crate) chain: Option<Chain>,
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

/// Tokens that a tier has, or gave.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct TokensIn {
    /// The tier's name.
    pub(crate) name: String,
    pub(crate) tokens: u64,
}

impl TokensIn {
    /// Adds up what each tier gave.
    pub(crate) fn sum<'a>(all: impl IntoIterator<Item = &'a (String, usize)>) -> Vec<Self> {
        let mut sums: Vec<Self> = Vec::new();
        for (name, tokens) in all {
            let tokens = *tokens as u64;
            match sums.iter_mut().find(|sum| sum.name == *name) {
                Some(sum) => sum.tokens += tokens,
                None => sums.push(Self { name: name.clone(), tokens }),
            }
        }
        sums
    }
}

impl Served {
    /// Tokens of the prompt whose KV was cached.
    pub(crate) fn cached_tokens(&self) -> usize {
        self.tiers.iter().map(|(_, tokens)| tokens).sum()
    }

    /// Tokens of the prompt that were computed: none if it did not come to that.
    pub(crate) fn computed_tokens(&self) -> usize {
        if self.was_read() { self.prompt.len().saturating_sub(self.cached_tokens()) } else { 0 }
    }

    /// What the cache can hold of the prompt: its last token is always computed.
    pub(crate) fn reusable(&self) -> &[u32] {
        self.prompt.split_last().map_or(&[], |(_, reusable)| reusable)
    }

    /// Names that in the tree of prefixes, if it has a full block.
    pub(crate) fn prefix(&self) -> Option<BlockHash> {
        self.hashes().pop()
    }

    /// The names of its full blocks.
    pub(crate) fn hashes(&self) -> Vec<BlockHash> {
        let hashed = self.chain.as_ref().map(|chain| chain.hashes().collect());
        hashed.unwrap_or_else(|| self.namespace.block_hashes(self.reusable()).unwrap_or_default())
    }

    /// Has the model read the prompt to its end?
    pub(crate) fn was_read(&self) -> bool {
        self.ttft.is_some()
    }

    /// Why an answer ended, as OpenAI's API says it.
    pub(crate) fn finish_reason(&self) -> &'static str {
        if self.outcome == Outcome::Length { "length" } else { "stop" }
    }
}

impl Endpoint {
    pub(crate) const ALL: [Self; 3] = [Self::Chat, Self::Completion, Self::Warm];

    /// What it is called in answers and metrics.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Completion => "completion",
            Self::Warm => "warm",
        }
    }
}

impl Outcome {
    pub(crate) const ALL: [Self; 5] = [Self::Stop, Self::Length, Self::Cancelled, Self::TimedOut, Self::Failed];

    /// What it is called in answers and metrics.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Cancelled => "cancelled",
            Self::TimedOut => "timed_out",
            Self::Failed => "failed",
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// An answer to a prompt of so many tokens, of which so many were cached.
    pub(crate) fn served(prompt_tokens: u32, ram_tokens: usize, disk_tokens: usize) -> Served {
        let layout = kvkeep::KvLayout::new(1, 1, 8, kvkeep::DType::F16).unwrap();
        Served {
            id: "chatcmpl-1".to_owned(),
            endpoint: Endpoint::Chat,
            tenant: Tenant::OPERATOR,
            namespace: Namespace::new("m", layout),
            arrived: SystemTime::now(),
            prompt: (0..prompt_tokens).collect(),
            tiers: vec![("ram".to_owned(), ram_tokens), ("disk".to_owned(), disk_tokens)],
            completion_tokens: 3,
            queued: Duration::from_millis(2),
            ttft: Some(Duration::from_millis(20)),
            cold_ttft: Some(Duration::from_millis(60)),
            prefill: Duration::from_millis(10),
            total: Duration::from_millis(50),
            outcome: Outcome::Stop,
            chain: None,
        }
    }

    #[test]
    fn what_was_not_read_was_not_computed() {
        assert_eq!(served(32, 16, 5).computed_tokens(), 11);
        let cancelled = Served { ttft: None, ..served(32, 16, 5) };
        assert_eq!((cancelled.computed_tokens(), cancelled.was_read()), (0, false));
    }
}
