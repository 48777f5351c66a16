//! What can go wrong, by meaning. Every message says what to do.

use std::io;
use std::path::PathBuf;

/// A model that cannot be had, or a call that cannot be carried out as given.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The model file cannot be opened or read.
    #[error("cannot read the model file {path}")]
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
    #[error("the model's chat template cannot format these messages")]
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
    #[error("cannot start the compute threads")]
    Threads(#[source] io::Error),
    /// The cache refused a call.
    #[error(transparent)]
    Cache(#[from] kvkeep::Error),
    /// The device-generic forward pass failed.
    #[error("the device failed")]
    Device(#[source] Box<candle_core::Error>),
}

impl From<rayon::ThreadPoolBuildError> for EngineError {
    fn from(error: rayon::ThreadPoolBuildError) -> Self {
        Self::Threads(io::Error::other(error.to_string()))
    }
}

impl From<candle_core::Error> for EngineError {
    fn from(error: candle_core::Error) -> Self {
        Self::Device(Box::new(error))
    }
}

/// Shorthand for results of this crate.
pub type Result<T, E = EngineError> = std::result::Result<T, E>;

#[cfg(test)]
mod tests {
    use std::error::Error;

    use super::*;

    /// Each variant once. The match has no wildcard: a new variant has to be added here, too.
    fn every() -> Vec<EngineError> {
        let cause = || io::Error::other("the cause");
        let template = minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, "the cause");
        let all = vec![
            EngineError::ReadModel { path: "p".into(), source: cause() },
            EngineError::BadModel { path: "p".into(), reason: "r".into() },
            EngineError::Unsupported("u".into()),
            EngineError::Missing("m".into()),
            EngineError::Tokenizer("t".into()),
            EngineError::NoChatTemplate,
            EngineError::ChatTemplate(template),
            EngineError::NoGuard,
            EngineError::EmptyTokens,
            EngineError::UnknownToken { token: 1, vocabulary: 1 },
            EngineError::ContextOverflow { tokens: 2, capacity: 1 },
            EngineError::BadCapacity { capacity: 2, context: 1 },
            EngineError::ForeignKv,
            EngineError::Sampling("s".into()),
            EngineError::Threads(cause()),
            EngineError::Cache(kvkeep::Error::Memory { bytes: 1, source: cause() }),
            candle_core::Error::Msg("the cause".into()).into(),
        ];
        let number = |error: &EngineError| match error {
            EngineError::ReadModel { .. } => 0,
            EngineError::BadModel { .. } => 1,
            EngineError::Unsupported(_) => 2,
            EngineError::Missing(_) => 3,
            EngineError::Tokenizer(_) => 4,
            EngineError::NoChatTemplate => 5,
            EngineError::ChatTemplate(_) => 6,
            EngineError::NoGuard => 7,
            EngineError::EmptyTokens => 8,
            EngineError::UnknownToken { .. } => 9,
            EngineError::ContextOverflow { .. } => 10,
            EngineError::BadCapacity { .. } => 11,
            EngineError::ForeignKv => 12,
            EngineError::Sampling(_) => 13,
            EngineError::Threads(_) => 14,
            EngineError::Cache(_) => 15,
            EngineError::Device(_) => 16,
        };
        assert!(all.iter().map(number).eq(0..17));
        all
    }

    /// Whoever printed the chain said what the operating system said twice.
    #[test]
    fn every_error_says_its_cause_once() {
        let mut sources = 0;
        for error in every() {
            let line = kvkeep::OneLine(&error).to_string();
            sources += usize::from(error.source().is_some());
            assert_eq!(line.matches("the cause").count(), usize::from(error.source().is_some()), "{line}");
            assert!(!error.to_string().contains("the cause"), "{error}");
        }
        assert_eq!(sources, 5);
    }
}
