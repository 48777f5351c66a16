//! `/tokenize` and `/detokenize`, in the shapes of vLLM: what a prompt is to the model.

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Message, models, prompt};
use crate::auth::Tenant;
use crate::describe::{BodyErrors, KeyErrors};
use crate::error::{ApiError, ErrorBody};
use crate::extract::JsonBody;
use crate::state::AppState;

/// A prompt: `prompt` or `messages`, not both.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(example = json!({"prompt": "The capital of France is"}))]
pub(super) struct TokenizeRequest {
    /// As /v1/models names it; it can be left out.
    model: Option<String>,
    /// As in /v1/completions, one text
    prompt: Option<String>,
    /// As in /v1/chat/completions
    #[schema(min_items = 1)]
    messages: Option<Vec<Message>>,
    /// With `prompt`: behind the token that the model expects before a text, if it expects one. True if it is not given.
    add_special_tokens: Option<bool>,
    /// With `messages`: up to where the answer begins. True if it is not given.
    add_generation_prompt: Option<bool>,
    /// Also give the text of each token.
    return_token_strs: Option<bool>,
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Tokenized {
    count: usize,
    /// The most tokens of a prompt and its answer together.
    max_model_len: usize,
    tokens: Vec<u32>,
    token_strs: Option<Vec<String>>,
}

#[derive(Debug, Deserialize, ToSchema)]
#[schema(example = json!({"tokens": [504, 3575, 282, 4649, 314]}))]
pub(super) struct DetokenizeRequest {
    /// As /v1/models names it; it can be left out.
    model: Option<String>,
    tokens: Vec<u32>,
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Detokenized {
    /// Control tokens are written out.
    prompt: String,
}

/// A prompt's tokens.
#[utoipa::path(post, path = "/tokenize", operation_id = "tokenize", tag = "openai", request_body = TokenizeRequest, responses(
    (status = 200, description = "As the model reads it", body = Tokenized),
    (status = 404, description = "There is no such model", body = ErrorBody),
    BodyErrors,
    KeyErrors,
))]
pub(super) async fn tokenize(
    _: Tenant,
    State(state): State<AppState>,
    JsonBody(request): JsonBody<TokenizeRequest>,
) -> Result<Json<Tokenized>, ApiError> {
    models::check(request.model.as_deref(), &state)?;
    let tokens = match (request.prompt, request.messages) {
        (Some(text), None) => prompt::text_tokens(&state, text, request.add_special_tokens.unwrap_or(true)).await?,
        (None, Some(messages)) => {
            prompt::chat_tokens(&state, messages, request.add_generation_prompt.unwrap_or(true)).await?
        }
        _ => return Err(ApiError::invalid("prompt", "give prompt or messages, and not both")),
    };
    let tokenizer = state.shared.engine.tokenizer();
    let texts = || tokens.iter().map(|token| tokenizer.decode_all(&[*token])).collect();
    let token_strs = request.return_token_strs.unwrap_or_default().then(texts);
    let max_model_len = state.shared.config.context_tokens;
    Ok(Json(Tokenized { count: tokens.len(), max_model_len, tokens, token_strs }))
}

/// The text of tokens.
#[utoipa::path(post, path = "/detokenize", operation_id = "detokenize", tag = "openai", request_body = DetokenizeRequest, responses(
    (status = 200, description = "Bytes that are no text become U+FFFD", body = Detokenized),
    (status = 404, description = "There is no such model", body = ErrorBody),
    BodyErrors,
    KeyErrors,
))]
pub(super) async fn detokenize(
    _: Tenant,
    State(state): State<AppState>,
    JsonBody(request): JsonBody<DetokenizeRequest>,
) -> Result<Json<Detokenized>, ApiError> {
    models::check(request.model.as_deref(), &state)?;
    let (tokenizer, vocabulary) = (state.shared.engine.tokenizer(), state.shared.engine.tokenizer().vocabulary());
    if let Some(unknown) = request.tokens.iter().find(|token| **token as usize >= vocabulary) {
        let message = format!("token {unknown} is not in the vocabulary of {vocabulary} tokens");
        return Err(ApiError::invalid("tokens", message));
    }
    Ok(Json(Detokenized { prompt: tokenizer.decode_all(&request.tokens) }))
}
