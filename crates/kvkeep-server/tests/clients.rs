//! What clients send in practice is taken as they mean it, and answered in words that they know.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "helpers of tests fail as tests do")]

mod common;

use std::time::{Duration, Instant};

use common::{CHAT, COMPLETIONS, Response, Running, SYSTEM, cached, chat, config, content};
use kvkeep_engine::{Engine, EngineOptions, default_model_path, user_cache_dir};
use serde_json::{Value, json};

fn text(choice: &Value) -> &str {
    choice["text"].as_str().unwrap()
}

fn completion(more: &[(&str, Value)]) -> Value {
    let mut body = json!({"prompt": "One, two, three,", "temperature": 0, "max_tokens": 8});
    for (name, value) in more {
        body[*name] = value.clone();
    }
    body
}

/// `LiteLLM` and `LangChain` know an overflow by these words, and took kvkeep's for any other error: nothing
/// shortened the chat.
#[test]
fn a_prompt_that_does_not_fit_is_refused_in_the_words_that_clients_look_for() {
    let Some(server) = Running::start(|_| ()) else { return };
    let long = "word ".repeat(3000);
    for (path, body) in [
        (CHAT, chat(SYSTEM, &long, 1)),
        (COMPLETIONS, json!({"prompt": long})),
        (COMPLETIONS, json!({"prompt": vec![7; 2049]})),
        (COMPLETIONS, json!({"prompt": "x".repeat(3 << 20)})),
        (CHAT, json!({"messages": [{"role": "user", "content": long}], "stream": true})),
    ] {
        let response = server.post(path, &body);
        assert_eq!(response.status, 400);
        let error = response.json()["error"].clone();
        assert_eq!(error["code"], "context_length_exceeded");
        let message = error["message"].as_str().unwrap();
        assert!(message.starts_with("This model's maximum context length is 2048 tokens"), "{message}");
        assert!(message.contains("prompt is too long"), "{message}");
    }
}

/// Until a long prompt was read nothing was sent, so a proxy that waits a minute answered 504 in the server's name.
#[test]
fn a_stream_says_that_it_is_there_before_its_first_token() {
    let Some(server) = Running::start(|config| {
        (config.parallel, config.stream_error_window) = (1, Duration::from_millis(200));
    }) else {
        return;
    };
    let mut running = server.post(COMPLETIONS, &common::endless());
    running.event().unwrap();
    let mut body = chat(SYSTEM, "Hi", 4);
    body["stream"] = true.into();
    let begin = Instant::now();
    // It waits in the queue, and its headers are there.
    let mut waiting = Response::read(server.ask(CHAT, &body));
    assert!(begin.elapsed() >= Duration::from_millis(200));
    assert_eq!(waiting.status, 200);
    assert_eq!(waiting.header("x-accel-buffering"), Some("no"));
    assert_eq!(waiting.header("cache-control"), Some("no-cache"));
    assert!(waiting.line().starts_with(": "), "a comment");
    // And again, before anybody on the way gives up.
    while !waiting.line().starts_with(": ") {
        assert!(begin.elapsed() < Duration::from_secs(60), "no other comment came");
    }
    assert!((5..50).contains(&begin.elapsed().as_secs()), "{:?}", begin.elapsed());
    drop(running);
    let parts = waiting.events();
    assert_eq!(parts[0]["choices"][0]["delta"]["role"], "assistant");
    assert!(parts.len() > 2, "{parts:?}");
}

#[test]
fn what_goes_wrong_in_time_has_a_status_also_in_a_stream() {
    let Some(mut server) = Running::start(|config| {
        (config.parallel, config.shutdown_grace) = (1, Duration::from_millis(200));
        config.stream_error_window = Duration::from_secs(60);
    }) else {
        return;
    };
    let refused = server.post(COMPLETIONS, &json!({"prompt": [99_999_999], "stream": true}));
    assert_eq!(refused.status, 400);
    let mut running = server.post(COMPLETIONS, &common::endless());
    running.event().unwrap();
    let mut body = chat(SYSTEM, "Hi", 4);
    body["stream"] = true.into();
    let waiting = server.ask(CHAT, &body);
    // It waits for the one place; when it has come does not matter to what follows.
    std::thread::sleep(Duration::from_millis(100));
    server.tell();
    assert_eq!(Response::read(waiting).status, 503);
    drop(running);
    server.end();
}

/// A file whose end is not the end of its template's turns had answers that ran on to the limit.
#[test]
fn an_answer_ends_with_its_turn_whatever_the_file_calls_its_end() {
    let Some(path) = user_cache_dir().ok().and_then(|dir| default_model_path(&dir, &mut |_, _| ()).ok()) else {
        return;
    };
    let mut file = std::fs::read(path).unwrap();
    let key = b"tokenizer.ggml.eos_token_id";
    let at = file.windows(key.len()).position(|bytes| bytes == key).unwrap() + key.len() + 4;
    file[at..at + 4].copy_from_slice(&0u32.to_le_bytes());
    let copy = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(copy.path(), file).unwrap();
    let engine = Engine::load(copy.path(), &EngineOptions::default().threads(2)).unwrap();
    let server = Running::over(&engine, common::cache(), config());
    let messages = json!([{"role": "user", "content": "What is the capital of France?"}]);
    let answer = server.answer(CHAT, &json!({"messages": messages, "temperature": 0, "max_tokens": 100}));
    assert_eq!(answer["choices"][0]["finish_reason"], "stop", "{answer}");
    assert_eq!(content(&answer), "The capital of France is Paris.");
}

/// A rendered chat sent as a prompt had its control tokens cut up as text: 148 tokens became 178, and
/// nothing of it was shared with the same chat.
#[test]
fn a_rendered_chat_as_a_prompt_is_the_chat() {
    let Some(server) = Running::start(|_| ()) else { return };
    let asked = server.answer(CHAT, &chat(SYSTEM, "Who wrote Emma?", 8));
    let rendered = format!(
        "<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nWho wrote Emma?<|im_end|>\n<|im_start|>assistant\n"
    );
    let body = json!({"prompt": rendered, "temperature": 0, "max_tokens": 8});
    let completed = server.answer(COMPLETIONS, &body);
    assert_eq!(completed["usage"]["prompt_tokens"], asked["usage"]["prompt_tokens"]);
    assert_eq!(text(&completed["choices"][0]), content(&asked));
    assert!(cached(&completed) > 0, "{completed}");
    let warmed = server.answer("/cache/warm", &json!({"prompt": rendered}));
    assert!(warmed["cached_tokens"].as_u64().unwrap() > 0, "{warmed}");
}

#[test]
fn tokens_of_a_prompt_can_be_asked_for_and_turned_back_into_text() {
    let Some(server) = Running::start(|_| ()) else { return };
    let body = chat(SYSTEM, "Who wrote Emma?", 1);
    let tokenized = server.answer("/tokenize", &json!({"messages": body["messages"], "return_token_strs": true}));
    let answer = server.answer(CHAT, &body);
    assert_eq!(tokenized["count"], answer["usage"]["prompt_tokens"]);
    assert_eq!(tokenized["max_model_len"], 2048);
    assert_eq!(tokenized["tokens"].as_array().unwrap().len(), tokenized["token_strs"].as_array().unwrap().len());
    assert_eq!(tokenized["token_strs"][0], "<|im_start|>");
    let rendered = server.answer("/detokenize", &json!({"tokens": tokenized["tokens"]}))["prompt"].clone();
    assert!(rendered.as_str().unwrap().ends_with("<|im_end|>\n<|im_start|>assistant\n"), "{rendered}");
    let again = server.answer("/tokenize", &json!({"prompt": rendered}));
    assert_eq!((&again["tokens"], &again["token_strs"]), (&tokenized["tokens"], &Value::Null));
    let without = json!({"messages": body["messages"], "add_generation_prompt": false});
    assert!(server.answer("/tokenize", &without)["count"].as_u64() < tokenized["count"].as_u64());
    for (path, body) in [
        ("/tokenize", json!({})),
        ("/tokenize", json!({"prompt": "a", "messages": []})),
        ("/detokenize", json!({"tokens": [99_999_999]})),
        ("/detokenize", json!({"tokens": "x"})),
    ] {
        assert_eq!(server.post(path, &body).status, 400, "{path} {body}");
    }
}

/// A history with a message of the assistant that only called a tool was refused, and calls beside a text
/// were dropped without a word.
#[test]
fn messages_of_the_assistant_may_have_no_content_and_their_calls_are_read() {
    let Some(server) = Running::start(|_| ()) else { return };
    let call =
        json!({"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\": \"Ulm\"}"}});
    let rendered = |assistant: Value| {
        let messages = json!([{"role": "user", "content": "Hi"}, assistant, {"role": "user", "content": "And?"}]);
        let tokens = server.answer("/tokenize", &json!({"messages": messages}))["tokens"].clone();
        server.answer("/detokenize", &json!({"tokens": tokens}))["prompt"].as_str().unwrap().to_owned()
    };
    let called = "<tool_call>\n{\"arguments\":{\"city\":\"Ulm\"},\"name\":\"weather\"}\n</tool_call>";
    let alone = rendered(json!({"role": "assistant", "content": null, "tool_calls": [call]}));
    assert!(alone.contains(&format!("assistant\n{called}<|im_end|>")), "{alone}");
    let beside = rendered(json!({"role": "assistant", "content": "Let me see.", "tool_calls": [call]}));
    assert!(beside.contains(&format!("Let me see.\n{called}<|im_end|>")), "{beside}");
    let older = rendered(json!({"role": "assistant", "content": null, "function_call": call["function"]}));
    assert_eq!(older, alone);
    assert!(rendered(json!({"role": "assistant", "content": null})).contains("assistant\n<|im_end|>"));
    assert!(
        rendered(json!({"role": "assistant", "content": null, "refusal": "No."})).contains("assistant\nNo.<|im_end|>")
    );
    let parts = json!([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]);
    assert!(rendered(json!({"role": "assistant", "content": parts})).contains("one\ntwo<|im_end|>"), "parts are lines");
    let refused = server.post(CHAT, &json!({"messages": [{"role": "user", "content": null}]}));
    assert_eq!(refused.status, 400);
}

/// `-1`, `4.0`, an empty stop sequence, a fifth one, seeds beyond 2^63 and an empty model were errors.
#[test]
fn numbers_and_texts_are_taken_as_clients_write_them() {
    let Some(server) = Running::start(|_| ()) else { return };
    let usual = text(&server.answer(COMPLETIONS, &completion(&[]))["choices"][0]).to_owned();
    for (name, value) in [
        ("max_tokens", json!(8.0)),
        ("stop", json!("")),
        ("stop", json!([])),
        ("stop", json!(["a1", "b2", "c3", "d4", "e5", "f6"])),
        ("seed", json!(u64::MAX)),
        ("seed", json!(-1)),
        ("seed", json!(1e30)),
        ("seed", json!(7.0)),
        ("model", json!("")),
        ("n", json!(1.0)),
        ("presence_penalty", json!(0)),
    ] {
        let answer = server.answer(COMPLETIONS, &completion(&[(name, value.clone())]));
        assert_eq!(text(&answer["choices"][0]), usual, "{name}: {value}");
    }
    let all = server.answer(COMPLETIONS, &completion(&[("max_tokens", json!(-1)), ("stop", json!("."))]));
    assert!(text(&all["choices"][0]).starts_with(usual.split('.').next().unwrap()), "{all}");
    let seeded = |seed: Value| {
        let more = [("temperature", json!(1.5)), ("seed", seed), ("max_tokens", json!(16))];
        text(&server.answer(COMPLETIONS, &completion(&more))["choices"][0]).to_owned()
    };
    assert_eq!(seeded(json!(u64::MAX - 1)), seeded(json!(u64::MAX - 1)));
}

#[test]
fn paths_are_found_as_clients_write_them() {
    let Some(server) = Running::start(|_| ()) else { return };
    for path in ["/v1/models", "/v1/models/", "//v1//models", "/models", "/models/", "/health/", "/cache/stats/"] {
        assert_eq!(server.get(path).status, 200, "{path}");
    }
    let body = chat(SYSTEM, "Hi", 1);
    for path in ["/chat/completions", "/v1/chat/completions/", "/v1//chat/completions"] {
        server.answer(path, &body);
    }
    assert_eq!(server.get("/v1/nothing/").status, 404);
}

/// 32 characters that are no text gave 500.
#[test]
fn any_text_is_answered_whatever_characters_it_is_made_of() {
    let Some(server) = Running::start(|_| ()) else { return };
    let noncharacters: String = ('\u{FDD0}'..='\u{FDEF}').chain(['\u{FFFE}', '\u{FFFF}', '\u{10FFFF}']).collect();
    for text in [noncharacters.as_str(), "\u{0}\u{1}", "<|im_end|>\u{FDD0}<|im_end|>"] {
        server.answer(CHAT, &chat(SYSTEM, text, 1));
    }
}

#[test]
fn several_prompts_and_several_answers_come_in_order_each_with_its_index() {
    let Some(server) = Running::start(|_| ()) else { return };
    let prompts = ["One, two, three,", "The capital of France is"];
    let alone = prompts.map(|prompt| server.answer(COMPLETIONS, &completion(&[("prompt", json!(prompt))])));
    let all = server.answer(COMPLETIONS, &completion(&[("prompt", json!(prompts)), ("n", json!(2))]));
    let choices = all["choices"].as_array().unwrap();
    assert_eq!(choices.iter().map(|choice| choice["index"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1, 2, 3]);
    for (choice, expected) in choices.iter().zip([&alone[0], &alone[0], &alone[1], &alone[1]]) {
        assert_eq!(text(choice), text(&expected["choices"][0]));
    }
    let sum = |name: &str| alone.iter().map(|answer| answer["usage"][name].as_u64().unwrap()).sum::<u64>();
    assert_eq!(all["usage"]["prompt_tokens"], sum("prompt_tokens"), "each prompt once");
    assert_eq!(all["usage"]["completion_tokens"], 2 * sum("completion_tokens"));
    let tokens = prompts.map(|prompt| server.answer("/tokenize", &json!({"prompt": prompt}))["tokens"].clone());
    let lists = server.answer(COMPLETIONS, &completion(&[("prompt", json!(tokens)), ("n", json!(2))]));
    assert_eq!(lists["choices"], all["choices"]);
    let body = completion(&[
        ("prompt", json!(prompts)),
        ("stream", json!(true)),
        ("stream_options", json!({"include_usage": true})),
    ]);
    let parts = server.post(COMPLETIONS, &body).events();
    for (index, expected) in alone.iter().enumerate() {
        let of =
            parts.iter().flat_map(|part| part["choices"].as_array().unwrap()).filter(|choice| choice["index"] == index);
        let (mut streamed, mut ends) = (String::new(), 0);
        of.for_each(|choice| {
            streamed += text(choice);
            ends += usize::from(choice["finish_reason"].is_string());
        });
        assert_eq!((streamed.as_str(), ends), (text(&expected["choices"][0]), 1));
    }
    assert_eq!(parts[parts.len() - 1]["usage"]["prompt_tokens"], sum("prompt_tokens"));
}

#[test]
fn several_answers_to_a_chat_differ_by_their_seeds_and_read_its_prompt_once() {
    let Some(server) = Running::start(|_| ()) else { return };
    let mut body = chat(SYSTEM, "Tell me something about the sea.", 12);
    (body["n"], body["seed"], body["temperature"]) = (json!(3), json!(5), json!(1.2));
    let answer = server.answer(CHAT, &body);
    let said = |answer: &Value| -> Vec<String> {
        let choices = answer["choices"].as_array().unwrap();
        choices.iter().map(|choice| choice["message"]["content"].as_str().unwrap().to_owned()).collect()
    };
    let first = said(&answer);
    assert_eq!(first.iter().collect::<std::collections::HashSet<_>>().len(), 3, "{first:?}");
    assert_eq!(said(&server.answer(CHAT, &body)), first, "equal seeds");
    assert_eq!(cached(&answer), 0, "the prompt was new");
    (body["n"], body["seed"]) = (json!(1), json!(6));
    assert_eq!(said(&server.answer(CHAT, &body)), first[1..2], "the second has the next seed");
    let stats = server.get("/cache/stats").json();
    let computed = stats["tokens"]["computed"].as_u64().unwrap();
    let prompt_tokens = answer["usage"]["prompt_tokens"].as_u64().unwrap();
    assert!(computed < prompt_tokens + 7 * 17, "{computed} tokens computed of prompts of {prompt_tokens}");
}

#[test]
fn an_echo_is_the_prompt_before_the_answer() {
    let Some(server) = Running::start(|_| ()) else { return };
    let alone = text(&server.answer(COMPLETIONS, &completion(&[]))["choices"][0]).to_owned();
    let echoed = completion(&[("echo", json!(true))]);
    let whole = format!("One, two, three,{alone}");
    assert_eq!(text(&server.answer(COMPLETIONS, &echoed)["choices"][0]), whole);
    let parts = server.post(COMPLETIONS, &completion(&[("echo", json!(true)), ("stream", json!(true))])).events();
    assert_eq!(parts.iter().map(|part| text(&part["choices"][0])).collect::<String>(), whole);
    let refused = server.post(COMPLETIONS, &completion(&[("echo", json!(true)), ("logprobs", json!(1))]));
    assert_eq!((refused.status, refused.json()["error"]["param"].clone()), (400, json!("echo")));
    assert_eq!(server.post(COMPLETIONS, &completion(&[("n", json!(2)), ("best_of", json!(3))])).status, 400);
    server.answer(COMPLETIONS, &completion(&[("n", json!(2)), ("best_of", json!(2))]));
}

#[test]
fn biases_and_penalties_change_what_is_said() {
    let Some(server) = Running::start(|_| ()) else { return };
    let ask = |more: &[(&str, Value)]| text(&server.answer(COMPLETIONS, &completion(more))["choices"][0]).to_owned();
    let usual = ask(&[]);
    let first = server.answer("/tokenize", &json!({"prompt": usual, "add_special_tokens": false}))["tokens"][0].clone();
    let banned = ask(&[("logit_bias", json!({first.to_string(): -100}))]);
    assert_ne!(banned, usual);
    let forced = ask(&[("logit_bias", json!({"504": 100})), ("max_tokens", json!(3))]);
    let token = server.answer("/detokenize", &json!({"tokens": [504, 504, 504]}))["prompt"].clone();
    assert_eq!(json!(forced), token);
    let long = |more: &[(&str, Value)]| {
        let body = [("prompt", json!("The sea is blue. The sea is")), ("max_tokens", json!(40))];
        ask(&body.iter().chain(more).cloned().collect::<Vec<_>>())
    };
    let plain = long(&[]);
    for name in ["presence_penalty", "frequency_penalty"] {
        assert_ne!(long(&[(name, json!(2))]), plain, "{name}");
    }
}

#[test]
fn models_say_their_context_and_their_other_names() {
    let Some(server) = Running::start(|config| {
        config.model_name = Some("small".to_owned());
        config.model_aliases = vec!["gpt-4o-mini".to_owned(), "small".to_owned()];
    }) else {
        return;
    };
    let models = server.get("/v1/models").json()["data"].clone();
    assert_eq!(
        models.as_array().unwrap().iter().map(|model| model["id"].clone()).collect::<Vec<_>>(),
        ["small", "gpt-4o-mini"]
    );
    for model in models.as_array().unwrap() {
        assert_eq!((&model["max_model_len"], &model["root"]), (&json!(2048), &json!("small")));
        assert_eq!(model["aliases"], json!(["small", "gpt-4o-mini"]));
    }
    assert_eq!(server.get("/v1/models/gpt-4o-mini").json()["root"], "small");
    for asked in ["small", "gpt-4o-mini"] {
        let mut body = chat(SYSTEM, "Hi", 1);
        body["model"] = asked.into();
        assert_eq!(server.answer(CHAT, &body)["model"], asked);
    }
    assert_eq!(server.get("/v1/models/gpt-4o").status, 404);
}

#[test]
fn a_request_has_an_id_its_own_or_a_new_one() {
    let Some(server) = Running::start(|_| ()) else { return };
    let own = [("Content-Type", "application/json"), ("X-Request-Id", "abc-1")];
    let response = Response::read(server.send("POST", CHAT, &own, &chat(SYSTEM, "Hi", 1).to_string()));
    assert_eq!(response.header("x-request-id"), Some("abc-1"));
    assert_eq!(response.json()["id"], "chatcmpl-abc-1");
    let new = server.post(CHAT, &chat(SYSTEM, "Hi", 1));
    let id = new.header("x-request-id").unwrap().to_owned();
    assert_eq!(new.json()["id"], format!("chatcmpl-{id}"));
    for path in ["/v1/nothing", "/health"] {
        let response = Response::read(server.send("GET", path, &[("X-Request-Id", "of an error")], ""));
        assert_eq!(response.header("x-request-id").map(str::len), Some(32), "{path}: a space is not taken");
    }
}
