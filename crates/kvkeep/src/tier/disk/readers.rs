//! A few threads that read from the disk tier, so that a request can give up waiting.
//!
//! The requester's own thread was the alternative: one copy of the queue less, but a disk
//! that hangs would hang every request that asks it.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;

use crate::sync::{Condvar, Mutex, thread};

/// Enough for a disk to have something to do while other blocks are checked, and for one that takes long to begin.
pub(super) const THREADS: usize = if cfg!(shuttle) { 2 } else { 8 };

type Job = Box<dyn FnOnce() + Send>;

/// The threads and what they have to do.
pub(super) struct Readers {
    shared: Arc<Jobs>,
    threads: Vec<thread::JoinHandle<()>>,
}

#[derive(Default)]
struct Jobs {
    queue: Mutex<Queue>,
    work: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    closed: bool,
}

impl Readers {
    pub(super) fn start() -> Self {
        let shared = Arc::new(Jobs::default());
        let start = |_| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || shared.run())
        };
        Self { threads: (0..THREADS).map(start).collect(), shared }
    }

    /// Queues a job. How many there can be is limited by the pages that they read into.
    pub(super) fn submit(&self, job: Job) {
        self.shared.queue.lock().jobs.push_back(job);
        self.shared.work.notify_all();
    }

    /// Lets the threads end. Waits for them only if they are not stuck.
    pub(super) fn close(&mut self, wait: bool) {
        {
            let mut queue = self.shared.queue.lock();
            queue.closed = true;
        }
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            if wait {
                // A job that panicked has been counted as a miss by whoever waited for it.
                let _ = thread.join();
            }
        }
    }
}

impl Jobs {
    fn run(&self) {
        loop {
            let mut queue = self.queue.lock();
            let job = loop {
                match queue.jobs.pop_front() {
                    Some(job) => break job,
                    None if queue.closed => return,
                    None => queue = self.work.wait(queue),
                }
            };
            drop(queue);
            job();
        }
    }
}

impl fmt::Debug for Readers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Readers").finish_non_exhaustive()
    }
}
