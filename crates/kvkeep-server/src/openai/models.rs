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
    /// The name that this one is an alias of, or the same.
    root: String,
    /// The most tokens of a prompt and its answer together.
    max_model_len: usize,
    /// All names by which it can be asked for.
    aliases: Vec<String>,
}

impl Model {
    fn served(state: &AppState, id: &str) -> Self {
        let shared = &state.shared;
        let (root, max_model_len) = (shared.model.clone(), shared.config.context_tokens);
        let aliases = std::iter::once(&root).chain(&shared.aliases).cloned().collect();
        Self { id: id.to_owned(), object: "model", created: 0, owned_by: "kvkeep", root, max_model_len, aliases }
    }
}

/// The models that can be asked: one, under each of its names.
#[utoipa::path(get, path = "/v1/models", operation_id = "list_models", tag = "openai", responses(
    (status = 200, description = "One model, perhaps under several names", body = Models),
    KeyErrors,
))]
pub(super) async fn list(_: Tenant, State(state): State<AppState>) -> Json<Models> {
    let names = std::iter::once(&state.shared.model).chain(&state.shared.aliases);
    Json(Models { object: "list", data: names.map(|name| Model::served(&state, name)).collect() })
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
    let name = check(Some(&id), &state)?;
    Ok(Json(Model::served(&state, &name)))
}

/// The name of the model that is served, as it was asked for. Whoever names none means it.
pub(super) fn check(asked: Option<&str>, state: &AppState) -> Result<String, ApiError> {
    let has = &state.shared.model;
    match asked.filter(|asked| !asked.is_empty()) {
        None => Ok(has.clone()),
        Some(asked) if asked == has || state.shared.aliases.iter().any(|alias| alias == asked) => Ok(asked.to_owned()),
        Some(asked) => Err(ApiError::NoSuchModel { asked: asked.chars().take(100).collect(), has: has.clone() }),
    }
}
