//! The front door by prefix text and layer: K and V of any shape and dtype, stored and
//! handed back as they are.
//!
//! For engines without blocks and for first experiments. The text is the whole
//! identity: it must be all that the KV depends on.

mod hits;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::config::{CacheConfig, Copied, StoreOptions};
use crate::error::{Error, Rejection, Result};
use crate::eviction::Place;
use crate::key::{NamespaceId, ObjectKey, PrefixHash, PrefixHasher};
use crate::stats::Stats;
use crate::store::{OnPresent, Pending, Removed, Request, Sealing, Store};
use crate::tensor::{DType, PairSpec, Shape, TensorSpec, TensorView};

pub use hits::{CachedKv, CachedLayers, PrivateLayers, PrivateTensor};

/// Layers run from 0 to below this.
pub const MAX_LAYERS: usize = 4096;

/// Size of a [`SimpleKvCache`] unless said otherwise.
pub const DEFAULT_MAX_SIZE_GIB: f64 = 10.0;

/// Time to live in a [`SimpleKvCache`] unless said otherwise.
pub const DEFAULT_TTL: Duration = Duration::from_secs(3600);

/// KV by prefix text and layer. Cheap to clone: clones share everything.
///
/// ```
/// use kvkeep::{SimpleKvCache, TensorView};
///
/// let cache = SimpleKvCache::with_max_size_gib(0.1)?;
/// let k = TensorView::of(&[1.0f32, 2.0, 3.0, 4.0], &[1, 2, 2])?;
/// cache.cache_kv("You are helpful.", 0, k, k)?;
///
/// let hit = cache.get_cached_kv("You are helpful.", 0)?.expect("just stored");
/// assert_eq!(hit.k().elements::<f32>()?, [1.0, 2.0, 3.0, 4.0]);
/// assert_eq!(cache.longest_prefix("You are helpful. Hi!"), Some("You are helpful."));
/// # Ok::<(), kvkeep::Error>(())
/// ```
#[derive(Clone)]
pub struct SimpleKvCache {
    store: Store,
    namespace: NamespaceId,
}

/// K and V of one layer, to be stored under a prefix.
#[derive(Debug, Clone, Copy)]
pub struct LayerKv<'a> {
    /// The layer's number.
    pub layer: usize,
    /// The keys, of any shape.
    pub k: TensorView<'a>,
    /// The values, of any shape.
    pub v: TensorView<'a>,
}

/// What K and V of one layer look like that are to be stored under a prefix.
#[derive(Debug, Clone, Copy)]
pub struct LayerSpec {
    /// The layer's number.
    pub layer: usize,
    /// Element type and shape of the keys.
    pub k: TensorSpec,
    /// Element type and shape of the values.
    pub v: TensorSpec,
}

impl LayerKv<'_> {
    fn spec(&self) -> LayerSpec {
        LayerSpec { layer: self.layer, k: (self.k.dtype(), self.k.shape()), v: (self.v.dtype(), self.v.shape()) }
    }
}

/// A prefix text, hashed once, for several requests of the cache that made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HashedPrefix(PrefixHash);

/// What became of a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
#[non_exhaustive]
pub enum Outcome {
    /// Stored, in place of what was there under the same prefix and layers.
    Stored,
    /// Not admitted; the cache is as it was.
    Rejected(Rejection),
}

/// What an eviction by prefix removed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Evicted {
    /// The layers that were there.
    pub layers: Vec<usize>,
    /// Their bytes, in whole pages.
    pub bytes: u64,
}

impl SimpleKvCache {
    /// A cache of [`DEFAULT_MAX_SIZE_GIB`] GiB whose entries live for [`DEFAULT_TTL`].
    ///
    /// # Errors
    /// As [`Store::new`].
    pub fn new() -> Result<Self> {
        Self::with_max_size_gib(DEFAULT_MAX_SIZE_GIB)
    }

    /// A cache of `max_size_gib` GiB whose entries live for [`DEFAULT_TTL`].
    ///
    /// # Errors
    /// [`Error::Config`] if the size is not a positive, finite number; else as [`Store::new`].
    pub fn with_max_size_gib(max_size_gib: f64) -> Result<Self> {
        Self::open(CacheConfig::from_gib(max_size_gib)?.ttl(Some(DEFAULT_TTL)))
    }

    /// A cache with a store of its own.
    ///
    /// # Errors
    /// As [`Store::new`].
    pub fn open(config: CacheConfig) -> Result<Self> {
        Ok(Self::over(Store::new(config)?, "default"))
    }

    /// A cache over a store that others may use too. Caches of different names see nothing
    /// of each other; of the same name they are the same cache.
    #[must_use]
    pub fn over(store: Store, name: &str) -> Self {
        Self { store, namespace: NamespaceId::named(name) }
    }

    /// The store behind this door.
    #[must_use]
    pub fn store_handle(&self) -> &Store {
        &self.store
    }

    /// Stores K and V of one layer, in place of what was there.
    ///
    /// # Errors
    /// [`Error::EmptyPrefix`], [`Error::LayerOutOfRange`], [`Error::EmptyTensor`].
    pub fn cache_kv(&self, prefix: &str, layer: usize, k: TensorView<'_>, v: TensorView<'_>) -> Result<Outcome> {
        self.cache_kv_with(prefix, layer, k, v, &StoreOptions::default())
    }

    /// [`SimpleKvCache::cache_kv`] with a TTL or a reported compute time of its own.
    ///
    /// # Errors
    /// As [`SimpleKvCache::cache_kv`].
    pub fn cache_kv_with(
        &self,
        prefix: &str,
        layer: usize,
        k: TensorView<'_>,
        v: TensorView<'_>,
        options: &StoreOptions,
    ) -> Result<Outcome> {
        self.cache_all_layers_with(prefix, &[LayerKv { layer, k, v }], options)
    }

    /// Stores K and V of several layers at once: all or nothing.
    ///
    /// # Errors
    /// As [`SimpleKvCache::cache_kv`], [`Error::ZeroLayers`], [`Error::DuplicateLayer`].
    pub fn cache_all_layers(&self, prefix: &str, layers: &[LayerKv<'_>]) -> Result<Outcome> {
        self.cache_all_layers_with(prefix, layers, &StoreOptions::default())
    }

    /// [`SimpleKvCache::cache_all_layers`] with a TTL or a reported compute time (of all
    /// layers together) of its own.
    ///
    /// # Errors
    /// As [`SimpleKvCache::cache_all_layers`], and [`Error::Stopped`].
    pub fn cache_all_layers_with(
        &self,
        prefix: &str,
        layers: &[LayerKv<'_>],
        options: &StoreOptions,
    ) -> Result<Outcome> {
        let mut copied = options.copied();
        let specs: Vec<LayerSpec> = layers.iter().map(LayerKv::spec).collect();
        self.store_pending(prefix, &specs, options, |pending| {
            for ((pending, v_start), layer) in pending.iter_mut().zip(layers) {
                copy_to(pending, 0, layer.k.bytes(), &mut copied)?;
                copy_to(pending, *v_start, layer.v.bytes(), &mut copied)?;
            }
            Ok(())
        })
    }

    /// As [`SimpleKvCache::cache_all_layers_with`], where something else than the processor writes them. `write` gets the
    /// bytes of K and of V of each layer, in the order given, and returns when all are written. It is not called if they are
    /// not admitted; if it fails, nothing is stored.
    ///
    /// # Errors
    /// As [`SimpleKvCache::cache_all_layers`], and whatever `write` returns.
    pub fn cache_all_layers_written<E: From<Error>>(
        &self,
        prefix: &str,
        layers: &[LayerSpec],
        options: &StoreOptions,
        write: impl FnOnce(Vec<(&mut [u8], &mut [u8])>) -> Result<(), E>,
    ) -> Result<Outcome, E> {
        self.store_pending(prefix, layers, options, |pending| {
            write(pending.iter_mut().zip(layers).map(|(pending, layer)| parts(pending, layer)).collect())
        })
    }

    /// Stores layers once `write` has written all of them. It gets each one's pages, and where V begins in them.
    fn store_pending<E: From<Error>>(
        &self,
        prefix: &str,
        layers: &[LayerSpec],
        options: &StoreOptions,
        write: impl FnOnce(&mut [(Pending, usize)]) -> Result<(), E>,
    ) -> Result<Outcome, E> {
        let hash = self.hash(prefix)?;
        let plans = plan(prefix, hash, layers, options.tag)?;
        let sizes: Vec<usize> = plans.iter().map(|plan| plan.bytes).collect();
        let pages = match self.store.here()?.reserve_all(self.namespace, &sizes) {
            Ok(pages) => pages,
            Err(rejection) => return Ok(Outcome::Rejected(rejection)),
        };
        let mut pending: Vec<_> = pages.into_iter().zip(plans.iter().map(|plan| plan.v_start)).collect();
        write(&mut pending)?;
        let sealing = |(plan, (pending, _)): (Plan, (Pending, usize))| {
            let place = Place::of(0, layers.len(), 0);
            Sealing { key: plan.key, pending, bytes: plan.bytes, spec: Some(plan.spec), parent: None, place }
        };
        let objects = plans.into_iter().zip(pending).map(sealing).collect();
        self.store.seal(self.namespace, objects, options, OnPresent::Replace);
        Ok(Outcome::Stored)
    }

    /// K and V of one layer as they were stored, or `None`. Counts as a request.
    ///
    /// # Errors
    /// [`Error::EmptyPrefix`], [`Error::LayerOutOfRange`].
    pub fn get_cached_kv(&self, prefix: &str, layer: usize) -> Result<Option<CachedKv>> {
        self.get_hashed(&self.hashed(prefix)?, layer)
    }

    /// Hashes a prefix text, to ask for several of its layers one by one.
    ///
    /// # Errors
    /// [`Error::EmptyPrefix`].
    pub fn hashed(&self, prefix: &str) -> Result<HashedPrefix> {
        self.hash(prefix).map(HashedPrefix)
    }

    /// [`SimpleKvCache::get_cached_kv`] of a text that is hashed already.
    ///
    /// # Errors
    /// [`Error::LayerOutOfRange`].
    pub fn get_hashed(&self, prefix: &HashedPrefix, layer: usize) -> Result<Option<CachedKv>> {
        let key = prefix.0.key(checked_layer(layer)?);
        let pin = self.store.here()?.pin_all(self.namespace, &[key], Request::Named);
        Ok(pin.map(|pin| CachedKv(CachedLayers { pin })))
    }

    /// K and V of the layers 0 to `num_layers`, or `None` if any is missing. Counts as one
    /// request.
    ///
    /// # Errors
    /// [`Error::EmptyPrefix`], [`Error::ZeroLayers`], [`Error::LayerOutOfRange`].
    pub fn get_all_layers(&self, prefix: &str, num_layers: usize) -> Result<Option<CachedLayers>> {
        self.get_all_hashed(&self.hashed(prefix)?, num_layers)
    }

    /// [`SimpleKvCache::get_all_layers`] of a text that is hashed already.
    ///
    /// # Errors
    /// [`Error::ZeroLayers`], [`Error::LayerOutOfRange`].
    pub fn get_all_hashed(&self, prefix: &HashedPrefix, num_layers: usize) -> Result<Option<CachedLayers>> {
        let last = checked_layer(num_layers.checked_sub(1).ok_or(Error::ZeroLayers)?)?;
        let keys: Vec<ObjectKey> = (0..=last).map(|layer| prefix.0.key(layer)).collect();
        Ok(self.store.here()?.pin_all(self.namespace, &keys, Request::Named).map(|pin| CachedLayers { pin }))
    }

    /// The longest prefix of `text` under which at least one layer is stored. Each byte of
    /// the text is hashed once. Not a request: nothing is counted or touched.
    #[must_use]
    pub fn longest_prefix<'t>(&self, text: &'t str) -> Option<&'t str> {
        self.store.here().ok()?;
        let mut hasher = PrefixHasher::new(self.namespace);
        let mut hashed = 0;
        let mut candidates = Vec::new();
        for length in self.store.prefix_lengths(self.namespace, text.len()) {
            let Some(piece) = text.as_bytes().get(hashed..length) else { continue };
            hasher.update(piece);
            hashed = length;
            candidates.push((length, hasher.hash()));
        }
        candidates.reverse();
        let length = self.store.first_stored(self.namespace, &candidates)?;
        text.get(..length)
    }

    /// Removes one layer of a prefix, or all of them, and says which were there.
    ///
    /// # Errors
    /// [`Error::EmptyPrefix`], [`Error::LayerOutOfRange`].
    pub fn evict(&self, prefix: &str, layer: Option<usize>) -> Result<Evicted> {
        self.store.here()?;
        let hash = self.hash(prefix)?;
        let layers = match layer {
            Some(layer) => {
                let layer = checked_layer(layer)?;
                layer..layer + 1
            }
            None => 0..self.store.layers(self.namespace),
        };
        let keys: Vec<ObjectKey> = layers.clone().map(|layer| hash.key(layer)).collect();
        let (Removed { bytes, .. }, found) = self.store.remove(self.namespace, &keys);
        let layers = layers.zip(found).filter(|(_, found)| *found);
        Ok(Evicted { layers: layers.map(|(layer, _)| layer as usize).collect(), bytes })
    }

    /// Removes everything in this cache; other doors over the same store keep theirs.
    pub fn clear(&self) -> Removed {
        self.store.clear_namespace(self.namespace)
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

    /// The store's counters and sizes.
    #[must_use]
    pub fn get_stats(&self) -> Stats {
        self.store.stats()
    }

    /// Prints the store's counters and sizes to standard output.
    #[expect(clippy::print_stdout, reason = "printing is what it is for")]
    pub fn print_stats(&self) {
        print!("{}", self.get_stats());
    }

    fn hash(&self, prefix: &str) -> Result<PrefixHash> {
        if prefix.is_empty() {
            return Err(Error::EmptyPrefix);
        }
        Ok(PrefixHash::of(self.namespace, prefix))
    }
}

impl fmt::Debug for SimpleKvCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimpleKvCache").field("store", &self.store).finish_non_exhaustive()
    }
}

/// What is to be written for one layer.
struct Plan {
    key: ObjectKey,
    spec: Arc<PairSpec>,
    v_start: usize,
    bytes: usize,
}

fn plan(prefix: &str, hash: PrefixHash, layers: &[LayerSpec], tag: u8) -> Result<Vec<Plan>> {
    if layers.is_empty() {
        return Err(Error::ZeroLayers);
    }
    let mut seen = std::collections::HashSet::with_capacity(layers.len());
    layers
        .iter()
        .map(|LayerSpec { layer, k, v }| {
            if !seen.insert(layer) {
                return Err(Error::DuplicateLayer(*layer));
            }
            for (name, (_, shape)) in [("k", k), ("v", v)] {
                if shape.dims().contains(&0) {
                    return Err(Error::EmptyTensor(format!("{name} of layer {layer}")));
                }
            }
            let overflow = Error::SizeOverflow("the size of K and V");
            let spec = PairSpec { k: *k, v: *v, prefix_bytes: prefix.len(), tag };
            let (Some(v_start), Some(bytes)) = (spec.v_start(), spec.payload_bytes()) else { return Err(overflow) };
            Ok(Plan { key: hash.key(checked_layer(*layer)?), spec: Arc::new(spec), v_start, bytes })
        })
        .collect()
}

/// Where K and V of a layer are to be written.
fn parts<'a>((pending, v_start): &'a mut (Pending, usize), layer: &LayerSpec) -> (&'a mut [u8], &'a mut [u8]) {
    let (k, v) = pending.bytes_mut().split_at_mut_checked(*v_start).unwrap_or_default();
    let size = |(dtype, shape): (DType, Shape)| ..shape.size_bytes(dtype).unwrap_or(0);
    (k.get_mut(size(layer.k)).unwrap_or_default(), v.get_mut(size(layer.v)).unwrap_or_default())
}

/// In steps, so that it can be stopped.
fn copy_to(pending: &mut Pending, start: usize, from: &[u8], copied: &mut Copied) -> Result<()> {
    for (step, from) in from.chunks(Copied::STEP_BYTES).enumerate() {
        let start = start + step * Copied::STEP_BYTES;
        pending.part_mut(start..start + from.len()).copy_from_slice(from);
        copied.add(from.len())?;
    }
    Ok(())
}

fn checked_layer(layer: usize) -> Result<u32> {
    let error = Error::LayerOutOfRange { layer, layers: MAX_LAYERS };
    if layer >= MAX_LAYERS {
        return Err(error);
    }
    u32::try_from(layer).map_err(|_| error)
}
