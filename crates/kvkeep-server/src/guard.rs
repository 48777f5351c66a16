//! Web pages are kept out: what a browser runs may not ask this server behind its user's back.
//!
//! Invariant: without keys, only whoever names this machine itself is answered, by an address or
//! as `localhost`. A page of another site sends its own Origin; a page whose name was made
//! to point here sends its own Host (DNS rebinding). CORS headers alone would not keep a page
//! from asking, only from reading the answer.

use std::net::{Ipv4Addr, Ipv6Addr};

use axum::extract::{Request, State};
use axum::http::HeaderMap;
use axum::http::header::{HOST, ORIGIN};
use axum::middleware::Next;
use axum::response::Response;

use crate::error::ApiError;
use crate::state::AppState;

pub(crate) async fn check(State(state): State<AppState>, request: Request, next: Next) -> Result<Response, ApiError> {
    let keys = state.shared.config.api_keys.is_some();
    allowed(request.headers(), keys)?;
    Ok(next.run(request).await)
}

fn allowed(headers: &HeaderMap, keys: bool) -> Result<(), ApiError> {
    let text = |name| headers.get(name).map(|value| value.to_str().unwrap_or_default());
    let host = text(HOST).unwrap_or_default();
    // With keys, names are fine: a page that was pointed here has no key.
    if !keys && !names_this_machine(host) {
        return Err(ApiError::Elsewhere("use its IP address, or localhost"));
    }
    if let Some(origin) = text(ORIGIN) {
        let of = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
        if !of.is_some_and(|of| of.eq_ignore_ascii_case(host)) {
            return Err(ApiError::Elsewhere("pages of other sites are refused"));
        }
    }
    Ok(())
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
        allowed(&headers, keys).is_ok()
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
}
