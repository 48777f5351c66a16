//! A running `kvkeep serve`, and the commands that its operator has.

#![expect(clippy::unwrap_used, reason = "a test that panics fails")]

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Output, Stdio};

use kvkeep_engine::{default_model_path, user_cache_dir};
use serde_json::{Value, json};

/// A server; dropping it ends it.
struct Serving {
    process: Child,
    /// What it said before it listened.
    banner: String,
    /// Without http://.
    address: String,
}

impl Serving {
    /// `None`, after saying so, if the default model cannot be had; on CI that is a failure.
    fn start(flags: &[&str]) -> Option<Self> {
        if let Err(error) = user_cache_dir().and_then(|dir| default_model_path(&dir, &mut |_, _| ())) {
            assert!(std::env::var_os("CI").is_none(), "the default model cannot be had: {error}");
            eprintln!("SKIPPED: the default model cannot be had: {error}");
            return None;
        }
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvkeep"));
        command
            .args(["serve", "--port=0", "--no-disk", "--parallel=1", "--ram-gib=0.1", "--log-level=warn"])
            .args(flags);
        let mut process = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let mut banner = String::new();
        let address = loop {
            let line = lines.next().unwrap().unwrap();
            if let Some((_, address)) = line.split_once("listening at http://") {
                break address.to_owned();
            }
            banner += &format!("{line}\n");
        };
        Some(Self { process, banner, address })
    }

    /// A command that asks this server, with something on its standard input.
    fn ask(&self, arguments: &[&str], input: &str) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvkeep"));
        command.args(arguments).args(["--url", &self.address]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = command.spawn().unwrap();
        process.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        process.wait_with_output().unwrap()
    }

    fn json(&self, arguments: &[&str], input: &str) -> Value {
        let output = self.ask(&[arguments, &["--json"]].concat(), input);
        assert!(output.status.success(), "{arguments:?}: {}", said(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

const SYSTEM: &str = "You are the librarian of a small town. You know every book on your shelves, who wrote it and when, \
                      and you answer questions of visitors in one short and friendly sentence.";

/// The text of a system prompt was warmed as a prompt that no chat begins with, and reported as done.
#[test]
fn a_warmed_system_prompt_is_warm_for_a_chat_and_can_be_pinned_and_removed() {
    let Some(server) = Serving::start(&[]) else { return };
    let plain = server.ask(&["warm", "-"], SYSTEM);
    assert!(plain.status.success() && said(&plain).contains("--system"), "a note: {}", said(&plain));
    let warmed = server.json(&["warm", "--system", "-", "--pin"], &format!("{SYSTEM}\n"));
    let chat = json!([{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Who wrote Emma?"}]);
    let cached = server.json(&["warm", "-"], &chat.to_string())["cached_tokens"].as_u64().unwrap();
    assert!(cached >= warmed["prompt_tokens"].as_u64().unwrap() / 16 * 16 - 16 && cached > 0, "{cached} of {warmed}");
    let id = warmed["prefix"].as_str().unwrap();
    let pinned = || server.json(&["stats"], "")["stats"]["ram"]["pinned_tokens"].as_u64().unwrap();
    assert!(pinned() > 0);
    server.json(&["unpin", id], "");
    assert_eq!(pinned(), 0);
    let prefixes = server.json(&["prefixes"], "")["prefixes"].clone();
    let some = prefixes.as_array().unwrap().iter().find(|prefix| prefix["text"].as_str().unwrap().contains("system"));
    let digits = &some.unwrap()["id"].as_str().unwrap()[..12];
    server.json(&["pin", digits], "");
    assert!(pinned() > 0);
    let refused = server.ask(&["remove", digits], "");
    assert!(!refused.status.success() && said(&refused).contains("--yes"), "{}", said(&refused));
    assert!(server.json(&["remove", digits, "--yes"], "")["entries"].as_u64().unwrap() > 0);
    assert_eq!(pinned(), 0);
    let gone = server.ask(&["pin", digits], "");
    assert!(gone.status.code() == Some(1) && said(&gone).contains("kvkeep prefixes"), "{}", said(&gone));
    let wrong = server.ask(&["warm", "-"], "{\"foo\": 1}");
    assert!(wrong.status.code() == Some(1) && said(&wrong).contains("standard input"), "{}", said(&wrong));
}

/// `--context-tokens` beyond what the model can was cut without a word, `--host localhost` was refused, and `stats | head`
/// failed with "Broken pipe".
#[test]
fn a_server_says_what_it_is_and_a_reader_may_leave() {
    let Some(server) = Serving::start(&["--host=localhost", "--context-tokens=100000", "--model-alias=gpt-4o"]) else {
        return;
    };
    for part in ["100,000 were asked for", "also called gpt-4o", "of weights in memory", "/v1", "operator", "no disk"] {
        assert!(server.banner.contains(part), "{part} is not in\n{}", server.banner);
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvkeep"));
    let mut stats = command
        .args(["stats", "--url", &server.address])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(stats.stdout.take());
    let left = stats.wait_with_output().unwrap();
    assert!(left.status.success() && left.stderr.is_empty(), "{}", said(&left));
}
