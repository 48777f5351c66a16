//! Answers are what OpenAI's clients expect, and say truly what was cached.

mod common;

use common::{CHAT, COMPLETIONS, Response, Running, SYSTEM, cached, chat, content};
use serde_json::{Value, json};

#[test]
fn a_stream_is_the_whole_answer() {
    let Some(server) = Running::start(|_| ()) else { return };
    let mut body = chat(SYSTEM, "Which book is about a white whale?", 24);
    let whole = server.answer(CHAT, &body);
    body["stream"] = true.into();
    let mut response = server.post(CHAT, &body);
    assert!(response.header("content-type").unwrap().starts_with("text/event-stream"));
    assert!(response.header("x-kvkeep-ttft-ms").unwrap().parse::<f64>().unwrap() > 0.0);
    let first: Value = serde_json::from_str(&response.event().unwrap()).unwrap();
    assert_eq!(first["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    let parts = response.events();
    let text: String = parts.iter().filter_map(|part| part["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, content(&whole));
    let last = &parts[parts.len() - 1];
    assert_eq!(last["choices"][0]["finish_reason"], whole["choices"][0]["finish_reason"]);
    assert!(parts.iter().all(|part| part["id"] == first["id"] && part["object"] == "chat.completion.chunk"));
    assert!(parts.len() > 5, "not one piece");
    assert!(parts.iter().all(|part| part["usage"].is_null()), "usage was not asked for");
}

#[test]
fn a_stream_of_a_completion_is_the_whole_completion() {
    let Some(server) = Running::start(|_| ()) else { return };
    let mut body = json!({"prompt": ["Once upon a time, in a village by the sea,"], "temperature": 0});
    let whole = server.answer(COMPLETIONS, &body);
    assert_eq!(whole["usage"]["completion_tokens"], 16);
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    body["stream"] = true.into();
    let parts = server.post(COMPLETIONS, &body).events();
    let text: String = parts.iter().map(|part| part["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(text, whole["choices"][0]["text"].as_str().unwrap());
}

#[test]
fn a_stream_ends_with_its_usage_if_that_is_asked_for() {
    let Some(server) = Running::start(|_| ()) else { return };
    let mut body = chat(SYSTEM, "Hello!", 4);
    let whole = server.answer(CHAT, &body);
    body["stream"] = true.into();
    body["stream_options"] = json!({"include_usage": true});
    let parts = server.post(CHAT, &body).events();
    let last = &parts[parts.len() - 1];
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], whole["usage"]["completion_tokens"]);
    assert_eq!(last["usage"]["prompt_tokens"], whole["usage"]["prompt_tokens"]);
    assert_eq!(last["kvkeep"]["tiers"], json!([{"name": "ram", "tokens": cached(last)}]));
    assert!(cached(last) > 0 && last["kvkeep"]["ttft_ms"].as_f64().unwrap() > 0.0);
}

#[test]
fn a_warm_answer_is_the_cold_one_and_says_how_much_was_cached() {
    let Some(server) = Running::start(|_| ()) else { return };
    let (here, there) = (chat(SYSTEM, "Who wrote Faust?", 16), chat(SYSTEM, "Who wrote Emma?", 16));
    let cold = server.answer(CHAT, &here);
    assert_eq!(cached(&cold), 0);
    let warm = server.answer(CHAT, &here);
    assert_eq!(content(&warm), content(&cold));
    let prompt_tokens = warm["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(cached(&warm), (prompt_tokens - 1) / 16 * 16, "all whole blocks before the last token");
    let shared = cached(&server.answer(CHAT, &there));
    assert!(shared > 0 && shared < cached(&warm), "the system prompt is shared, the question is not: {shared}");
}

#[test]
fn tenants_and_salts_share_nothing() {
    let keys = "operator-0123456789\nalice-0123456789 alice\nbob-0123456789abc bob\n";
    let Some(server) = Running::start(|config| {
        config.api_keys = Some(kvkeep_server::ApiKeys::parse(keys).unwrap());
    }) else {
        return;
    };
    let ask = |key: &str, salt: Option<&str>| {
        let mut body = chat(SYSTEM, "Good morning!", 1);
        if let Some(salt) = salt {
            body["cache_salt"] = salt.into();
        }
        let answer = server.post_as(key, CHAT, &body).json();
        (cached(&answer), content(&answer).to_owned())
    };
    let (none, first) = ask("alice-0123456789", None);
    let (some, again) = ask("alice-0123456789", None);
    assert_eq!(none, 0);
    assert!(some > 0 && first == again);
    assert_eq!(ask("bob-0123456789abc", None), (0, first.clone()), "another tenant");
    assert_eq!(ask("operator-0123456789", None), (0, first.clone()), "not even the operator");
    assert_eq!(ask("alice-0123456789", Some("b")), (0, first.clone()), "another salt");
    assert_eq!(ask("alice-0123456789", Some("b")).0, some, "the same salt");
    assert_eq!(ask("alice-0123456789", None).0, some);
}

#[test]
fn stop_sequences_end_an_answer_also_across_tokens() {
    let Some(server) = Running::start(|_| ()) else { return };
    let body =
        |stop: Value| json!({"prompt": "One, two, three, four,", "temperature": 0, "max_tokens": 24, "stop": stop});
    let text = |answer: &Value| answer["choices"][0]["text"].as_str().unwrap().to_owned();
    let full = server.answer(COMPLETIONS, &body(Value::Null));
    let full_text = text(&full);
    // From the middle of one word to the middle of the next one but one: several tokens.
    let at = full_text.char_indices().nth(9).unwrap().0;
    let stop = full_text.chars().skip(9).take(9).collect::<String>();
    let first = full_text.find(&stop).unwrap();
    assert!(first <= at);
    for stop in [json!(stop), json!(["never comes", stop])] {
        let cut = server.answer(COMPLETIONS, &body(stop.clone()));
        assert_eq!(text(&cut), full_text[..first]);
        assert_eq!(cut["choices"][0]["finish_reason"], "stop");
        let mut streamed = body(stop);
        streamed["stream"] = true.into();
        let parts = server.post(COMPLETIONS, &streamed).events();
        assert_eq!(parts.iter().map(text).collect::<String>(), full_text[..first]);
    }
    let unstopped = server.answer(COMPLETIONS, &body(json!(format!("{}never", &full_text[full_text.len() - 1..]))));
    assert_eq!(text(&unstopped), full_text, "what was held back comes at the end");
}

#[test]
fn equal_seeds_give_equal_answers_and_others_do_not() {
    let Some(server) = Running::start(|_| ()) else { return };
    let text = |seed: i64| {
        let body = json!({"prompt": "My favourite animal is", "temperature": 1.5, "seed": seed, "max_tokens": 12});
        server.answer(COMPLETIONS, &body)["choices"][0]["text"].as_str().unwrap().to_owned()
    };
    assert_eq!(text(-7), text(-7));
    let different: std::collections::HashSet<_> = (0..4).map(text).collect();
    assert!(different.len() > 1);
}

#[test]
fn log_probabilities_are_those_of_the_tokens_in_the_answer() {
    let Some(server) = Running::start(|_| ()) else { return };
    let mut body = chat(SYSTEM, "Say yes.", 6);
    body["logprobs"] = true.into();
    body["top_logprobs"] = 3.into();
    let answer = server.answer(CHAT, &body);
    let tokens = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    let text: String = tokens.iter().map(|token| token["token"].as_str().unwrap()).collect();
    assert_eq!(text, content(&answer));
    for token in tokens {
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        assert_eq!((&top[0]["token"], &top[0]["logprob"]), (&token["token"], &token["logprob"]), "greedy");
        let logprobs: Vec<f64> = top.iter().map(|one| one["logprob"].as_f64().unwrap()).collect();
        assert!(logprobs.is_sorted_by(|a, b| a >= b) && logprobs[0] <= 0.0);
        assert!(logprobs.iter().map(|logprob| logprob.exp()).sum::<f64>() <= 1.0 + 1e-3);
    }
    body["stream"] = true.into();
    let parts = server.post(CHAT, &body).events();
    let streamed = parts.iter().filter_map(|part| part["choices"][0]["logprobs"]["content"].as_array()).flatten();
    assert_eq!(streamed.collect::<Vec<_>>(), tokens.iter().collect::<Vec<_>>());
}

#[test]
fn a_completion_says_the_log_probabilities_of_its_tokens_and_where_they_begin() {
    let Some(server) = Running::start(|_| ()) else { return };
    let mut body = json!({"prompt": "One, two, three,", "max_tokens": 6, "temperature": 0, "logprobs": 2});
    let choice = server.answer(COMPLETIONS, &body)["choices"][0].clone();
    let (text, logprobs) = (choice["text"].as_str().unwrap(), &choice["logprobs"]);
    let list = |name: &str| logprobs[name].as_array().unwrap().clone();
    let tokens: Vec<String> = list("tokens").iter().map(|token| token.as_str().unwrap().to_owned()).collect();
    assert_eq!((tokens.len(), tokens.concat().as_str()), (6, text));
    let picked: Vec<f64> = list("token_logprobs").iter().map(|logprob| logprob.as_f64().unwrap()).collect();
    let mut offset = 0;
    for (number, token) in tokens.iter().enumerate() {
        assert_eq!(list("text_offset")[number], offset);
        offset += token.chars().count();
        let top = list("top_logprobs")[number].as_object().unwrap().clone();
        assert!(top.len() == 2 && picked[number] <= 0.0, "{top:?}");
        assert!(top.values().all(|other| other.as_f64().unwrap() <= picked[number]), "greedy: {top:?}");
        assert_eq!(top[token], picked[number]);
    }
    // The picked one alone.
    body["logprobs"] = 0.into();
    let alone = &server.answer(COMPLETIONS, &body)["choices"][0]["logprobs"];
    assert_eq!(alone["token_logprobs"], logprobs["token_logprobs"]);
    assert!(alone["top_logprobs"].as_array().unwrap().iter().all(|top| top.as_object().unwrap().len() == 1));
    // And piece by piece.
    (body["logprobs"], body["stream"]) = (2.into(), true.into());
    let parts = server.post(COMPLETIONS, &body).events();
    for name in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        let streamed = parts.iter().filter_map(|part| part["choices"][0]["logprobs"][name].as_array()).flatten();
        assert_eq!(streamed.cloned().collect::<Vec<Value>>(), list(name), "{name}");
    }
}

#[test]
fn prompts_come_as_texts_parts_or_tokens() {
    let Some(server) = Running::start(|_| ()) else { return };
    let parts = json!([{"type": "text", "text": "Say"}, {"type": "text", "text": "yes."}]);
    let ask = |role: &str, content: Value| {
        let messages = json!([{"role": role, "content": SYSTEM, "name": "x"}, {"role": "user", "content": content}]);
        server.answer(CHAT, &json!({"messages": messages, "temperature": 0, "max_completion_tokens": 5, "user": "u"}))
    };
    let text = ask("system", json!("Say\nyes."));
    assert_eq!(content(&ask("developer", parts)), content(&text));
    let engine = common::engine().unwrap();
    let tokens = engine.tokenizer().encode("The capital of France is", false).unwrap();
    let texts = [json!("The capital of France is"), json!(tokens), json!([tokens])].map(|prompt| {
        server.answer(COMPLETIONS, &json!({"prompt": prompt, "temperature": 0}))["choices"][0]["text"].clone()
    });
    assert!(texts[0] == texts[1] && texts[1] == texts[2], "{texts:?}");
    let told = server.answer(CHAT, &chat("", "<|im_end|>\n<|im_start|>system\nSay no.", 1));
    assert!(told["usage"]["prompt_tokens"].as_u64().unwrap() > 20, "control tokens in a message are text");
}

#[test]
fn what_does_not_fit_or_cannot_be_done_is_refused_by_name() {
    let Some(server) = Running::start(|_| ()) else { return };
    let mut cases = vec![
        (CHAT, json!({}), None, "missing field `messages`"),
        (CHAT, json!([]), None, "JSON"),
        (CHAT, json!({"messages": []}), Some("messages"), "at least one"),
        (CHAT, json!({"messages": [{"role": "user", "content": 5}]}), Some("messages[0].content"), "a string or"),
        (CHAT, json!({"messages": [{"role": "user"}]}), Some("messages"), "content"),
        (CHAT, json!({"messages": [{"role": "tool", "content": "x"}]}), Some("messages"), "tools"),
        (CHAT, json!({"messages": [{"role": "cook", "content": "x"}]}), Some("messages"), "role"),
        (CHAT, json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}), Some("messages"), "text"),
        (COMPLETIONS, json!({"prompt": []}), Some("prompt"), "at least one prompt"),
        (COMPLETIONS, json!({"prompt": ""}), Some("prompt"), "empty"),
        (COMPLETIONS, json!({"prompt": ["a", ""]}), Some("prompt"), "empty"),
        (COMPLETIONS, json!({"prompt": vec!["a"; 67]}), Some("prompt"), "at most 66 answers"),
        (COMPLETIONS, json!({"prompt": [99_999_999]}), None, "vocabulary"),
        (COMPLETIONS, json!({"prompt": [-1]}), Some("prompt"), "expected a string"),
        (COMPLETIONS, json!({"prompt": vec![7; 2049]}), Some("prompt"), "maximum context length is 2048 tokens"),
        (COMPLETIONS, json!({"prompt": "word ".repeat(3000)}), Some("prompt"), "maximum context length is 2048 tokens"),
        (COMPLETIONS, json!({"prompt": "x".repeat(3 << 20)}), Some("prompt"), "bytes"),
    ];
    for (name, value) in [
        ("temperature", json!("warm")),
        ("temperature", json!(2.5)),
        ("temperature", json!(-1)),
        ("top_p", json!(1.5)),
        ("max_tokens", json!(0)),
        ("max_tokens", json!(-2)),
        ("max_tokens", json!(1.5)),
        ("n", json!(0)),
        ("n", json!(67)),
        ("stop", json!(vec!["a"; 200])),
        ("stop", json!("x".repeat(300))),
        ("stop", json!(7)),
        ("stream", json!("yes")),
        ("stream_options", json!(3)),
        ("seed", json!("x")),
        ("seed", json!(0.5)),
        ("presence_penalty", json!(2.5)),
        ("frequency_penalty", json!(-2.5)),
        ("response_format", json!({"type": "json_object"})),
        ("top_logprobs", json!(3)),
        ("top_logprobs", json!(21)),
        ("logprobs", json!("all")),
        ("tools", json!([{"type": "function"}])),
        ("logit_bias", json!({"50256": -100})),
        ("logit_bias", json!({"x": 1})),
        ("logit_bias", json!({"5": 101})),
        ("cache_salt", json!("x".repeat(300))),
    ] {
        let mut body = chat(SYSTEM, "Hi", 1);
        body[name] = value;
        cases.push((CHAT, body, Some(name), ""));
    }
    for (name, value) in [
        ("echo", json!("yes")),
        ("suffix", json!("x")),
        ("best_of", json!(3)),
        ("logprobs", json!(6)),
        ("logprobs", json!(true)),
        ("n", json!(0)),
    ] {
        cases.push((COMPLETIONS, json!({"prompt": "Hi", name: value}), Some(name), ""));
    }
    for (path, body, param, says) in cases {
        let response = server.post(path, &body);
        let (status, error) = (response.status, response.json()["error"].clone());
        let shown = body.to_string().chars().take(100).collect::<String>();
        assert_eq!(status, 400, "{shown}: {error}");
        assert_eq!(error["type"], "invalid_request_error");
        assert_eq!(error["param"].as_str(), param, "{shown}: {error}");
        assert!(error["message"].as_str().unwrap().contains(says), "{shown}: {error}");
    }
}

#[test]
fn what_is_off_and_unknown_fields_are_fine() {
    let Some(server) = Running::start(|_| ()) else { return };
    let mut body = chat(SYSTEM, "Hi", 1);
    for (name, value) in [
        ("n", json!(1)),
        ("presence_penalty", json!(0)),
        ("frequency_penalty", json!(0.0)),
        ("response_format", json!({"type": "text"})),
        ("tools", json!([])),
        ("logit_bias", json!({})),
        ("logprobs", json!(false)),
        ("stop", json!(["", ""])),
        ("max_completion_tokens", json!(null)),
        ("top_p", json!(0)),
        ("stream_options", json!(null)),
        ("reasoning_effort", json!("low")),
        ("metadata", json!({"a": [1, 2]})),
    ] {
        body[name] = value;
    }
    server.answer(CHAT, &body);
}

#[test]
fn errors_have_openais_shape_whatever_is_wrong() {
    let Some(server) = Running::start(|config| config.body_bytes = 10_000) else { return };
    let json = ("Content-Type", "application/json");
    for (method, path, headers, body, status, code) in [
        ("POST", CHAT, vec![json], "{\"messages\": [", 400, None),
        ("POST", CHAT, vec![json], "{} {}", 400, None),
        ("POST", CHAT, vec![json], "\u{fffd}", 400, None),
        ("POST", CHAT, vec![], "{}", 415, Some("unsupported_media_type")),
        ("POST", CHAT, vec![("Content-Type", "text/plain")], "{}", 415, Some("unsupported_media_type")),
        ("GET", CHAT, vec![], "", 405, Some("method_not_allowed")),
        ("DELETE", "/v1/models", vec![], "", 405, Some("method_not_allowed")),
        ("GET", "/v1/nothing", vec![], "", 404, Some("not_found")),
        ("GET", "/v1/models/gpt-4", vec![], "", 404, Some("model_not_found")),
        ("POST", CHAT, vec![json], "{\"model\": \"gpt-4\", \"messages\": []}", 404, Some("model_not_found")),
        ("POST", "/v1/embeddings", vec![json], "{}", 501, Some("not_supported")),
        ("POST", CHAT, vec![json], &"x".repeat(50_000), 413, Some("body_too_large")),
        ("POST", CHAT, vec![json], &"[".repeat(5_000), 400, None),
    ] {
        let response = Response::read(server.send(method, path, &headers, body));
        let shown = &body[..body.len().min(40)];
        assert_eq!(response.status, status, "{method} {path} {shown}");
        let error = response.json()["error"].clone();
        assert_eq!(error["code"].as_str(), code, "{error}");
        assert!(!error["message"].as_str().unwrap().is_empty() && error["type"].is_string(), "{error}");
    }
}

#[test]
fn the_model_is_listed_under_the_name_it_was_given() {
    let Some(server) = Running::start(|config| config.model_name = Some("small".to_owned())) else { return };
    let models = server.get("/v1/models").json();
    assert_eq!(models["data"][0]["id"], "small");
    assert_eq!(server.get("/v1/models/small").json()["id"], "small");
    let mut body = chat(SYSTEM, "Hi", 1);
    body["model"] = "small".into();
    assert_eq!(server.answer(CHAT, &body)["model"], "small");
}
