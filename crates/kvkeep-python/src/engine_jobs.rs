//! Jobs that an engine has given: each ends exactly once, done or out of time.
//!
//! Invariant: once a job has ended, no byte of its rows is read or written. Whoever copies holds the job's gate; whoever
//! ends it waits for the gate, so for a copy at most, and closes it. A thread that watches the clock was the alternative:
//! engines poll for what has ended anyway, and look at the time then.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use kvkeep::tiers::{BlockMeta, Payload, ReadTarget};

use crate::engine_rows::{Page, Pool, Rows};

/// The name of a block as the engine gave it.
pub(crate) type Key = Vec<u8>;

/// A job under way.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) id: u64,
    pub(crate) kind: Kind,
    /// Which row each of its blocks is in.
    pub(crate) rows: Vec<usize>,
    /// Is it over? Held while one of its rows is copied.
    gate: RwLock<bool>,
    /// Blocks of a load that came.
    came: Vec<AtomicBool>,
    left: AtomicUsize,
    begun: Instant,
    deadline: Instant,
}

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Store,
    Load,
    /// A load into nowhere, to see how fast that is.
    Probe,
}

/// A job that has ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) id: u64,
    pub(crate) kind: Kind,
    /// Positions of the blocks that came, or were taken.
    pub(crate) done: Vec<usize>,
    pub(crate) blocks: usize,
    pub(crate) time: Duration,
}

/// All jobs, and what they share.
#[derive(Debug)]
pub(crate) struct Jobs {
    /// `None` once the engine has its memory back.
    rows: RwLock<Option<Rows>>,
    /// Taken before a job's gate, never while one is held.
    state: Mutex<State>,
    ended: Condvar,
    pub(crate) bounce: Arc<Pool>,
    pub(crate) late: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    active: HashMap<u64, Arc<Job>>,
    ended: Vec<Ended>,
}

impl Jobs {
    pub(crate) fn new(rows: Rows, bounce: Arc<Pool>) -> Self {
        Self {
            rows: RwLock::new(Some(rows)),
            state: Mutex::default(),
            ended: Condvar::new(),
            bounce,
            late: AtomicU64::new(0),
        }
    }

    /// Begins a job; `None` if one with this number is under way.
    pub(crate) fn begin(&self, id: u64, kind: Kind, rows: Vec<usize>, time: Duration) -> Option<Arc<Job>> {
        let (begun, blocks) = (Instant::now(), rows.len());
        let job = Arc::new(Job {
            id,
            kind,
            rows,
            gate: RwLock::new(false),
            came: (0..blocks).map(|_| AtomicBool::new(false)).collect(),
            left: AtomicUsize::new(blocks),
            begun,
            deadline: begun + time,
        });
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.active.contains_key(&id) {
            return None;
        }
        state.active.insert(id, Arc::clone(&job));
        Some(job)
    }

    /// A job has nothing more to do. One that has ended before is left alone.
    pub(crate) fn end(&self, job: &Job) {
        {
            // Closed first: what is said to have come is what is in its row.
            *job.gate.write().unwrap_or_else(PoisonError::into_inner) = true;
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            if state.active.remove(&job.id).is_none() {
                return;
            }
            state.ended.push(job.ended());
        }
        self.ended.notify_all();
    }

    /// What has ended since this was last asked. Ends what is out of time.
    pub(crate) fn take_ended(&self) -> Vec<Ended> {
        self.end_late();
        std::mem::take(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner).ended)
    }

    /// Waits until no job is under way: for the deadline of the last one at most.
    pub(crate) fn drain(&self) {
        loop {
            self.end_late();
            let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(next) = state.active.values().map(|job| job.deadline).min() else { return };
            let time = next.saturating_duration_since(Instant::now()).min(Duration::from_secs(1));
            drop(self.ended.wait_timeout(state, time));
        }
    }

    /// Ends every job, and gives the rows back.
    pub(crate) fn close(&self) -> Option<Rows> {
        for job in self.active() {
            self.end(&job);
        }
        self.rows.write().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Are there all of these rows?
    pub(crate) fn has_rows(&self, wanted: &[usize]) -> bool {
        let rows = self.rows.read().unwrap_or_else(PoisonError::into_inner);
        rows.as_ref().is_some_and(|rows| wanted.iter().all(|row| *row < rows.count()))
    }

    pub(crate) fn under_way(&self) -> usize {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).active.len()
    }

    fn active(&self) -> Vec<Arc<Job>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).active.values().cloned().collect()
    }

    fn end_late(&self) {
        let now = Instant::now();
        for job in self.active().iter().filter(|job| job.deadline <= now) {
            self.late.fetch_add(1, Ordering::Relaxed);
            self.end(job);
        }
    }

    /// Does this with the row of a block, if the job is not over; says whether it did.
    pub(crate) fn with_row(&self, job: &Job, block: usize, copy: impl FnOnce(&Rows, usize) -> bool) -> bool {
        let rows = self.rows.read().unwrap_or_else(PoisonError::into_inner);
        let over = job.gate.read().unwrap_or_else(PoisonError::into_inner);
        match (&*rows, job.rows.get(block)) {
            (Some(rows), Some(row)) if !*over => copy(rows, *row),
            _ => false,
        }
    }
}

impl Job {
    pub(crate) fn is_over(&self) -> bool {
        *self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// This block is where it was to go.
    pub(crate) fn came(&self, block: usize) {
        if let Some(came) = self.came.get(block) {
            came.store(true, Ordering::Release);
        }
    }

    /// One block less to wait for; says whether it was the last one.
    pub(crate) fn one_less(&self) -> bool {
        self.left.fetch_sub(1, Ordering::AcqRel) == 1
    }

    fn ended(&self) -> Ended {
        let came = self.came.iter().enumerate();
        Ended {
            id: self.id,
            kind: self.kind,
            done: came.filter(|(_, came)| came.load(Ordering::Acquire)).map(|(block, _)| block).collect(),
            blocks: self.rows.len(),
            time: self.begun.elapsed(),
        }
    }
}

/// Where a block is read to: memory of our own, and from there, checked, into its row; or straight into its row, if that is one
/// copy. A row that was filled by what turned out to be no block is not said to have come.
pub(crate) struct Target {
    jobs: Arc<Jobs>,
    job: Arc<Job>,
    block: usize,
    filled: Filled,
}

/// Where the bytes of a [`Target`] are.
enum Filled {
    Nowhere,
    Page(Page),
    /// Where they belong; those of a probe belong nowhere.
    Row,
}

impl Target {
    pub(crate) fn new(jobs: Arc<Jobs>, job: Arc<Job>, block: usize) -> Self {
        Self { jobs, job, block, filled: Filled::Nowhere }
    }

    fn fill_row(&self, copy: &mut dyn FnMut(&mut [u8]) -> bool) -> bool {
        match self.job.kind {
            Kind::Probe => copy(self.jobs.bounce.take().bytes_mut()),
            _ => self.jobs.with_row(&self.job, self.block, |rows, row| rows.fill(row, copy)),
        }
    }
}

impl ReadTarget for Target {
    /// Nothing once the row is filled.
    fn bytes_mut(&mut self) -> &mut [u8] {
        if matches!(self.filled, Filled::Nowhere) {
            self.filled = Filled::Page(self.jobs.bounce.take());
        }
        if let Filled::Page(page) = &mut self.filled { page.bytes_mut() } else { &mut [] }
    }

    fn fill(&mut self, copy: &mut dyn FnMut(&mut [u8]) -> bool) -> bool {
        let is_filled = self.fill_row(copy);
        self.filled = if is_filled { Filled::Row } else { Filled::Nowhere };
        is_filled
    }

    fn complete(self: Box<Self>, read: Option<BlockMeta>) {
        let arrived = read.is_some()
            && match &self.filled {
                Filled::Nowhere => false,
                Filled::Row => true,
                Filled::Page(page) => self.fill_row(&mut |row| {
                    let fits = row.len() == page.bytes().len();
                    if fits {
                        row.copy_from_slice(page.bytes());
                    }
                    fits
                }),
            };
        if arrived {
            self.job.came(self.block);
        }
    }
}

/// Completed or not: it counts once.
impl Drop for Target {
    fn drop(&mut self) {
        // The memory first: who waits for the job may want it.
        self.filled = Filled::Nowhere;
        if self.job.one_less() {
            self.jobs.end(&self.job);
        }
    }
}

/// A copy of a row on its way to the disk.
pub(crate) struct Staged {
    pub(crate) page: Page,
}

impl Payload for Staged {
    fn bytes(&self) -> &[u8] {
        self.page.bytes()
    }
}
