//! Picks the next token from logits.

use std::collections::HashMap;

use crate::engine::Logits;
use crate::error::{EngineError, Result};

/// A way to pick tokens: always the likeliest, or at random from the likeliest ones.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampler {
    /// 0 picks the likeliest.
    temperature: f64,
    top_p: f64,
    state: u64,
    /// Added to the logits of these tokens.
    bias: Vec<(u32, f32)>,
    /// Taken off the logit of a token that was picked, once and for each time.
    presence_penalty: f32,
    frequency_penalty: f32,
    /// How often each token was picked; kept only for penalties.
    picked: HashMap<u32, u16>,
}

impl Default for Sampler {
    fn default() -> Self {
        Self::greedy()
    }
}

impl Sampler {
    /// Always the likeliest token.
    #[must_use]
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            state: 0,
            bias: Vec::new(),
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            picked: HashMap::new(),
        }
    }

    /// At random among the fewest tokens whose probabilities add up to `top_p`, after dividing
    /// logits by `temperature` (0: greedy). Equal seeds give equal picks.
    ///
    /// # Errors
    /// [`EngineError::Sampling`] if `temperature` is negative or not finite, or `top_p` not in (0, 1].
    pub fn new(temperature: f64, top_p: f64, seed: u64) -> Result<Self> {
        if !(0.0..=1e6).contains(&temperature) {
            return Err(EngineError::Sampling(format!("temperature {temperature} must be 0 or more, and finite")));
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(EngineError::Sampling(format!("top_p {top_p} must be above 0 and at most 1")));
        }
        Ok(Self { temperature, top_p, state: seed, ..Self::greedy() })
    }

    /// With this much taken off the logit of a token that was picked before: `presence` once, `frequency` for
    /// each time. Tokens of the prompt do not count. Below 0 they make repetition likelier.
    ///
    /// # Errors
    /// [`EngineError::Sampling`] if one of them is not finite.
    pub fn penalties(mut self, presence: f32, frequency: f32) -> Result<Self> {
        for (name, value) in [("presence", presence), ("frequency", frequency)] {
            if !value.is_finite() {
                return Err(EngineError::Sampling(format!("the {name} penalty {value} must be finite")));
            }
        }
        (self.presence_penalty, self.frequency_penalty) = (presence, frequency);
        Ok(self)
    }

    /// With so much added to the logits of these tokens.
    ///
    /// # Errors
    /// [`EngineError::Sampling`] if one of them is not finite. A token that the model does not have
    /// changes nothing.
    pub fn logit_bias(mut self, bias: Vec<(u32, f32)>) -> Result<Self> {
        if let Some((token, value)) = bias.iter().find(|(_, value)| !value.is_finite()) {
            return Err(EngineError::Sampling(format!("the bias {value} of token {token} must be finite")));
        }
        self.bias = bias;
        Ok(self)
    }

    /// The next token.
    pub fn pick(&mut self, logits: &Logits) -> u32 {
        let token = match self.adjusted(logits) {
            Some(adjusted) => self.draw(&adjusted),
            None => self.draw(logits),
        };
        if self.penalises() {
            let times = self.picked.entry(token).or_default();
            *times = times.saturating_add(1);
        }
        token
    }

    fn penalises(&self) -> bool {
        self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    /// The logits with biases and penalties, if there are any.
    fn adjusted(&self, logits: &Logits) -> Option<Logits> {
        if self.bias.is_empty() && self.picked.is_empty() {
            return None;
        }
        let mut adjusted = logits.clone();
        let penalty = |times: u16| self.presence_penalty + self.frequency_penalty * f32::from(times);
        let penalties = self.picked.iter().map(|(token, times)| (*token, -penalty(*times)));
        for (token, change) in self.bias.iter().copied().chain(penalties) {
            if let Some(logit) = adjusted.0.get_mut(token as usize) {
                *logit += change;
            }
        }
        Some(adjusted)
    }

    fn draw(&mut self, logits: &Logits) -> u32 {
        let best = logits.argmax();
        if self.temperature == 0.0 {
            return best;
        }
        let max = logits.as_slice().get(best as usize).copied().unwrap_or_default();
        let weight = |logit: f32| ((f64::from(logit) - f64::from(max)) / self.temperature).exp();
        let mut candidates: Vec<(u32, f64)> =
            (0u32..).zip(logits.as_slice().iter().map(|logit| weight(*logit))).filter(|(_, w)| *w > 0.0).collect();
        let total: f64 = candidates.iter().map(|(_, weight)| weight).sum();
        self.keep_nucleus(&mut candidates, total);
        let kept: f64 = candidates.iter().map(|(_, weight)| weight).sum();
        let mut left = self.next_unit() * kept;
        for (token, weight) in &candidates {
            left -= weight;
            if left < 0.0 {
                return *token;
            }
        }
        candidates.last().map_or(best, |(token, _)| *token)
    }

    #[expect(clippy::cast_precision_loss, reason = "vocabularies are far below 2^52")]
    fn keep_nucleus(&self, candidates: &mut Vec<(u32, f64)>, total: f64) {
        if self.top_p >= 1.0 {
            return;
        }
        // Tokens this unlikely together weigh less than 1 - top_p, so none is in the nucleus:
        // sorting the few others is much cheaper than sorting all.
        let floor = (1.0 - self.top_p) * total / (candidates.len() as f64 + 1.0);
        candidates.retain(|(_, weight)| *weight >= floor);
        candidates.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let mut sum = 0.0;
        let enough = candidates.iter().position(|(_, weight)| {
            sum += weight;
            sum >= self.top_p * total
        });
        candidates.truncate(enough.map_or(candidates.len(), |last| last + 1));
    }

    /// Uniform in [0, 1): `SplitMix64` (Steele, Lea, Flood 2014).
    #[expect(clippy::cast_precision_loss, reason = "53 bits fit an f64 exactly")]
    fn next_unit(&mut self) -> f64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn logits() -> impl Strategy<Value = Logits> {
        prop::collection::vec(-20.0f32..20.0, 1..200).prop_map(Logits)
    }

    proptest! {
        #[test]
        fn without_temperature_or_with_a_tiny_nucleus_the_likeliest_wins(logits in logits(), seed: u64) {
            prop_assert_eq!(Sampler::greedy().pick(&logits), logits.argmax());
            prop_assert_eq!(Sampler::new(0.0, 0.5, seed).unwrap().pick(&logits), logits.argmax());
            let nucleus = Sampler::new(1.0, 1e-9, seed).unwrap().pick(&logits);
            prop_assert_eq!(logits.0[nucleus as usize], logits.0[logits.argmax() as usize]);
        }

        #[test]
        fn a_pick_is_in_the_nucleus(logits in logits(), seed: u64, top_p in 0.01f64..1.0) {
            let token = Sampler::new(1.0, top_p, seed).unwrap().pick(&logits);
            let weight = |l: f32| f64::from(l).exp();
            let total: f64 = logits.0.iter().map(|l| weight(*l)).sum();
            let picked = logits.0[token as usize];
            let likelier: f64 = logits.0.iter().filter(|l| **l > picked).map(|l| weight(*l)).sum();
            prop_assert!(likelier / total < top_p + 1e-9);
        }
    }

    #[test]
    fn picks_follow_the_probabilities() {
        let logits = Logits(vec![0.0, 3f32.ln(), f32::NEG_INFINITY]);
        let mut sampler = Sampler::new(1.0, 1.0, 7).unwrap();
        let mut counts = [0u32; 3];
        for _ in 0..40_000 {
            counts[sampler.pick(&logits) as usize] += 1;
        }
        assert_eq!(counts[2], 0);
        assert!((f64::from(counts[1]) / 40_000.0 - 0.75).abs() < 0.01, "{counts:?}");
    }

    #[test]
    fn a_bias_is_added_to_its_tokens_alone() {
        let logits = Logits(vec![1.0, 3.0, 2.0]);
        let biased = |bias: &[(u32, f32)]| Sampler::greedy().logit_bias(bias.to_vec()).unwrap().pick(&logits);
        assert_eq!(biased(&[]), 1);
        assert_eq!(biased(&[(1, -100.0)]), 2);
        assert_eq!(biased(&[(0, 100.0)]), 0);
        assert_eq!(biased(&[(7, 100.0)]), 1, "a token that there is not");
        assert!(Sampler::greedy().logit_bias(vec![(0, f32::NAN)]).is_err());
    }

    #[test]
    fn penalties_grow_with_what_was_picked() {
        let logits = Logits(vec![0.0, 1.0, 0.5]);
        let picks = |presence, frequency| {
            let mut sampler = Sampler::greedy().penalties(presence, frequency).unwrap();
            (0..6).map(|_| sampler.pick(&logits)).collect::<Vec<_>>()
        };
        assert_eq!(picks(0.0, 0.0), [1; 6]);
        assert_eq!(picks(0.75, 0.0), [1, 2, 1, 1, 1, 1], "once each, however often");
        assert_eq!(picks(0.0, 0.75), [1, 2, 1, 0, 2, 1], "for each time");
        assert_eq!(picks(-1.0, 0.0), [1; 6]);
        assert!(Sampler::greedy().penalties(f32::INFINITY, 0.0).is_err());
    }
}
