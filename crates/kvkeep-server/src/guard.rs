//! Web pages are kept out, but for those that were let in: what a browser runs may not ask this
//! server behind its user's back.
//!
//! Invariant: without keys, only whoever names this machine itself is answered, by an address or
//! as `localhost`; and of pages only the server's own, and those of origins that were allowed
//! one by one. A page of another site sends its own Origin; a page whose name was made
//! to point here sends its own Host (DNS rebinding). CORS headers alone would not keep a page
//! from asking, only from reading the answer; they are sent to allowed origins and to nobody else.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header::{self, HOST, HeaderName, ORIGIN};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};

use crate::connections::Place;
use crate::error::ApiError;
use crate::state::AppState;

/// Asked by machines that look whether the server is well.
const PROBES: [&str; 3] = ["/health", "/ready", "/metrics"];
/// Until a place may be free.
const CROWDED_S: u64 = 5;
/// What a page may read of an answer, besides its body.
const EXPOSED: &str = "x-request-id, x-kvkeep-ttft-ms, retry-after";
const METHODS: &str = "GET, POST, OPTIONS";
/// A browser asks again after this.
const PREFLIGHT_S: &str = "600";
const ALLOW_LOCAL: HeaderName = HeaderName::from_static("access-control-allow-private-network");
const ASKS_LOCAL: HeaderName = HeaderName::from_static("access-control-request-private-network");

/// Where a page comes from: a scheme, a host, and perhaps a port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Origin(String);

impl FromStr for Origin {
    type Err = String;

    /// Reads what a browser sends as `Origin`.
    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim().trim_end_matches('/');
        match text.split_once("://") {
            Some((scheme, host))
                if !scheme.is_empty() && !host.is_empty() && !host.contains(['/', '*', '?', '#', ' ', ',']) =>
            {
                Ok(Self(text.to_ascii_lowercase()))
            }
            _ if ["*", "null"].contains(&text) => {
                Err("any page could use the server behind its user's back: name the origins one by one".to_owned())
            }
            _ => Err("give an origin such as http://localhost:3000 or app://obsidian.md, without a path".to_owned()),
        }
    }
}

impl TryFrom<String> for Origin {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Origin> for String {
    fn from(origin: Origin) -> Self {
        origin.0
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

pub(crate) async fn check(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let config = &state.shared.config;
    let headers = request.headers();
    let page = match allowed(headers, config.api_keys.is_some(), &config.allow_origins) {
        Ok(page) => page,
        Err(error) => return error.into_response(),
    };
    let mut response = match page {
        Some(_) if request.method() == Method::OPTIONS => preflight(headers),
        _ if is_crowded(&state, &request) => ApiError::Crowded { retry_after_s: CROWDED_S }.into_response(),
        _ => next.run(request).await,
    };
    let headers = response.headers_mut();
    if let Some(origin) = page {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static(EXPOSED));
    }
    if !config.allow_origins.is_empty() {
        headers.append(header::VARY, HeaderValue::from_static("origin"));
    }
    response
}

/// Does it come over a place that is kept for others? Those are for probes, and for operators who
/// show their key.
fn is_crowded(state: &AppState, request: &Request) -> bool {
    let kept = request.extensions().get::<Arc<Place>>().is_some_and(|place| !place.is_usual());
    if !kept || PROBES.contains(&request.uri().path()) {
        return false;
    }
    let keys = state.shared.config.api_keys.is_some();
    !(keys && state.tenant(request.headers()).is_ok_and(|tenant| tenant.is_operator()))
}

/// What a browser wants to know before it lets an allowed page ask.
fn preflight(asked: &HeaderMap) -> Response {
    let mut response = StatusCode::NO_CONTENT.into_response();
    let headers = response.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static(METHODS));
    headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static(PREFLIGHT_S));
    if let Some(names) = asked.get(header::ACCESS_CONTROL_REQUEST_HEADERS) {
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, names.clone());
    }
    if asked.contains_key(ASKS_LOCAL) {
        headers.insert(ALLOW_LOCAL, HeaderValue::from_static("true"));
    }
    response
}

/// The origin of an allowed page, if it is one that asks; nobody's page and the server's own need none.
fn allowed(headers: &HeaderMap, keys: bool, origins: &[Origin]) -> Result<Option<HeaderValue>, ApiError> {
    let text = |value: &HeaderValue| value.to_str().unwrap_or_default().to_owned();
    let host = headers.get(HOST).map(text).unwrap_or_default();
    // With keys, names are fine: a page that was pointed here has no key.
    if !keys && !names_this_machine(&host) {
        return Err(ApiError::Elsewhere("use its IP address, or localhost"));
    }
    let Some(value) = headers.get(ORIGIN) else { return Ok(None) };
    let origin = text(value);
    if origins.iter().any(|allowed| allowed.0.eq_ignore_ascii_case(&origin)) {
        return Ok(Some(value.clone()));
    }
    let of = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
    if of.is_some_and(|of| of.eq_ignore_ascii_case(&host)) {
        return Ok(None);
    }
    Err(ApiError::Elsewhere("pages of other sites are refused, but for those that --allow-origin names"))
}

fn names_this_machine(host: &str) -> bool {
    if let Some((address, _port)) = host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        return address.parse::<Ipv6Addr>().is_ok();
    }
    let name = host.split_once(':').map_or(host, |(name, _port)| name);
    name.eq_ignore_ascii_case("localhost") || name.parse::<Ipv4Addr>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(host: &str, origin: Option<&str>, keys: bool) -> bool {
        let mut headers = HeaderMap::from_iter([(HOST, host.parse().unwrap())]);
        if let Some(origin) = origin {
            headers.insert(ORIGIN, origin.parse().unwrap());
        }
        allowed(&headers, keys, &["app://Notes.example".parse().unwrap()]).is_ok()
    }

    #[test]
    fn without_keys_only_this_machines_own_names_are_answered() {
        for host in ["localhost", "LocalHost:8080", "127.0.0.1:8080", "[::1]:8080", "[::1]"] {
            assert!(answered(host, None, false), "{host}");
        }
        for host in ["evil.example", "localhost.evil.example:8080", "127.0.0.1.evil.example", "", "[evil]:80", "::1"] {
            assert!(!answered(host, None, false), "{host}");
        }
        assert!(answered("llm.lan:8080", None, true));
    }

    #[test]
    fn pages_of_other_sites_are_refused_with_and_without_keys() {
        for keys in [false, true] {
            assert!(answered("localhost:8080", Some("http://localhost:8080"), keys));
            for origin in ["http://localhost:8081", "http://evil.example", "null", "http://localhost", "file://"] {
                assert!(!answered("localhost:8080", Some(origin), keys), "{origin}");
            }
        }
        assert!(answered("llm.example", Some("https://llm.example"), true));
    }

    #[test]
    fn an_origin_that_was_allowed_is_and_nothing_like_it() {
        for keys in [false, true] {
            assert!(answered("localhost:8080", Some("app://notes.example"), keys));
            for origin in ["app://notes.example.evil", "app://notes.example:1", "http://notes.example", "app://notes"] {
                assert!(!answered("localhost:8080", Some(origin), keys), "{origin}");
            }
        }
        assert!(!answered("evil.example", Some("app://notes.example"), false), "a name that was pointed here");
    }

    #[test]
    fn origins_are_named_one_by_one() {
        for (text, says) in [
            ("*", "one by one"),
            ("null", "one by one"),
            ("localhost:3000", "such as"),
            ("http://", "such as"),
            ("http://*.example", "such as"),
            ("http://a.example/path", "such as"),
            ("http://a, http://b", "such as"),
            ("", "such as"),
        ] {
            assert!(text.parse::<Origin>().unwrap_err().contains(says), "{text}");
        }
        assert_eq!("HTTP://Localhost:3000/".parse::<Origin>().unwrap().to_string(), "http://localhost:3000");
    }
}
