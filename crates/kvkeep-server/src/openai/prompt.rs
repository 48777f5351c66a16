//! Requests to tokens, on threads that may block: a long prompt takes a while to cut up.

use kvkeep_engine::{ChatMessage, Engine, EngineError};
use serde::Deserialize;
use utoipa::ToSchema;

use super::chat::Message;
use crate::error::ApiError;
use crate::state::AppState;

/// A prompt of `/v1/completions`.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(
    untagged,
    expecting = "expected a string, an array of strings, an array of token ids, or an array of such arrays"
)]
pub(super) enum Prompt {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    Lists(Vec<Vec<u32>>),
}

/// A chat's tokens, up to where the answer begins.
pub(crate) async fn of_chat(state: &AppState, messages: Vec<Message>) -> Result<Vec<u32>, ApiError> {
    chat_tokens(state, messages, true).await
}

/// A chat's tokens, perhaps with the beginning of an answer.
pub(super) async fn chat_tokens(
    state: &AppState,
    messages: Vec<Message>,
    add_generation_prompt: bool,
) -> Result<Vec<u32>, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::invalid("messages", "messages needs at least one message"));
    }
    let messages: Vec<ChatMessage> = messages.into_iter().map(Message::read).collect::<Result<_, _>>()?;
    bounded(state, messages.iter().map(|message| message.content.len()).sum(), "messages")?;
    blocking(state, move |engine| engine.chat_tokens(&messages, add_generation_prompt)).await
}

/// The tokens of each prompt.
pub(super) async fn of_completion(state: &AppState, prompt: Prompt) -> Result<Vec<Vec<u32>>, ApiError> {
    let texts = match prompt {
        Prompt::Text(text) => vec![text],
        Prompt::Texts(texts) => texts,
        Prompt::Tokens(tokens) => return Ok(vec![tokens]),
        Prompt::Lists(lists) => return Ok(lists),
    };
    bounded(state, texts.iter().map(String::len).max().unwrap_or_default(), "prompt")?;
    blocking(state, move |engine| texts.iter().map(|text| engine.tokenizer().encode_prompt(text)).collect()).await
}

/// A text's tokens, as /v1/completions reads it.
pub(crate) async fn of_text(state: &AppState, text: String) -> Result<Vec<u32>, ApiError> {
    text_tokens(state, text, true).await
}

/// A text's tokens, perhaps behind the token that the model expects before one.
pub(super) async fn text_tokens(state: &AppState, text: String, special: bool) -> Result<Vec<u32>, ApiError> {
    bounded(state, text.len(), "prompt")?;
    blocking(state, move |engine| {
        let tokenizer = engine.tokenizer();
        if special { tokenizer.encode_prompt(&text) } else { tokenizer.encode(&text, true) }
    })
    .await
}

/// How many tokens of an answer fit behind a prompt.
pub(crate) fn room(state: &AppState, prompt_tokens: usize, param: &'static str) -> Result<usize, ApiError> {
    let context_tokens = state.shared.config.context_tokens;
    // The last token of an answer takes no room: its KV is never computed.
    match (context_tokens + 1).checked_sub(prompt_tokens) {
        Some(1..) if prompt_tokens == 0 => {
            Err(ApiError::invalid(param, "the prompt is empty: it needs at least one token"))
        }
        Some(room @ 1..) => Ok(room),
        _ => Err(ApiError::TooLong { prompt: format!("{prompt_tokens} tokens"), context_tokens, param }),
    }
}

/// Refuses what cannot fit, whatever its tokens are, before it is cut up.
fn bounded(state: &AppState, bytes: usize, param: &'static str) -> Result<(), ApiError> {
    let context_tokens = state.shared.config.context_tokens;
    if bytes > context_tokens.saturating_mul(state.shared.engine.tokenizer().longest_bytes()) {
        return Err(ApiError::TooLong { prompt: format!("{bytes} bytes"), context_tokens, param });
    }
    Ok(())
}

async fn blocking<T: Send + 'static>(
    state: &AppState,
    work: impl FnOnce(&Engine) -> Result<T, EngineError> + Send + 'static,
) -> Result<T, ApiError> {
    let engine = state.shared.engine.clone();
    match tokio::task::spawn_blocking(move || work(&engine)).await {
        Ok(tokens) => Ok(tokens?),
        Err(error) => Err(ApiError::internal(&error)),
    }
}
