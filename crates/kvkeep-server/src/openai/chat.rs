//! `POST /v1/chat/completions`.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use kvkeep_engine::{ChatMessage, Engine, GenerateOptions, Sampler};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::answer::{Answer, Question, Shape, answer};
use super::models;
use super::params::{Sampling, StreamOptions, Texts, Whole, absent, answers, max_tokens, salt, stops};
use super::prompt;
use crate::auth::Tenant;
use crate::describe::{BodyErrors, KeyErrors, QueueErrors, StreamEvent};
use crate::error::{ApiError, ErrorBody};
use crate::extract::JsonBody;
use crate::front::RequestId;
use crate::scheduler::{Arrived, Job, Piece, TokenLogprob, job_id};
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
    /// The most tokens to answer with; as many as fit if it is not given, or -1.
    #[schema(value_type = Option<i64>, minimum = -1)]
    max_completion_tokens: Option<Whole>,
    /// The older name of `max_completion_tokens`.
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
    logprobs: Option<bool>,
    /// Needs `logprobs`.
    #[schema(value_type = Option<u64>, maximum = 20)]
    top_logprobs: Option<Whole>,
    /// So many answers; no more than the server's queue takes.
    #[schema(value_type = Option<u64>, minimum = 1, maximum = 128)]
    n: Option<Whole>,
    /// Taken off the logits of tokens that the answer has already.
    #[schema(minimum = -2.0, maximum = 2.0)]
    presence_penalty: Option<f64>,
    /// As `presence_penalty`, for each time that it has them.
    #[schema(minimum = -2.0, maximum = 2.0)]
    frequency_penalty: Option<f64>,
    /// Added to the logits of tokens, by their ids: from -100, never, to 100.
    #[schema(value_type = Option<BTreeMap<String, f64>>)]
    logit_bias: Option<BTreeMap<String, f64>>,
    response_format: Option<ResponseFormat>,
    /// Only those who send the same salt share cached prefixes.
    #[schema(max_length = 256)]
    cache_salt: Option<String>,
    #[schema(ignore)]
    tools: Option<Vec<Value>>,
    #[schema(ignore)]
    functions: Option<Vec<Value>>,
}

#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct Message {
    /// `system`, `developer`, `user` or `assistant`.
    #[schema(pattern = "^(system|developer|user|assistant)$")]
    role: String,
    /// Null only in a message of the assistant.
    #[schema(value_type = Option<Content>)]
    content: Option<Content>,
    /// What the assistant has called; it is read as text.
    #[schema(ignore)]
    tool_calls: Option<Vec<ToolCall>>,
    #[schema(ignore)]
    function_call: Option<FunctionCall>,
    #[schema(ignore)]
    refusal: Option<String>,
}

#[derive(Debug, Deserialize)]
struct ToolCall {
    function: FunctionCall,
}

#[derive(Debug, Deserialize)]
struct FunctionCall {
    name: String,
    /// JSON, as text or as it is.
    #[serde(default)]
    arguments: Value,
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
    index: u32,
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
    Extension(id): Extension<RequestId>,
    JsonBody(request): JsonBody<ChatRequest>,
) -> Result<Response, ApiError> {
    let arrived = Arrived::now();
    let model = models::check(request.model.as_deref(), &state)?;
    request.check()?;
    salt(request.cache_salt.as_ref())?;
    let n = answers(request.n, 1, &state)?;
    let samplers = request.sampling().samplers(n, &state.shared.engine)?;
    let logprobs = request.logprobs.unwrap_or_default();
    let prompt: Arc<[u32]> = Arc::from(prompt::of_chat(&state, request.messages).await?);
    let room = prompt::room(&state, prompt.len(), "messages")?;
    let max_tokens = match request.max_completion_tokens {
        Some(asked) => max_tokens(Some(asked), "max_completion_tokens", room)?,
        None => max_tokens(request.max_tokens, "max_tokens", room)?,
    };
    let (id, stop) = (format!("chatcmpl-{id}"), stops(request.stop)?);
    let job = |(index, sampler): (usize, Sampler)| Job {
        id: job_id(&id, index),
        endpoint: Endpoint::Chat,
        namespace: tenant.namespace(&state.shared.namespace, request.cache_salt.as_deref()),
        tenant: tenant.clone(),
        prompt: Arc::clone(&prompt),
        options: GenerateOptions::greedy(max_tokens).sampler(sampler),
        stop: stop.clone(),
        top_logprobs: logprobs.then(|| request.top_logprobs.and_then(Whole::count).unwrap_or_default()),
        arrived,
    };
    let jobs = samplers.into_iter().enumerate().map(job);
    let answers = (0..).zip(jobs).map(|(index, job)| (job, Chat { index, logprobs })).collect();
    let stream = request.stream.unwrap_or_default().then(|| request.stream_options.unwrap_or_default());
    answer(state, Question { id, model, answers, n, stream }).await
}

impl ChatRequest {
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
        absent("tools", self.tools.as_ref().is_some_and(|tools| !tools.is_empty()))?;
        absent("functions", self.functions.as_ref().is_some_and(|functions| !functions.is_empty()))?;
        if self.response_format.as_ref().is_some_and(|format| format.r#type != "text") {
            return Err(ApiError::invalid("response_format", "response_format must be text: no other is supported"));
        }
        match self.top_logprobs {
            Some(top) if top.count().is_none_or(|top| top > TOP_LOGPROBS) => {
                Err(ApiError::invalid("top_logprobs", "top_logprobs must be 0 to 20"))
            }
            Some(top) if top.count() == Some(0) => Ok(()),
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
        let said = match self.content {
            Some(content) => content.text()?,
            None if role == "assistant" => self.refusal.unwrap_or_default(),
            None => return Err(ApiError::invalid("messages", "a message needs content")),
        };
        let calls = self.tool_calls.into_iter().flatten().map(|call| call.function).chain(self.function_call);
        let text = calls.fold(said, |text, call| call.after(text));
        Ok(ChatMessage::new(role, text))
    }
}

impl Content {
    /// Parts are lines of their own.
    fn text(self) -> Result<String, ApiError> {
        let parts = match self {
            Self::Text(text) => return Ok(text),
            Self::Parts(parts) => parts,
        };
        let text = |part: Part| part.text.filter(|_| part.r#type == "text");
        let texts: Option<Vec<String>> = parts.into_iter().map(text).collect();
        let texts = texts
            .ok_or_else(|| ApiError::invalid("messages", "only parts of type text are supported, each with a text"))?;
        Ok(texts.join("\n"))
    }
}

impl FunctionCall {
    /// The call as text behind what was said, as models that call tools write it.
    fn after(self, mut said: String) -> String {
        let arguments = match self.arguments {
            Value::String(text) => serde_json::from_str(&text).unwrap_or(Value::String(text)),
            arguments => arguments,
        };
        if !said.is_empty() {
            said.push('\n');
        }
        said + &format!("<tool_call>\n{}\n</tool_call>", json!({"name": self.name, "arguments": arguments}))
    }
}

impl Shape for Chat {
    type Whole = ChatChoice;
    type Part = ChatPart;
    const WHOLE: &str = "chat.completion";
    const PART: &str = "chat.completion.chunk";

    fn begin(&self) -> Option<ChatPart> {
        let delta = Delta { role: Some("assistant"), content: Some(String::new()) };
        Some(ChatPart { index: self.index, delta, logprobs: None, finish_reason: None })
    }

    fn part(&mut self, piece: Piece, engine: &Engine) -> ChatPart {
        let logprobs = self.logprobs(piece.logprobs, engine);
        let delta = Delta { role: None, content: Some(piece.text) };
        ChatPart { index: self.index, delta, logprobs, finish_reason: None }
    }

    fn end(&self, reason: &'static str) -> ChatPart {
        ChatPart { index: self.index, delta: Delta::default(), logprobs: None, finish_reason: Some(reason) }
    }

    fn whole(&mut self, all: Piece, reason: &'static str, engine: &Engine) -> ChatChoice {
        let logprobs = self.logprobs(all.logprobs, engine);
        let message = Reply { role: "assistant", content: all.text, refusal: None };
        ChatChoice { index: self.index, message, logprobs, finish_reason: reason }
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
