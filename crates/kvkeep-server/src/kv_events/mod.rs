//! Which blocks are where, for routers: the cache's events over ZeroMQ, in vLLM's wire format.
//!
//! A batch is a message of three parts: the topic, its number (eight bytes, big-endian) and its events. Whoever missed
//! some asks for them by number at a socket of its own, as at vLLM's.
//!
//! Invariant: nothing waits for a reader. What readers have not taken yet is bounded in bytes; beyond that, all of them
//! are cut off, and those that read connect again. The batch that did not fit is counted, and its number is missing to
//! all, so that they ask for it. Bounding each reader alone was the alternative: the ZeroMQ library bounds their
//! queues in messages, and a hundred thousand batches are no bound in memory.

mod endpoint;
mod log;
mod publisher;
mod wire;

use std::fmt;
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::SystemTime;

use bytes::Bytes;
use kvkeep::{Event, EventSink};
use tokio::sync::Notify;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

pub use self::endpoint::Endpoint;
use self::log::Log;
use self::publisher::{Listeners, Order, Publisher};
use self::wire::Told;
use crate::error::ServerError;

/// What readers may have left unread, of all of them together.
const MAX_UNREAD_BYTES: usize = 64 << 20;

/// How the cache's events are published.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct KvEventsConfig {
    /// Where readers subscribe.
    pub endpoint: Endpoint,
    /// Where they ask for what they missed.
    pub replay: Option<Endpoint>,
    /// The first part of every message. Empty, as vLLM's, unless it is set.
    pub topic: String,
    /// Whether the tokens of blocks are published too: what people wrote, of all tenants.
    pub tokens: bool,
    /// Whether the endpoints may be ones that other machines reach. ZeroMQ asks them for no key.
    pub anyone: bool,
}

impl KvEventsConfig {
    /// Hashes alone, at this endpoint.
    #[must_use]
    pub fn new(endpoint: Endpoint) -> Self {
        Self { endpoint, replay: None, topic: String::new(), tokens: false, anyone: false }
    }
}

/// Batches of events, since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct KvEventsCounts {
    /// Batches, those included that were dropped.
    pub published_total: u64,
    /// Batches that were not sent, because readers had left too much unread. They can be asked for.
    pub dropped_total: u64,
    /// How often all readers were cut off for that.
    pub cut_off_total: u64,
    /// Requests for what was missed.
    pub replays_total: u64,
}

/// Publishes until it is dropped. Events come from the cache that [`KvEvents::sink`] is given to.
#[derive(Debug)]
pub struct KvEvents {
    shared: Arc<Shared>,
    sink: Arc<Sink>,
    address: SocketAddr,
    replay_address: Option<SocketAddr>,
    thread: Option<JoinHandle<()>>,
}

/// What is counted, for who shows it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct KvEventsMeter(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    topic: Bytes,
    max_unread_bytes: usize,
    log: Mutex<Log>,
    /// Of batches that some reader has not taken yet: as they came, and as they were asked for again.
    unread_bytes: Arc<AtomicUsize>,
    replayed_unread_bytes: Arc<AtomicUsize>,
    published: AtomicU64,
    dropped: AtomicU64,
    cut_off: AtomicU64,
    replays: AtomicU64,
    /// Readers have left too much unread.
    too_much: Notify,
}

/// The cache's listener.
struct Sink {
    shared: Arc<Shared>,
    wants_tokens: bool,
    told: Mutex<Told>,
    publisher: UnboundedSender<Order>,
}

impl KvEvents {
    /// Begins to listen.
    ///
    /// # Errors
    /// [`ServerError`], if an address cannot be had, or others could read there.
    pub fn bind(config: &KvEventsConfig) -> Result<Self, ServerError> {
        Self::bind_with(config, MAX_UNREAD_BYTES)
    }

    fn bind_with(config: &KvEventsConfig, max_unread_bytes: usize) -> Result<Self, ServerError> {
        let events = listen(&config.endpoint, config.anyone)?;
        let replay = config.replay.as_ref().map(|endpoint| listen(endpoint, config.anyone)).transpose()?;
        let address = |listener: &TcpListener| listener.local_addr().map_err(ServerError::KvEvents);
        let (at, replay_at) = (address(&events)?, replay.as_ref().map(address).transpose()?);
        let shared = Arc::new(Shared::new(&config.topic, max_unread_bytes));
        let (publisher, orders) = unbounded_channel();
        let sink = Sink { shared: Arc::clone(&shared), wants_tokens: config.tokens, told: Mutex::default(), publisher };
        let publishing = Publisher::new(Arc::clone(&shared), Listeners { events, replay }, orders);
        let thread = std::thread::Builder::new().name("kvkeep-events".to_owned()).spawn(move || publishing.run());
        let thread = Some(thread.map_err(ServerError::Threads)?);
        Ok(Self { shared, sink: Arc::new(sink), address: at, replay_address: replay_at, thread })
    }

    /// The listener for [`kvkeep::CacheConfig::events`].
    #[must_use]
    pub fn sink(&self) -> Arc<dyn EventSink> {
        Arc::clone(&self.sink) as Arc<dyn EventSink>
    }

    /// What is counted.
    #[must_use]
    pub fn meter(&self) -> KvEventsMeter {
        KvEventsMeter(Arc::clone(&self.shared))
    }

    /// Where readers subscribe; the port is a real one even if 0 was asked for.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where they ask for what they missed.
    #[must_use]
    pub fn replay_address(&self) -> Option<SocketAddr> {
        self.replay_address
    }
}

impl Drop for KvEvents {
    /// Readers are given a second to take what is left.
    fn drop(&mut self) {
        // Fails only where the thread has ended already.
        drop(self.sink.publisher.send(Order::End));
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::warn!("publishing KV events ended with a panic");
        }
    }
}

impl KvEventsMeter {
    /// As of now.
    #[must_use]
    pub fn counts(&self) -> KvEventsCounts {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        KvEventsCounts {
            published_total: of(&self.0.published),
            dropped_total: of(&self.0.dropped),
            cut_off_total: of(&self.0.cut_off),
            replays_total: of(&self.0.replays),
        }
    }
}

impl Shared {
    fn new(topic: &str, max_unread_bytes: usize) -> Self {
        Self {
            topic: Bytes::copy_from_slice(topic.as_bytes()),
            max_unread_bytes,
            log: Mutex::default(),
            unread_bytes: Arc::default(),
            replayed_unread_bytes: Arc::default(),
            published: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            cut_off: AtomicU64::new(0),
            replays: AtomicU64::new(0),
            too_much: Notify::new(),
        }
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl EventSink for Sink {
    fn publish(&self, events: Vec<Event>) {
        let events = self.told.lock().unwrap_or_else(PoisonError::into_inner).translate(events);
        if events.is_empty() {
            return;
        }
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_secs_f64();
        match wire::encode(now, &events) {
            Ok(batch) => self.send(batch.into()),
            Err(error) => tracing::warn!(%error, "a batch of KV events could not be written"),
        }
    }

    fn wants_tokens(&self) -> bool {
        self.wants_tokens
    }

    fn wants_recovered(&self) -> bool {
        true
    }
}

impl Sink {
    fn send(&self, batch: Bytes) {
        let number = self.shared.log().push(batch.clone());
        self.shared.published.fetch_add(1, Ordering::Relaxed);
        if self.shared.unread_bytes.load(Ordering::Relaxed) > self.shared.max_unread_bytes {
            self.shared.dropped.fetch_add(1, Ordering::Relaxed);
            self.shared.too_much.notify_one();
            return;
        }
        // Fails only where the server ends.
        drop(self.publisher.send(Order::Batch(number, unread(batch, &self.shared.unread_bytes))));
    }
}

impl fmt::Debug for Sink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvEvents").field("wants_tokens", &self.wants_tokens).finish_non_exhaustive()
    }
}

/// A batch that counts as unread until nobody has to be sent it any more.
fn unread(batch: Bytes, counted: &Arc<AtomicUsize>) -> Bytes {
    counted.fetch_add(batch.len(), Ordering::Relaxed);
    Bytes::from_owner(Unread { batch, counted: Arc::clone(counted) })
}

struct Unread {
    batch: Bytes,
    counted: Arc<AtomicUsize>,
}

impl AsRef<[u8]> for Unread {
    fn as_ref(&self) -> &[u8] {
        &self.batch
    }
}

impl Drop for Unread {
    fn drop(&mut self) {
        self.counted.fetch_sub(self.batch.len(), Ordering::Relaxed);
    }
}

fn listen(endpoint: &Endpoint, anyone: bool) -> Result<TcpListener, ServerError> {
    let address = endpoint.address();
    if !anyone && !address.ip().is_loopback() {
        return Err(ServerError::KvEventsOpen(address));
    }
    let listen = || {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    };
    listen().map_err(|source| ServerError::KvEventsListen { address, source })
}

#[cfg(test)]
mod tests;
