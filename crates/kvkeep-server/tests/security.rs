//! Who may ask what: keys, hosts, origins.

mod common;

use common::{CHAT, Response, Running, SYSTEM, cache, chat, config};
use kvkeep_server::{ApiKeys, Server, ServerError};

const KEYS: &str = "operator-0123456789\nalice-0123456789 alice\n";

#[test]
fn with_keys_nothing_is_answered_without_one() {
    let Some(server) = Running::start(|config| config.api_keys = Some(ApiKeys::parse(KEYS).unwrap())) else { return };
    let body = chat(SYSTEM, "Hi", 1).to_string();
    for (method, path) in [
        ("GET", "/v1/models"),
        ("GET", "/v1/models/x"),
        ("GET", "/v1/nothing"),
        ("DELETE", "/v1/models"),
        ("POST", CHAT),
        ("POST", "/v1/completions"),
        ("POST", "/v1/embeddings"),
    ] {
        for authorization in
            [None, Some("Bearer "), Some("Bearer operator-012345678"), Some("Basic operator-0123456789")]
        {
            let mut headers = vec![("Content-Type", "application/json")];
            headers.extend(authorization.map(|value| ("Authorization", value)));
            let sent = if method == "POST" { body.as_str() } else { "" };
            let response = Response::read(server.send(method, path, &headers, sent));
            assert_eq!(response.status, 401, "{method} {path} {authorization:?}");
            assert_eq!(response.header("www-authenticate"), Some("Bearer realm=\"kvkeep\""));
            assert_eq!(response.json()["error"]["code"], "invalid_api_key");
        }
    }
    for path in ["/", "/health"] {
        assert_eq!(server.get(path).status, 200, "{path}");
    }
    let lower = [("Authorization", "bearer alice-0123456789")];
    assert_eq!(Response::read(server.send("GET", "/v1/models", &lower, "")).status, 200);
    for key in ["operator-0123456789", "alice-0123456789"] {
        assert_eq!(server.post_as(key, CHAT, &chat(SYSTEM, "Hi", 1)).status, 200, "{key}");
    }
}

#[test]
fn a_body_is_not_read_before_the_key_is_known() {
    let Some(server) = Running::start(|config| config.api_keys = Some(ApiKeys::parse(KEYS).unwrap())) else { return };
    // It announces a body that never comes.
    let headers = [("Content-Type", "application/json"), ("Content-Length", "1000000")];
    assert_eq!(Response::read(server.send("POST", CHAT, &headers, "")).status, 401);
}

#[test]
fn web_pages_of_other_sites_and_rebound_names_are_refused() {
    let Some(server) = Running::start(|_| ()) else { return };
    let port = server.address.port();
    let own = format!("localhost:{port}");
    let page = format!("http://{own}");
    for (host, origin, status) in [
        (own.as_str(), None, 200),
        (own.as_str(), Some(page.as_str()), 200),
        ("evil.example", None, 403),
        (own.as_str(), Some("http://evil.example"), 403),
        (own.as_str(), Some("null"), 403),
    ] {
        for path in ["/v1/models", "/health", "/"] {
            let mut headers = vec![("Host", host)];
            headers.extend(origin.map(|origin| ("Origin", origin)));
            let response = Response::read(server.send("GET", path, &headers, ""));
            assert_eq!(response.status, status, "{path} {host} {origin:?}");
        }
    }
    // What a page may send without asking first (a form, a "simple" fetch) is not taken.
    let headers = [("Content-Type", "text/plain")];
    assert_eq!(Response::read(server.send("POST", CHAT, &headers, "{}")).status, 415);
}

/// Extensions, apps and pages on another local port could not use the server at all.
#[test]
fn pages_of_allowed_origins_are_answered_and_told_so_and_no_others() {
    let Some(server) = Running::start(|config| {
        config.allow_origins =
            ["http://localhost:3000", "app://notes.example"].map(|origin| origin.parse().unwrap()).into();
    }) else {
        return;
    };
    let preflight = |origin: &str| {
        let asked = [
            ("Origin", origin),
            ("Access-Control-Request-Method", "POST"),
            ("Access-Control-Request-Headers", "authorization,content-type,x-stainless-os"),
        ];
        Response::read(server.send("OPTIONS", CHAT, &asked, ""))
    };
    for origin in ["http://localhost:3000", "app://notes.example"] {
        let allowed = preflight(origin);
        assert_eq!(allowed.status, 204);
        assert_eq!(allowed.header("access-control-allow-origin"), Some(origin));
        assert_eq!(allowed.header("access-control-allow-headers"), Some("authorization,content-type,x-stainless-os"));
        assert!(allowed.header("access-control-allow-methods").unwrap().contains("POST"));
        let headers = [("Origin", origin), ("Content-Type", "application/json")];
        let answer = Response::read(server.send("POST", CHAT, &headers, &chat(SYSTEM, "Hi", 1).to_string()));
        assert_eq!((answer.status, answer.header("access-control-allow-origin")), (200, Some(origin)));
        assert_eq!(answer.header("vary"), Some("origin"));
        let error = Response::read(server.send("POST", CHAT, &headers, "{"));
        assert_eq!((error.status, error.header("access-control-allow-origin")), (400, Some(origin)));
    }
    for origin in ["http://localhost:3001", "http://evil.example", "null", "https://localhost:3000"] {
        let refused = preflight(origin);
        assert_eq!((refused.status, refused.header("access-control-allow-origin")), (403, None), "{origin}");
    }
    let nobodys = server.get("/v1/models");
    assert_eq!((nobodys.status, nobodys.header("access-control-allow-origin")), (200, None));
}

#[test]
fn a_preflight_shows_no_key_and_needs_none_but_what_follows_does() {
    let Some(server) = Running::start(|config| {
        config.api_keys = Some(ApiKeys::parse(KEYS).unwrap());
        config.allow_origins = vec!["http://localhost:3000".parse().unwrap()];
    }) else {
        return;
    };
    let page = [("Origin", "http://localhost:3000"), ("Access-Control-Request-Method", "GET")];
    assert_eq!(Response::read(server.send("OPTIONS", "/v1/models", &page, "")).status, 204);
    let refused = Response::read(server.send("GET", "/v1/models", &page[..1], ""));
    assert_eq!((refused.status, refused.header("access-control-allow-origin")), (401, Some("http://localhost:3000")));
}

#[test]
fn other_machines_need_keys() {
    let Some(engine) = common::engine() else { return };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut open = config();
    open.address = "0.0.0.0:0".parse().unwrap();
    let refused = runtime.block_on(Server::bind(engine.clone(), cache(), open.clone()));
    assert!(matches!(refused, Err(ServerError::KeysNeeded(_))));
    open.api_keys = Some(ApiKeys::parse(KEYS).unwrap());
    assert!(runtime.block_on(Server::bind(engine.clone(), cache(), open)).is_ok());
}
