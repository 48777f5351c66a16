//! The agent's tools, and which of them is called when.
//!
//! The calls are a script, so that the runs without and with the cache read the same; each
//! result is computed from the texts.

use crate::texts::{DOCUMENTS, text_of};

/// What a session works on.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) text: &'static str,
    file: &'static str,
    words: [&'static str; 8],
}

/// One for each session.
pub(super) static TASKS: [Task; 2] = [
    Task {
        text: "Find out how the members of the two houses are chosen, and who takes their places when they leave.",
        file: "constitution.txt",
        words: ["Senators", "vacancies", "chosen", "Executive", "House", "Elections", "Vote", "Congress"],
    },
    Task {
        text: "Find out what the stack and the heap are, and which of them is the faster one.",
        file: "ownership.txt",
        words: ["stack", "heap", "pointer", "faster", "plates", "owner", "allocator", "slower"],
    },
];

/// A tool with its arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Script {
    ListFiles,
    FileStats { file: &'static str },
    Search { file: &'static str, text: &'static str },
    ReadLines { file: &'static str, first: usize, count: usize },
    CountWord { word: &'static str },
    FirstLineOfParagraph { file: &'static str, paragraph: usize },
}

/// The message of the call number `call` of a session: the call and its result.
pub(super) fn message(session: usize, call: usize) -> Option<String> {
    let task = TASKS.get(session)?;
    let script = Script::at(task, call)?;
    Some(format!("{}\n{}", script.call(), script.result()))
}

impl Script {
    fn at(task: &Task, call: usize) -> Option<Self> {
        let file = task.file;
        let Some(call) = call.checked_sub(2) else {
            return Some(if call == 0 { Self::ListFiles } else { Self::FileStats { file } });
        };
        let round = call / 4;
        let word = task.words.get(round % task.words.len()).copied()?;
        let lines = text_of(file)?.lines().count();
        Some(match call % 4 {
            0 => Self::Search { file, text: word },
            1 => Self::ReadLines {
                file,
                first: (line_of(file, word) + round / task.words.len()) % (lines - 1) + 1,
                count: 2,
            },
            2 => Self::CountWord { word },
            _ => Self::FirstLineOfParagraph { file, paragraph: round + 1 },
        })
    }

    fn call(&self) -> String {
        match self {
            Self::ListFiles => "list_files()".to_owned(),
            Self::FileStats { file } => format!("file_stats({file})"),
            Self::Search { file, text } => format!("search({file}, {text:?})"),
            Self::ReadLines { file, first, count } => format!("read_lines({file}, {first}, {count})"),
            Self::CountWord { word } => format!("count_word({word:?})"),
            Self::FirstLineOfParagraph { file, paragraph } => format!("first_line_of_paragraph({file}, {paragraph})"),
        }
    }

    fn result(&self) -> String {
        match *self {
            Self::ListFiles => join(DOCUMENTS.iter().map(|document| stats(document.file))),
            Self::FileStats { file } => stats(file),
            Self::Search { file, text } => search(file, text),
            Self::ReadLines { file, first, count } => join(lines(file).skip(first - 1).take(count).map(str::to_owned)),
            Self::CountWord { word } => join(DOCUMENTS.iter().map(|d| format!("{}: {}", d.file, count(d.text, word)))),
            Self::FirstLineOfParagraph { file, paragraph } => first_line(file, paragraph),
        }
    }
}

fn lines(file: &str) -> impl Iterator<Item = &'static str> {
    text_of(file).unwrap_or_default().lines()
}

fn join(lines: impl Iterator<Item = String>) -> String {
    lines.collect::<Vec<_>>().join("\n")
}

fn has(line: &str, text: &str) -> bool {
    line.to_lowercase().contains(&text.to_lowercase())
}

/// Where a text is first found, counted from 0.
fn line_of(file: &str, text: &str) -> usize {
    lines(file).position(|line| has(line, text)).unwrap_or_default()
}

fn stats(file: &str) -> String {
    let text = text_of(file).unwrap_or_default();
    format!("{file}: {} lines, {} words, {} bytes", text.lines().count(), text.split_whitespace().count(), text.len())
}

fn search(file: &str, text: &str) -> String {
    let found: Vec<(usize, &str)> = (1..).zip(lines(file)).filter(|(_, line)| has(line, text)).collect();
    match found.first() {
        Some((number, line)) => format!("{} lines, first {number}: {line}", found.len()),
        None => "0 lines".to_owned(),
    }
}

fn count(text: &str, word: &str) -> usize {
    text.split(|c: char| !c.is_alphabetic()).filter(|found| found.eq_ignore_ascii_case(word)).count()
}

fn first_line(file: &str, paragraph: usize) -> String {
    let mut after_blank = true;
    let mut left = paragraph;
    for (number, line) in (1..).zip(lines(file)) {
        let blank = line.trim().is_empty();
        if after_blank && !blank {
            left -= 1;
            if left == 0 {
                return format!("{number}: {line}");
            }
        }
        after_blank = blank;
    }
    "no such paragraph".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_call_has_a_result_and_its_tool_is_described() {
        for session in 0..TASKS.len() {
            for call in 0..200 {
                let message = message(session, call).unwrap();
                let tool = message.split('(').next().unwrap();
                assert!(crate::texts::TOOLS.contains(&format!("\"name\": \"{tool}\"")), "{message}");
                let (_, result) = message.split_once('\n').unwrap();
                assert!(!result.trim().is_empty(), "empty result: {message}");
            }
        }
    }

    #[test]
    fn results_come_from_the_texts() {
        assert_eq!(
            search("ownership.txt", "fixed size"),
            "2 lines, first 34: data stored on the stack must have a known, fixed size. Data with an unknown"
        );
        assert_eq!(first_line("constitution.txt", 2), "3: Preamble");
        assert_eq!(first_line("constitution.txt", 1000), "no such paragraph");
        assert_eq!(count("Stack, stack; stacked", "STACK"), 2);
        assert_eq!(search("ownership.txt", "no such words"), "0 lines");
    }
}
