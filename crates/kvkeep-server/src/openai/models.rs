//! `/v1/models`: the one model that is served.

use axum::Json;
use axum::extract::{Path, State};
use serde::Serialize;
use utoipa::ToSchema;

use crate::auth::Tenant;
use crate::describe::KeyErrors;
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

impl Model {
    fn served(state: &AppState) -> Self {
        Self { id: state.shared.model.clone(), object: "model", created: 0, owned_by: "kvkeep" }
    }
}

/// The models that can be asked: one.
#[utoipa::path(get, path = "/v1/models", operation_id = "list_models", tag = "openai", responses(
    (status = 200, description = "One model", body = Models),
    KeyErrors,
))]
pub(super) async fn list(_: Tenant, State(state): State<AppState>) -> Json<Models> {
    Json(Models { object: "list", data: vec![Model::served(&state)] })
}

/// One model.
#[utoipa::path(get, path = "/v1/models/{id}", operation_id = "get_model", tag = "openai", params(
    ("id" = String, Path, description = "As /v1/models names it", example = "SmolLM2-135M-Instruct.Q4_1"),
), responses(
    (status = 200, description = "It is the one that is served", body = Model),
    (status = 400, description = "The name is not text", body = ErrorBody),
    (status = 404, description = "There is no such model", body = ErrorBody),
    KeyErrors,
))]
pub(super) async fn get(
    _: Tenant,
    State(state): State<AppState>,
    Path(id): Path<String>,
) -> Result<Json<Model>, ApiError> {
    check(Some(&id), &state)?;
    Ok(Json(Model::served(&state)))
}

/// Is this the model that is served? Whoever names none means it.
pub(super) fn check(asked: Option<&str>, state: &AppState) -> Result<(), ApiError> {
    let has = &state.shared.model;
    match asked {
        Some(asked) if asked != has => {
            Err(ApiError::NoSuchModel { asked: asked.chars().take(100).collect(), has: has.clone() })
        }
        _ => Ok(()),
    }
}
