//! What comes to RAM and goes from it, for whoever wants to follow: a router that sends a prompt where its KV is.
//!
//! The ledger writes a journal while it is locked, and only if somebody listens. Whoever unlocks publishes it. So a
//! listener may ask the cache anything. Calling listeners in place was the alternative: one that asks for statistics
//! then waits for itself.

use std::fmt;
use std::sync::Arc;

use crate::key::{BlockHash, NamespaceId, ObjectKey};

/// One thing that happened. The names are those of vLLM's events.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// Blocks can be found now, in the order of their chain.
    Stored {
        /// The name of the tier.
        tier: Arc<str>,
        /// What they belong to.
        namespace: NamespaceId,
        /// Their names.
        blocks: Vec<BlockHash>,
        /// The block before the first one.
        parent: Option<BlockHash>,
    },
    /// Blocks can no longer be found there: evicted, removed or expired.
    Removed {
        /// The name of the tier.
        tier: Arc<str>,
        /// What they belonged to.
        namespace: NamespaceId,
        /// Their names.
        blocks: Vec<BlockHash>,
    },
    /// Nothing of this namespace, or of any, can be found in any tier.
    Cleared {
        /// The namespace; `None` for all.
        namespace: Option<NamespaceId>,
    },
}

/// Is told what happens, in order for each thread, without any lock held.
pub trait EventSink: Send + Sync + fmt::Debug {
    /// These happened, one after the other. Whoever stored or removed waits for it: be quick.
    fn publish(&self, events: Vec<Event>);
}

/// What has happened since the lock was taken.
#[derive(Debug, Default)]
pub(crate) struct Journal {
    kept: Option<Kept>,
}

#[derive(Debug)]
struct Kept {
    ram: Arc<str>,
    events: Vec<Event>,
}

impl Journal {
    /// Begins to be kept.
    pub(crate) fn keep(&mut self) {
        self.kept = Some(Kept { ram: Arc::from("ram"), events: Vec::new() });
    }

    pub(crate) fn is_kept(&self) -> bool {
        self.kept.is_some()
    }

    /// A block came, behind `parent`.
    pub(crate) fn stored(&mut self, namespace: NamespaceId, key: &ObjectKey, parent: Option<&ObjectKey>) {
        let Some(Kept { ram, events }) = &mut self.kept else { return };
        let parent = parent.map(ObjectKey::block_hash);
        match events.last_mut() {
            Some(Event::Stored { namespace: last, blocks, .. })
                if *last == namespace && blocks.last() == parent.as_ref() =>
            {
                blocks.push(key.block_hash());
            }
            _ => {
                let blocks = vec![key.block_hash()];
                events.push(Event::Stored { tier: Arc::clone(ram), namespace, blocks, parent });
            }
        }
    }

    /// A block went.
    pub(crate) fn removed(&mut self, namespace: NamespaceId, key: &ObjectKey) {
        let Some(Kept { ram, events }) = &mut self.kept else { return };
        match events.last_mut() {
            Some(Event::Removed { namespace: last, blocks, .. }) if *last == namespace => {
                blocks.push(key.block_hash());
            }
            _ => {
                let blocks = vec![key.block_hash()];
                events.push(Event::Removed { tier: Arc::clone(ram), namespace, blocks });
            }
        }
    }

    /// Everything of a namespace went, or of all.
    pub(crate) fn cleared(&mut self, namespace: Option<NamespaceId>) {
        if let Some(kept) = &mut self.kept {
            kept.events.push(Event::Cleared { namespace });
        }
    }

    /// What happened since this was last asked for.
    pub(crate) fn take(&mut self) -> Vec<Event> {
        self.kept.as_mut().map_or_else(Vec::new, |kept| std::mem::take(&mut kept.events))
    }
}
