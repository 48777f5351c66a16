//! How long stores wait for tiers that write more slowly than there is to store.
//!
//! A burst is worth waiting for: nothing of it is lost. A load that never ends is not: its stores would go at the pace
//! of the disk for good. So waiting is paid from an account. Full it has a second, and it fills by a tenth of the time
//! that passes. Time in which several wait is paid once. Where the account is empty, writes that have not begun are given up
//! instead.
//!
//! Two alternatives lost. To wait as long as a request may, each time: under a load that a disk cannot keep up with, a
//! cache stored no faster than the disk. Never to wait: a burst lost most of itself over a disk that was idle.

use std::time::Duration;

use crate::clock::{Deadline, Moment};
use crate::sync::Mutex;

/// A full account, if a request may wait that long: a disk of 1 GB/s writes a burst of 1 GB in it.
const FULL: Duration = Duration::from_secs(1);
/// The account fills by one part in so many of the time that passes.
const SHARE: u32 = 10;

pub(super) struct Patience {
    full: Duration,
    /// Held alone.
    account: Mutex<Account>,
}

struct Account {
    left: Duration,
    /// Time up to here is accounted for.
    until: Moment,
    waiting: usize,
}

impl Patience {
    pub(super) fn new(at_most: Duration) -> Self {
        let full = at_most.min(FULL);
        Self { full, account: Mutex::new(Account { left: full, until: Moment::now(), waiting: 0 }) }
    }

    /// What a store waits at most. A tier that gets nothing done for so long hangs.
    pub(super) fn full(&self) -> Duration {
        self.full
    }

    /// Runs something that may wait until the deadline it is given.
    pub(super) fn wait<T>(&self, wait: impl FnOnce(Deadline) -> T) -> T {
        let left = self.count(|waiting| *waiting += 1);
        let result = wait(Deadline::after(left));
        self.count(|waiting| *waiting -= 1);
        result
    }

    /// Brings the account up to date, and changes how many wait; says what is left.
    fn count(&self, change: impl FnOnce(&mut usize)) -> Duration {
        let mut account = self.account.lock();
        let passed = account.until.elapsed();
        account.left = after(account.left, passed, account.waiting > 0, self.full);
        account.until = Moment::now();
        change(&mut account.waiting);
        account.left
    }
}

/// What is left after a time in which somebody waited or nobody did.
fn after(left: Duration, passed: Duration, waited: bool, full: Duration) -> Duration {
    let spent = if waited { passed } else { Duration::ZERO };
    left.saturating_add(passed / SHARE).saturating_sub(spent).min(full)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Stores waited up to five seconds each for a disk that never caught up: a cache under load stored as fast as its
    /// disk, where it had stored ten times as fast and written what the disk could take.
    #[test]
    fn a_load_that_never_ends_waits_a_tenth_of_its_time() {
        let (mut left, mut waited, mut worked) = (FULL, Duration::ZERO, Duration::ZERO);
        for _ in 0..100_000 {
            // Each store waits for all that is left, and then does its own work of a millisecond.
            waited += left;
            left = after(left, left, true, FULL);
            worked += Duration::from_millis(1);
            left = after(left, Duration::from_millis(1), false, FULL);
        }
        assert!(waited < FULL * 2 + worked / 8, "{waited:?}");
    }

    #[test]
    fn the_account_is_full_again_after_a_while_and_never_more() {
        assert_eq!(after(Duration::ZERO, FULL * 2, false, FULL), FULL / 5);
        assert_eq!(after(FULL / 2, FULL * 20, false, FULL), FULL);
    }
}
