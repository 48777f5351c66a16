//! What is missing of a prompt is computed once: of the threads that miss the same block at the same time one computes.
//!
//! Invariant: whoever waits waits for a block that it misses. Threads that all compute what they miss were the alternative:
//! then a burst of equal prompts costs as many prefills.

use super::{KvCache, Match, StoreReport, request};
use crate::chain::Chain;
use crate::config::StoreOptions;
use crate::error::{Error, Result};
use crate::flight::Patience;
use crate::key::{Namespace, TokenId};
use crate::layout::LayerView;
use crate::store::Request;

/// The part of a prompt that [`KvCache::get_or_prefill`] asks its closure to compute.
#[derive(Debug)]
pub struct Missing<'a> {
    cache: &'a KvCache,
    chain: &'a Chain,
    tokens: &'a [TokenId],
    cached: Match,
}

impl KvCache {
    /// The whole prompt's blocks: those in the cache as they are, the rest computed by
    /// `prefill`, which stores them through [`Missing::store`]. Of the threads that miss the
    /// same block at the same time one computes; the others wait and get its blocks. If it
    /// fails or panics, another one computes for itself. If what it computed could not be stored, all others compute
    /// at once. A thread that has waited once waits again only for one that computes every block it misses.
    ///
    /// Counts as one request. `prefill` is not called if all full blocks are there.
    ///
    /// # Errors
    /// [`Error::EmptyTokens`], and whatever `prefill` returns.
    pub fn get_or_prefill<E: From<Error>>(
        &self,
        namespace: &Namespace,
        tokens: &[TokenId],
        prefill: impl FnOnce(&Missing<'_>) -> Result<(), E>,
    ) -> Result<Match, E> {
        self.store.here()?;
        self.prefill_missing(&self.chain_to_store(namespace, tokens)?, tokens, prefill)
    }

    /// As [`KvCache::get_or_prefill`], of a prompt that is hashed already.
    ///
    /// # Errors
    /// Whatever `prefill` returns.
    pub fn get_or_prefill_chain<E: From<Error>>(
        &self,
        chain: &Chain,
        prefill: impl FnOnce(&Missing<'_>) -> Result<(), E>,
    ) -> Result<Match, E> {
        self.store.here()?;
        self.prefill_missing(chain, &[], prefill)
    }

    fn prefill_missing<E>(
        &self,
        chain: &Chain,
        tokens: &[TokenId],
        prefill: impl FnOnce(&Missing<'_>) -> Result<(), E>,
    ) -> Result<Match, E> {
        let chain = &self.store.own(chain);
        self.store.record(chain.tokens(), chain.keys());
        let request = request(chain.namespace().layout(), chain.tokens());
        // Of blocks that an earlier process left on the disk, nobody else can say what is in them.
        if self.store.wants_tokens() {
            self.store.describe(chain.namespace());
            self.store.expect(chain, 0);
        }
        let mut patience = Patience::default();
        loop {
            let cached = self.pinned(chain.namespace(), chain.keys(), Request::Uncounted);
            let missing = chain.keys().get(cached.blocks()..).unwrap_or_default();
            if missing.is_empty() {
                self.store.count(&cached.pin, request);
                return Ok(cached);
            }
            let lead = match self.flights.lead_or_wait(missing, patience) {
                Ok(lead) => lead,
                Err(waited) => {
                    patience = waited;
                    continue;
                }
            };
            // Another flight may have landed between the look and the lead.
            let cached = self.extended(cached, chain);
            self.store.count(&cached.pin, request);
            if cached.blocks() == chain.blocks() {
                return Ok(cached);
            }
            let missing = Missing { cache: self, chain, tokens, cached };
            prefill(&missing)?;
            let found = self.extended(missing.cached, chain);
            if found.blocks() < chain.blocks() {
                lead.was_fruitless();
            }
            return Ok(found);
        }
    }

    /// Looks again while the earlier match still keeps what it has.
    fn extended(&self, cached: Match, chain: &Chain) -> Match {
        let again = self.pinned(chain.namespace(), chain.keys(), Request::Uncounted);
        if again.blocks() < cached.blocks() {
            return cached;
        }
        // What the first look had loaded is in RAM for the second.
        let loaded = if again.loaded.is_empty() { cached.loaded.clone() } else { again.loaded.clone() };
        Match { loaded, ..again }
    }
}

impl Missing<'_> {
    /// What is in the cache of this prompt: load it before computing the rest.
    #[must_use]
    pub fn cached(&self) -> &Match {
        &self.cached
    }

    /// The first token to compute.
    #[must_use]
    pub fn first_token(&self) -> usize {
        self.cached.cached_tokens()
    }

    /// The tokens to compute, up to the end of the prompt. None where the caller gave a chain alone.
    #[must_use]
    pub fn tokens(&self) -> &[TokenId] {
        self.tokens.get(self.first_token()..).unwrap_or_default()
    }

    /// The prompt.
    #[must_use]
    pub fn chain(&self) -> &Chain {
        self.chain
    }

    /// Stores what was computed: `layers` begin at [`Missing::first_token`].
    ///
    /// # Errors
    /// As [`KvCache::store`].
    pub fn store(&self, layers: &[LayerView<'_>], options: &StoreOptions) -> Result<StoreReport> {
        self.cache.store_chain(self.chain, self.first_token(), layers, options)
    }
}
