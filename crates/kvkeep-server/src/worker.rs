//! A thread that answers: takes jobs one after the other and streams what the model says.

use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvkeep_engine::{EngineError, FinishReason, Generation, Generator, Logits};

use crate::error::{ApiError, ServerError};
use crate::scheduler::{Event, Job, Piece, Taken, TokenLogprob};
use crate::served::{Endpoint, Outcome, Served};
use crate::state::AppState;
use crate::stops::Stops;

/// The threads of a server. They end when the scheduler is closed, which dropping this does too.
#[derive(Debug)]
pub(crate) struct Workers {
    threads: Vec<JoinHandle<()>>,
    state: AppState,
}

impl Workers {
    pub(crate) fn start(state: &AppState) -> Result<Self, ServerError> {
        let mut workers = Self { threads: Vec::new(), state: state.clone() };
        for number in 0..state.shared.config.parallel {
            let (generator, state) = (generator(state)?, state.clone());
            let thread = std::thread::Builder::new().name(format!("answer-{number}"));
            workers.threads.push(thread.spawn(move || work(&state, generator)).map_err(ServerError::Threads)?);
        }
        Ok(workers)
    }

    /// Waits until all have ended.
    pub(crate) fn join(mut self) {
        self.state.shared.scheduler.close();
        for thread in self.threads.drain(..) {
            // A panic was reported when it happened.
            drop(thread.join());
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.state.shared.scheduler.close();
    }
}

fn generator(state: &AppState) -> Result<Generator, EngineError> {
    let shared = &state.shared;
    Generator::new(&shared.engine, shared.config.context_tokens, shared.namespace.clone())
}

fn work(state: &AppState, mut generator: Generator) {
    while let Some(taken) = state.shared.scheduler.take() {
        let begin = Instant::now();
        let number = taken.number();
        let answered = catch_unwind(AssertUnwindSafe(|| answer(state, &mut generator, &taken)));
        let (served, result) = answered.unwrap_or_else(|_| {
            let mut served = taken.job.unanswered(state.shared.config.request_timeout);
            served.outcome = Outcome::Failed;
            // Its KV buffer may have gone down with it.
            if let Ok(another) = self::generator(state) {
                generator = another;
            }
            (served, Some(ApiError::Internal("an answer panicked, see the server's log".to_owned())))
        });
        state.shared.scheduler.done(number, begin.elapsed());
        state.observe(&served);
        taken.tell(Event::End(result.map_or(Ok(Box::new(served)), Err)));
    }
}

fn answer(state: &AppState, generator: &mut Generator, taken: &Taken) -> (Served, Option<ApiError>) {
    let shared = &state.shared;
    let job = &taken.job;
    let queued = job.arrived.since.elapsed();
    let mut stops = Stops::new(job.stop.clone());
    let (mut seen, mut first) = (0, true);
    let mut on_step = |token: u32, text: &str, logits: &Logits| {
        seen += text.len();
        let logprobs = job.top_logprobs.map(|top| logprob(token, logits, top)).into_iter().collect();
        let piece = Piece { text: stops.push(text), logprobs };
        if std::mem::take(&mut first) || !piece.text.is_empty() || !piece.logprobs.is_empty() {
            taken.tell(Event::Piece(piece));
        }
        if stops.found() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let generated = generator.set_namespace(job.namespace.clone()).and_then(|()| {
        generator.generate(&job.prompt, Some(&shared.cache), &job.options, &mut |step| {
            on_step(step.token, step.text, step.logits)
        })
    });
    match generated {
        Ok(generation) => {
            let rest = stops.push(generation.text.get(seen..).unwrap_or_default()) + &stops.finish();
            if !rest.is_empty() {
                taken.tell(Event::Piece(Piece { text: rest, logprobs: Vec::new() }));
            }
            let served = served(job, &generation, queued, stops.found(), shared.config.request_timeout);
            let error = match served.outcome {
                Outcome::TimedOut => Some(ApiError::Timeout),
                Outcome::Cancelled => Some(ApiError::ShuttingDown),
                _ => None,
            };
            (served, error)
        }
        Err(error) => {
            let mut served = job.unanswered(shared.config.request_timeout);
            (served.queued, served.outcome) = (queued, Outcome::Failed);
            (served, Some(error.into()))
        }
    }
}

fn served(job: &Job, generation: &Generation, queued: Duration, stopped: bool, timeout: Duration) -> Served {
    let total = job.arrived.since.elapsed();
    let outcome = match generation.finish {
        FinishReason::Stop => Outcome::Stop,
        FinishReason::Cancelled if stopped => Outcome::Stop,
        FinishReason::Cancelled if total >= timeout => Outcome::TimedOut,
        FinishReason::Cancelled => Outcome::Cancelled,
        _ => Outcome::Length,
    };
    let answered = generation.finish == FinishReason::Stop || !generation.tokens.is_empty();
    Served {
        tiers: generation.tiers.clone(),
        // A prompt that is only warmed gets no answer.
        completion_tokens: if job.endpoint == Endpoint::Warm { 0 } else { generation.tokens.len() },
        queued,
        ttft: answered.then_some(queued + generation.ttft),
        cold_ttft: answered.then_some(queued + generation.cold_ttft),
        prefill: generation.prefill,
        total,
        outcome,
        chain: generation.chain.clone(),
        ..job.unanswered(timeout)
    }
}

/// The log probability of the token that was picked, and of the likeliest ones.
fn logprob(token: u32, logits: &Logits, top: usize) -> TokenLogprob {
    let logits = logits.as_slice();
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - max).exp()).sum();
    #[expect(clippy::cast_possible_truncation, reason = "a log of a sum of at most 2^32 terms up to 1")]
    let log_sum = max + sum.ln() as f32;
    let mut likeliest: Vec<(u32, f32)> = Vec::with_capacity(top + 1);
    for (token, logit) in (0u32..).zip(logits) {
        if likeliest.len() < top || likeliest.last().is_some_and(|last| *logit > last.1) {
            let at = likeliest.partition_point(|other| other.1 >= *logit);
            likeliest.insert(at, (token, *logit));
            likeliest.truncate(top);
        }
    }
    likeliest.iter_mut().for_each(|(_, logit)| *logit -= log_sum);
    let logprob = logits.get(token as usize).map_or(f32::NEG_INFINITY, |logit| logit - log_sum);
    TokenLogprob { token, logprob, top: likeliest }
}
