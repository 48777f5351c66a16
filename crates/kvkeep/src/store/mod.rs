//! The store: sealed objects under keys, in one arena, under one cap. Both front doors
//! ([`KvCache`](crate::KvCache) by tokens, [`SimpleKvCache`](crate::SimpleKvCache) by
//! prefix text) only make keys for it.
//!
//! One lock guards the index, the policy and the free pages, and is never held while
//! payload bytes are copied: writers copy into pages that only they have
//! ([`Pending`]), readers out of pages that cannot be freed ([`Pin`]). Shards with a
//! lock each were the alternative: the blocks of one prompt would lie in all of them,
//! and a lookup of 512 blocks takes one lock 512 times over instead of once.

mod guard;
pub(crate) mod state;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::{Clock, duration_ms};
use crate::config::{CacheConfig, StoreOptions};
use crate::error::{Rejection, Result};
use crate::eviction::Place;
use crate::index::{NEVER, PairSpec};
use crate::key::{NamespaceId, ObjectKey, PrefixHash};
use crate::record::TraceRecorder;
use crate::stats::Stats;
use crate::sync::Mutex;
use crate::tier::ram::{self, Arena};

pub(crate) use guard::{Pending, Pin, PrivatePin};
pub(crate) use state::{Request, Wanted};
use state::{State, Written};

/// Keyed, sealed objects in RAM under one cap. Cheap to clone: clones share everything.
///
/// Make one and put both front doors over it, or let each door make its own.
#[derive(Clone)]
pub struct Store(Arc<Shared>);

/// What all clones, pins and pending objects share.
pub(crate) struct Shared {
    state: Mutex<State>,
    arena: Arena,
    clock: Arc<dyn Clock>,
    default_ttl: Option<Duration>,
    recorder: Option<Arc<TraceRecorder>>,
}

/// What was taken out of the cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Removed {
    /// Entries that can no longer be found.
    pub entries: u64,
    /// Their bytes, in whole pages. Pinned ones are freed when the last pin is dropped.
    pub bytes: u64,
}

/// One object to be sealed.
pub(crate) struct Sealing {
    pub(crate) key: ObjectKey,
    pub(crate) pending: Pending,
    pub(crate) spec: Option<Arc<PairSpec>>,
    /// The key of the block before it in its chain.
    pub(crate) parent: Option<ObjectKey>,
    pub(crate) place: Place,
}

/// What [`Store::reserve`] found and made for a run of keys.
pub(crate) struct Reserved {
    /// Those already there, pinned.
    pub(crate) present: Pin,
    /// Position in the run and pages for each that is missing, up to the first rejection.
    pub(crate) missing: Vec<(usize, Pending)>,
    /// Why the rest was not admitted; positions stand for tokens.
    pub(crate) rejection: Option<Rejection>,
}

/// What happens to an object that is already there under the same key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnPresent {
    /// The new one takes its place.
    Replace,
    /// It stays; equal keys mean equal bytes.
    Keep,
}

impl Store {
    /// Opens a store. Address space is reserved now, memory is committed as it is used.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for a capacity below one page (4 KiB) or
    /// beyond 16 TiB, [`Error::Memory`](crate::Error::Memory) if it cannot be reserved.
    pub fn new(config: CacheConfig) -> Result<Self> {
        let (arena, pages) = ram::reserve(config.capacity_bytes)?;
        Ok(Self(Arc::new(Shared {
            state: Mutex::new(State::new(pages, config.policy, &config.quotas)),
            arena,
            clock: config.clock,
            default_ttl: config.ttl,
            recorder: config.recorder,
        })))
    }

    /// Counters and sizes as of now. Sweeps what has expired first.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let now_ms = self.now_ms();
        let mut state = self.0.state.lock();
        state.sweep(now_ms);
        state.stats()
    }

    /// Removes everything. What is pinned can no longer be found and is freed with its last pin.
    pub fn clear(&self) -> Removed {
        self.0.state.lock().remove_where(|_| true)
    }

    /// Drops everything whose TTL has run out and says how many entries that were.
    /// Stores and [`Store::stats`] do it by themselves; a quiet cache may want a timer.
    pub fn sweep(&self) -> u64 {
        let now_ms = self.now_ms();
        self.0.state.lock().sweep(now_ms)
    }

    /// Removes all entries of one namespace.
    pub(crate) fn clear_namespace(&self, id: NamespaceId) -> Removed {
        let mut state = self.0.state.lock();
        match state.index().known_namespace(id) {
            Some(number) => state.remove_where(|entry| entry.namespace == number),
            None => Removed::default(),
        }
    }

    /// Removes these keys; says for each whether it was there.
    pub(crate) fn remove(&self, keys: &[ObjectKey]) -> (Removed, Vec<bool>) {
        let now_ms = self.now_ms();
        self.0.state.lock().remove(keys, now_ms)
    }

    /// Pins the longest run of resident objects from the first key on.
    pub(crate) fn pin_run(&self, keys: &[ObjectKey], request: Request) -> Pin {
        let now_ms = self.now_ms();
        let held = self.0.state.lock().hold_run(keys, now_ms, request);
        Pin::new(Arc::clone(&self.0), held)
    }

    /// Pins all of these objects or none.
    pub(crate) fn pin_all(&self, keys: &[ObjectKey], request: Request) -> Option<Pin> {
        let now_ms = self.now_ms();
        let held = self.0.state.lock().hold_all(keys, now_ms, request)?;
        Some(Pin::new(Arc::clone(&self.0), held))
    }

    pub(crate) fn prefix_lengths(&self, id: NamespaceId, max_bytes: usize) -> Vec<usize> {
        self.0.state.lock().index().prefix_lengths(id, max_bytes)
    }

    /// Layers of a named cache: one more than the highest one stored.
    pub(crate) fn layers(&self, id: NamespaceId) -> u32 {
        self.0.state.lock().index().layers(id)
    }

    /// The length that goes with the first of these prefixes of which any layer is there.
    pub(crate) fn first_stored(&self, id: NamespaceId, prefixes: &[(usize, PrefixHash)]) -> Option<usize> {
        let now_ms = self.now_ms();
        let mut state = self.0.state.lock();
        let layers = state.index().layers(id);
        let mut stored =
            |prefix: &PrefixHash| (0..layers).any(|layer| state.find_live(&prefix.key(layer), now_ms).is_some());
        prefixes.iter().find(|(_, prefix)| stored(prefix)).map(|(length, _)| *length)
    }

    /// Counts a pin as a request after the fact.
    pub(crate) fn count(&self, pin: &Pin, request: Request) {
        self.0.state.lock().count(request, pin.held());
    }

    /// Pages for each of `sizes_bytes`, all or nothing.
    pub(crate) fn reserve_all(&self, namespace: NamespaceId, sizes_bytes: &[usize]) -> Result<Vec<Pending>, Rejection> {
        let now_ms = self.now_ms();
        let extents = self.0.state.lock().reserve_all(namespace, sizes_bytes, now_ms)?;
        Ok(extents.into_iter().map(|extent| Pending::new(Arc::clone(&self.0), extent)).collect())
    }

    /// Pins what is there of a chain and makes room for the rest, head first. What is
    /// missing before the first position given cannot be written and ends it.
    pub(crate) fn reserve(&self, namespace: NamespaceId, keys: &[ObjectKey], wanted: Wanted) -> Reserved {
        let now_ms = self.now_ms();
        let (present, missing, rejection) = self.0.state.lock().reserve(namespace, keys, wanted, now_ms);
        let pending = |(position, extent)| (position, Pending::new(Arc::clone(&self.0), extent));
        Reserved {
            present: Pin::new(Arc::clone(&self.0), present),
            missing: missing.into_iter().map(pending).collect(),
            rejection,
        }
    }

    /// Makes written objects findable, all at once; says how many are new.
    /// The first of them counts as the most recently used.
    pub(crate) fn seal(
        &self,
        namespace: NamespaceId,
        objects: Vec<Sealing>,
        options: &StoreOptions,
        on_present: OnPresent,
    ) -> usize {
        let now_ms = self.now_ms();
        let expires_at_ms =
            options.ttl.or(self.0.default_ttl).map_or(NEVER, |ttl| now_ms.saturating_add(duration_ms(ttl)));
        let share = options
            .compute_time
            .map_or(Duration::ZERO, |time| time / u32::try_from(objects.len()).unwrap_or(u32::MAX).max(1));
        let compute_us = u32::try_from(share.as_micros()).unwrap_or(u32::MAX);
        let written = objects.into_iter().filter_map(|Sealing { key, pending, spec, parent, place }| {
            let entry = state::new_entry(key, pending.into_extent()?, expires_at_ms, spec, compute_us);
            Some(Written { entry, parent, place })
        });
        self.0.state.lock().seal_all(namespace, written, on_present, options.priority)
    }

    /// Writes a request of the token door to the trace, if there is one.
    pub(crate) fn record(&self, tokens: usize, keys: &[ObjectKey]) {
        if let Some(recorder) = &self.0.recorder {
            recorder.request(self.now_ms(), tokens, keys.iter().map(ObjectKey::table_hash));
        }
    }

    fn now_ms(&self) -> u64 {
        self.0.clock.now_ms()
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Store").field(&self.stats()).finish()
    }
}
