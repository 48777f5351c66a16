//! What a lookup would find, without one: for schedulers and routers that choose where a request goes.
//!
//! Invariant: a look changes nothing. It loads nothing, counts as no request, and leaves the order of eviction as it is.
//! A lookup that is given up was the alternative: it evicts for what nobody reads.

use std::ops::Range;
use std::time::Duration;

use super::KvCache;
use crate::chain::Chain;
use crate::error::Result;
use crate::key::{Namespace, TokenId};

/// What is there of a prompt. All numbers are whole blocks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Look {
    /// In RAM, from the first token on.
    pub ram_tokens: usize,
    /// Behind those, and worth loading: on the disk, or in RAM but behind a block that is not.
    pub load_tokens: usize,
    /// Behind those, and not worth loading: computing them again is faster.
    pub not_worth_tokens: usize,
    /// How long loading takes, as measured so far; zero before the first load.
    pub load_time: Duration,
    /// All of these by the tier that they would come from: its name, `ram` first, and its tokens. Where else they are
    /// says [`KvCache::residency`].
    pub tiers: Vec<(String, usize)>,
}

impl Look {
    /// Tokens that a lookup gives: those in RAM and those worth loading.
    #[must_use]
    pub fn worth_tokens(&self) -> usize {
        self.ram_tokens + self.load_tokens
    }
}

/// In which tiers each block of a prompt is, whether a lookup would get that far or not.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Residency {
    block_tokens: usize,
    tiers: Vec<(String, Vec<bool>)>,
}

impl Residency {
    /// The tiers' names, `ram` first.
    pub fn tiers(&self) -> impl Iterator<Item = &str> {
        self.tiers.iter().map(|(name, _)| name.as_str())
    }

    /// Of these blocks, those that a tier has, in tokens. What several tiers have counts for each of them.
    #[must_use]
    pub fn tokens_in(&self, tier: &str, blocks: Range<usize>) -> usize {
        let of_tier = self.tiers.iter().find(|(name, _)| name == tier);
        let has = of_tier.and_then(|(_, has)| has.get(blocks.start..blocks.end.min(has.len())));
        has.unwrap_or_default().iter().filter(|has| **has).count() * self.block_tokens
    }

    /// Of these blocks, those that are in any tier, in tokens.
    #[must_use]
    pub fn tokens_anywhere(&self, blocks: Range<usize>) -> usize {
        let is_somewhere = |block: &usize| self.tiers.iter().any(|(_, has)| has.get(*block) == Some(&true));
        blocks.filter(is_somewhere).count() * self.block_tokens
    }
}

impl KvCache {
    /// What [`KvCache::lookup`] would find, tier by tier, and what of it is worth loading. Loads
    /// and counts nothing.
    ///
    /// # Errors
    /// [`Error::EmptyTokens`](crate::Error::EmptyTokens).
    pub fn look(&self, namespace: &Namespace, tokens: &[TokenId]) -> Result<Look> {
        self.store.here()?;
        Ok(self.look_chain(&Chain::of(namespace, tokens)?))
    }

    /// As [`KvCache::look`], of a prompt that is hashed already.
    #[must_use]
    pub fn look_chain(&self, chain: &Chain) -> Look {
        let chain = &self.store.own(chain);
        let found = self.store.look(chain.namespace().id(), chain.keys());
        let block_tokens = chain.namespace().layout().block_tokens();
        Look {
            ram_tokens: found.ram * block_tokens,
            load_tokens: found.load * block_tokens,
            not_worth_tokens: found.not_worth * block_tokens,
            load_time: found.load_time,
            tiers: found.by_tier.into_iter().map(|(tier, blocks)| (tier, blocks * block_tokens)).collect(),
        }
    }

    /// In which tiers each block of a prompt is. Loads and counts nothing.
    ///
    /// # Errors
    /// [`Error::EmptyTokens`](crate::Error::EmptyTokens).
    pub fn residency(&self, namespace: &Namespace, tokens: &[TokenId]) -> Result<Residency> {
        self.store.here()?;
        Ok(self.residency_chain(&Chain::of(namespace, tokens)?))
    }

    /// As [`KvCache::residency`], of a prompt that is hashed already.
    #[must_use]
    pub fn residency_chain(&self, chain: &Chain) -> Residency {
        let chain = &self.store.own(chain);
        let block_tokens = chain.namespace().layout().block_tokens();
        Residency { block_tokens, tiers: self.store.residency(chain.namespace().id(), chain.keys()) }
    }
}
