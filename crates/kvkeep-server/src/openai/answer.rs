//! Answers as clients read them: whole, or as a stream of events.
//!
//! A stream waits a little for its first token, so that whatever goes wrong until then has a
//! status of its own. Then its headers go out, and a comment whenever nothing else has for a
//! while: proxies give up on a server that says nothing, a usual one after a minute. Sending
//! nothing before the first token was the alternative, and long prompts behind nginx failed.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::{Duration, UNIX_EPOCH};

use axum::Json;
use axum::http::header::{CACHE_CONTROL, HeaderName, HeaderValue};
use axum::response::sse::{Event as Message, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use kvkeep_engine::Engine;
use serde::Serialize;
use utoipa::ToSchema;

use super::params::{PromptDetails, StreamOptions, Usage};
use crate::error::ApiError;
use crate::scheduler::{Arrived, Event, Job, Piece, Ticket};
use crate::served::{Served, TokensIn};
use crate::state::AppState;

const TTFT_HEADER: HeaderName = HeaderName::from_static("x-kvkeep-ttft-ms");
/// Tells nginx to pass events on as they come.
const BUFFERING_HEADER: HeaderName = HeaderName::from_static("x-accel-buffering");
/// A stream in which nothing happens says so this often.
const PING: Duration = Duration::from_secs(10);

/// How an endpoint writes one answer of the model.
pub(super) trait Shape: Send + Sync + 'static {
    type Whole: Serialize;
    type Part: Serialize;
    const WHOLE: &str;
    const PART: &str;

    /// Before the first piece.
    fn begin(&self) -> Option<Self::Part>;
    fn part(&mut self, piece: Piece, engine: &Engine) -> Self::Part;
    fn end(&self, reason: &'static str) -> Self::Part;
    fn whole(&mut self, all: Piece, reason: &'static str, engine: &Engine) -> Self::Whole;
}

/// What is asked for: answers, and how they are written.
pub(super) struct Question<S> {
    /// As the answer names it.
    pub(super) id: String,
    /// What the model was called.
    pub(super) model: String,
    /// A job and the shape of its answer, for each answer: those to one prompt stand together.
    pub(super) answers: Vec<(Job, S)>,
    /// Answers to each prompt.
    pub(super) n: usize,
    pub(super) stream: Option<StreamOptions>,
}

/// An answer, or one event of it.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Answer<C> {
    id: String,
    object: &'static str,
    /// Seconds since 1970.
    created: u64,
    model: String,
    /// Names the model file.
    system_fingerprint: String,
    choices: Vec<C>,
    usage: Option<Usage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kvkeep: Option<Warmth>,
}

/// What the cache did for an answer.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct Warmth {
    /// From the request's arrival to its first token.
    ttft_ms: Option<f64>,
    /// Tokens of the prompt whose KV was cached, by the tier that gave it: `ram`, `disk`, and others by their names.
    tiers: Vec<TokensIn>,
}

/// What all events of an answer have in common.
#[derive(Debug, Clone)]
struct Head {
    id: String,
    created: u64,
    model: String,
    system_fingerprint: String,
}

/// A stream that is being sent.
struct Stream<S> {
    /// `None` after the end.
    ticket: Option<Ticket>,
    ready: VecDeque<Message>,
    head: Head,
    shapes: Vec<S>,
    ended: Ended,
    include_usage: bool,
    /// Has the first event come?
    begun: bool,
    state: AppState,
}

/// What became of the jobs of a request, as far as they have ended.
struct Ended {
    served: Vec<Option<Box<Served>>>,
    /// Answers to each prompt.
    n: usize,
}

impl Head {
    fn answer<C>(&self, object: &'static str, choices: Vec<C>) -> Answer<C> {
        let Self { id, created, model, system_fingerprint } = self.clone();
        Answer { id, object, created, model, system_fingerprint, choices, usage: None, kvkeep: None }
    }
}

impl<C> Answer<C> {
    fn took(mut self, ended: &Ended) -> Self {
        (self.usage, self.kvkeep) = (Some(ended.usage()), Some(ended.warmth()));
        self
    }
}

impl Ended {
    fn new(jobs: usize, n: usize) -> Self {
        Self { served: (0..jobs).map(|_| None).collect(), n: n.max(1) }
    }

    fn push(&mut self, place: usize, served: Box<Served>) {
        if let Some(slot) = self.served.get_mut(place) {
            *slot = Some(served);
        }
    }

    fn is_all(&self) -> bool {
        self.served.iter().all(Option::is_some)
    }

    /// Of each prompt the answer that found least: the others found what that one had read.
    fn coldest(&self) -> impl Iterator<Item = &Served> {
        let cached = |served: &&Served| served.cached_tokens();
        self.served.chunks(self.n).filter_map(move |same| same.iter().flatten().map(Box::as_ref).min_by_key(cached))
    }

    fn usage(&self) -> Usage {
        let prompt_tokens = self.coldest().map(|served| served.prompt.len()).sum();
        let completion_tokens = self.served.iter().flatten().map(|served| served.completion_tokens).sum();
        let cached_tokens = self.coldest().map(Served::cached_tokens).sum();
        Usage {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: PromptDetails { cached_tokens },
        }
    }

    fn warmth(&self) -> Warmth {
        Warmth { ttft_ms: self.ttft().map(ms), tiers: TokensIn::sum(self.coldest().flat_map(|served| &served.tiers)) }
    }

    /// From the request's arrival to the first token of any answer.
    fn ttft(&self) -> Option<Duration> {
        self.served.iter().flatten().filter_map(|served| served.ttft).min()
    }
}

/// Has the jobs of a request answered.
pub(super) async fn answer<S: Shape>(state: AppState, question: Question<S>) -> Result<Response, ApiError> {
    let Question { id, model, answers, n, stream } = question;
    let (jobs, shapes): (Vec<Job>, Vec<S>) = answers.into_iter().unzip();
    let arrived = jobs.first().map_or_else(Arrived::now, |job| job.arrived);
    let head = Head {
        id,
        created: arrived.at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
        model,
        system_fingerprint: format!("fp_{}", state.shared.engine.revision().get(..12).unwrap_or_default()),
    };
    let ended = Ended::new(jobs.len(), n);
    let ticket = state.submit(jobs)?;
    match stream {
        Some(options) => {
            let include_usage = options.include_usage.unwrap_or_default();
            let (ticket, ready) = (Some(ticket), VecDeque::new());
            let stream = Stream { ticket, ready, head, shapes, ended, include_usage, begun: false, state };
            stream.response(arrived).await
        }
        None => whole(&state, ticket, &head, shapes, ended).await,
    }
}

async fn whole<S: Shape>(
    state: &AppState,
    mut ticket: Ticket,
    head: &Head,
    shapes: Vec<S>,
    mut ended: Ended,
) -> Result<Response, ApiError> {
    let mut all: Vec<(S, Piece)> = shapes.into_iter().map(|shape| (shape, Piece::default())).collect();
    while !ended.is_all() {
        match ticket.next().await {
            (place, Event::Piece(piece)) => {
                if let Some((_, all)) = all.get_mut(place) {
                    all.text.push_str(&piece.text);
                    all.logprobs.extend(piece.logprobs);
                }
            }
            (place, Event::End(end)) => ended.push(place, end?),
        }
    }
    let reasons = ended.served.iter().flatten().map(|served| served.finish_reason());
    let choices = all
        .into_iter()
        .zip(reasons)
        .map(|((mut shape, all), reason)| shape.whole(all, reason, &state.shared.engine))
        .collect();
    let body = Json(head.answer(S::WHOLE, choices).took(&ended)).into_response();
    Ok(match ended.ttft() {
        Some(ttft) => with_ttft(body, ms(ttft)),
        None => body,
    })
}

impl<S: Shape> Stream<S> {
    /// Its headers, as soon as it is clear or late enough that it has some.
    async fn response(mut self, arrived: Arrived) -> Result<Response, ApiError> {
        let window = self.state.shared.config.stream_error_window;
        let first = match &mut self.ticket {
            Some(ticket) => tokio::time::timeout(window, ticket.next()).await.ok(),
            None => None,
        };
        let ttft = first.is_some().then(|| ms(arrived.since.elapsed()));
        match first {
            Some((_, Event::End(Err(error)))) => return Err(error),
            Some((place, event)) => self.take(place, event),
            None => self.ping(),
        }
        let messages = stream::unfold(self, |mut stream| async move {
            let message = stream.next().await?;
            Some((Ok::<_, Infallible>(message), stream))
        });
        let mut response = Sse::new(messages).into_response();
        response.headers_mut().insert(BUFFERING_HEADER, HeaderValue::from_static("no"));
        response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        Ok(match ttft {
            Some(ttft) => with_ttft(response, ttft),
            None => response,
        })
    }

    async fn next(&mut self) -> Option<Message> {
        loop {
            if let Some(message) = self.ready.pop_front() {
                return Some(message);
            }
            match tokio::time::timeout(PING, self.ticket.as_mut()?.next()).await {
                Ok((place, event)) => self.take(place, event),
                Err(_) => self.ping(),
            }
        }
    }

    fn ping(&mut self) {
        self.ready.push_back(Message::default().comment("the answer is on its way"));
    }

    fn take(&mut self, place: usize, event: Event) {
        if !self.begun {
            self.begun = true;
            let begin: Vec<S::Part> = self.shapes.iter().filter_map(Shape::begin).collect();
            begin.into_iter().for_each(|part| self.push(part));
        }
        match event {
            Event::Piece(piece) => {
                let engine = &self.state.shared.engine;
                if let Some(part) = self.shapes.get_mut(place).map(|shape| shape.part(piece, engine)) {
                    self.push(part);
                }
            }
            Event::End(Ok(served)) => {
                if let Some(part) = self.shapes.get(place).map(|shape| shape.end(served.finish_reason())) {
                    self.push(part);
                }
                self.ended.push(place, served);
                if self.ended.is_all() {
                    self.end();
                }
            }
            Event::End(Err(error)) => {
                self.ticket = None;
                self.ready.push_back(message(&error.body()));
            }
        }
    }

    /// After the last answer.
    fn end(&mut self) {
        self.ticket = None;
        if self.include_usage {
            let usage = self.head.answer::<S::Part>(S::PART, Vec::new()).took(&self.ended);
            self.ready.push_back(message(&usage));
        }
        self.ready.push_back(Message::default().data("[DONE]"));
    }

    fn push(&mut self, part: S::Part) {
        self.ready.push_back(message(&self.head.answer(S::PART, vec![part])));
    }
}

fn message(body: &impl Serialize) -> Message {
    Message::default().json_data(body).unwrap_or_default()
}

fn with_ttft(mut response: Response, ttft_ms: f64) -> Response {
    if let Ok(value) = HeaderValue::from_str(&format!("{ttft_ms:.3}")) {
        response.headers_mut().insert(TTFT_HEADER, value);
    }
    response
}

fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}
