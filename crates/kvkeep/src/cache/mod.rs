//! The front door by tokens: blocks of a prompt under a chain of hashes.
//!
//! Equal namespace and equal tokens up to a block's end mean equal KV, so a prompt's
//! reusable part is the longest run of resident blocks from its first block on.
//!
//! - `found` is what a lookup hands out: pinned blocks, to be borrowed or copied.
//! - `look` says what a lookup would find.
//! - `prefill` has the rest of a prompt computed, once for all who miss it.
//! - `tensors` copies between blocks and an engine's tensors.
//! - `begun` has stores that a device writes, and what else an engine needs that waits for nothing.

mod begun;
mod found;
mod look;
mod prefill;
mod tensors;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::chain::Chain;
use crate::config::{CacheConfig, StoreOptions};
use crate::error::{Error, Rejection, Result};
use crate::eviction::Place;
use crate::flight::Flights;
use crate::key::{Namespace, NamespaceId, ObjectKey, TokenId};
use crate::layout::{KvLayout, LayerView, LayerViewMut, Side};
use crate::stats::Stats;
use crate::store::{OnPresent, Pending, Pin, Removed, Request, Reserved, Sealing, Store, Terms, Wanted};

pub use begun::Begun;
pub use found::Match;
pub use look::{Look, Residency};
pub use prefill::Missing;
use tensors::{Source, check_targets, copy_block};

/// KV of prompts, by tokens. Cheap to clone: clones share everything.
///
/// It belongs to the process that made it: in a forked child its calls end with [`Error::Forked`], or find and
/// do nothing where they return no error; what was borrowed from it before must not be read there.
///
/// ```
/// use kvkeep::{CacheConfig, DType, KvCache, KvLayout, LayerView, Namespace, TensorView};
///
/// let layout = KvLayout::new(2, 1, 4, DType::F32)?.with_block_tokens(2)?;
/// let namespace = Namespace::new("my-model", layout);
/// let cache = KvCache::new(CacheConfig::new(1 << 20))?;
///
/// let tokens = [11, 12, 13, 14, 15];
/// let kv = [0.5f32; 5 * 4]; // [tokens, kv_heads, head_dim]
/// let view = TensorView::of(&kv, &[5, 1, 4])?;
/// cache.store(&namespace, &tokens, &[LayerView { k: view, v: view }; 2])?;
///
/// let found = cache.lookup(&namespace, &[11, 12, 13, 14, 99])?;
/// assert_eq!(found.cached_tokens(), 4); // two full blocks
/// assert_eq!(found.layer(1, 0)?.k.elements::<f32>()?, &[0.5; 8]);
/// # Ok::<(), kvkeep::Error>(())
/// ```
#[derive(Clone)]
pub struct KvCache {
    store: Store,
    flights: Arc<Flights>,
}

/// What became of the blocks of one store.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoreReport {
    /// Blocks stored now.
    pub stored_blocks: usize,
    /// Blocks that were there already.
    pub present_blocks: usize,
    /// Blocks that were not admitted: the tail of the prompt.
    pub rejected_blocks: usize,
    /// Why not.
    pub rejection: Option<Rejection>,
}

impl KvCache {
    /// A cache with a store of its own.
    ///
    /// # Errors
    /// As [`Store::new`].
    pub fn new(config: CacheConfig) -> Result<Self> {
        Store::new(config).map(Self::over)
    }

    /// A cache over a store that others may use too.
    #[must_use]
    pub fn over(store: Store) -> Self {
        Self { store, flights: Arc::default() }
    }

    /// The store behind this door.
    #[must_use]
    pub fn store_handle(&self) -> &Store {
        &self.store
    }

    /// The longest run of resident blocks from the first token on, pinned. Counts as a
    /// request. A prompt's last, partial block is never in the cache.
    ///
    /// # Errors
    /// [`Error::EmptyTokens`].
    pub fn lookup(&self, namespace: &Namespace, tokens: &[TokenId]) -> Result<Match> {
        self.store.here()?;
        if !self.store.is_exact(namespace) {
            return Ok(self.lookup_chain(&Chain::of(namespace, tokens)?));
        }
        // A hit needs no chain: that would copy the namespace.
        Ok(self.found(namespace, &namespace.keys(tokens)?, tokens.len()))
    }

    /// As [`KvCache::lookup`], of a prompt that is hashed already.
    #[must_use]
    pub fn lookup_chain(&self, chain: &Chain) -> Match {
        let chain = &self.store.own(chain);
        self.found(chain.namespace(), chain.keys(), chain.tokens())
    }

    /// Begins to bring a prompt's blocks from the disk into RAM, as far as that is worth it, and
    /// does not wait: for a request that is known to come. Says of how many tokens.
    ///
    /// # Errors
    /// [`Error::EmptyTokens`].
    pub fn prefetch(&self, namespace: &Namespace, tokens: &[TokenId]) -> Result<usize> {
        self.store.here()?;
        Ok(self.prefetch_chain(&Chain::of(namespace, tokens)?))
    }

    /// As [`KvCache::prefetch`], of a prompt that is hashed already.
    pub fn prefetch_chain(&self, chain: &Chain) -> usize {
        let chain = &self.store.own(chain);
        self.store.prefetch(chain.namespace().id(), chain.keys()) * chain.namespace().layout().block_tokens()
    }

    /// Copies K and V of these layers of the longest run of blocks into an engine's tensors, one
    /// for each layer. For loading layer by layer. What is in RAM comes from there; what is behind
    /// it comes straight from the disk. Of the disk only these layers are read, and nothing of it is kept
    /// in RAM. Says how many tokens were written, at the tensors' beginning.
    ///
    /// # Errors
    /// [`Error::EmptyTokens`], and as [`Match::load`] for tensors with room for all full blocks.
    pub fn load_layers(
        &self,
        namespace: &Namespace,
        tokens: &[TokenId],
        layers: Range<usize>,
        into: &mut [LayerViewMut<'_>],
    ) -> Result<usize> {
        self.load_layers_chain(&Chain::of(namespace, tokens)?, layers, into)
    }

    /// As [`KvCache::load_layers`], of a prompt that is hashed already.
    ///
    /// # Errors
    /// As [`Match::load`] for tensors with room for all full blocks.
    pub fn load_layers_chain(
        &self,
        chain: &Chain,
        layers: Range<usize>,
        into: &mut [LayerViewMut<'_>],
    ) -> Result<usize> {
        let chain = &self.store.own(chain);
        let layout = chain.namespace().layout();
        let room = check_targets(layout, &layers, into, chain.blocks() * layout.block_tokens())?;
        let first = layout.range(layers.start, Side::K).start;
        let part = first..layout.range(layers.end - 1, Side::V).end;
        self.store.here()?;
        self.store.record(chain.tokens(), chain.keys());
        let blocks = self.store.read_parts(
            chain.namespace().id(),
            chain.keys(),
            &part,
            request(chain.namespace().layout(), chain.tokens()),
            |block, bytes| {
                for ((layer, target), room) in layers.clone().zip(&mut *into).zip(&room) {
                    for (side, tensor, room) in [(Side::K, &mut target.k, room.0), (Side::V, &mut target.v, room.1)] {
                        let range = layout.range(layer, side);
                        let payload = bytes.get(range.start - first..range.end - first).unwrap_or_default();
                        copy_block(layout, (layer, side), block, payload, tensor, room);
                    }
                }
            },
        );
        Ok(blocks * layout.block_tokens())
    }

    /// Makes everything stored so far durable.
    ///
    /// # Errors
    /// As [`Store::flush`].
    pub fn flush(&self) -> Result<()> {
        self.store.flush()
    }

    /// Flushes a disk tier and ends the use of this clone: see [`Store::close`].
    ///
    /// # Errors
    /// As [`Store::close`].
    pub fn close(self) -> Result<()> {
        self.store.close()
    }

    /// As [`KvCache::lookup`], but not a request: for keeping a prefix, such as a system
    /// prompt, while the returned value lives.
    ///
    /// # Errors
    /// [`Error::EmptyTokens`].
    pub fn pin(&self, namespace: &Namespace, tokens: &[TokenId]) -> Result<Match> {
        self.store.here()?;
        Ok(self.pin_chain(&Chain::of(namespace, tokens)?))
    }

    /// As [`KvCache::pin`], of a prompt that is hashed already.
    #[must_use]
    pub fn pin_chain(&self, chain: &Chain) -> Match {
        let chain = &self.store.own(chain);
        self.pinned(chain.namespace(), chain.keys(), Request::Uncounted)
    }

    /// Stores the full blocks of `tokens`; those already there are skipped. `layers` holds
    /// K and V of every layer, of at least as many tokens as are given.
    ///
    /// # Errors
    /// [`Error::EmptyTokens`], or [`Error::LayerOutOfRange`], [`Error::DTypeMismatch`],
    /// [`Error::ShapeMismatch`] if the tensors do not fit the namespace's layout; then nothing is stored.
    pub fn store(&self, namespace: &Namespace, tokens: &[TokenId], layers: &[LayerView<'_>]) -> Result<StoreReport> {
        self.store_from(namespace, tokens, 0, layers, &StoreOptions::default())
    }

    /// As [`KvCache::store`] where `layers` begin at token `first_token`: what comes before
    /// must be in the cache already, or the report says [`Rejection::PrefixGone`].
    ///
    /// # Errors
    /// As [`KvCache::store`], and [`Error::Stopped`].
    pub fn store_from(
        &self,
        namespace: &Namespace,
        tokens: &[TokenId],
        first_token: usize,
        layers: &[LayerView<'_>],
        options: &StoreOptions,
    ) -> Result<StoreReport> {
        self.store_chain(&self.chain_to_store(namespace, tokens)?, first_token, layers, options)
    }

    /// As [`KvCache::store_from`], of a prompt that is hashed already.
    ///
    /// # Errors
    /// [`Error::LayerOutOfRange`], [`Error::DTypeMismatch`], [`Error::ShapeMismatch`] if the tensors do not fit the
    /// namespace's layout; then nothing is stored.
    pub fn store_chain(
        &self,
        chain: &Chain,
        first_token: usize,
        layers: &[LayerView<'_>],
        options: &StoreOptions,
    ) -> Result<StoreReport> {
        let layout = chain.namespace().layout();
        self.store.here()?;
        let source = Source::checked(layout, layers, first_token, chain.blocks() * layout.block_tokens())?;
        let first_block = first_token.div_ceil(layout.block_tokens());
        self.store_each(chain, first_block, options, |block, payload| {
            source.write_block(block * layout.block_tokens(), payload);
        })
    }

    /// Stores whole blocks of a chain, from block `first_block` on, as bytes in the order of the namespace's layout: for
    /// engines whose blocks are opaque, or lie so already. What comes before must be in the cache, or the report says
    /// [`Rejection::PrefixGone`].
    ///
    /// # Errors
    /// [`Error::Layout`] if one has not the bytes of a block, or there are more than the chain has; then nothing is
    /// stored. [`Error::Stopped`].
    pub fn store_blocks(
        &self,
        chain: &Chain,
        first_block: usize,
        blocks: &[&[u8]],
        options: &StoreOptions,
    ) -> Result<StoreReport> {
        self.store.here()?;
        let (all, block_bytes) = (chain.blocks(), chain.namespace().layout().block_bytes());
        if first_block + blocks.len() > all {
            let text = format!("{} blocks from block {first_block} on: the chain has {all}", blocks.len());
            return Err(Error::Layout(text));
        }
        if let Some(wrong) = blocks.iter().find(|block| block.len() != block_bytes) {
            let text = format!("a block of {} bytes: blocks of this namespace have {block_bytes}", wrong.len());
            return Err(Error::Layout(text));
        }
        let mut given = chain.clone();
        given.truncate(first_block + blocks.len());
        self.store_each(&given, first_block, options, |block, payload| {
            let from = block.checked_sub(first_block).and_then(|at| blocks.get(at));
            if let (Some(from), Some(to)) = (from, payload.get_mut(..block_bytes)) {
                to.copy_from_slice(from);
            }
        })
    }

    /// Stores what is not there of a chain from block `first_block` on, where something else than the processor writes it,
    /// or writes it better at once. `write` gets the number of each block that is missing and its pages, which begin with the
    /// bytes in the order of the namespace's layout, and returns when all are written; what is behind is cleared. If it
    /// fails, nothing is stored. What comes before must be in the cache, or the report says [`Rejection::PrefixGone`].
    ///
    /// # Errors
    /// Whatever `write` returns; [`Error::Forked`].
    pub fn store_written<E: From<Error>>(
        &self,
        chain: &Chain,
        first_block: usize,
        options: &StoreOptions,
        write: impl FnOnce(Vec<(usize, &mut [u8])>) -> Result<(), E>,
    ) -> Result<StoreReport, E> {
        self.store.here()?;
        self.store_missing(chain, first_block, options, |missing| {
            write(missing.iter_mut().map(|(block, pending)| (*block, pending.bytes_mut())).collect())
        })
    }

    /// Stores what is not there of a chain. `write` gets the number of a block, and its pages.
    fn store_each(
        &self,
        chain: &Chain,
        first_block: usize,
        options: &StoreOptions,
        write: impl Fn(usize, &mut [u8]),
    ) -> Result<StoreReport> {
        let (block_bytes, mut copied) = (chain.namespace().layout().block_bytes(), options.copied());
        self.store_missing(chain, first_block, options, |missing| {
            missing.iter_mut().try_for_each(|(block, pending)| {
                write(*block, pending.bytes_mut());
                copied.add(block_bytes)
            })
        })
    }

    /// Stores what is not there of a chain, once `write` has written all of it.
    fn store_missing<E>(
        &self,
        chain: &Chain,
        first_block: usize,
        options: &StoreOptions,
        write: impl FnOnce(&mut [(usize, Pending)]) -> Result<(), E>,
    ) -> Result<StoreReport, E> {
        let chain = &self.store.own(chain);
        let (_present, mut missing, report) = self.reserve_missing(chain, first_block, options, Terms::Patient);
        write(&mut missing)?;
        Ok(self.seal_missing(chain, missing, options, report))
    }

    /// What is there of a chain, room for what is not, and what can be said of it so far. What is there has to be held until
    /// the rest is sealed: else it may go meanwhile, and is used before its tail.
    fn reserve_missing(
        &self,
        chain: &Chain,
        first_block: usize,
        options: &StoreOptions,
        terms: Terms,
    ) -> (Pin, Vec<(usize, Pending)>, StoreReport) {
        let (layout, keys) = (chain.namespace().layout(), chain.keys());
        self.store.describe(chain.namespace());
        if self.store.wants_tokens() {
            self.store.expect(chain, first_block);
        }
        let (bytes_each, priority) = (layout.block_bytes(), options.priority);
        let wanted = Wanted { bytes_each, first_given: first_block, priority, terms };
        let Reserved { present, missing, below, rejection } = self.store.reserve(chain.namespace().id(), keys, wanted);
        let report = StoreReport {
            present_blocks: present.len() + below,
            rejected_blocks: keys.len() - present.len() - below - missing.len(),
            rejection: rejection.map(|rejection| in_tokens(rejection, layout)),
            ..StoreReport::default()
        };
        (present, missing, report)
    }

    /// Makes what was written findable.
    fn seal_missing(
        &self,
        chain: &Chain,
        missing: Vec<(usize, Pending)>,
        options: &StoreOptions,
        mut report: StoreReport,
    ) -> StoreReport {
        let (layout, keys) = (chain.namespace().layout(), chain.keys());
        let found = missing.first().map_or(keys.len(), |(position, _)| *position);
        let sealing = |(position, pending): (usize, Pending)| {
            let parent = position.checked_sub(1).and_then(|before| keys.get(before)).copied();
            let place = Place::of(position, keys.len(), found);
            Some(Sealing { key: *keys.get(position)?, pending, bytes: layout.block_bytes(), spec: None, parent, place })
        };
        let objects: Vec<Sealing> = missing.into_iter().filter_map(sealing).collect();
        let reserved = objects.len();
        report.stored_blocks = self.store.seal(chain.namespace().id(), objects, options, OnPresent::Keep);
        report.present_blocks += reserved - report.stored_blocks;
        report
    }

    /// Removes the blocks of this prompt, from its first token on. Blocks of longer prompts
    /// that began with it can then no longer be found either, and age out.
    ///
    /// # Errors
    /// [`Error::EmptyTokens`].
    pub fn remove(&self, namespace: &Namespace, tokens: &[TokenId]) -> Result<Removed> {
        self.remove_from(namespace, tokens, 0)
    }

    /// As [`KvCache::remove`], of the blocks that begin at `first_token` or behind it: those before
    /// may be shared with other prompts, and stay.
    ///
    /// # Errors
    /// [`Error::EmptyTokens`].
    pub fn remove_from(&self, namespace: &Namespace, tokens: &[TokenId], first_token: usize) -> Result<Removed> {
        self.store.here()?;
        Ok(self.remove_chain(&Chain::of(namespace, tokens)?, first_token))
    }

    /// As [`KvCache::remove_from`], of a prompt that is hashed already.
    pub fn remove_chain(&self, chain: &Chain, first_token: usize) -> Removed {
        let chain = &self.store.own(chain);
        let first = first_token.div_ceil(chain.namespace().layout().block_tokens());
        self.store.remove(chain.namespace().id(), chain.keys().get(first..).unwrap_or_default()).0
    }

    /// Removes everything in a namespace; its id is enough, as for one that an earlier process left
    /// on the disk.
    pub fn clear_namespace(&self, namespace: impl Into<NamespaceId>) -> Removed {
        self.store.clear_namespace(namespace.into())
    }

    /// Removes everything in the store, also what other doors put there.
    pub fn clear(&self) -> Removed {
        self.store.clear()
    }

    /// The store's counters and sizes.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.store.stats()
    }

    fn chain_to_store(&self, namespace: &Namespace, tokens: &[TokenId]) -> Result<Chain> {
        let chain = Chain::of(namespace, tokens)?;
        Ok(if self.store.wants_tokens() { chain.with_token_ids(tokens) } else { chain })
    }

    /// A lookup of so many tokens, whose full blocks these are.
    fn found(&self, namespace: &Namespace, keys: &[ObjectKey], tokens: usize) -> Match {
        self.store.record(tokens, keys);
        self.pinned(namespace, keys, request(namespace.layout(), tokens))
    }

    fn pinned(&self, namespace: &Namespace, keys: &[ObjectKey], request: Request) -> Match {
        let (pin, loaded) = self.store.pin_run(namespace.id(), keys, request);
        Match { pin, loaded, layout: *namespace.layout() }
    }
}

/// As what a lookup of this prompt counts.
fn request(layout: &KvLayout, tokens: usize) -> Request {
    Request::Tokens { requested: tokens, block_tokens: layout.block_tokens() }
}

impl fmt::Debug for KvCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvCache").field("store", &self.store).finish_non_exhaustive()
    }
}

/// The store knows positions; callers know tokens.
fn in_tokens(rejection: Rejection, layout: &KvLayout) -> Rejection {
    match rejection {
        Rejection::PrefixGone { token: position } => Rejection::PrefixGone { token: position * layout.block_tokens() },
        other => other,
    }
}
