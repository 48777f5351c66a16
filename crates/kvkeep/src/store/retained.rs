//! Blocks that somebody asked to keep, by key and time.
//!
//! Invariant: never more than [`MAX_RETAINED`] keys, so that whoever asks for everything takes no memory without end. A
//! flag in each tier's index was the alternative: it is lost when the block moves or is not written yet.

use std::collections::HashMap;

use crate::key::ObjectKey;
use crate::sync::Mutex;

/// More are not kept: 12 MB.
const MAX_RETAINED: usize = 1 << 18;

/// Keys and until when.
#[derive(Debug, Default)]
pub(super) struct Retained(Mutex<HashMap<ObjectKey, u64>>);

impl Retained {
    /// Keeps these until then; says how many.
    pub(super) fn add(&self, keys: &[ObjectKey], until_ms: u64, now_ms: u64) -> usize {
        let mut kept = self.0.lock();
        if kept.len() + keys.len() > MAX_RETAINED {
            kept.retain(|_, until| *until > now_ms);
        }
        let mut count = 0;
        for key in keys {
            if kept.len() < MAX_RETAINED || kept.contains_key(key) {
                let until = kept.entry(*key).or_insert(until_ms);
                *until = until_ms.max(*until);
                count += 1;
            }
        }
        count
    }

    pub(super) fn remove(&self, keys: &[ObjectKey]) {
        let mut kept = self.0.lock();
        for key in keys {
            kept.remove(key);
        }
    }

    /// Marks those that are kept.
    #[cfg(feature = "disk")]
    pub(super) fn mark(&self, keys: &[ObjectKey], now_ms: u64, marks: &mut [bool]) {
        let kept = self.0.lock();
        if kept.is_empty() {
            return;
        }
        for (key, mark) in keys.iter().zip(marks) {
            *mark |= kept.get(key).is_some_and(|until| *until > now_ms);
        }
    }
}

#[cfg(test)]
#[cfg(feature = "disk")]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_ends_with_its_time_and_never_grows_over_the_limit() {
        let kept = Retained::default();
        let keys: Vec<ObjectKey> = (0..10).map(ObjectKey::numbered).collect();
        assert_eq!(kept.add(&keys[..2], 100, 0), 2);
        assert_eq!(kept.add(&keys[1..2], 50, 0), 1, "the longer time stays");
        let marks = |now_ms| {
            let mut marks = [false; 3];
            kept.mark(&keys[..3], now_ms, &mut marks);
            marks
        };
        assert_eq!((marks(99), marks(100)), ([true, true, false], [false; 3]));
        kept.remove(&keys[..1]);
        assert_eq!(marks(0), [false, true, false]);
        let many: Vec<ObjectKey> = (100..100 + MAX_RETAINED as u64 + 5).map(ObjectKey::numbered).collect();
        assert_eq!(kept.add(&many, 1_000, 100), MAX_RETAINED, "what is over made room");
        assert_eq!(kept.add(&keys, 1_000, 100), 0);
    }
}
