//! First come, first served: one batch at a time on the compute threads.
//!
//! Every batch uses all threads, so two at once only fight over caches; worse, a thread of
//! the pool that waits for its own batch would take up another request's whole prefill. Turns
//! are taken for one batch each, so answers go on while a long prompt is read. A plain mutex
//! was the alternative: it lets the thread that just left in again, and the others starve.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// A queue for turns.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    /// Never held while computing.
    queue: Mutex<Queue>,
    moved_on: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    next: u64,
    serving: u64,
}

/// A turn; the next one begins when it is dropped.
#[derive(Debug)]
pub(crate) struct Turn<'a>(&'a Turns);

impl Turns {
    /// Waits for a turn.
    pub(crate) fn take(&self) -> Turn<'_> {
        let mut queue = self.lock();
        let mine = queue.next;
        queue.next += 1;
        while queue.serving != mine {
            queue = self.moved_on.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        Turn(self)
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.lock().serving += 1;
        self.0.moved_on.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    use super::*;

    #[test]
    fn one_at_a_time_and_everybody_gets_there_even_after_a_panic() {
        let (turns, busy, done) = (Turns::default(), AtomicBool::new(false), AtomicU32::new(0));
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _turn = turns.take();
            panic!("a turn ends with its holder");
        }));
        assert!(panicked.is_err());
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let _turn = turns.take();
                        assert!(!busy.swap(true, Ordering::SeqCst));
                        busy.store(false, Ordering::SeqCst);
                        done.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(done.into_inner(), 800);
    }
}
