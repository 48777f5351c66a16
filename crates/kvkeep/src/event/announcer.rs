//! Who tells the listener: one thread, which calls it without any lock held.
//!
//! Invariant: whoever changes what can be found reports it under its own lock, so that the order here is the order
//! there. This lock comes after all others.
//!
//! Calling the listener where something changes was the alternative: then it holds up whoever changed it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::beliefs::{Beliefs, split};
use super::turns::Short;
use super::{Change, Event, EventSink};
use crate::block::{BlockKey, BlockMeta};
use crate::key::{BlockHash, NamespaceId, TokenId};
use crate::sync::{Condvar, Mutex, thread};

/// Knows what the listener knows.
#[derive(Debug)]
pub(crate) struct Announcer {
    sink: Arc<dyn EventSink>,
    wants_tokens: bool,
    state: Mutex<Announcing>,
    /// There is something to tell, or nothing more to come.
    work: Condvar,
    /// Everything was told.
    told: Condvar,
}

/// Where one tier reports which of its blocks can be found. Cheap to clone.
///
/// Report under the lock that guards what can be found: then the order of reports is the order of changes. Reporting
/// what is known already does nothing.
#[derive(Debug, Clone)]
pub struct Reports {
    announcer: Arc<Announcer>,
    tier: u32,
}

#[derive(Debug, Default)]
struct Announcing {
    beliefs: Beliefs,
    is_telling: bool,
    is_closed: bool,
}

impl Announcer {
    /// Tells nobody before [`Announcer::start`].
    pub(crate) fn new(sink: Arc<dyn EventSink>) -> Arc<Self> {
        let wants_tokens = sink.wants_tokens();
        let (state, work, told) = Default::default();
        Arc::new(Self { sink, wants_tokens, state, work, told })
    }

    /// Where the next tier reports.
    pub(crate) fn reports(self: &Arc<Self>, tier: &str) -> Reports {
        let mut state = self.state.lock();
        let number = state.beliefs.add_tier(tier);
        drop(state);
        Reports { announcer: Arc::clone(self), tier: number }
    }

    /// Tells from now on. What was reported before is told only to a listener that wants it.
    pub(crate) fn start(self: &Arc<Self>) {
        if !self.sink.wants_recovered() {
            self.state.lock().beliefs.believe_all();
        }
        let announcer = Arc::clone(self);
        thread::spawn(move || announcer.run());
    }

    /// Nothing more comes. What was reported is still told.
    pub(crate) fn close(&self) {
        self.state.lock().is_closed = true;
        self.work.notify_all();
    }

    /// Does anybody want to know tokens?
    pub(crate) fn wants_tokens(&self) -> bool {
        self.wants_tokens
    }

    /// What blocks of a namespace are like.
    pub(crate) fn describe(&self, namespace: NamespaceId, block_tokens: usize) {
        self.state.lock().beliefs.describe(namespace, block_tokens);
    }

    /// These blocks of a namespace may come, each behind the one before it: what nobody else could say of them.
    pub(crate) fn expect<'a>(
        &self,
        namespace: NamespaceId,
        mut parent: Option<BlockHash>,
        blocks: impl Iterator<Item = (BlockHash, &'a [TokenId])>,
    ) {
        let mut state = self.state.lock();
        for (block, tokens) in blocks {
            state.beliefs.expect(namespace, block, parent, if self.wants_tokens { tokens } else { &[] });
            parent = Some(block);
        }
    }

    /// Waits until everything was told.
    #[cfg(any(test, feature = "contract"))]
    pub(crate) fn settle(&self) {
        self.settle_until(crate::clock::Deadline::never());
    }

    /// Waits until everything was told, until the deadline at most.
    #[cfg(any(test, feature = "contract", feature = "disk"))]
    pub(crate) fn settle_until(&self, deadline: crate::clock::Deadline) {
        let mut state = self.state.lock();
        while (state.is_telling || !state.beliefs.is_settled()) && !deadline.is_over() {
            (state, _) = self.told.wait_timeout(state, deadline.left());
        }
    }

    /// Turns that wait, and blocks that are known.
    #[cfg(test)]
    #[cfg(feature = "disk")]
    pub(crate) fn sizes(&self) -> (usize, usize) {
        self.state.lock().beliefs.sizes()
    }

    fn report(&self, report: impl FnOnce(&mut Beliefs)) {
        let mut state = self.state.lock();
        report(&mut state.beliefs);
        let wakes = !state.beliefs.is_settled() && !state.is_telling;
        drop(state);
        if wakes {
            self.work.notify_all();
        }
    }

    fn run(&self) {
        let mut has_panicked = false;
        while let Some(events) = self.next() {
            let told = catch_unwind(AssertUnwindSafe(|| self.sink.publish(events)));
            if told.is_err() && !std::mem::replace(&mut has_panicked, true) {
                tracing::warn!(listener = ?self.sink, "a listener of events panicked: it is told what comes next");
            }
        }
    }

    /// What to tell next, once there is something; `None` when nothing more comes.
    fn next(&self) -> Option<Vec<Event>> {
        let mut state = self.state.lock();
        loop {
            state.is_telling = true;
            let events = state.beliefs.take_batch();
            if !events.is_empty() {
                return Some(events);
            }
            if !state.beliefs.is_settled() {
                // Others get the lock in between.
                drop(state);
                state = self.state.lock();
                continue;
            }
            state.is_telling = false;
            self.told.notify_all();
            if state.is_closed {
                return None;
            }
            state = self.work.wait(state);
        }
    }
}

impl Reports {
    /// This can be found here now. Of blocks alone: what stands under a prefix text is not told.
    pub fn came(&self, meta: &BlockMeta) {
        if !meta.is_replaceable() {
            self.block_came(meta.key.0.block_hash(), meta.namespace);
        }
    }

    /// This can no longer be found here.
    pub fn went(&self, key: &BlockKey) {
        self.block_went(&key.0.block_hash());
    }

    /// A block of tokens can be found here now.
    pub fn block_came(&self, block: BlockHash, namespace: NamespaceId) {
        self.announcer.report(|beliefs| beliefs.came(self.tier, namespace, block, None));
    }

    /// A block of tokens can no longer be found here.
    pub fn block_went(&self, block: &BlockHash) {
        self.went_short(split(block).0);
    }

    pub(crate) fn went_short(&self, short: Short) {
        self.announcer.report(|beliefs| beliefs.went(self.tier, &short));
    }

    /// As [`Reports::went_short`], of many with the lock taken once.
    #[cfg(feature = "disk")]
    pub(crate) fn went_each(&self, shorts: &[Short]) {
        self.announcer.report(|beliefs| shorts.iter().for_each(|short| beliefs.went(self.tier, short)));
    }

    /// What a journal says.
    pub(crate) fn changed(&self, changes: Vec<Change>) {
        self.announcer.report(|beliefs| {
            for change in changes {
                match change {
                    Change::Came { namespace, block, parent } => beliefs.came(self.tier, namespace, block, parent),
                    Change::Went(block) => beliefs.went(self.tier, &split(&block).0),
                    Change::Cleared(namespace) => beliefs.cleared(namespace),
                }
            }
        });
    }
}
