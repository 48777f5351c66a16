//! `kvkeep clear`: removes everything that a server has cached, or one namespace.

use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Client, Namespace, Namespaces, ServerOptions, confirmed};
use crate::style::{self, count, size};

/// Removes everything that a running server has cached, or one namespace.
#[derive(Debug, Args)]
pub(crate) struct ClearOptions {
    #[command(flatten)]
    server: ServerOptions,
    /// Only the namespace whose id begins with these hexadecimal digits
    #[arg(long, value_name = "HEX", value_parser = crate::cli::hex_digits)]
    namespace: Option<String>,
    /// Do not ask first
    #[arg(long)]
    yes: bool,
}

#[derive(Debug, Deserialize)]
struct Removed {
    entries: u64,
    bytes: u64,
}

pub(crate) fn run(options: &ClearOptions) -> Result<ExitCode> {
    let client = Client::new(&options.server)?;
    let all: Namespaces = client.shaped("/cache/namespaces", &client.get("/cache/namespaces")?)?;
    let chosen = match &options.namespace {
        Some(digits) => vec![one(&all.namespaces, digits)?],
        None => all.namespaces.iter().collect(),
    };
    if !options.yes && !confirmed(&what(&chosen, options.namespace.is_some()))? {
        bail!("nothing was removed");
    }
    let body = match (&options.namespace, chosen.first()) {
        (Some(_), Some(namespace)) => json!({"namespace": namespace.id}),
        _ => json!({}),
    };
    say(&client, &client.post("/cache/clear", &body)?, options.server.json)?;
    Ok(ExitCode::SUCCESS)
}

/// The only namespace whose id begins with these digits.
fn one<'a>(all: &'a [Namespace], digits: &str) -> Result<&'a Namespace> {
    let mut found = all.iter().filter(|namespace| namespace.id.starts_with(digits));
    match (found.next(), found.next()) {
        (Some(namespace), None) => Ok(namespace),
        (None, _) => bail!("the server has no namespace whose id begins with {digits}: kvkeep stats lists them"),
        _ => bail!("the ids of several namespaces begin with {digits}: give more digits"),
    }
}

fn what(chosen: &[&Namespace], one: bool) -> String {
    let mut tiers: Vec<(&str, u64, u64)> = Vec::new();
    for of in chosen.iter().flat_map(|namespace| &namespace.tiers) {
        match tiers.iter_mut().find(|(name, ..)| *name == of.name) {
            Some((_, entries, bytes)) => (*entries, *bytes) = (*entries + of.entries, *bytes + of.bytes),
            None => tiers.push((&of.name, of.entries, of.bytes)),
        }
    }
    let amount = |(number, (name, entries, bytes)): (usize, &(&str, u64, u64))| {
        let blocks = if number == 0 { " blocks" } else { "" };
        format!("{}{blocks} {} ({})", count(*entries), place(name), size(*bytes))
    };
    let amounts: Vec<String> = tiers.iter().enumerate().map(amount).collect();
    let subject = match (one, chosen.first()) {
        (true, Some(namespace)) => format!("namespace {}", namespace.id.get(..12).unwrap_or(&namespace.id)),
        _ => "everything".to_owned(),
    };
    format!("Remove {subject}: {}?", amounts.join(", "))
}

fn place(tier: &str) -> String {
    match tier {
        "ram" => "in RAM".to_owned(),
        "disk" => "on the disk".to_owned(),
        other => format!("in {other}"),
    }
}

fn say(client: &Client, answer: &Value, json: bool) -> Result<()> {
    if json {
        return style::say(&serde_json::to_string_pretty(answer)?);
    }
    let removed: Removed = client.shaped("/cache/clear", answer)?;
    style::say(&format!("{} blocks removed, {} of RAM freed", count(removed.entries), size(removed.bytes)))
}

#[cfg(test)]
mod tests {
    use super::super::Usage;
    use super::*;

    fn namespace(id: &str) -> Namespace {
        let usage = |name: &str, blocks| Usage { name: name.to_owned(), entries: blocks, bytes: blocks << 10 };
        let tiers = vec![usage("ram", 2), usage("disk", 3), usage("redis", 1)];
        Namespace { id: id.to_owned(), tenant: None, cache_salt: false, known: true, tiers }
    }

    #[test]
    fn a_namespace_is_named_by_digits_that_only_it_has() {
        let all = [namespace("abc"), namespace("abd")];
        assert_eq!(one(&all, "abd").unwrap().id, "abd");
        assert!(one(&all, "ab").unwrap_err().to_string().contains("give more digits"));
        assert!(one(&all, "c").unwrap_err().to_string().contains("no namespace"));
    }

    #[test]
    fn who_is_asked_reads_how_much_would_go() {
        let all = [namespace("abc"), namespace("abd")];
        let question = what(&all.iter().collect::<Vec<_>>(), false);
        assert_eq!(
            question,
            "Remove everything: 4 blocks in RAM (4.0 KiB), 6 on the disk (6.0 KiB), 2 in redis (2.0 KiB)?"
        );
        assert!(what(&[&all[0]], true).starts_with("Remove namespace abc: 2 blocks"));
    }
}
