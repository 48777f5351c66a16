//! What the operator of a server sees and changes, with the real model.

#![allow(clippy::indexing_slicing, clippy::unwrap_used, clippy::allow_attributes, reason = "a test that panics fails")]

mod common;

use common::{CHAT, COMPLETIONS, Response, Running, SYSTEM, cache, cached, chat, config, engine};
use kvkeep::{CacheConfig, DiskConfig, KvCache};
use kvkeep_server::ApiKeys;
use serde_json::{Value, json};

const KEYS: &str = "operator-0123456789\nalice-0123456789 alice\n";
const BLOCK: u64 = 16;
/// Pages of a block of the default model: 30 layers, K and V, 3 heads of 64 f16, 16 tokens.
const BLOCK_BYTES: u64 = 30 * 2 * 3 * 64 * 2 * BLOCK;

fn get(server: &Running, path: &str) -> Value {
    let response = server.get(path);
    let status = response.status;
    let body = response.json();
    assert_eq!(status, 200, "{path}: {body}");
    body
}

/// Posts what must be refused; gives the message.
fn refused(server: &Running, path: &str, body: &Value, status: u16) -> String {
    let response = server.post(path, body);
    assert_eq!(response.status, status, "{path} {body}");
    response.json()["error"]["message"].as_str().unwrap().to_owned()
}

fn sum(rows: &Value, field: &str) -> u64 {
    rows.as_array().unwrap().iter().map(|row| row[field].as_u64().unwrap()).sum()
}

fn prompt_tokens(answer: &Value) -> u64 {
    answer["usage"]["prompt_tokens"].as_u64().unwrap()
}

/// The most that can be cached of a prompt: full blocks, and not its last token.
fn reusable(tokens: u64) -> u64 {
    (tokens - 1) / BLOCK * BLOCK
}

/// A prompt of so many words, all of them different from another seed's.
fn words(seed: u32, count: u32) -> Value {
    let text: String = (0..count).map(|word| format!(" {}", seed * 1000 + word)).collect();
    json!({"prompt": text, "max_tokens": 1, "temperature": 0})
}

fn small(blocks: u64) -> Option<Running> {
    let cache = KvCache::new(CacheConfig::new(blocks * BLOCK_BYTES)).unwrap();
    Some(Running::over(engine()?, cache, config()))
}

#[test]
fn a_tenants_key_may_not_see_or_change_the_cache() {
    let Some(server) = Running::start(|config| config.api_keys = Some(ApiKeys::parse(KEYS).unwrap())) else { return };
    let ask = |method, path, key: Option<&str>| {
        let bearer = key.map(|key| format!("Bearer {key}"));
        let mut headers = vec![("Content-Type", "application/json")];
        headers.extend(bearer.iter().map(|bearer| ("Authorization", bearer.as_str())));
        let body = if method == "POST" { "{}" } else { "" };
        Response::read(server.send(method, path, &headers, body)).status
    };
    let see = ["/cache/stats", "/cache/namespaces", "/cache/prefixes", "/cache/requests", "/metrics"];
    let change = ["/cache/warm", "/cache/pin", "/cache/unpin", "/cache/remove", "/cache/clear"];
    for (method, path) in see.map(|path| ("GET", path)).into_iter().chain(change.map(|path| ("POST", path))) {
        assert_eq!(ask(method, path, None), 401, "{path}");
        assert_eq!(ask(method, path, Some("alice-0123456789")), 403, "{path}");
        assert!(matches!(ask(method, path, Some("operator-0123456789")), 200 | 400), "{path}");
    }
    for path in ["/health", "/ready", "/openapi.json"] {
        assert_eq!(ask("GET", path, None), 200, "{path}");
    }
}

#[test]
fn figures_add_up_over_stats_requests_and_metrics() {
    let Some(server) = Running::start(|_| ()) else { return };
    let first = server.answer(CHAT, &chat(SYSTEM, "Who wrote Emma?", 3));
    let again = server.answer(CHAT, &chat(SYSTEM, "Who wrote Emma?", 3));
    let third = server.answer(COMPLETIONS, &words(1, 20));
    server
        .answer("/cache/warm", &json!({"prompt": "Warm this text, which is longer than one block of tokens, please."}));
    let (stats, rows) = (get(&server, "/cache/stats"), get(&server, "/cache/requests")["requests"].clone());
    let tokens = |name: &str| stats["tokens"][name].as_u64().unwrap();
    // This server has RAM alone.
    assert_eq!(stats["tokens"]["tiers"], json!([{"name": "ram", "tokens": cached(&again)}]));
    assert_eq!(tokens("requested"), cached(&again) + tokens("computed"));
    for (name, field) in [("requested", "prompt_tokens"), ("computed", "computed_tokens")] {
        assert_eq!(tokens(name), sum(&rows, field), "{name}");
    }
    assert_eq!(cached(&again), sum(&rows, "cached_tokens"));
    assert_eq!(rows[1]["tiers"], stats["tokens"]["tiers"]);
    assert_eq!(cached(&again), reusable(prompt_tokens(&again)));
    let rate = stats["token_hit_rate"].as_f64().unwrap();
    assert!((rate - cached(&again) as f64 / tokens("requested") as f64).abs() < 1e-9);
    assert!(stats["prefill_seconds_saved"].as_f64().unwrap() > 0.0);
    // A warmed prompt is no answer: it has no time to the first token.
    assert_eq!((&stats["ttft_ms"]["cold"]["count"], &stats["ttft_ms"]["warm"]["count"]), (&json!(2), &json!(1)));
    assert!(stats["ttft_ms"]["warm"]["p50"].as_f64().unwrap() > 0.0);
    let requests = &stats["requests"];
    assert_eq!((&requests["served"], &requests["running"], &requests["queued"]), (&json!(4), &json!(0), &json!(0)));
    let ids: Vec<_> = rows.as_array().unwrap().iter().map(|row| row["id"].clone()).collect();
    assert_eq!(ids[..3], [&first, &again, &third].map(|answer| answer["id"].clone()));
    let seqs: Vec<_> = rows.as_array().unwrap().iter().map(|row| row["seq"].as_u64().unwrap()).collect();
    assert_eq!(seqs, [1, 2, 3, 4]);
    assert_eq!(get(&server, "/cache/requests?after=3")["requests"].as_array().unwrap().len(), 1);
    let metrics = server.get("/metrics").text();
    for (tier, tokens) in [("ram", cached(&again)), ("computed", tokens("computed"))] {
        assert!(metrics.contains(&format!("kvkeep_prompt_tokens_total{{tier=\"{tier}\"}} {tokens}\n")));
    }
}

#[test]
fn bytes_of_namespaces_are_those_in_use_and_known_or_not_after_a_restart() {
    let Some(engine) = engine() else { return };
    let dir = tempfile::tempdir().unwrap();
    let open = || KvCache::new(CacheConfig::new(64 << 20).disk(DiskConfig::new(dir.path(), 1 << 30))).unwrap();
    let server = Running::over(engine, open(), config());
    server.answer(COMPLETIONS, &words(1, 30));
    let mut salted = words(2, 40);
    salted["cache_salt"] = "a".into();
    server.answer(COMPLETIONS, &salted);
    let of = |server: &Running| get(server, "/cache/namespaces")["namespaces"].as_array().unwrap().clone();
    let bytes =
        |rows: &[Value], tier: &str| rows.iter().map(|row| tier_of(row, tier)["bytes"].as_u64().unwrap()).sum::<u64>();
    let (rows, stats) = (of(&server), get(&server, "/cache/stats"));
    assert_eq!(rows.iter().filter(|row| row["cache_salt"] == true).count(), 1);
    assert!(rows.len() == 2 && rows.iter().all(|row| row["known"] == true && row["tenant"].is_null()));
    // Nothing is being written into RAM, or read from there after its removal: no difference.
    assert_eq!(bytes(&rows, "ram"), stats["ram"]["used_bytes"].as_u64().unwrap());
    server.end();

    let server = Running::over(engine, open(), config());
    let (rows, stats) = (of(&server), get(&server, "/cache/stats"));
    assert_eq!((rows.len(), bytes(&rows, "ram")), (2, 0));
    // The difference are the segments' headers and indexes, the manifest and the lock.
    let (records, used) = (bytes(&rows, "disk"), stats["tiers"][0]["used_bytes"].as_u64().unwrap());
    assert!(records > 0 && records < used && used - records < 1 << 20, "{records} of {used}");
    // The operator's own namespace follows from the model; that of a salt from requests alone.
    let unknown: Vec<_> = rows.iter().filter(|row| row["known"] == false).collect();
    assert_eq!(unknown.len(), 1);
    let removed = server.answer("/cache/clear", &json!({"namespace": unknown[0]["id"]}));
    assert_eq!(removed["entries"], tier_of(unknown[0], "disk")["entries"]);
    assert_eq!(of(&server).len(), 1);
    let again = server.answer(COMPLETIONS, &words(1, 30));
    assert_eq!(cached(&again), reusable(prompt_tokens(&again)));
    let given = json!([{"name": "ram", "tokens": 0}, {"name": "disk", "tokens": cached(&again)}]);
    assert_eq!(get(&server, "/cache/stats")["tokens"]["tiers"], given);
}

/// What a namespace takes of a tier.
fn tier_of<'a>(namespace: &'a Value, tier: &str) -> &'a Value {
    namespace["tiers"].as_array().unwrap().iter().find(|of| of["name"] == tier).unwrap()
}

/// Asks two questions behind one system prompt; gives the shared branch and those behind it.
fn two_questions(server: &Running) -> (Value, Vec<Value>) {
    for user in ["Who wrote Emma? I have forgotten her name.", "When was Dracula printed? It must be long ago."] {
        server.answer(CHAT, &chat(SYSTEM, user, 1));
    }
    let prefixes = get(server, "/cache/prefixes")["prefixes"].as_array().unwrap().clone();
    let (shared, behind) = prefixes.split_first().unwrap();
    (shared.clone(), behind.to_vec())
}

#[test]
fn prefixes_show_what_requests_share_with_counts_and_where_it_lies() {
    let Some(server) = Running::start(|_| ()) else { return };
    let (shared, behind) = two_questions(&server);
    assert_eq!((&shared["requests"], &shared["parent"], &shared["first_token"]), (&json!(2), &Value::Null, &json!(0)));
    assert!(shared["text"].as_str().unwrap().contains("librarian"), "{shared}");
    assert_eq!(shared["tiers"], json!([{"name": "ram", "tokens": shared["tokens"]}]));
    assert_eq!(behind.len(), 2);
    for branch in &behind {
        assert_eq!((&branch["requests"], &branch["parent"]), (&json!(1), &shared["id"]));
        assert_eq!(branch["first_token"], shared["tokens"]);
        assert_eq!(branch["tiers"], json!([{"name": "ram", "tokens": branch["tokens"]}]));
        assert_eq!(branch["cached_tokens"], branch["tokens"]);
        assert!(branch["last_used_seconds"].as_f64() >= shared["last_used_seconds"].as_f64());
    }
    assert_eq!(get(&server, "/cache/prefixes?limit=1")["prefixes"][0]["id"], shared["id"]);
}

/// What was on the disk and in RAM was said to be in RAM alone: 0 tokens on the disk.
#[test]
fn a_prefix_is_shown_in_every_tier_that_has_it() {
    let Some(engine) = engine() else { return };
    let dir = tempfile::tempdir().unwrap();
    let cache = KvCache::new(CacheConfig::new(64 << 20).disk(DiskConfig::new(dir.path(), 1 << 30))).unwrap();
    let server = Running::over(engine, cache.clone(), config());
    two_questions(&server);
    cache.flush().unwrap();
    let prefixes = get(&server, "/cache/prefixes")["prefixes"].as_array().unwrap().clone();
    assert_eq!(prefixes.len(), 3);
    for branch in prefixes {
        let tokens = &branch["tokens"];
        let in_both = json!([{"name": "ram", "tokens": tokens}, {"name": "disk", "tokens": tokens}]);
        assert_eq!((&branch["tiers"], &branch["cached_tokens"]), (&in_both, tokens));
    }
    assert_eq!(get(&server, "/cache/stats")["tiers"][0]["name"], "disk");
}

#[test]
fn removing_a_branch_leaves_what_it_shares() {
    let Some(server) = Running::start(|_| ()) else { return };
    let (shared, behind) = two_questions(&server);
    let gone = behind.iter().find(|branch| branch["text"].as_str().unwrap().contains("Emma")).unwrap();
    let removed = server.answer("/cache/remove", &json!({"prefix": gone["id"]}));
    let blocks = gone["tokens"].as_u64().unwrap() / BLOCK;
    assert_eq!((&removed["entries"], &removed["bytes"]), (&json!(blocks), &json!(blocks * BLOCK_BYTES)));
    assert!(refused(&server, "/cache/remove", &json!({"prefix": gone["id"]}), 404).contains("no prefix"));
    let again = server.answer(CHAT, &chat(SYSTEM, "Who wrote Emma? I have forgotten her name.", 1));
    assert_eq!(json!(cached(&again)), shared["tokens"]);
    let other = server.answer(CHAT, &chat(SYSTEM, "When was Dracula printed? It must be long ago.", 1));
    assert_eq!(cached(&other), reusable(prompt_tokens(&other)));
    // The root of all of it.
    server.answer("/cache/remove", &json!({"prefix": shared["id"]}));
    assert_eq!(get(&server, "/cache/prefixes")["prefixes"], json!([]));
    assert_eq!(cached(&server.answer(CHAT, &chat(SYSTEM, "Who wrote Emma? I have forgotten her name.", 1))), 0);
}

#[test]
fn a_pinned_prefix_survives_what_evicts_an_unpinned_one() {
    // All but four blocks of the cache are taken by what comes: a prompt of six cannot stay by chance.
    let Some(server) = small(40) else { return };
    let question = chat(
        SYSTEM,
        "Who wrote Emma? I have forgotten her name, and the year as well, which is a pity, because a \
        friend of mine has asked me about it only yesterday, and today I should give her an answer.",
        1,
    );
    let warmed = server.answer("/cache/warm", &json!({"messages": question["messages"], "pin": true}));
    let id = &warmed["prefix"];
    assert!(warmed["prompt_tokens"].as_u64().unwrap() > 5 * BLOCK);
    let flood = |seed| {
        let blocks = prompt_tokens(&server.answer(COMPLETIONS, &words(seed, 105))) / BLOCK;
        assert!((30..40).contains(&blocks), "{blocks}");
    };
    flood(1);
    flood(2);
    assert!(get(&server, "/cache/stats")["ram"]["evictions"].as_u64().unwrap() > 0);
    let pinned = get(&server, "/cache/stats")["ram"]["pinned_tokens"].clone();
    let found = server.answer(CHAT, &question);
    assert_eq!(cached(&found), reusable(prompt_tokens(&found)));
    assert_eq!(pinned, json!(cached(&found)));
    assert_eq!(server.answer("/cache/unpin", &json!({"prefix": id})), json!({}));
    refused(&server, "/cache/unpin", &json!({"prefix": id}), 404);
    flood(3);
    flood(4);
    assert!(refused(&server, "/cache/pin", &json!({"prefix": id}), 409).contains("were evicted"));
    let found = server.answer(CHAT, &question);
    assert!(cached(&found) < reusable(prompt_tokens(&found)));
}

#[test]
fn pins_cannot_fill_the_cache() {
    let Some(server) = small(40) else { return };
    let long = words(1, 75);
    let blocks = prompt_tokens(&server.answer(COMPLETIONS, &long)) / BLOCK;
    assert!(blocks > 20, "{blocks}");
    let id = get(&server, "/cache/prefixes")["prefixes"][0]["id"].clone();
    assert!(refused(&server, "/cache/pin", &json!({"prefix": id}), 409).contains("half of RAM"));
    assert_eq!(get(&server, "/cache/stats")["ram"]["pinned_tokens"], 0);
    assert_eq!(get(&server, "/cache/stats")["ram"]["held_bytes"], 0);
}

#[test]
fn clearing_empties_the_cache_the_tree_and_the_pins() {
    let Some(server) = Running::start(|_| ()) else { return };
    let (shared, _) = two_questions(&server);
    let mut salted = words(2, 30);
    salted["cache_salt"] = "a".into();
    server.answer(COMPLETIONS, &salted);
    server.answer("/cache/pin", &json!({"prefix": shared["id"]}));
    let stats = get(&server, "/cache/stats");
    let removed = server.answer("/cache/clear", &json!({"namespace": shared["namespace"]}));
    let left = get(&server, "/cache/stats");
    assert_eq!(
        left["ram"]["entries"],
        stats["ram"]["entries"].as_u64().unwrap() - removed["entries"].as_u64().unwrap()
    );
    assert_eq!((&left["ram"]["held_bytes"], &left["ram"]["pinned_tokens"]), (&json!(0), &json!(0)));
    assert_eq!(get(&server, "/cache/prefixes")["prefixes"].as_array().unwrap().len(), 1);
    server.answer("/cache/clear", &json!({}));
    let empty = get(&server, "/cache/stats");
    assert_eq!((&empty["ram"]["entries"], &empty["ram"]["used_bytes"]), (&json!(0), &json!(0)));
    assert_eq!(get(&server, "/cache/prefixes")["prefixes"], json!([]));
    assert_eq!(get(&server, "/cache/namespaces")["namespaces"], json!([]));
}

#[test]
fn warming_makes_the_next_request_with_the_prompt_warm_and_nobody_elses() {
    let Some(engine) = engine() else { return };
    let mut config = config();
    config.api_keys = Some(ApiKeys::parse(KEYS).unwrap());
    let server = Running::over(engine, cache(), config);
    let question = chat(SYSTEM, "Who wrote Emma?", 1);
    let post = |key, path, body: &Value| server.post_as(key, path, body).json();
    let body = json!({"messages": question["messages"], "tenant": "alice", "cache_salt": "s"});
    let warmed = post("operator-0123456789", "/cache/warm", &body);
    let tokens = warmed["prompt_tokens"].as_u64().unwrap();
    assert_eq!((&warmed["cached_tokens"], &warmed["computed_tokens"]), (&json!(0), &json!(tokens)));
    let again = post("operator-0123456789", "/cache/warm", &body);
    assert_eq!(again["cached_tokens"], reusable(tokens));
    let mut salted = question.clone();
    salted["cache_salt"] = "s".into();
    let alice = post("alice-0123456789", CHAT, &salted);
    assert_eq!((prompt_tokens(&alice), cached(&alice)), (tokens, reusable(tokens)));
    assert_eq!(cached(&post("alice-0123456789", CHAT, &question)), 0);
    assert_eq!(cached(&post("operator-0123456789", CHAT, &salted)), 0);
    let unknown = post("operator-0123456789", "/cache/warm", &json!({"prompt": "x", "tenant": "bob"}));
    assert!(unknown["error"]["message"].as_str().unwrap().contains("bob"));
}

#[test]
fn bad_requests_are_refused_with_what_to_do() {
    let Some(server) = Running::start(|_| ()) else { return };
    let hex = "0".repeat(64);
    for (path, body, status, says) in [
        ("/cache/warm", json!({}), 400, "messages or prompt"),
        ("/cache/warm", json!({"prompt": "a", "messages": []}), 400, "not both"),
        ("/cache/warm", json!({"prompt": ""}), 400, "empty"),
        ("/cache/warm", json!({"prompt": "a", "pinned": true}), 400, "pinned"),
        ("/cache/warm", json!({"prompt": "a ".repeat(9000)}), 400, "prompt is too long"),
        ("/cache/pin", json!({"prefix": "ab"}), 400, "64 hexadecimal"),
        ("/cache/pin", json!({"prefix": hex}), 404, "no prefix"),
        ("/cache/remove", json!({"prefix": hex}), 404, "no prefix"),
        ("/cache/unpin", json!({"prefix": hex}), 404, "no pinned prefix"),
        // A typing error must not clear everything.
        ("/cache/clear", json!({"namspace": hex}), 400, "namspace"),
        ("/cache/clear", json!({"namespace": "ab"}), 400, "64 hexadecimal"),
    ] {
        let message = refused(&server, path, &body, status);
        assert!(message.contains(says), "{path} {body}: {message}");
    }
    for path in ["/cache/prefixes?limit=0", "/cache/prefixes?limit=x", "/cache/requests?after=-1"] {
        assert_eq!(server.get(path).status, 400, "{path}");
    }
    // A prompt shorter than a block has no prefix, and nothing to pin.
    let short = server.answer("/cache/warm", &json!({"prompt": "a", "pin": true}));
    assert_eq!(short["prefix"], Value::Null);
}
