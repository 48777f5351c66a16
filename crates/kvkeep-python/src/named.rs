//! The front door by prefix text and layer, as far as it is done in Rust: see
//! `kvkeep._simple` for the class that people use.

#![expect(clippy::needless_pass_by_value, reason = "arguments from Python are owned")]

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use kvkeep::{
    CachedKv, CachedLayers, HashedPrefix, LayerKv, LayerSpec, PrivateLayers, PrivateTensor, SimpleKvCache, Store,
    StoreOptions,
};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString, PyTuple};

use crate::convert::{LayerCount, seconds};
use crate::error::{CallError, Outcome, raise, stopped, to_python};
use crate::fork::Holding;
use crate::memory::{Access, Lent};
use crate::open::{Open, Settings, interrupted};
use crate::ram::{self, Held, Ram, RawSpec};
use crate::{array, stats, torch};

/// What came in as torch tensors goes out as such; everything else goes out to numpy.
const TORCH: u8 = 1;

/// Below this a text is hashed, and bytes are copied, with the GIL held: giving it away and
/// getting it back takes longer. Python's `hashlib` draws its line at 2 KiB.
const DETACH_BYTES: usize = 8 << 10;

/// The cache by prefix text and layer.
#[pyclass(frozen, subclass, module = "kvkeep._kvkeep")]
#[derive(Debug)]
pub(crate) struct NamedCache {
    cache: Open<SimpleKvCache>,
    /// The last prefix asked for and its hash: who asks for layer after layer passes the same
    /// string object, and hashing 8,192 tokens of text takes ten times as long as a hit.
    last: Mutex<Option<(Py<PyString>, HashedPrefix)>>,
    /// Makes tensors of torch where they are wanted; none if that is the CPU.
    hand_out: OnceLock<Py<PyAny>>,
}

/// Tensors of one hit: the memory that they show.
#[derive(Debug)]
pub(crate) struct Hit(Holding<PrivateLayers>);

#[pymethods]
impl NamedCache {
    #[new]
    #[pyo3(signature = (settings, name="default"))]
    fn new(py: Python<'_>, settings: Settings, name: &str) -> PyResult<Self> {
        let name = name.to_owned();
        let cache = Open::new(py, settings, move |config| Ok(SimpleKvCache::over(Store::new(config)?, &name)))?;
        Ok(Self { cache, last: Mutex::new(None), hand_out: OnceLock::new() })
    }

    /// From now on torch tensors of hits go out through `hand_out(held, places)`, which returns tensors where they are wanted.
    fn _hand_out(&self, hand_out: Py<PyAny>) {
        let _is_first = self.hand_out.set(hand_out);
    }

    fn _ram(&self) -> PyResult<Ram> {
        Ok(Ram(self.cache.get()?.store_handle().ram()))
    }

    /// As `_store`, of tensors of torch that `write` writes: it is called with the addresses of K and V of each layer, and
    /// returns when all are written.
    fn _store_written(
        &self,
        py: Python<'_>,
        prefix: &str,
        layers: Vec<(LayerCount, RawSpec, RawSpec)>,
        write: (Py<PyAny>, Py<PyAny>),
        ttl_seconds: Option<f64>,
        compute_seconds: Option<f64>,
    ) -> PyResult<Outcome> {
        let cache = self.cache.get()?;
        let spec = |(layer, k, v): &(LayerCount, RawSpec, RawSpec)| {
            Ok(LayerSpec { layer: layer.0, k: ram::spec(k)?, v: ram::spec(v)? })
        };
        let layers = layers.iter().map(spec).collect::<PyResult<Vec<_>>>()?;
        let mut options = StoreOptions::default().tag(TORCH);
        options.ttl = seconds(ttl_seconds, "ttl_seconds")?;
        options.compute_time = seconds(compute_seconds, "compute_seconds")?;
        let outcome = py.detach(|| {
            cache.cache_all_layers_written(prefix, &layers, &options, |pages| {
                let addresses: Vec<(usize, usize)> =
                    pages.into_iter().map(|(k, v)| (k.as_mut_ptr() as usize, v.as_mut_ptr() as usize)).collect();
                ram::written(&write.0, &write.1, addresses)?;
                Ok::<(), CallError>(())
            })
        });
        Ok(Outcome::of(outcome?))
    }

    /// Stores (layer, K, V) of a prefix, all or nothing.
    fn _store(
        &self,
        py: Python<'_>,
        prefix: &str,
        layers: Vec<(LayerCount, Bound<'_, PyAny>, Bound<'_, PyAny>)>,
        ttl_seconds: Option<f64>,
        compute_seconds: Option<f64>,
    ) -> PyResult<Outcome> {
        let cache = self.cache.get()?;
        let lent = |(layer, k, v): &(LayerCount, Bound<'_, PyAny>, Bound<'_, PyAny>)| {
            Ok((layer.0, Lent::new(k, Access::Read)?, Lent::new(v, Access::Read)?))
        };
        let layers = layers.iter().map(lent).collect::<PyResult<Vec<_>>>()?;
        let mut options = StoreOptions::default().tag(kind(&layers)?).stop(interrupted);
        options.ttl = seconds(ttl_seconds, "ttl_seconds")?;
        options.compute_time = seconds(compute_seconds, "compute_seconds")?;
        let bytes: usize = layers.iter().map(|(_, k, v)| k.bytes() + v.bytes()).sum();
        let outcome = detached(py, bytes + prefix.len(), || {
            let views = layers.iter().map(|(layer, k, v)| Ok(LayerKv { layer: *layer, k: k.view()?, v: v.view()? }));
            let views = views.collect::<kvkeep::Result<Vec<_>>>()?;
            cache.cache_all_layers_with(prefix, &views, &options)
        });
        outcome.map(Outcome::of).map_err(|error| stopped(py, &error))
    }

    /// K and V of one layer as they were stored, or None if they are not there (any more).
    ///
    /// Tensors of the kind that was stored, with the same dtype and shape, writable: writing into
    /// them changes neither the cache nor what the next reader gets. Costs the same for
    /// every size. Their pages cannot be evicted while they live.
    ///
    /// Raises `EmptyPrefixError`, `LayerOutOfRangeError`.
    fn get_cached_kv<'py>(
        &self,
        py: Python<'py>,
        prefix: &Bound<'py, PyString>,
        layer: LayerCount,
    ) -> PyResult<Option<Bound<'py, PyTuple>>> {
        let (cache, hashed) = (self.cache.get()?, self.hashed(prefix)?);
        let found = self.waiting(py, || cache.get_hashed(&hashed, layer.0));
        let Some(found) = found.map_err(|error| to_python(&error))? else { return Ok(None) };
        PyTuple::new(py, self.tensors(py, CachedKv::into_layers(found))?).map(Some)
    }

    /// K and V of the layers 0 to `num_layers`, as a dict from layer to (k, v), or None if
    /// any is missing. Counts as one request. Tensors as from `get_cached_kv`.
    ///
    /// Raises `EmptyPrefixError`, `ZeroLayersError`, `LayerOutOfRangeError`.
    fn get_all_layers<'py>(
        &self,
        py: Python<'py>,
        prefix: &Bound<'py, PyString>,
        num_layers: LayerCount,
    ) -> PyResult<Option<Bound<'py, PyDict>>> {
        let (cache, hashed) = (self.cache.get()?, self.hashed(prefix)?);
        let found = self.waiting(py, || cache.get_all_hashed(&hashed, num_layers.0));
        let Some(found) = found.map_err(|error| to_python(&error))? else { return Ok(None) };
        let dict = PyDict::new(py);
        let mut tensors = self.tensors(py, found)?.into_iter();
        for layer in 0..num_layers.0 {
            dict.set_item(layer, (tensors.next(), tensors.next()))?;
        }
        Ok(Some(dict))
    }

    /// The longest prefix of `text` under which at least one layer is stored, or None.
    /// Not a request: nothing is counted.
    fn longest_prefix<'t>(&self, py: Python<'_>, text: &'t str) -> PyResult<Option<&'t str>> {
        let cache = self.cache.get()?;
        Ok(detached(py, text.len(), || cache.longest_prefix(text)))
    }

    /// Removes one layer of a prefix, or all of them; returns the layers that were there.
    ///
    /// Raises `EmptyPrefixError`, `LayerOutOfRangeError`.
    #[pyo3(signature = (prefix, layer=None))]
    fn evict(&self, py: Python<'_>, prefix: &str, layer: Option<LayerCount>) -> PyResult<Vec<usize>> {
        let cache = self.cache.get()?;
        let evicted = py.detach(|| cache.evict(prefix, layer.map(|layer| layer.0)));
        evicted.map(|evicted| evicted.layers).map_err(|error| to_python(&error))
    }

    /// Removes everything; returns how many entries that were. Counters are kept.
    fn clear(&self, py: Python<'_>) -> PyResult<u64> {
        let cache = self.cache.get()?;
        self.last().take();
        Ok(py.detach(|| cache.clear().entries))
    }

    /// Counters and sizes as of now: see `Stats`.
    fn get_stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let cache = self.cache.get()?;
        stats::to_dict(py, &py.detach(|| cache.get_stats()))
    }

    /// Makes everything stored so far durable: after a crash it is there, unless it was evicted,
    /// removed, or expired meanwhile.
    ///
    /// Raises `NoDiskError` without a disk tier, `DiskError` if it fails.
    fn flush(&self, py: Python<'_>) -> PyResult<()> {
        self.cache.flush(py, SimpleKvCache::flush)
    }

    /// Ends the cache. A disk tier gets what is in RAM and is let go of, for this or another
    /// process to open again. Calls that follow raise `ClosedError`; tensors stay valid.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        self.last().take();
        self.cache.close(py, SimpleKvCache::close)
    }

    fn _stats_text(&self) -> PyResult<String> {
        Ok(self.cache.get()?.get_stats().to_string())
    }
}

impl NamedCache {
    /// A hit in RAM takes less time than giving the GIL away; a disk or a network does not.
    fn waiting<T: Send>(&self, py: Python<'_>, find: impl FnOnce() -> T + Send) -> T {
        if self.cache.may_wait { py.detach(find) } else { find() }
    }

    /// The hash of a prefix; nothing to do if it is the very string that was asked for last.
    fn hashed(&self, prefix: &Bound<'_, PyString>) -> PyResult<HashedPrefix> {
        let py = prefix.py();
        if let Some((last, hashed)) = self.last().as_ref()
            && last.is(prefix)
        {
            return Ok(*hashed);
        }
        let (cache, text) = (self.cache.get()?, prefix.to_str()?);
        let hashed = detached(py, text.len(), || cache.hashed(text)).map_err(|error| to_python(&error))?;
        // What it replaces is dropped behind the lock.
        let _last = self.last().replace((prefix.clone().unbind(), hashed));
        Ok(hashed)
    }

    /// Never held while Python code runs or the GIL is waited for.
    fn last(&self) -> MutexGuard<'_, Option<(Py<PyString>, HashedPrefix)>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// K and V of each layer of a hit, one after the other, as what they came in as.
    fn tensors<'py>(&self, py: Python<'py>, found: CachedLayers) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let of_torch: Vec<bool> = (0..found.len()).map(|layer| found.tag(layer) == TORCH).collect();
        let all_of_torch = of_torch.iter().all(|of_torch| *of_torch);
        if let (Some(hand_out), true) = (self.hand_out.get(), all_of_torch) {
            let (held, places) = Held::layers(found);
            return hand_out.bind(py).call1((held, places))?.extract();
        }
        let hit = Hit::of(found.into_private())?;
        let layers = hit.0.get();
        let mut flat: Vec<PrivateTensor> = Vec::with_capacity(2 * layers.len());
        for layer in 0..layers.len() {
            let (k, v) = layers.layer(layer).map_err(|error| to_python(&error))?;
            flat.extend([k, v]);
        }
        if all_of_torch {
            return torch::tensors(py, &hit, &flat);
        }
        let make = |(position, tensor): (usize, &PrivateTensor)| {
            if of_torch.get(position / 2) != Some(&true) {
                return array::array(py, &hit, tensor);
            }
            let made = torch::tensors(py, &hit, &[*tensor])?.remove(0);
            match self.hand_out.get() {
                Some(hand_out) => hand_out.bind(py).call1((made, [ram::place(tensor)]))?.get_item(0),
                None => Ok(made),
            }
        };
        flat.iter().enumerate().map(make).collect()
    }
}

impl Hit {
    fn of(private: kvkeep::Result<PrivateLayers>) -> PyResult<Arc<Self>> {
        let private = private.map_err(|error| to_python(&error))?;
        Ok(Arc::new(Self(Holding::new(private))))
    }
}

/// What all of these are: torch tensors or numpy arrays.
fn kind(layers: &[(usize, Lent, Lent)]) -> PyResult<u8> {
    let torch = layers.iter().flat_map(|(_, k, v)| [k, v]).filter(|lent| lent.is_torch()).count();
    match torch {
        0 => Ok(0),
        torch if torch == 2 * layers.len() => Ok(TORCH),
        _ => Err(raise("UnsupportedTensorError", "torch tensors and numpy arrays in one call: give one kind")),
    }
}

/// Runs `work` without the GIL if it has that many bytes to read that it is worth it.
fn detached<T: Send>(py: Python<'_>, bytes: usize, work: impl Send + FnOnce() -> T) -> T {
    if bytes < DETACH_BYTES { work() } else { py.detach(work) }
}
