//! Averages, percentiles and medians of measured times.
//!
//! Percentiles are nearest-rank: always a time that was measured, never one in between.

use serde::Serialize;

/// What a list of times is summed up to, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct TimesMs {
    pub(crate) avg: f64,
    pub(crate) p50: f64,
    pub(crate) p95: f64,
    pub(crate) p99: f64,
}

impl TimesMs {
    /// Of any number of times; all zero for none.
    pub(crate) fn of(times: &[f64]) -> Self {
        let mut sorted = times.to_vec();
        sorted.sort_by(f64::total_cmp);
        let [p50, p95, p99] = [50, 95, 99].map(|percent| nearest_rank(&sorted, percent));
        Self { avg: mean(times), p50, p95, p99 }
    }
}

/// The smallest of the sorted values that at least `percent` of all do not exceed.
pub(crate) fn nearest_rank(sorted: &[f64], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or_default()
}

pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    nearest_rank(&values, 50)
}

pub(crate) fn mean(values: &[f64]) -> f64 {
    ratio(values.iter().sum(), float(values.len()))
}

/// 0 instead of a division by zero.
pub(crate) fn ratio(part: f64, whole: f64) -> f64 {
    if whole == 0.0 { 0.0 } else { part / whole }
}

#[expect(clippy::cast_precision_loss, reason = "counts here are far below 2^52")]
pub(crate) fn float(count: usize) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_rank() {
        let sorted = [15.0, 20.0, 35.0, 40.0, 50.0];
        let ranks = [(5, 15.0), (30, 20.0), (40, 20.0), (50, 35.0), (95, 50.0), (100, 50.0)];
        for (percent, expected) in ranks {
            assert_eq!(nearest_rank(&sorted, percent), expected, "p{percent}");
        }
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!([50, 95, 99].map(|p| nearest_rank(&hundred, p)), [50.0, 95.0, 99.0]);
    }

    #[test]
    fn times_need_not_be_sorted_and_none_are_zero() {
        let times = TimesMs::of(&[3.0, 1.0, 2.0]);
        assert_eq!(times, TimesMs { avg: 2.0, p50: 2.0, p95: 3.0, p99: 3.0 });
        assert_eq!(TimesMs::of(&[]).avg, 0.0);
        assert_eq!(TimesMs::of(&[]).p99, 0.0);
    }

    #[test]
    fn one_time_is_every_percentile() {
        assert_eq!(TimesMs::of(&[7.0]), TimesMs { avg: 7.0, p50: 7.0, p95: 7.0, p99: 7.0 });
        assert_eq!(median(vec![9.0, 1.0, 5.0]), 5.0);
    }
}
