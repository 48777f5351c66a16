//! Answers as clients read them: whole, or as a stream of events.
//!
//! Nothing is sent before the first token is there, so that whatever goes wrong until then has a
//! status of its own.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::{Duration, UNIX_EPOCH};

use axum::Json;
use axum::http::HeaderValue;
use axum::response::sse::{Event as Message, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use kvkeep_engine::Engine;
use serde::Serialize;
use utoipa::ToSchema;

use super::params::{PromptDetails, StreamOptions, Usage};
use crate::error::ApiError;
use crate::scheduler::{Event, Job, Piece, Ticket};
use crate::served::Served;
use crate::state::AppState;

const TTFT_HEADER: &str = "x-kvkeep-ttft-ms";

/// How an endpoint writes what the model says.
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
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
pub(super) struct Warmth {
    /// From the request's arrival to its first token.
    ttft_ms: Option<f64>,
    /// Tokens of the prompt whose KV was in RAM.
    ram_tokens: usize,
    /// Tokens behind those whose KV was loaded from the disk.
    disk_tokens: usize,
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
    ticket: Option<Ticket>,
    ready: VecDeque<Message>,
    head: Head,
    shape: S,
    include_usage: bool,
    state: AppState,
}

impl Head {
    fn answer<C>(&self, object: &'static str, choices: Vec<C>) -> Answer<C> {
        let Self { id, created, model, system_fingerprint } = self.clone();
        Answer { id, object, created, model, system_fingerprint, choices, usage: None, kvkeep: None }
    }
}

impl<C> Answer<C> {
    fn took(mut self, served: &Served) -> Self {
        let (prompt_tokens, completion_tokens) = (served.prompt.len(), served.completion_tokens);
        let cached_tokens = served.ram_tokens + served.disk_tokens;
        self.usage = Some(Usage {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: PromptDetails { cached_tokens },
        });
        self.kvkeep = Some(Warmth {
            ttft_ms: served.ttft.map(ms),
            ram_tokens: served.ram_tokens,
            disk_tokens: served.disk_tokens,
        });
        self
    }
}

/// Has a job answered.
pub(super) async fn answer<S: Shape>(
    state: AppState,
    job: Job,
    shape: S,
    stream: Option<StreamOptions>,
) -> Result<Response, ApiError> {
    let head = Head {
        id: job.id.clone(),
        created: job.arrived.at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
        model: state.shared.model.clone(),
        system_fingerprint: format!("fp_{}", state.shared.engine.revision().get(..12).unwrap_or_default()),
    };
    let arrived = job.arrived.since;
    let mut ticket = state.submit(job)?;
    let Some(options) = stream else { return whole(&state, ticket, &head, shape).await };
    let first = match ticket.next().await {
        Event::End(Err(error)) => return Err(error),
        first => first,
    };
    let ttft = ms(arrived.elapsed());
    let include_usage = options.include_usage.unwrap_or_default();
    let mut stream = Stream { ticket: Some(ticket), ready: VecDeque::new(), head, shape, include_usage, state };
    if let Some(part) = stream.shape.begin() {
        stream.push(part);
    }
    stream.take(first);
    let messages = stream::unfold(stream, |mut stream| async move {
        let message = stream.next().await?;
        Some((Ok::<_, Infallible>(message), stream))
    });
    Ok(with_ttft(Sse::new(messages).into_response(), ttft))
}

async fn whole<S: Shape>(
    state: &AppState,
    mut ticket: Ticket,
    head: &Head,
    mut shape: S,
) -> Result<Response, ApiError> {
    let mut all = Piece::default();
    let served = loop {
        match ticket.next().await {
            Event::Piece(piece) => {
                all.text.push_str(&piece.text);
                all.logprobs.extend(piece.logprobs);
            }
            Event::End(end) => break end?,
        }
    };
    let choice = shape.whole(all, served.finish_reason(), &state.shared.engine);
    let body = Json(head.answer(S::WHOLE, vec![choice]).took(&served)).into_response();
    Ok(match served.ttft {
        Some(ttft) => with_ttft(body, ms(ttft)),
        None => body,
    })
}

impl<S: Shape> Stream<S> {
    async fn next(&mut self) -> Option<Message> {
        loop {
            if let Some(message) = self.ready.pop_front() {
                return Some(message);
            }
            let event = self.ticket.as_mut()?.next().await;
            self.take(event);
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Piece(piece) => {
                let part = self.shape.part(piece, &self.state.shared.engine);
                self.push(part);
            }
            Event::End(Ok(served)) => {
                self.ticket = None;
                self.push(self.shape.end(served.finish_reason()));
                if self.include_usage {
                    let usage = self.head.answer::<S::Part>(S::PART, Vec::new()).took(&served);
                    self.ready.push_back(message(&usage));
                }
                self.ready.push_back(Message::default().data("[DONE]"));
            }
            Event::End(Err(error)) => {
                self.ticket = None;
                self.ready.push_back(message(&error.body()));
            }
        }
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
