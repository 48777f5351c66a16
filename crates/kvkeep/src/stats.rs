//! Counters of a store, and what follows from them.

use std::fmt;
use std::time::Duration;

const MIB: f64 = 1024.0 * 1024.0;

/// A snapshot of a store's counters. `*_total` and the plain counters only grow;
/// [`clear`](crate::Store::clear) does not reset them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Requests that found all (named door) or at least one block (token door).
    pub hits: u64,
    /// Requests that found nothing.
    pub misses: u64,
    /// Entries evicted to make room.
    pub evictions: u64,
    /// Entries whose TTL ran out.
    pub expirations: u64,
    /// Stores that were refused: larger than the cache, or all of it pinned.
    pub rejections: u64,
    /// Entries removed on request.
    pub removals: u64,
    /// Entries stored.
    pub stored_total: u64,
    /// Tokens asked for by lookups of the token door.
    pub requested_tokens_total: u64,
    /// Tokens of those that were resident.
    pub cached_tokens_total: u64,
    /// Compute time, as callers reported it, that hits made unnecessary.
    pub time_saved: Duration,
    /// Entries that can be found now.
    pub entries: u64,
    /// Bytes in use now, in whole pages: sealed, being written, or still being read.
    pub used_bytes: u64,
    /// Bytes of those that cannot be evicted now.
    pub held_bytes: u64,
    /// The cap.
    pub capacity_bytes: u64,
    /// Memory of the index and the policy's view of it, besides payloads.
    pub index_bytes: u64,
    /// The tiers behind RAM, in the order in which they are asked.
    pub tiers: Vec<TierStats>,
}

/// A snapshot of the counters of a tier behind RAM. Counters only grow; sizes are those of now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TierStats {
    /// The tier's name: `disk`.
    pub name: String,
    /// Records that can be found now.
    pub entries: u64,
    /// Bytes that it takes now. A disk's are those that `du` counts, and a margin for the directory itself.
    pub used_bytes: u64,
    /// The cap.
    pub capacity_bytes: u64,
    /// Memory of the index.
    pub index_bytes: u64,
    /// Bytes of payloads that wait to be written; they are pinned in RAM.
    pub queued_bytes: u64,
    /// Records read back into RAM.
    pub hits: u64,
    /// Records written.
    pub stored_total: u64,
    /// Bytes of payloads written.
    pub written_bytes_total: u64,
    /// Bytes of those before their codec.
    pub written_raw_bytes_total: u64,
    /// Bytes of payloads read.
    pub read_bytes_total: u64,
    /// Records that were not written: the queue was full, or the tier failed.
    pub dropped_total: u64,
    /// Entries of RAM that the admission rule kept out of the tier, at first or for good.
    pub not_admitted_total: u64,
    /// Records that went with their segment.
    pub evictions: u64,
    /// Hot records written again before their segment went.
    pub reinserted_total: u64,
    /// Records or segments that were not what they should be: each a miss.
    pub damaged_total: u64,
    /// Reads that failed.
    pub read_errors_total: u64,
    /// Writes that failed.
    pub write_errors_total: u64,
    /// Reads that took longer than a request waits, and times in which writing got nothing done for as long as
    /// a flush waits.
    pub timeouts_total: u64,
    /// Tokens in the tier that were not loaded, because computing them again is faster.
    pub not_worth_tokens_total: u64,
    /// The codec that writes what no namespace says otherwise.
    pub codec: &'static str,
    /// Records that were there when the tier was opened and whose codec is not known here: each a miss.
    pub unknown_codec_records: u64,
    /// Is what lies there encrypted?
    pub encrypted: bool,
    /// Is the tier failing right now? Then it is tried again, ever more seldom.
    pub failing: bool,
    /// Files in the directory that are not ours. They are left alone.
    pub foreign_files: u64,
    /// Measured: bytes a second of loads, as they lie in the tier, with their decoding. 0 before the first.
    pub load_bytes_per_s: u64,
}

impl TierStats {
    /// Bytes that codecs have spared so far.
    #[must_use]
    pub fn saved_bytes_total(&self) -> u64 {
        self.written_raw_bytes_total.saturating_sub(self.written_bytes_total)
    }

    /// How many times as long what was written was before its codec; 1 if nothing was written.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "for people to read")]
    pub fn codec_ratio(&self) -> f64 {
        match self.written_bytes_total {
            0 => 1.0,
            written => self.written_raw_bytes_total as f64 / written as f64,
        }
    }
}

impl Stats {
    /// The tier of this name, if there is one.
    #[must_use]
    pub fn tier(&self, name: &str) -> Option<&TierStats> {
        self.tiers.iter().find(|tier| tier.name == name)
    }

    /// Hits and misses.
    #[must_use]
    pub fn total_requests(&self) -> u64 {
        self.hits + self.misses
    }

    /// Hits in percent of all requests; 0 before the first.
    #[must_use]
    pub fn hit_rate_percent(&self) -> f64 {
        percent(self.hits, self.total_requests())
    }

    /// Cached tokens in percent of all tokens asked for; 0 before the first.
    #[must_use]
    pub fn token_hit_rate_percent(&self) -> f64 {
        percent(self.cached_tokens_total, self.requested_tokens_total)
    }

    /// Bytes in use, in MiB.
    #[must_use]
    pub fn size_mib(&self) -> f64 {
        mib(self.used_bytes)
    }

    /// The cap, in MiB.
    #[must_use]
    pub fn max_size_mib(&self) -> f64 {
        mib(self.capacity_bytes)
    }

    /// Bytes in use, in percent of the cap.
    #[must_use]
    pub fn size_percent(&self) -> f64 {
        percent(self.used_bytes, self.capacity_bytes)
    }

    /// Reported compute time that hits made unnecessary, in seconds.
    #[must_use]
    pub fn time_saved_seconds(&self) -> f64 {
        self.time_saved.as_secs_f64()
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "KV cache")?;
        let mut row = |name: &str, value: String| writeln!(f, "  {name:<12} {value}");
        row(
            "requests",
            format!(
                "{} ({} hits, {} misses, {:.1}% hit rate)",
                self.total_requests(),
                self.hits,
                self.misses,
                self.hit_rate_percent()
            ),
        )?;
        if self.requested_tokens_total > 0 {
            row(
                "tokens",
                format!(
                    "{} of {} cached ({:.1}%)",
                    self.cached_tokens_total,
                    self.requested_tokens_total,
                    self.token_hit_rate_percent()
                ),
            )?;
        }
        row(
            "size",
            format!(
                "{:.1} of {:.1} MiB ({:.1}%) in {} entries",
                self.size_mib(),
                self.max_size_mib(),
                self.size_percent(),
                self.entries
            ),
        )?;
        row(
            "gone",
            format!(
                "{} evicted, {} expired, {} removed, {} rejected",
                self.evictions, self.expirations, self.removals, self.rejections
            ),
        )?;
        row("time saved", format!("{:.2} s", self.time_saved_seconds()))
    }
}

#[expect(clippy::cast_precision_loss, reason = "for people to read")]
fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 * 100.0 / whole as f64 }
}

#[expect(clippy::cast_precision_loss, reason = "for people to read")]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / MIB
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_of_an_unused_cache_are_zero_not_nan() {
        let stats = Stats::default();
        assert_eq!(stats.hit_rate_percent(), 0.0);
        assert_eq!(stats.size_percent(), 0.0);
        assert!(stats.to_string().contains("0.0% hit rate"));
    }
}
