//! Which blocks come to which tier and go from it, for whoever wants to follow: a router that sends a prompt to where
//! its KV is.
//!
//! Each place that knows what can be found says what came and went, under its own lock: the ledger for RAM (through
//! its journal), the disk's index for the disk. `beliefs` keeps what is so and what the listener was told, `batch` makes
//! events of the difference, and `announcer` tells them on a thread of its own. So a listener may take as long as it likes, ask the cache anything, and panic. Calling it in
//! place was the alternative: one that is slow then holds up a request, and one that asks for statistics waits for
//! itself.

mod announcer;
mod batch;
mod beliefs;
mod turns;

use std::fmt;
use std::sync::Arc;

use crate::key::{BlockHash, NamespaceId, ObjectKey, TokenId};

pub(crate) use announcer::Announcer;
pub use announcer::Reports;
#[cfg(feature = "disk")]
pub(crate) use turns::Short;

/// What changed since the listener was last told. The names are those of vLLM's events.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// Blocks can be found in a tier now, in the order of their chain.
    #[non_exhaustive]
    Stored {
        /// The name of the tier: `ram`, `disk`.
        tier: Arc<str>,
        /// What they belong to.
        namespace: NamespaceId,
        /// Their names.
        blocks: Vec<BlockHash>,
        /// The block before the first one. `None` for the first block of a prompt, and where nobody knows: in what an
        /// earlier process left on the disk.
        parent: Option<BlockHash>,
        /// Tokens of each block; `None` until the namespace has been seen by this process.
        block_tokens: Option<usize>,
        /// The tokens of all these blocks, one after the other, if the listener wants them
        /// ([`EventSink::wants_tokens`]) and they are known. Else none.
        tokens: Vec<TokenId>,
    },
    /// Blocks can no longer be found in a tier: evicted, removed or expired.
    #[non_exhaustive]
    Removed {
        /// The name of the tier.
        tier: Arc<str>,
        /// What they belonged to.
        namespace: NamespaceId,
        /// Their names.
        blocks: Vec<BlockHash>,
    },
    /// Of this namespace, or of any, nothing is in any tier but what is told after this.
    #[non_exhaustive]
    Cleared {
        /// The namespace; `None` for all.
        namespace: Option<NamespaceId>,
    },
}

/// A listener. One thread calls it, with one batch after the other and no lock held.
///
/// Whoever applies every event to an empty set of blocks for each tier has what is there, as of a moment ago. A
/// listener that is slow holds up nobody, and is told less: a block that came and went before its turn is not told at
/// all. One that panics is told the next batch all the same; what the batch said is not said again.
pub trait EventSink: Send + Sync + fmt::Debug {
    /// These changed, in this order.
    fn publish(&self, events: Vec<Event>);

    /// Does it want the tokens of blocks? They are kept for that as long as their blocks.
    fn wants_tokens(&self) -> bool {
        false
    }

    /// Is it told at first what lies in the tiers when the cache opens?
    fn wants_recovered(&self) -> bool {
        false
    }
}

/// One thing that happened in a tier.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Change {
    Came {
        namespace: NamespaceId,
        block: BlockHash,
        parent: Option<BlockHash>,
    },
    Went(BlockHash),
    /// A namespace, or everything, is being removed from every tier.
    Cleared(Option<NamespaceId>),
}

/// What has happened in RAM since the lock was taken.
#[derive(Debug, Default)]
pub(crate) struct Journal(Option<Vec<Change>>);

impl Journal {
    /// Begins to be kept.
    pub(crate) fn keep(&mut self) {
        self.0 = Some(Vec::new());
    }

    /// A block came, behind `parent`.
    pub(crate) fn came(&mut self, namespace: NamespaceId, key: &ObjectKey, parent: Option<&ObjectKey>) {
        if let Some(changes) = &mut self.0 {
            let parent = parent.map(ObjectKey::block_hash);
            changes.push(Change::Came { namespace, block: key.block_hash(), parent });
        }
    }

    /// A block went.
    pub(crate) fn went(&mut self, key: &ObjectKey) {
        if let Some(changes) = &mut self.0 {
            changes.push(Change::Went(key.block_hash()));
        }
    }

    /// Everything of a namespace goes, or of all.
    pub(crate) fn cleared(&mut self, namespace: Option<NamespaceId>) {
        if let Some(changes) = &mut self.0 {
            changes.push(Change::Cleared(namespace));
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.as_ref().is_none_or(Vec::is_empty)
    }

    /// What happened since this was last asked for.
    pub(crate) fn take(&mut self) -> Vec<Change> {
        self.0.as_mut().map_or_else(Vec::new, std::mem::take)
    }
}
