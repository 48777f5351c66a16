//! Memory that is free given back to the operating system, after everything was cleared.
//!
//! A cache under load keeps its memory: the next store takes it, without a page fault. Whoever clears it wants the
//! machine's memory back. Free pages are taken out piece by piece, so that nobody stores into them meanwhile, and
//! given back without a lock. A store that is short of just these pages waits until they are free again.

use std::sync::atomic::{AtomicU64, Ordering};

use super::Shared;
use crate::sync::Mutex;

/// Who is giving memory back.
#[derive(Debug, Default)]
pub(super) struct GiveBack {
    /// Held by whoever does it; the ledger's lock comes after it.
    under_way: Mutex<()>,
    begun: AtomicU64,
    done: AtomicU64,
}

impl GiveBack {
    /// How often it was done.
    pub(super) fn times(&self) -> u64 {
        self.done.load(Ordering::SeqCst)
    }

    /// Waits for what is under way. Says whether any has been since it was done so many times.
    pub(super) fn wait_since(&self, times: u64) -> bool {
        let since = self.begun.load(Ordering::SeqCst) != times;
        if since {
            drop(self.under_way.lock());
        }
        since
    }
}

impl Shared {
    /// Gives the memory of free pages back, in whole pieces of 2 MiB.
    pub(super) fn give_back(&self) {
        let _under_way = self.given_back.under_way.lock();
        self.given_back.begun.fetch_add(1, Ordering::SeqCst);
        let mut from = 0;
        loop {
            let taken = self.with(|ledger| ledger.take_committed(from, &self.arena));
            let Some(mut extent) = taken else { break };
            from = extent.end_page();
            self.arena.decommit(&mut extent);
            self.with(|ledger| ledger.abandon(extent));
        }
        self.arena.trim_views();
        self.given_back.done.fetch_add(1, Ordering::SeqCst);
    }
}
