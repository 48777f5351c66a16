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

/// The issue's own keys, on traffic that is made here; 0 to 1, and never above the optimum.
#[test]
fn the_replay_prints_one_json_object_with_rates_under_the_optimum() {
    let args = ["replay", "synthetic:loop", "--capacity", "1500,3000", "--policy", "lru,adaptive", "--json"];
    let output = kvkeep(&args);
    assert!(output.status.success(), "{}", stderr(&output));
    let json: Value = serde_json::from_str(stdout(&output)).unwrap();
    let results = json["results"].as_array().unwrap();
    assert_eq!(results.len(), 4);
    for row in results {
        let rate = |key: &str| row[key].as_f64().unwrap();
        assert!(rate("block_hit_rate") <= rate("optimum_block_hit_rate") + 1e-9, "{row}");
        assert!(rate("optimum_block_hit_rate") <= rate("unbounded_block_hit_rate"), "{row}");
        assert!((0.0..=1.0).contains(&rate("token_hit_rate")), "{row}");
        assert_eq!(row["trace"], "synthetic:loop");
    }
    let of = |policy: &str| {
        let row = results.iter().find(|row| row["policy"] == policy && row["capacity_blocks"] == 3000).unwrap();
        row["block_hit_rate"].as_f64().unwrap()
    };
    assert!(of("adaptive") > of("lru") + 0.4, "a loop larger than the cache is LRU's worst case");
}

#[test]
fn the_replay_says_how_much_to_buy_and_draws() {
    let svg = std::env::temp_dir().join(format!("kvkeep-replay-{}.svg", std::process::id()));
    let output = kvkeep(&[
        "replay",
        "synthetic:loop",
        "--capacity=1000,6200",
        "--policy=adaptive",
        "--disk-capacity=4000",
        "--target-hit-rate=0.5",
        "--bytes-per-token=131072",
        "--prefill-tokens-per-s=5000",
        "--plot",
        svg.to_str().unwrap(),
    ]);
    assert!(output.status.success(), "{}", stderr(&output));
    for word in ["optimum", "GiB", "of RAM with", "of disk", "prefill saved", "from disk"] {
        assert!(stdout(&output).contains(word), "{word}: {}", stdout(&output));
    }
    let drawn = std::fs::read_to_string(&svg).unwrap();
    std::fs::remove_file(svg).unwrap();
    assert!(drawn.contains("optimum") && drawn.contains("adaptive"));
}

#[test]
fn a_replay_that_cannot_be_is_refused_with_what_to_do() {
    for (args, says) in [
        (&["replay"][..], "TRACE"),
        (&["replay", "synthetic:loop", "--policy", "mru"], "lru, s3fifo, arc, lru2, adaptive"),
        (&["replay", "synthetic:loop", "--capacity", "0"], "1.."),
        (&["replay", "synthetic:loop", "--target-hit-rate", "80"], "0.8"),
        (&["replay", "synthetic:loop", "--admission", "some"], "second-use"),
    ] {
        let output = kvkeep(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(stderr(&output).contains(says), "{args:?}: {}", stderr(&output));
    }
    for (trace, says) in [("synthetic:nothing", "chat, agents"), ("/no/such/trace", "cannot open")] {
        let output = kvkeep(&["replay", trace]);
        assert_eq!(output.status.code(), Some(1), "{trace}");
        assert!(stderr(&output).contains(says), "{}", stderr(&output));
    }
}

/// The published figures, where the traces are at hand. The classic policies reach them in the
/// order in which a live cache stores; docs/eviction.md says which ones they do not.
#[test]
fn published_figures_are_reached_on_the_conversation_trace() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let places = ["../../../shared/traces", "../../../../shared/traces"].map(|place| root.join(place));
    let Some(traces) = places.iter().find(|place| place.join("conversation.jsonl").is_file()) else {
        println!("skipped: conversation.jsonl is not beside the repository");
        return;
    };
    let trace = traces.join("conversation.jsonl");
    let output = kvkeep(&["replay", trace.to_str().unwrap(), "--capacity", "5000,10000", "--json"]);
    let json: Value = serde_json::from_str(stdout(&output)).unwrap();
    let rate = |policy: &str, capacity: u64, key: &str| {
        let rows = json["results"].as_array().unwrap();
        let row = rows.iter().find(|row| row["policy"] == policy && row["capacity_blocks"] == capacity).unwrap();
        100.0 * row[key].as_f64().unwrap()
    };
    for (policy, capacity, published) in [
        ("lru", 5000, 11.2),
        ("lru", 10000, 21.2),
        ("s3fifo", 5000, 14.1),
        ("s3fifo", 10000, 19.9),
        ("arc", 10000, 22.3),
        ("lru2", 5000, 16.6),
    ] {
        let measured = rate(policy, capacity, "block_hit_rate");
        assert!((measured - published).abs() < 0.35, "{policy} at {capacity}: {measured:.2} for {published}");
    }
    for (capacity, published) in [(5000, 34.1), (10000, 36.6)] {
        assert!((rate("lru", capacity, "optimum_block_hit_rate") - published).abs() < 0.1);
        assert!((rate("lru", capacity, "unbounded_block_hit_rate") - 36.6).abs() < 0.1);
    }
    let [best, lru] = ["adaptive", "lru"].map(|policy| rate(policy, 5000, "block_hit_rate"));
    assert!(best - lru >= 0.25 * (34.1 - lru), "a quarter of the way to the optimum: {best:.2}");
}
