//! What the client's threads and the cache's calls share.
//!
//! Invariants:
//! - While the daemon cannot be asked nothing is found and nothing taken, at once: no call waits to find that out again.
//! - What was to be forgotten while it could not be asked is told before it is asked anything else.
//!
//! The lock order: `ask`, then `untold`. All others are taken alone.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use kvkeep::BlockHash;
use kvkeep::tiers::{BlockKey, Deadline, Forgets, Offer, Read, Reports};

use crate::channel::Channel;
use crate::config::DaemonTierConfig;
use crate::lock;
use crate::wire::{Answer, Gone, Request};

/// Keys that may wait to be forgotten: more of them become everything.
const MAX_UNTOLD_KEYS: usize = 1 << 16;
/// Marks that are kept: more of them are forgotten, which costs the admission rule a lesson.
const MAX_MARKS: usize = 1 << 20;

/// The client's side of a daemon.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) config: DaemonTierConfig,
    /// Where questions go; `None` while there is no daemon.
    ask: Mutex<Option<Channel>>,
    is_up: AtomicBool,
    /// Counts connections: what was made before the last one is out of date.
    generation: AtomicU64,
    pub(crate) capacity_bytes: AtomicU64,
    untold: Mutex<Vec<Gone>>,
    pub(crate) forgets: Mutex<Forgets>,
    marks: Mutex<HashMap<BlockKey, u8>>,
    pub(crate) reads: Queue<Read>,
    pub(crate) writes: Mutex<Writes>,
    /// Something in `writes` has changed.
    pub(crate) written: Condvar,
    pub(crate) news: Mutex<News>,
    /// Something in `news` has changed.
    pub(crate) heard: Condvar,
    pub(crate) is_closed: AtomicBool,
    /// The connection was lost, or nothing more comes.
    lost: (Mutex<()>, Condvar),
    pub(crate) counts: Counts,
}

/// What is to be written.
#[derive(Debug, Default)]
pub(crate) struct Writes {
    pub(crate) queue: VecDeque<Offer>,
    /// Of those in the queue and those being written.
    pub(crate) bytes: u64,
    /// Batches that are being written.
    pub(crate) writing: usize,
    /// Grows with each batch that has ended.
    pub(crate) done: u64,
}

/// What is known of the daemon's blocks, for a listener.
#[derive(Debug, Default)]
pub(crate) struct News {
    pub(crate) reports: Option<Reports>,
    pub(crate) known: HashSet<BlockHash>,
    /// The last mark that came.
    pub(crate) mark: u64,
    pub(crate) last_mark: u64,
}

/// What happened so far.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) hits: AtomicU64,
    pub(crate) read_bytes: AtomicU64,
    pub(crate) stored: AtomicU64,
    pub(crate) written_bytes: AtomicU64,
    pub(crate) dropped: AtomicU64,
    pub(crate) damaged: AtomicU64,
    pub(crate) timeouts: AtomicU64,
}

impl Counts {
    pub(crate) fn add(count: &AtomicU64, more: u64) {
        count.fetch_add(more, Ordering::Relaxed);
    }

    pub(crate) fn get(count: &AtomicU64) -> u64 {
        count.load(Ordering::Relaxed)
    }
}

/// Work for threads.
#[derive(Debug)]
pub(crate) struct Queue<T> {
    items: Mutex<(VecDeque<T>, bool)>,
    came: Condvar,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self { items: Mutex::default(), came: Condvar::new() }
    }
}

impl<T> Queue<T> {
    /// Gives them back if nothing is taken any more.
    pub(crate) fn push(&self, more: Vec<T>) -> Vec<T> {
        let mut items = lock(&self.items);
        if items.1 {
            return more;
        }
        items.0.extend(more);
        drop(items);
        self.came.notify_all();
        Vec::new()
    }

    /// Waits for work, and takes items while `fits` says so, one at least; `None` when nothing more comes.
    pub(crate) fn pop(&self, mut fits: impl FnMut(&T) -> bool) -> Option<Vec<T>> {
        let mut items = lock(&self.items);
        while items.0.is_empty() {
            if items.1 {
                return None;
            }
            items = self.came.wait(items).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        let mut taken = Vec::new();
        while items.0.front().is_some_and(|item| fits(item) || taken.is_empty()) {
            taken.extend(items.0.pop_front());
        }
        Some(taken)
    }

    /// Nothing more comes; gives what was not taken.
    pub(crate) fn close(&self) -> VecDeque<T> {
        let mut items = lock(&self.items);
        items.1 = true;
        let left = std::mem::take(&mut items.0);
        drop(items);
        self.came.notify_all();
        left
    }
}

impl Shared {
    pub(crate) fn new(config: DaemonTierConfig) -> Self {
        Self {
            config,
            ask: Mutex::default(),
            is_up: AtomicBool::new(false),
            generation: AtomicU64::new(0),
            capacity_bytes: AtomicU64::new(0),
            untold: Mutex::default(),
            forgets: Mutex::default(),
            marks: Mutex::default(),
            reads: Queue::default(),
            writes: Mutex::default(),
            written: Condvar::new(),
            news: Mutex::default(),
            heard: Condvar::new(),
            is_closed: AtomicBool::new(false),
            lost: (Mutex::default(), Condvar::new()),
            counts: Counts::default(),
        }
    }

    /// Is the daemon there, as far as is known?
    pub(crate) fn is_up(&self) -> bool {
        self.is_up.load(Ordering::SeqCst)
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::SeqCst)
    }

    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Asks the daemon; `None` if it does not answer in time, and then it is away.
    pub(crate) fn ask(&self, request: &Request, deadline: Deadline) -> Option<Answer> {
        if !self.is_up() {
            return None;
        }
        let mut ask = lock(&self.ask);
        let answer = ask.as_mut()?.ask(request, deadline);
        self.answered(&mut ask, answer)
    }

    fn answered(&self, ask: &mut Option<Channel>, answer: std::io::Result<Answer>) -> Option<Answer> {
        match answer {
            Ok(Answer::Refused(why)) => tracing::warn!(%why, "the daemon refuses"),
            Ok(answer) => return Some(answer),
            Err(error) => {
                let is_late = error.kind() == std::io::ErrorKind::TimedOut;
                Counts::add(&self.counts.timeouts, u64::from(is_late));
            }
        }
        *ask = None;
        self.lose();
        None
    }

    /// Has the daemon forget; if it cannot be asked, it is told first thing when it is back.
    pub(crate) fn ask_to_forget(&self, gone: Gone, deadline: Deadline) -> Option<Answer> {
        let mut ask = lock(&self.ask);
        let request = Request::Forget(gone);
        let answer = ask.as_mut().map(|channel| channel.ask(&request, deadline));
        let answer = answer.and_then(|answer| self.answered(&mut ask, answer));
        if let (None, Request::Forget(gone)) = (&answer, request) {
            let mut untold = lock(&self.untold);
            untold.push(gone);
            if untold.iter().map(|gone| gone.keys().max(1)).sum::<usize>() > MAX_UNTOLD_KEYS {
                *untold = vec![Gone::All];
            }
        }
        answer
    }

    /// The daemon is there: it is told what is to be forgotten, and asked from now on.
    pub(crate) fn connected(&self, mut channel: Channel, patience: Duration) -> std::io::Result<()> {
        loop {
            let untold = std::mem::take(&mut *lock(&self.untold));
            for (at, gone) in untold.iter().enumerate() {
                let told = channel.ask(&Request::Forget(gone.clone()), Deadline::after(patience));
                if let Err(error) = told {
                    lock(&self.untold).splice(0..0, untold.into_iter().skip(at));
                    return Err(error);
                }
            }
            let mut ask = lock(&self.ask);
            if lock(&self.untold).is_empty() {
                *ask = Some(channel);
                self.generation.fetch_add(1, Ordering::SeqCst);
                self.is_up.store(true, Ordering::SeqCst);
                return Ok(());
            }
        }
    }

    /// It is not there any more.
    pub(crate) fn lose(&self) {
        self.is_up.store(false, Ordering::SeqCst);
        drop(lock(&self.lost.0));
        self.lost.1.notify_all();
    }

    /// Waits until the connection is lost, so long at most.
    pub(crate) fn wait_for_loss(&self, at_most: Duration) {
        let guard = lock(&self.lost.0);
        if self.is_up() && !self.is_closed() {
            drop(self.lost.1.wait_timeout(guard, at_most));
        }
    }

    /// Waits until it is closed, so long at most.
    pub(crate) fn pause(&self, at_most: Duration) {
        let guard = lock(&self.lost.0);
        if !self.is_closed() {
            drop(self.lost.1.wait_timeout(guard, at_most));
        }
    }

    /// Remembers the mark of what was offered.
    pub(crate) fn set_mark(&self, key: BlockKey, mark: u8) {
        if mark == 0 {
            return;
        }
        let mut marks = lock(&self.marks);
        if marks.len() >= MAX_MARKS {
            marks.clear();
        }
        marks.insert(key, mark);
    }

    pub(crate) fn marks<'a>(&self, keys: impl Iterator<Item = (&'a BlockKey, &'a mut u8)>) {
        let marks = lock(&self.marks);
        if !marks.is_empty() {
            keys.for_each(|(key, mark)| *mark = marks.get(key).copied().unwrap_or(0));
        }
    }

    /// Nothing is taken any more, and nobody waits.
    pub(crate) fn close(&self) {
        self.is_closed.store(true, Ordering::SeqCst);
        self.lose();
        let left = self.reads.close();
        left.into_iter().for_each(|read| read.target.complete(None));
        let queue = std::mem::take(&mut lock(&self.writes).queue);
        drop(queue);
        self.written.notify_all();
        self.heard.notify_all();
        lock(&self.news).reports = None;
    }
}
