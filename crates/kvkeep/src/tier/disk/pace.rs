//! Does `lossless` pay on this disk? What it reads in a second, against what this machine decodes, both measured.
//!
//! Fewer bytes come sooner, and then they are decoded. Behind a disk that reads half of what all readers decode, blocks are
//! there half as soon again; behind one that reads as much, later than as they were (docs/codecs.md has the figures).
//!
//! Invariant: nothing is read in order to measure: a rate is that of loads that somebody waited for. Until there is one, a
//! directory goes on as it was written. Asking the device for its speed was the alternative: no call tells.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::readers;
use crate::clock::Moment;
use crate::codec::{Codec, CodecId, Lossless};
use crate::layout::Frame;
use crate::sync::Mutex;
use crate::tensor::{DType, Shape};

/// Less than that is a matter of how long a disk takes to begin.
const LEAST_BYTES: u64 = 8 << 20;
/// So much is looked at even if reads never pause.
const MOST_BYTES: u64 = 64 << 20;
/// Of all readers, against the disk.
const TIMES_AS_FAST: f64 = 2.0;
/// Of a new rate in what is believed.
const NEW_PART: f64 = 0.5;

/// What the disk has shown.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    pays: AtomicBool,
    disk_bytes_per_s: Mutex<Option<f64>>,
}

/// Reads that overlap.
#[derive(Debug, Default)]
pub(super) struct Burst {
    began: Option<Moment>,
    bytes: u64,
    /// Was one of them decoded? Then its time is not the disk's.
    is_coded: bool,
}

impl Pace {
    /// The directory has a block of this codec.
    pub(crate) fn finds(&self, codec: CodecId) {
        if codec == CodecId::LOSSLESS {
            self.pays.store(true, Ordering::Relaxed);
        }
    }

    pub(crate) fn pays(&self) -> bool {
        self.pays.load(Ordering::Relaxed)
    }

    /// So many bytes came from the disk in this time, as they are.
    fn saw(&self, bytes: u64, took: Duration) {
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        let rate = bytes as f64 / took.as_secs_f64().max(1e-9);
        let mut believed = self.disk_bytes_per_s.lock();
        let rate = believed.map_or(rate, |before| before + (rate - before) * NEW_PART);
        *believed = Some(rate);
        self.pays.store(decoded_bytes_per_s() >= TIMES_AS_FAST * rate, Ordering::Relaxed);
    }
}

impl Burst {
    /// A read begins.
    pub(super) fn begin(&mut self) {
        self.began.get_or_insert_with(Moment::now);
    }

    /// A read has ended: `bytes` of it came as they are, none if it was decoded. `is_last` of those that overlap.
    pub(super) fn end(&mut self, bytes: Option<u64>, is_last: bool, pace: &Pace) {
        self.is_coded |= bytes.is_none();
        self.bytes += bytes.unwrap_or(0);
        if !is_last && self.bytes < MOST_BYTES {
            return;
        }
        let Self { began, bytes, is_coded } = std::mem::take(self);
        if let Some(began) = began
            && bytes >= LEAST_BYTES
            && !is_coded
        {
            pace.saw(bytes, began.elapsed());
        }
        if !is_last {
            self.begin();
        }
    }
}

/// What `lossless` makes of KV in bfloat16 in a second, on all the cores that readers have here. Measured once.
fn decoded_bytes_per_s() -> f64 {
    static RATE: OnceLock<f64> = OnceLock::new();
    *RATE.get_or_init(|| {
        let cores = std::thread::available_parallelism().map_or(1, usize::from).min(readers::THREADS);
        #[expect(clippy::cast_precision_loss, reason = "a few cores")]
        let cores = cores as f64;
        one_core_bytes_per_s().unwrap_or(0.0) * cores
    })
}

/// The best of a few rounds over numbers that are spread as those of real KV are.
fn one_core_bytes_per_s() -> Option<f64> {
    const ELEMENTS: usize = 128 << 10;
    const ROUNDS: usize = 4;
    let mut bits = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = move || {
        bits ^= bits << 13;
        bits ^= bits >> 7;
        bits ^= bits << 17;
        bits
    };
    // Each half as likely as the one before it: so exponents are about as probable as in a normal distribution.
    let element = |random: u64| {
        let exponent = 127 - (random.leading_zeros() as u16).min(20);
        exponent << 7 | (random & 0x807f) as u16
    };
    let raw: Vec<u8> = (0..ELEMENTS).flat_map(|_| element(next()).to_le_bytes()).collect();
    let shape = Shape::new(&[ELEMENTS]).ok()?;
    let frame = Frame {
        range: 0..raw.len(),
        layer: 0,
        side: None,
        dtype: DType::BF16,
        shape,
        order: None,
        exact_tokens: [0; 2],
    };
    let (codec, mut stored, mut again) = (Lossless::new(), vec![0; raw.len()], vec![0; raw.len()]);
    let length = codec.encode(&frame, &raw, &mut stored)?;
    let stored = stored.get(..length)?;
    let round = || {
        let began = Moment::now();
        codec.decode(&frame, stored, &mut again).then(|| began.elapsed().as_secs_f64())
    };
    let best = std::iter::repeat_with(round).take(ROUNDS).flatten().fold(f64::INFINITY, f64::min);
    #[expect(clippy::cast_precision_loss, reason = "a rate")]
    let rate = raw.len() as f64 / best.max(1e-9);
    Some(rate)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(bytes: u64, seconds: f64) -> Pace {
        let pace = Pace::default();
        pace.saw(bytes, Duration::from_secs_f64(seconds));
        pace
    }

    #[test]
    fn a_slow_disk_is_worth_decoding_for_and_a_fast_one_is_not() {
        assert!(decoded_bytes_per_s() > 1e6);
        assert!(after(1 << 20, 10.0).pays());
        assert!(!after(1 << 50, 0.1).pays());
    }

    #[test]
    fn a_directory_goes_on_as_it_was_written_until_its_disk_has_shown_its_pace() {
        let pace = Pace::default();
        pace.finds(CodecId::RAW);
        assert!(!pace.pays());
        pace.finds(CodecId::LOSSLESS);
        assert!(pace.pays());
        let mut burst = Burst::default();
        burst.begin();
        // Too little, and what was decoded, say nothing.
        burst.end(Some(LEAST_BYTES - 1), true, &pace);
        burst.begin();
        burst.end(Some(LEAST_BYTES), false, &pace);
        burst.end(None, true, &pace);
        assert!(pace.disk_bytes_per_s.lock().is_none());
        burst.begin();
        burst.end(Some(LEAST_BYTES), true, &pace);
        assert!(pace.disk_bytes_per_s.lock().is_some());
    }

    #[test]
    fn reads_that_never_pause_are_measured_too() {
        let (pace, mut burst) = (Pace::default(), Burst::default());
        burst.begin();
        burst.end(Some(MOST_BYTES), false, &pace);
        assert!(pace.disk_bytes_per_s.lock().is_some());
        assert!(burst.began.is_some(), "and the next ones are");
    }
}
