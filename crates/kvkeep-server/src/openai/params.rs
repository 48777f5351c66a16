//! What both endpoints may be told about an answer, checked.

use kvkeep_engine::Sampler;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::error::ApiError;

/// The most stop sequences, as OpenAI has it.
const STOPS: usize = 4;
/// The longest stop sequence and the longest salt, in characters.
const TEXT_CHARS: usize = 256;

/// One text or several: at most 4, of 1 to 256 characters each.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a string or an array of strings")]
pub(super) enum Texts {
    One(String),
    Many(Vec<String>),
}

/// What a stream may carry.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(super) struct StreamOptions {
    /// A last event with what the answer took.
    pub(super) include_usage: Option<bool>,
}

/// How tokens are picked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sampling {
    pub(super) temperature: Option<f64>,
    pub(super) top_p: Option<f64>,
    pub(super) seed: Option<i64>,
    pub(super) presence_penalty: Option<f64>,
    pub(super) frequency_penalty: Option<f64>,
    pub(super) n: Option<u64>,
}

/// What an answer took.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
pub(super) struct Usage {
    pub(super) prompt_tokens: usize,
    pub(super) completion_tokens: usize,
    pub(super) total_tokens: usize,
    pub(super) prompt_tokens_details: PromptDetails,
}

#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
pub(super) struct PromptDetails {
    /// Tokens of the prompt that were not computed again.
    pub(super) cached_tokens: usize,
}

impl Sampling {
    pub(super) fn sampler(self) -> Result<Sampler, ApiError> {
        if self.n.is_some_and(|n| n != 1) {
            return Err(ApiError::invalid("n", "n must be 1: ask again for another answer, its prompt is warm"));
        }
        zero("presence_penalty", self.presence_penalty)?;
        zero("frequency_penalty", self.frequency_penalty)?;
        let temperature = within("temperature", self.temperature, 2.0)?.unwrap_or(1.0);
        // 0 is taken as the smallest nucleus: the likeliest token.
        let top_p = within("top_p", self.top_p, 1.0)?.unwrap_or(1.0).max(f64::MIN_POSITIVE);
        let seed = self.seed.map_or_else(|| Uuid::new_v4().as_u64_pair().0, i64::cast_unsigned);
        Ok(Sampler::new(temperature, top_p, seed)?)
    }
}

/// The stop sequences.
pub(super) fn stops(stop: Option<Texts>) -> Result<Vec<String>, ApiError> {
    let stops = match stop {
        None => Vec::new(),
        Some(Texts::One(stop)) => vec![stop],
        Some(Texts::Many(stops)) => stops,
    };
    if stops.len() > STOPS {
        return Err(ApiError::invalid("stop", "at most 4 stop sequences can be given"));
    }
    if stops.iter().any(|stop| stop.is_empty() || stop.chars().count() > TEXT_CHARS) {
        return Err(ApiError::invalid("stop", "a stop sequence needs 1 to 256 characters"));
    }
    Ok(stops)
}

/// How many tokens may be answered: as many as were asked for and fit.
pub(super) fn max_tokens(asked: Option<u64>, name: &'static str, room: usize) -> Result<usize, ApiError> {
    match asked {
        Some(0) => Err(ApiError::invalid(name, format!("{name} must be at least 1"))),
        Some(asked) => Ok(usize::try_from(asked).unwrap_or(usize::MAX).min(room)),
        None => Ok(room),
    }
}

pub(crate) fn salt(salt: Option<&String>) -> Result<(), ApiError> {
    match salt {
        Some(salt) if salt.chars().count() > TEXT_CHARS => {
            Err(ApiError::invalid("cache_salt", "cache_salt may have at most 256 characters"))
        }
        _ => Ok(()),
    }
}

/// Something this server has not: fine if it is not asked for.
pub(super) fn absent(name: &'static str, asked: bool) -> Result<(), ApiError> {
    if asked { Err(ApiError::invalid(name, format!("{name} is not supported: leave it out"))) } else { Ok(()) }
}

fn zero(name: &'static str, value: Option<f64>) -> Result<(), ApiError> {
    absent(name, value.is_some_and(|value| value != 0.0))
}

fn within(name: &'static str, value: Option<f64>, most: f64) -> Result<Option<f64>, ApiError> {
    match value {
        Some(value) if !(0.0..=most).contains(&value) => {
            Err(ApiError::invalid(name, format!("{name} must be from 0 to {most}")))
        }
        value => Ok(value),
    }
}
