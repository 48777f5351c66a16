//! What comes to the tiers behind an engine and goes from them, under the engine's own names, until somebody asks.
//!
//! The cache tells of blocks by its keys, which say nothing of the engine's names: so a name is learned before its block can come.
//! What another process left on the disk has no name until it is brought up, and goes untold as it came untold.
//!
//! Invariant: a name is kept while its block is in any tier. Of those that never came, the oldest are forgotten.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvkeep::{BlockHash, Event, EventSink};

use crate::engine_jobs::Key;

/// Names whose blocks have not come, at most.
const MAX_EXPECTED: usize = 1 << 16;
/// Blocks of news, at most: nobody has asked in a long time.
const MAX_NEWS: usize = 1 << 18;

/// One kind of news of one tier.
#[derive(Debug)]
pub(crate) struct Item {
    pub(crate) tier: Arc<str>,
    pub(crate) is_removed: bool,
    pub(crate) keys: Vec<Key>,
}

/// The listener.
#[derive(Debug, Default)]
pub(crate) struct News(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    names: HashMap<BlockHash, Name>,
    /// In the order in which they were learned; some have come since.
    expected: VecDeque<BlockHash>,
    items: Vec<Item>,
    blocks: usize,
}

#[derive(Debug)]
struct Name {
    key: Key,
    /// Where it was told to be.
    tiers: Vec<Arc<str>>,
}

impl News {
    /// These may come.
    pub(crate) fn expect(&self, names: impl Iterator<Item = (BlockHash, Key)>) {
        let mut state = self.state();
        for (hash, key) in names {
            let State { names, expected, .. } = &mut *state;
            names.entry(hash).or_insert_with(|| {
                expected.push_back(hash);
                Name { key, tiers: Vec::new() }
            });
        }
        while state.expected.len() > MAX_EXPECTED {
            let Some(oldest) = state.expected.pop_front() else { break };
            if state.names.get(&oldest).is_some_and(|name| name.tiers.is_empty()) {
                state.names.remove(&oldest);
            }
        }
    }

    /// What happened since this was last asked, in order.
    pub(crate) fn take(&self) -> Vec<Item> {
        let mut state = self.state();
        state.blocks = 0;
        std::mem::take(&mut state.items)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl EventSink for News {
    fn publish(&self, events: Vec<Event>) {
        let mut state = self.state();
        for event in events {
            match event {
                Event::Stored { tier, blocks, .. } => state.tell(&tier, false, &blocks),
                Event::Removed { tier, blocks, .. } => state.tell(&tier, true, &blocks),
                // Nobody here removes a whole namespace.
                _ => {}
            }
        }
    }
}

impl State {
    fn tell(&mut self, tier: &Arc<str>, is_removed: bool, blocks: &[BlockHash]) {
        let moved = |hash| if is_removed { self.went(hash, tier) } else { self.came(hash, tier) };
        let keys: Vec<Key> = blocks.iter().filter_map(moved).collect();
        if keys.is_empty() || self.blocks >= MAX_NEWS {
            return;
        }
        self.blocks += keys.len();
        match self.items.last_mut() {
            Some(last) if last.tier == *tier && last.is_removed == is_removed => last.keys.extend(keys),
            _ => self.items.push(Item { tier: Arc::clone(tier), is_removed, keys }),
        }
    }

    /// The name of a block that came to a tier, if it is known.
    fn came(&mut self, hash: &BlockHash, tier: &Arc<str>) -> Option<Key> {
        let name = self.names.get_mut(hash)?;
        if !name.tiers.contains(tier) {
            name.tiers.push(Arc::clone(tier));
        }
        Some(name.key.clone())
    }

    /// The name of a block that went from a tier, if it was told to be there.
    fn went(&mut self, hash: &BlockHash, tier: &Arc<str>) -> Option<Key> {
        let name = self.names.get_mut(hash)?;
        let place = name.tiers.iter().position(|told| told == tier)?;
        name.tiers.swap_remove(place);
        if name.tiers.is_empty() { self.names.remove(hash).map(|name| name.key) } else { Some(name.key.clone()) }
    }
}
