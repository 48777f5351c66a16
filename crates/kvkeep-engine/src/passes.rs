//! Passes over the model, shared by all who compute.
//!
//! One pass at a time has all compute threads, in order of arrival: two at once would only fight
//! over caches, and a thread of the pool that waits for its own work would take up another
//! request's. Whoever is first in the queue leads: it takes the work of others along, runs the
//! pass and hands the results out. So answers that are decoded at the same time share a pass,
//! which costs little more than one of them alone, and a long prompt goes in pieces, beside each
//! of which every waiting answer gets a token. No row of a pass depends on another one's, so
//! sharing changes no bit. A thread of its own that runs all passes was the alternative: two
//! more hand-overs for whoever is alone.

use std::collections::{HashMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use crate::forward::Want;
use crate::kv::KvBuffer;

/// Rows of a pass while nothing is decoded: their activations stay in the second-level cache.
const ROWS: usize = 256;
/// Rows of a pass while answers are decoded: this bounds the gap between two of their tokens,
/// and costs a prompt a tenth of its speed.
const ROWS_BESIDE_ANSWERS: usize = 64;
/// An answer whose last token is older has ended, or its reader is slow.
const STALE: Duration = Duration::from_millis(50);
/// So long a pass waits for the answers that shared the last one. All of them pick their token at
/// the same time; without this the first one back goes alone, and then all others.
const GATHER: Duration = Duration::from_millis(1);

/// Tokens to compute, and the KV before them.
#[derive(Debug)]
pub(crate) struct Work {
    pub(crate) tokens: Vec<u32>,
    /// Of these, how many are done.
    pub(crate) done: usize,
    pub(crate) kv: KvBuffer,
    pub(crate) want: Want,
    /// Wanted rows so far.
    pub(crate) logits: Vec<f32>,
}

/// What goes into a pass of one [`Work`].
#[derive(Debug)]
pub(crate) struct Share {
    pub(crate) work: Work,
    /// How many of its tokens.
    pub(crate) rows: usize,
    ticket: Ticket,
}

/// The queue for passes.
#[derive(Debug)]
pub(crate) struct Passes {
    rows: usize,
    /// Never held while computing.
    queue: Mutex<Queue>,
    changed: Condvar,
}

/// A turn on the compute threads; the next one begins when it is dropped.
#[derive(Debug)]
pub(crate) struct Lead<'a> {
    passes: &'a Passes,
    ticket: Ticket,
    /// What others have given; they get it back even if the pass panics, and go on by themselves.
    taken: Vec<Share>,
}

#[derive(Debug, Default)]
struct Queue {
    tickets: u64,
    running: bool,
    waiting: VecDeque<Waiting>,
    /// Work that a leader has given back and its owner has not fetched.
    returned: HashMap<u64, Work>,
    /// Who decodes an answer, and when its last token was done.
    answers: HashMap<ThreadId, Instant>,
}

#[derive(Debug)]
struct Waiting {
    ticket: Ticket,
    /// `None`: its owner leads or nobody.
    work: Option<Work>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ticket {
    number: u64,
    owner: ThreadId,
}

impl Passes {
    /// Passes of at most so many rows, or as many as are fastest.
    pub(crate) fn new(rows: Option<usize>) -> Self {
        Self { rows: rows.unwrap_or(ROWS).max(1), queue: Mutex::default(), changed: Condvar::new() }
    }

    /// Takes part in one pass and returns the work, with some of it done. `pass` computes shares of
    /// any owner; it is called on the leader's thread.
    pub(crate) fn share(&self, work: Work, pass: impl FnOnce(&mut [Share])) -> Work {
        let mut queue = self.lock();
        let ticket = queue.push(Some(work));
        // Perhaps a leader waits for this.
        self.changed.notify_all();
        loop {
            if let Some(work) = queue.returned.remove(&ticket.number) {
                return work;
            }
            if let Some(Waiting { work: Some(work), .. }) = queue.lead(ticket) {
                drop(queue);
                return Lead { passes: self, ticket, taken: Vec::new() }.run(work, pass);
            }
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits for a turn: nobody else computes while it lasts.
    pub(crate) fn turn(&self) -> Lead<'_> {
        let mut queue = self.lock();
        let ticket = queue.push(None);
        while queue.lead(ticket).is_none() {
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        Lead { passes: self, ticket, taken: Vec::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lead<'_> {
    /// Runs one pass with this work in front, and returns it.
    pub(crate) fn run(mut self, work: Work, pass: impl FnOnce(&mut [Share])) -> Work {
        let taken = self.gather(&work).shares(self.ticket, work, self.passes.rows);
        self.taken = taken;
        pass(&mut self.taken);
        let ended = Instant::now();
        let mut queue = self.passes.lock();
        for share in self.taken.iter().filter(|share| share.work.is_answer()) {
            queue.answers.insert(share.ticket.owner, ended);
        }
        drop(queue);
        self.taken.remove(0).work
    }

    /// Waits a moment for the answers that shared the last pass.
    fn gather(&self, own: &Work) -> MutexGuard<'_, Queue> {
        let (begin, mut queue) = (Instant::now(), self.passes.lock());
        loop {
            queue.answers.retain(|_, last| last.elapsed() < STALE);
            let here = queue.waiting_answers() + usize::from(own.is_answer());
            let left = GATHER.checked_sub(begin.elapsed()).filter(|_| here < queue.answers.len());
            let Some(left) = left else { return queue };
            queue = self.passes.changed.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Lead<'_> {
    fn drop(&mut self) {
        let mut queue = self.passes.lock();
        for Share { work, ticket, .. } in self.taken.drain(..).filter(|share| share.ticket != self.ticket) {
            queue.returned.insert(ticket.number, work);
        }
        queue.running = false;
        drop(queue);
        self.passes.changed.notify_all();
    }
}

impl Queue {
    fn push(&mut self, work: Option<Work>) -> Ticket {
        let ticket = Ticket { number: self.tickets, owner: thread::current().id() };
        self.tickets += 1;
        if !work.as_ref().is_some_and(Work::is_answer) {
            // Its owner has another prompt: the answer has ended.
            self.answers.remove(&ticket.owner);
        }
        self.waiting.push_back(Waiting { ticket, work });
        ticket
    }

    /// Begins a turn if it is this one's.
    fn lead(&mut self, ticket: Ticket) -> Option<Waiting> {
        if self.running {
            return None;
        }
        let first = self.waiting.pop_front_if(|first| first.ticket == ticket)?;
        self.running = true;
        Some(first)
    }

    fn waiting_answers(&self) -> usize {
        self.waiting.iter().filter(|waiting| waiting.work.as_ref().is_some_and(Work::is_answer)).count()
    }

    /// A token of every answer that waits, and pieces of prompts in order of arrival, the leader's
    /// first.
    fn shares(&mut self, ticket: Ticket, work: Work, rows: usize) -> Vec<Share> {
        let answers = self.waiting_answers() + usize::from(work.is_answer());
        let beside_answers = answers.max(self.answers.len()) > 0;
        let rows = if beside_answers { rows.min(ROWS_BESIDE_ANSWERS) } else { rows };
        // Prompts get on too, however many answers there are.
        let mut prompt_rows = rows.saturating_sub(answers).max(1);
        let mut shares = Vec::with_capacity(answers + 1);
        self.waiting.push_front(Waiting { ticket, work: Some(work) });
        for Waiting { ticket, work } in std::mem::take(&mut self.waiting) {
            match work {
                Some(work) if work.is_answer() => shares.push(Share { work, rows: 1, ticket }),
                Some(work) if prompt_rows > 0 => {
                    let rows = prompt_rows.min(work.left());
                    prompt_rows -= rows;
                    shares.push(Share { work, rows, ticket });
                }
                work => self.waiting.push_back(Waiting { ticket, work }),
            }
        }
        shares
    }
}

impl Work {
    /// One token alone.
    fn is_answer(&self) -> bool {
        self.tokens.len() == 1
    }

    /// Tokens that are still to be computed.
    pub(crate) fn left(&self) -> usize {
        self.tokens.len() - self.done
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use super::*;

    fn work(tokens: usize) -> Work {
        Work { tokens: vec![7; tokens], done: 0, kv: KvBuffer::default(), want: Want::Last, logits: Vec::new() }
    }

    fn compute(shares: &mut [Share]) {
        for Share { work, rows, .. } in shares {
            assert!(*rows > 0 && *rows <= work.left());
            work.done += *rows;
        }
    }

    #[test]
    fn one_pass_at_a_time_and_everybody_gets_their_own_work_back_done() {
        let (passes, busy, passed) = (Passes::new(Some(8)), AtomicBool::new(false), AtomicUsize::new(0));
        let pass = |shares: &mut [Share]| {
            assert!(!busy.swap(true, Ordering::SeqCst));
            passed.fetch_add(1, Ordering::SeqCst);
            thread::yield_now();
            compute(shares);
            busy.store(false, Ordering::SeqCst);
        };
        thread::scope(|scope| {
            for n in 0..6usize {
                let (passes, pass) = (&passes, &pass);
                scope.spawn(move || {
                    for round in 0..100 {
                        let tokens = if round % 3 == 0 { n * 5 + 2 } else { 1 };
                        let mut own = work(tokens);
                        while own.left() > 0 {
                            own = if round % 7 == 0 { passes.turn().run(own, pass) } else { passes.share(own, pass) };
                            assert_eq!(own.tokens.len(), tokens);
                        }
                    }
                });
            }
        });
        let queue = passes.lock();
        assert!(queue.waiting.is_empty() && queue.returned.is_empty() && !queue.running);
        // 6 threads with 66 answers and 34 prompts of 1 to 4 pieces each.
        assert!(passed.into_inner() < 6 * 66 + 34 * (1 + 1 + 2 + 3 + 3 + 4), "nothing was shared");
    }

    #[test]
    fn a_pass_takes_every_answer_and_a_piece_of_a_prompt_but_nobody_who_must_lead() {
        let mut queue = Queue::default();
        let leader = queue.push(Some(work(500)));
        let own = queue.lead(leader).unwrap().work.unwrap();
        for tokens in [Some(1), None, Some(300), Some(1)] {
            queue.push(tokens.map(work));
        }
        let rows: Vec<usize> = queue.shares(leader, own, ROWS).iter().map(|share| share.rows).collect();
        assert_eq!(rows, [ROWS_BESIDE_ANSWERS - 2, 1, 1]);
        assert_eq!(queue.waiting.iter().map(|waiting| waiting.work.is_some()).collect::<Vec<_>>(), [false, true]);
    }

    #[test]
    fn prompts_alone_fill_a_pass_in_order_of_arrival() {
        let mut queue = Queue::default();
        let leader = queue.push(Some(work(100)));
        let own = queue.lead(leader).unwrap().work.unwrap();
        for tokens in [150, 20] {
            queue.push(Some(work(tokens)));
        }
        let rows: Vec<usize> = queue.shares(leader, own, ROWS).iter().map(|share| share.rows).collect();
        assert_eq!(rows, [100, 150, 6]);
    }

    #[test]
    fn after_a_panic_the_others_get_their_work_back_and_go_on() {
        let passes = Passes::new(None);
        let (entered, fail) = (AtomicBool::new(false), AtomicBool::new(true));
        thread::scope(|scope| {
            let leader = scope.spawn(|| {
                let lead = passes.turn();
                entered.store(true, Ordering::SeqCst);
                while passes.lock().waiting.is_empty() {
                    thread::yield_now();
                }
                lead.run(work(5), |shares| {
                    assert_eq!(shares.len(), 2);
                    fail.store(false, Ordering::SeqCst);
                    panic!("a pass that fails");
                })
            });
            while !entered.load(Ordering::SeqCst) {
                thread::yield_now();
            }
            let mut own = work(1);
            while own.left() > 0 {
                own = passes.share(own, compute);
            }
            assert!(leader.join().is_err() && !fail.load(Ordering::SeqCst));
        });
    }
}
