//! What both endpoints may be told about an answer, checked.
//!
//! Numbers are taken as clients write them: `4.0` is 4, and a seed may be any whole number.

use std::collections::BTreeMap;
use std::fmt;

use kvkeep_engine::{Engine, Sampler};
use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::error::ApiError;
use crate::state::AppState;

/// The most stop sequences: each is looked for at every token.
const STOPS: usize = 128;
/// The longest stop sequence and the longest salt, in characters.
const TEXT_CHARS: usize = 256;
/// The most answers of one request, as OpenAI has it.
const ANSWERS: usize = 128;
/// The largest penalty and the largest bias, as OpenAI has them.
const PENALTY: f64 = 2.0;
const BIAS: f64 = 100.0;

/// One text or several: at most 128, of at most 256 characters each. Empty ones stop nothing.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a string or an array of strings")]
pub(super) enum Texts {
    One(String),
    Many(Vec<String>),
}

/// A whole number, written as one or as 4.0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Whole(i128);

/// What a stream may carry.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(super) struct StreamOptions {
    /// A last event with what the answer took.
    pub(super) include_usage: Option<bool>,
}

/// How tokens are picked.
#[derive(Debug)]
pub(super) struct Sampling {
    pub(super) temperature: Option<f64>,
    pub(super) top_p: Option<f64>,
    pub(super) seed: Option<Whole>,
    pub(super) presence_penalty: Option<f64>,
    pub(super) frequency_penalty: Option<f64>,
    pub(super) logit_bias: Option<BTreeMap<String, f64>>,
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

impl Whole {
    /// As a count, if it is one.
    pub(super) fn count(self) -> Option<usize> {
        usize::try_from(self.0).ok()
    }

    /// As 64 bits: those of what fits, and of what does not some that depend on all of it.
    fn seed(self) -> u64 {
        let fits = i64::try_from(self.0).map(i64::cast_unsigned).or_else(|_| u64::try_from(self.0));
        fits.unwrap_or_else(|_| {
            self.0.to_le_bytes().chunks(8).fold(0, |seed, half| {
                half.iter().rev().fold(0u64, |word, byte| word << 8 | u64::from(*byte)) ^ seed.rotate_left(1)
            })
        })
    }
}

impl From<u32> for Whole {
    fn from(number: u32) -> Self {
        Self(number.into())
    }
}

impl<'de> Deserialize<'de> for Whole {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(WholeVisitor)
    }
}

struct WholeVisitor;

impl Visitor<'_> for WholeVisitor {
    type Value = Whole;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a whole number")
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Whole, E> {
        Ok(Whole(value.into()))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Whole, E> {
        Ok(Whole(value.into()))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Whole, E> {
        #[expect(clippy::cast_possible_truncation, reason = "saturates, and is whole")]
        if value.is_finite() && value.fract() == 0.0 {
            return Ok(Whole(value as i128));
        }
        Err(E::invalid_value(serde::de::Unexpected::Float(value), &self))
    }
}

impl Sampling {
    /// A sampler for each answer of a prompt: seeds count up from the given one.
    pub(super) fn samplers(&self, answers: usize, engine: &Engine) -> Result<Vec<Sampler>, ApiError> {
        let temperature = within("temperature", self.temperature, 0.0, 2.0)?.unwrap_or(1.0);
        // 0 is taken as the smallest nucleus: the likeliest token.
        let top_p = within("top_p", self.top_p, 0.0, 1.0)?.unwrap_or(1.0).max(f64::MIN_POSITIVE);
        let presence = within("presence_penalty", self.presence_penalty, -PENALTY, PENALTY)?.unwrap_or_default();
        let frequency = within("frequency_penalty", self.frequency_penalty, -PENALTY, PENALTY)?.unwrap_or_default();
        let bias = self.bias(engine)?;
        let seed = self.seed.map_or_else(|| Uuid::new_v4().as_u64_pair().0, Whole::seed);
        (0..answers as u64)
            .map(|answer| {
                let sampler = Sampler::new(temperature, top_p, seed.wrapping_add(answer))?;
                Ok(sampler.penalties(single(presence), single(frequency))?.logit_bias(bias.clone())?)
            })
            .collect()
    }

    fn bias(&self, engine: &Engine) -> Result<Vec<(u32, f32)>, ApiError> {
        let vocabulary = engine.tokenizer().vocabulary();
        let one = |(token, bias): (&String, &f64)| {
            let token = token.trim().parse::<u32>().ok().filter(|token| (*token as usize) < vocabulary);
            match token {
                Some(token) if bias.abs() <= BIAS => Ok((token, single(*bias))),
                Some(_) => Err(ApiError::invalid("logit_bias", "a bias must be from -100 to 100")),
                None => {
                    let message = format!("logit_bias names tokens by their ids, from 0 to {}", vocabulary - 1);
                    Err(ApiError::invalid("logit_bias", message))
                }
            }
        };
        self.logit_bias.iter().flatten().map(one).collect()
    }
}

/// How many answers a request gets to each of its prompts. They are jobs of their own, so no more than
/// can wait or be answered.
pub(super) fn answers(n: Option<Whole>, prompts: usize, state: &AppState) -> Result<usize, ApiError> {
    let config = &state.shared.config;
    let most = (config.parallel + config.queue).min(ANSWERS);
    let n = n.map_or(Some(1), Whole::count).filter(|n| (1..=most).contains(n));
    let n = n.ok_or_else(|| ApiError::invalid("n", format!("n must be from 1 to {most}")))?;
    if prompts.saturating_mul(n) > most {
        let message = format!("at most {most} answers at once, to all prompts together: send several requests");
        return Err(ApiError::invalid("prompt", message));
    }
    Ok(n)
}

/// The stop sequences.
pub(super) fn stops(stop: Option<Texts>) -> Result<Vec<String>, ApiError> {
    let mut stops = match stop {
        None => Vec::new(),
        Some(Texts::One(stop)) => vec![stop],
        Some(Texts::Many(stops)) => stops,
    };
    stops.retain(|stop| !stop.is_empty());
    if stops.len() > STOPS {
        return Err(ApiError::invalid("stop", format!("at most {STOPS} stop sequences can be given")));
    }
    if stops.iter().any(|stop| stop.chars().count() > TEXT_CHARS) {
        return Err(ApiError::invalid("stop", format!("a stop sequence may have at most {TEXT_CHARS} characters")));
    }
    Ok(stops)
}

/// How many tokens may be answered: as many as were asked for and fit; all that fit for -1.
pub(super) fn max_tokens(asked: Option<Whole>, name: &'static str, room: usize) -> Result<usize, ApiError> {
    match asked {
        None | Some(Whole(-1)) => Ok(room),
        Some(Whole(1..)) => Ok(asked.and_then(Whole::count).unwrap_or(usize::MAX).min(room)),
        Some(_) => Err(ApiError::invalid(name, format!("{name} must be at least 1, or -1 for as many as fit"))),
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

fn within(name: &'static str, value: Option<f64>, least: f64, most: f64) -> Result<Option<f64>, ApiError> {
    match value {
        Some(value) if !(least..=most).contains(&value) => {
            Err(ApiError::invalid(name, format!("{name} must be from {least} to {most}")))
        }
        value => Ok(value),
    }
}

#[expect(clippy::cast_possible_truncation, reason = "logits are f32 too")]
fn single(value: f64) -> f32 {
    value as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(text: &str) -> Option<Whole> {
        serde_json::from_str(text).ok()
    }

    /// Clients that write whole numbers as 4.0, and seeds beyond 2^63, were refused.
    #[test]
    fn whole_numbers_are_taken_however_they_are_written() {
        for (text, number) in
            [("4", 4), ("4.0", 4), ("-1", -1), ("-1.0", -1), ("1e3", 1000), ("18446744073709551615", (1 << 64) - 1)]
        {
            assert_eq!(whole(text), Some(Whole(number)), "{text}");
        }
        for wrong in ["1.5", "\"4\"", "true", "[]", "null"] {
            assert_eq!(whole(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn seeds_that_differ_are_different_seeds() {
        let texts = ["0", "-1", "7", "9223372036854775808", "18446744073709551614", "1e30", "-1e30", "1e31"];
        let seeds: std::collections::HashSet<u64> = texts.iter().map(|text| whole(text).unwrap().seed()).collect();
        assert_eq!(seeds.len(), texts.len());
        assert_eq!((Whole(7).seed(), Whole(-7).seed()), (7, (-7i64).cast_unsigned()));
    }

    #[test]
    fn as_many_tokens_as_fit_and_were_asked_for() {
        let of = |asked: Option<i128>| max_tokens(asked.map(Whole), "max_tokens", 100).ok();
        assert_eq!([None, Some(-1), Some(7), Some(1 << 100)].map(of), [Some(100), Some(100), Some(7), Some(100)]);
        assert_eq!([Some(0), Some(-2)].map(of), [None; 2]);
    }
}
