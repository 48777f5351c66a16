//! What happens to every request before its route is looked for, and to every answer behind it.
//!
//! Paths are taken as clients are known to write them: with a slash at the end or one too many,
//! and OpenAI's without `/v1`. Each request has an id, its client's own or a new one; the answer
//! carries it back, and what is answered and logged is named after it.

use std::borrow::Cow;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::http::uri::PathAndQuery;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Request, Response, Uri};
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::service::Service;
use hyper_util::service::TowerToHyperService;
use uuid::Uuid;

use crate::connections::{Asked, Place};

pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const REQUEST_ID_CHARS: usize = 128;
/// OpenAI's paths behind `/v1`.
const OPENAI: [&str; 4] = ["/chat/completions", "/completions", "/models", "/embeddings"];

/// What a request is called.
#[derive(Debug, Clone)]
pub(crate) struct RequestId(String);

/// All routes, as one connection asks for them.
#[derive(Debug, Clone)]
pub(crate) struct Front {
    router: TowerToHyperService<Router>,
    place: Arc<Place>,
}

/// An answer's body; the request is under way until it is sent.
struct Answer {
    body: Body,
    _asked: Asked,
}

impl Front {
    pub(crate) fn new(router: Router, place: Arc<Place>) -> Self {
        Self { router: TowerToHyperService::new(router), place }
    }
}

impl Service<Request<Incoming>> for Front {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let asked = self.place.asked(!request.body().is_end_stream());
        let mut request = request.map(Body::new);
        if let Some(uri) = usual(request.uri()) {
            *request.uri_mut() = uri;
        }
        let id = RequestId::of(request.headers());
        request.extensions_mut().insert(id.clone());
        request.extensions_mut().insert(Arc::clone(&self.place));
        let answered = self.router.call(request);
        Box::pin(async move {
            let mut response = answered.await?;
            if let Ok(id) = HeaderValue::from_str(&id.0) {
                response.headers_mut().insert(REQUEST_ID, id);
            }
            Ok(response.map(|body| Body::new(Answer { body, _asked: asked })))
        })
    }
}

impl RequestId {
    /// The client's own if it can stand in a header and a line of the log, or a new one.
    fn of(headers: &HeaderMap) -> Self {
        let given = headers
            .get(REQUEST_ID)
            .and_then(|id| id.to_str().ok())
            .filter(|id| (1..=REQUEST_ID_CHARS).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic()));
        Self(given.map_or_else(|| Uuid::new_v4().simple().to_string(), str::to_owned))
    }
}

impl std::fmt::Display for RequestId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.get_mut().body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The same address as the routes have it, if it is written otherwise.
fn usual(uri: &Uri) -> Option<Uri> {
    let path = usual_path(uri.path());
    if path == uri.path() {
        return None;
    }
    let with_query = match uri.query() {
        Some(query) => format!("{path}?{query}"),
        None => path.into_owned(),
    };
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(PathAndQuery::try_from(with_query).ok()?);
    Uri::from_parts(parts).ok()
}

fn usual_path(path: &str) -> Cow<'_, str> {
    let mut usual = Cow::Borrowed(path);
    while usual.contains("//") {
        usual = usual.replace("//", "/").into();
    }
    if usual.len() > 1 && usual.ends_with('/') {
        usual = usual.trim_end_matches('/').to_owned().into();
    }
    let is_openais =
        |name: &&str| usual.strip_prefix(*name).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    if OPENAI.iter().any(is_openais) {
        usual = format!("/v1{usual}").into();
    }
    usual
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Clients whose address ends in a slash, or lacks `/v1`, got 404 for everything.
    #[test]
    fn paths_are_taken_as_clients_write_them() {
        for (path, usual) in [
            ("/", "/"),
            ("//", "/"),
            ("/v1/models", "/v1/models"),
            ("/v1/models/", "/v1/models"),
            ("/v1//chat/completions", "/v1/chat/completions"),
            ("//v1///chat/completions//", "/v1/chat/completions"),
            ("/chat/completions", "/v1/chat/completions"),
            ("/completions/", "/v1/completions"),
            ("/models/small", "/v1/models/small"),
            ("/modelsmall", "/modelsmall"),
            ("/cache/stats/", "/cache/stats"),
            ("/v1/nothing", "/v1/nothing"),
        ] {
            assert_eq!(usual_path(path), usual, "{path}");
        }
        let uri: Uri = "/models/?limit=3".parse().unwrap();
        assert_eq!(super::usual(&uri).unwrap(), "/v1/models?limit=3");
        assert_eq!(super::usual(&"/v1/models?a=//".parse().unwrap()), None);
    }

    #[test]
    fn a_request_is_called_as_its_client_calls_it_if_that_can_be_said() {
        let of = |id: &'static str| {
            RequestId::of(&HeaderMap::from_iter([(REQUEST_ID, HeaderValue::from_static(id))])).to_string()
        };
        assert_eq!(of("abc-1:2"), "abc-1:2");
        for wrong in ["", "a b", "a\tb"] {
            assert_eq!(of(wrong).len(), 32, "{wrong:?}");
        }
        assert_ne!(RequestId::of(&HeaderMap::new()).to_string(), RequestId::of(&HeaderMap::new()).to_string());
    }
}
