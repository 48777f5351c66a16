//! Priorities and quotas, for every policy: entries of one share of the cache and one priority
//! are in a pool, each pool has a policy of its own, and this layer chooses the pool that gives.
//!
//! First comes the share that is furthest over what it is due, counting the newcomer for its own
//! share. Whoever is at or under its share loses nothing to one that is over its own: a request
//! that is larger than its share is refused what it lacks. In the share that gives, what is to be
//! dropped first goes before what is normal, and that before what is to be kept longer.
//!
//! A chain's blocks never have a lower priority than the ones behind them: storing raises what
//! comes before. Quotas inside each policy were the alternative: five times the code, and a
//! policy's statistics would mix the tenants.
//!
//! Without quotas and priorities there is one pool, whose ids are the entries' own.

use super::{Arrival, Departure, EntryId, Place, Policy, PolicyKind};
use crate::slots::Slots;

/// How long an entry is kept compared to others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Priority {
    /// Goes before everything else in its share of the cache.
    DropFirst,
    /// As the policy decides.
    #[default]
    Normal,
    /// Goes when nothing else in its share of the cache is left to go.
    KeepLonger,
}

/// The number of a share: 0 for all namespaces without a quota, together.
pub(crate) type ShareId = usize;

#[derive(Debug)]
pub(crate) struct Shares {
    kind: PolicyKind,
    pools: Vec<Pool>,
    shares: Vec<Share>,
    /// Of all shares together.
    weight: f64,
    /// Where entries outside the first pool are; nothing is kept while that is the only one.
    homes: Slots<Home>,
}

#[derive(Debug)]
struct Share {
    weight: f64,
    pages: u64,
    /// By priority.
    pools: [Option<usize>; 3],
}

#[derive(Debug)]
struct Pool {
    policy: Box<dyn Policy>,
    share: ShareId,
    priority: Priority,
    /// The entries of the policy's ids, and the ids that are free. Unused in the first pool.
    entries: Vec<EntryId>,
    free: Vec<EntryId>,
}

#[derive(Debug, Clone, Copy)]
struct Home {
    pool: u32,
    /// The id in that pool's policy.
    id: EntryId,
}

impl Shares {
    /// Shares of these weights; the first is that of everybody without a quota.
    pub(crate) fn new(kind: PolicyKind, weights: impl IntoIterator<Item = f64>) -> Self {
        let share = |weight| Share { weight, pages: 0, pools: [None; 3] };
        let mut shares: Vec<Share> = std::iter::once(share(1.0)).chain(weights.into_iter().map(share)).collect();
        if let Some(first) = shares.first_mut() {
            first.pools = [None, Some(0), None];
        }
        let first = Pool::new(kind, 0, Priority::Normal);
        let weight = shares.iter().map(|share| share.weight).sum();
        Self { kind, pools: vec![first], shares, weight, homes: Slots::default() }
    }

    pub(crate) fn tick(&mut self) {
        self.pools.iter_mut().for_each(|pool| pool.policy.tick());
    }

    /// New entries of one request, in the order of their chain, of so many pages each.
    pub(crate) fn insert_run(
        &mut self,
        run: &mut [(EntryId, Arrival)],
        pages: impl Fn(EntryId) -> u32,
        share: ShareId,
        priority: Priority,
    ) {
        let number = self.pool(share, priority);
        if let Some(share) = self.shares.get_mut(share) {
            share.pages += run.iter().map(|(id, _)| u64::from(pages(*id))).sum::<u64>();
        }
        if self.pools.len() > 1 {
            self.settle(run, number);
        }
        if let Some(pool) = self.pools.get_mut(number) {
            pool.policy.insert_run(run);
        }
    }

    /// An entry came before the one that it continues.
    pub(crate) fn link(&mut self, id: EntryId, parent: EntryId) {
        // Parents in other pools are none.
        if self.number(id) == self.number(parent)
            && let Some((_, parent)) = self.home(parent)
            && let Some((pool, id)) = self.home(id)
        {
            pool.policy.link(id, parent);
        }
    }

    pub(crate) fn touch(&mut self, id: EntryId, place: Place) {
        if let Some((pool, id)) = self.home(id) {
            pool.policy.touch(id, place);
        }
    }

    pub(crate) fn hold(&mut self, id: EntryId) {
        if let Some((pool, id)) = self.home(id) {
            pool.policy.hold(id);
        }
    }

    pub(crate) fn release(&mut self, id: EntryId) {
        if let Some((pool, id)) = self.home(id) {
            pool.policy.release(id);
        }
    }

    pub(crate) fn remove(&mut self, id: EntryId, pages: u32, why: Departure) {
        let number = self.number(id);
        let Some((pool, inner)) = self.home(id) else { return };
        pool.policy.remove(inner, why);
        if number > 0 {
            pool.free.push(inner);
        }
        let share = pool.share;
        if let Some(share) = self.shares.get_mut(share) {
            share.pages = share.pages.saturating_sub(u64::from(pages));
        }
    }

    pub(crate) fn priority(&self, id: EntryId) -> Priority {
        self.pools.get(self.number(id)).map_or(Priority::Normal, |pool| pool.priority)
    }

    /// A held entry is to be kept as long as what is stored behind it.
    pub(crate) fn raise(&mut self, id: EntryId, arrival: &Arrival, pages: u32, priority: Priority) {
        let Some((pool, _)) = self.home(id) else { return };
        let share = pool.share;
        self.remove(id, pages, Departure::Removed);
        self.insert_run(&mut [(id, *arrival)], |_| pages, share, priority);
        self.hold(id);
    }

    /// The entry to evict so that `pages` more of this share have room.
    pub(crate) fn victim(&mut self, share: ShareId, pages: u32, capacity_pages: u32) -> Option<EntryId> {
        if self.pools.len() == 1 {
            return self.pools.first_mut()?.policy.victim();
        }
        let coming = |number| if number == share { pages } else { 0 };
        let over = |number| (self.over(number, coming(number), capacity_pages), number);
        let mut order: Vec<(f64, ShareId)> = (0..self.shares.len()).map(over).collect();
        order.sort_by(|a, b| b.0.total_cmp(&a.0));
        let is_due = self.over(share, pages, capacity_pages) <= 0.0;
        order.into_iter().filter(|(over, _)| is_due || *over > 0.0).find_map(|(_, share)| self.victim_of(share))
    }

    /// The pages that a share is due, if `pages` more of it would be too many.
    pub(crate) fn exceeded(&self, share: ShareId, pages: u32, capacity_pages: u32) -> Option<f64> {
        let is_over = self.shares.len() > 1 && self.over(share, pages, capacity_pages) > 0.0;
        is_over.then(|| self.due(share, capacity_pages))
    }

    fn due(&self, share: ShareId, capacity_pages: u32) -> f64 {
        f64::from(capacity_pages) * self.shares.get(share).map_or(0.0, |share| share.weight) / self.weight
    }

    /// Pages by which a share is over its due once it has `coming` more.
    fn over(&self, share: ShareId, coming: u32, capacity_pages: u32) -> f64 {
        let pages = self.shares.get(share).map_or(0, |share| share.pages) + u64::from(coming);
        pages_as_float(pages) - self.due(share, capacity_pages)
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        let pools = self.pools.iter().map(|pool| {
            let ids = (pool.entries.capacity() + pool.free.capacity()) * size_of::<EntryId>();
            pool.policy.memory_bytes() + ids
        });
        pools.sum::<usize>() + self.homes.memory_bytes()
    }

    fn victim_of(&mut self, share: ShareId) -> Option<EntryId> {
        let pools = self.shares.get(share)?.pools;
        pools.into_iter().flatten().find_map(|number| {
            let pool = self.pools.get_mut(number)?;
            let id = pool.policy.victim()?;
            if number == 0 { Some(id) } else { pool.entries.get(id as usize).copied() }
        })
    }

    /// The pool of a share and priority, new if need be.
    fn pool(&mut self, share: ShareId, priority: Priority) -> usize {
        let next = self.pools.len();
        let slot = self.shares.get_mut(share).and_then(|share| share.pools.get_mut(priority as usize));
        let Some(slot) = slot else { return 0 };
        let number = *slot.get_or_insert(next);
        if number == next {
            self.pools.push(Pool::new(self.kind, share, priority));
        }
        number
    }

    /// Gives the entries of a run ids of their pool; parents in other pools are none.
    fn settle(&mut self, run: &mut [(EntryId, Arrival)], number: usize) {
        let pool_number = u32::try_from(number).unwrap_or(u32::MAX);
        for (entry, arrival) in run.iter_mut() {
            arrival.parent = arrival.parent.and_then(|parent| match self.homes.get(parent) {
                Some(home) if home.pool > 0 => (home.pool == pool_number).then_some(home.id),
                _ => (number == 0).then_some(parent),
            });
            let Some(pool) = self.pools.get_mut(number) else { return };
            let id = if number == 0 { *entry } else { pool.new_id(*entry) };
            // Slots that this skips over belong to entries of the first pool, or to nobody.
            if let Some(home) = self.homes.grow(*entry, Home { pool: 0, id: 0 }) {
                *home = Home { pool: pool_number, id };
            }
            *entry = id;
        }
    }

    fn number(&self, id: EntryId) -> usize {
        self.homes.get(id).map_or(0, |home| home.pool as usize)
    }

    fn home(&mut self, id: EntryId) -> Option<(&mut Pool, EntryId)> {
        match self.homes.get(id) {
            Some(home) if home.pool > 0 => Some((self.pools.get_mut(home.pool as usize)?, home.id)),
            _ => Some((self.pools.first_mut()?, id)),
        }
    }
}

impl Pool {
    fn new(kind: PolicyKind, share: ShareId, priority: Priority) -> Self {
        Self { policy: kind.make(), share, priority, entries: Vec::new(), free: Vec::new() }
    }

    fn new_id(&mut self, entry: EntryId) -> EntryId {
        let id = self.free.pop().unwrap_or_else(|| {
            self.entries.push(entry);
            EntryId::try_from(self.entries.len() - 1).unwrap_or(EntryId::MAX)
        });
        if let Some(slot) = self.entries.get_mut(id as usize) {
            *slot = entry;
        }
        id
    }
}

#[expect(clippy::cast_precision_loss, reason = "pages are below 2^32")]
fn pages_as_float(pages: u64) -> f64 {
    pages as f64
}
