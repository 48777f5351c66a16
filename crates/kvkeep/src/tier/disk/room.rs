//! How much the disk tier takes: its cap, or less where the disk has less. Pure arithmetic.
//!
//! A disk says that it is full only when it is asked for more, and what it says of its free space is not to be
//! trusted: quotas, snapshots and network file systems answer something else. So where a request for more is refused, the
//! limit falls to what lies here, and rises by one small segment at a time as long as the disk agrees.

/// What the directory, its lock and two manifests take at most.
pub(crate) const OVERHEAD_BYTES: u64 = 64 << 10;
/// Below this there is no room for segments that can take turns.
pub(crate) const MIN_CAPACITY_BYTES: u64 = 1 << 20;
const MIN_SEGMENT_BYTES: u64 = 128 << 10;
const MAX_SEGMENT_BYTES: u64 = 1 << 30;
/// A segment is this part of the limit: what is evicted at once.
const SEGMENTS: u64 = 32;
/// A refused request for more is made again after so long at first, and then after ever longer.
const FIRST_PAUSE_MS: u64 = 1_000;
const LAST_PAUSE_MS: u64 = 60_000;

#[derive(Debug, Clone, Copy)]
pub(crate) struct Room {
    capacity_bytes: u64,
    limit_bytes: u64,
    /// The limit before more was asked for, until that is granted or refused.
    before_bytes: Option<u64>,
    pause_ms: u64,
    ask_at_ms: u64,
}

impl Room {
    pub(crate) fn new(capacity_bytes: u64) -> Self {
        Self { capacity_bytes, limit_bytes: capacity_bytes, before_bytes: None, pause_ms: 0, ask_at_ms: 0 }
    }

    pub(crate) fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }

    pub(crate) fn limit_bytes(&self) -> u64 {
        self.limit_bytes
    }

    /// How long segments are, in whole pages.
    pub(crate) fn segment_bytes(&self) -> u64 {
        (self.limit_bytes / SEGMENTS).clamp(MIN_SEGMENT_BYTES, MAX_SEGMENT_BYTES) / 4096 * 4096
    }

    /// Raises a limit below the cap by one segment, if it is time to ask the disk.
    pub(crate) fn ask_for_more(&mut self, now_ms: u64) {
        if self.limit_bytes < self.capacity_bytes && now_ms >= self.ask_at_ms {
            self.before_bytes.get_or_insert(self.limit_bytes);
            self.limit_bytes = (self.limit_bytes + self.segment_bytes()).min(self.capacity_bytes);
        }
    }

    /// The disk had what was asked for.
    pub(crate) fn granted(&mut self) {
        if self.before_bytes.take().is_some() {
            self.pause_ms = 0;
        }
    }

    /// The disk is full with `kept_bytes` of ours on it: it is asked for less from now on. Less is first a small
    /// segment more than that, and if that is refused, too, no more than that.
    pub(crate) fn refused(&mut self, kept_bytes: u64, now_ms: u64) {
        if let Some(before) = self.before_bytes.take() {
            self.limit_bytes = before;
            self.pause_ms = (self.pause_ms * 2).clamp(FIRST_PAUSE_MS, LAST_PAUSE_MS);
            self.ask_at_ms = now_ms.saturating_add(self.pause_ms);
        } else {
            self.limit_bytes = self.limit_bytes.min(kept_bytes);
            self.ask_for_more(now_ms);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn the_limit_falls_to_what_lies_there_and_rises_while_the_disk_agrees() {
        let mut room = Room::new(1024 * MIB);
        room.ask_for_more(0);
        assert_eq!((room.limit_bytes(), room.segment_bytes()), (1024 * MIB, 32 * MIB), "not above the cap");
        room.refused(64 * MIB, 0);
        assert_eq!(room.limit_bytes(), 66 * MIB, "a small segment may be there all the same");
        room.granted();
        room.ask_for_more(0);
        assert!(room.limit_bytes() > 68 * MIB);
        room.refused(66 * MIB, 0);
        assert_eq!(room.limit_bytes(), 66 * MIB, "what was granted stays");
        room.ask_for_more(FIRST_PAUSE_MS - 1);
        assert_eq!(room.limit_bytes(), 66 * MIB, "not before the pause is over");
        (0..2_000).for_each(|second| {
            room.ask_for_more(FIRST_PAUSE_MS + second * 1_000);
            room.granted();
        });
        assert_eq!(room.limit_bytes(), 1024 * MIB);
    }

    #[test]
    fn a_disk_that_stays_full_is_asked_ever_more_seldom() {
        let mut room = Room::new(1024 * MIB);
        (0..2).for_each(|_| room.refused(64 * MIB, 0));
        let mut asked = 0;
        for second in 0..3_600 {
            room.ask_for_more(second * 1_000);
            if room.limit_bytes() > 64 * MIB {
                asked += 1;
                room.refused(64 * MIB, second * 1_000);
            }
        }
        assert!((10..80).contains(&asked), "{asked} times in an hour");
    }
}
