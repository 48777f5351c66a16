//! The front door by prefix, with K and V through a codec in RAM, too: more prefixes in the same memory, and each hit
//! decoded.
//!
//! - [`Quantizer`]: tensors to bytes and back, and how far they are from what they were.
//! - [`QuantizedKvCache`]: [`SimpleKvCache`]'s calls, of such bytes.
//!
//! Invariant: what is kept here has a name of its own, the codec's among it. So neither another codec nor a
//! [`SimpleKvCache`] over the same store finds it. An option of `SimpleKvCache` was the alternative: it hands out what
//! it has without a copy, and this cannot.

mod quantizer;

use std::borrow::Cow;
use std::fmt::Write as _;

use crate::config::{CacheConfig, StoreOptions};
use crate::error::{Error, Result};
use crate::key::TokenId;
use crate::layout::Side;
use crate::named::{CachedLayers, DEFAULT_MAX_SIZE_GIB, DEFAULT_TTL, Evicted, LayerKv, Outcome, SimpleKvCache};
use crate::stats::Stats;
use crate::store::{Removed, Store};
use crate::tensor::TensorView;

pub use quantizer::{DEFAULT_EXACT_TOKENS, OwnedTensor, QuantizationLoss, Quantizer, SideLoss};

/// The codec of a [`QuantizedKvCache`] unless said otherwise.
pub const DEFAULT_QUANTIZER: &str = "int4";

/// KV by prefix and layer, in fewer bytes. Cheap to clone: clones share everything.
///
/// ```
/// use kvkeep::{QuantizedKvCache, TensorView};
///
/// let cache = QuantizedKvCache::with_max_size_gib(0.1, "int8")?;
/// let k: Vec<f32> = (0..2 * 64 * 16).map(|at| (at as f32).sin()).collect();
/// let view = TensorView::of(&k, &[1, 2, 64, 16])?; // [batch, heads, tokens, dim]
/// cache.cache_kv("You are helpful.", 0, view, view)?;
/// cache.cache_kv(&[11, 12, 13], 0, view, view)?;
///
/// let (found, _) = cache.get_cached_kv("You are helpful.", 0)?.expect("just stored");
/// let error = found.view().elements::<f32>()?.iter().zip(&k).map(|(one, other)| (one - other).abs());
/// assert!(error.fold(0.0, f32::max) < 0.01);
/// # Ok::<(), kvkeep::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct QuantizedKvCache {
    cache: SimpleKvCache,
    quantizer: Quantizer,
}

/// What KV belongs to: a text, or tokens. Neither stands for the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prefix<'a> {
    /// All that the KV depends on, as text.
    Text(&'a str),
    /// Or as tokens.
    Tokens(&'a [TokenId]),
}

impl<'a> From<&'a str> for Prefix<'a> {
    fn from(text: &'a str) -> Self {
        Self::Text(text)
    }
}

impl<'a> From<&'a String> for Prefix<'a> {
    fn from(text: &'a String) -> Self {
        Self::Text(text)
    }
}

impl<'a> From<&'a [TokenId]> for Prefix<'a> {
    fn from(tokens: &'a [TokenId]) -> Self {
        Self::Tokens(tokens)
    }
}

impl<'a> From<&'a Vec<TokenId>> for Prefix<'a> {
    fn from(tokens: &'a Vec<TokenId>) -> Self {
        Self::Tokens(tokens)
    }
}

impl<'a, const N: usize> From<&'a [TokenId; N]> for Prefix<'a> {
    fn from(tokens: &'a [TokenId; N]) -> Self {
        Self::Tokens(tokens)
    }
}

impl Prefix<'_> {
    /// As a text that no other prefix has.
    ///
    /// # Errors
    /// [`Error::EmptyPrefix`], [`Error::EmptyTokens`].
    pub fn text(&self) -> Result<Cow<'_, str>> {
        match self {
            Self::Text("") => Err(Error::EmptyPrefix),
            Self::Text(text) if text.starts_with('\0') => Ok(Cow::Owned(format!("\0{text}"))),
            Self::Text(text) => Ok(Cow::Borrowed(text)),
            Self::Tokens([]) => Err(Error::EmptyTokens),
            Self::Tokens(tokens) => {
                let mut text = "\0tokens".to_owned();
                // Writing to a string does not fail.
                tokens.iter().for_each(|token| _ = write!(text, " {token}"));
                Ok(Cow::Owned(text))
            }
        }
    }
}

impl QuantizedKvCache {
    /// A cache of [`DEFAULT_MAX_SIZE_GIB`] GiB by [`DEFAULT_QUANTIZER`], whose entries live for [`DEFAULT_TTL`].
    ///
    /// # Errors
    /// As [`Store::new`].
    pub fn new() -> Result<Self> {
        Self::with_max_size_gib(DEFAULT_MAX_SIZE_GIB, DEFAULT_QUANTIZER)
    }

    /// A cache of `max_size_gib` GiB of what this codec makes, whose entries live for [`DEFAULT_TTL`].
    ///
    /// # Errors
    /// [`Error::Config`] if the size is not a positive, finite number, or there is no such codec; else as [`Store::new`].
    pub fn with_max_size_gib(max_size_gib: f64, codec: &str) -> Result<Self> {
        let config = CacheConfig::from_gib(max_size_gib)?.ttl(Some(DEFAULT_TTL));
        Self::open(config, Quantizer::named(codec)?)
    }

    /// A cache with a store of its own.
    ///
    /// # Errors
    /// As [`Store::new`].
    pub fn open(config: CacheConfig, quantizer: Quantizer) -> Result<Self> {
        Ok(Self::over(Store::new(config)?, "default", quantizer))
    }

    /// A cache over a store that others may use too. Caches of different names or codecs see nothing of each other.
    #[must_use]
    pub fn over(store: Store, name: &str, quantizer: Quantizer) -> Self {
        Self { cache: SimpleKvCache::over(store, &quantizer.cache_name(name)), quantizer }
    }

    /// What makes its bytes.
    #[must_use]
    pub fn quantizer(&self) -> &Quantizer {
        &self.quantizer
    }

    /// The store behind this door.
    #[must_use]
    pub fn store_handle(&self) -> &Store {
        self.cache.store_handle()
    }

    /// Stores K and V of one layer, in place of what was there.
    ///
    /// # Errors
    /// As [`SimpleKvCache::cache_kv`], and [`Error::EmptyTokens`].
    pub fn cache_kv<'p>(
        &self,
        prefix: impl Into<Prefix<'p>>,
        layer: usize,
        k: TensorView<'_>,
        v: TensorView<'_>,
    ) -> Result<Outcome> {
        self.cache_all_layers_with(prefix, &[LayerKv { layer, k, v }], &StoreOptions::default())
    }

    /// Stores K and V of several layers at once: all or nothing.
    ///
    /// # Errors
    /// As [`SimpleKvCache::cache_all_layers`], and [`Error::EmptyTokens`].
    pub fn cache_all_layers<'p>(&self, prefix: impl Into<Prefix<'p>>, layers: &[LayerKv<'_>]) -> Result<Outcome> {
        self.cache_all_layers_with(prefix, layers, &StoreOptions::default())
    }

    /// [`QuantizedKvCache::cache_all_layers`] with a TTL or a reported compute time (of all layers together) of its own.
    ///
    /// # Errors
    /// As [`QuantizedKvCache::cache_all_layers`], and [`Error::Stopped`].
    pub fn cache_all_layers_with<'p>(
        &self,
        prefix: impl Into<Prefix<'p>>,
        layers: &[LayerKv<'_>],
        options: &StoreOptions,
    ) -> Result<Outcome> {
        for (name, layer, tensor) in layers.iter().flat_map(|of| [("k", of.layer, of.k), ("v", of.layer, of.v)]) {
            if tensor.shape().dims().contains(&0) {
                return Err(Error::EmptyTensor(format!("{name} of layer {layer}")));
            }
        }
        let encode = |side, tensor: TensorView<'_>| self.quantizer.encode(side, tensor, options.tag);
        let kept: Vec<(usize, Vec<u8>, Vec<u8>)> =
            layers.iter().map(|of| (of.layer, encode(Side::K, of.k), encode(Side::V, of.v))).collect();
        let layers = kept.iter().map(|(layer, k, v)| {
            Ok(LayerKv { layer: *layer, k: TensorView::of(k, &[k.len()])?, v: TensorView::of(v, &[v.len()])? })
        });
        let prefix = prefix.into();
        self.cache.cache_all_layers_with(&prefix.text()?, &layers.collect::<Result<Vec<_>>>()?, options)
    }

    /// K and V of one layer within the codec's error, or `None`. Counts as a request.
    ///
    /// # Errors
    /// As [`SimpleKvCache::get_cached_kv`], and [`Error::EmptyTokens`].
    pub fn get_cached_kv<'p>(
        &self,
        prefix: impl Into<Prefix<'p>>,
        layer: usize,
    ) -> Result<Option<(OwnedTensor, OwnedTensor)>> {
        let prefix = prefix.into();
        let found = self.cache.get_cached_kv(&prefix.text()?, layer)?;
        Ok(found.and_then(|found| self.decoded(&found.into_layers())).and_then(|layers| layers.into_iter().next()))
    }

    /// K and V of the layers 0 to `num_layers`, or `None` if any is missing. Counts as one request.
    ///
    /// # Errors
    /// As [`SimpleKvCache::get_all_layers`], and [`Error::EmptyTokens`].
    pub fn get_all_layers<'p>(
        &self,
        prefix: impl Into<Prefix<'p>>,
        num_layers: usize,
    ) -> Result<Option<Vec<(OwnedTensor, OwnedTensor)>>> {
        let prefix = prefix.into();
        let found = self.cache.get_all_layers(&prefix.text()?, num_layers)?;
        Ok(found.and_then(|found| self.decoded(&found)))
    }

    fn decoded(&self, found: &CachedLayers) -> Option<Vec<(OwnedTensor, OwnedTensor)>> {
        let pair = |(k, v): (TensorView<'_>, TensorView<'_>)| {
            Some((self.quantizer.decode(k.bytes())?, self.quantizer.decode(v.bytes())?))
        };
        found.iter().map(pair).collect()
    }

    /// The longest prefix of `text` under which at least one layer is stored, as [`SimpleKvCache::longest_prefix`].
    #[must_use]
    pub fn longest_prefix<'t>(&self, text: &'t str) -> Option<&'t str> {
        self.cache.longest_prefix(text)
    }

    /// Removes one layer of a prefix, or all of them, and says which were there.
    ///
    /// # Errors
    /// As [`SimpleKvCache::evict`], and [`Error::EmptyTokens`].
    pub fn evict<'p>(&self, prefix: impl Into<Prefix<'p>>, layer: Option<usize>) -> Result<Evicted> {
        let prefix = prefix.into();
        self.cache.evict(&prefix.text()?, layer)
    }

    /// Removes everything in this cache; other doors over the same store keep theirs.
    pub fn clear(&self) -> Removed {
        self.cache.clear()
    }

    /// Makes everything stored so far durable.
    ///
    /// # Errors
    /// As [`Store::flush`].
    pub fn flush(&self) -> Result<()> {
        self.cache.flush()
    }

    /// Flushes a disk tier and ends the use of this clone: see [`Store::close`].
    ///
    /// # Errors
    /// As [`Store::close`].
    pub fn close(self) -> Result<()> {
        self.cache.close()
    }

    /// The store's counters and sizes: bytes are those of what the codec made.
    #[must_use]
    pub fn get_stats(&self) -> Stats {
        self.cache.get_stats()
    }

    /// Prints the store's counters and sizes to standard output.
    pub fn print_stats(&self) {
        self.cache.print_stats();
    }

    /// How far K and V of one layer are from what a hit would give.
    #[must_use]
    pub fn measure_quantization_error(&self, k: TensorView<'_>, v: TensorView<'_>) -> QuantizationLoss {
        self.quantizer.measure_quantization_error(k, v)
    }
}
