//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use kvkeep_engine::{ChatMessage, Engine, GenerateOptions};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;
use uuid::Uuid;

use super::answer::{Answer, Shape, answer};
use super::models;
use super::params::{Sampling, StreamOptions, Texts, absent, max_tokens, salt, stops};
use super::prompt;
use crate::auth::Tenant;
use crate::describe::{BodyErrors, KeyErrors, QueueErrors, StreamEvent};
use crate::error::{ApiError, ErrorBody};
use crate::extract::JsonBody;
use crate::scheduler::{Arrived, Job, Piece, TokenLogprob};
use crate::served::Endpoint;
use crate::state::AppState;

/// The most others whose probabilities can be asked for.
const TOP_LOGPROBS: usize = 20;

#[derive(Debug, Deserialize, ToSchema)]
#[schema(example = json!({
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "max_tokens": 8,
    "temperature": 0.0,
}))]
pub(super) struct ChatRequest {
    /// As /v1/models names it; it can be left out.
    model: Option<String>,
    #[schema(min_items = 1)]
    messages: Vec<Message>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    /// The most tokens to answer with; as many as fit if it is not given.
    #[schema(minimum = 1)]
    max_completion_tokens: Option<u64>,
    /// The older name of `max_completion_tokens`.
    #[schema(minimum = 1)]
    max_tokens: Option<u64>,
    #[schema(minimum = 0.0, maximum = 2.0)]
    temperature: Option<f64>,
    #[schema(minimum = 0.0, maximum = 1.0)]
    top_p: Option<f64>,
    /// Equal seeds give equal answers.
    seed: Option<i64>,
    stop: Option<Texts>,
    logprobs: Option<bool>,
    /// Needs `logprobs`.
    #[schema(maximum = 20)]
    top_logprobs: Option<usize>,
    /// 1: one answer.
    #[schema(minimum = 1, maximum = 1)]
    n: Option<u64>,
    /// 0: not supported.
    #[schema(minimum = 0.0, maximum = 0.0)]
    presence_penalty: Option<f64>,
    /// 0: not supported.
    #[schema(minimum = 0.0, maximum = 0.0)]
    frequency_penalty: Option<f64>,
    response_format: Option<ResponseFormat>,
    /// Only those who send the same salt share cached prefixes.
    #[schema(max_length = 256)]
    cache_salt: Option<String>,
    #[schema(ignore)]
    tools: Option<Vec<Value>>,
    #[schema(ignore)]
    functions: Option<Vec<Value>>,
    #[schema(ignore)]
    logit_bias: Option<serde_json::Map<String, Value>>,
}

#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct Message {
    /// `system`, `developer`, `user` or `assistant`.
    #[schema(pattern = "^(system|developer|user|assistant)$")]
    role: String,
    #[schema(value_type = Content)]
    content: Option<Content>,
}

/// One text, or one in parts.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a string or an array of parts such as {\"type\": \"text\", \"text\": \"...\"}")]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Debug, Deserialize, ToSchema)]
struct Part {
    /// `text`.
    #[schema(pattern = "^text$")]
    r#type: String,
    #[schema(value_type = String)]
    text: Option<String>,
}

#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct ResponseFormat {
    /// `text`.
    #[schema(pattern = "^text$")]
    r#type: String,
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ChatChoice {
    index: u32,
    message: Reply,
    logprobs: Option<Logprobs>,
    finish_reason: &'static str,
}

#[derive(Debug, Serialize, ToSchema)]
struct Reply {
    role: &'static str,
    content: String,
    refusal: Option<String>,
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ChatPart {
    index: u32,
    delta: Delta,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
}

#[derive(Debug, Default, Serialize, ToSchema)]
struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
}

#[derive(Debug, Serialize, ToSchema)]
struct Logprobs {
    content: Vec<ContentLogprob>,
    refusal: Option<String>,
}

#[derive(Debug, Serialize, ToSchema)]
struct ContentLogprob {
    #[serde(flatten)]
    token: OneLogprob,
    top_logprobs: Vec<OneLogprob>,
}

#[derive(Debug, Serialize, ToSchema)]
struct OneLogprob {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

struct Chat {
    logprobs: bool,
}

/// Answers a chat. Its prefix is computed once, whoever asks with it again.
#[utoipa::path(post, path = "/v1/chat/completions", operation_id = "create_chat_completion", tag = "openai", request_body = ChatRequest, responses(
    (
        status = 200,
        description = "The answer; with `stream`, server-sent events of `chat.completion.chunk`",
        content((Answer<ChatChoice> = "application/json"), (StreamEvent = "text/event-stream")),
    ),
    (status = 404, description = "There is no such model", body = ErrorBody),
    BodyErrors,
    KeyErrors,
    QueueErrors,
))]
pub(super) async fn create(
    tenant: Tenant,
    State(state): State<AppState>,
    JsonBody(request): JsonBody<ChatRequest>,
) -> Result<Response, ApiError> {
    let arrived = Arrived::now();
    models::check(request.model.as_deref(), &state)?;
    request.check()?;
    salt(request.cache_salt.as_ref())?;
    let sampler = request.sampling().sampler()?;
    let logprobs = request.logprobs.unwrap_or_default();
    let prompt = prompt::of_chat(&state, request.messages).await?;
    let room = prompt::room(&state, prompt.len(), "messages")?;
    let max_tokens = match request.max_completion_tokens {
        Some(asked) => max_tokens(Some(asked), "max_completion_tokens", room)?,
        None => max_tokens(request.max_tokens, "max_tokens", room)?,
    };
    let job = Job {
        id: format!("chatcmpl-{}", Uuid::new_v4().simple()),
        endpoint: Endpoint::Chat,
        namespace: tenant.namespace(&state.shared.namespace, request.cache_salt.as_deref()),
        tenant,
        prompt: Arc::from(prompt),
        options: GenerateOptions::greedy(max_tokens).sampler(sampler),
        stop: stops(request.stop)?,
        top_logprobs: logprobs.then(|| request.top_logprobs.unwrap_or_default()),
        arrived,
    };
    let stream = request.stream.unwrap_or_default().then(|| request.stream_options.unwrap_or_default());
    answer(state, job, Chat { logprobs }, stream).await
}

impl ChatRequest {
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
        absent("tools", self.tools.as_ref().is_some_and(|tools| !tools.is_empty()))?;
        absent("functions", self.functions.as_ref().is_some_and(|functions| !functions.is_empty()))?;
        absent("logit_bias", self.logit_bias.as_ref().is_some_and(|bias| !bias.is_empty()))?;
        if self.response_format.as_ref().is_some_and(|format| format.r#type != "text") {
            return Err(ApiError::invalid("response_format", "response_format must be text: no other is supported"));
        }
        match self.top_logprobs {
            Some(top) if top > TOP_LOGPROBS => Err(ApiError::invalid("top_logprobs", "top_logprobs must be 0 to 20")),
            Some(_) if self.logprobs != Some(true) => {
                Err(ApiError::invalid("top_logprobs", "top_logprobs needs logprobs: true"))
            }
            _ => Ok(()),
        }
    }
}

impl Message {
    /// As the model's template knows it.
    pub(crate) fn read(self) -> Result<ChatMessage, ApiError> {
        let role = match self.role.as_str() {
            "system" | "developer" => "system",
            "user" => "user",
            "assistant" => "assistant",
            "tool" | "function" => {
                return Err(ApiError::invalid(
                    "messages",
                    "messages of tools are not supported: put what they say into a user's message",
                ));
            }
            _ => return Err(ApiError::invalid("messages", "a role is system, developer, user or assistant")),
        };
        let text = match self.content {
            None => return Err(ApiError::invalid("messages", "a message needs content")),
            Some(Content::Text(text)) => text,
            Some(Content::Parts(parts)) => {
                let text = |part: Part| part.text.filter(|_| part.r#type == "text");
                let only_text =
                    || ApiError::invalid("messages", "only parts of type text are supported, each with a text");
                parts.into_iter().map(text).collect::<Option<String>>().ok_or_else(only_text)?
            }
        };
        Ok(ChatMessage::new(role, text))
    }
}

impl Shape for Chat {
    type Whole = ChatChoice;
    type Part = ChatPart;
    const WHOLE: &str = "chat.completion";
    const PART: &str = "chat.completion.chunk";

    fn begin(&self) -> Option<ChatPart> {
        let delta = Delta { role: Some("assistant"), content: Some(String::new()) };
        Some(ChatPart { index: 0, delta, logprobs: None, finish_reason: None })
    }

    fn part(&mut self, piece: Piece, engine: &Engine) -> ChatPart {
        let logprobs = self.logprobs(piece.logprobs, engine);
        let delta = Delta { role: None, content: Some(piece.text) };
        ChatPart { index: 0, delta, logprobs, finish_reason: None }
    }

    fn end(&self, reason: &'static str) -> ChatPart {
        ChatPart { index: 0, delta: Delta::default(), logprobs: None, finish_reason: Some(reason) }
    }

    fn whole(&mut self, all: Piece, reason: &'static str, engine: &Engine) -> ChatChoice {
        let logprobs = self.logprobs(all.logprobs, engine);
        let message = Reply { role: "assistant", content: all.text, refusal: None };
        ChatChoice { index: 0, message, logprobs, finish_reason: reason }
    }
}

impl Chat {
    fn logprobs(&self, tokens: Vec<TokenLogprob>, engine: &Engine) -> Option<Logprobs> {
        let one = |token: u32, logprob: f32| {
            let bytes = engine.tokenizer().bytes(token).to_vec();
            OneLogprob { token: String::from_utf8_lossy(&bytes).into_owned(), logprob, bytes }
        };
        let content = |token: TokenLogprob| ContentLogprob {
            token: one(token.token, token.logprob),
            top_logprobs: token.top.iter().map(|(token, logprob)| one(*token, *logprob)).collect(),
        };
        self.logprobs.then(|| Logprobs { content: tokens.into_iter().map(content).collect(), refusal: None })
    }
}
