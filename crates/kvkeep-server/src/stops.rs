//! Stop sequences, found in text that comes in pieces.
//!
//! Invariant: what was let out is never taken back. So the end of the text is held back as
//! long as it may be the beginning of a stop sequence.

/// Looks for stop sequences.
#[derive(Debug)]
pub(crate) struct Stops {
    sequences: Vec<String>,
    held: String,
    found: bool,
}

impl Stops {
    pub(crate) fn new(sequences: Vec<String>) -> Self {
        Self { sequences, held: String::new(), found: false }
    }

    /// The text that may go out now. Once a stop sequence was found nothing does: see
    /// [`Stops::found`].
    pub(crate) fn push(&mut self, text: &str) -> String {
        if self.found {
            return String::new();
        }
        self.held.push_str(text);
        if let Some(at) = self.sequences.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.found = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let rest = self.held.split_off(self.held.len() - self.undecided());
        std::mem::replace(&mut self.held, rest)
    }

    /// What was held back, when nothing comes any more.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    pub(crate) fn found(&self) -> bool {
        self.found
    }

    /// Bytes at the end that a stop sequence may begin with.
    fn undecided(&self) -> usize {
        let begins = |stop: &String, at: usize| self.held.get(at..).is_some_and(|end| stop.starts_with(end));
        let longest = self.sequences.iter().map(String::len).max().unwrap_or(0);
        let from = self.held.len().saturating_sub(longest);
        (from..self.held.len())
            .find(|at| self.sequences.iter().any(|stop| begins(stop, *at)))
            .map_or(0, |at| self.held.len() - at)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(sequences: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut stops = Stops::new(sequences.iter().map(|&stop| stop.to_owned()).collect());
        let mut out: String = pieces.iter().map(|piece| stops.push(piece)).collect();
        out.push_str(&stops.finish());
        (out, stops.found())
    }

    #[test]
    fn a_stop_sequence_is_found_across_pieces_and_never_let_out() {
        for (sequences, pieces, out, found) in [
            (&["END"][..], &["one E", "N", "D two"][..], "one ", true),
            (&["END"], &["one E", "N", "X"], "one ENX", false),
            (&["\n\n"], &["a\n", "\nb"], "a", true),
            (&["aab"], &["aa", "ab"], "a", true),
            (&["later", "at"], &["l", "ater"], "", true),
            (&["\u{e9}t\u{e9}"], &["un \u{e9}", "t", "\u{e9}"], "un ", true),
            (&[], &["as it is"], "as it is", false),
        ] {
            assert_eq!(run(sequences, pieces), (out.to_owned(), found), "{sequences:?} in {pieces:?}");
        }
    }

    proptest! {
        #[test]
        fn pieces_change_nothing(text in "[ab\u{e9}]{0,20}", stops in prop::collection::vec("[ab\u{e9}]{1,4}", 0..4)) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let pieces: Vec<String> = text.chars().map(String::from).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            prop_assert_eq!(run(&stops, &pieces).0.len() <= text.len(), true);
            // In one piece the earliest wins; in many, the first to be complete.
            let (whole, found) = run(&stops, &[&text]);
            let (pieced, found_too) = run(&stops, &pieces);
            prop_assert_eq!(found, found_too);
            if !found {
                prop_assert_eq!(whole, pieced);
            }
        }
    }
}
