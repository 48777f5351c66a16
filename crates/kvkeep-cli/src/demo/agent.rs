//! Agent sessions whose prompts grow turn by turn.
//!
//! Invariant: a session's token sequence is append-only. The model's own answer tokens are kept
//! as they came out, and only the new turn is encoded and appended. Encoding the whole
//! conversation again was the alternative: text that is encoded anew need not give the tokens
//! that were generated, and from the first token that differs on nothing could be reused.

mod tools;

use anyhow::{Context, Result, ensure};
use kvkeep_engine::{ChatMessage, Engine};

use super::{Client, Lab, Outcome};
use crate::model;
use crate::texts::{AGENT, TOOLS};
use tools::TASKS;

/// What a session needs of a model's chat template.
trait Chat {
    fn text(&self, messages: &[ChatMessage]) -> Result<String>;
    fn tokens(&self, messages: &[ChatMessage]) -> Result<Vec<u32>>;
    fn is_end(&self, token: u32) -> bool;
}

/// A conversation, as messages and as the tokens that the model read and wrote.
#[derive(Debug, Clone)]
struct Session {
    messages: Vec<ChatMessage>,
    /// The prompt's text, up to where the next answer begins.
    text: String,
    tokens: Vec<u32>,
}

pub(super) fn run(lab: &Lab<'_>, requests: usize) -> Result<Outcome> {
    let opened = TASKS.iter().map(|task| Session::open(lab.engine, task.text)).collect::<Result<Vec<_>>>()?;
    let needed = needed_tokens(lab, &opened, requests)?;
    let mut sessions = Vec::new();
    let (without, with, cache) = lab.measure(requests, needed, |client| {
        sessions.clone_from(&opened);
        talk(lab.engine, client, &mut sessions, requests)
    })?;
    let lengths = || with.answers.iter().map(|answer| answer.prompt_tokens);
    let (shortest, longest) = (lengths().min().unwrap_or_default(), lengths().max().unwrap_or_default());
    Ok(Outcome {
        title: "Agent",
        about: format!(
            "{requests} turns of {} sessions with one system prompt, growing from {shortest} to {longest} tokens",
            TASKS.len()
        ),
        model: model::name(lab.options.model.as_deref()),
        threads: lab.engine.threads(),
        block_tokens: lab.options.block_tokens,
        without,
        with,
        first_turns: (0..TASKS.len()).collect(),
        example: sessions.first().map(Session::last_turn).unwrap_or_default(),
        cache,
    })
}

/// The sessions take turns.
fn talk(chat: &impl Chat, client: &mut Client<'_>, sessions: &mut [Session], requests: usize) -> Result<()> {
    for request in 0..requests {
        let (which, turn) = (request % sessions.len(), request / sessions.len());
        let session = sessions.get_mut(which).context("no such session")?;
        if let Some(result) = turn.checked_sub(1).and_then(|call| tools::message(which, call)) {
            session.hear(chat, &result)?;
        }
        let answer = client.send(&session.tokens)?;
        session.say(&answer.tokens, &answer.text);
    }
    Ok(())
}

/// Room for the longest session if every answer is as long as it may be.
fn needed_tokens(lab: &Lab<'_>, opened: &[Session], requests: usize) -> Result<usize> {
    let answer = usize::from(lab.options.max_tokens);
    let mut needed = 0;
    for (which, session) in opened.iter().enumerate() {
        let turns = (requests - which.min(requests)).div_ceil(opened.len());
        let mut tokens = session.tokens.len() + answer;
        for call in 0..turns.saturating_sub(1) {
            let mut next = session.clone();
            next.say(&[], "");
            next.hear(lab.engine, &tools::message(which, call).unwrap_or_default())?;
            tokens += next.tokens.len() - session.tokens.len() + answer;
        }
        needed = needed.max(tokens);
    }
    let room = lab.engine.context_tokens();
    ensure!(
        needed <= room,
        "a session may grow to {needed} tokens, the model has room for {room}: choose fewer --requests or --max-tokens"
    );
    Ok(needed)
}

impl Session {
    fn open(chat: &impl Chat, task: &str) -> Result<Self> {
        let system = ChatMessage::new("system", format!("{AGENT}\n{TOOLS}"));
        let messages = vec![system, ChatMessage::new("user", task)];
        Ok(Self { text: chat.text(&messages)?, tokens: chat.tokens(&messages)?, messages })
    }

    /// The model's answer, token for token.
    fn say(&mut self, tokens: &[u32], text: &str) {
        self.messages.push(ChatMessage::new("assistant", text));
        self.tokens.extend_from_slice(tokens);
    }

    /// A tool's result, and the opening of the next answer.
    fn hear(&mut self, chat: &impl Chat, result: &str) -> Result<()> {
        self.messages.push(ChatMessage::new("user", result));
        let text = chat.text(&self.messages)?;
        ensure!(
            text.starts_with(&self.text),
            "this model's chat template rewrites earlier turns, so prompts do not grow by appending: choose another model"
        );
        let all = chat.tokens(&self.messages)?;
        // What comes behind the answer begins with the token that ends it: the last but one, as
        // the result is ended too.
        let mut ends = all.iter().enumerate().rev().filter(|(_, token)| chat.is_end(**token));
        let (begin, _) = ends.nth(1).context("this model's chat template does not end its turns")?;
        self.tokens.extend_from_slice(all.get(begin..).unwrap_or_default());
        self.text = text;
        Ok(())
    }

    /// For people: the last thing heard and said.
    fn last_turn(&self) -> [(&'static str, String); 2] {
        let said = |back: usize| self.messages.iter().rev().nth(back).map(|m| m.content.clone()).unwrap_or_default();
        [("tool", said(1)), ("model", said(0))]
    }
}

impl Chat for Engine {
    fn text(&self, messages: &[ChatMessage]) -> Result<String> {
        Ok(self.chat_prompt(messages, true)?)
    }

    fn tokens(&self, messages: &[ChatMessage]) -> Result<Vec<u32>> {
        Ok(self.chat_tokens(messages, true)?)
    }

    fn is_end(&self, token: u32) -> bool {
        self.tokenizer().is_end(token)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes as tokens, `ChatML` without its markers: `role:content` ended by 0.
    struct Bytes {
        rewrites: bool,
    }

    impl Chat for Bytes {
        fn text(&self, messages: &[ChatMessage]) -> Result<String> {
            let turn = |m: &ChatMessage| format!("{}:{}\0", m.role, m.content);
            let count = if self.rewrites { messages.len().to_string() } else { String::new() };
            Ok(count + &messages.iter().map(turn).collect::<String>() + "assistant:")
        }

        fn tokens(&self, messages: &[ChatMessage]) -> Result<Vec<u32>> {
            Ok(self.text(messages)?.bytes().map(u32::from).collect())
        }

        fn is_end(&self, token: u32) -> bool {
            token == 0
        }
    }

    #[test]
    fn history_is_append_only_and_keeps_the_generated_tokens() {
        let chat = Bytes { rewrites: false };
        let mut session = Session::open(&chat, "Find it.").unwrap();
        for turn in 0..5 {
            let before = session.tokens.clone();
            // 1000 is not what encoding the answer's text would give.
            session.say(&[1000, 1001], "ok");
            session.hear(&chat, &format!("result {turn}")).unwrap();
            assert!(session.tokens.starts_with(&before));
            assert_eq!(session.tokens[before.len()..][..2], [1000, 1001]);
            let new: Vec<u8> = session.tokens[before.len() + 2..].iter().map(|t| u8::try_from(*t).unwrap()).collect();
            assert_eq!(String::from_utf8(new).unwrap(), format!("\0user:result {turn}\0assistant:"));
        }
    }

    #[test]
    fn a_template_that_rewrites_history_is_refused() {
        let chat = Bytes { rewrites: true };
        let mut session = Session::open(&chat, "Find it.").unwrap();
        session.say(&[1], "ok");
        let error = session.hear(&chat, "result").unwrap_err();
        assert!(error.to_string().contains("choose another model"), "{error}");
    }

    #[test]
    fn sessions_share_their_system_prompt() {
        let chat = Bytes { rewrites: false };
        let [one, two] = [0, 1].map(|task| Session::open(&chat, TASKS[task].text).unwrap().tokens);
        let shared = one.iter().zip(&two).take_while(|(one, two)| one == two).count();
        assert!(shared > AGENT.len() + TOOLS.len());
        assert_ne!(one, two);
    }
}
