//! Events that are being put together: blocks behind each other become one event.

use std::sync::Arc;

use super::Event;
use crate::key::{BlockHash, NamespaceId, TokenId};

/// Events of each tier: what came, and what went.
#[derive(Debug)]
pub(super) struct Batch {
    tiers: Vec<OfTier>,
}

/// A block, as the listener is told of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Told<'a> {
    pub(super) namespace: NamespaceId,
    pub(super) block: BlockHash,
    pub(super) block_tokens: Option<usize>,
    pub(super) parent: Option<BlockHash>,
    pub(super) tokens: &'a [TokenId],
}

#[derive(Debug, Default)]
struct OfTier {
    stored: Vec<Event>,
    removed: Vec<Event>,
}

impl Batch {
    pub(super) fn new(tiers: usize) -> Self {
        Self { tiers: (0..tiers).map(|_| OfTier::default()).collect() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.tiers.iter().all(|of| of.stored.is_empty() && of.removed.is_empty())
    }

    /// What came before what went: what only changed its tier is somewhere all the time.
    pub(super) fn into_events(self) -> Vec<Event> {
        let (stored, removed): (Vec<_>, Vec<_>) = self.tiers.into_iter().map(|of| (of.stored, of.removed)).unzip();
        stored.into_iter().chain(removed).flatten().collect()
    }

    /// It is in this tier now.
    pub(super) fn stored(&mut self, number: usize, tier: &Arc<str>, told: &Told<'_>) {
        let Some(OfTier { stored, .. }) = self.tiers.get_mut(number) else { return };
        if let Some(Event::Stored { namespace, blocks, tokens, .. }) = stored.last_mut()
            && *namespace == told.namespace
            && told.parent.is_some()
            && blocks.last().copied() == told.parent
            && tokens.is_empty() == told.tokens.is_empty()
        {
            blocks.push(told.block);
            tokens.extend_from_slice(told.tokens);
            return;
        }
        stored.push(Event::Stored {
            tier: Arc::clone(tier),
            namespace: told.namespace,
            blocks: vec![told.block],
            parent: told.parent,
            block_tokens: told.block_tokens,
            tokens: told.tokens.to_vec(),
        });
    }

    /// It is in this tier no more.
    pub(super) fn removed(&mut self, number: usize, tier: &Arc<str>, told: &Told<'_>) {
        let Some(OfTier { removed, .. }) = self.tiers.get_mut(number) else { return };
        match removed.last_mut() {
            Some(Event::Removed { namespace, blocks, .. }) if *namespace == told.namespace => blocks.push(told.block),
            _ => removed.push(Event::Removed {
                tier: Arc::clone(tier),
                namespace: told.namespace,
                blocks: vec![told.block],
            }),
        }
    }
}
