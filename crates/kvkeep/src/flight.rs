//! Single-flight: of the threads that miss the same blocks, one computes and the others wait for it.
//!
//! A flight has all blocks that its leader computes. Who misses one of them first waits until the flight ends, and
//! looks again. It waits a second time only for a flight that computes all that it still misses: prompts that leave a
//! common prefix at different depths would otherwise wait for one another in turn, each for one more block. Nobody
//! waits again after a flight whose blocks were not stored: they would not be the next time either.
//!
//! When a flight fails, its waiters look again: whoever still misses the blocks leads the next flight with its own
//! closure. Handing the leader's error to all was the alternative; it fails N requests for one caller's bad luck.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::key::ObjectKey;
use crate::process::Process;
use crate::sync::thread::{self, ThreadId};
use crate::sync::{Condvar, Mutex};

/// The flights under way.
#[derive(Debug, Default)]
pub(crate) struct Flights {
    blocks: Mutex<HashMap<ObjectKey, Arc<Flight>>>,
    landed: Condvar,
}

#[derive(Debug)]
struct Flight {
    leader: ThreadId,
    /// [`FLYING`] until it is over.
    state: AtomicU8,
}

const FLYING: u8 = 0;
const LANDED: u8 = 1;
/// Its blocks were computed, and not all of them were stored.
const FRUITLESS: u8 = 2;

/// For what a request has waited so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Patience {
    /// Nothing.
    #[default]
    Fresh,
    /// One flight.
    Waited,
    /// One that was of no use.
    Disappointed,
}

/// The right to compute; ends the flight when dropped, also by a panic.
#[derive(Debug)]
pub(crate) struct Lead<'a> {
    flights: &'a Flights,
    flight: Arc<Flight>,
    /// Those of the blocks that nobody else was computing.
    blocks: Vec<ObjectKey>,
    process: Process,
}

impl Flights {
    /// Takes the lead for these blocks, which are all that a request misses; or waits until whoever computes the first
    /// of them is done, and says what the request has waited for then.
    pub(crate) fn lead_or_wait(&self, missing: &[ObjectKey], patience: Patience) -> Result<Lead<'_>, Patience> {
        let me = thread::current().id();
        let mut blocks = self.blocks.lock();
        let first = missing.first().and_then(|first| blocks.get(first)).cloned();
        // A closure that asks for what it is computing must not wait for itself.
        if let Some(flight) = first.filter(|flight| flight.leader != me) {
            let has_all = || missing.iter().all(|key| blocks.get(key).is_some_and(|other| Arc::ptr_eq(other, &flight)));
            let waits = match patience {
                Patience::Fresh => true,
                Patience::Waited => has_all(),
                Patience::Disappointed => false,
            };
            if waits {
                while flight.state.load(Ordering::Acquire) == FLYING {
                    blocks = self.landed.wait(blocks);
                }
                let is_fruitless = flight.state.load(Ordering::Acquire) == FRUITLESS;
                return Err(if is_fruitless { Patience::Disappointed } else { Patience::Waited });
            }
        }
        let flight = Arc::new(Flight { leader: me, state: AtomicU8::new(FLYING) });
        let mut mine = Vec::new();
        for key in missing {
            if let Entry::Vacant(free) = blocks.entry(*key) {
                free.insert(Arc::clone(&flight));
                mine.push(*key);
            }
        }
        Ok(Lead { flights: self, flight, blocks: mine, process: Process::current() })
    }
}

impl Lead<'_> {
    /// The blocks were computed, and are not all in the cache.
    pub(crate) fn was_fruitless(&self) {
        self.flight.state.store(FRUITLESS, Ordering::Release);
    }
}

impl Drop for Lead<'_> {
    fn drop(&mut self) {
        // The others that wait are threads of the process that made it: in a child there are none.
        if !self.process.is_current() {
            return;
        }
        {
            let mut blocks = self.flights.blocks.lock();
            // Already said, if it was fruitless.
            let _ = self.flight.state.compare_exchange(FLYING, LANDED, Ordering::AcqRel, Ordering::Acquire);
            self.blocks.iter().for_each(|key| _ = blocks.remove(key));
        }
        self.flights.landed.notify_all();
    }
}
