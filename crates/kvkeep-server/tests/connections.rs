//! Who does not ask takes no place from who does; who has sent all that it will gets its answer.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use common::{CHAT, COMPLETIONS, Response, Running, SYSTEM, chat, content};
use kvkeep_server::ApiKeys;

const KEYS: &str = "operator-0123456789\nalice-0123456789 alice\n";
const OPERATOR: (&str, &str) = ("Authorization", "Bearer operator-0123456789");

/// Says so if it takes longer than a client waits gladly.
fn at_once<T>(what: &str, ask: impl FnOnce() -> T) -> T {
    let begin = Instant::now();
    let answer = ask();
    assert!(begin.elapsed() < Duration::from_secs(5), "{what} took {:?}", begin.elapsed());
    answer
}

fn with_keys(connections: usize) -> Option<Running> {
    Running::start(|config| {
        config.api_keys = Some(ApiKeys::parse(KEYS).unwrap());
        config.connections = connections;
    })
}

/// Connections of every kind that asks for nothing: silent, with half a head, and kept alive.
fn idle(server: &Running, count: usize) -> Vec<TcpStream> {
    let open = |number: usize| {
        let mut stream = server.connect();
        match number % 3 {
            0 => (),
            1 => stream.write_all(b"GET /health HT").unwrap(),
            _ => {
                stream.write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
                assert!(stream.read(&mut [0; 1000]).unwrap() > 0);
            }
        }
        stream
    };
    (0..count).map(open).collect()
}

/// 256 connections that said nothing, without a key, kept everybody out for half a minute, probes and the operator too.
#[test]
fn idle_connections_make_room_for_who_asks() {
    let Some(server) = with_keys(12) else { return };
    let idle = idle(&server, 40);
    // Whoever has come a moment ago may still say something.
    std::thread::sleep(Duration::from_millis(1100));
    for _ in 0..20 {
        assert_eq!(at_once("a probe", || server.get("/health").status), 200);
    }
    let answer = at_once("an answer", || server.post_as("alice-0123456789", CHAT, &chat(SYSTEM, "Hi", 1)));
    assert_eq!(answer.status, 200);
    drop(idle);
}

/// Bodies that were announced and did not come held their places for as long as a client may be slow.
#[test]
fn bodies_that_stand_still_make_room_too() {
    let Some(server) = with_keys(8) else { return };
    let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
                Authorization: Bearer alice-0123456789\r\nContent-Length: 99\r\n\r\n{";
    let slow: Vec<TcpStream> = (0..8)
        .map(|_| {
            let mut stream = server.connect();
            stream.write_all(head.as_bytes()).unwrap();
            stream
        })
        .collect();
    std::thread::sleep(Duration::from_millis(1300));
    assert_eq!(at_once("a list", || Response::read(server.send("GET", "/v1/models", &[OPERATOR], ""))).status, 200);
    drop(slow);
}

#[test]
fn who_is_being_answered_is_not_cut_off_by_who_says_nothing() {
    let Some(server) = Running::start(|config| config.connections = 4) else { return };
    let mut running = server.post(COMPLETIONS, &common::endless());
    running.event().unwrap();
    let idle = idle(&server, 30);
    assert!((0..20).all(|_| running.event().is_some()), "its stream goes on");
    drop((running, idle));
}

#[test]
fn when_all_are_being_answered_probes_and_the_operator_are_let_in_and_others_told() {
    let Some(server) = with_keys(2) else { return };
    let key = "alice-0123456789";
    let mut running: Vec<Response> = (0..2).map(|_| server.post_as(key, COMPLETIONS, &common::endless())).collect();
    running.iter_mut().for_each(|stream| drop(stream.event().unwrap()));
    for path in ["/health", "/ready"] {
        assert_eq!(at_once(path, || server.get(path).status), 200);
    }
    let stats = at_once("figures", || Response::read(server.send("GET", "/cache/stats", &[OPERATOR], "")));
    assert_eq!(stats.status, 200);
    let alice = [("Authorization", "Bearer alice-0123456789")];
    let refused = at_once("a refusal", || Response::read(server.send("GET", "/v1/models", &alice, "")));
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("5")));
    assert_eq!(refused.json()["error"]["code"], "too_many_connections");
    drop(running);
    let begin = Instant::now();
    while Response::read(server.send("GET", "/v1/models", &alice, "")).status != 200 {
        assert!(begin.elapsed() < Duration::from_secs(60), "the places of those who left are not free");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A client that closed its own direction behind its request (`nc -N`, some proxies) got no answer.
#[test]
fn a_client_that_sends_nothing_more_gets_its_answer() {
    let Some(server) = Running::start(|_| ()) else { return };
    let body = chat(SYSTEM, "Who wrote Faust?", 24);
    let whole = content(&server.answer(CHAT, &body)).to_owned();
    for version in ["1.0", "1.1"] {
        let json = body.to_string();
        let mut stream = server.connect();
        let head = format!(
            "POST {CHAT} HTTP/{version}\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n\
             Content-Length: {}\r\n\r\n{json}",
            json.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let response = Response::read(stream);
        assert!(response.head.starts_with("HTTP/1."), "{}", response.head);
        assert_eq!((response.status, content(&response.json())), (200, whole.as_str()), "HTTP/{version}");
    }
    let mut streamed = body;
    streamed["stream"] = true.into();
    let stream = server.ask(CHAT, &streamed);
    stream.shutdown(Shutdown::Write).unwrap();
    let parts = Response::read(stream).events();
    let text: String = parts.iter().filter_map(|part| part["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, whole);
    let get = server.send("GET", "/v1/models", &[], "");
    get.shutdown(Shutdown::Write).unwrap();
    assert_eq!(Response::read(get).status, 200);
}

#[test]
fn a_client_that_is_gone_is_not_taken_for_one_that_sends_nothing_more() {
    let Some(server) = Running::start(|config| config.parallel = 1) else { return };
    let mut whole = common::endless();
    whole["stream"] = false.into();
    // Each would take minutes: with the only place taken the last request would wait for them.
    for _ in 0..3 {
        let stream = server.ask(COMPLETIONS, &whole);
        std::thread::sleep(Duration::from_millis(200));
        drop(stream);
    }
    let begin = Instant::now();
    server.answer(CHAT, &chat(SYSTEM, "Hi", 1));
    assert!(begin.elapsed() < Duration::from_secs(60), "{:?}", begin.elapsed());
}

#[test]
fn half_a_body_and_nothing_more_is_let_go() {
    let Some(server) = Running::start(|_| ()) else { return };
    let mut stream = server.connect();
    let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{";
    stream.write_all(head.as_bytes()).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut rest = Vec::new();
    at_once("the end", || drop(stream.read_to_end(&mut rest)));
    assert!(rest.is_empty() || rest.starts_with(b"HTTP/1.1 400"), "{}", String::from_utf8_lossy(&rest));
}
