//! The tier: what the cache asks of it, on the cache's threads. Nothing here waits longer than its deadline.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use kvkeep::tiers::{BlockKey, Deadline, Epoch, Forget, Forgotten, Located, Messages, Offer, Read, Reports};
use kvkeep::{Clock, Error, NamespaceId, OneLine, Process, Result, SystemClock, Tier, TierStats};
use tokio::runtime::{Builder, Runtime};

use crate::RemoteConfig;
use crate::index::Known;
use crate::shared::{Parts, Shared};
use crate::state::Taken;
use crate::store::{Name, Store};
use crate::{reader, scout, writer};

/// Threads that speak to the store.
const THREADS: usize = 2;
/// What closing waits for a store that gets nothing done.
const CLOSE_PATIENCE: Duration = Duration::from_secs(5);
/// What opening waits for the store to be there.
const OPEN_PATIENCE: Duration = Duration::from_secs(2);
/// Blocks that wait to be written are looked at again after so long.
const TICK: Duration = Duration::from_millis(20);

/// A store over a network, as a tier behind RAM and disk.
pub struct RemoteTier {
    shared: Arc<Shared>,
    /// `None` once it is closed.
    runtime: std::sync::Mutex<Option<Runtime>>,
    handle: tokio::runtime::Handle,
    process: Process,
}

impl RemoteTier {
    /// The store that the settings name. One that is not there now is no error: it is used as soon as it is.
    ///
    /// # Errors
    /// [`Error::Config`] for settings that make no tier.
    pub fn open(config: &RemoteConfig) -> Result<Self> {
        Self::open_at(config, Arc::new(SystemClock::new()))
    }

    /// As [`RemoteTier::open`], with another source of time.
    ///
    /// # Errors
    /// As [`RemoteTier::open`].
    pub fn open_at(config: &RemoteConfig, clock: Arc<dyn Clock>) -> Result<Self> {
        let refused = |why: String| Error::Config(format!("the remote tier: {why}"));
        if config.prefix.is_empty() {
            return Err(refused("an empty prefix makes everything in the store ours: give a name".into()));
        }
        if config.deadline.is_zero() || config.capacity_bytes == 0 {
            return Err(refused("a deadline or a capacity of zero lets nothing come back: give some".into()));
        }
        let messages = Messages::new(config.codecs.clone());
        let messages = match &config.key_file {
            Some(key_file) => messages.key_file(key_file)?,
            None => messages,
        };
        let store = open_store(config).map_err(refused)?;
        Self::over(Parts { store, messages, clock }, config)
    }

    pub(crate) fn over(parts: Parts, config: &RemoteConfig) -> Result<Self> {
        let build =
            Builder::new_multi_thread().worker_threads(THREADS).thread_name("kvkeep-remote").enable_all().build();
        let runtime = build.map_err(|error| Error::Config(format!("the remote tier has no threads: {error}")))?;
        let shared = Arc::new(Shared::new(parts, config));
        let keeper = Arc::clone(&shared);
        runtime.spawn(async move { keeper.health.keep(keeper.store.as_ref()).await });
        runtime.spawn(scout::run(Arc::clone(&shared)));
        runtime.spawn(writer::run(Arc::clone(&shared)));
        let handle = runtime.handle().clone();
        let tier = Self { shared, runtime: std::sync::Mutex::new(Some(runtime)), handle, process: Process::current() };
        let began = Instant::now();
        while !tier.shared.health.allows() && began.elapsed() < OPEN_PATIENCE {
            std::thread::sleep(Duration::from_millis(1));
        }
        if !tier.works() {
            tracing::warn!(tier = tier.name(), "the remote tier is not there: going on without until it is");
        }
        Ok(tier)
    }

    /// Does the store answer, as far as is known?
    #[must_use]
    pub fn works(&self) -> bool {
        self.shared.health.allows()
    }

    /// Is the store being asked what something is, for a lookup that did not wait ([`RemoteConfig::never_waits`]), or was it
    /// since this was last called? Then it is worth it to look again. A question takes no longer than a deadline.
    #[must_use]
    pub fn is_asking(&self) -> bool {
        // In this order: one that ends meanwhile has left its mark.
        self.shared.asking.load(Ordering::SeqCst) > 0 || self.shared.has_asked.swap(false, Ordering::SeqCst)
    }

    /// Is all known that lies in the store? Then what does not lie there costs no question.
    #[must_use]
    pub fn knows_all(&self) -> bool {
        self.shared.lock().index.knows_all(Instant::now())
    }

    /// Asks the store what these are, and waits for the answers that come in time. Where those are some and not all, as of
    /// a long prompt in a store that answers each by itself, they are progress: their blocks have a deadline of their own.
    fn ask(&self, unknown: Vec<(usize, Name)>, deadline: Deadline, places: &mut [Option<Located>]) {
        let until = Instant::now() + deadline.left().min(self.shared.deadline);
        let (sender, answers) = mpsc::channel();
        self.handle.spawn(reader::ask(Arc::clone(&self.shared), unknown, sender, until));
        let mut came = 0;
        loop {
            match answers.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok((number, located)) => {
                    came += 1;
                    places.iter_mut().skip(number).take(1).for_each(|place| *place = located);
                }
                Err(RecvTimeoutError::Timeout) if came > 0 => return self.shared.progress(),
                // All have come: nobody sends any more.
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// Asks the store what these are. Who looks again finds what it has said.
    fn ask_behind(&self, unknown: Vec<(usize, Name)>) {
        let shared = Arc::clone(&self.shared);
        shared.has_asked.store(true, Ordering::SeqCst);
        shared.asking.fetch_add(1, Ordering::SeqCst);
        let until = Instant::now() + shared.deadline;
        self.handle.spawn(async move {
            reader::ask(Arc::clone(&shared), unknown, mpsc::channel().0, until).await;
            shared.asking.fetch_sub(1, Ordering::SeqCst);
        });
    }

    /// Takes one offer, if there is room in time.
    fn offer_one(&self, offer: &Offer, deadline: Deadline) -> Taken {
        let mut state = self.shared.lock();
        loop {
            let (now_ms, works) = (self.shared.clock.now_ms(), self.shared.health.allows());
            let taken = state.offer(offer, now_ms, self.shared.queue_bytes, works);
            if taken != Taken::Full || deadline.is_over() {
                return taken;
            }
            state = self.shared.wait(state, deadline.left().min(TICK));
        }
    }

    /// Waits until nothing is left to do; ends with an error if nothing gets done for so long.
    fn settle(&self, patience: Duration, doing: &'static str) -> Result<()> {
        let mut state = self.shared.lock();
        let (mut done, mut moved) = (state.done, Instant::now());
        while !state.is_idle() && !state.is_ended {
            state = self.shared.wait(state, TICK);
            if state.done != done {
                (done, moved) = (state.done, Instant::now());
            }
            if moved.elapsed() >= patience {
                let source = std::io::Error::other("the store gets nothing done");
                return Err(Error::Tier { tier: self.name().to_owned(), doing, source });
            }
        }
        match state.tell_lost() {
            0 => Ok(()),
            blocks => Err(Error::NotTaken { tier: self.name().to_owned(), blocks }),
        }
    }
}

fn open_store(config: &RemoteConfig) -> std::result::Result<Box<dyn Store>, String> {
    let scheme = config.url.split("://").next().unwrap_or_default();
    #[cfg(any(feature = "http", feature = "file"))]
    if let Some(objects) = crate::object::Objects::open(config) {
        return Ok(Box::new(objects?));
    }
    #[cfg(feature = "redis")]
    if scheme.starts_with("redis") {
        let node =
            format!("{:x}-{:x}", std::process::id(), std::time::UNIX_EPOCH.elapsed().map_or(0, |time| time.as_nanos()));
        let store = crate::redis::Redis::new(&config.url, &config.prefix, config.deadline, node)?;
        return Ok(Box::new(store));
    }
    Err(format!(
        "this build knows no store {scheme:?}: file:// is always there; redis:// and s3:// are in released wheels and commands, and in builds with the feature `remote`"
    ))
}

impl Tier for RemoteTier {
    fn name(&self) -> &str {
        self.shared.store.name()
    }

    fn locate(&self, namespace: NamespaceId, keys: &[BlockKey], deadline: Deadline) -> Vec<Option<Located>> {
        let mut places = vec![None; keys.len()];
        let mut unknown = Vec::new();
        if !self.process.is_current() || !self.shared.health.allows() {
            return places;
        }
        {
            let (now_ms, now) = (self.shared.clock.now_ms(), Instant::now());
            let state = self.shared.lock();
            for ((number, key), place) in keys.iter().enumerate().zip(&mut places) {
                let name = Name { namespace, key: *key };
                match state.look(&name, now_ms, now) {
                    Known::Here(located) => *place = Some(located),
                    Known::Absent => {}
                    Known::Unknown => unknown.push((number, name)),
                }
            }
        }
        if !unknown.is_empty() && self.shared.waits {
            self.ask(unknown, deadline, &mut places);
        } else if !unknown.is_empty() {
            self.ask_behind(unknown);
        }
        places
    }

    fn read(&self, reads: Vec<Read>) {
        if !self.process.is_current() {
            return reads.into_iter().for_each(|read| read.target.complete(None));
        }
        for read in reads {
            self.handle.spawn(reader::read(Arc::clone(&self.shared), read));
        }
    }

    fn offer(&self, offers: Vec<Offer>, deadline: Deadline) -> Vec<Offer> {
        let (mut back, mut is_work) = (Vec::new(), false);
        for offer in offers {
            match self.offer_one(&offer, deadline) {
                Taken::Queued => {
                    is_work = true;
                    self.shared.work.notify_one();
                }
                Taken::Outdated => {}
                Taken::There => offer.payload.written(false),
                Taken::Full | Taken::Refused => {
                    self.shared.lock().counters.dropped_total += 1;
                    back.push(offer);
                }
            }
        }
        if is_work {
            self.shared.work.notify_one();
        }
        back
    }

    fn give_up(&self, _waited: Duration) -> usize {
        let (given_up, is_busy) = {
            let mut state = self.shared.lock();
            (state.give_up(), state.is_busy)
        };
        if is_busy {
            // The writer decides whether what is under way had its time.
            self.shared.needed.notify_one();
        }
        given_up.len()
    }

    fn deadline(&self) -> Option<Duration> {
        Some(self.shared.deadline)
    }

    fn forget(&self, what: &Forget<'_>, epoch: Epoch) -> Forgotten {
        let now_ms = self.shared.clock.now_ms();
        let forgotten = self.shared.lock().forget(what, epoch, now_ms, Instant::now());
        self.shared.work.notify_one();
        forgotten
    }

    fn flush(&self, patience: Duration) -> Result<()> {
        self.settle(patience, "flush")
    }

    fn close(&self) -> Result<()> {
        if !self.process.is_current() {
            return Ok(());
        }
        self.shared.lock().is_closed = true;
        let closed = self.settle(CLOSE_PATIENCE, "close");
        self.shared.lock().is_ended = true;
        closed
    }

    fn stats(&self) -> TierStats {
        let state = self.shared.lock();
        let mut stats = state.counters.clone();
        self.name().clone_into(&mut stats.name);
        stats.entries = state.index.len() as u64;
        stats.used_bytes = state.used_bytes();
        stats.capacity_bytes = self.shared.capacity_bytes;
        stats.index_bytes = state.index.memory_bytes() as u64;
        stats.queued_bytes = state.queued_bytes();
        stats.codec = self.shared.messages.codecs().name();
        stats.encrypted = self.shared.messages.are_encrypted();
        stats.failing = !self.shared.health.allows();
        stats
    }

    fn sweep(&self) {
        self.shared.sweep();
    }

    fn touch(&self, keys: &[BlockKey]) {
        let mut state = self.shared.lock();
        keys.iter().for_each(|key| state.index.touch(key));
    }

    fn is_stuck(&self) -> bool {
        !self.shared.health.allows()
    }

    fn report_to(&self, reports: Reports) {
        self.shared.lock().reports = Some(reports);
    }

    fn lossy(&self, namespace: NamespaceId) -> Option<&'static str> {
        self.shared.messages.codecs().lossy(namespace)
    }

    fn layers(&self, namespace: NamespaceId) -> u32 {
        self.shared.lock().layers(namespace)
    }
}

impl Drop for RemoteTier {
    fn drop(&mut self) {
        let runtime = self.runtime.get_mut().map_or_else(|error| error.into_inner().take(), Option::take);
        if !self.process.is_current() {
            // A child has none of its threads.
            return std::mem::forget(runtime);
        }
        if let Err(error) = self.close() {
            tracing::warn!(error = %OneLine(&error), "the remote tier was not closed cleanly");
        }
        runtime.into_iter().for_each(Runtime::shutdown_background);
    }
}

impl fmt::Debug for RemoteTier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RemoteTier").field("store", &self.shared.store).finish_non_exhaustive()
    }
}
