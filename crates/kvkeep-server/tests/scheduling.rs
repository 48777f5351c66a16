//! Who waits, who is sent away, and what becomes of those who leave, also at the end of the server.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use common::{CHAT, COMPLETIONS, Response, Running, SYSTEM, cached, chat, content, endless};
use serde_json::{Value, json};

/// Starts an answer that goes on for minutes, and waits for its first token.
fn start_endless(server: &Running) -> Response {
    let mut response = server.post(COMPLETIONS, &endless());
    assert_eq!(response.status, 200);
    response.event().unwrap();
    response
}

#[test]
fn a_client_that_leaves_frees_its_place() {
    let Some(server) = Running::start(|config| config.parallel = 1) else { return };
    for _ in 0..3 {
        drop(start_endless(&server));
    }
    // With the only place taken this would wait until the test runs out of patience.
    assert!(!content(&server.answer(CHAT, &chat(SYSTEM, "Hi", 2))).is_empty());
}

#[test]
fn a_client_that_leaves_while_it_waits_is_forgotten() {
    let Some(server) = Running::start(|config| (config.parallel, config.queue) = (1, 1)) else { return };
    let running = start_endless(&server);
    let body = chat(SYSTEM, "Hi", 1);
    // Each takes the one place in the queue, and leaves it.
    for _ in 0..3 {
        drop(server.ask(CHAT, &body));
    }
    let begin = Instant::now();
    let waits = loop {
        let mut waits = server.ask(CHAT, &body);
        waits.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let refused = waits.read(&mut [0; 1]).is_ok();
        if !refused {
            break waits;
        }
        assert!(begin.elapsed() < Duration::from_secs(60), "the places of those who left are not free");
    };
    drop(running);
    waits.set_read_timeout(None).unwrap();
    assert_eq!(Response::read(waits).status, 200);
}

#[test]
fn one_more_than_the_queue_holds_is_told_when_to_come_back() {
    let Some(server) = Running::start(|config| (config.parallel, config.queue) = (1, 1)) else { return };
    let running = start_endless(&server);
    let body = chat(SYSTEM, "Hi", 1);
    // One of the three waits; the others are sent away at once, so they answer first.
    let asked: Vec<TcpStream> = (0..3).map(|_| server.ask(CHAT, &body)).collect();
    let threads: Vec<_> = asked.into_iter().map(|stream| std::thread::spawn(|| Response::read(stream))).collect();
    let begin = Instant::now();
    while threads.iter().filter(|thread| thread.is_finished()).count() < 2 {
        assert!(begin.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(running);
    let mut responses: Vec<Response> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
    responses.sort_by_key(|response| response.status);
    assert_eq!(responses.iter().map(|response| response.status).collect::<Vec<_>>(), [200, 429, 429]);
    let busy = responses.pop().unwrap();
    assert!((1..=600).contains(&busy.header("retry-after").unwrap().parse().unwrap()));
    assert_eq!(busy.json()["error"]["code"], "queue_full");
}

#[test]
fn answers_at_the_same_time_are_those_given_alone() {
    let Some(server) = Running::start(|config| config.parallel = 3) else { return };
    let bodies: Vec<Value> =
        ["Who wrote Faust?", "What is a library?", "Hello!"].map(|user| chat(SYSTEM, user, 20)).into();
    let alone: Vec<String> = bodies.iter().map(|body| content(&server.answer(CHAT, body)).to_owned()).collect();
    let streams: Vec<TcpStream> = bodies.iter().map(|body| server.ask(CHAT, body)).collect();
    let together: Vec<String> =
        streams.into_iter().map(|stream| content(&Response::read(stream).json()).to_owned()).collect();
    assert_eq!(together, alone);
}

#[test]
fn a_request_that_takes_too_long_ends_with_an_error() {
    let Some(server) = Running::start(|config| {
        // The stream begins at once, so that its end is an event however slow the machine is.
        (config.request_timeout, config.stream_error_window) = (Duration::from_millis(1500), Duration::ZERO);
    }) else {
        return;
    };
    let mut stream = server.post(COMPLETIONS, &endless());
    let events: Vec<String> = std::iter::from_fn(|| stream.event()).collect();
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(last["error"]["code"], "timeout", "{last}");
    let mut whole = endless();
    whole["stream"] = false.into();
    let response = server.post(COMPLETIONS, &whole);
    assert_eq!(response.status, 504);
    assert_eq!(response.json()["error"]["code"], "timeout");
}

#[test]
fn what_is_under_way_is_finished_at_the_end_and_nothing_new_begins() {
    let Some(mut server) = Running::start(|_| ()) else { return };
    let mut body = chat(SYSTEM, "Count to ten.", 40);
    let whole = server.answer(CHAT, &body);
    body["stream"] = true.into();
    let mut response = server.post(CHAT, &body);
    response.event().unwrap();
    let address = server.address;
    server.tell();
    let parts = response.events();
    let text: String = parts.iter().filter_map(|part| part["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, content(&whole));
    server.end();
    assert!(TcpStream::connect(address).is_err(), "nobody listens any more");
}

#[test]
fn what_takes_longer_than_the_grace_is_cancelled_and_says_so() {
    let Some(mut server) = Running::start(|config| {
        (config.parallel, config.shutdown_grace) = (1, Duration::from_millis(200));
    }) else {
        return;
    };
    let mut running = start_endless(&server);
    let waiting = server.ask(CHAT, &chat(SYSTEM, "Hi", 1));
    // It waits for the one place; when it has come does not matter to what follows.
    std::thread::sleep(Duration::from_millis(100));
    server.tell();
    let events: Vec<String> = std::iter::from_fn(|| running.event()).collect();
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(last["error"]["code"], "shutting_down", "{last}");
    assert_eq!(Response::read(waiting).status, 503);
    server.end();
}

#[test]
fn what_was_asked_before_a_restart_is_warm_after_it() {
    let Some(engine) = common::engine() else { return };
    let dir = tempfile::tempdir().unwrap();
    let open = || {
        let disk = kvkeep::DiskConfig::new(dir.path().join("cache"), 256 << 20);
        kvkeep::KvCache::new(kvkeep::CacheConfig::new(64 << 20).disk(disk)).unwrap()
    };
    let body = chat(SYSTEM, "Who wrote Faust?", 12);
    let before = Running::over(engine, open(), common::config());
    let cold = before.answer(CHAT, &body);
    before.end();
    let after = Running::over(engine, open(), common::config());
    let warm = after.answer(CHAT, &body);
    assert_eq!(content(&warm), content(&cold));
    assert!(cached(&cold) == 0 && cached(&warm) > 0);
    after.end();
}

#[test]
fn a_client_that_does_not_read_is_cut_off() {
    let Some(server) = Running::start(|config| {
        (config.connections, config.client_timeout) = (1, Duration::from_millis(500));
    }) else {
        return;
    };
    // Many times more than both sides' buffers take.
    let mut deaf = server.connect();
    deaf.set_write_timeout(Some(Duration::from_secs(2))).unwrap();
    let request = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let sent = (0..2_000).take_while(|_| deaf.write_all(request).is_ok()).count();
    assert!(sent > 100, "{sent}");
    // The only place is free again.
    let begin = Instant::now();
    while server.get("/v1/models").status != 200 {
        assert!(begin.elapsed() < Duration::from_secs(60), "it is still there");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn slow_and_broken_clients_are_let_go_and_others_are_answered() {
    let Some(server) = Running::start(|config| {
        config.client_timeout = Duration::from_millis(300);
        config.connections = 4;
    }) else {
        return;
    };
    // Nothing, half a head, half a body, a keep-alive connection that idles: all places.
    let silent = server.connect();
    let mut half = server.connect();
    half.write_all(b"GET /v1/models HT").unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{";
    let mut slow = server.connect();
    slow.write_all(head.as_bytes()).unwrap();
    let mut idle = server.connect();
    idle.write_all(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    // Whoever comes meanwhile may be told to come back, and gets a place when they are let go.
    let begin = Instant::now();
    while server.get("/v1/models").status != 200 {
        assert!(begin.elapsed() < Duration::from_secs(30), "nobody was let go");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(Response::read(slow).status, 408);
    for mut cut in [silent, half, idle] {
        let mut rest = Vec::new();
        // Ended or reset: either way it is over.
        drop(cut.read_to_end(&mut rest));
    }
    let answer = server.answer(COMPLETIONS, &json!({"prompt": "Hi", "max_tokens": 1}));
    assert_eq!(answer["usage"]["completion_tokens"], 1);
}
