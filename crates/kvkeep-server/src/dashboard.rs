//! The page at `/`: files of this crate, nothing from elsewhere. They hold no data; what they
//! show comes from the operator's API, with the operator's key.

use axum::http::header;
use axum::response::IntoResponse;
use axum::routing::get;
use utoipa_axum::router::OpenApiRouter;

use crate::state::AppState;

const PAGE: &str = include_str!("../web/index.html");

pub(crate) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().route("/", get(|| async { file("text/html; charset=utf-8", PAGE) }))
}

fn file(media_type: &'static str, text: &'static str) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, media_type)], text)
}
