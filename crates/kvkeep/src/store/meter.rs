//! How fast a tier's loads have been.

use crate::sync::Mutex;

/// Older measurements count a tenth less each time.
const MEMORY: f64 = 0.9;

/// Bytes and time of loads, the newest count most.
#[derive(Debug, Default)]
pub(super) struct LoadRate(Mutex<(f64, f64)>);

impl LoadRate {
    pub(super) fn measured(&self, bytes: u64, us: u64) {
        let mut sums = self.0.lock();
        sums.0 = sums.0 * MEMORY + to_f64(bytes);
        sums.1 = sums.1 * MEMORY + to_f64(us);
    }

    /// 0 before the first measurement: the first load is always worth it.
    pub(super) fn estimate_us(&self, bytes: u64) -> u64 {
        let (sum_bytes, sum_us) = *self.0.lock();
        if sum_bytes > 0.0 { to_u64(to_f64(bytes) * sum_us / sum_bytes) } else { 0 }
    }

    /// 0 before the first measurement.
    pub(super) fn bytes_per_s(&self) -> u64 {
        let (bytes, us) = *self.0.lock();
        if us > 0.0 { to_u64(bytes * 1e6 / us) } else { 0 }
    }
}

#[expect(clippy::cast_precision_loss, reason = "rates need no more than 52 bits")]
fn to_f64(value: u64) -> f64 {
    value as f64
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates, and is never negative")]
fn to_u64(value: f64) -> u64 {
    value as u64
}
