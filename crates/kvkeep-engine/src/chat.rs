//! Chats to prompts, by the template that the model file carries.
//!
//! Invariant: what people write cannot become a control token. Contents are guarded
//! before the template sees them: a character that no message has is put inside every
//! control token in them and taken out after the control tokens of the template itself were
//! found. Splitting the text at its contents was the alternative, but templates may trim them.

use std::collections::HashSet;
use std::ops::RangeInclusive;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, ErrorKind, context};

use crate::error::{EngineError, Result};
use crate::tokenizer::Tokenizer;

const NAME: &str = "chat";
/// Characters that are no text: Unicode's noncharacters, then its private use areas.
const GUARDS: [RangeInclusive<char>; 5] = [
    '\u{FDD0}'..='\u{FDEF}',
    '\u{10FFFE}'..='\u{10FFFF}',
    '\u{E000}'..='\u{F8FF}',
    '\u{F0000}'..='\u{FFFFD}',
    '\u{100000}'..='\u{10FFFD}',
];

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
    source: String,
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
        Ok(Self { environment, source: source.to_owned() })
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
        let guard = guard(messages, &self.source)?;
        let guarded = |m: &ChatMessage| ChatMessage {
            role: tokenizer.guard(&m.role, guard),
            content: tokenizer.guard(&m.content, guard),
        };
        let messages: Vec<ChatMessage> = messages.iter().map(guarded).collect();
        tokenizer.encode_guarded(&self.text(&messages, generate, tokenizer)?, guard)
    }
}

/// A character that neither a message nor the template has.
fn guard(messages: &[ChatMessage], template: &str) -> Result<char> {
    let texts = messages.iter().flat_map(|message| [message.role.as_str(), &message.content]);
    let is_guard = |c: &char| GUARDS.iter().any(|range| range.contains(c));
    let used: HashSet<char> = texts.chain([template]).flat_map(str::chars).filter(is_guard).collect();
    GUARDS.into_iter().flatten().find(|guard| !used.contains(guard)).ok_or(EngineError::NoGuard)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(text: impl IntoIterator<Item = char>) -> [ChatMessage; 1] {
        [ChatMessage::new("user", text.into_iter().collect::<String>())]
    }

    /// A message with each of the 32 noncharacters from U+FDD0 on left none to guard with, and its
    /// chat could not be read at all.
    #[test]
    fn there_is_a_guard_for_every_message_that_can_be_text() {
        let noncharacters = user('\u{FDD0}'..='\u{FDEF}');
        assert_eq!(guard(&user("hi".chars()), "").unwrap(), '\u{FDD0}');
        assert_eq!(guard(&noncharacters, "").unwrap(), '\u{10FFFE}');
        assert_eq!(guard(&noncharacters, "\u{10FFFE}\u{10FFFF}").unwrap(), '\u{E000}');
        let all_but_one = GUARDS.into_iter().flatten().filter(|guard| *guard != '\u{F1234}');
        assert_eq!(guard(&user(all_but_one), "").unwrap(), '\u{F1234}');
        assert!(matches!(guard(&user(GUARDS.into_iter().flatten()), ""), Err(EngineError::NoGuard)));
    }
}
