//! The load of many nodes, made of a trace that was recorded at one.
//!
//! Copies of the trace run side by side, each with users of its own: what a copy's sessions say is private to it, and the
//! beginnings that many sessions have in common are the same in all copies. Copy 0 is the trace itself.

use std::collections::{HashMap, HashSet};

use anyhow::{Context, Result};

use crate::replay::trace::Trace;

/// A prompt's beginning that goes on in so many ways is a system prompt, not somebody's session.
const COMMON_FROM_BRANCHES: usize = 32;
/// Sessions of copies begin up to so much later than in the trace, so that no two users act in step.
const LATER_MS: u64 = 60_000;
const ODD: u64 = 0x9e37_79b9_7f4a_7c15;

/// One request of one copy.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sent {
    pub(super) at_ms: u32,
    pub(super) copy: u16,
    pub(super) request: u32,
}

/// Requests in the order of their time.
#[derive(Debug)]
pub(super) struct Load<'t> {
    trace: &'t Trace,
    common: &'t HashSet<u64>,
    sessions: &'t [u64],
    pub(super) sent: Vec<Sent>,
}

/// What of a trace is common, and the session of each request.
#[derive(Debug)]
pub(super) struct Sessions {
    common: HashSet<u64>,
    of_request: Vec<u64>,
}

impl Sessions {
    /// A session is all requests with the same first block behind what is common.
    pub(super) fn of(trace: &Trace) -> Self {
        let mut branches: HashMap<u64, HashSet<u64>> = HashMap::new();
        for pair in trace.requests.iter().flat_map(|request| request.blocks.windows(2)) {
            if let [block, next] = pair {
                branches.entry(*block).or_default().insert(*next);
            }
        }
        let mut common = HashSet::new();
        for request in &trace.requests {
            let is_wide = |block: &u64| branches.get(block).is_some_and(|next| next.len() >= COMMON_FROM_BRANCHES);
            let end = request.blocks.iter().rposition(is_wide).map_or(0, |last| last + 1);
            common.extend(request.blocks.iter().take(end));
        }
        let session = |blocks: &Vec<u64>| {
            let first = blocks.iter().find(|block| !common.contains(*block));
            first.or(blocks.last()).copied().unwrap_or(0)
        };
        let of_request = trace.requests.iter().map(|request| session(&request.blocks)).collect();
        Self { common, of_request }
    }
}

impl<'t> Load<'t> {
    /// The first `requests` of the trace, so many times side by side; evenly at `rate` a second and copy, or as recorded.
    pub(super) fn new(
        trace: &'t Trace,
        sessions: &'t Sessions,
        copies: u16,
        requests: usize,
        rate: Option<f64>,
    ) -> Result<Self> {
        let mut sent = Vec::with_capacity(requests.min(trace.requests.len()) * usize::from(copies));
        for (number, request) in (0u32..).zip(trace.requests.iter().take(requests)) {
            let at_ms = rate
                .map(|rate| f64::from(number) * 1e3 / rate)
                .or(request.at_ms)
                .with_context(|| format!("{}: the trace has no timestamps: give --rate REQUESTS_PER_S", trace.name))?;
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "casts of floats stay in range"
            )]
            let at_ms = at_ms as u32;
            let session = sessions.of_request.get(number as usize).copied().unwrap_or(0);
            sent.extend((0..copies).map(|copy| {
                let later = if copy == 0 { 0 } else { mixed(copy, session) % LATER_MS };
                Sent { at_ms: at_ms.saturating_add(u32::try_from(later).unwrap_or(0)), copy, request: number }
            }));
        }
        sent.sort_by_key(|sent| (sent.at_ms, sent.request, sent.copy));
        Ok(Self { trace, common: &sessions.common, sessions: &sessions.of_request, sent })
    }

    /// From the first request to the last.
    pub(super) fn seconds(&self) -> f64 {
        let end = |sent: Option<&Sent>| sent.map_or(0.0, |sent| f64::from(sent.at_ms));
        ((end(self.sent.last()) - end(self.sent.first())) / 1e3).max(1.0)
    }

    /// The blocks of a request, into `blocks`.
    pub(super) fn blocks(&self, sent: Sent, blocks: &mut Vec<u64>) {
        blocks.clear();
        let own = u64::from(sent.copy).wrapping_mul(ODD);
        let Some(request) = self.trace.requests.get(sent.request as usize) else { return };
        blocks
            .extend(request.blocks.iter().map(|block| if self.common.contains(block) { *block } else { block ^ own }));
    }

    /// A number that the requests of one session share.
    pub(super) fn session(&self, sent: Sent) -> u64 {
        mixed(sent.copy, self.sessions.get(sent.request as usize).copied().unwrap_or(0))
    }
}

/// One number of two, of which the lower bits may be taken.
fn mixed(copy: u16, session: u64) -> u64 {
    let mut mixed = (session ^ u64::from(copy).wrapping_mul(ODD)).wrapping_add(1).wrapping_mul(ODD);
    mixed = (mixed ^ (mixed >> 32)).wrapping_mul(ODD);
    mixed ^ (mixed >> 32)
}
