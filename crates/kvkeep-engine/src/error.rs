//! What can go wrong, by meaning. Every message says what to do.

use std::io;
use std::path::PathBuf;

/// A model that cannot be had, or a call that cannot be carried out as given.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The model file cannot be opened or read.
    #[error("cannot read the model file {path}: {source}")]
    ReadModel {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The file is not a whole GGUF file.
    #[error("{path} is not a readable GGUF file ({reason}): it may be cut short or of another format; fetch it again")]
    BadModel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A well-formed model that this engine cannot run.
    #[error("this model is not supported: {0}; use a Llama-family GGUF file")]
    Unsupported(String),
    /// The GGUF file lacks something that the engine needs.
    #[error("the model file lacks {0}: use a GGUF file that has it")]
    Missing(String),
    /// The tokenizer in the file cannot be built or used.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The model has no chat template.
    #[error("the model file has no chat template: give the prompt as plain text, or use an instruct model")]
    NoChatTemplate,
    /// The chat template refused the messages.
    #[error("the model's chat template cannot format these messages: {0}")]
    ChatTemplate(#[from] minijinja::Error),
    /// No character is left to tell the template's control tokens from the messages' texts.
    #[error("the messages use every noncharacter and every private-use character of Unicode: leave one out")]
    NoGuard,
    /// No tokens were given.
    #[error("no tokens given: a prompt needs at least one token")]
    EmptyTokens,
    /// A token that the model does not know.
    #[error("token {token} is not in the vocabulary of {vocabulary} tokens: was it made by another tokenizer?")]
    UnknownToken {
        /// The token.
        token: u32,
        /// The model's number of tokens.
        vocabulary: usize,
    },
    /// The tokens do not fit the KV buffer.
    #[error("{tokens} tokens do not fit: the KV buffer holds {capacity}; shorten the prompt or take a larger context")]
    ContextOverflow {
        /// Tokens that there would be.
        tokens: usize,
        /// Tokens that fit.
        capacity: usize,
    },
    /// A KV buffer longer than the model's context.
    #[error("a KV buffer of {capacity} tokens was asked for: the model's context has {context}, at least 1 is needed")]
    BadCapacity {
        /// Tokens asked for.
        capacity: usize,
        /// The model's context length.
        context: usize,
    },
    /// A KV buffer made for another model.
    #[error("this KV buffer was made for a model of another shape: make it with this engine's kv()")]
    ForeignKv,
    /// A sampling setting out of range.
    #[error("sampling: {0}")]
    Sampling(String),
    /// The threads could not be started.
    #[error("cannot start the compute threads: {0}")]
    Threads(#[from] rayon::ThreadPoolBuildError),
    /// The cache refused a call.
    #[error(transparent)]
    Cache(#[from] kvkeep::Error),
    /// The device-generic forward pass failed.
    #[error("device: {0}")]
    Device(#[source] Box<candle_core::Error>),
}

impl From<candle_core::Error> for EngineError {
    fn from(error: candle_core::Error) -> Self {
        Self::Device(Box::new(error))
    }
}

/// Shorthand for results of this crate.
pub type Result<T, E = EngineError> = std::result::Result<T, E>;
