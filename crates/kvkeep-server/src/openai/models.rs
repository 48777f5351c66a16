//! `/v1/models`: the one model that is served.

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;

use crate::auth::Tenant;
use crate::error::{ApiError, ErrorBody};
use crate::state::AppState;

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Models {
    object: &'static str,
    data: Vec<Model>,
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Model {
    id: String,
    object: &'static str,
    /// Seconds since 1970.
    created: u64,
    owned_by: &'static str,
}

/// The models that can be asked: one.
#[utoipa::path(get, path = "/v1/models", tag = "openai", responses(
    (status = 200, body = Models),
    (status = 401, body = ErrorBody),
))]
pub(super) async fn list(_: Tenant, State(state): State<AppState>) -> Result<Json<Models>, ApiError> {
    let id = state.shared.engine.model_name().to_owned();
    Ok(Json(Models { object: "list", data: vec![Model { id, object: "model", created: 0, owned_by: "kvkeep" }] }))
}
