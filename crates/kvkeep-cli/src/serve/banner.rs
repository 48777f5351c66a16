//! What a server says of itself at its start, on standard error: where it is, and what it may use.

use std::net::SocketAddr;
use std::path::Path;

use kvkeep_server::KvEvents;

use super::settings::Settings;
use crate::style::{count, size};

/// What is said.
pub(super) struct Banner<'a> {
    pub(super) settings: &'a Settings,
    pub(super) address: SocketAddr,
    pub(super) model: &'a str,
    /// Of a prompt and its answer together, as it is and as it was asked for.
    pub(super) context_tokens: usize,
    pub(super) asked_tokens: usize,
    pub(super) weights_bytes: usize,
    pub(super) ram_bytes: u64,
    /// The disk tier's directory and cap.
    pub(super) disk: Option<(&'a Path, u64)>,
    /// Where routers are told which blocks come and go.
    pub(super) events: Option<&'a KvEvents>,
}

impl Banner<'_> {
    pub(super) fn text(&self) -> String {
        let Self { settings, address, model, .. } = self;
        let cut = if self.context_tokens < self.asked_tokens {
            format!(" (all that the model can; {} were asked for)", count(self.asked_tokens as u64))
        } else {
            String::new()
        };
        let context = count(self.context_tokens as u64);
        let aliases = settings.model_alias.iter().flatten().map(String::as_str).collect::<Vec<_>>().join(", ");
        let also = if aliases.is_empty() { aliases } else { format!(", also called {aliases}") };
        let disk = match self.disk {
            Some((dir, bytes)) => format!("{} in {}", size(bytes), dir.display()),
            None => "no disk".to_owned(),
        };
        let remote = match &settings.remote {
            Some(url) => format!(", shared through {}", without_login(url)),
            None => String::new(),
        };
        let daemon =
            settings.daemon.as_ref().map_or_else(String::new, |socket| format!(", the daemon at {}", socket.display()));
        let keys = match &settings.api_key_file {
            Some(file) => format!("those in {}", file.display()),
            None => "none: everybody on this machine is the operator".to_owned(),
        };
        let weights = size(self.weights_bytes as u64);
        let lines = [
            ("model", format!("{model}{also}, {weights} of weights in memory")),
            ("context", format!("{context} tokens{cut}")),
            ("API", format!("http://{address}/v1")),
            ("dashboard", format!("http://{address}/")),
            ("cache", format!("{} of RAM, {disk}{daemon}{remote}", size(self.ram_bytes))),
            ("keys", keys),
        ];
        let events = self.events.map(|events| ("KV events", published(events)));
        lines.into_iter().chain(events).map(|(name, value)| format!("  {name:<10} {value}\n")).collect()
    }
}

/// A URL without its user and password.
fn without_login(url: &str) -> String {
    match (url.split_once("://"), url.rsplit_once('@')) {
        (Some((scheme, _)), Some((_, rest))) => format!("{scheme}://{rest}"),
        _ => url.to_owned(),
    }
}

fn published(events: &KvEvents) -> String {
    let replay = events.replay_address().map(|address| format!(", those that were missed at tcp://{address}"));
    format!("tcp://{}{}", events.address(), replay.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn banner(settings: &Settings) -> Banner<'_> {
        Banner {
            settings,
            address: "127.0.0.1:8080".parse().unwrap(),
            model: "small",
            context_tokens: 8192,
            asked_tokens: 8192,
            weights_bytes: 3 << 20,
            ram_bytes: 1 << 30,
            disk: Some((Path::new("/cache"), 8 << 30)),
            events: None,
        }
    }

    /// `--context-tokens` beyond what the model can was cut without a word.
    #[test]
    fn a_context_that_was_cut_says_so() {
        let settings = Settings::default();
        assert!(!banner(&settings).text().contains("asked for"));
        let cut = Banner { asked_tokens: 100_000, ..banner(&settings) }.text();
        assert!(cut.contains("8,192 tokens (all that the model can; 100,000 were asked for)"), "{cut}");
    }

    #[test]
    fn it_names_the_store_that_is_shared_and_not_the_password() {
        let url = "rediss://me:secret@store:6379/1".to_owned();
        let text = banner(&Settings { remote: Some(url), ..Settings::default() }).text();
        assert!(text.contains("shared through rediss://store:6379/1") && !text.contains("secret"), "{text}");
    }

    #[test]
    fn it_says_where_the_server_is_and_what_it_may_use() {
        let settings = Settings { model_alias: Some(vec!["gpt-4o".to_owned()]), ..Settings::default() };
        let text = banner(&settings).text();
        for part in [
            "small, also called gpt-4o, 3.0 MiB of weights",
            "http://127.0.0.1:8080/v1",
            "1.0 GiB of RAM, 8.0 GiB in /cache",
            "everybody on this machine is the operator",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        assert!(Banner { disk: None, ..banner(&settings) }.text().contains("1.0 GiB of RAM, no disk"));
    }
}
