//! A running server, as its operator sees and changes it: `stats`, `prefixes`, `warm`, `pin`, `unpin`, `remove`,
//! `clear`.
//!
//! Invariant: what fails says whether nobody answers, somebody else does, or the key is wrong.
//! Proxies of the environment are not used: the key goes to the server and nowhere else.

mod clear;
mod prefix;
mod prefixes;
mod stats;
mod warm;

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use ureq::Agent;

pub(crate) use clear::{ClearOptions, run as clear};
pub(crate) use prefix::{PrefixOptions, RemoveOptions, pin, remove, unpin};
pub(crate) use prefixes::{PrefixesOptions, run as prefixes};
pub(crate) use stats::{StatsOptions, run as stats};
pub(crate) use warm::{WarmOptions, run as warm};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// An answer of the server, at most: thousands of prefixes with their texts.
const ANSWER_BYTES: u64 = 64 << 20;

/// Which server, and how its answer is shown.
#[derive(Debug, Args)]
pub(crate) struct ServerOptions {
    /// Where the server listens
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8080", value_parser = url)]
    url: String,
    /// A file with the operator's key, in its first line without a tenant [default: the key in `KVKEEP_API_KEY`]
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Print the server's JSON instead of a table
    #[arg(long)]
    json: bool,
}

/// A server that is asked.
struct Client {
    agent: Agent,
    url: String,
    key: Option<String>,
}

/// An error as the server says it.
#[derive(Debug, Deserialize)]
struct ErrorBody {
    error: ErrorDetail,
}

#[derive(Debug, Deserialize)]
struct ErrorDetail {
    message: String,
}

/// What `/cache/namespaces` answers.
#[derive(Debug, Deserialize)]
struct Namespaces {
    namespaces: Vec<Namespace>,
}

#[derive(Debug, Deserialize)]
struct Namespace {
    id: String,
    tenant: Option<String>,
    cache_salt: bool,
    known: bool,
    /// `ram` first.
    tiers: Vec<Usage>,
}

#[derive(Debug, Deserialize)]
struct Usage {
    name: String,
    entries: u64,
    bytes: u64,
}

/// What a tier has of a branch, or gave of prompts.
#[derive(Debug, Deserialize)]
struct TokensIn {
    name: String,
    tokens: u64,
}

/// What people call a tier.
fn tier_name(name: &str) -> &str {
    if name == "ram" { "RAM" } else { name }
}

impl Client {
    fn new(options: &ServerOptions) -> Result<Self> {
        let config = Agent::config_builder().http_status_as_error(false).proxy(None);
        let config = config.timeout_connect(Some(CONNECT_TIMEOUT)).max_redirects(0).build();
        Ok(Self { agent: Agent::new_with_config(config), url: options.url.clone(), key: options.key()? })
    }

    fn get(&self, path: &str) -> Result<Value> {
        let mut request = self.agent.get(format!("{}{path}", self.url));
        if let Some(key) = &self.key {
            request = request.header("Authorization", format!("Bearer {key}"));
        }
        self.read(path, request.call())
    }

    fn post(&self, path: &str, body: &Value) -> Result<Value> {
        let mut request = self.agent.post(format!("{}{path}", self.url)).content_type("application/json");
        if let Some(key) = &self.key {
            request = request.header("Authorization", format!("Bearer {key}"));
        }
        self.read(path, request.send(body.to_string()))
    }

    fn read(&self, path: &str, answer: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Result<Value> {
        let url = &self.url;
        let mut answer = answer.map_err(|error| {
            anyhow!("no server answers at {url} ({error}): start one with kvkeep serve, or give its address with --url")
        })?;
        let status = answer.status().as_u16();
        let text = answer.body_mut().with_config().limit(ANSWER_BYTES).read_to_string();
        let text = text.with_context(|| format!("the answer of {url} broke off"))?;
        let body = serde_json::from_str::<Value>(&text).ok();
        let message = body.as_ref().and_then(|body| ErrorBody::deserialize(body).ok()).map(|body| body.error.message);
        match (status, body, message) {
            (200, Some(body), _) => Ok(body),
            (401 | 403, _, Some(message)) => {
                bail!("{message}; this command takes it from --api-key-file or KVKEEP_API_KEY")
            }
            (_, _, Some(message)) => bail!("{message}"),
            _ => bail!("what answers at {url} is no kvkeep server: {path} gave status {status} and not kvkeep's JSON"),
        }
    }

    /// The server's answer in the shape that this version knows.
    fn shaped<T: DeserializeOwned>(&self, path: &str, body: &Value) -> Result<T> {
        T::deserialize(body).with_context(|| {
            format!("what answers at {} is no kvkeep server, or one of another version ({path})", self.url)
        })
    }
}

impl ServerOptions {
    fn key(&self) -> Result<Option<String>> {
        let Some(file) = &self.api_key_file else {
            return Ok(std::env::var("KVKEEP_API_KEY").ok().filter(|key| !key.is_empty()));
        };
        let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        operators_key(&text).map(Some).ok_or_else(|| {
            let file = file.display();
            anyhow!("there is no operator's key in {file}: a line with a key and no tenant behind it")
        })
    }
}

/// The first key without a tenant, so that the server's own file does too.
fn operators_key(text: &str) -> Option<String> {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.into_iter().find(|line| line.split_whitespace().count() == 1).map(str::to_owned)
}

/// Asks before something is removed.
fn confirmed(question: &str) -> Result<bool> {
    if !std::io::stdin().is_terminal() {
        bail!("nobody can be asked whether to remove it: give --yes");
    }
    eprint!("{question} [y/N] ");
    std::io::stderr().flush().context("cannot ask")?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer).context("cannot read the answer")?;
    Ok(matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes"))
}

/// Without a scheme it is http, the only one that the server speaks.
fn url(text: &str) -> Result<String, String> {
    let host = match text.split_once("://") {
        None => text,
        Some(("http", host)) => host,
        Some(("https", _)) => {
            return Err("https is not supported: give the server's own address, such as 127.0.0.1:8080".to_owned());
        }
        Some(_) => "",
    };
    let host = host.trim_end_matches('/');
    if host.is_empty() || host.contains(char::is_whitespace) {
        return Err("give an address such as http://127.0.0.1:8080".to_owned());
    }
    Ok(format!("http://{host}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_operators_key_is_the_first_without_a_tenant() {
        assert_eq!(operators_key("# ours\n\nabc alice\n  def \nghi\n").as_deref(), Some("def"));
        assert_eq!(operators_key("# abc\nabc alice\n"), None);
    }

    #[test]
    fn addresses_are_http_and_lose_their_last_slash() {
        for text in ["http://127.0.0.1:8080/", "127.0.0.1:8080", "127.0.0.1:8080/"] {
            assert_eq!(url(text).unwrap(), "http://127.0.0.1:8080", "{text}");
        }
        for wrong in ["", "http://", "/", "http://a b", "a b", "ftp://a"] {
            assert!(url(wrong).unwrap_err().contains("such as"), "{wrong}");
        }
        assert!(url("https://a").unwrap_err().contains("https is not supported"));
    }
}
