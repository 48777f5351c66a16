//! The last requests, as an operator sees them: a ring. Prompts are not kept, only their sizes.

use std::collections::VecDeque;
use std::time::{Duration, SystemTime};

use crate::auth::Tenant;
use crate::served::{Endpoint, Outcome, Served, TokensIn};

/// Requests that are kept.
const KEPT: usize = 500;

/// The last requests that have ended, in the order in which they did.
#[derive(Debug, Default)]
pub(crate) struct Recent {
    ring: VecDeque<Ended>,
    last_seq: u64,
}

/// A request that has ended, without its prompt.
#[derive(Debug, Clone)]
pub(crate) struct Ended {
    /// 1 for the first since the start.
    pub(crate) seq: u64,
    pub(crate) id: String,
    pub(crate) endpoint: Endpoint,
    pub(crate) tenant: Tenant,
    pub(crate) at: SystemTime,
    pub(crate) prompt_tokens: usize,
    pub(crate) tiers: Vec<TokensIn>,
    pub(crate) cached_tokens: usize,
    pub(crate) computed_tokens: usize,
    pub(crate) completion_tokens: usize,
    pub(crate) queued: Duration,
    pub(crate) ttft: Option<Duration>,
    pub(crate) cold_ttft: Option<Duration>,
    pub(crate) total: Duration,
    pub(crate) outcome: Outcome,
}

/// Times to the first token.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Times {
    pub(crate) count: usize,
    pub(crate) p50: Option<Duration>,
    pub(crate) p99: Option<Duration>,
}

impl Recent {
    pub(crate) fn push(&mut self, served: &Served) {
        self.last_seq += 1;
        if self.ring.len() == KEPT {
            self.ring.pop_front();
        }
        self.ring.push_back(Ended {
            seq: self.last_seq,
            id: served.id.clone(),
            endpoint: served.endpoint,
            tenant: served.tenant.clone(),
            at: served.arrived + served.total,
            prompt_tokens: served.prompt.len(),
            tiers: TokensIn::sum(&served.tiers),
            cached_tokens: served.cached_tokens(),
            computed_tokens: served.computed_tokens(),
            completion_tokens: served.completion_tokens,
            queued: served.queued,
            ttft: served.ttft,
            cold_ttft: served.cold_ttft,
            total: served.total,
            outcome: served.outcome,
        });
    }

    /// The newest `limit` of those behind `after`, the newest last.
    pub(crate) fn after(&self, after: u64, limit: usize) -> Vec<Ended> {
        let newer = self.ring.iter().filter(|ended| ended.seq > after).count();
        let skipped = self.ring.len() - newer.min(limit);
        self.ring.iter().skip(skipped).cloned().collect()
    }

    /// Times to the first token of answers whose prompt was mostly cached, or was not.
    pub(crate) fn ttft(&self, warm: bool) -> Times {
        let answers = self.ring.iter().filter(|ended| ended.endpoint != Endpoint::Warm && ended.is_warm() == warm);
        let mut times: Vec<Duration> = answers.filter_map(|ended| ended.ttft).collect();
        times.sort_unstable();
        let rank = |percent: usize| times.get((times.len() * percent).div_ceil(100).max(1) - 1).copied();
        Times { count: times.len(), p50: rank(50), p99: rank(99) }
    }

    /// All first tokens of answers together: what they took, and what they would have taken without the
    /// cache. Medians of cold and of warm answers say less: their prompts are not alike.
    pub(crate) fn first_tokens(&self) -> (Duration, Duration) {
        let answers = self.ring.iter().filter(|ended| ended.endpoint != Endpoint::Warm);
        let both = answers.filter_map(|ended| Some((ended.ttft?, ended.cold_ttft?)));
        both.fold((Duration::ZERO, Duration::ZERO), |sums, (took, cold)| (sums.0 + took, sums.1 + cold))
    }
}

impl Ended {
    fn is_warm(&self) -> bool {
        is_warm(self.cached_tokens, self.prompt_tokens)
    }
}

/// Was at least half of a prompt cached?
pub(crate) fn is_warm(cached_tokens: usize, prompt_tokens: usize) -> bool {
    cached_tokens * 2 >= prompt_tokens
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::served::tests::served;

    #[test]
    fn it_keeps_the_last_requests_and_gives_the_newest_of_those_behind_a_number() {
        let mut recent = Recent::default();
        for _ in 0..KEPT + 10 {
            recent.push(&served(32, 0, 0));
        }
        let seqs = |after, limit| recent.after(after, limit).iter().map(|ended| ended.seq).collect::<Vec<_>>();
        assert_eq!(recent.ring.len(), KEPT);
        assert_eq!(seqs(0, 3), [508, 509, 510]);
        assert_eq!(seqs(508, 10), [509, 510]);
        assert_eq!(seqs(510, 10), [0; 0]);
        assert_eq!(seqs(u64::MAX, 10), [0; 0]);
        assert_eq!(seqs(0, 10_000).len(), KEPT);
        assert_eq!(seqs(0, 0), [0; 0]);
    }

    #[test]
    fn times_are_those_of_answers_cold_and_warm_apart() {
        let mut recent = Recent::default();
        assert_eq!(recent.ttft(true), Times::default());
        for ms in 1..=100 {
            recent.push(&Served { ttft: Some(Duration::from_millis(ms)), ..served(32, 8, 7) });
            recent.push(&Served { ttft: Some(Duration::from_millis(ms * 2)), ..served(32, 8, 8) });
        }
        recent.push(&Served { endpoint: Endpoint::Warm, ttft: Some(Duration::from_secs(9)), ..served(32, 0, 0) });
        recent.push(&Served { ttft: None, cold_ttft: None, ..served(32, 0, 0) });
        let of = |p50, p99| Times {
            count: 100,
            p50: Some(Duration::from_millis(p50)),
            p99: Some(Duration::from_millis(p99)),
        };
        assert_eq!(recent.ttft(false), of(50, 99));
        assert_eq!(recent.ttft(true), of(100, 198));
    }

    /// Medians of cold and warm answers were compared though their prompts were not alike: "0.2 times sooner", and
    /// nothing at all after a restart, when no answer is cold.
    #[test]
    fn what_first_tokens_took_is_compared_with_what_the_same_ones_would_have_taken_cold() {
        let mut recent = Recent::default();
        assert_eq!(recent.first_tokens(), (Duration::ZERO, Duration::ZERO));
        let mut push = |ttft, cold| {
            let (ttft, cold_ttft) = (Some(Duration::from_millis(ttft)), Some(Duration::from_millis(cold)));
            recent.push(&Served { ttft, cold_ttft, ..served(32, 16, 8) });
        };
        push(100, 900);
        push(50, 50);
        recent.push(&Served { endpoint: Endpoint::Warm, ..served(32, 0, 0) });
        recent.push(&Served { ttft: None, cold_ttft: None, ..served(32, 0, 0) });
        assert_eq!(recent.first_tokens(), (Duration::from_millis(150), Duration::from_millis(950)));
    }
}
