//! The front door by tokens, as far as it is done in Rust: see `kvkeep._tokens` for the
//! classes that people use. The GIL is released in every call that hashes, copies or waits.

#![expect(clippy::needless_pass_by_value, reason = "arguments from Python are owned")]

use std::sync::{Arc, Mutex, PoisonError};

use kvkeep::{Chain, KvCache, KvLayout, LayerView, LayerViewMut, StoreOptions, TokenOrder};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyType};

use crate::convert::{self, LayerCount, dtype, seconds};
use crate::error::{CallError, Rejection, raise, stopped, to_python};
use crate::fork::{Here, Holding};
use crate::memory::{Access, Lent, Tokens, no_overlap};
use crate::open::{Open, Settings, interrupted};
use crate::ram::{self, Held, Ram, RawSpec, Run};
use crate::stats;

/// (k, v) of each layer.
type Layers<'py> = Vec<(Bound<'py, PyAny>, Bound<'py, PyAny>)>;

/// Tokens in RAM, worth loading and not worth it; seconds to load; tokens by tier.
type RawLook = (usize, usize, usize, f64, Vec<(String, usize)>);

/// What makes KV reusable: model, revision, engine, LoRA, tenant's salt, and the layout of a block.
#[pyclass(frozen, module = "kvkeep._kvkeep")]
#[derive(Debug)]
pub(crate) struct Namespace(pub(crate) kvkeep::Namespace);

/// The cache by tokens.
#[pyclass(frozen, module = "kvkeep._kvkeep")]
#[derive(Debug)]
pub(crate) struct TokenCache(Open<KvCache>);

/// The longest resident prefix of a prompt, pinned until it is closed.
#[pyclass(frozen, module = "kvkeep._kvkeep")]
#[derive(Debug)]
pub(crate) struct Match {
    held: Here<Mutex<Option<Arc<Holding<kvkeep::Match>>>>>,
    cached_tokens: usize,
    blocks: usize,
}

/// What became of the blocks of one store.
#[pyclass(frozen, eq, hash, get_all, module = "kvkeep")]
#[derive(Debug, PartialEq, Eq, Hash)]
pub(crate) struct StoreReport {
    /// Blocks stored now.
    stored_blocks: usize,
    /// Blocks that were there already.
    present_blocks: usize,
    /// Blocks that were not admitted: the tail of the prompt.
    rejected_blocks: usize,
    /// Why not, or None.
    rejection: Option<Rejection>,
}

#[pymethods]
impl Namespace {
    /// `dims` are `[layers, kv_heads, k_head_dim, v_head_dim, block_tokens]`.
    #[new]
    fn new(model: &str, dims: [u32; 5], dtype_code: usize, head_first: bool, parts: [String; 4]) -> PyResult<Self> {
        let [layers, kv_heads, k_head_dim, v_head_dim, block_tokens] = dims;
        let layout = KvLayout::new(layers, kv_heads, k_head_dim, dtype(dtype_code)?)
            .and_then(|layout| layout.with_v_head_dim(v_head_dim))
            .and_then(|layout| layout.with_block_tokens(block_tokens))
            .map_err(|error| to_python(&error))?;
        let order = if head_first { TokenOrder::HeadTokenDim } else { TokenOrder::TokenHeadDim };
        let [revision, engine, lora, salt] = parts;
        let namespace = kvkeep::Namespace::new(model, layout.with_order(order));
        Ok(Self(namespace.with_revision(revision).with_engine(engine).with_lora(lora).with_salt(salt)))
    }

    /// The identity, in hex.
    #[getter]
    fn id(&self) -> String {
        self.0.id().to_string()
    }

    /// Bytes of one block: all layers, K and V.
    #[getter]
    fn block_bytes(&self) -> usize {
        self.0.layout().block_bytes()
    }

    /// Refuses K and V of layers that do not fit: dtype code and shape of each.
    fn check(&self, first_layer: LayerCount, pairs: Vec<(RawSpec, RawSpec)>, min_tokens: usize) -> PyResult<()> {
        let pairs = pairs.iter().map(|(k, v)| Ok((ram::spec(k)?, ram::spec(v)?))).collect::<PyResult<Vec<_>>>()?;
        let checked = self.0.layout().check_pairs(first_layer.0, &pairs, min_tokens);
        checked.map(|_| ()).map_err(|error| to_python(&error))
    }
}

impl Namespace {
    pub(crate) fn namespace_id(&self) -> kvkeep::NamespaceId {
        self.0.id()
    }
}

#[pymethods]
impl TokenCache {
    #[new]
    fn new(py: Python<'_>, settings: Settings) -> PyResult<Self> {
        Open::new(py, settings, KvCache::new).map(Self)
    }

    fn flush(&self, py: Python<'_>) -> PyResult<()> {
        self.0.flush(py, KvCache::flush)
    }

    fn prefetch(&self, py: Python<'_>, namespace: &Namespace, tokens: &Bound<'_, PyAny>) -> PyResult<usize> {
        let cache = self.0.get()?;
        let tokens = Tokens::new(tokens)?;
        let under_way = py.detach(|| cache.prefetch(&namespace.0, tokens.ids()));
        under_way.map_err(|error| to_python(&error))
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        self.0.close(py, KvCache::close)
    }

    fn lookup(&self, py: Python<'_>, namespace: &Namespace, tokens: &Bound<'_, PyAny>) -> PyResult<Match> {
        let cache = self.0.get()?;
        let tokens = Tokens::new(tokens)?;
        let found = py.detach(|| cache.lookup(&namespace.0, tokens.ids()));
        found.map(Match::of).map_err(|error| to_python(&error))
    }

    fn pin(&self, py: Python<'_>, namespace: &Namespace, tokens: &Bound<'_, PyAny>) -> PyResult<Match> {
        let cache = self.0.get()?;
        let tokens = Tokens::new(tokens)?;
        let found = py.detach(|| cache.pin(&namespace.0, tokens.ids()));
        found.map(Match::of).map_err(|error| to_python(&error))
    }

    #[expect(clippy::too_many_arguments, reason = "one call from Python with all it needs")]
    fn store(
        &self,
        py: Python<'_>,
        namespace: &Namespace,
        tokens: &Bound<'_, PyAny>,
        first_token: usize,
        layers: Layers<'_>,
        ttl_seconds: Option<f64>,
        compute_seconds: Option<f64>,
        priority: &str,
    ) -> PyResult<StoreReport> {
        let cache = self.0.get()?;
        let options = store_options(ttl_seconds, compute_seconds, priority)?.stop(interrupted);
        let (tokens, layers) = (Tokens::new(tokens)?, lent_layers(&layers, Access::Read)?);
        let report = py.detach(|| {
            let views = layers.iter().map(|(k, v)| Ok(LayerView { k: k.view()?, v: v.view()? }));
            let views = views.collect::<kvkeep::Result<Vec<_>>>()?;
            cache.store_from(&namespace.0, tokens.ids(), first_token, &views, &options)
        });
        report.map(StoreReport::of).map_err(|error| stopped(py, &error))
    }

    /// As `store`, of blocks that `write` writes: it is called with the runs that are missing, and returns when all
    /// are written.
    #[expect(clippy::too_many_arguments, reason = "one call from Python with all it needs")]
    fn store_written(
        &self,
        py: Python<'_>,
        namespace: &Namespace,
        tokens: &Bound<'_, PyAny>,
        first_token: usize,
        write: (Py<PyAny>, Py<PyAny>),
        ttl_seconds: Option<f64>,
        compute_seconds: Option<f64>,
        priority: &str,
    ) -> PyResult<StoreReport> {
        let cache = self.0.get()?;
        let options = store_options(ttl_seconds, compute_seconds, priority)?;
        let (tokens, layout) = (Tokens::new(tokens)?, namespace.0.layout());
        let first_block = first_token.div_ceil(layout.block_tokens());
        let report = py.detach(|| {
            let chain = Chain::of(&namespace.0, tokens.ids())?;
            cache.store_written(&chain, first_block, &options, |blocks| {
                let blocks = blocks.into_iter().map(|(block, pages)| (block, pages.as_mut_ptr() as usize));
                let runs: Vec<Run> = ram::runs(blocks, layout.block_bytes());
                ram::written(&write.0, &write.1, runs)?;
                Ok::<(), CallError>(())
            })
        });
        Ok(StoreReport::of(report?))
    }

    fn ram(&self) -> PyResult<Ram> {
        Ok(Ram(self.0.get()?.store_handle().ram()))
    }

    /// Calls `prefill(first_token, cached)` if blocks are missing and nobody else computes them.
    fn get_or_prefill(
        &self,
        py: Python<'_>,
        namespace: &Namespace,
        tokens: &Bound<'_, PyAny>,
        prefill: Py<PyAny>,
    ) -> PyResult<Match> {
        let cache = self.0.get()?;
        // A copy: Python code runs in between.
        let tokens = Tokens::new(tokens)?.ids().to_vec();
        let found = py.detach(|| {
            cache.get_or_prefill(&namespace.0, &tokens, |missing| {
                let first_token = missing.first_token();
                let head = tokens.get(..first_token).filter(|head| !head.is_empty());
                let cached = head.map(|head| cache.pin(&namespace.0, head)).transpose()?;
                Python::attach(|py| prefill.call1(py, (first_token, cached.map(Match::of))))?;
                Ok::<(), CallError>(())
            })
        });
        Ok(Match::of(found?))
    }

    /// Where a prompt's tokens are, without touching any: in RAM, worth loading, not worth it; seconds to load; by tier.
    fn look(&self, py: Python<'_>, namespace: &Namespace, tokens: &Bound<'_, PyAny>) -> PyResult<RawLook> {
        let cache = self.0.get()?;
        let tokens = Tokens::new(tokens)?;
        let look = py.detach(|| cache.look(&namespace.0, tokens.ids())).map_err(|error| to_python(&error))?;
        Ok((look.ram_tokens, look.load_tokens, look.not_worth_tokens, look.load_time.as_secs_f64(), look.tiers))
    }

    /// Copies layers of the longest run, from RAM or straight from the disk; says of how many tokens.
    fn load_layers(
        &self,
        py: Python<'_>,
        namespace: &Namespace,
        tokens: &Bound<'_, PyAny>,
        first_layer: LayerCount,
        into: Layers<'_>,
    ) -> PyResult<usize> {
        let cache = self.0.get()?;
        let (tokens, mut into) = (Tokens::new(tokens)?, lent_layers(&into, Access::Write)?);
        no_overlap(into.iter().flat_map(|(k, v)| [k, v]))?;
        let loaded = py.detach(|| {
            let mut views = views_mut(&mut into)?;
            let layers = first_layer.0..first_layer.0.saturating_add(views.len());
            cache.load_layers(&namespace.0, tokens.ids(), layers, &mut views)
        });
        loaded.map_err(|error| to_python(&error))
    }

    fn remove(&self, py: Python<'_>, namespace: &Namespace, tokens: &Bound<'_, PyAny>) -> PyResult<u64> {
        let cache = self.0.get()?;
        let tokens = Tokens::new(tokens)?;
        let removed = py.detach(|| cache.remove(&namespace.0, tokens.ids()));
        removed.map(|removed| removed.entries).map_err(|error| to_python(&error))
    }

    fn clear(&self, py: Python<'_>, namespace: Option<&Namespace>) -> PyResult<u64> {
        let cache = self.0.get()?;
        let removed = py.detach(|| match namespace {
            Some(namespace) => cache.clear_namespace(&namespace.0),
            None => cache.clear(),
        });
        Ok(removed.entries)
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let cache = self.0.get()?;
        stats::to_dict(py, &py.detach(|| cache.stats()))
    }

    fn stats_text(&self) -> PyResult<String> {
        Ok(self.0.get()?.stats().to_string())
    }
}

impl Match {
    fn of(found: kvkeep::Match) -> Self {
        let (cached_tokens, blocks) = (found.cached_tokens(), found.blocks());
        Self { held: Here::new(Mutex::new(Some(Arc::new(Holding::new(found))))), cached_tokens, blocks }
    }

    fn held(&self) -> PyResult<Arc<Holding<kvkeep::Match>>> {
        let held = self.held.get()?.lock().unwrap_or_else(PoisonError::into_inner).clone();
        held.ok_or_else(|| raise("ClosedError", "this match is closed: look up again"))
    }
}

#[pymethods]
impl Match {
    #[getter]
    fn cached_tokens(&self) -> usize {
        self.cached_tokens
    }

    #[getter]
    fn blocks(&self) -> usize {
        self.blocks
    }

    #[getter]
    fn closed(&self) -> bool {
        self.held().is_err()
    }

    /// Copies these layers into tensors, one (k, v) for each layer from `first_layer` on. `new` says that nobody
    /// else has them yet.
    fn load(&self, py: Python<'_>, first_layer: LayerCount, into: Layers<'_>, new: bool) -> PyResult<()> {
        let held = self.held()?;
        let mut into = lent_layers(&into, if new { Access::WriteNew } else { Access::Write })?;
        no_overlap(into.iter().flat_map(|(k, v)| [k, v]))?;
        let loaded = py.detach(|| {
            let mut views = views_mut(&mut into)?;
            let layers = first_layer.0..first_layer.0.saturating_add(views.len());
            held.get().load(layers, &mut views)
        });
        loaded.map_err(|error| to_python(&error))
    }

    /// What keeps the blocks readable whatever becomes of this match, and the runs that they lie in.
    fn hold(&self) -> PyResult<(Held, Vec<Run>)> {
        let held = self.held()?;
        let found = held.get();
        let address = |block| found.block(block).map(|bytes| (block, bytes.as_ptr() as usize, bytes.len()));
        let blocks = (0..found.blocks()).map(address).collect::<kvkeep::Result<Vec<_>>>();
        let blocks = blocks.map_err(|error| to_python(&error))?;
        let block_bytes = blocks.first().map_or(0, |(_, _, bytes)| *bytes);
        let runs = ram::runs(blocks.iter().map(|(block, address, _)| (*block, *address)), block_bytes);
        Ok((Held::blocks(Arc::clone(&held)), runs))
    }

    /// Lets go of the blocks; they can be evicted again.
    fn close(&self, py: Python<'_>) {
        // In a child of the process that made it there is nothing to let go of.
        if let Ok(held) = self.held.get() {
            let held = held.lock().unwrap_or_else(PoisonError::into_inner).take();
            py.detach(|| drop(held));
        }
    }
}

impl StoreReport {
    fn of(report: kvkeep::StoreReport) -> Self {
        Self {
            stored_blocks: report.stored_blocks,
            present_blocks: report.present_blocks,
            rejected_blocks: report.rejected_blocks,
            rejection: report.rejection.map(Rejection::new),
        }
    }
}

#[pymethods]
impl StoreReport {
    /// As `__reduce__` takes it apart.
    #[new]
    #[pyo3(signature = (stored_blocks, present_blocks, rejected_blocks, rejection))]
    fn of_parts(
        stored_blocks: usize,
        present_blocks: usize,
        rejected_blocks: usize,
        rejection: Option<Rejection>,
    ) -> Self {
        Self { stored_blocks, present_blocks, rejected_blocks, rejection }
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> (Bound<'py, PyType>, (usize, usize, usize, Option<Rejection>)) {
        let parts = (self.stored_blocks, self.present_blocks, self.rejected_blocks, self.rejection.clone());
        (py.get_type::<Self>(), parts)
    }

    fn __repr__(&self) -> String {
        let Self { stored_blocks, present_blocks, rejected_blocks, rejection } = self;
        let why = rejection.as_ref().map(|why| format!(": {why:?}")).unwrap_or_default();
        format!("<StoreReport {stored_blocks} stored, {present_blocks} present, {rejected_blocks} rejected{why}>")
    }
}

fn store_options(ttl_seconds: Option<f64>, compute_seconds: Option<f64>, priority: &str) -> PyResult<StoreOptions> {
    let mut options = StoreOptions::default().priority(convert::priority(priority)?);
    options.ttl = seconds(ttl_seconds, "ttl_seconds")?;
    options.compute_time = seconds(compute_seconds, "compute_seconds")?;
    Ok(options)
}

fn views_mut(layers: &mut [(Lent, Lent)]) -> kvkeep::Result<Vec<LayerViewMut<'_>>> {
    layers.iter_mut().map(|(k, v)| Ok(LayerViewMut { k: k.view_mut()?, v: v.view_mut()? })).collect()
}

fn lent_layers(layers: &Layers<'_>, access: Access) -> PyResult<Vec<(Lent, Lent)>> {
    layers.iter().map(|(k, v)| Ok((Lent::new(k, access)?, Lent::new(v, access)?))).collect()
}
