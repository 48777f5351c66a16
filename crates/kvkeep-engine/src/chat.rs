//! Chats to prompts, by the template that the model file carries.
//!
//! Invariant: what people write cannot become a control token. Contents are guarded
//! before the template sees them: a character that no message has is put inside every
//! control token in them and taken out after the control tokens of the template itself were
//! found. Splitting the text at its contents was the alternative, but templates may trim them.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, ErrorKind, context};

use crate::error::{EngineError, Result};
use crate::tokenizer::Tokenizer;

const NAME: &str = "chat";

/// One message of a chat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatMessage {
    /// Who speaks: `system`, `user` or `assistant`, as the template knows them.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl ChatMessage {
    /// A message.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// A model's chat template.
#[derive(Debug)]
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
}

impl ChatTemplate {
    pub(crate) fn new(source: &str) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        // As transformers renders them.
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_template_owned(NAME, source.to_owned())?;
        Ok(Self { environment })
    }

    /// The prompt as text, for people to read.
    pub(crate) fn text(&self, messages: &[ChatMessage], generate: bool, tokenizer: &Tokenizer) -> Result<String> {
        let (bos_token, eos_token) = (tokenizer.bos_text(), tokenizer.eos_text());
        let add_generation_prompt = generate;
        let message = |m: &ChatMessage| context! { role => m.role.as_str(), content => m.content.as_str() };
        let messages: Vec<Value> = messages.iter().map(message).collect();
        let template = self.environment.get_template(NAME)?;
        Ok(template.render(context! { messages, add_generation_prompt, bos_token, eos_token })?)
    }

    /// The prompt as tokens: control tokens come from the template alone.
    pub(crate) fn tokens(&self, messages: &[ChatMessage], generate: bool, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        let unused = |guard: &char| !messages.iter().any(|m| m.role.contains(*guard) || m.content.contains(*guard));
        // Unicode's noncharacters: never text.
        let guard = ('\u{FDD0}'..='\u{FDEF}').find(unused).ok_or_else(|| {
            EngineError::Tokenizer("the messages use every noncharacter from U+FDD0 to U+FDEF: remove them".to_owned())
        })?;
        let guarded = |m: &ChatMessage| ChatMessage {
            role: tokenizer.guard(&m.role, guard),
            content: tokenizer.guard(&m.content, guard),
        };
        let messages: Vec<ChatMessage> = messages.iter().map(guarded).collect();
        tokenizer.encode_guarded(&self.text(&messages, generate, tokenizer)?, guard)
    }
}
