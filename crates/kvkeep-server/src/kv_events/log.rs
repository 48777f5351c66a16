//! The last batches, for readers that missed some: by number, bounded in count and in bytes.

use std::collections::VecDeque;

use bytes::Bytes;

/// As many as vLLM keeps.
const MAX_BATCHES: usize = 10_000;
const MAX_BYTES: usize = 64 << 20;

/// Batches that were published, oldest first. Numbers begin at 0 and leave out none.
#[derive(Debug, Default)]
pub(super) struct Log {
    batches: VecDeque<(u64, Bytes)>,
    bytes: usize,
    next: u64,
}

impl Log {
    /// Keeps a batch, and gives it the next number.
    pub(super) fn push(&mut self, batch: Bytes) -> u64 {
        let number = self.next;
        self.next += 1;
        self.bytes += batch.len();
        self.batches.push_back((number, batch));
        while self.batches.len() > MAX_BATCHES || self.bytes > MAX_BYTES {
            let Some((_, oldest)) = self.batches.pop_front() else { break };
            self.bytes -= oldest.len();
        }
        number
    }

    /// What is still there from this number on.
    pub(super) fn from(&self, number: u64) -> Vec<(u64, Bytes)> {
        self.batches.iter().filter(|(at, _)| *at >= number).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(log: &Log, from: u64) -> Vec<u64> {
        log.from(from).into_iter().map(|(number, _)| number).collect()
    }

    #[test]
    fn what_was_missed_is_given_again_from_any_number() {
        let mut log = Log::default();
        for at in 0..5 {
            assert_eq!(log.push(Bytes::from(vec![at])), u64::from(at));
        }
        assert_eq!(numbers(&log, 0), [0, 1, 2, 3, 4]);
        assert_eq!(log.from(3), [(3, Bytes::from(vec![3])), (4, Bytes::from(vec![4]))]);
        assert!(numbers(&log, 5).is_empty() && numbers(&log, u64::MAX).is_empty());
    }

    #[test]
    fn it_grows_neither_in_batches_nor_in_bytes_beyond_its_bounds() {
        let mut log = Log::default();
        for _ in 0..MAX_BATCHES + 3 {
            log.push(Bytes::from_static(b"x"));
        }
        assert_eq!((log.batches.len(), log.bytes, numbers(&log, 0)[0]), (MAX_BATCHES, MAX_BATCHES, 3));
        let large = Bytes::from(vec![0; MAX_BYTES / 2]);
        let last = (0..3).map(|_| log.push(large.clone())).last().unwrap();
        assert_eq!(numbers(&log, 0), [last - 1, last]);
        assert_eq!(log.bytes, MAX_BYTES);
        log.push(Bytes::from(vec![0; MAX_BYTES + 1]));
        assert_eq!((log.batches.len(), log.bytes), (0, 0));
    }
}
