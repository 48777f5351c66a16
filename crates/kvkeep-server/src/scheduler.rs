//! Who is answered when: a bounded queue, and threads that answer.
//!
//! Invariant: every job that was taken ends in exactly one [`Served`], whoever ends it: its
//! thread, a client that goes away, or the end of the server. A thread for each answer that is
//! under way, not tasks: engine and cache are synchronous, and each thread keeps its KV buffer.
//! Of the jobs that wait, the next is the oldest of the tenant that has the fewest under way, so
//! nobody waits behind all that somebody else has asked for.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use kvkeep::Namespace;
use kvkeep_engine::{Cancel, GenerateOptions};
use tokio::sync::mpsc;

use crate::auth::Tenant;
use crate::error::ApiError;
use crate::served::{Endpoint, Outcome, Served};
use crate::state::AppState;

/// How much a new answer's time counts in the mean.
const NEWEST: f64 = 0.2;

/// What is asked for.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) id: String,
    pub(crate) endpoint: Endpoint,
    pub(crate) tenant: Tenant,
    pub(crate) namespace: Namespace,
    pub(crate) prompt: Arc<[u32]>,
    pub(crate) options: GenerateOptions,
    /// Texts that end the answer.
    pub(crate) stop: Vec<String>,
    /// Log probabilities of each token and of so many others.
    pub(crate) top_logprobs: Option<usize>,
    pub(crate) arrived: Arrived,
}

/// When a request came.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arrived {
    pub(crate) at: SystemTime,
    pub(crate) since: Instant,
}

/// What whoever asked is told.
#[derive(Debug)]
pub(crate) enum Event {
    Piece(Piece),
    /// The last one.
    End(Result<Box<Served>, ApiError>),
}

/// Where the events of all jobs of a request go, each with its job's place among them.
pub(crate) type Events = mpsc::UnboundedSender<(usize, Event)>;

/// A part of an answer.
#[derive(Debug, Default)]
pub(crate) struct Piece {
    pub(crate) text: String,
    pub(crate) logprobs: Vec<TokenLogprob>,
}

/// How likely a token was.
#[derive(Debug, Clone)]
pub(crate) struct TokenLogprob {
    pub(crate) token: u32,
    pub(crate) logprob: f32,
    pub(crate) top: Vec<(u32, f32)>,
}

/// A job and where its answer goes.
#[derive(Debug)]
pub(crate) struct Taken {
    pub(crate) job: Job,
    events: Events,
    /// Its place among the jobs of its request.
    place: usize,
    number: u64,
}

/// Answers that are waited for; dropping it ends their jobs.
#[derive(Debug)]
pub(crate) struct Ticket {
    events: mpsc::UnboundedReceiver<(usize, Event)>,
    numbers: Range<u64>,
    cancels: Vec<Cancel>,
    deadline: Instant,
    state: AppState,
}

/// How busy the server is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Load {
    pub(crate) running: usize,
    pub(crate) queued: usize,
    /// Sent away since the start because the queue was full.
    pub(crate) rejected: u64,
    pub(crate) closed: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Scheduler {
    /// Never held while answering, or while somebody is told.
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: VecDeque<Taken>,
    running: Vec<Running>,
    next: u64,
    rejected: u64,
    closed: bool,
    /// A moving mean of what an answer takes.
    service: Option<Duration>,
}

#[derive(Debug)]
struct Running {
    number: u64,
    tenant: Tenant,
    cancel: Cancel,
}

/// What a job is called: as its request, and the others of that behind it.
pub(crate) fn job_id(request: &str, place: usize) -> String {
    if place == 0 { request.to_owned() } else { format!("{request}-{place}") }
}

impl Arrived {
    pub(crate) fn now() -> Self {
        Self { at: SystemTime::now(), since: Instant::now() }
    }
}

impl AppState {
    /// Puts the jobs of a request into the queue: all of them or none.
    pub(crate) fn submit(&self, jobs: Vec<Job>) -> Result<Ticket, ApiError> {
        let config = &self.shared.config;
        let (sender, events) = mpsc::unbounded_channel();
        let since = jobs.first().map_or_else(Instant::now, |job| job.arrived.since);
        let cancels = jobs.iter().map(|job| job.options.cancel.clone()).collect();
        let numbers = self.shared.scheduler.put(jobs, &sender, config.parallel, config.queue)?;
        Ok(Ticket { events, numbers, cancels, deadline: since + config.request_timeout, state: self.clone() })
    }

    /// Ends all that waits and all that is under way.
    pub(crate) fn cancel_all(&self) {
        for taken in self.shared.scheduler.take_all() {
            self.end_unanswered(&taken);
        }
    }

    fn end_unanswered(&self, taken: &Taken) {
        let served = taken.job.unanswered(self.shared.config.request_timeout);
        self.observe(&served);
        taken.tell(Event::End(Err(ApiError::ShuttingDown)));
    }
}

impl Scheduler {
    pub(crate) fn load(&self) -> Load {
        let queue = self.lock();
        Load {
            running: queue.running.len(),
            queued: queue.waiting.len(),
            rejected: queue.rejected,
            closed: queue.closed,
        }
    }

    /// Takes no more jobs; those that are there are answered.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// The next job to answer; waits for one. `None` when there will be none any more.
    pub(crate) fn take(&self) -> Option<Taken> {
        let mut queue = self.lock();
        loop {
            if let Some(taken) = queue.next() {
                return Some(taken);
            }
            if queue.closed {
                return None;
            }
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A job that was taken has ended.
    pub(crate) fn done(&self, number: u64, service: Duration) {
        let mut queue = self.lock();
        queue.running.retain(|running| running.number != number);
        queue.service = Some(match queue.service {
            Some(mean) => mean.mul_f64(1.0 - NEWEST) + service.mul_f64(NEWEST),
            None => service,
        });
    }

    fn put(&self, jobs: Vec<Job>, events: &Events, parallel: usize, capacity: usize) -> Result<Range<u64>, ApiError> {
        let mut queue = self.lock();
        if queue.closed {
            return Err(ApiError::ShuttingDown);
        }
        // Threads that are about to take one count: an idle server takes jobs without a queue too.
        let free = parallel.saturating_sub(queue.running.len());
        if queue.waiting.len() + jobs.len() > capacity + free {
            queue.rejected += 1;
            return Err(ApiError::Busy { retry_after_s: queue.retry_after_s(parallel) });
        }
        let first = queue.next;
        for (place, job) in jobs.into_iter().enumerate() {
            let number = queue.next;
            queue.next += 1;
            queue.waiting.push_back(Taken { job, events: events.clone(), place, number });
        }
        let numbers = first..queue.next;
        drop(queue);
        self.changed.notify_all();
        Ok(numbers)
    }

    /// Takes those of these jobs that still wait out of the queue.
    fn forget(&self, numbers: &Range<u64>) -> Vec<Taken> {
        let mut queue = self.lock();
        let waiting = std::mem::take(&mut queue.waiting);
        let (forgotten, waiting): (Vec<Taken>, Vec<Taken>) =
            waiting.into_iter().partition(|taken| numbers.contains(&taken.number));
        queue.waiting = waiting.into();
        forgotten
    }

    fn take_all(&self) -> VecDeque<Taken> {
        let mut queue = self.lock();
        queue.running.iter().for_each(|running| running.cancel.cancel());
        std::mem::take(&mut queue.waiting)
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    fn next(&mut self) -> Option<Taken> {
        let under_way = |tenant: &Tenant| self.running.iter().filter(|running| running.tenant == *tenant).count();
        // The first of several that are equal: the oldest.
        let (at, _) = self.waiting.iter().enumerate().min_by_key(|(_, taken)| under_way(&taken.job.tenant))?;
        let taken = self.waiting.remove(at)?;
        let Taken { job, number, .. } = &taken;
        let (tenant, cancel) = (job.tenant.clone(), job.options.cancel.clone());
        self.running.push(Running { number: *number, tenant, cancel });
        Some(taken)
    }

    /// When a place may be free: the time for all that waits, by what answers took so far.
    fn retry_after_s(&self, parallel: usize) -> u64 {
        let places = u32::try_from(self.waiting.len().div_ceil(parallel.max(1))).unwrap_or(u32::MAX);
        let all = self.service.unwrap_or(Duration::from_secs(1)).saturating_mul(places);
        (all.as_secs() + 1).min(600)
    }
}

impl Taken {
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// Tells whoever asked; nobody may be left to hear it.
    pub(crate) fn tell(&self, event: Event) {
        drop(self.events.send((self.place, event)));
    }
}

impl Job {
    /// What becomes of it if no thread takes it.
    pub(crate) fn unanswered(&self, timeout: Duration) -> Served {
        let waited = self.arrived.since.elapsed();
        Served {
            id: self.id.clone(),
            endpoint: self.endpoint,
            tenant: self.tenant.clone(),
            namespace: self.namespace.clone(),
            arrived: self.arrived.at,
            prompt: Arc::clone(&self.prompt),
            tiers: Vec::new(),
            completion_tokens: 0,
            queued: waited,
            ttft: None,
            cold_ttft: None,
            prefill: Duration::ZERO,
            total: waited,
            outcome: if waited >= timeout { Outcome::TimedOut } else { Outcome::Cancelled },
            chain: None,
        }
    }
}

impl Ticket {
    /// What happens next, and to which of the jobs. After the end of all there is nothing to wait for.
    pub(crate) async fn next(&mut self) -> (usize, Event) {
        match tokio::time::timeout_at(self.deadline.into(), self.events.recv()).await {
            Ok(Some(event)) => event,
            Ok(None) => (0, Event::End(Err(ApiError::Internal("the thread that answered ended".to_owned())))),
            Err(_) => (0, Event::End(Err(ApiError::Timeout))),
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.cancels.iter().for_each(Cancel::cancel);
        for taken in self.state.shared.scheduler.forget(&self.numbers) {
            self.state.end_unanswered(&taken);
        }
    }
}
