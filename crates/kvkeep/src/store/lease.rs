//! Leases: pins with an owner, a name and an end, for holders that are not values of this process: an operator, a client
//! on another machine.
//!
//! A [`Pin`] ends when it is dropped. A lease has an id that can be sent and kept, and ends when its holder says so, when its
//! time is over by the store's clock, or when what it holds is removed. Its epoch is the store's: an id from before
//! a restart names nothing, and never another's lease.
//!
//! Invariants:
//! - Leases together hold at most a part of RAM, each block counted once, so that requests always have room.
//! - No pin is dropped under this lock: that takes the ledger's.
//!
//! Pins with a time of their own were the alternative: then each lookup would pay for what few of them need.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::Store;
use super::guard::Pin;
use crate::chain::Chain;
use crate::clock::duration_ms;
use crate::error::{Error, Result};
use crate::eviction::EntryId;
use crate::index::{Index, NEVER};
use crate::key::{NamespaceId, ObjectKey};
use crate::sync::Mutex;
use crate::tier::ram::PAGE_BYTES;

/// Leases hold at most this part of RAM.
const LIMIT_DIVISOR: u64 = 2;

/// The name of a lease: of one store, for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LeaseId {
    /// Of the store that gave it: another one knows nothing of it.
    epoch: u64,
    number: u64,
}

/// A run of blocks that stays in RAM until this ends.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Lease {
    /// Its name.
    pub id: LeaseId,
    /// Who asked for it.
    pub owner: String,
    /// What its blocks belong to.
    pub namespace: NamespaceId,
    /// Blocks that it holds, from the first of its chain on.
    pub blocks: usize,
    /// Their tokens.
    pub tokens: usize,
    /// When it ends by itself, in milliseconds since the Unix epoch; `None` for never.
    pub expires_at_ms: Option<u64>,
}

/// What all leases hold together, each block counted once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Leased {
    /// Leases.
    pub leases: usize,
    /// Tokens of their blocks.
    pub tokens: usize,
    /// Bytes of their blocks, in whole pages.
    pub bytes: u64,
}

/// All leases of a store.
#[derive(Debug)]
pub(super) struct Leases {
    epoch: u64,
    limit_bytes: u64,
    table: Mutex<Table>,
    /// When the first of them ends, or earlier: looking at it costs a request less than the lock.
    next_end_ms: AtomicU64,
}

#[derive(Debug, Default)]
struct Table {
    last_number: u64,
    by_number: BTreeMap<u64, Held>,
    /// How many leases hold a block.
    blocks: HashMap<ObjectKey, usize>,
    sum: Leased,
}

#[derive(Debug)]
struct Held {
    lease: Lease,
    keys: Vec<ObjectKey>,
    block_tokens: usize,
    block_bytes: u64,
    _pin: Pin,
}

impl Store {
    /// Keeps the longest run of resident blocks of a chain in RAM for `owner`, until [`Store::end_lease`], or for `ttl` at
    /// most; what is in a tier and worth it is loaded first. Not a request. Says how much it holds: that may be nothing.
    ///
    /// # Errors
    /// [`Error::LeasesFull`] if leases would hold more than half of RAM; [`Error::Forked`].
    pub fn lease(&self, chain: &Chain, owner: impl Into<String>, ttl: Option<Duration>) -> Result<Lease> {
        self.here()?;
        self.end_expired();
        let (owner, chain) = (owner.into(), &self.own(chain));
        loop {
            let (lease, entries) = self.lease_once(chain, &owner, ttl)?;
            // What was removed before the lease could be seen has not ended it.
            let is_there =
                |index: &Index| chain.keys().iter().zip(&entries).all(|(key, id)| index.find(key) == Some(*id));
            if self.shared.with(|ledger| is_there(ledger.index())) || !self.end_lease(lease.id) {
                return Ok(lease);
            }
        }
    }

    /// Says which entries it holds, too.
    fn lease_once(&self, chain: &Chain, owner: &str, ttl: Option<Duration>) -> Result<(Lease, Vec<EntryId>)> {
        let (pin, _) = self.pin_run(chain.namespace().id(), chain.keys(), super::Request::Uncounted);
        let expires_at_ms = ttl.map(|ttl| self.shared.now_ms().saturating_add(duration_ms(ttl)));
        let keys = chain.keys().get(..pin.len()).unwrap_or_default().to_vec();
        let layout = chain.namespace().layout();
        let lease = Lease {
            id: LeaseId { epoch: self.leases.epoch, number: 0 },
            owner: owner.to_owned(),
            namespace: chain.namespace().id(),
            blocks: keys.len(),
            tokens: keys.len() * layout.block_tokens(),
            expires_at_ms,
        };
        let block_bytes = (layout.block_bytes() as u64).next_multiple_of(PAGE_BYTES as u64);
        let entries = pin.held().iter().map(|held| held.id).collect();
        let held = Held { lease, keys, block_tokens: layout.block_tokens(), block_bytes, _pin: pin };
        // Here, without the table's lock, the pin of a refused one is dropped.
        self.leases.add(held).map(|lease| (lease, entries)).map_err(|refused| refused.1)
    }

    /// A lease goes on for so long from now, or without end; `None` if it has ended.
    pub fn renew_lease(&self, id: LeaseId, ttl: Option<Duration>) -> Option<Lease> {
        self.here().ok()?;
        self.end_expired();
        let expires_at_ms = ttl.map(|ttl| self.shared.now_ms().saturating_add(duration_ms(ttl)));
        self.leases.renew(id, expires_at_ms)
    }

    /// Lets go of a lease; says whether it was one.
    pub fn end_lease(&self, id: LeaseId) -> bool {
        self.end_leases(|lease| lease.id == id) > 0
    }

    /// Lets go of leases; says how many.
    pub fn end_leases(&self, which: impl Fn(&Lease) -> bool) -> usize {
        if self.here().is_err() {
            return 0;
        }
        let ended = self.leases.take(|held| which(&held.lease));
        // Here, without the table's lock.
        ended.len()
    }

    /// The leases that go on, oldest first.
    #[must_use]
    pub fn leases(&self) -> Vec<Lease> {
        if self.here().is_err() {
            return Vec::new();
        }
        self.end_expired();
        self.leases.table.lock().by_number.values().map(|held| held.lease.clone()).collect()
    }

    /// What all leases hold together.
    #[must_use]
    pub fn leased(&self) -> Leased {
        if self.here().is_err() {
            return Leased::default();
        }
        self.end_expired();
        self.leases.table.lock().sum
    }

    /// Lets go of leases whose time is over.
    pub(super) fn end_expired(&self) {
        let now_ms = self.shared.now_ms();
        if self.leases.next_end_ms.load(Ordering::Relaxed) <= now_ms {
            drop(self.leases.take(|held| held.lease.expires_at_ms.is_some_and(|at_ms| at_ms <= now_ms)));
        }
    }

    /// What was removed is not held any more.
    pub(super) fn end_leases_of(&self, keys: &[ObjectKey]) {
        let is_held = {
            let table = self.leases.table.lock();
            !table.by_number.is_empty() && keys.iter().any(|key| table.blocks.contains_key(key))
        };
        if is_held {
            let keys: std::collections::HashSet<&ObjectKey> = keys.iter().collect();
            drop(self.leases.take(|held| held.keys.iter().any(|key| keys.contains(key))));
        }
    }
}

impl Leases {
    pub(super) fn new(epoch: u64, capacity_bytes: u64) -> Self {
        let limit_bytes = capacity_bytes / LIMIT_DIVISOR;
        Self { epoch, limit_bytes, table: Mutex::default(), next_end_ms: AtomicU64::new(NEVER) }
    }

    /// Gives it back if leases would hold too much: it is dropped without the lock.
    fn add(&self, mut held: Held) -> Result<Lease, Box<(Held, Error)>> {
        let mut table = self.table.lock();
        let new = held.keys.iter().filter(|key| !table.blocks.contains_key(*key)).count();
        let needed_bytes = table.sum.bytes + new as u64 * held.block_bytes;
        if needed_bytes > self.limit_bytes {
            let error = Error::LeasesFull { needed_bytes, limit_bytes: self.limit_bytes };
            return Err(Box::new((held, error)));
        }
        table.last_number += 1;
        held.lease.id.number = table.last_number;
        for key in &held.keys {
            *table.blocks.entry(*key).or_insert(0) += 1;
        }
        table.sum.leases += 1;
        table.sum.tokens += new * held.block_tokens;
        table.sum.bytes = needed_bytes;
        let lease = held.lease.clone();
        table.by_number.insert(lease.id.number, held);
        self.next_end_ms.fetch_min(lease.expires_at_ms.unwrap_or(NEVER), Ordering::Relaxed);
        Ok(lease)
    }

    fn renew(&self, id: LeaseId, expires_at_ms: Option<u64>) -> Option<Lease> {
        let mut table = self.table.lock();
        let held = table.by_number.get_mut(&id.number).filter(|held| held.lease.id == id)?;
        held.lease.expires_at_ms = expires_at_ms;
        self.next_end_ms.fetch_min(expires_at_ms.unwrap_or(NEVER), Ordering::Relaxed);
        Some(held.lease.clone())
    }

    /// Takes leases out. Whoever gets them drops them.
    fn take(&self, which: impl Fn(&Held) -> bool) -> Vec<Held> {
        let mut table = self.table.lock();
        let Table { by_number, blocks, sum, .. } = &mut *table;
        let taken: Vec<Held> = by_number.extract_if(.., |_, held| which(held)).map(|(_, held)| held).collect();
        for held in &taken {
            sum.leases -= 1;
            for key in &held.keys {
                let Some(holders) = blocks.get_mut(key) else { continue };
                *holders -= 1;
                if *holders == 0 {
                    blocks.remove(key);
                    sum.tokens -= held.block_tokens;
                    sum.bytes -= held.block_bytes;
                }
            }
        }
        let ends = by_number.values().filter_map(|held| held.lease.expires_at_ms);
        self.next_end_ms.store(ends.min().unwrap_or(NEVER), Ordering::Relaxed);
        taken
    }
}

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}{:016x}", self.epoch, self.number)
    }
}

/// Reads what `Display` writes.
impl FromStr for LeaseId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let part = |range: std::ops::Range<usize>| {
            let digits = text.get(range)?;
            let right = digits.len() == 16 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
            u64::from_str_radix(digits, 16).ok().filter(|_| right)
        };
        let both = (text.len() == 32).then(|| Some(Self { epoch: part(0..16)?, number: part(16..32)? }));
        both.flatten().ok_or_else(|| Error::BadLeaseId(text.chars().take(80).collect()))
    }
}
