//! What there is, and what the listener believes: one line for each block that is anywhere, or is believed to be.
//!
//! Invariant: what waits to be told is at most what is there and what the listener still believes to be there. A block
//! that came and went meanwhile leaves nothing.
//!
//! A queue of events was the alternative: a slow listener fills it, and then it holds up the cache, or loses what it
//! has to know.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use super::Event;
use super::batch::{Batch, Told};
use super::turns::{Short, Turn, Turns};
use crate::key::{BlockHash, NamespaceId, ObjectKey, TokenId};
use crate::table::Table;

/// Blocks that are told at once, at most.
const BATCH: usize = 1024;
/// Tiers are bits of a word.
const MAX_TIERS: usize = 32;
/// Blocks that are announced before they come, and namespaces without blocks: more are forgotten.
const MAX_EXPECTED: usize = 1 << 16;
const MAX_EMPTY_SPACES: usize = 1 << 10;

/// What follows.
type Rest = [u8; 20];

/// Everything that is known, and told.
#[derive(Debug, Default)]
pub(super) struct Beliefs {
    tiers: Vec<Arc<str>>,
    blocks: Table<Known>,
    spaces: HashMap<NamespaceId, u32>,
    space: Vec<Space>,
    free_spaces: Vec<u32>,
    /// Namespaces when those without blocks were last forgotten.
    spaces_kept: usize,
    turns: Turns,
    /// Announced, in the order of their coming.
    expected: VecDeque<Short>,
    clearings_told: u32,
    /// Everything that was told before so many clearings is void.
    void_before: u32,
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
    short: Short,
    rest: Rest,
    space: u32,
    /// Tiers that have it.
    is_in: u32,
    /// Tiers in which the listener believes it to be, if no clearing was told since.
    told_in: u32,
    /// Clearings told before that.
    told_at: u32,
    /// Its turn to be told; 0 if it waits for none.
    turn: u64,
    is_expected: bool,
    about: Option<Box<About>>,
}

#[derive(Debug, Default)]
struct About {
    parent: Option<BlockHash>,
    tokens: Box<[TokenId]>,
}

impl Beliefs {
    /// A tier more; says its number.
    pub(super) fn add_tier(&mut self, name: &str) -> u32 {
        self.tiers.push(Arc::from(name));
        u32::try_from(self.tiers.len() - 1).unwrap_or(u32::MAX)
    }

    /// Is there nothing to tell?
    pub(super) fn is_settled(&self) -> bool {
        self.turns.is_empty()
    }

    /// Turns that wait, and blocks that are known.
    #[cfg(test)]
    #[cfg(feature = "disk")]
    pub(super) fn sizes(&self) -> (usize, usize) {
        (self.turns.len(), self.blocks.len())
    }

    /// A block can be found in a tier now, behind `parent` if that is known.
    pub(super) fn came(&mut self, tier: u32, namespace: NamespaceId, block: BlockHash, parent: Option<BlockHash>) {
        let Some(bit) = bit(tier as usize) else { return };
        let short = self.know(namespace, &block);
        let Some(known) = line_mut(&mut self.blocks, &short) else { return };
        known.is_in |= bit;
        known.is_expected = false;
        if parent.is_some() {
            known.about.get_or_insert_default().parent = parent;
        }
        self.wait_for_turn(short);
    }

    /// A block can no longer be found in a tier.
    pub(super) fn went(&mut self, tier: u32, short: &Short) {
        let (Some(bit), Some(known)) = (bit(tier as usize), line_mut(&mut self.blocks, short)) else { return };
        known.is_in &= !bit;
        if self.is_forgettable(short, true) {
            self.forget(short);
        } else {
            self.wait_for_turn(*short);
        }
    }

    /// A namespace goes, or everything. One clearing that waits stands for all later ones of the same: when it is told,
    /// what is there then is told anew.
    pub(super) fn cleared(&mut self, namespace: Option<NamespaceId>) {
        self.turns.clear(namespace);
    }

    /// This block may come: what nobody else could say of it.
    pub(super) fn expect(
        &mut self,
        namespace: NamespaceId,
        block: BlockHash,
        parent: Option<BlockHash>,
        tokens: &[TokenId],
    ) {
        let short = self.know(namespace, &block);
        let Some(known) = line_mut(&mut self.blocks, &short) else { return };
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
            if let Some(known) = line_mut(&mut self.blocks, &oldest) {
                known.is_expected = false;
            }
            if self.is_forgettable(&oldest, false) {
                self.forget(&oldest);
            }
        }
    }

    /// What blocks of a namespace are like.
    pub(super) fn describe(&mut self, namespace: NamespaceId, block_tokens: usize) {
        let number = self.space(namespace);
        if let Some(space) = self.space.get_mut(number as usize) {
            space.block_tokens = Some(block_tokens);
        }
    }

    /// The line of a block, new if need be.
    fn know(&mut self, namespace: NamespaceId, block: &BlockHash) -> Short {
        let (short, rest) = split(block);
        if line(&self.blocks, &short).is_none() {
            let space = self.space(namespace);
            if let Some(space) = self.space.get_mut(space as usize) {
                space.blocks += 1;
            }
            let (is_in, told_in, told_at, turn) = (0, 0, 0, 0);
            let known = Known { short, rest, space, is_in, told_in, told_at, turn, is_expected: false, about: None };
            self.blocks.insert_unique(hash(&short), known, |known| hash(&known.short));
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
        let Self { blocks, turns, .. } = self;
        let Some(known) = line_mut(blocks, &short) else { return };
        if !turns.is_in_time(known.turn) {
            known.turn = turns.push(short);
            if turns.len() > 2 * blocks.len() {
                turns.drop_some(|turn, short| line(blocks, short).is_some_and(|known| known.turn == turn));
            }
        }
    }

    /// Tiers in which the listener believes a block to be.
    fn believed_in(&self, known: &Known) -> u32 {
        let void = self.space.get(known.space as usize).map_or(0, |space| space.void_before).max(self.void_before);
        if known.told_at < void { 0 } else { known.told_in }
    }

    /// Is it nowhere, and does the listener not believe otherwise?
    fn is_forgettable(&self, short: &Short, waits: bool) -> bool {
        line(&self.blocks, short).is_some_and(|known| {
            known.is_in == 0 && !known.is_expected && (waits || known.turn == 0) && self.believed_in(known) == 0
        })
    }

    fn forget(&mut self, short: &Short) {
        let Some(known) = self.blocks.remove(hash(short), |known| known.short == *short) else { return };
        if let Some(space) = self.space.get_mut(known.space as usize) {
            space.blocks -= 1;
        }
    }

    /// The listener knows all of it, from elsewhere.
    pub(super) fn believe_all(&mut self) {
        self.turns = Turns::default();
        for known in self.blocks.iter_mut() {
            (known.told_in, known.turn) = (known.is_in, 0);
        }
    }

    /// The events of the next turns; none, if those are of blocks that came and went.
    pub(super) fn take_batch(&mut self) -> Vec<Event> {
        let mut batch = Batch::new(self.tiers.len());
        for _ in 0..BATCH {
            match self.turns.pop(batch.is_empty()) {
                Some(Turn::Block(turn, short)) => self.tell(&short, turn, &mut batch),
                Some(Turn::Cleared(namespace)) => {
                    self.void(namespace);
                    return vec![Event::Cleared { namespace }];
                }
                None => break,
            }
        }
        batch.into_events()
    }

    /// A clearing is told: what was told before is void.
    fn void(&mut self, namespace: Option<NamespaceId>) {
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

    fn tell(&mut self, short: &Short, turn: u64, batch: &mut Batch) {
        let Some(known) = line(&self.blocks, short).filter(|known| known.turn == turn) else { return };
        let believed_in = self.believed_in(known);
        let Some(space) = self.space.get(known.space as usize) else { return };
        let block = join(short, &known.rest);
        let told = Told {
            namespace: space.id,
            block,
            block_tokens: space.block_tokens,
            parent: known.about.as_ref().and_then(|about| about.parent),
            tokens: known.about.as_ref().map_or(&[], |about| &about.tokens),
        };
        for (number, tier) in self.tiers.iter().enumerate() {
            let bit = bit(number).unwrap_or(0);
            match (believed_in & bit != 0, known.is_in & bit != 0) {
                (false, true) => batch.stored(number, tier, &told),
                (true, false) => batch.removed(number, tier, &told),
                _ => {}
            }
        }
        let told_at = self.clearings_told;
        let Some(known) = line_mut(&mut self.blocks, short) else { return };
        (known.told_in, known.told_at, known.turn) = (known.is_in, told_at, 0);
        if self.is_forgettable(short, false) {
            self.forget(short);
        }
    }
}

fn line<'a>(blocks: &'a Table<Known>, short: &Short) -> Option<&'a Known> {
    blocks.find(hash(short), |known| known.short == *short)
}

fn line_mut<'a>(blocks: &'a mut Table<Known>, short: &Short) -> Option<&'a mut Known> {
    blocks.find_mut(hash(short), |known| known.short == *short)
}

/// Of a hash that is uniform already.
fn hash(short: &Short) -> u64 {
    short.first_chunk().map_or(0, |first| u64::from_le_bytes(*first))
}

fn bit(tier: usize) -> Option<u32> {
    (tier < MAX_TIERS).then(|| 1 << tier)
}

/// A hash in two parts, of which the first is as good as the whole one for telling blocks apart.
pub(super) fn split(block: &BlockHash) -> (Short, Rest) {
    let mut parts = ([0; 12], [0; 20]);
    parts.0.iter_mut().chain(&mut parts.1).zip(block.as_bytes()).for_each(|(to, from)| *to = *from);
    parts
}

fn join(short: &Short, rest: &Rest) -> BlockHash {
    let mut whole = [0; 32];
    whole.iter_mut().zip(short.iter().chain(rest)).for_each(|(to, from)| *to = *from);
    ObjectKey::new(whole, 0).block_hash()
}
