//! The front door by prefix, with K and V through a codec in RAM, too: more prefixes in the same memory, and each hit
//! decoded.
//!
//! - [`Quantizer`]: tensors to bytes and back, and how far they are from what they were.
//! - [`QuantizedKvCache`]: [`SimpleKvCache`]'s calls, of such bytes.
//!
//! Invariant: what is kept here has a name of its own, the codec's among it. So neither another codec nor a
//! [`SimpleKvCache`] over the same store finds it. An option of `SimpleKvCache` was the alternative: it hands out what
//! it has without a copy, and this cannot.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::sync::Arc;

use crate::codec::{Codec, CodecId, Codecs, numbers};
use crate::config::{CacheConfig, StoreOptions};
use crate::error::{Error, Result};
use crate::key::TokenId;
use crate::layout::{Frame, Side, TokenOrder};
use crate::named::{CachedLayers, DEFAULT_MAX_SIZE_GIB, DEFAULT_TTL, Evicted, LayerKv, Outcome, SimpleKvCache};
use crate::stats::Stats;
use crate::store::{Removed, Store};
use crate::tensor::{DType, Shape, TensorView, TensorViewMut};

/// The codec of a [`QuantizedKvCache`] unless said otherwise.
pub const DEFAULT_QUANTIZER: &str = "int4";
/// Tokens that are kept as they are, unless said otherwise: the first, which all others attend to, and the most recent.
pub const DEFAULT_EXACT_TOKENS: [u32; 2] = [4, 32];

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

/// Makes bytes of K or V, and K or V again.
#[derive(Debug, Clone)]
pub struct Quantizer {
    codec: Arc<dyn Codec>,
    order: TokenOrder,
    exact_tokens: [u32; 2],
}

/// What KV belongs to: a text, or tokens. Neither stands for the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prefix<'a> {
    /// All that the KV depends on, as text.
    Text(&'a str),
    /// Or as tokens.
    Tokens(&'a [TokenId]),
}

/// A tensor with memory of its own.
#[derive(Debug, Clone, PartialEq)]
pub struct OwnedTensor {
    dtype: DType,
    shape: Shape,
    bytes: usize,
    /// Wide enough for any element.
    memory: Vec<u64>,
}

/// How far K and V are from what a codec makes of them.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct QuantizationLoss {
    /// Bytes as they were over bytes that are kept.
    pub ratio: f64,
    /// Of the keys.
    pub k: SideLoss,
    /// Of the values.
    pub v: SideLoss,
}

/// Of one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[non_exhaustive]
pub struct SideLoss {
    /// Mean of the elements' absolute differences.
    pub mean: f64,
    /// The largest of them.
    pub max: f64,
    /// Root of the mean square of the differences over that of the elements.
    pub relative: f64,
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

impl OwnedTensor {
    fn zeroed(dtype: DType, shape: Shape) -> Option<Self> {
        let bytes = shape.size_bytes(dtype)?;
        Some(Self { dtype, shape, bytes, memory: vec![0; bytes.div_ceil(size_of::<u64>())] })
    }

    /// The tensor.
    #[must_use]
    pub fn view(&self) -> TensorView<'_> {
        let bytes = bytemuck::cast_slice::<u64, u8>(&self.memory);
        TensorView::trusted(self.dtype, self.shape, bytes.get(..self.bytes).unwrap_or_default())
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut::<u64, u8>(&mut self.memory).get_mut(..self.bytes).unwrap_or_default()
    }
}

/// In front of an entry's bytes: the codec, the dtype, the dimensions' number, side and order, the caller's mark; then
/// each dimension in 8 bytes.
const HEAD_BYTES: usize = 5;

/// What an entry's bytes begin with.
#[derive(Debug, Clone, Copy)]
struct Head {
    codec: CodecId,
    dtype: DType,
    shape: Shape,
    side: Side,
    order: TokenOrder,
    tag: u8,
}

impl Head {
    fn write(&self) -> Vec<u8> {
        let dims = self.shape.dims();
        let order = u8::from(self.order == TokenOrder::HeadTokenDim);
        let kind = u8::from(self.side == Side::V) | order << 1;
        // At most eight dimensions.
        let rank = u8::try_from(dims.len()).unwrap_or(u8::MAX);
        let mut bytes = vec![self.codec.0, self.dtype.code(), rank, kind, self.tag];
        dims.iter().for_each(|dim| bytes.extend((*dim as u64).to_le_bytes()));
        bytes
    }

    /// And what is behind it.
    fn read(stored: &[u8]) -> Option<(Self, &[u8])> {
        let ([codec, dtype, rank, kind, tag], rest) = stored.split_first_chunk::<HEAD_BYTES>()?;
        let (dims, rest) = rest.split_at_checked(usize::from(*rank) * 8)?;
        let dims = dims.as_chunks().0.iter().map(|dim| usize::try_from(u64::from_le_bytes(*dim)).ok());
        let shape = Shape::new(&dims.collect::<Option<Vec<_>>>()?).ok()?;
        let side = if kind & 1 == 0 { Side::K } else { Side::V };
        let order = if kind & 2 == 0 { TokenOrder::TokenHeadDim } else { TokenOrder::HeadTokenDim };
        let (codec, dtype) = (CodecId(*codec), DType::from_code(*dtype)?);
        (*kind < 4).then_some((Self { codec, dtype, shape, side, order, tag: *tag }, rest))
    }

    /// The tensor as a codec takes it: dimensions before those of heads, tokens and elements count as heads.
    fn frame(&self, bytes: usize, exact_tokens: [u32; 2]) -> Frame {
        let (side, dtype, dims) = (Some(self.side), self.dtype, self.shape.dims());
        let folded = match (self.order, dims) {
            (TokenOrder::HeadTokenDim, [outer @ .., tokens, dim]) => Some([outer.iter().product(), *tokens, *dim]),
            (TokenOrder::TokenHeadDim, [outer @ .., tokens, heads, dim]) if outer.iter().all(|dim| *dim == 1) => {
                Some([*tokens, *heads, *dim])
            }
            _ => None,
        };
        let shape = folded.and_then(|dims| Shape::new(&dims).ok());
        let order = shape.map(|_| self.order);
        Frame { range: 0..bytes, layer: 0, side, dtype, shape: shape.unwrap_or(self.shape), order, exact_tokens }
    }
}

impl Quantizer {
    /// By the codec of this name, one of [`Codecs::names`]. Tensors are `[.., heads, tokens, dim]`, as transformers has
    /// them, and the first and the most recent tokens stay exact ([`DEFAULT_EXACT_TOKENS`]).
    ///
    /// # Errors
    /// [`Error::Config`] for any other name.
    pub fn named(codec: &str) -> Result<Self> {
        let codec = Codecs::known_as(codec)?;
        Ok(Self { codec, order: TokenOrder::HeadTokenDim, exact_tokens: DEFAULT_EXACT_TOKENS })
    }

    /// Tensors are `[.., tokens, heads, dim]`, or `[.., heads, tokens, dim]`.
    #[must_use]
    pub fn order(self, order: TokenOrder) -> Self {
        Self { order, ..self }
    }

    /// So many tokens at the beginning and at the end stay exact.
    #[must_use]
    pub fn exact_tokens(self, first: u32, last: u32) -> Self {
        Self { exact_tokens: [first, last], ..self }
    }

    /// The codec's name.
    #[must_use]
    pub fn codec(&self) -> &'static str {
        self.codec.name()
    }

    /// The name of a cache for what this makes, where it would else have this one.
    #[must_use]
    pub fn cache_name(&self, name: &str) -> String {
        format!("{name}\0{}", self.codec.name())
    }

    /// The bytes of a tensor. What a codec cannot make smaller is among them as it is. `tag` is the caller's own mark.
    #[must_use]
    pub fn encode(&self, side: Side, tensor: TensorView<'_>, tag: u8) -> Vec<u8> {
        let (dtype, shape, raw) = (tensor.dtype(), tensor.shape(), tensor.bytes());
        let mut head = Head { codec: self.codec.id(), dtype, shape, side, order: self.order, tag };
        let mut room = vec![0; raw.len().saturating_sub(1)];
        let frame = head.frame(raw.len(), self.exact_tokens);
        let made = Some(&self.codec).filter(|codec| codec.id() != CodecId::RAW);
        let made = made.and_then(|codec| codec.encode(&frame, raw, &mut room)).and_then(|bytes| room.get(..bytes));
        if made.is_none() {
            head.codec = CodecId::RAW;
        }
        let mut stored = head.write();
        stored.extend_from_slice(made.unwrap_or(raw));
        stored
    }

    /// What a tensor's bytes say it is: its dtype, its shape and the caller's mark. `None` for what is no tensor's bytes.
    #[must_use]
    pub fn spec(stored: &[u8]) -> Option<(DType, Shape, u8)> {
        Head::read(stored).map(|(head, _)| (head.dtype, head.shape, head.tag))
    }

    /// The tensor again, into one of the same dtype and shape. `false` if these are not bytes that this codec made of
    /// such a one.
    #[must_use]
    pub fn decode_into(&self, stored: &[u8], into: &mut TensorViewMut<'_>) -> bool {
        let Some((head, kept)) = Head::read(stored) else { return false };
        let is_same = (head.dtype, head.shape) == (into.as_view().dtype(), into.as_view().shape());
        is_same && self.decode_bytes(&head, kept, into.bytes_mut())
    }

    /// The tensor again. `None` if these are not bytes that this codec made.
    #[must_use]
    pub fn decode(&self, stored: &[u8]) -> Option<OwnedTensor> {
        let (head, kept) = Head::read(stored)?;
        // No more memory than a codec can make of these bytes: a damaged shape asks for none.
        let most = kept.len().saturating_mul(MOST_RATIO);
        let bytes = head.shape.size_bytes(head.dtype).filter(|bytes| *bytes <= most)?;
        let mut tensor = OwnedTensor::zeroed(head.dtype, head.shape)?;
        debug_assert_eq!(bytes, tensor.bytes);
        self.decode_bytes(&head, kept, tensor.bytes_mut()).then_some(tensor)
    }

    fn decode_bytes(&self, head: &Head, kept: &[u8], into: &mut [u8]) -> bool {
        if head.codec == CodecId::RAW {
            let is_whole = kept.len() == into.len();
            if is_whole {
                into.copy_from_slice(kept);
            }
            return is_whole;
        }
        head.codec == self.codec.id() && self.codec.decode(&head.frame(into.len(), [0; 2]), kept, into)
    }

    /// How far K and V of one layer are from what the codec makes of them.
    #[must_use]
    pub fn measure_quantization_error(&self, k: TensorView<'_>, v: TensorView<'_>) -> QuantizationLoss {
        let (kept_k, kept_v) = (self.encode(Side::K, k, 0), self.encode(Side::V, v, 0));
        let error = |was: TensorView<'_>, kept: &[u8]| {
            let came = self.decode(kept);
            came.map_or_else(SideLoss::default, |came| SideLoss::of(was, came.view()))
        };
        let raw = k.bytes().len() + v.bytes().len();
        QuantizationLoss {
            ratio: raw as f64 / (kept_k.len() + kept_v.len()).max(1) as f64,
            k: error(k, &kept_k),
            v: error(v, &kept_v),
        }
    }
}

/// One byte of `lossless` can stand for a piece of 64 KiB at most.
const MOST_RATIO: usize = 64 << 10;

impl SideLoss {
    /// Of tensors of one dtype and shape; none of what is no float of 16 or 32 bits, which comes back exactly.
    fn of(was: TensorView<'_>, came: TensorView<'_>) -> Self {
        let [Some(was), Some(came)] = [was, came].map(|tensor| numbers(tensor.dtype(), tensor.bytes())) else {
            return Self::default();
        };
        let (mut sum, mut max, mut square, mut all) = (0.0f64, 0.0f64, 0.0f64, 0.0f64);
        for (was, came) in was.iter().zip(&came).filter(|(was, _)| was.is_finite()) {
            let (was, difference) = (f64::from(*was), (f64::from(*was) - f64::from(*came)).abs());
            (sum, max) = (sum + difference, max.max(difference));
            (square, all) = (square + difference * difference, all + was * was);
        }
        let relative = if square == 0.0 { 0.0 } else { (square / all).sqrt() };
        Self { mean: sum / was.len().max(1) as f64, max, relative }
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
