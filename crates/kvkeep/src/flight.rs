//! Single-flight: of the threads that miss the same block, one computes and the others
//! wait for it.
//!
//! A flight is named by the first missing block, so requests that share a prefix and
//! differ later wait for each other exactly as long as they miss the same thing. When
//! a flight ends, well or not, its waiters look again: whoever still misses the block
//! leads the next flight with its own closure. Handing the leader's error to all was the
//! alternative; it fails N requests for one caller's bad luck.

use std::collections::HashMap;

use crate::key::BlockHash;
use crate::process::Process;
use crate::sync::thread::{self, ThreadId};
use crate::sync::{Condvar, Mutex};

/// The flights under way.
#[derive(Debug, Default)]
pub(crate) struct Flights {
    leaders: Mutex<HashMap<BlockHash, ThreadId>>,
    landed: Condvar,
}

/// The right to compute; ends the flight when dropped, also by a panic.
#[derive(Debug)]
pub(crate) struct Lead<'a> {
    flights: &'a Flights,
    /// None where this thread leads the same flight already, further up its stack.
    block: Option<BlockHash>,
    process: Process,
}

impl Flights {
    /// Takes the lead for this block, or waits until whoever has it is done and returns `None`.
    pub(crate) fn lead_or_wait(&self, block: BlockHash) -> Option<Lead<'_>> {
        let me = thread::current().id();
        let mut leaders = self.leaders.lock();
        match leaders.get(&block) {
            None => {
                leaders.insert(block, me);
                Some(Lead { flights: self, block: Some(block), process: Process::current() })
            }
            // A closure that asks for what it is computing must not wait for itself.
            Some(leader) if *leader == me => Some(Lead { flights: self, block: None, process: Process::current() }),
            Some(_) => {
                while leaders.contains_key(&block) {
                    leaders = self.landed.wait(leaders);
                }
                None
            }
        }
    }
}

impl Drop for Lead<'_> {
    fn drop(&mut self) {
        // The others that wait are threads of the process that made it: in a child there are none.
        if let Some(block) = self.block
            && self.process.is_current()
        {
            self.flights.leaders.lock().remove(&block);
            self.flights.landed.notify_all();
        }
    }
}
