//! The tiers behind RAM, and what goes down to them.
//!
//! What the ledger says is offered to every tier, after the lock is let go. An offered entry keeps its pages until
//! every tier has dropped its payload, and can be found all the time. A store that needs those pages waits for the
//! writes, as long as `patience` allows; after that the writes that have not begun are given up.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use super::ledger::{Held, Leaving, Ledger, SLICE, Shortage};
use super::tiers::{Late, Tiers};
use super::{Shared, Store};
use crate::block::Content;
use crate::clock::Deadline;
use crate::error::{Error, OneLine, Result};
use crate::tier::{Offer, Payload, Tier};

/// How often a store tries again after it has given up what was queued, because what it evicts is queued too.
const LAST_TRIES: usize = 4;

/// The pages of an entry that was offered.
struct Leaver {
    shared: Arc<Shared>,
    held: Option<Held>,
    mark: u8,
    tiers: usize,
    /// How many of the tiers have it, and whether one has it since now.
    have_it: AtomicUsize,
    is_new: AtomicBool,
}

impl Payload for Leaver {
    fn bytes(&self) -> &[u8] {
        self.held.as_ref().map_or(&[], |held| self.shared.arena.bytes(&held.grant))
    }

    fn written(&self, is_new: bool) {
        self.is_new.fetch_or(is_new, Ordering::Relaxed);
        self.have_it.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for Leaver {
    fn drop(&mut self) {
        if let Some(held) = self.held.take()
            && self.shared.process.is_current()
        {
            let (have_it, new_as) = (*self.have_it.get_mut(), self.is_new.get_mut().then_some(self.mark));
            let tiers = self.tiers;
            self.shared.with(|ledger| {
                if have_it > 0 {
                    ledger.is_below(&held, new_as);
                }
                if have_it >= tiers {
                    ledger.is_everywhere(&held);
                }
                ledger.release(vec![held]);
            });
        }
    }
}

impl Tiers {
    /// Offers what the ledger says, and waits for room in the tiers until the deadline at most.
    pub(super) fn offer(&self, deadline: Deadline) {
        let mut offers = self.to_offer();
        if offers.is_empty() {
            return;
        }
        let Some((last, others)) = self.all().split_last() else { return };
        for tier in others {
            drop(tier.offer(copies(&offers), deadline));
        }
        offers = last.offer(offers, deadline);
        drop(offers);
    }

    /// Offers what the ledger says, and waits for room in each tier as long as that gets on. Adds up what each one
    /// does not take.
    fn offer_patiently(&self, not_taken: &mut [usize]) {
        let offers = self.to_offer();
        for (tier, not_taken) in self.each().zip(not_taken) {
            let mut left = copies(&offers);
            while !left.is_empty() {
                let before = left.len();
                left = tier.offer(left, Deadline::after(self.timeouts().flush));
                if left.len() == before {
                    break;
                }
            }
            *not_taken += left.len();
        }
    }

    fn to_offer(&self) -> Vec<Offer> {
        if !self.shared().has_offers() {
            return Vec::new();
        }
        let leaving = self.shared().with(Ledger::take_offers);
        leaving.into_iter().filter_map(|leaving| self.describe_leaving(leaving)).collect()
    }

    /// What nobody can describe is not offered, and its pages are let go of.
    fn describe_leaving(&self, leaving: Leaving) -> Option<Offer> {
        let Leaving { mut meta, held, epoch, mark } = leaving;
        let leaver = Leaver {
            shared: Arc::clone(self.shared()),
            held: Some(held),
            mark,
            tiers: self.all().len(),
            have_it: AtomicUsize::new(0),
            is_new: AtomicBool::new(false),
        };
        if meta.content == Content::Nothing {
            let (layout, model) = self.models().lock().get(&meta.namespace).cloned()?;
            meta.content = Content::Block { layout, model };
        }
        Some(Offer { meta, epoch, mark, payload: Arc::new(leaver) })
    }

    /// Tries again, as often as pages come, until the deadline. What is queued in a tier that is stuck is given up at once.
    pub(super) fn wait_for_room<T>(
        &self,
        made: T,
        (deadline, late): (Deadline, Late),
        attempt: impl Fn(&mut Ledger) -> T,
        shortage: impl Fn(&T) -> Option<Shortage>,
    ) -> T {
        let mut made = made;
        let mut tries = LAST_TRIES;
        while shortage(&made) == Some(Shortage::Coming) && tries > 0 {
            // What it has goes back, so that it can be had again.
            drop(made);
            let is_stuck = self.each().any(|tier| tier.is_stuck());
            self.offer(if is_stuck { Deadline::over() } else { deadline });
            if is_stuck || self.shared().wait_for_room(deadline) {
                if late == Late::IsAMiss && !is_stuck {
                    tries = 0;
                } else {
                    self.give_up(if is_stuck { Duration::ZERO } else { self.patience().full() });
                    tries -= 1;
                }
            }
            made = self.shared().with(&attempt);
        }
        self.offer(Deadline::over());
        made
    }

    /// Has the tiers drop what they have not begun to write.
    fn give_up(&self, waited: Duration) {
        let blocks = self.each().map(|tier| tier.give_up(waited)).sum();
        self.given_up().fetch_add(blocks, Ordering::Relaxed);
    }

    /// Makes everything durable that is in RAM or was queued, and may be in a tier. A store that needs room may give up
    /// what this has queued: what of it is still in RAM is queued again, and nothing that came later.
    pub(super) fn flush(&self) -> Result<()> {
        let mut given_up = self.given_up().load(Ordering::Relaxed);
        self.flush_once(false)?;
        let deadline = Deadline::after(self.timeouts().flush);
        loop {
            let before = std::mem::replace(&mut given_up, self.given_up().load(Ordering::Relaxed));
            if given_up == before {
                return Ok(());
            }
            let blocks = self.flush_once(true)?;
            if blocks == 0 {
                return Ok(());
            }
            if deadline.is_over() {
                let tier = self.each().map(|tier| tier.name()).collect::<Vec<_>>().join(", ");
                return Err(Error::NotTaken { tier, blocks });
            }
        }
    }

    /// `again`: what a flush waits for still, and nothing else. Says how many blocks that were.
    fn flush_once(&self, again: bool) -> Result<usize> {
        let mut not_taken = vec![0; self.all().len()];
        let (mut awaited, mut next) = (0, Some(0));
        while let Some(from) = next {
            // In slices: between two of them others get the lock.
            let (blocks, more) = self.shared().with(|ledger| ledger.flush_some(from, SLICE, again));
            (awaited, next) = (awaited + blocks, more);
            self.offer_patiently(&mut not_taken);
        }
        // What it did take is made durable in any case, and its own error says more. What it lost it may have been offered again, and not
        // have taken: that is one block.
        let flush = |(tier, blocks): (&Arc<dyn Tier>, usize)| match tier.flush(self.timeouts().flush) {
            Ok(()) if blocks == 0 => Ok(()),
            Ok(()) => Err(Error::NotTaken { tier: tier.name().to_owned(), blocks }),
            Err(Error::NotTaken { tier, blocks: lost }) => {
                Err(Error::NotTaken { tier, blocks: lost.max(awaited.min(blocks + lost)) })
            }
            Err(error) => Err(error),
        };
        self.each().zip(not_taken).map(flush).fold(Ok(()), Result::and)?;
        Ok(awaited)
    }
}

impl Store {
    /// Evicts everything from RAM that is not held, as if room were needed for all of it, and waits for the writes of what goes
    /// down, until the deadline at most. Says how many entries are left.
    pub(crate) fn evict_all(&self, deadline: Deadline) -> usize {
        if self.here().is_err() {
            return 0;
        }
        loop {
            let (left, is_coming) = self.shared.with(|ledger| {
                ledger.shrink_to(0);
                (ledger.index().len(), ledger.is_room_coming())
            });
            if let Some(tiers) = &self.tiers {
                tiers.offer(deadline);
            }
            if !is_coming || self.shared.wait_for_room(deadline) {
                return left;
            }
        }
    }
}

impl Drop for Tiers {
    /// What is in RAM is written first: after a restart the cache is as warm as it was. A tier
    /// that hangs is left to itself.
    fn drop(&mut self) {
        // A child has none of the threads, and the directory is its parent's.
        if !self.shared().process.is_current() {
            return;
        }
        self.loads().close();
        let flushed = self.flush();
        let closed = self.each().map(|tier| tier.close()).fold(Ok(()), Result::and);
        if let Err(error) = flushed.and(closed) {
            tracing::warn!(error = %OneLine(&error), "a tier was not closed cleanly");
        }
    }
}

/// The same offers for one more tier.
pub(super) fn copies(offers: &[Offer]) -> Vec<Offer> {
    let copy = |offer: &Offer| Offer {
        meta: offer.meta.clone(),
        epoch: offer.epoch,
        mark: offer.mark,
        payload: Arc::clone(&offer.payload),
    };
    offers.iter().map(copy).collect()
}
