//! A few threads that read from the disk tier, so that a request can give up waiting.
//!
//! The requester's own thread was the alternative: one copy of the queue less, but a disk
//! that hangs would hang every request that asks it.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::sync::{Condvar, Mutex, thread};

/// Enough for a disk to have something to do while another block is checked.
const THREADS: usize = 4;

type Job = Box<dyn FnOnce() + Send>;

/// The threads and what they have to do.
pub(super) struct Readers {
    shared: Arc<Shared>,
    threads: Vec<thread::JoinHandle<()>>,
}

/// What a job will say.
pub(super) struct Answer<T>(Arc<Waiting<T>>);

struct Waiting<T> {
    state: Mutex<State<T>>,
    answered: Condvar,
}

enum State<T> {
    Open,
    Answered(T),
    /// Nobody waits any more.
    GivenUp,
}

#[derive(Default)]
struct Shared {
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
        let shared = Arc::new(Shared::default());
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

    /// Queues a job that has something to say. `late` runs if nobody waited for it.
    pub(super) fn ask<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
        late: impl FnOnce() + Send + 'static,
    ) -> Answer<T> {
        let waiting = Arc::new(Waiting { state: Mutex::new(State::Open), answered: Condvar::default() });
        let answer = Answer(Arc::clone(&waiting));
        self.submit(Box::new(move || {
            let said = job();
            let mut state = waiting.state.lock();
            match *state {
                State::GivenUp => {
                    drop(state);
                    late();
                }
                State::Open | State::Answered(_) => {
                    *state = State::Answered(said);
                    waiting.answered.notify_all();
                }
            }
        }));
        answer
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

impl<T> Answer<T> {
    /// `None` if it takes longer than that; then nobody can ask again.
    pub(super) fn wait(&self, at_most: Duration) -> Option<T> {
        let mut state = self.0.state.lock();
        while let State::Open = *state {
            let (again, timed_out) = self.0.answered.wait_timeout(state, at_most);
            state = again;
            if timed_out {
                break;
            }
        }
        match std::mem::replace(&mut *state, State::GivenUp) {
            State::Answered(said) => Some(said),
            State::Open | State::GivenUp => None,
        }
    }
}

impl Shared {
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
