//! The description at `/openapi.json`: what is the same for many routes.
//!
//! Routes are described where they are written, so that a description cannot be of a route
//! that is not there.

use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa::{IntoResponses, Modify, OpenApi, ToSchema};

use crate::error::ErrorBody;

/// What all routes together are.
#[derive(Debug, OpenApi)]
#[openapi(
    info(
        title = "kvkeep",
        description = "An OpenAI-compatible server whose prompts stay warm: what it has read once is not computed \
                       again. Under `operator` is what its operator sees and changes of the cache."
    ),
    modifiers(&Key),
    security(("key" = [])),
    tags(
        (name = "openai", description = "OpenAI's API; any key of the server"),
        (name = "operator", description = "The cache, as its operator sees and changes it; the operator's key")
    )
)]
pub(crate) struct Description;

/// The key that a server with keys asks for.
struct Key;

impl Modify for Key {
    fn modify(&self, description: &mut utoipa::openapi::OpenApi) {
        let mut scheme = Http::new(HttpAuthScheme::Bearer);
        scheme.description =
            Some("A key of the server's key file. A server without one answers this machine alone.".to_owned());
        let components = description.components.get_or_insert_with(Default::default);
        components.add_security_scheme("key", SecurityScheme::Http(scheme));
    }
}

/// One event of a stream.
#[derive(Debug, ToSchema)]
#[expect(dead_code, reason = "describes")]
pub(crate) struct StreamEvent {
    /// A part of the answer as JSON; `[DONE]` is the last one
    data: String,
}

/// Of routes that any key opens.
#[derive(Debug, IntoResponses)]
#[expect(dead_code, reason = "describes")]
pub(crate) enum KeyErrors {
    /// No key, or none that this server knows
    #[response(status = 401)]
    NoKey(ErrorBody),
    /// A web page of another site asks, or one whose name was made to point here
    #[response(status = 403)]
    Elsewhere(ErrorBody),
    /// Every place for a connection is taken by a request under way
    #[response(status = 503)]
    Crowded(ErrorBody),
}

/// Of routes that the operator's key opens.
#[derive(Debug, IntoResponses)]
#[expect(dead_code, reason = "describes")]
pub(crate) enum OperatorErrors {
    /// No key, or none that this server knows
    #[response(status = 401)]
    NoKey(ErrorBody),
    /// Not the operator's key, or a web page of another site asks
    #[response(status = 403)]
    NotTheOperator(ErrorBody),
    /// Every place for a connection is taken by a request under way, and no operator's key was shown
    #[response(status = 503)]
    Crowded(ErrorBody),
}

/// Of routes that open without a key.
#[derive(Debug, IntoResponses)]
#[expect(dead_code, reason = "describes")]
pub(crate) enum OpenErrors {
    /// A web page of another site asks, or one whose name was made to point here
    #[response(status = 403)]
    Elsewhere(ErrorBody),
}

/// Of routes that take a body.
#[derive(Debug, IntoResponses)]
#[expect(dead_code, reason = "describes")]
pub(crate) enum BodyErrors {
    /// The body is not as described: the message says what is wrong with which parameter
    #[response(status = 400)]
    Invalid(ErrorBody),
    /// The body did not come in time
    #[response(status = 408)]
    Slow(ErrorBody),
    /// The body is too large
    #[response(status = 413)]
    TooLarge(ErrorBody),
    /// The body is not announced as JSON
    #[response(status = 415)]
    MediaType(ErrorBody),
}

/// Of routes whose requests wait in the queue.
#[derive(Debug, IntoResponses)]
#[expect(dead_code, reason = "describes")]
pub(crate) enum QueueErrors {
    /// The queue is full: the header `Retry-After` says when to come back
    #[response(status = 429)]
    Busy(ErrorBody),
    /// The model or the cache failed
    #[response(status = 500)]
    Failed(ErrorBody),
    /// The server is shutting down, or every place for a connection is taken
    #[response(status = 503)]
    ShuttingDown(ErrorBody),
    /// It took longer than the server allows
    #[response(status = 504)]
    Timeout(ErrorBody),
}
