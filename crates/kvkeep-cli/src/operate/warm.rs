//! `kvkeep warm`: has a server read a prompt before anybody asks with it.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{Client, ServerOptions};
use crate::style::{self, count};

/// Has a running server read a prompt, so that the first request with it is warm.
///
/// The file holds chat messages as JSON (an array, or an object with messages or a prompt, as clients
/// send it) or else plain text: with --system the system prompt of chats, without it a prompt of
/// /v1/completions, which chats do not begin with.
#[derive(Debug, Args)]
pub(crate) struct WarmOptions {
    /// The prompt; - is standard input
    #[arg(value_name = "FILE")]
    file: PathBuf,
    #[command(flatten)]
    server: ServerOptions,
    /// The text is the system prompt of chats
    #[arg(long)]
    system: bool,
    /// The salt that those who will ask send
    #[arg(long, value_name = "SALT")]
    cache_salt: Option<String>,
    /// The tenant whose key those who will ask have [default: the operator]
    #[arg(long, value_name = "NAME")]
    tenant: Option<String>,
    /// Keep it in RAM until it is unpinned
    #[arg(long)]
    pin: bool,
}

#[derive(Debug, Deserialize)]
struct Answer {
    prompt_tokens: u64,
    cached_tokens: u64,
    computed_tokens: u64,
    seconds: f64,
    prefix: Option<String>,
}

pub(crate) fn run(options: &WarmOptions) -> Result<ExitCode> {
    let client = Client::new(&options.server)?;
    let mut body = prompt(&read(&options.file)?, &options.file, options.system)?;
    if body.contains_key("prompt") {
        eprintln!("kvkeep: this warms /v1/completions; for the system prompt of chats give --system");
    }
    for (field, value) in [("cache_salt", &options.cache_salt), ("tenant", &options.tenant)] {
        if let Some(value) = value {
            body.insert(field.to_owned(), json!(value));
        }
    }
    body.insert("pin".to_owned(), json!(options.pin));
    let answer = client.post("/cache/warm", &Value::Object(body))?;
    if options.server.json {
        style::say(&serde_json::to_string_pretty(&answer)?)?;
    } else {
        style::say(&client.shaped::<Answer>("/cache/warm", &answer)?.words(options.pin))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn read(file: &Path) -> Result<String> {
    if file.as_os_str() != "-" {
        return std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()));
    }
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).context("cannot read standard input as text")?;
    Ok(text)
}

fn called(file: &Path) -> String {
    if file.as_os_str() == "-" { "standard input".to_owned() } else { file.display().to_string() }
}

/// Messages or a prompt if it is JSON of that shape, else the text as it is.
fn prompt(text: &str, file: &Path, system: bool) -> Result<Map<String, Value>> {
    if text.trim().is_empty() {
        bail!("the prompt in {} is empty", called(file));
    }
    let body = |field: &str, value| Ok(Map::from_iter([(field.to_owned(), value)]));
    match serde_json::from_str::<Value>(text) {
        // As clients send a system prompt: without the end of a text file's last line.
        _ if system => body("messages", json!([{"role": "system", "content": text.trim_end_matches(['\r', '\n'])}])),
        Ok(messages @ Value::Array(_)) => body("messages", messages),
        Ok(Value::Object(mut fields)) => {
            let found = ["messages", "prompt"].into_iter().find_map(|name| Some((name, fields.remove(name)?)));
            let Some((name, value)) = found else {
                bail!("what is in {} is a JSON object with neither messages nor a prompt in it", called(file));
            };
            body(name, value)
        }
        Err(error) if file.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json")) => {
            Err(error).with_context(|| format!("{} is not JSON", file.display()))
        }
        _ => body("prompt", text.into()),
    }
}

impl Answer {
    fn words(&self, pinned: bool) -> String {
        let [all, cached, computed] = [self.prompt_tokens, self.cached_tokens, self.computed_tokens].map(count);
        let prefix = match (&self.prefix, pinned) {
            (Some(prefix), true) => format!("pinned as {prefix}"),
            (Some(prefix), false) => format!("prefix {prefix}"),
            (None, _) => "it is shorter than a block: there is nothing to keep".to_owned(),
        };
        format!("{all} tokens: {cached} were cached, {computed} computed in {:.1} s; {prefix}", self.seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_messages_and_all_else_is_text() {
        let of = |text: &str, file: &str| {
            prompt(text, Path::new(file), false).map(Value::Object).map_err(|error| format!("{error:#}"))
        };
        let messages = json!([{"role": "user", "content": "a"}]);
        assert_eq!(of(&messages.to_string(), "-").unwrap(), json!({"messages": messages}));
        let request = json!({"messages": messages, "model": "m"}).to_string();
        assert_eq!(of(&request, "a.json").unwrap(), json!({"messages": messages}));
        assert_eq!(of("You are\n", "-").unwrap(), json!({"prompt": "You are\n"}));
        assert_eq!(of("{\"prompt\": \"a\", \"n\": 1}", "-").unwrap(), json!({"prompt": "a"}));
        assert!(of("{\"a\": 1}", "-").unwrap_err().contains("neither messages nor a prompt"));
        assert!(of("[{", "a.JSON").unwrap_err().contains("is not JSON"));
        assert!(of(" \n", "-").unwrap_err().contains("empty"));
    }

    /// A text file with a system prompt was warmed as a prompt that no chat begins with, and reported as done.
    #[test]
    fn a_system_prompt_is_warmed_as_chats_begin_with_it() {
        let body = prompt("You are\n{\"kind\": 1}\n", Path::new("-"), true).unwrap();
        assert_eq!(Value::Object(body), json!({"messages": [{"role": "system", "content": "You are\n{\"kind\": 1}"}]}));
    }
}
