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
/// The file holds chat messages as JSON (an array, or an object with messages as clients send it)
/// or else plain text, as /v1/completions takes it.
#[derive(Debug, Args)]
pub(crate) struct WarmOptions {
    /// The prompt; - is standard input
    #[arg(value_name = "FILE")]
    file: PathBuf,
    #[command(flatten)]
    server: ServerOptions,
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
    let mut body = prompt(&read(&options.file)?, &options.file)?;
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

/// Messages if it is JSON of that shape, else the text as it is.
fn prompt(text: &str, file: &Path) -> Result<Map<String, Value>> {
    if text.trim().is_empty() {
        bail!("the prompt in {} is empty", file.display());
    }
    let body = |field: &str, value| Ok(Map::from_iter([(field.to_owned(), value)]));
    match serde_json::from_str::<Value>(text) {
        Ok(messages @ Value::Array(_)) => body("messages", messages),
        Ok(Value::Object(mut fields)) if fields.contains_key("messages") => {
            body("messages", fields.remove("messages").unwrap_or_default())
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
            prompt(text, Path::new(file)).map(Value::Object).map_err(|error| format!("{error:#}"))
        };
        let messages = json!([{"role": "user", "content": "a"}]);
        assert_eq!(of(&messages.to_string(), "-").unwrap(), json!({"messages": messages}));
        let request = json!({"messages": messages, "model": "m"}).to_string();
        assert_eq!(of(&request, "a.json").unwrap(), json!({"messages": messages}));
        assert_eq!(of("You are\n", "-").unwrap(), json!({"prompt": "You are\n"}));
        assert_eq!(of("{\"a\": 1}", "-").unwrap(), json!({"prompt": "{\"a\": 1}"}));
        assert!(of("[{", "a.JSON").unwrap_err().contains("is not JSON"));
        assert!(of(" \n", "-").unwrap_err().contains("empty"));
    }
}
