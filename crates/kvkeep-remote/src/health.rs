//! Is the store there? A circuit breaker: after a few failures in a row nobody asks any more, and a task of its own tries
//! until the store is back. So no request is the one that finds out.
//!
//! Letting one request through now and then was the alternative: that one waits.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::store::{Store, StoreError};

/// Failures in a row, for a deadline at least, after which nobody asks any more.
const MAX_FAILURES: u32 = 3;
/// Between two tries.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LAST_PAUSE: Duration = Duration::from_millis(500);
/// What a try may take, at least and in deadlines.
const TRY: Duration = Duration::from_millis(500);
const TRY_DEADLINES: u32 = 10;

#[derive(Debug)]
pub(crate) struct Health {
    name: &'static str,
    deadline: Duration,
    is_open: AtomicBool,
    /// In a row, and when it last did what it was to.
    failures: Mutex<(u32, Instant)>,
    /// A connection may be missing.
    look: Notify,
}

impl Health {
    /// Nobody asks before the store was there once.
    pub(crate) fn new(name: &'static str, deadline: Duration) -> Self {
        Self {
            name,
            deadline,
            is_open: AtomicBool::new(true),
            failures: Mutex::new((0, Instant::now())),
            look: Notify::new(),
        }
    }

    /// May the store be asked?
    pub(crate) fn allows(&self) -> bool {
        !self.is_open.load(Ordering::Relaxed)
    }

    /// It did what it was to.
    pub(crate) fn works(&self) {
        *self.failures.lock().unwrap_or_else(PoisonError::into_inner) = (0, Instant::now());
    }

    /// It did not.
    pub(crate) fn fails(&self, error: &StoreError) {
        if matches!(error, StoreError::Refused(_)) {
            return;
        }
        let is_bad = {
            let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
            failures.0 += 1;
            // Of a cluster a part may fail while the others work.
            failures.0 >= MAX_FAILURES && failures.1.elapsed() > self.deadline
        };
        if is_bad {
            self.open(error);
        }
        self.look.notify_one();
    }

    /// A connection was lost that no request waits for.
    pub(crate) fn look(&self) {
        self.look.notify_one();
    }

    fn open(&self, error: &StoreError) {
        if !self.is_open.swap(true, Ordering::Relaxed) {
            tracing::warn!(tier = self.name, %error, "the remote tier does not work: going on without");
        }
    }

    /// It seems to be there. One more failure, and nobody asks again.
    fn close(&self) {
        if self.is_open.load(Ordering::Relaxed) {
            self.failures.lock().unwrap_or_else(PoisonError::into_inner).0 = MAX_FAILURES - 1;
            self.is_open.store(false, Ordering::Relaxed);
            tracing::info!(tier = self.name, "the remote tier works");
        }
    }

    fn has_worked(&self) -> bool {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).0 == 0
    }

    /// One try.
    pub(crate) async fn mend(&self, store: &dyn Store) {
        let most = TRY.max(self.deadline * TRY_DEADLINES);
        match tokio::time::timeout(most, store.mend()).await.unwrap_or(Err(StoreError::Late)) {
            Ok(()) => self.close(),
            Err(error) => self.open(&error),
        }
    }

    /// Keeps connections, for as long as this is awaited.
    pub(crate) async fn keep(&self, store: &dyn Store) {
        let mut pause = FIRST_PAUSE;
        loop {
            if self.allows() {
                self.look.notified().await;
            }
            if self.has_worked() {
                pause = FIRST_PAUSE;
            }
            if !self.allows() {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LAST_PAUSE);
            }
            self.mend(store).await;
        }
    }
}
