//! What the tier and its tasks share.

use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvkeep::Clock;
use kvkeep::tiers::Messages;
use tokio::sync::{Notify, Semaphore};

use crate::health::Health;
use crate::state::State;
use crate::store::Store;

/// Blocks that are read at a time.
const READS_AT_ONCE: usize = 16;

pub(crate) struct Shared {
    pub(crate) store: Box<dyn Store>,
    pub(crate) messages: Messages,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) capacity_bytes: u64,
    pub(crate) queue_bytes: u64,
    pub(crate) deadline: Duration,
    pub(crate) waits: bool,
    /// Questions under way that nobody waits for, and whether there was one since somebody wanted to know.
    pub(crate) asking: AtomicUsize,
    pub(crate) has_asked: AtomicBool,
    pub(crate) refresh: Duration,
    pub(crate) ttl: Option<Duration>,
    pub(crate) hedge: Option<Duration>,
    pub(crate) health: Health,
    /// Held alone, and never while anything is awaited.
    state: Mutex<State>,
    /// Something was done: there may be room in the queue.
    pub(crate) room: Condvar,
    /// There is something to do.
    pub(crate) work: Notify,
    /// Memory of what is being written is needed.
    pub(crate) needed: Notify,
    /// When a block last came.
    came: Mutex<Instant>,
    pub(crate) reading: Semaphore,
}

/// How a tier is made.
pub(crate) struct Parts {
    pub(crate) store: Box<dyn Store>,
    pub(crate) messages: Messages,
    pub(crate) clock: Arc<dyn Clock>,
}

impl Shared {
    pub(crate) fn new(parts: Parts, config: &crate::RemoteConfig) -> Self {
        let Parts { store, messages, clock } = parts;
        let health = Health::new(store.name(), config.deadline);
        Self {
            store,
            messages,
            clock,
            capacity_bytes: config.capacity_bytes,
            queue_bytes: config.queue_bytes,
            deadline: config.deadline,
            waits: config.waits,
            asking: AtomicUsize::new(0),
            has_asked: AtomicBool::new(false),
            refresh: config.refresh,
            ttl: config.ttl,
            hedge: config.hedge,
            health,
            state: Mutex::default(),
            room: Condvar::new(),
            work: Notify::new(),
            needed: Notify::new(),
            came: Mutex::new(Instant::now()),
            reading: Semaphore::new(READS_AT_ONCE),
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for something to be done, for so long at most.
    pub(crate) fn wait<'a>(&self, state: MutexGuard<'a, State>, at_most: Duration) -> MutexGuard<'a, State> {
        self.room.wait_timeout(state, at_most).unwrap_or_else(PoisonError::into_inner).0
    }

    /// Drops what has expired, from a store that does not do it by itself, too.
    pub(crate) fn sweep(&self) {
        self.lock().sweep(self.clock.now_ms(), self.store.knows_time());
        self.work.notify_one();
    }

    /// A block came.
    pub(crate) fn progress(&self) {
        *self.came.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// When nobody waits any longer who began then.
    pub(crate) fn late_at(&self, began: Instant) -> Instant {
        began.max(*self.came.lock().unwrap_or_else(PoisonError::into_inner)) + self.deadline
    }
}
