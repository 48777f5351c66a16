//! Which blocks a region has, told to every client that listens, and to whoever the daemon was given.
//!
//! Invariant: who subscribes gets what is there first and then each change, in one order. A listener that does not keep up
//! is let go of, and begins anew: a queue without end would be memory for whoever is slow.

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};

use kvkeep::{BlockHash, Event, EventSink, NamespaceId};

use crate::lock;
use crate::wire::Answer;

/// Messages that may wait for one listener.
const QUEUE: usize = 1024;
/// Blocks that one message tells.
const BATCH: usize = 1024;

/// Listens to a region's store, and tells its clients.
#[derive(Debug, Default)]
pub(crate) struct Hub {
    state: Mutex<State>,
    listener: Option<Arc<dyn EventSink>>,
}

#[derive(Debug, Default)]
struct State {
    /// Each block that is anywhere, with the tiers that have it.
    blocks: HashMap<BlockHash, (NamespaceId, u8)>,
    listeners: Vec<SyncSender<Answer>>,
}

impl Hub {
    /// With a listener that is told the same.
    pub(crate) fn new(listener: Option<Arc<dyn EventSink>>) -> Self {
        Self { state: Mutex::default(), listener }
    }

    /// What is there now, and what changes from now on.
    pub(crate) fn subscribe(&self) -> (Vec<Answer>, Receiver<Answer>) {
        let (sender, receiver) = sync_channel(QUEUE);
        let mut state = lock(&self.state);
        state.listeners.push(sender);
        let there: Vec<_> = state.blocks.iter().map(|(block, (namespace, _))| (*block, *namespace)).collect();
        drop(state);
        let batch = |came: &[(BlockHash, NamespaceId)]| Answer::Changed { came: came.to_vec(), went: Vec::new() };
        (there.chunks(BATCH).map(batch).collect(), receiver)
    }

    /// Everything before this was told.
    pub(crate) fn mark(&self, number: u64) {
        lock(&self.state).tell(&Answer::Mark(number));
    }
}

impl State {
    fn tell(&mut self, answer: &Answer) {
        self.listeners.retain(|listener| listener.try_send(answer.clone()).is_ok());
    }

    /// Says what can be found now that could not before, and the other way round.
    fn apply(&mut self, event: &Event) -> Answer {
        let (mut came, mut went) = (Vec::new(), Vec::new());
        match event {
            Event::Stored { tier, namespace, blocks, .. } => {
                for block in blocks {
                    let (_, tiers) = self.blocks.entry(*block).or_insert_with(|| {
                        came.push((*block, *namespace));
                        (*namespace, 0)
                    });
                    *tiers |= bit(tier);
                }
            }
            Event::Removed { tier, blocks, .. } => {
                for block in blocks {
                    let Some((_, tiers)) = self.blocks.get_mut(block) else { continue };
                    *tiers &= !bit(tier);
                    if *tiers == 0 {
                        self.blocks.remove(block);
                        went.push(*block);
                    }
                }
            }
            Event::Cleared { namespace, .. } => {
                let is_gone = |of: &NamespaceId| namespace.is_none_or(|namespace| namespace == *of);
                went.extend(self.blocks.extract_if(|_, (of, _)| is_gone(of)).map(|(block, _)| block));
            }
            _ => {}
        }
        Answer::Changed { came, went }
    }
}

impl EventSink for Hub {
    fn publish(&self, events: Vec<Event>) {
        let mut state = lock(&self.state);
        for event in &events {
            let changed = state.apply(event);
            if !matches!(&changed, Answer::Changed { came, went } if came.is_empty() && went.is_empty()) {
                state.tell(&changed);
            }
        }
        drop(state);
        if let Some(listener) = &self.listener {
            listener.publish(events);
        }
    }

    fn wants_recovered(&self) -> bool {
        true
    }
}

fn bit(tier: &str) -> u8 {
    if tier == "ram" { 1 } else { 2 }
}
