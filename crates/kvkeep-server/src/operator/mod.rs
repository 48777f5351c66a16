//! What the operator asks: is it up, what is in the cache, and to change that.

use axum::http::StatusCode;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::state::AppState;

pub(crate) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(health))
}

/// The process runs.
#[utoipa::path(get, path = "/health", tag = "operator", responses((status = 200)))]
async fn health() -> StatusCode {
    StatusCode::OK
}
