//! `kvkeep prefixes`: the tree of what requests to a server had in common.

use std::collections::HashMap;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use comfy_table::{Cell, CellAlignment};
use serde::Deserialize;

use super::{Client, ServerOptions};
use crate::style::{self, count};

/// Characters of a branch's text in the table.
const TEXT_CHARS: usize = 48;

/// Shows which prefixes requests to a running server had in common.
///
/// A line is a branch: tokens that requests went through, and how many did. What is indented
/// below it are its continuations. The hottest come first; ids are shown whole with --json.
#[derive(Debug, Args)]
pub(crate) struct PrefixesOptions {
    #[command(flatten)]
    server: ServerOptions,
    /// At most so many branches, the most used ones
    #[arg(long, value_name = "N", default_value = "40", value_parser = clap::value_parser!(u16).range(1..=4096))]
    limit: u16,
}

#[derive(Debug, Deserialize)]
struct Prefixes {
    prefixes: Vec<Prefix>,
}

#[derive(Debug, Deserialize)]
struct Prefix {
    id: String,
    parent: Option<String>,
    tenant: Option<String>,
    tokens: u64,
    requests: u64,
    ram_tokens: u64,
    disk_tokens: u64,
    pinned: bool,
    text: String,
}

pub(crate) fn run(options: &PrefixesOptions) -> Result<ExitCode> {
    let client = Client::new(&options.server)?;
    let path = format!("/cache/prefixes?limit={}", options.limit);
    let answer = client.get(&path)?;
    if options.server.json {
        style::say(&serde_json::to_string_pretty(&answer)?)?;
    } else {
        style::say(&client.shaped::<Prefixes>(&path, &answer)?.table())?;
    }
    Ok(ExitCode::SUCCESS)
}

impl Prefixes {
    fn table(&self) -> String {
        let mut children: HashMap<Option<&str>, Vec<&Prefix>> = HashMap::new();
        for prefix in &self.prefixes {
            children.entry(prefix.parent.as_deref()).or_default().push(prefix);
        }
        let mut table = style::table();
        table.set_header(["prefix", "requests", "tokens", "RAM", "disk", "whose", "text"]);
        // Depth first, with a stack: a tree may be deeper than a thread's own.
        let mut open: Vec<(usize, &Prefix)> =
            children.remove(&None).into_iter().flatten().map(|root| (0, root)).collect();
        open.reverse();
        while let Some((depth, prefix)) = open.pop() {
            table.add_row(prefix.cells(depth));
            let below = children.remove(&Some(prefix.id.as_str())).unwrap_or_default();
            open.extend(below.into_iter().rev().map(|child| (depth + 1, child)));
        }
        table.to_string()
    }
}

impl Prefix {
    fn cells(&self, depth: usize) -> [Cell; 7] {
        let number = |number: u64| Cell::new(count(number)).set_alignment(CellAlignment::Right);
        let pinned = if self.pinned { " pinned" } else { "" };
        let text: String =
            self.text.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(TEXT_CHARS).collect();
        [
            Cell::new(format!("{}{}{pinned}", "  ".repeat(depth), self.id.get(..12).unwrap_or(&self.id))),
            number(self.requests),
            number(self.tokens),
            number(self.ram_tokens),
            number(self.disk_tokens),
            Cell::new(self.tenant.as_deref().unwrap_or("operator")),
            Cell::new(text),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix(id: &str, parent: Option<&str>) -> Prefix {
        Prefix {
            id: id.repeat(64),
            parent: parent.map(|parent| parent.repeat(64)),
            tenant: None,
            tokens: 16,
            requests: 1,
            ram_tokens: 16,
            disk_tokens: 0,
            pinned: id == "b",
            text: format!("text of\n {id}"),
        }
    }

    #[test]
    fn continuations_stand_below_their_branch() {
        let prefixes = [prefix("a", None), prefix("d", None), prefix("b", Some("a")), prefix("c", Some("b"))];
        let table = Prefixes { prefixes: prefixes.into() }.table();
        let at = |text: &str| table.find(text).unwrap_or_else(|| panic!("{text} is not in\n{table}"));
        assert!(at(" aaaaaaaaaaaa ") < at("   bbbbbbbbbbbb pinned"));
        assert!(at("bbbbbbbbbbbb") < at("     cccccccccccc"));
        assert!(at("cccccccccccc") < at("dddddddddddd"));
        assert!(table.contains("text of a"));
    }
}
