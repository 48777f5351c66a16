//! Loads under way: who reads what, who waits for it, how much at a time, and what is to be prefetched.
//!
//! No lock in here is held together with another, or with the ledger's.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::guard::Pin;
use crate::clock::Deadline;
use crate::eviction;
use crate::key::ObjectKey;
use crate::sync::{Condvar, Mutex};
use crate::tier::{Epoch, Located, Tier};

/// What is being read is at most this part of RAM, and at least one block.
const UNDER_WAY_DIVISOR: u64 = 4;
/// More at once makes nothing faster.
const MAX_UNDER_WAY_BYTES: u64 = 256 << 20;
/// Loads under way, and those that are to come.
pub(super) struct Loads {
    pub(super) flying: Mutex<HashMap<ObjectKey, Arc<Load>>>,
    pub(super) under_way: Mutex<u64>,
    pub(super) less_under_way: Condvar,
    pub(super) limit_bytes: u64,
    pub(super) ahead: Mutex<Ahead>,
}

/// What nobody waits for.
#[derive(Default)]
pub(super) struct Ahead {
    pub(super) queue: VecDeque<Wish>,
    /// Of its blocks, so many are being read.
    pub(super) flying: usize,
    /// Requests that wait for blocks now.
    pub(super) demand: usize,
    pub(super) closed: bool,
}

/// A block that is to be brought up.
pub(super) struct Wish {
    pub(super) key: ObjectKey,
    pub(super) tier: Arc<dyn Tier>,
    pub(super) located: Located,
    pub(super) epoch: Epoch,
    /// How long the request has waited for tiers to say what they have.
    pub(super) waited: Duration,
    pub(super) chain: Neighbours,
}

/// Where a block stands in the request that wants it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Neighbours {
    pub(super) before: Option<ObjectKey>,
    pub(super) behind: Option<ObjectKey>,
    pub(super) place: eviction::Place,
}

/// One block under way.
pub(super) struct Load {
    pub(super) state: Mutex<LoadState>,
    pub(super) landed: Condvar,
}

pub(super) enum LoadState {
    /// So many wait for it.
    Flying(usize),
    /// Its block is being made findable, for those who wait.
    Landing,
    /// A pin for each of those who waited and have not taken theirs yet.
    Landed(Vec<Pin>),
    Failed,
}

/// Who reads a block.
pub(super) enum Role {
    /// Whoever asked.
    Lead(Arc<Load>),
    /// Somebody else, already.
    Join(Arc<Load>),
}

impl Loads {
    pub(super) fn new(capacity_bytes: u64) -> Self {
        Self {
            flying: Mutex::default(),
            under_way: Mutex::default(),
            less_under_way: Condvar::default(),
            limit_bytes: (capacity_bytes / UNDER_WAY_DIVISOR).min(MAX_UNDER_WAY_BYTES),
            ahead: Mutex::default(),
        }
    }

    /// Nothing is prefetched any more.
    pub(super) fn close(&self) {
        let queue = {
            let mut ahead = self.ahead.lock();
            ahead.closed = true;
            std::mem::take(&mut ahead.queue)
        };
        drop(queue);
    }

    pub(super) fn enter(&self, key: &ObjectKey, waiters: usize) -> Role {
        let mut flying = self.flying.lock();
        if let Some(load) = flying.get(key) {
            return Role::Join(Arc::clone(load));
        }
        let load = Arc::new(Load { state: Mutex::new(LoadState::Flying(waiters)), landed: Condvar::default() });
        flying.insert(*key, Arc::clone(&load));
        Role::Lead(load)
    }

    /// A load is over. In this order: whoever finds no load any more finds its block.
    pub(super) fn leave(&self, key: &ObjectKey, load: &Load, state: LoadState) {
        load.land(state);
        self.flying.lock().remove(key);
    }

    /// Takes so many bytes of what may be under way; says whether there were.
    pub(super) fn begin(&self, bytes: u64, deadline: Deadline) -> bool {
        let mut under_way = self.under_way.lock();
        while *under_way > 0 && *under_way + bytes > self.limit_bytes {
            if deadline.is_over() {
                return false;
            }
            (under_way, _) = self.less_under_way.wait_timeout(under_way, deadline.left());
        }
        *under_way += bytes;
        true
    }

    pub(super) fn has_room(&self, bytes: u64) -> bool {
        let under_way = self.under_way.lock();
        *under_way == 0 || *under_way + bytes <= self.limit_bytes
    }

    pub(super) fn end(&self, bytes: u64) {
        *self.under_way.lock() -= bytes;
        self.less_under_way.notify_all();
    }
}

impl Load {
    /// One more waits for it; `false` if it is over.
    pub(super) fn join(&self) -> bool {
        match &mut *self.state.lock() {
            LoadState::Flying(waiters) => {
                *waiters += 1;
                true
            }
            LoadState::Landing | LoadState::Landed(_) | LoadState::Failed => false,
        }
    }

    /// The block, if it comes in time.
    pub(super) fn wait(&self, deadline: Deadline) -> Option<Pin> {
        let mut state = self.state.lock();
        loop {
            match &mut *state {
                LoadState::Landed(pins) => return pins.pop(),
                LoadState::Failed => return None,
                LoadState::Flying(waiters) if deadline.is_over() => {
                    *waiters -= 1;
                    return None;
                }
                LoadState::Flying(_) | LoadState::Landing => {}
            }
            (state, _) = self.landed.wait_timeout(state, deadline.left());
        }
    }

    pub(super) fn land(&self, landed: LoadState) {
        *self.state.lock() = landed;
        self.landed.notify_all();
    }
}

impl Neighbours {
    pub(super) fn of(keys: &[ObjectKey], position: usize) -> Self {
        Self {
            before: position.checked_sub(1).and_then(|before| keys.get(before)).copied(),
            behind: keys.get(position + 1).copied(),
            place: eviction::Place::of(position, keys.len(), keys.len()),
        }
    }
}
