//! Tiers behind an engine that keeps KV in RAM of its own: what `kvkeep.vllm` puts under vLLM's tiering.
//!
//! Nothing here waits, but [`EngineTier::drain`] and [`EngineTier::close`]. A store is copied out of its row by a thread
//! of this module and written by the disk's; a load is read and checked by the disk's threads and copied into its row by
//! them, a daemon's straight from its memory. So a row is held for a copy and for as long as the queue is full, and no longer than the job's deadline.

#![expect(clippy::needless_pass_by_value, reason = "arguments from Python are owned")]

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use kvkeep::tiers::{Payload, ReadTarget};
use kvkeep::{CacheConfig, StoreOptions};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::convert::{seconds, some_seconds};
use crate::engine_blocks::{Behind, Blocks, RawNews};
use crate::engine_jobs::{Job, Jobs, Key, Kind, Staged, Target};
use crate::engine_rows::{Pool, Rows};
use crate::error::{raise, to_python};
use crate::fork::Here;
use crate::open::waiting;
use crate::stats;
use crate::tokens::Namespace;

/// Stores that wait for the thread that copies; more are refused.
const MAX_WAITING: usize = 4096;
/// Memory to read into that is kept: as much as there are threads that read.
const BOUNCE: usize = 8;
/// How often a thread that waits for work looks whether the tier is still there.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// (number, kind, positions that are done, blocks, seconds)
type RawEnded = (u64, &'static str, Vec<usize>, usize, f64);

/// The tier.
#[pyclass(frozen, module = "kvkeep._kvkeep")]
#[derive(Debug)]
pub(crate) struct EngineTier {
    here: Here<Mutex<Option<Arc<Engine>>>>,
}

#[derive(Debug)]
struct Engine {
    blocks: Blocks,
    jobs: Arc<Jobs>,
    staging: Arc<Pool>,
    queue: Mutex<Queue>,
    work: Condvar,
    refused: AtomicU64,
    load_time: Duration,
    store_time: Duration,
    thread: Mutex<Option<thread::JoinHandle<()>>>,
}

/// A store that waits to be copied out of its rows.
type Store = (Arc<Job>, Vec<Key>, StoreOptions);

#[derive(Debug, Default)]
struct Queue {
    stores: VecDeque<Store>,
    closed: bool,
}

#[pymethods]
impl EngineTier {
    /// `rows` is a writeable array of bytes, `[rows, bytes]`. `times` are seconds: of a load, of a store, of a flush.
    #[new]
    fn new(
        py: Python<'_>,
        rows: &Bound<'_, PyAny>,
        namespace: &Namespace,
        behind: Behind,
        times: [f64; 3],
        events: bool,
    ) -> PyResult<Self> {
        let rows = Rows::new(rows)?;
        if rows.row_bytes() != namespace.0.layout().block_bytes() {
            return Err(raise("ConfigError", "a row must have the bytes of a block of the namespace"));
        }
        let [load, store, flush] = times;
        let (load, store) = (some_seconds(load, "load_timeout_s")?, some_seconds(store, "store_timeout_s")?);
        let (queue_bytes, flush) = (behind.queue_bytes, some_seconds(flush, "flush_timeout_s")?);
        let config = CacheConfig::without_ram();
        let blocks = Blocks::open(py, config, behind, (load, flush), namespace.0.clone(), events)?;
        let row_bytes = rows.row_bytes();
        let staged = usize::try_from(queue_bytes).unwrap_or(usize::MAX) / row_bytes;
        let engine = Arc::new(Engine {
            blocks,
            jobs: Arc::new(Jobs::new(rows, Pool::new(row_bytes, BOUNCE))),
            staging: Pool::new(row_bytes, staged.clamp(1, 1 << 16)),
            queue: Mutex::default(),
            work: Condvar::new(),
            refused: AtomicU64::new(0),
            load_time: load,
            store_time: store,
            thread: Mutex::default(),
        });
        engine.start()?;
        Ok(Self { here: Here::new(Mutex::new(Some(engine))) })
    }

    /// Where each of these can be loaded from now.
    fn places(&self, py: Python<'_>, keys: Vec<Key>) -> PyResult<Vec<Option<&'static str>>> {
        let engine = self.engine()?;
        Ok(py.detach(|| engine.blocks.places(&keys)))
    }

    /// May more be there than was said, since a store is being asked?
    fn is_asking(&self) -> PyResult<bool> {
        Ok(self.engine()?.blocks.is_asking())
    }

    /// Begins to store rows; the job ends by itself.
    fn store(&self, py: Python<'_>, id: u64, keys: Vec<Key>, rows: Vec<usize>, ttl: Option<f64>) -> PyResult<()> {
        let engine = self.engine()?;
        let mut options = StoreOptions::default();
        options.ttl = seconds(ttl, "ttl_s")?;
        engine.check(&keys, &rows)?;
        begun(py.detach(|| engine.store(id, keys, rows, options)))
    }

    /// Begins to load into rows; the job ends by itself.
    fn load(&self, py: Python<'_>, id: u64, keys: Vec<Key>, rows: Vec<usize>) -> PyResult<()> {
        let engine = self.engine()?;
        engine.check(&keys, &rows)?;
        begun(py.detach(|| engine.load(id, Kind::Load, &keys, rows)))
    }

    /// Begins to load into nowhere, to see how fast that is.
    fn probe(&self, py: Python<'_>, id: u64, keys: Vec<Key>) -> PyResult<()> {
        let engine = self.engine()?;
        begun(py.detach(|| engine.load(id, Kind::Probe, &keys, vec![0; keys.len()])))
    }

    /// What has ended since this was last asked.
    fn ended(&self, py: Python<'_>) -> PyResult<Vec<RawEnded>> {
        let engine = self.engine()?;
        let ended = py.detach(|| engine.jobs.take_ended());
        let raw = |ended: crate::engine_jobs::Ended| {
            let kind = match ended.kind {
                Kind::Store => "store",
                Kind::Load => "load",
                Kind::Probe => "probe",
            };
            (ended.id, kind, ended.done, ended.blocks, ended.time.as_secs_f64())
        };
        Ok(ended.into_iter().map(raw).collect())
    }

    /// Waits until no job is under way.
    fn drain(&self, py: Python<'_>) -> PyResult<()> {
        let engine = self.engine()?;
        py.detach(|| engine.jobs.drain());
        Ok(())
    }

    /// These were used in the engine's own memory.
    fn touch(&self, py: Python<'_>, keys: Vec<Key>) -> PyResult<()> {
        let engine = self.engine()?;
        py.detach(|| engine.blocks.chain(&keys).iter().for_each(|chain| engine.blocks.cache.touch_lent(chain)));
        Ok(())
    }

    /// Keeps these before others, for so long; says how many.
    fn retain(&self, py: Python<'_>, keys: Vec<Key>, time: Option<f64>) -> PyResult<usize> {
        self.engine()?.blocks.retain(py, &keys, time)
    }

    /// These are like others again.
    fn release(&self, py: Python<'_>, keys: Vec<Key>) -> PyResult<()> {
        self.engine()?.blocks.release(py, &keys);
        Ok(())
    }

    /// Removes these; says how many there were.
    fn remove(&self, py: Python<'_>, keys: Vec<Key>) -> PyResult<u64> {
        let engine = self.engine()?;
        Ok(py.detach(|| {
            engine.blocks.chain(&keys).map_or(0, |chain| engine.blocks.cache.remove_chain(&chain, 0).entries)
        }))
    }

    /// Removes all that the namespace has, for everybody who shares it.
    fn clear(&self, py: Python<'_>) -> PyResult<()> {
        let engine = self.engine()?;
        waiting(py, move || engine.blocks.clear())
    }

    /// What came to the tiers and went from them since this was last asked, in order: tier, is removed, names.
    fn take_events<'py>(&self, py: Python<'py>) -> PyResult<RawNews<'py>> {
        Ok(self.engine()?.blocks.take_events(py))
    }

    fn flush(&self, py: Python<'_>) -> PyResult<()> {
        let engine = self.engine()?;
        waiting(py, move || engine.blocks.cache.flush())?.map_err(|error| to_python(&error))
    }

    /// Of the tiers, and of the jobs.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let engine = self.engine()?;
        let dict = stats::to_dict(py, &py.detach(|| engine.blocks.cache.stats()))?;
        dict.set_item("jobs_under_way", engine.jobs.under_way())?;
        dict.set_item("jobs_late_total", engine.jobs.late.load(Ordering::Relaxed))?;
        dict.set_item("jobs_refused_total", engine.refused.load(Ordering::Relaxed))?;
        Ok(dict)
    }

    /// Ends every job, gives the rows back, writes what was taken, and lets go of the directory. A second time does
    /// nothing.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let engine = self.here.get()?.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(engine) = engine else { return Ok(()) };
        // With the GIL held: they are an object of Python's.
        drop(py.detach(|| engine.give_back()));
        waiting(py, move || engine.close())?.map_err(|error| to_python(&error))
    }
}

impl EngineTier {
    fn engine(&self) -> PyResult<Arc<Engine>> {
        let engine = self.here.get()?.lock().unwrap_or_else(PoisonError::into_inner).clone();
        engine.ok_or_else(|| raise("ClosedError", "this tier is closed: make a new one"))
    }
}

impl Engine {
    fn start(self: &Arc<Self>) -> PyResult<()> {
        let weak = Arc::downgrade(self);
        let thread = thread::Builder::new().name("kvkeep-store".to_owned()).spawn(move || {
            while weak.upgrade().is_some_and(|engine| engine.is_idle() && engine.jobs.bounce.make_ready()) {}
            while let Some(engine) = weak.upgrade() {
                match engine.next_store() {
                    Some(Some((job, keys, options))) => engine.write(&job, keys, &options),
                    Some(None) => {}
                    None => return,
                }
            }
        })?;
        *self.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        Ok(())
    }

    /// # Errors
    /// `ConfigError` for rows that are not there.
    fn check(&self, keys: &[Key], rows: &[usize]) -> PyResult<()> {
        if keys.len() == rows.len() && self.jobs.has_rows(rows) {
            return Ok(());
        }
        Err(raise("ConfigError", "give one row that is there for each key"))
    }

    /// Says whether no other job has this number.
    fn store(&self, id: u64, keys: Vec<Key>, rows: Vec<usize>, options: StoreOptions) -> bool {
        let Some(job) = self.jobs.begin(id, Kind::Store, rows, self.store_time) else { return false };
        {
            let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
            if !queue.closed && queue.stores.len() < MAX_WAITING {
                queue.stores.push_back((job, keys, options));
                self.work.notify_one();
                return true;
            }
        }
        self.refused.fetch_add(1, Ordering::Relaxed);
        self.jobs.end(&job);
        true
    }

    /// Says whether no other job has this number.
    fn load(&self, id: u64, kind: Kind, keys: &[Key], rows: Vec<usize>) -> bool {
        let Some(job) = self.jobs.begin(id, kind, rows, self.load_time) else { return false };
        let Some(chain) = self.blocks.chain(keys) else {
            self.jobs.end(&job);
            return true;
        };
        let target = |block| {
            let (jobs, job) = (Arc::clone(&self.jobs), Arc::clone(&job));
            Box::new(Target::new(jobs, job, block)) as Box<dyn ReadTarget>
        };
        self.blocks.cache.read_lent(&chain, 0, (0..keys.len()).map(target).collect());
        true
    }

    fn is_idle(&self) -> bool {
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        !queue.closed && queue.stores.is_empty()
    }

    /// The next store; `Some(None)` if there is none and it is time to look around; `None` at the end.
    fn next_store(&self) -> Option<Option<Store>> {
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let waits = |queue: &mut Queue| queue.stores.is_empty() && !queue.closed;
        let waited = self.work.wait_timeout_while(queue, LOOK_EVERY, waits);
        let (mut queue, _) = waited.unwrap_or_else(PoisonError::into_inner);
        match queue.stores.pop_front() {
            None if queue.closed => None,
            next => Some(next),
        }
    }

    /// Copies what is not there yet out of its rows, and has it written.
    fn write(&self, job: &Job, keys: Vec<Key>, options: &StoreOptions) {
        let there = self.blocks.places(&keys);
        for (block, (key, there)) in keys.into_iter().zip(there).enumerate() {
            if job.is_over() {
                break;
            }
            if there.is_some() || self.write_one(job, block, key, options) {
                job.came(block);
            }
        }
        self.jobs.end(job);
    }

    fn write_one(&self, job: &Job, block: usize, key: Key, options: &StoreOptions) -> bool {
        let mut page = self.staging.take();
        if !self.jobs.with_row(job, block, |rows, row| rows.copy_out(row, page.bytes_mut())) {
            return false;
        }
        let Some(chain) = self.blocks.chain(std::slice::from_ref(&key)) else { return false };
        self.blocks.expect(std::slice::from_ref(&key));
        let payload: Arc<dyn Payload> = Arc::new(Staged { page });
        self.blocks.cache.write_lent(&chain, 0, vec![payload], options) == 1
    }

    /// Ends every job; the engine may have its memory back.
    fn give_back(&self) -> Option<Rows> {
        let waiting = {
            let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
            queue.closed = true;
            std::mem::take(&mut queue.stores)
        };
        self.work.notify_all();
        drop(waiting);
        self.jobs.close()
    }

    /// Writes what was taken, and lets go of the directory.
    fn close(self: Arc<Self>) -> kvkeep::Result<()> {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        // It waits for room in the queue at most, and that ends.
        drop(thread.map(thread::JoinHandle::join));
        self.blocks.cache.flush()
    }
}

/// # Errors
/// `ConfigError` if the number is another job's.
fn begun(begun: bool) -> PyResult<()> {
    if begun { Ok(()) } else { Err(raise("ConfigError", "a job of this number is under way: give each its own")) }
}
