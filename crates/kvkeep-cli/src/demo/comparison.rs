//! Many questions about a few long documents: what chats with a file, and retrieval, do.
//!
//! A document and its instructions make the repeated prefix, the question is new each time.
//! Requests go round the documents, so that none profits from being asked right before.

use anyhow::{Context, Result, ensure};
use kvkeep_engine::{ChatMessage, Engine};

use super::{Lab, Outcome};
use crate::model;
use crate::texts::{DOCUMENTS, Document};

/// Fewer requests than this a document would mostly measure its first, cold one.
const REQUESTS_A_DOCUMENT: usize = 7;

pub(super) fn run(lab: &Lab<'_>, requests: usize) -> Result<Outcome> {
    let documents = documents(requests);
    let asked: Vec<(&Document, &str)> = (0..requests).filter_map(|request| question(documents, request)).collect();
    let prompts = asked.iter().map(|asked| prompt(lab.engine, asked)).collect::<Result<Vec<_>>>()?;
    let longest = prompts.iter().map(Vec::len).max().unwrap_or_default();
    let needed = longest + usize::from(lab.options.max_tokens);
    ensure!(
        needed <= lab.engine.context_tokens(),
        "a prompt and its answer take {needed} tokens, the model has room for {}: choose fewer --max-tokens",
        lab.engine.context_tokens()
    );
    let (without, with, cache) =
        lab.measure(requests, needed, |client| prompts.iter().try_for_each(|prompt| client.send(prompt).map(drop)))?;
    // The second round's first: its document is known, its question new.
    let shown = documents.len().min(requests - 1);
    let (document, question) = asked.get(shown).context("no such request")?;
    let answer = with.answers.get(shown).map(|answer| answer.text.trim().to_owned()).unwrap_or_default();
    Ok(Outcome {
        title: "Comparison",
        about: format!("{requests} questions about {} documents, prompts of up to {longest} tokens", documents.len()),
        model: model::name(lab.options.model.as_deref()),
        threads: lab.engine.threads(),
        block_tokens: lab.options.block_tokens,
        without,
        with,
        first_turns: (0..documents.len()).collect(),
        example: [("question", format!("({}) {question}", document.file)), ("answer", answer)],
        cache,
    })
}

fn documents(requests: usize) -> &'static [Document] {
    let count = (requests / REQUESTS_A_DOCUMENT).clamp(1, DOCUMENTS.len());
    DOCUMENTS.get(..count).unwrap_or(&DOCUMENTS)
}

fn question(documents: &'static [Document], request: usize) -> Option<(&'static Document, &'static str)> {
    let document = documents.get(request % documents.len())?;
    let question = document.questions.get(request / documents.len() % document.questions.len())?;
    Some((document, question))
}

fn prompt(engine: &Engine, (document, question): &(&Document, &str)) -> Result<Vec<u32>> {
    let system =
        format!("Answer in one short sentence, from this document alone.\n\n# {}\n\n{}", document.file, document.text);
    let messages = [ChatMessage::new("system", system), ChatMessage::new("user", *question)];
    Ok(engine.chat_tokens(&messages, true)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_go_round_the_documents_and_ask_every_question_once() {
        let documents = documents(48);
        assert_eq!(documents.len(), 3);
        let mut asked: Vec<_> = (0..48).map(|request| question(documents, request).unwrap()).collect();
        assert_eq!(asked[0].0.file, DOCUMENTS[0].file);
        assert_eq!(asked[1].0.file, DOCUMENTS[1].file);
        assert_eq!(asked[3].0.file, DOCUMENTS[0].file);
        asked.sort_by_key(|(document, question)| (document.file, *question));
        asked.dedup_by_key(|(document, question)| (document.file, *question));
        assert_eq!(asked.len(), 48);
    }

    #[test]
    fn few_requests_are_about_few_documents() {
        assert_eq!([4, 14, 21, 1000].map(|requests| documents(requests).len()), [1, 2, 3, 3]);
        assert!(question(documents(1000), 999).is_some());
    }
}
