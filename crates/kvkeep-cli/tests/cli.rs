//! The binary from outside: what it prints, and how it exits.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "helpers of tests, where a panic is the report")]
#![expect(clippy::cast_possible_truncation, reason = "numbers here are small")]

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, SystemTime};

use kvkeep::{
    CacheConfig, DType, DiskConfig, KvCache, KvLayout, LayerView, Namespace, SimpleKvCache, Store, StoreOptions,
    TensorView,
};
use safetensors::SafeTensors;
use serde_json::Value;
use tempfile::TempDir;

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
    for word in ["demo", "bench", "verify", "inspect", "export", "Exit codes"] {
        assert!(stdout(&output).contains(word), "{word}");
    }
    let output = kvkeep(&["demo", "--help"]);
    for word in
        ["comparison", "agent", "restart", "--model", "--threads", "--requests", "--capacity-gib", "--block-tokens"]
    {
        assert!(stdout(&output).contains(word), "{word}");
    }
}

#[test]
fn bad_arguments_exit_with_2_and_say_what_to_do() {
    for (args, says) in [
        (&["demo", "agent", "--requests", "0"][..], "4..=1000"),
        (&["demo", "--capacity-gib", "0"], "above 0"),
        (&["demo", "--model", "/no/such/file.gguf"], "GGUF"),
        (&["demo", "--plot", "plot.png"], ".svg"),
        (&["bench", "--threads", "2"], "--engine"),
        (&["bench", "--disk", "/no/such/dir"], "create it first"),
        (&["demo", "restart", "--documents", "4"], "1..=3"),
        (&["export", "/tmp"], "--out"),
        (&["verify"], "DIR"),
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

/// The keys that scripts rely on, on traffic that is made here; rates from 0 to 1, and never above the optimum.
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
        (&["replay", "synthetic:nothing"], "chat, agents"),
    ] {
        let output = kvkeep(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(stderr(&output).contains(says), "{args:?}: {}", stderr(&output));
    }
    let output = kvkeep(&["replay", "/no/such/trace"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("cannot open"), "{}", stderr(&output));
}

/// A misspelt trace ended with 1 and a misspelt policy with 2, and neither said what had been meant.
#[test]
fn a_misspelt_name_exits_with_2_and_the_nearest_one() {
    for (args, says) in [
        (["synthetic:chta", "--policy=lru"], "perhaps chat"),
        (["synthetic:documnets", "--policy=lru"], "perhaps documents"),
        (["synthetic:loop", "--policy=lrru"], "perhaps lru"),
        (["synthetic:loop", "--policy=lru,adaptiv"], "perhaps adaptive"),
    ] {
        let output = kvkeep(&["replay", args[0], args[1]]);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(says), "{args:?}: {}", stderr(&output));
    }
}

/// `--capacity 1k` said "invalid digit found in string", and not what could be given.
#[test]
fn capacities_may_be_in_thousands_and_what_cannot_be_read_says_what_can() {
    let trace = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(trace.path(), r#"{"input_length": 32, "hash_ids": [1, 2]}"#).unwrap();
    let path = trace.path().to_str().unwrap();
    let output = kvkeep(&["replay", path, "--capacity=1k,3000,1m", "--disk-capacity=2K", "--policy=lru", "--json"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let json: Value = serde_json::from_str(stdout(&output)).unwrap();
    let capacities: Vec<_> =
        json["results"].as_array().unwrap().iter().map(|row| row["capacity_blocks"].as_u64().unwrap()).collect();
    assert_eq!(capacities, [1_000, 3_000, 1_000_000]);
    assert_eq!(json["results"][0]["disk_capacity_blocks"], 2_000);
    for option in ["--capacity=1g", "--capacity=k", "--capacity=5m000", "--disk-capacity=0k", "--disk-capacity=9999m"] {
        let output = kvkeep(&["replay", "synthetic:loop", option]);
        assert_eq!(output.status.code(), Some(2), "{option}");
        assert!(stderr(&output).contains("such as 5000, 5k"), "{option}: {}", stderr(&output));
    }
}

/// The bar of what was done went on ticking beside the next one, and the two wrote over each other's line.
#[test]
fn on_a_terminal_each_bar_is_gone_before_the_next_begins() {
    // Long enough for a bar that is left behind to be drawn again.
    let line = |request: u64| {
        let blocks: Vec<u64> = (0..20).map(|block| request % 37 * 100 + request / 37 % 5 + block).collect();
        format!("{{\"input_length\": 320, \"hash_ids\": {blocks:?}}}\n")
    };
    let trace = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(trace.path(), (0..1_000).map(line).collect::<String>()).unwrap();
    let replay = format!("{} replay {} --capacity=100,200", env!("CARGO_BIN_EXE_kvkeep"), trace.path().display());
    let run = std::process::Command::new("script").args(["-qec", &replay, "/dev/null"]).output();
    let Ok(output) = run else { return println!("skipped: script is not installed") };
    assert!(output.status.success());
    let screen = String::from_utf8_lossy(&output.stdout).into_owned();
    let (begins, ends) = (screen.find("replays"), screen.rfind("the optimum"));
    assert!(ends.is_some() && begins > ends, "the first bar came back: {screen}");
}

/// The traces with published figures, where they are at hand.
fn traces() -> Option<std::path::PathBuf> {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let places = ["../../../shared/traces", "../../../../shared/traces"].map(|place| root.join(place));
    let found = places.into_iter().find(|place| place.join("conversation.jsonl").is_file());
    if found.is_none() {
        println!("skipped: conversation.jsonl is not beside the repository");
    }
    found
}

/// What a replay says of one policy and capacity, in percent.
fn replayed(arguments: &[&str]) -> impl Fn(&str, u64, &str) -> f64 + use<> {
    let output = kvkeep(&[&["replay", "--json"], arguments].concat());
    let json: Value = serde_json::from_str(stdout(&output)).unwrap();
    move |policy, capacity, key| {
        let rows = json["results"].as_array().unwrap();
        let row = rows.iter().find(|row| row["policy"] == policy && row["capacity_blocks"] == capacity).unwrap();
        100.0 * row[key].as_f64().unwrap()
    }
}

#[test]
fn published_figures_are_reached_by_the_same_policies_without_pins() {
    let Some(traces) = traces() else { return };
    for (name, unbounded, at) in [
        (
            "conversation.jsonl",
            36.6,
            [
                (5000, [("lru", 11.2), ("s3fifo", 14.1), ("arc", 13.5), ("lru2", 16.6)], 34.1),
                (10000, [("lru", 21.2), ("s3fifo", 19.9), ("arc", 22.3), ("lru", 21.2)], 36.6),
            ],
        ),
        (
            "miniswe_overlapped.jsonl",
            93.7,
            [
                (1000, [("lru", 17.8), ("s3fifo", 28.2), ("arc", 22.9), ("lru2", 25.5)], 45.5),
                (2500, [("lru", 55.8), ("s3fifo", 56.0), ("arc", 56.0), ("lru2", 62.5)], 79.4),
            ],
        ),
    ] {
        let trace = traces.join(name);
        let capacities = at.map(|(capacity, ..)| capacity.to_string()).join(",");
        let policies = "lru,s3fifo,arc,lru2";
        let rate = replayed(&[trace.to_str().unwrap(), "--unpinned", "--capacity", &capacities, "--policy", policies]);
        for (capacity, policies, optimum) in at {
            for (policy, published) in policies {
                let measured = rate(policy, capacity, "block_hit_rate");
                assert!((measured - published).abs() < 0.3, "{policy} at {capacity}: {measured:.2} for {published}");
            }
            assert!((rate("lru", capacity, "optimum_block_hit_rate") - optimum).abs() < 0.1);
            assert!((rate("lru", capacity, "unbounded_block_hit_rate") - unbounded).abs() < 0.1);
        }
    }
}

#[test]
fn the_default_policy_goes_a_quarter_of_the_way_from_lru_to_the_optimum() {
    let Some(traces) = traces() else { return };
    let trace = traces.join("conversation.jsonl");
    let rate = replayed(&[trace.to_str().unwrap(), "--capacity", "5000", "--policy", "lru,adaptive"]);
    let [best, lru] = ["adaptive", "lru"].map(|policy| rate(policy, 5000, "block_hit_rate"));
    let optimum = rate("lru", 5000, "optimum_block_hit_rate");
    assert!(best - lru >= 0.25 * (optimum - lru), "{lru:.2}, {best:.2}, {optimum:.2}");
}

// A disk tier's directory, from outside.

const LAYERS: usize = 2;
const BLOCK_TOKENS: usize = 4;
const TOKENS: usize = 3 * BLOCK_TOKENS;
/// KV heads, and elements of one.
const DIMS: [usize; 2] = [2, 8];
const PREFIX: &str = "You are a helpful assistant.";

fn namespace() -> Namespace {
    let layout = KvLayout::new(2, 2, 8, DType::F32).unwrap().with_block_tokens(4).unwrap();
    Namespace::new("a model", layout)
}

fn prompt() -> Vec<u32> {
    (0..TOKENS as u32).collect()
}

/// K or V of one layer of the prompt.
fn elements(layer: usize, side: usize) -> Vec<f32> {
    (0..TOKENS * DIMS[0] * DIMS[1]).map(|at| (layer * 10_000 + side * 1_000 + at) as f32).collect()
}

fn named(side: usize) -> Vec<u8> {
    (0..100).map(|at| (at * 3 + side) as u8).collect()
}

fn store(dir: &Path, key_file: Option<&Path>) -> KvCache {
    let disk = DiskConfig::new(dir, 4 << 20);
    let disk = key_file.map_or(disk.clone(), |key_file| disk.key_file(key_file));
    let store = Store::new(CacheConfig::new(4 << 20).disk(disk)).unwrap();
    let kv: Vec<[Vec<f32>; 2]> = (0..LAYERS).map(|layer| [elements(layer, 0), elements(layer, 1)]).collect();
    let dims = [TOKENS, DIMS[0], DIMS[1]];
    let view = |of| TensorView::of::<f32>(of, &dims).unwrap();
    let layers: Vec<LayerView<'_>> = kv.iter().map(|[k, v]| LayerView { k: view(k), v: view(v) }).collect();
    let options = StoreOptions::default().compute_time(Duration::from_secs(3));
    let cache = KvCache::over(store.clone());
    assert_eq!(cache.store_from(&namespace(), &prompt(), 0, &layers, &options).unwrap().stored_blocks, 3);
    let (k, v) = (named(0), named(1));
    let (k, v) = (TensorView::of(&k, &[1, 100]).unwrap(), TensorView::of(&v, &[100]).unwrap());
    let options = StoreOptions::default().ttl(Duration::from_secs(3600));
    let _ = SimpleKvCache::over(store, "default").cache_kv_with(PREFIX, 7, k, v, &options).unwrap();
    cache.flush().unwrap();
    cache
}

/// A directory with three blocks and one named layer, closed.
fn stored() -> TempDir {
    let home = tempfile::tempdir().unwrap();
    drop(store(home.path(), None));
    home
}

fn segments(dir: &Path) -> Vec<PathBuf> {
    let files = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|file| file.file_name().unwrap().to_str().unwrap().starts_with("segment-")).collect()
}

/// Damages the payload in which these bytes stand.
fn flip(dir: &Path, of: &[u8]) {
    for file in segments(dir) {
        let mut bytes = std::fs::read(&file).unwrap();
        if let Some(at) = bytes.windows(of.len()).position(|window| window == of) {
            bytes[at + 5] ^= 1;
            std::fs::write(&file, bytes).unwrap();
            return;
        }
    }
    panic!("these bytes are in no segment");
}

/// Every file, its bytes, and when it was changed.
fn everything(dir: &Path) -> BTreeMap<PathBuf, (Vec<u8>, SystemTime)> {
    let files = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    files
        .map(|file| {
            let changed = std::fs::metadata(&file).unwrap().modified().unwrap();
            (file.clone(), (std::fs::read(&file).unwrap(), changed))
        })
        .collect()
}

fn json(output: &Output) -> Value {
    serde_json::from_str(stdout(output)).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn verify_of_a_closed_cache_finds_every_byte_whole() {
    let home = stored();
    let output = kvkeep(&["verify", text(home.path()), "--json"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let report = json(&output);
    assert_eq!(report["whole"], true);
    assert_eq!(report["records"]["good"], 4, "{report}");
    assert_eq!(report["records"]["live"], 4, "{report}");
    for nothing in ["/records/damaged", "/records/torn", "/segments/damaged", "/segments/missing"] {
        assert_eq!(report.pointer(nothing).unwrap(), 0, "{nothing}: {report}");
    }
    let block = LAYERS * 2 * BLOCK_TOKENS * DIMS[0] * DIMS[1] * 4;
    // V of a named layer begins at a multiple of 64 behind K.
    assert_eq!(report["payload_bytes"], 3 * block + 128 + 100);
    let output = kvkeep(&["verify", text(home.path())]);
    assert!(output.status.success() && stdout(&output).contains("Whole"), "{}", stdout(&output));
}

#[test]
fn verify_names_what_is_damaged_and_exits_with_4() {
    let home = stored();
    flip(home.path(), &named(0));
    std::fs::write(home.path().join("letter.txt"), "not ours").unwrap();
    let output = kvkeep(&["verify", text(home.path()), "--json"]);
    assert_eq!(output.status.code(), Some(4), "{}", stderr(&output));
    let report = json(&output);
    assert_eq!(report["whole"], false);
    assert_eq!((&report["records"]["good"], &report["records"]["damaged"]), (&3.into(), &1.into()), "{report}");
    assert_eq!(report["damaged"][0]["layer"], 7);
    assert_eq!(report["foreign"], serde_json::json!(["letter.txt"]));
    let output = kvkeep(&["verify", text(home.path())]);
    assert_eq!(output.status.code(), Some(4));
    for words in ["DAMAGED", "layer 7", "letter.txt"] {
        assert!(stdout(&output).contains(words), "{words}: {}", stdout(&output));
    }
}

#[test]
fn inspect_shows_namespaces_entries_sizes_ages_and_expiry() {
    let home = stored();
    let output = kvkeep(&["inspect", text(home.path()), "--json", "--records"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let report = json(&output);
    let [blocks, named] = report["namespaces"].as_array().unwrap().as_slice() else { panic!("{report}") };
    let id: String = namespace().id().as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(blocks["namespace"], id);
    assert_eq!((&blocks["model"], &blocks["kind"]), (&"a model".into(), &"block".into()));
    assert_eq!((&blocks["entries"], &blocks["tokens"]), (&3.into(), &TOKENS.into()));
    assert!((blocks["compute_s"].as_f64().unwrap() - 3.0).abs() < 1e-3, "{blocks}");
    assert!(blocks["next_expiry_ms"].is_null() && blocks["oldest_age_ms"].as_u64().unwrap() < 600_000, "{blocks}");
    assert_eq!((&named["entries"], &named["prefixes"], &named["expiring"]), (&1.into(), &1.into(), &1.into()));
    let left_ms = named["next_expiry_ms"].as_u64().unwrap();
    assert!(left_ms > 3_000_000 && left_ms <= 3_600_000, "{left_ms}");
    assert_eq!(report["listed"].as_array().unwrap().len(), 4);
    let key = report["listed"][0]["key"].as_str().unwrap();
    let one = json(&kvkeep(&["inspect", text(home.path()), "--json", "--key", &key[..20]]));
    assert_eq!(one["records"], 1, "{one}");
    let output = kvkeep(&["inspect", text(home.path()), "--records", "--limit", "2"]);
    for words in ["a model", "2 layers, 2 kv_heads, head_dim 8, f32", "1 prefix texts", "never", "2 of 4 records"] {
        assert!(stdout(&output).contains(words), "{words}: {}", stdout(&output));
    }
}

#[test]
fn export_writes_exactly_the_bytes_stored() {
    let (home, elsewhere) = (stored(), tempfile::tempdir().unwrap());
    let out = elsewhere.path().join("kv.safetensors");
    let output = kvkeep(&["export", text(home.path()), "--out", text(&out), "--json"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let report = json(&output);
    assert_eq!((&report["entries"], &report["tensors"]), (&4.into(), &(3 * LAYERS * 2 + 2).into()), "{report}");
    let bytes = std::fs::read(&out).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let hashes = namespace().block_hashes(&prompt()).unwrap();
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let block_bytes = BLOCK_TOKENS * DIMS[0] * DIMS[1] * 4;
    for (block, hash) in hashes.iter().enumerate() {
        for layer in 0..LAYERS {
            for (side, letter) in ["k", "v"].iter().enumerate() {
                let namespace = hex(&namespace().id().as_bytes()[..8]);
                let name = format!("{namespace}.{}.layer.{layer}.{letter}", hex(hash.as_bytes()));
                let tensor = tensors.tensor(&name).unwrap();
                assert_eq!(tensor.shape(), [BLOCK_TOKENS, DIMS[0], DIMS[1]]);
                let all: Vec<u8> = elements(layer, side).iter().flat_map(|element| element.to_le_bytes()).collect();
                assert_eq!(tensor.data(), &all[block * block_bytes..(block + 1) * block_bytes], "{name}");
            }
        }
    }
    let named_tensor = |end: &str| {
        let name = tensors.names().into_iter().find(|name| name.ends_with(end)).unwrap();
        let tensor = tensors.tensor(name).unwrap();
        (tensor.shape().to_vec(), tensor.data().to_vec())
    };
    assert_eq!(named_tensor(".layer.7.k"), (vec![1, 100], named(0)));
    assert_eq!(named_tensor(".layer.7.v"), (vec![100], named(1)));
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let described = metadata.metadata().as_ref().unwrap().values().any(|value| value.contains("a model"));
    assert!(described, "{:?}", metadata.metadata());
}

#[test]
fn export_chooses_by_namespace_key_and_limit_and_leaves_out_what_is_damaged() {
    let (home, elsewhere) = (stored(), tempfile::tempdir().unwrap());
    let out = elsewhere.path().join("kv.safetensors");
    let (dir, file) = (text(home.path()), text(&out));
    let id: String = namespace().id().as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
    let hash = *namespace().block_hashes(&prompt()).unwrap()[1].as_bytes();
    let key: String = hash.iter().map(|byte| format!("{byte:02X}")).collect();
    for (choice, entries) in [(["--namespace", &id[..10]], 3), (["--key", &key], 1), (["--limit", "2"], 2)] {
        let output = kvkeep(&["export", dir, "--out", file, "--json", choice[0], choice[1]]);
        assert!(output.status.success(), "{}", stderr(&output));
        assert_eq!(json(&output)["entries"], entries, "{choice:?}");
    }
    flip(home.path(), &named(0));
    let output = kvkeep(&["export", dir, "--out", file, "--json"]);
    assert_eq!(output.status.code(), Some(4), "{}", stderr(&output));
    assert_eq!((&json(&output)["entries"], json(&output)["damaged"].as_array().unwrap().len()), (&3.into(), 1));
    for (choice, says) in [(["--key", "0000000000"], "inspect"), (["--key", "xyz"], "hexadecimal")] {
        let output = kvkeep(&["export", dir, "--out", file, choice[0], choice[1]]);
        assert!(!output.status.success() && stderr(&output).contains(says), "{}", stderr(&output));
    }
}

/// A directory whose manifest had a flipped bit passed as whole: every byte is what was stored.
#[test]
fn verify_says_how_the_manifest_is_and_a_cache_writes_a_new_one() {
    let home = stored();
    let (dir, file) = (text(home.path()), home.path().join("MANIFEST"));
    let mut flipped = std::fs::read(&file).unwrap();
    flipped[80] ^= 1;
    for (state, bytes) in [("damaged", Some(flipped)), ("damaged", Some(Vec::new())), ("missing", None)] {
        match bytes {
            Some(bytes) => std::fs::write(&file, bytes).unwrap(),
            None => std::fs::remove_file(&file).unwrap(),
        }
        let output = kvkeep(&["verify", dir]);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.code() == Some(4) && said.contains(&format!("the manifest is {state}:")), "{said}");
        assert_eq!(json(&kvkeep(&["verify", dir, "--json"]))["manifest"], state);
        drop(store(home.path(), None));
        let output = kvkeep(&["verify", dir, "--json"]);
        assert!(output.status.success() && json(&output)["manifest"] == "whole", "{}", stderr(&output));
    }
}

#[test]
fn looking_at_a_directory_changes_nothing_in_it() {
    let (home, elsewhere) = (stored(), tempfile::tempdir().unwrap());
    flip(home.path(), &named(1));
    // As a killed process leaves it: no manifest, no index.
    std::fs::remove_file(home.path().join("MANIFEST")).unwrap();
    for file in segments(home.path()) {
        let bytes = std::fs::read(&file).unwrap();
        std::fs::write(&file, &bytes[..bytes.len() - 4096]).unwrap();
    }
    let before = everything(home.path());
    let (dir, out) = (text(home.path()), elsewhere.path().join("kv.safetensors"));
    for args in [&["verify", dir][..], &["inspect", dir, "--records"], &["export", dir, "--out", text(&out)]] {
        let output = kvkeep(args);
        assert!(matches!(output.status.code(), Some(0 | 4)), "{args:?}: {}", stderr(&output));
    }
    let inside = home.path().join("kv.safetensors");
    let output = kvkeep(&["export", dir, "--out", text(&inside)]);
    assert!(stderr(&output).contains("elsewhere"), "{}", stderr(&output));
    assert!(everything(home.path()) == before, "the directory was changed");
}

#[test]
fn an_encrypted_directory_wants_its_key_and_no_other() {
    let (home, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let keys = [7u8, 8].map(|byte| {
        let file = elsewhere.path().join(format!("key{byte}"));
        std::fs::write(&file, [byte; 32]).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
        file
    });
    drop(store(home.path(), Some(&keys[0])));
    let (dir, out) = (text(home.path()), elsewhere.path().join("kv.safetensors"));
    let whole = kvkeep(&["verify", dir, "--json", "--key-file", text(&keys[0])]);
    assert!(whole.status.success() && json(&whole)["encrypted"] == true, "{}", stderr(&whole));
    for command in [&["verify", dir][..], &["inspect", dir], &["export", dir, "--out", text(&out)]] {
        for (key, says) in [(None, "key file"), (Some(&keys[1]), "another key")] {
            let key = key.map_or_else(Vec::new, |key| vec!["--key-file", text(key)]);
            let output = kvkeep(&[command, &key].concat());
            assert_eq!(output.status.code(), Some(1), "{command:?}");
            assert!(stderr(&output).contains(says) && output.stdout.is_empty(), "{}", stderr(&output));
        }
    }
    let output = kvkeep(&["export", dir, "--out", text(&out), "--key-file", text(&keys[0])]);
    assert!(output.status.success(), "{}", stderr(&output));
    let bytes = std::fs::read(&out).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let name = tensors.names().into_iter().find(|name| name.ends_with(".layer.7.v")).unwrap();
    assert_eq!(tensors.tensor(name).unwrap().data(), named(1));
}

#[test]
fn a_directory_that_is_locked_foreign_or_not_there_is_a_clear_error() {
    let (home, empty) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let cache = store(home.path(), None);
    let file = empty.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let process = format!("process {}", std::process::id());
    for (dir, says) in [
        (home.path(), process.as_str()),
        (empty.path(), "nothing of a disk tier"),
        (Path::new("/no/such/dir"), "No such file"),
        (&file, "Not a directory"),
    ] {
        for command in ["verify", "inspect"] {
            let output = kvkeep(&[command, text(dir)]);
            assert_eq!(output.status.code(), Some(1), "{command} {dir:?}");
            assert!(stderr(&output).contains(says), "{says}: {}", stderr(&output));
            assert!(output.stdout.is_empty());
        }
    }
    drop(cache);
    assert!(kvkeep(&["verify", text(home.path())]).status.success());
}

/// Two processes and the real model.
#[test]
fn after_a_restart_the_answer_is_the_same_and_comes_from_the_disk() {
    let home = tempfile::tempdir().unwrap();
    let dir = text(home.path());
    let args = ["demo", "restart", "--documents", "1", "--max-tokens", "8", "--json", "--disk", dir];
    let output = kvkeep(&args);
    assert!(output.status.success(), "{}", stderr(&output));
    let report = json(&output);
    let (cold, warm) = (&report["cold"], &report["warm"]);
    assert_eq!(report["answers_identical"], true);
    assert_ne!(cold["pid"], warm["pid"]);
    assert_eq!((&cold["cached_tokens"], &cold["loaded_bytes"]), (&0.into(), &0.into()));
    let prompt_tokens = cold["prompt_tokens"].as_u64().unwrap();
    assert!(warm["cached_tokens"].as_u64().unwrap() > prompt_tokens - 64, "{report}");
    assert_eq!(warm["loaded_bytes"], warm["cached_tokens"].as_u64().unwrap() * 23_040);
    assert!(report["speedup"].as_f64().unwrap() > 1.0, "{report}");
    // The engine has said what its prefill took, and the cache what that and the rate of the disk come to.
    let inspected = json(&kvkeep(&["inspect", dir, "--json"]));
    let computed_s: f64 =
        inspected["namespaces"].as_array().unwrap().iter().map(|one| one["compute_s"].as_f64().unwrap()).sum();
    let computed_ms = [cold, warm].map(|half| half["ttft_ms"].as_f64().unwrap()).iter().sum::<f64>();
    assert!(computed_s > 0.0 && computed_s * 1e3 < computed_ms + 1e4, "{computed_s} s of {report}");
    assert!(
        warm["worth_tokens"].as_u64() >= warm["cached_tokens"].as_u64() && warm["not_worth_tokens"] == 0,
        "{report}"
    );
    assert!(warm["load_bytes_per_s"].as_f64().unwrap() > 0.0, "{report}");
    // The demo leaves a directory that others can look at, and may use it again.
    assert!(kvkeep(&["verify", dir]).status.success());
}

/// The rows of a replay on many nodes.
fn on_nodes(arguments: &[&str]) -> Vec<Value> {
    let output = kvkeep(&[&["replay", "--json"], arguments].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    let json: Value = serde_json::from_str(stdout(&output)).unwrap();
    json["nodes"].as_array().unwrap().clone()
}

#[test]
fn one_node_hits_what_the_plain_replay_hits_and_a_store_adds_what_an_unbounded_cache_has() {
    let chat = ["synthetic:chat", "--capacity", "4000", "--policy", "adaptive"];
    let rate = replayed(&chat);
    let rows = on_nodes(&[&chat[..], &["--nodes", "1", "--rate", "5"]].concat());
    assert_eq!(rows.len(), 3, "three ways to route");
    let percent = |row: &Value, key: &str| 100.0 * row[key].as_f64().unwrap();
    for row in &rows {
        assert_eq!(percent(row, "ram_block_hit_rate"), rate("adaptive", 4000, "block_hit_rate"), "{row}");
        assert_eq!(percent(row, "ram_token_hit_rate"), rate("adaptive", 4000, "token_hit_rate"), "{row}");
        assert_eq!(percent(row, "store_block_hit_rate"), rate("adaptive", 4000, "unbounded_block_hit_rate"), "{row}");
    }
}

/// A router that also counted a system prompt as a prefix filled some nodes up to the limit, and sent sessions away from theirs.
#[test]
fn on_many_nodes_routing_by_events_finds_about_what_sessions_that_stay_find_and_spreads_the_load() {
    let arguments =
        ["synthetic:chat", "--nodes", "8", "--requests", "1500", "--capacity", "4000", "--rate", "3", "--store", "1m"];
    let rows = on_nodes(&arguments);
    assert_eq!(rows, on_nodes(&arguments), "it is the same in every run");
    let of =
        |routing: &str, key: &str| rows.iter().find(|row| row["routing"] == routing).unwrap()[key].as_f64().unwrap();
    let found = |routing| of(routing, "ram_block_hit_rate");
    assert!(found("by_events") > found("by_session") - 0.03, "{rows:?}");
    assert!(found("by_events") > found("round_robin") + 0.05, "{rows:?}");
    assert!(of("by_events", "busiest_node_requests") < 1.25, "{rows:?}");
    assert!(of("by_events", "events_bytes_per_s") > 0.0);
    for routing in ["by_session", "by_events"] {
        let same = of(routing, "store_block_hit_rate") - of("round_robin", "store_block_hit_rate");
        assert!(same.abs() < 1e-9, "an unbounded store has the same for all: {rows:?}");
    }
}

#[test]
fn nodes_that_cannot_be_are_refused_with_what_to_do() {
    for (args, says) in [
        (&["--nodes", "0", "--capacity", "10"][..], "1..=10000"),
        (&["--nodes", "two", "--capacity", "10"], "invalid"),
        (&["--nodes", "2"], "--capacity"),
        (&["--nodes", "2", "--capacity", "0"], "such as 5000"),
        (&["--nodes", "2", "--capacity", "10", "--requests", "0"], "above 0"),
        (&["--nodes", "2", "--capacity", "10", "--load-limit", "0.5"], "1 or more"),
        (&["--nodes", "2", "--capacity", "10", "--disk-capacity", "10"], "cannot be used with"),
        (&["--capacity", "10", "--rate", "2"], "--nodes"),
    ] {
        let output = kvkeep(&[&["replay", "synthetic:chat"], args].concat());
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(says), "{args:?}: {}", stderr(&output));
    }
    for (args, says) in [
        (&["--nodes", "2", "--capacity", "10"][..], "give --rate"),
        (&["--nodes", "2", "--capacity", "10,20", "--rate", "1"], "give one --capacity"),
    ] {
        let output = kvkeep(&[&["replay", "synthetic:chat"], args].concat());
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        assert!(stderr(&output).contains(says), "{args:?}: {}", stderr(&output));
    }
}
