//! `kvkeep prefixes`: the tree of what requests to a server had in common.

use std::collections::HashMap;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use comfy_table::{Cell, CellAlignment};
use serde::Deserialize;

use super::{Client, ServerOptions, TokensIn, tier_name};
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
struct Tree {
    prefixes: Vec<Branch>,
}

#[derive(Debug, Deserialize)]
struct Branch {
    id: String,
    parent: Option<String>,
    tenant: Option<String>,
    tokens: u64,
    requests: u64,
    tiers: Vec<TokensIn>,
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
        style::say(&client.shaped::<Tree>(&path, &answer)?.table())?;
    }
    Ok(ExitCode::SUCCESS)
}

impl Tree {
    fn table(&self) -> String {
        let mut children: HashMap<Option<&str>, Vec<&Branch>> = HashMap::new();
        for prefix in &self.prefixes {
            children.entry(prefix.parent.as_deref()).or_default().push(prefix);
        }
        let mut table = style::table();
        let tiers = self.tiers();
        let names = tiers.iter().map(|name| tier_name(name));
        table.set_header(["prefix", "requests", "tokens"].into_iter().chain(names).chain(["whose", "text"]));
        // Depth first, with a stack: a tree may be deeper than a thread's own.
        let mut open: Vec<(usize, &Branch)> =
            children.remove(&None).into_iter().flatten().map(|root| (0, root)).collect();
        open.reverse();
        while let Some((depth, prefix)) = open.pop() {
            table.add_row(prefix.cells(depth, &tiers));
            let below = children.remove(&Some(prefix.id.as_str())).unwrap_or_default();
            open.extend(below.into_iter().rev().map(|child| (depth + 1, child)));
        }
        table.to_string()
    }

    /// The names of all tiers, in their order.
    fn tiers(&self) -> Vec<&str> {
        let mut names = Vec::new();
        for tier in self.prefixes.iter().flat_map(|branch| &branch.tiers) {
            if !names.contains(&tier.name.as_str()) {
                names.push(tier.name.as_str());
            }
        }
        names
    }
}

impl Branch {
    fn cells(&self, depth: usize, tiers: &[&str]) -> Vec<Cell> {
        let number = |number: u64| Cell::new(count(number)).set_alignment(CellAlignment::Right);
        let pinned = if self.pinned { " pinned" } else { "" };
        let text: String =
            self.text.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(TEXT_CHARS).collect();
        let tokens_in = |name: &&str| {
            let of = self.tiers.iter().find(|tier| tier.name == **name);
            number(of.map_or(0, |tier| tier.tokens))
        };
        let mut cells = vec![
            Cell::new(format!("{}{}{pinned}", "  ".repeat(depth), self.id.get(..12).unwrap_or(&self.id))),
            number(self.requests),
            number(self.tokens),
        ];
        cells.extend(tiers.iter().map(tokens_in));
        cells.extend([Cell::new(self.tenant.as_deref().unwrap_or("operator")), Cell::new(text)]);
        cells
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix(id: &str, parent: Option<&str>) -> Branch {
        Branch {
            id: id.repeat(64),
            parent: parent.map(|parent| parent.repeat(64)),
            tenant: None,
            tokens: 16,
            requests: 1,
            tiers: [("ram", 16), ("disk", 12)].map(|(name, tokens)| TokensIn { name: name.to_owned(), tokens }).into(),
            pinned: id == "b",
            text: format!("text of\n {id}"),
        }
    }

    #[test]
    fn continuations_stand_below_their_branch() {
        let prefixes = [prefix("a", None), prefix("d", None), prefix("b", Some("a")), prefix("c", Some("b"))];
        let table = Tree { prefixes: prefixes.into() }.table();
        let at = |text: &str| table.find(text).unwrap_or_else(|| panic!("{text} is not in\n{table}"));
        assert!(at(" aaaaaaaaaaaa ") < at("   bbbbbbbbbbbb pinned"));
        assert!(at("bbbbbbbbbbbb") < at("     cccccccccccc"));
        assert!(at("cccccccccccc") < at("dddddddddddd"));
        assert!(table.contains("text of a"));
    }

    /// The column said 0 for what was in RAM, too.
    #[test]
    fn each_tier_has_a_column_with_what_it_has() {
        let table = Tree { prefixes: vec![prefix("a", None)] }.table();
        let lines: Vec<&str> = table.lines().collect();
        assert!(lines.iter().any(|line| line.contains("RAM") && line.contains("disk")), "{table}");
        let row = lines.iter().find(|line| line.contains("aaaa")).unwrap();
        let numbers: Vec<&str> =
            row.split(|letter: char| !letter.is_ascii_digit()).filter(|part| !part.is_empty()).collect();
        assert_eq!(numbers, ["1", "16", "16", "12"], "{table}");
    }
}
