//! The texts of the demos, compiled in. `texts/README.md` names their sources and licences.

/// A text, and what people ask about it.
#[derive(Debug)]
pub(crate) struct Document {
    pub(crate) file: &'static str,
    pub(crate) text: &'static str,
    pub(crate) questions: [&'static str; 16],
}

/// System prompt of the agent; the tools' descriptions follow it.
pub(crate) const AGENT: &str = include_str!("../texts/agent.txt");
/// One tool a line, as JSON.
pub(crate) const TOOLS: &str = include_str!("../texts/tools.jsonl");

pub(crate) static DOCUMENTS: [Document; 3] = [
    Document {
        file: "constitution.txt",
        text: include_str!("../texts/constitution.txt"),
        questions: [
            "Who holds all legislative powers?",
            // The one that the demo shows: even a small model reads the answer off the text.
            "How long is the term of a Senator?",
            "How old must a Representative be?",
            "Who is the President of the Senate?",
            "How often are Representatives chosen?",
            "Which house can impeach?",
            "Which house tries impeachments?",
            "How many Senators does each state have?",
            "How old must a Senator be?",
            "How many votes does each Senator have?",
            "When does the Congress assemble?",
            "How often is the population counted?",
            "Who fills vacancies of the House?",
            "Who chooses the Speaker of the House?",
            "How long must a Senator have been a citizen?",
            "What does the preamble want to secure?",
        ],
    },
    Document {
        file: "ownership.txt",
        text: include_str!("../texts/ownership.txt"),
        questions: [
            "What is ownership in Rust?",
            "What is stored on the stack?",
            "What is stored on the heap?",
            "What are the three rules of ownership?",
            "What does last in, first out mean?",
            "Why is pushing to the stack faster?",
            "What is a stack of plates an example of?",
            "What does the memory allocator return?",
            "Why is the heap slower to access?",
            "What happens when the owner goes out of scope?",
            "What does the restaurant host do?",
            "How many owners can a value have?",
            "Does ownership slow a program down?",
            "What is garbage collection?",
            "What is pushed when a function is called?",
            "What is the main purpose of ownership?",
        ],
    },
    Document {
        file: "declaration.txt",
        text: include_str!("../texts/declaration.txt"),
        questions: [
            "When was it signed?",
            "Which truths are self-evident?",
            "From whom do governments derive their powers?",
            "Who is accused in this text?",
            "Which rights are unalienable?",
            "What did the King do to judges?",
            "What did the King do to trade?",
            "What did the King do to the seas and coasts?",
            "What is said about standing armies?",
            "What is said about taxes?",
            "What is said about trial by jury?",
            "When may a people abolish its government?",
            "What is said about foreign mercenaries?",
            "What did the King refuse?",
            "What is said about legislative bodies?",
            "What does prudence dictate?",
        ],
    },
];

/// The text of a file.
pub(crate) fn text_of(file: &str) -> Option<&'static str> {
    DOCUMENTS.iter().find(|document| document.file == file).map(|document| document.text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_text_is_there_and_no_question_is_asked_twice() {
        for document in &DOCUMENTS {
            assert!(document.text.len() > 4000, "{}", document.file);
            assert_eq!(text_of(document.file), Some(document.text));
            let mut questions = document.questions.to_vec();
            questions.sort_unstable();
            questions.dedup();
            assert_eq!(questions.len(), document.questions.len(), "{}", document.file);
        }
        assert_eq!(text_of("no-such-file"), None);
    }

    #[test]
    fn each_line_of_the_tools_is_a_json_object_with_a_name() {
        for line in TOOLS.lines() {
            let tool: serde_json::Value = serde_json::from_str(line).unwrap();
            assert!(tool["name"].is_string(), "{line}");
        }
    }
}
