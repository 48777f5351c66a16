//! The binary from outside: what it prints, and how it exits.

#![expect(clippy::unwrap_used, reason = "helpers of tests, where a panic is the report")]

use std::process::{Command, Output};

use serde_json::Value;

fn kvkeep(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kvkeep")).args(args).output().unwrap()
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).unwrap()
}

/// The real model, end to end; `from_str` refuses anything before or behind the one object.
#[test]
fn the_comparison_prints_one_json_object_with_identical_answers_and_a_speed_up() {
    let output = kvkeep(&["demo", "comparison", "--requests", "4", "--max-tokens", "8", "--json"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let json: Value = serde_json::from_str(stdout(&output)).unwrap();
    for half in ["without", "with"] {
        for key in ["avg", "p50", "p95", "p99"] {
            assert!(json[half]["ttft_ms"][key].as_f64().unwrap() > 0.0, "{half} {key}");
        }
        assert!(json[half]["total_s"].as_f64().unwrap() > 0.0);
        assert!(json[half]["tokens_per_s"].as_f64().unwrap() > 0.0);
    }
    assert_eq!(json["answers_identical"], true);
    assert_eq!(json["requests"], 4);
    assert!(json["speedup"].as_f64().unwrap() > 1.0, "{json}");
    assert!(json["time_saved_s"].as_f64().unwrap() > 0.0, "{json}");
    // Three of four requests find their document.
    let hit_rate = json["hit_rate_percent"].as_f64().unwrap();
    assert!((60.0..75.0).contains(&hit_rate), "{hit_rate}");
}

#[test]
fn the_bench_prints_one_json_object_of_figures_with_references() {
    let output = kvkeep(&["bench", "--quick", "--json"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let json: Value = serde_json::from_str(stdout(&output)).unwrap();
    let results = json["results"].as_array().unwrap();
    assert!(results.len() >= 12);
    for figure in results {
        let number = |key: &str| figure[key].as_f64().unwrap();
        assert!(number("value") > 0.0 && number("reference") > 0.0, "{figure}");
        assert!((number("ratio") - number("value") / number("reference")).abs() < 1e-6, "{figure}");
        assert!(figure["name"].is_string() && figure["unit"].is_string(), "{figure}");
    }
}

#[test]
fn help_names_the_commands_and_the_exit_codes() {
    let output = kvkeep(&["--help"]);
    assert!(output.status.success());
    for word in ["demo", "bench", "Exit codes"] {
        assert!(stdout(&output).contains(word), "{word}");
    }
    let output = kvkeep(&["demo", "--help"]);
    for word in ["comparison", "agent", "--model", "--threads", "--requests", "--capacity-gb", "--block-tokens"] {
        assert!(stdout(&output).contains(word), "{word}");
    }
}

#[test]
fn bad_arguments_exit_with_2_and_say_what_to_do() {
    for (args, says) in [
        (&["demo", "agent", "--requests", "0"][..], "4..=1000"),
        (&["demo", "--capacity-gb", "0"], "above 0"),
        (&["demo", "--model", "/no/such/file.gguf"], "GGUF"),
        (&["demo", "--plot", "plot.png"], ".svg"),
        (&["bench", "--threads", "2"], "--engine"),
        (&["nonsense"], "nonsense"),
        (&[], "Usage"),
    ] {
        let output = kvkeep(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(stderr(&output).contains(says), "{args:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty(), "{args:?}");
    }
}

#[test]
fn what_fails_later_exits_with_1_and_a_message() {
    let not_a_model = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
    let output = kvkeep(&["demo", "comparison", "--model", not_a_model]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("cannot load the model"), "{}", stderr(&output));
    assert!(output.stdout.is_empty());
}
