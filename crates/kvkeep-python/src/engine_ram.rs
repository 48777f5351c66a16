//! RAM, and tiers behind it, for an engine whose workers copy between a device and the cache's own memory: what
//! `kvkeep.vllm`'s `KvkeepOffloadingSpec` is over.
//!
//! Invariant: a row that is being written is found by nobody, and one that is held is neither evicted nor written. Nothing
//! here waits but [`EngineRam::close`]: blocks come up from the disk in threads of this module. All rows have one size and
//! nothing else lies in the memory, so a row is its number times that size; where that ever failed, it is refused.

#![expect(clippy::needless_pass_by_value, reason = "arguments from Python are owned")]

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use kvkeep::tiers::{BlockMeta, ReadTarget};
use kvkeep::{Begun, CacheConfig, Chain, Match, Priority, StoreOptions};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::convert::{policy, seconds, some_seconds};
use crate::engine_blocks::{Behind, Blocks, RawNews};
use crate::engine_jobs::Key;
use crate::engine_rows::{Page, Pool};
use crate::error::{raise, to_python};
use crate::fork::{Here, Holding};
use crate::open::waiting;
use crate::stats;
use crate::tokens::Namespace;

/// Requests whose blocks come up at a time: one keeps a disk busy, and others wait behind one that hangs.
const THREADS: usize = 4;
/// How often a thread that waits for work looks whether the cache is still there.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The memory and what is behind it.
#[pyclass(frozen, module = "kvkeep._kvkeep")]
#[derive(Debug)]
pub(crate) struct EngineRam {
    here: Here<Mutex<Option<Arc<Engine>>>>,
}

/// Blocks in RAM that stay there, and as they are, while this lives.
#[pyclass(frozen, module = "kvkeep._kvkeep")]
#[derive(Debug)]
pub(crate) struct EngineHeld {
    _found: Holding<Match>,
    rows: Vec<usize>,
}

/// Rows that are to be written. Dropped without `end`, nothing was stored.
#[pyclass(frozen, module = "kvkeep._kvkeep")]
#[derive(Debug)]
pub(crate) struct EngineBegun {
    begun: Here<Mutex<Option<Begun>>>,
    positions: Vec<usize>,
    rows: Vec<usize>,
    refused: usize,
}

#[derive(Debug)]
struct Engine {
    blocks: Blocks,
    row_bytes: usize,
    bounce: Arc<Pool>,
    load_time: Duration,
    work: Mutex<Work>,
    more: Condvar,
    threads: Mutex<Vec<thread::JoinHandle<()>>>,
}

#[derive(Debug, Default)]
struct Work {
    wanted: VecDeque<Fetch>,
    ended: Vec<(u64, Match, Duration)>,
    probed: Vec<(String, usize, usize, Duration)>,
    late: u64,
    closed: bool,
}

/// Blocks that are to come up.
#[derive(Debug)]
struct Fetch {
    what: What,
    chain: Chain,
    begun: Instant,
}

/// What for.
#[derive(Debug)]
enum What {
    /// The request of this number.
    Load(u64),
    /// To see how fast this tier is: they are read into nowhere.
    Probe(String),
}

/// Where a block is read to that nobody wants.
struct Nowhere {
    page: Page,
    came: mpsc::Sender<()>,
}

impl ReadTarget for Nowhere {
    fn bytes_mut(&mut self) -> &mut [u8] {
        self.page.bytes_mut()
    }

    fn complete(self: Box<Self>, read: Option<BlockMeta>) {
        if read.is_some() {
            // Whoever asked may have gone.
            let _ = self.came.send(());
        }
    }
}

#[pymethods]
impl EngineRam {
    /// `ram` is bytes and the policy's name; `times` are seconds: of a load, of a flush.
    #[new]
    fn new(
        py: Python<'_>,
        namespace: &Namespace,
        ram: (u64, String),
        behind: Behind,
        times: [f64; 2],
        events: bool,
    ) -> PyResult<Self> {
        let row_bytes = namespace.0.layout().block_bytes();
        let (ram_bytes, name) = ram;
        let rows = ram_bytes / row_bytes as u64;
        if rows == 0 || !row_bytes.is_multiple_of(4096) {
            return Err(raise("ConfigError", "a row is whole pages of 4 KiB, and RAM has room for one at least"));
        }
        let [load, flush] = times;
        let load_time = some_seconds(load, "load_timeout_s")?;
        let config = CacheConfig::new(rows * row_bytes as u64).policy(policy(&name)?);
        let times = (load_time, some_seconds(flush, "flush_timeout_s")?);
        let blocks = Blocks::open(py, config, behind, times, namespace.0.clone(), events)?;
        let engine = Arc::new(Engine {
            blocks,
            row_bytes,
            bounce: Pool::new(row_bytes, THREADS),
            load_time,
            work: Mutex::default(),
            more: Condvar::new(),
            threads: Mutex::default(),
        });
        engine.start()?;
        Ok(Self { here: Here::new(Mutex::new(Some(engine))) })
    }

    /// The descriptor of the memory, for `/proc/<pid>/fd`, and how many rows it has.
    fn memory(&self) -> PyResult<(i32, usize)> {
        use std::os::fd::AsRawFd;

        let engine = self.engine()?;
        let ram = engine.blocks.cache.store_handle().ram();
        let Some(file) = ram.file() else { return Err(raise("ConfigError", "this system has no memory to share")) };
        Ok((file.as_raw_fd(), ram.capacity_bytes() / engine.row_bytes))
    }

    /// Holds all of these if they are all in RAM.
    fn hold(&self, py: Python<'_>, keys: Vec<Key>) -> PyResult<Option<EngineHeld>> {
        let engine = self.engine()?;
        Ok(py.detach(|| engine.blocks.cache.hold_chain(&engine.blocks.chain(&keys)?)).map(|found| engine.held(found)))
    }

    /// Where each of these can be brought up from now.
    fn places(&self, py: Python<'_>, keys: Vec<Key>) -> PyResult<Vec<Option<&'static str>>> {
        let engine = self.engine()?;
        Ok(py.detach(|| engine.blocks.places(&keys)))
    }

    /// May more be there than was said, since a store is being asked?
    fn is_asking(&self) -> PyResult<bool> {
        Ok(self.engine()?.blocks.is_asking())
    }

    /// Begins to store those of these from `first` on that are not in RAM. What comes before them is only known.
    fn begin(
        &self,
        py: Python<'_>,
        keys: Vec<Key>,
        first: usize,
        ttl: Option<f64>,
        is_kept: bool,
    ) -> PyResult<EngineBegun> {
        let engine = self.engine()?;
        let mut options = StoreOptions::default();
        options.ttl = seconds(ttl, "ttl_s")?;
        options.priority = if is_kept { Priority::KeepLonger } else { Priority::default() };
        engine.blocks.expect(keys.get(first..).unwrap_or_default());
        let begun = py.detach(|| Some(engine.blocks.cache.begin_store(&engine.blocks.chain(&keys)?, first, &options)));
        let places: Vec<(usize, usize)> = begun.iter().flat_map(Begun::places).collect();
        if !places.iter().all(|(_, offset)| offset.is_multiple_of(engine.row_bytes)) {
            return Err(raise("ConfigError", "this memory is not the engine's alone"));
        }
        let (positions, rows) = places.iter().map(|(block, offset)| (*block, offset / engine.row_bytes)).unzip();
        let refused = begun.as_ref().map_or(0, |begun| begun.report().rejected_blocks);
        Ok(EngineBegun { begun: Here::new(Mutex::new(begun)), positions, rows, refused })
    }

    /// A request for these, as far as they are in RAM; the disk hears of it too.
    fn note(&self, py: Python<'_>, keys: Vec<Key>) -> PyResult<()> {
        let engine = self.engine()?;
        py.detach(|| {
            if let Some(chain) = engine.blocks.chain(&keys) {
                engine.blocks.cache.note_request(&chain);
                engine.blocks.cache.touch_lent(&chain);
            }
        });
        Ok(())
    }

    /// Keeps these on the disk before others, for so long; says how many.
    fn retain(&self, py: Python<'_>, keys: Vec<Key>, time: Option<f64>) -> PyResult<usize> {
        self.engine()?.blocks.retain(py, &keys, time)
    }

    /// These are like others again.
    fn release(&self, py: Python<'_>, keys: Vec<Key>) -> PyResult<()> {
        self.engine()?.blocks.release(py, &keys);
        Ok(())
    }

    /// Begins to bring these up.
    fn fetch(&self, id: u64, keys: Vec<Key>) -> PyResult<()> {
        self.engine()?.want(What::Load(id), &keys)
    }

    /// Begins to read these from this tier into nowhere, to see how fast it is.
    fn probe(&self, tier: String, keys: Vec<Key>) -> PyResult<()> {
        self.engine()?.want(What::Probe(tier), &keys)
    }

    /// What was read into nowhere since this was last asked: the tier, blocks that came, blocks that were wanted, seconds.
    fn probed(&self) -> PyResult<Vec<(String, usize, usize, f64)>> {
        let probed = std::mem::take(&mut self.engine()?.work().probed);
        Ok(probed.into_iter().map(|(tier, came, wanted, time)| (tier, came, wanted, time.as_secs_f64())).collect())
    }

    /// What has come up since this was last asked: number, seconds, and the blocks, held.
    fn fetched(&self) -> PyResult<Vec<(u64, f64, EngineHeld)>> {
        let engine = self.engine()?;
        let ended = std::mem::take(&mut engine.work().ended);
        Ok(ended.into_iter().map(|(id, found, time)| (id, time.as_secs_f64(), engine.held(found))).collect())
    }

    /// Evicts everything from RAM that is not held, and waits for its writes for so long at most; says how many blocks are left.
    fn evict_all(&self, py: Python<'_>, time: f64) -> PyResult<usize> {
        let (engine, time) = (self.engine()?, some_seconds(time, "flush_timeout_s")?);
        waiting(py, move || engine.blocks.cache.evict_all(time))
    }

    /// What came to RAM and to the tiers and went from them since this was last asked, in order: tier, is removed, names.
    fn take_events<'py>(&self, py: Python<'py>) -> PyResult<RawNews<'py>> {
        Ok(self.engine()?.blocks.take_events(py))
    }

    fn flush(&self, py: Python<'_>) -> PyResult<()> {
        let engine = self.engine()?;
        waiting(py, move || engine.blocks.cache.flush())?.map_err(|error| to_python(&error))
    }

    /// Of RAM, of the tiers, and of what came up.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let engine = self.engine()?;
        let dict = stats::to_dict(py, &py.detach(|| engine.blocks.cache.stats()))?;
        dict.set_item("jobs_late_total", engine.work().late)?;
        dict.set_item("jobs_refused_total", 0)?;
        Ok(dict)
    }

    /// Writes what is in RAM and not on the disk, and lets go of the directory. A second time does nothing.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let engine = self.here.get()?.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(engine) = engine else { return Ok(()) };
        waiting(py, move || engine.close())?.map_err(|error| to_python(&error))
    }
}

#[pymethods]
impl EngineHeld {
    #[getter]
    fn rows(&self) -> Vec<usize> {
        self.rows.clone()
    }
}

#[pymethods]
impl EngineBegun {
    /// Which of the keys are to be written.
    #[getter]
    fn positions(&self) -> Vec<usize> {
        self.positions.clone()
    }

    /// And where.
    #[getter]
    fn rows(&self) -> Vec<usize> {
        self.rows.clone()
    }

    /// So many had no room.
    #[getter]
    fn refused(&self) -> usize {
        self.refused
    }

    /// All of them are written: from now on they are found.
    fn end(&self, py: Python<'_>) -> PyResult<()> {
        let begun = self.begun.get()?.lock().unwrap_or_else(PoisonError::into_inner).take();
        py.detach(|| begun.map(Begun::end));
        Ok(())
    }

    /// They will not be written, and nothing writes them any more.
    fn abandon(&self) -> PyResult<()> {
        let begun = self.begun.get()?.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(begun);
        Ok(())
    }
}

impl EngineRam {
    fn engine(&self) -> PyResult<Arc<Engine>> {
        let engine = self.here.get()?.lock().unwrap_or_else(PoisonError::into_inner).clone();
        engine.ok_or_else(|| raise("ClosedError", "this cache is closed: make a new one"))
    }
}

impl Engine {
    fn start(self: &Arc<Self>) -> PyResult<()> {
        for _ in 0..THREADS {
            let weak = Arc::downgrade(self);
            let thread = thread::Builder::new().name("kvkeep-fetch".to_owned()).spawn(move || {
                while let Some(engine) = weak.upgrade() {
                    match engine.next() {
                        Some(Some(Fetch { what: What::Load(id), chain, begun })) => engine.bring(id, &chain, begun),
                        Some(Some(Fetch { what: What::Probe(tier), chain, .. })) => engine.probe(tier, &chain),
                        Some(None) => {}
                        None => return,
                    }
                }
            })?;
            self.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        }
        Ok(())
    }

    fn work(&self) -> std::sync::MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn want(&self, what: What, keys: &[Key]) -> PyResult<()> {
        let Some(chain) = self.blocks.chain(keys) else { return Err(raise("ConfigError", "give keys to read")) };
        if matches!(what, What::Load(_)) {
            self.blocks.expect(keys);
        }
        self.work().wanted.push_back(Fetch { what, chain, begun: Instant::now() });
        self.more.notify_one();
        Ok(())
    }

    fn held(&self, found: Match) -> EngineHeld {
        let begin = self.blocks.cache.store_handle().ram().address().as_ptr() as usize;
        let row = |block| {
            let bytes = found.block(block).ok()?;
            Some((bytes.as_ptr() as usize).saturating_sub(begin) / self.row_bytes)
        };
        let rows = (0..found.blocks()).filter_map(row).collect();
        EngineHeld { _found: Holding::new(found), rows }
    }

    /// What is wanted next; `Some(None)` if nothing is; `None` at the end.
    fn next(&self) -> Option<Option<Fetch>> {
        let waits = |work: &mut Work| work.wanted.is_empty() && !work.closed;
        let waited = self.more.wait_timeout_while(self.work(), LOOK_EVERY, waits);
        let (mut work, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if work.closed { None } else { Some(work.wanted.pop_front()) }
    }

    /// Brings these blocks up, as many as come in time. What waited for its turn too long gets what is in RAM.
    fn bring(&self, id: u64, chain: &Chain, begun: Instant) {
        let is_late = begun.elapsed() >= self.load_time;
        let found = if is_late { None } else { Some(self.blocks.cache.pin_chain(chain)) };
        let time = begun.elapsed();
        let mut work = self.work();
        work.late += u64::from(is_late || time >= self.load_time);
        match found {
            Some(found) if !work.closed => work.ended.push((id, found, time)),
            _ => {}
        }
    }

    fn probe(&self, tier: String, chain: &Chain) {
        let (begun, (came, coming)) = (Instant::now(), mpsc::channel());
        let target = |_| Box::new(Nowhere { page: self.bounce.take(), came: came.clone() }) as Box<dyn ReadTarget>;
        self.blocks.cache.read_lent(chain, 0, (0..chain.blocks()).map(target).collect());
        drop(came);
        let mut blocks = 0;
        while coming.recv_timeout(self.load_time.saturating_sub(begun.elapsed())).is_ok() {
            blocks += 1;
        }
        self.work().probed.push((tier, blocks, chain.blocks(), begun.elapsed()));
    }

    fn close(self: Arc<Self>) -> kvkeep::Result<()> {
        let ended = {
            let mut work = self.work();
            work.closed = true;
            work.wanted.clear();
            std::mem::take(&mut work.ended)
        };
        drop(ended);
        self.more.notify_all();
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        // Each waits for the disk for as long as a load may take, and no longer.
        threads.into_iter().for_each(|thread| drop(thread.join()));
        match self.blocks.cache.flush() {
            Err(kvkeep::Error::NoDisk) => Ok(()),
            flushed => flushed,
        }
    }
}
