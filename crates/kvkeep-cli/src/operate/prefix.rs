//! `kvkeep pin`, `unpin` and `remove`: one prefix of a running server.

use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Client, ServerOptions, confirmed};
use crate::style::{self, count, size};

/// Digits of a whole id.
const ID_DIGITS: usize = 64;
/// As many branches as a server tells of.
const PREFIXES: &str = "/cache/prefixes?limit=4096";

/// Keeps a prefix in RAM, or lets it go, in a running server.
#[derive(Debug, Args)]
pub(crate) struct PrefixOptions {
    /// The prefix whose id begins with these hexadecimal digits, as prefixes and warm print it
    #[arg(value_name = "HEX", value_parser = crate::cli::hex_digits)]
    prefix: String,
    #[command(flatten)]
    server: ServerOptions,
}

/// Removes a prefix from a running server's cache, and all that is behind it.
#[derive(Debug, Args)]
pub(crate) struct RemoveOptions {
    #[command(flatten)]
    prefix: PrefixOptions,
    /// Do not ask first
    #[arg(long)]
    yes: bool,
}

/// Of the answer, the ids.
#[derive(Debug, Deserialize)]
struct Ids {
    prefixes: Vec<Named>,
}

#[derive(Debug, Deserialize)]
struct Named {
    id: String,
}

#[derive(Debug, Deserialize)]
struct Removed {
    entries: u64,
    bytes: u64,
}

pub(crate) fn pin(options: &PrefixOptions) -> Result<ExitCode> {
    let (client, id) = options.open()?;
    options.say(&client.post("/cache/pin", &json!({"prefix": id}))?, &format!("pinned {id}"))
}

pub(crate) fn unpin(options: &PrefixOptions) -> Result<ExitCode> {
    let (client, id) = options.open()?;
    options.say(&client.post("/cache/unpin", &json!({"prefix": id}))?, &format!("unpinned {id}"))
}

pub(crate) fn remove(options: &RemoveOptions) -> Result<ExitCode> {
    let (client, id) = options.prefix.open()?;
    if !options.yes && !confirmed(&format!("Remove prefix {id} and all that is behind it?"))? {
        bail!("nothing was removed");
    }
    let answer = client.post("/cache/remove", &json!({"prefix": id}))?;
    let removed: Removed = client.shaped("/cache/remove", &answer)?;
    let words = format!("{} blocks removed, {} of RAM freed", count(removed.entries), size(removed.bytes));
    options.prefix.say(&answer, &words)
}

impl PrefixOptions {
    /// The server, and the whole id of the prefix that is meant.
    fn open(&self) -> Result<(Client, String)> {
        let client = Client::new(&self.server)?;
        if self.prefix.len() == ID_DIGITS {
            return Ok((client, self.prefix.clone()));
        }
        let all: Ids = client.shaped(PREFIXES, &client.get(PREFIXES)?)?;
        let id = one(&all.prefixes, &self.prefix)?;
        Ok((client, id))
    }

    fn say(&self, answer: &Value, words: &str) -> Result<ExitCode> {
        if self.server.json {
            style::say(&serde_json::to_string_pretty(answer)?)?;
        } else {
            style::say(words)?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// The only prefix whose id begins with these digits.
fn one(all: &[Named], digits: &str) -> Result<String> {
    let mut found = all.iter().filter(|prefix| prefix.id.starts_with(digits));
    match (found.next(), found.next()) {
        (Some(prefix), None) => Ok(prefix.id.clone()),
        (None, _) => bail!("the server has no prefix whose id begins with {digits}: kvkeep prefixes lists them"),
        _ => bail!("the ids of several prefixes begin with {digits}: give more digits"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_is_named_by_digits_that_only_it_has() {
        let all = ["abc", "abd"].map(|id| Named { id: id.to_owned() });
        assert_eq!(one(&all, "abd").unwrap(), "abd");
        assert!(one(&all, "ab").unwrap_err().to_string().contains("give more digits"));
        assert!(one(&all, "c").unwrap_err().to_string().contains("no prefix"));
    }
}
