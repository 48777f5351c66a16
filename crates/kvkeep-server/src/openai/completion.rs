//! `POST /v1/completions`.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use kvkeep_engine::{Engine, GenerateOptions};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::answer::{Answer, Question, Shape, answer};
use super::models;
use super::params::{Sampling, StreamOptions, Texts, Whole, absent, answers, max_tokens, salt, stops};
use super::prompt::{self, Prompt};
use crate::auth::Tenant;
use crate::describe::{BodyErrors, KeyErrors, QueueErrors, StreamEvent};
use crate::error::{ApiError, ErrorBody};
use crate::extract::JsonBody;
use crate::front::RequestId;
use crate::scheduler::{Arrived, Job, Piece, TokenLogprob, job_id};
use crate::served::Endpoint;
use crate::state::AppState;

/// As OpenAI has it.
const MAX_TOKENS: u32 = 16;
const LOGPROBS: usize = 5;

#[derive(Debug, Deserialize, ToSchema)]
#[schema(example = json!({"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0.0}))]
pub(super) struct CompletionRequest {
    /// As /v1/models names it; it can be left out.
    model: Option<String>,
    /// One prompt or several. Control tokens that are written out in a text are those tokens.
    prompt: Prompt,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    /// The most tokens to answer with; 16 if it is not given, as many as fit for -1.
    #[schema(value_type = Option<i64>, minimum = -1)]
    max_tokens: Option<Whole>,
    #[schema(minimum = 0.0, maximum = 2.0)]
    temperature: Option<f64>,
    #[schema(minimum = 0.0, maximum = 1.0)]
    top_p: Option<f64>,
    /// Equal seeds give equal answers. Any whole number; of several answers each has the next one.
    #[schema(value_type = Option<i128>)]
    seed: Option<Whole>,
    stop: Option<Texts>,
    /// So many answers to each prompt; all together no more than the server's queue takes.
    #[schema(value_type = Option<u64>, minimum = 1, maximum = 128)]
    n: Option<Whole>,
    /// As `n`: all are answered.
    #[schema(value_type = Option<u64>, minimum = 1, maximum = 128)]
    best_of: Option<Whole>,
    /// Begin the answer with the prompt; without `logprobs`.
    echo: Option<bool>,
    /// Taken off the logits of tokens that the answer has already.
    #[schema(minimum = -2.0, maximum = 2.0)]
    presence_penalty: Option<f64>,
    /// As `presence_penalty`, for each time that it has them.
    #[schema(minimum = -2.0, maximum = 2.0)]
    frequency_penalty: Option<f64>,
    /// Added to the logits of tokens, by their ids: from -100, never, to 100.
    #[schema(value_type = Option<BTreeMap<String, f64>>)]
    logit_bias: Option<BTreeMap<String, f64>>,
    /// Only those who send the same salt share cached prefixes.
    #[schema(max_length = 256)]
    cache_salt: Option<String>,
    /// Log probabilities of the answer's tokens, and of so many of the likeliest ones beside each.
    #[schema(value_type = Option<u64>, minimum = 0, maximum = 5)]
    logprobs: Option<Whole>,
    #[schema(ignore)]
    suffix: Option<String>,
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct TextChoice {
    index: u32,
    text: String,
    logprobs: Option<TextLogprobs>,
    finish_reason: Option<&'static str>,
}

/// One entry a token in each. A token that is no text by itself is written as `bytes:` and its bytes.
#[derive(Debug, Default, Serialize, ToSchema)]
struct TextLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<f32>,
    /// The likeliest tokens, and the one that was picked.
    top_logprobs: Vec<BTreeMap<String, f32>>,
    /// The character of the answer with which it begins.
    text_offset: Vec<usize>,
}

struct Text {
    index: u32,
    logprobs: bool,
    /// The prompt, if the answer begins with it.
    echo: Option<String>,
    /// Characters so far.
    offset: usize,
}

/// Goes on with a text.
#[utoipa::path(post, path = "/v1/completions", operation_id = "create_completion", tag = "openai", request_body = CompletionRequest, responses(
    (
        status = 200,
        description = "The answer; with `stream`, server-sent events of the same shape",
        content((Answer<TextChoice> = "application/json"), (StreamEvent = "text/event-stream")),
    ),
    (status = 404, description = "There is no such model", body = ErrorBody),
    BodyErrors,
    KeyErrors,
    QueueErrors,
))]
pub(super) async fn create(
    tenant: Tenant,
    State(state): State<AppState>,
    Extension(id): Extension<RequestId>,
    JsonBody(request): JsonBody<CompletionRequest>,
) -> Result<Response, ApiError> {
    let arrived = Arrived::now();
    let model = models::check(request.model.as_deref(), &state)?;
    request.check()?;
    salt(request.cache_salt.as_ref())?;
    let (sampling, echo) = (request.sampling(), request.echo.unwrap_or_default());
    let prompts = prompt::of_completion(&state, request.prompt).await?;
    let n = answers(request.n, prompts.len(), &state)?;
    let (id, stop) = (format!("cmpl-{id}"), stops(request.stop)?);
    let mut answers = Vec::with_capacity(prompts.len() * n);
    for prompt in prompts {
        let room = prompt::room(&state, prompt.len(), "prompt")?;
        let asked = request.max_tokens.unwrap_or_else(|| Whole::from(MAX_TOKENS));
        let max_tokens = max_tokens(Some(asked), "max_tokens", room)?;
        let (prompt, tokenizer): (Arc<[u32]>, _) = (Arc::from(prompt), state.shared.engine.tokenizer());
        for sampler in sampling.samplers(n, &state.shared.engine)? {
            let index = answers.len();
            let job = Job {
                id: job_id(&id, index),
                endpoint: Endpoint::Completion,
                namespace: tenant.namespace(&state.shared.namespace, request.cache_salt.as_deref()),
                tenant: tenant.clone(),
                prompt: Arc::clone(&prompt),
                options: GenerateOptions::greedy(max_tokens).sampler(sampler),
                stop: stop.clone(),
                top_logprobs: request.logprobs.and_then(Whole::count),
                arrived,
            };
            let shape = Text {
                index: u32::try_from(index).unwrap_or(u32::MAX),
                logprobs: request.logprobs.is_some(),
                echo: echo.then(|| tokenizer.decode_all(&prompt)),
                offset: 0,
            };
            answers.push((job, shape));
        }
    }
    if answers.is_empty() {
        return Err(ApiError::invalid("prompt", "prompt needs at least one prompt"));
    }
    let stream = request.stream.unwrap_or_default().then(|| request.stream_options.unwrap_or_default());
    answer(state, Question { id, model, answers, n, stream }).await
}

impl CompletionRequest {
    fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_p: self.top_p,
            seed: self.seed,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: self.logit_bias.clone(),
        }
    }

    fn check(&self) -> Result<(), ApiError> {
        let n = self.n.unwrap_or_else(|| Whole::from(1));
        if self.best_of.is_some_and(|best_of| best_of != n) {
            return Err(ApiError::invalid(
                "best_of",
                "best_of must be n: the server gives every answer that it computes",
            ));
        }
        if self.echo == Some(true) && self.logprobs.is_some() {
            return Err(ApiError::invalid("echo", "echo with logprobs is not supported: leave one of them out"));
        }
        absent("suffix", self.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty()))?;
        match self.logprobs {
            Some(top) if top.count().is_none_or(|top| top > LOGPROBS) => {
                Err(ApiError::invalid("logprobs", "logprobs must be 0 to 5"))
            }
            _ => Ok(()),
        }
    }
}

impl Shape for Text {
    type Whole = TextChoice;
    type Part = TextChoice;
    const WHOLE: &str = "text_completion";
    const PART: &str = "text_completion";

    fn begin(&self) -> Option<TextChoice> {
        let text = self.echo.clone()?;
        Some(TextChoice { index: self.index, text, logprobs: None, finish_reason: None })
    }

    fn part(&mut self, piece: Piece, engine: &Engine) -> TextChoice {
        let logprobs = self.logprobs(piece.logprobs, engine);
        TextChoice { index: self.index, text: piece.text, logprobs, finish_reason: None }
    }

    fn end(&self, reason: &'static str) -> TextChoice {
        TextChoice { index: self.index, text: String::new(), logprobs: None, finish_reason: Some(reason) }
    }

    fn whole(&mut self, all: Piece, reason: &'static str, engine: &Engine) -> TextChoice {
        let logprobs = self.logprobs(all.logprobs, engine);
        let text = self.echo.take().unwrap_or_default() + &all.text;
        TextChoice { index: self.index, text, logprobs, finish_reason: Some(reason) }
    }
}

impl Text {
    fn logprobs(&mut self, tokens: Vec<TokenLogprob>, engine: &Engine) -> Option<TextLogprobs> {
        if !self.logprobs {
            return None;
        }
        let mut all = TextLogprobs::default();
        for TokenLogprob { token, logprob, top } in tokens {
            let bytes = engine.tokenizer().bytes(token);
            let picked = [(token, logprob)];
            let named =
                top.iter().chain(&picked).map(|(token, logprob)| (name(engine.tokenizer().bytes(*token)), *logprob));
            all.top_logprobs.push(named.collect());
            all.tokens.push(name(bytes));
            all.token_logprobs.push(logprob);
            all.text_offset.push(self.offset);
            // A character counts with its first byte.
            self.offset += bytes.iter().filter(|byte| **byte & 0xc0 != 0x80).count();
        }
        Some(all)
    }
}

/// A token as text, if it is text.
fn name(token: &[u8]) -> String {
    match std::str::from_utf8(token) {
        Ok(text) => text.to_owned(),
        Err(_) => token.iter().fold("bytes:".to_owned(), |name, byte| name + &format!("\\x{byte:02x}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_that_is_no_text_is_named_by_its_bytes() {
        assert_eq!((name("né".as_bytes()), name(&[0xe2, 0x80])), ("né".to_owned(), "bytes:\\xe2\\x80".to_owned()));
    }
}
