//! `POST /v1/completions`.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use kvkeep_engine::{Engine, GenerateOptions};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;
use uuid::Uuid;

use super::answer::{Answer, Shape, answer};
use super::models;
use super::params::{Sampling, StreamOptions, Texts, absent, max_tokens, salt, stops};
use super::prompt::{self, Prompt};
use crate::auth::Tenant;
use crate::describe::{BodyErrors, KeyErrors, QueueErrors, StreamEvent};
use crate::error::{ApiError, ErrorBody};
use crate::extract::JsonBody;
use crate::scheduler::{Arrived, Job, Piece, TokenLogprob};
use crate::served::Endpoint;
use crate::state::AppState;

/// As OpenAI has it.
const MAX_TOKENS: u64 = 16;
const LOGPROBS: usize = 5;

#[derive(Debug, Deserialize, ToSchema)]
#[schema(example = json!({"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0.0}))]
pub(super) struct CompletionRequest {
    /// As /v1/models names it; it can be left out.
    model: Option<String>,
    prompt: Prompt,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    /// The most tokens to answer with; 16 if it is not given.
    #[schema(minimum = 1)]
    max_tokens: Option<u64>,
    #[schema(minimum = 0.0, maximum = 2.0)]
    temperature: Option<f64>,
    #[schema(minimum = 0.0, maximum = 1.0)]
    top_p: Option<f64>,
    /// Equal seeds give equal answers.
    seed: Option<i64>,
    stop: Option<Texts>,
    /// 1: one answer.
    #[schema(minimum = 1, maximum = 1)]
    n: Option<u64>,
    /// 1: one answer.
    #[schema(minimum = 1, maximum = 1)]
    best_of: Option<u64>,
    /// 0: not supported.
    #[schema(minimum = 0.0, maximum = 0.0)]
    presence_penalty: Option<f64>,
    /// 0: not supported.
    #[schema(minimum = 0.0, maximum = 0.0)]
    frequency_penalty: Option<f64>,
    /// Only those who send the same salt share cached prefixes.
    #[schema(max_length = 256)]
    cache_salt: Option<String>,
    /// Log probabilities of the answer's tokens, and of so many of the likeliest ones beside each.
    #[schema(minimum = 0, maximum = 5)]
    logprobs: Option<usize>,
    #[schema(ignore)]
    echo: Option<bool>,
    #[schema(ignore)]
    suffix: Option<String>,
    #[schema(ignore)]
    logit_bias: Option<serde_json::Map<String, Value>>,
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
    logprobs: bool,
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
    JsonBody(request): JsonBody<CompletionRequest>,
) -> Result<Response, ApiError> {
    let arrived = Arrived::now();
    models::check(request.model.as_deref(), &state)?;
    request.check()?;
    salt(request.cache_salt.as_ref())?;
    let sampler = request.sampling().sampler()?;
    let prompt = prompt::of_completion(&state, request.prompt).await?;
    let room = prompt::room(&state, prompt.len(), "prompt")?;
    let max_tokens = max_tokens(request.max_tokens.or(Some(MAX_TOKENS)), "max_tokens", room)?;
    let job = Job {
        id: format!("cmpl-{}", Uuid::new_v4().simple()),
        endpoint: Endpoint::Completion,
        namespace: tenant.namespace(&state.shared.namespace, request.cache_salt.as_deref()),
        tenant,
        prompt: Arc::from(prompt),
        options: GenerateOptions::greedy(max_tokens).sampler(sampler),
        stop: stops(request.stop)?,
        top_logprobs: request.logprobs,
        arrived,
    };
    let stream = request.stream.unwrap_or_default().then(|| request.stream_options.unwrap_or_default());
    answer(state, job, Text { logprobs: request.logprobs.is_some(), offset: 0 }, stream).await
}

impl CompletionRequest {
    fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_p: self.top_p,
            seed: self.seed,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            n: self.n,
        }
    }

    fn check(&self) -> Result<(), ApiError> {
        absent("best_of", self.best_of.is_some_and(|best_of| best_of != 1))?;
        absent("echo", self.echo.unwrap_or_default())?;
        absent("suffix", self.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty()))?;
        absent("logit_bias", self.logit_bias.as_ref().is_some_and(|bias| !bias.is_empty()))?;
        match self.logprobs {
            Some(top) if top > LOGPROBS => Err(ApiError::invalid("logprobs", "logprobs must be 0 to 5")),
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
        None
    }

    fn part(&mut self, piece: Piece, engine: &Engine) -> TextChoice {
        let logprobs = self.logprobs(piece.logprobs, engine);
        TextChoice { index: 0, text: piece.text, logprobs, finish_reason: None }
    }

    fn end(&self, reason: &'static str) -> TextChoice {
        TextChoice { index: 0, text: String::new(), logprobs: None, finish_reason: Some(reason) }
    }

    fn whole(&mut self, all: Piece, reason: &'static str, engine: &Engine) -> TextChoice {
        let logprobs = self.logprobs(all.logprobs, engine);
        TextChoice { index: 0, text: all.text, logprobs, finish_reason: Some(reason) }
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
