//! What computing a token of a prompt takes, as measured.
//!
//! An answer's blocks are worth what a prefill of them would take: that is what whoever finds
//! them is spared. Decoding them took many times as long, a token at a time, and says nothing
//! about it. Measuring a prefill once at the start was the alternative: it knows neither how
//! long prompts are nor what else the machine does.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// How much of what was measured before still counts after each prompt.
const KEPT: f64 = 0.95;

/// The rate at which prompts are read.
#[derive(Debug, Default)]
pub(crate) struct PrefillRate {
    sums: Mutex<Sums>,
}

/// Of a line through the origin by least squares: long prompts, which say most, count most.
#[derive(Debug, Default, Clone, Copy)]
struct Sums {
    tokens_seconds: f64,
    tokens_squared: f64,
}

impl PrefillRate {
    /// So many tokens of a prompt were computed at once in this time.
    pub(crate) fn measured(&self, tokens: usize, time: Duration) {
        let tokens = float(tokens);
        let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        sums.tokens_seconds = sums.tokens_seconds * KEPT + tokens * time.as_secs_f64();
        sums.tokens_squared = sums.tokens_squared * KEPT + tokens * tokens;
    }

    /// What computing so many tokens would take; `None` as long as nothing was measured.
    pub(crate) fn time(&self, tokens: usize) -> Option<Duration> {
        let sums = *self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        let seconds = float(tokens) * sums.tokens_seconds / sums.tokens_squared;
        Duration::try_from_secs_f64(seconds).ok()
    }
}

/// The part of a time that belongs to `part` of `whole` tokens.
pub(crate) fn share(time: Duration, part: usize, whole: usize) -> Duration {
    if part >= whole { time } else { time.mul_f64(float(part) / float(whole)) }
}

#[expect(clippy::cast_precision_loss, reason = "tokens are far below 2^52")]
fn float(tokens: usize) -> f64 {
    tokens as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_that_of_long_prompts_and_follows_what_changes() {
        let rate = PrefillRate::default();
        assert_eq!(rate.time(100), None);
        rate.measured(1000, Duration::from_secs(1));
        // The last few tokens of warm prompts take long for what they are.
        (0..20).for_each(|_| rate.measured(2, Duration::from_millis(20)));
        let ms = |tokens| rate.time(tokens).unwrap().as_secs_f64() * 1e3;
        assert!((ms(100) - 100.0).abs() < 1.0, "{}", ms(100));
        (0..100).for_each(|_| rate.measured(1000, Duration::from_secs(3)));
        assert!((ms(100) - 300.0).abs() < 5.0, "{}", ms(100));
    }

    #[test]
    fn a_share_is_in_proportion_and_never_more_than_all() {
        let time = Duration::from_millis(80);
        assert_eq!([0, 20, 80, 90].map(|part| share(time, part, 80).as_millis()), [0, 20, 80, 80]);
        assert_eq!(share(time, 0, 0), time);
    }
}
