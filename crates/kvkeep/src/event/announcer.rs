//! What the listener knows, and what there is to tell it: one line for each block that is anywhere.
//!
//! Invariants:
//! - Whoever changes what can be found reports it under its own lock, so that the order here is the order there. This
//!   lock comes after all others, and the listener is called without it.
//! - What waits to be told is at most what is there and what the listener still believes to be there. A block that
//!   came and went meanwhile leaves nothing.
//!
//! A queue of events was the alternative: a slow listener fills it, and then it holds up the cache, or loses what it
//! has to know.

use std::collections::{HashMap, HashSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::{Change, Event, EventSink};
use crate::block::{BlockKey, BlockMeta};
use crate::key::{BlockHash, NamespaceId, ObjectKey, TokenId};
use crate::sync::{Condvar, Mutex, thread};

/// Blocks that are told at once, at most.
const BATCH: usize = 1024;
/// Tiers are bits of a word.
const MAX_TIERS: usize = 32;
/// Blocks that are announced before they come, and namespaces without blocks: more are forgotten.
const MAX_EXPECTED: usize = 1 << 16;
const MAX_EMPTY_SPACES: usize = 1 << 10;
/// Clearings that wait to be told, at most: of what more of them remove, each block is told.
const MAX_CLEARINGS: usize = 1 << 10;

/// The first half of a block's hash, which is all that the disk's index keeps of it.
pub(crate) type Short = [u8; 16];

/// Knows what the listener knows.
#[derive(Debug)]
pub(crate) struct Announcer {
    sink: Arc<dyn EventSink>,
    wants_tokens: bool,
    state: Mutex<State>,
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
struct State {
    tiers: Vec<Arc<str>>,
    blocks: HashMap<Short, Known>,
    spaces: HashMap<NamespaceId, u32>,
    space: Vec<Space>,
    free_spaces: Vec<u32>,
    /// Namespaces when those without blocks were last forgotten.
    spaces_kept: usize,
    turns: VecDeque<Turn>,
    /// Announced, in the order of their coming.
    expected: VecDeque<Short>,
    /// Clearings among the turns, and how many there have been.
    clearings: HashSet<Option<NamespaceId>>,
    clearings_begun: u32,
    clearings_told: u32,
    /// Everything that was told before so many clearings is void.
    void_before: u32,
    is_telling: bool,
    is_closed: bool,
}

/// A namespace.
#[derive(Debug)]
struct Space {
    id: NamespaceId,
    block_tokens: Option<usize>,
    blocks: usize,
    void_before: u32,
}

/// A block that is somewhere, or of which the listener believes it.
#[derive(Debug)]
struct Known {
    rest: Short,
    space: u32,
    /// Tiers that have it.
    is_in: u32,
    /// Tiers in which the listener believes it to be, if no clearing was told since.
    told_in: u32,
    /// Clearings told before that.
    told_at: u32,
    /// Its turn to be told, if it waits for one: clearings begun before, and one.
    turn: u32,
    is_expected: bool,
    about: Option<Box<About>>,
}

#[derive(Debug, Default)]
struct About {
    parent: Option<BlockHash>,
    tokens: Box<[TokenId]>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    Block(Short, u32),
    Cleared(Option<NamespaceId>),
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
        state.tiers.push(Arc::from(tier));
        let number = u32::try_from(state.tiers.len() - 1).unwrap_or(u32::MAX);
        drop(state);
        Reports { announcer: Arc::clone(self), tier: number }
    }

    /// Tells from now on. What was reported before is told only to a listener that wants it.
    pub(crate) fn start(self: &Arc<Self>) {
        if !self.sink.wants_recovered() {
            self.state.lock().believe_all();
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
        self.state.lock().describe(namespace, block_tokens);
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
            state.expect(namespace, block, parent, if self.wants_tokens { tokens } else { &[] });
            parent = Some(block);
        }
    }

    /// Waits until everything was told.
    #[cfg(any(test, feature = "contract"))]
    pub(crate) fn settle(&self) {
        let mut state = self.state.lock();
        while state.is_telling || !state.turns.is_empty() {
            state = self.told.wait(state);
        }
    }

    /// Turns that wait, and blocks that are known.
    #[cfg(all(test, feature = "disk"))]
    pub(crate) fn sizes(&self) -> (usize, usize) {
        let state = self.state.lock();
        (state.turns.len(), state.blocks.len())
    }

    fn report(&self, report: impl FnOnce(&mut State)) {
        let mut state = self.state.lock();
        report(&mut state);
        let wakes = !state.turns.is_empty() && !state.is_telling;
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
            let events = state.take_batch();
            if !events.is_empty() {
                return Some(events);
            }
            if !state.turns.is_empty() {
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
        self.went_short(split(&key.0.block_hash()).0);
    }

    pub(crate) fn block_came(&self, block: BlockHash, namespace: NamespaceId) {
        self.announcer.report(|state| state.came(self.tier, namespace, block, None));
    }

    pub(crate) fn went_short(&self, short: Short) {
        self.announcer.report(|state| state.went(self.tier, &short));
    }

    /// As [`Reports::went_short`], of many with the lock taken once.
    #[cfg(feature = "disk")]
    pub(crate) fn went_each(&self, shorts: impl Iterator<Item = Short>) {
        self.announcer.report(|state| shorts.for_each(|short| state.went(self.tier, &short)));
    }

    /// What a journal says.
    pub(crate) fn changed(&self, changes: Vec<Change>) {
        self.announcer.report(|state| {
            for change in changes {
                match change {
                    Change::Came { namespace, block, parent } => state.came(self.tier, namespace, block, parent),
                    Change::Went(block) => state.went(self.tier, &split(&block).0),
                    Change::Cleared(namespace) => state.cleared(namespace),
                }
            }
        });
    }
}

impl State {
    fn came(&mut self, tier: u32, namespace: NamespaceId, block: BlockHash, parent: Option<BlockHash>) {
        let Some(bit) = bit(tier) else { return };
        let short = self.know(namespace, &block);
        let Some(known) = self.blocks.get_mut(&short) else { return };
        known.is_in |= bit;
        known.is_expected = false;
        if parent.is_some() {
            known.about.get_or_insert_default().parent = parent;
        }
        self.wait_for_turn(short);
    }

    fn went(&mut self, tier: u32, short: &Short) {
        let (Some(bit), Some(known)) = (bit(tier), self.blocks.get_mut(short)) else { return };
        known.is_in &= !bit;
        if self.is_forgettable(short, true) {
            self.forget(short);
        } else {
            self.wait_for_turn(*short);
        }
    }

    /// One clearing that waits stands for all later ones of the same: when it is told, what is there then is told anew.
    fn cleared(&mut self, namespace: Option<NamespaceId>) {
        if self.clearings.len() < MAX_CLEARINGS && self.clearings.insert(namespace) {
            self.clearings_begun += 1;
            self.turns.push_back(Turn::Cleared(namespace));
        }
    }

    fn expect(&mut self, namespace: NamespaceId, block: BlockHash, parent: Option<BlockHash>, tokens: &[TokenId]) {
        let short = self.know(namespace, &block);
        let Some(known) = self.blocks.get_mut(&short) else { return };
        let is_new = known.is_in == 0 && known.turn == 0 && !known.is_expected;
        if parent.is_some() || !tokens.is_empty() {
            let about = known.about.get_or_insert_default();
            about.parent = about.parent.or(parent);
            if about.tokens.is_empty() {
                about.tokens = tokens.into();
            }
        }
        if is_new {
            known.is_expected = true;
            self.expected.push_back(short);
        }
        while self.expected.len() > MAX_EXPECTED
            && let Some(oldest) = self.expected.pop_front()
        {
            if let Some(known) = self.blocks.get_mut(&oldest) {
                known.is_expected = false;
            }
            if self.is_forgettable(&oldest, false) {
                self.forget(&oldest);
            }
        }
    }

    fn describe(&mut self, namespace: NamespaceId, block_tokens: usize) {
        let number = self.space(namespace);
        if let Some(space) = self.space.get_mut(number as usize) {
            space.block_tokens = Some(block_tokens);
        }
    }

    /// The line of a block, new if need be.
    fn know(&mut self, namespace: NamespaceId, block: &BlockHash) -> Short {
        let (short, rest) = split(block);
        if !self.blocks.contains_key(&short) {
            let space = self.space(namespace);
            if let Some(space) = self.space.get_mut(space as usize) {
                space.blocks += 1;
            }
            let known =
                Known { rest, space, is_in: 0, told_in: 0, told_at: 0, turn: 0, is_expected: false, about: None };
            self.blocks.insert(short, known);
        }
        short
    }

    fn space(&mut self, id: NamespaceId) -> u32 {
        if let Some(number) = self.spaces.get(&id) {
            return *number;
        }
        if self.spaces.len() > self.spaces_kept + MAX_EMPTY_SPACES {
            self.forget_empty_spaces();
        }
        let space = Space { id, block_tokens: None, blocks: 0, void_before: 0 };
        let free = self.free_spaces.pop().and_then(|free| Some((free, self.space.get_mut(free as usize)?)));
        let number = if let Some((free, slot)) = free {
            *slot = space;
            free
        } else {
            self.space.push(space);
            u32::try_from(self.space.len() - 1).unwrap_or(u32::MAX)
        };
        self.spaces.insert(id, number);
        number
    }

    /// What is known of a namespace outlives its last block: the next one is on its way, perhaps.
    fn forget_empty_spaces(&mut self) {
        let Self { space, spaces, free_spaces, .. } = self;
        spaces.retain(|_, number| {
            let stays = space.get(*number as usize).is_some_and(|space| space.blocks > 0);
            if !stays {
                free_spaces.push(*number);
            }
            stays
        });
        self.spaces_kept = self.spaces.len();
    }

    fn wait_for_turn(&mut self, short: Short) {
        let turn = self.clearings_begun + 1;
        let Some(known) = self.blocks.get_mut(&short) else { return };
        // Of a clearing that waits, the turn has to come behind it.
        if known.turn != turn {
            known.turn = turn;
            self.turns.push_back(Turn::Block(short, turn));
        }
        if self.turns.len() > 2 * self.blocks.len() + BATCH + MAX_CLEARINGS {
            self.drop_old_turns();
        }
    }

    /// Leaves one turn for each block that waits.
    fn drop_old_turns(&mut self) {
        let (blocks, mut seen) = (&self.blocks, HashSet::new());
        self.turns.retain(|waiting| match waiting {
            Turn::Block(short, turn) => {
                blocks.get(short).is_some_and(|known| known.turn == *turn) && seen.insert(*short)
            }
            Turn::Cleared(_) => true,
        });
    }

    /// Tiers in which the listener believes a block to be.
    fn believed_in(&self, known: &Known) -> u32 {
        let void = self.space.get(known.space as usize).map_or(0, |space| space.void_before).max(self.void_before);
        if known.told_at < void { 0 } else { known.told_in }
    }

    /// Is it nowhere, and does the listener not believe otherwise?
    fn is_forgettable(&self, short: &Short, waits: bool) -> bool {
        self.blocks.get(short).is_some_and(|known| {
            known.is_in == 0 && !known.is_expected && (waits || known.turn == 0) && self.believed_in(known) == 0
        })
    }

    fn forget(&mut self, short: &Short) {
        let Some(known) = self.blocks.remove(short) else { return };
        if let Some(space) = self.space.get_mut(known.space as usize) {
            space.blocks -= 1;
        }
    }

    /// The listener knows all of it, from elsewhere.
    fn believe_all(&mut self) {
        self.turns.clear();
        for known in self.blocks.values_mut() {
            (known.told_in, known.turn) = (known.is_in, 0);
        }
    }

    /// The events of the next turns; none, if those are of blocks that came and went.
    fn take_batch(&mut self) -> Vec<Event> {
        let mut batch = Batch::new(self.tiers.len());
        for _ in 0..BATCH {
            match self.turns.front().copied() {
                Some(Turn::Block(short, turn)) => {
                    self.turns.pop_front();
                    self.tell(&short, turn, &mut batch);
                }
                Some(Turn::Cleared(namespace)) if batch.is_empty() => {
                    self.turns.pop_front();
                    self.void(namespace);
                    return vec![Event::Cleared { namespace }];
                }
                _ => break,
            }
        }
        batch.into_events()
    }

    /// A clearing is told: what was told before is void.
    fn void(&mut self, namespace: Option<NamespaceId>) {
        self.clearings.remove(&namespace);
        self.clearings_told += 1;
        match namespace {
            None => self.void_before = self.clearings_told,
            Some(id) => {
                let number = self.spaces.get(&id).copied();
                if let Some(space) = number.and_then(|number| self.space.get_mut(number as usize)) {
                    space.void_before = self.clearings_told;
                }
            }
        }
    }

    fn tell(&mut self, short: &Short, turn: u32, batch: &mut Batch) {
        let Some(known) = self.blocks.get(short) else { return };
        let believed_in = self.believed_in(known);
        let Some(space) = self.space.get(known.space as usize) else { return };
        let block = join(short, &known.rest);
        for ((number, tier), of_tier) in (0..).zip(&self.tiers).zip(&mut batch.tiers) {
            let bit = bit(number).unwrap_or(0);
            match (believed_in & bit != 0, known.is_in & bit != 0) {
                (false, true) => of_tier.stored(tier, space, block, known.about.as_deref()),
                (true, false) => of_tier.removed(tier, space.id, block),
                _ => {}
            }
        }
        let told_at = self.clearings_told;
        let Some(known) = self.blocks.get_mut(short) else { return };
        (known.told_in, known.told_at) = (known.is_in, told_at);
        if known.turn == turn {
            known.turn = 0;
        }
        if self.is_forgettable(short, false) {
            self.forget(short);
        }
    }
}

/// Events that are being put together.
struct Batch {
    tiers: Vec<OfTier>,
}

#[derive(Default)]
struct OfTier {
    stored: Vec<Event>,
    removed: Vec<Event>,
}

impl Batch {
    fn new(tiers: usize) -> Self {
        Self { tiers: (0..tiers).map(|_| OfTier::default()).collect() }
    }

    fn is_empty(&self) -> bool {
        self.tiers.iter().all(|of| of.stored.is_empty() && of.removed.is_empty())
    }

    /// What came before what went: what only changed its tier is somewhere all the time.
    fn into_events(self) -> Vec<Event> {
        let (stored, removed): (Vec<_>, Vec<_>) = self.tiers.into_iter().map(|of| (of.stored, of.removed)).unzip();
        stored.into_iter().chain(removed).flatten().collect()
    }
}

impl OfTier {
    fn stored(&mut self, tier: &Arc<str>, space: &Space, block: BlockHash, about: Option<&About>) {
        let parent = about.and_then(|about| about.parent);
        let more: &[TokenId] = about.map_or(&[], |about| &about.tokens);
        if let Some(Event::Stored { namespace, blocks, tokens, .. }) = self.stored.last_mut()
            && *namespace == space.id
            && parent.is_some()
            && blocks.last().copied() == parent
            && tokens.is_empty() == more.is_empty()
        {
            blocks.push(block);
            tokens.extend_from_slice(more);
            return;
        }
        self.stored.push(Event::Stored {
            tier: Arc::clone(tier),
            namespace: space.id,
            blocks: vec![block],
            parent,
            block_tokens: space.block_tokens,
            tokens: more.to_vec(),
        });
    }

    fn removed(&mut self, tier: &Arc<str>, of: NamespaceId, block: BlockHash) {
        match self.removed.last_mut() {
            Some(Event::Removed { namespace, blocks, .. }) if *namespace == of => blocks.push(block),
            _ => self.removed.push(Event::Removed { tier: Arc::clone(tier), namespace: of, blocks: vec![block] }),
        }
    }
}

fn bit(tier: u32) -> Option<u32> {
    ((tier as usize) < MAX_TIERS).then(|| 1 << tier)
}

/// A hash in two halves, of which the first is as good as the whole one for telling blocks apart.
fn split(block: &BlockHash) -> (Short, Short) {
    let mut halves = ([0; 16], [0; 16]);
    halves.0.iter_mut().chain(&mut halves.1).zip(block.as_bytes()).for_each(|(to, from)| *to = *from);
    halves
}

fn join(short: &Short, rest: &Short) -> BlockHash {
    let mut whole = [0; 32];
    whole.iter_mut().zip(short.iter().chain(rest)).for_each(|(to, from)| *to = *from);
    ObjectKey::new(whole, 0).block_hash()
}
