//! OpenAI's API, as far as a model that answers text has one.
//!
//! What a client may send and this server cannot do is refused by name, never ignored: an
//! answer that is not what was asked for is worse than an error. Fields that are not known at
//! all are ignored, because clients keep adding them.

mod answer;
mod chat;
mod completion;
mod models;
mod params;
pub(crate) mod prompt;
mod tokens;

use axum::routing::post;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

pub(crate) use chat::Message;
pub(crate) use params::salt;

use crate::auth::Tenant;
use crate::error::ApiError;
use crate::state::AppState;

pub(crate) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(chat::create))
        .routes(routes!(completion::create))
        .routes(routes!(models::list))
        .routes(routes!(models::get))
        .routes(routes!(tokens::tokenize))
        .routes(routes!(tokens::detokenize))
        .route("/v1/embeddings", post(|_: Tenant| async { ApiError::NotSupported("making embeddings") }))
}
