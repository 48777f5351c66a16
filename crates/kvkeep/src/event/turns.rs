//! What waits to be told, in order.
//!
//! Invariant: nothing here takes long at once, however much waits: blocks lie in chunks, of which none grows beyond its
//! size, and what is out of date goes by one chunk at a time. One queue was the alternative: where it grew, or was rid of
//! what was out of date, whoever changed the cache waited for tens of milliseconds at a million blocks.

use std::collections::VecDeque;

use crate::key::NamespaceId;

/// The beginning of a block's hash, which is all that the disk's index keeps of it.
pub(crate) type Short = [u8; 12];

/// Blocks of a chunk, at most.
const CHUNK: usize = 1024;
/// Of so many turns one looks through a chunk: so what is out of date goes faster than it comes.
const LOOK_EVERY: u64 = 256;
/// Clearings that wait, at most: of what more of them remove, each block is told.
const MAX_CLEARINGS: usize = 1 << 10;

/// Each turn has a number, and later ones have higher numbers.
#[derive(Debug, Default)]
pub(super) struct Turns {
    chunks: VecDeque<VecDeque<(u64, Short)>>,
    clearings: VecDeque<(u64, Option<NamespaceId>)>,
    /// Blocks that wait, those that are out of date among them.
    len: usize,
    last: u64,
    /// The chunk to be looked through next.
    next_look: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    Block(u64, Short),
    Cleared(Option<NamespaceId>),
}

impl Turns {
    pub(super) fn is_empty(&self) -> bool {
        self.len == 0 && self.clearings.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.len + self.clearings.len()
    }

    /// A block's turn; says its number.
    pub(super) fn push(&mut self, short: Short) -> u64 {
        self.last += 1;
        self.len += 1;
        match self.chunks.back_mut() {
            Some(chunk) if chunk.len() < CHUNK => chunk.push_back((self.last, short)),
            _ => self.chunks.push_back(VecDeque::from([(self.last, short)])),
        }
        self.last
    }

    /// A clearing's turn, unless it has one or too many wait.
    pub(super) fn clear(&mut self, namespace: Option<NamespaceId>) {
        if self.clearings.len() < MAX_CLEARINGS && !self.clearings.iter().any(|(_, waits)| *waits == namespace) {
            self.last += 1;
            self.clearings.push_back((self.last, namespace));
        }
    }

    /// Has a block with this turn one that is early enough? Of a clearing that waits, it has to come behind it.
    pub(super) fn is_in_time(&self, turn: u64) -> bool {
        turn > self.clearings.back().map_or(0, |(turn, _)| *turn)
    }

    /// The next one; a clearing only if that may come now.
    pub(super) fn pop(&mut self, may_clear: bool) -> Option<Turn> {
        let block = self.chunks.front().and_then(|chunk| chunk.front()).copied();
        if let Some((turn, namespace)) = self.clearings.front().copied()
            && block.is_none_or(|(block, _)| turn < block)
        {
            return may_clear.then(|| {
                self.clearings.pop_front();
                Turn::Cleared(namespace)
            });
        }
        let (turn, short) = block?;
        if let Some(chunk) = self.chunks.front_mut() {
            chunk.pop_front();
            if chunk.is_empty() {
                self.chunks.pop_front();
                self.next_look = self.next_look.saturating_sub(1);
            }
        }
        self.len -= 1;
        Some(Turn::Block(turn, short))
    }

    /// Where it is due, drops what is out of date in one chunk. Little chunks become one.
    pub(super) fn drop_some(&mut self, waits: impl Fn(u64, &Short) -> bool) {
        if !self.last.is_multiple_of(LOOK_EVERY) {
            return;
        }
        let at = if self.next_look < self.chunks.len() { self.next_look } else { 0 };
        let Some(chunk) = self.chunks.get_mut(at) else { return };
        let before = chunk.len();
        chunk.retain(|(turn, short)| waits(*turn, short));
        let left = chunk.len();
        self.len -= before - left;
        self.next_look = at + 1;
        let fits = |chunk: &VecDeque<_>| chunk.len() + left <= CHUNK;
        if let Some(before) = at.checked_sub(1).filter(|before| self.chunks.get(*before).is_some_and(fits)) {
            let mut chunk = self.chunks.remove(at).unwrap_or_default();
            if let Some(before) = self.chunks.get_mut(before) {
                before.append(&mut chunk);
            }
            self.next_look = at;
        } else if left == 0 {
            self.chunks.remove(at);
            self.next_look = at;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn short(number: u32) -> Short {
        let mut short = [0; 12];
        short[..4].copy_from_slice(&number.to_le_bytes());
        short
    }

    /// Against one queue of everything, of which what is out of date is passed over.
    #[test]
    fn turns_come_in_their_order_and_what_is_out_of_date_does_not_pile_up() {
        let (mut turns, mut plain) = (Turns::default(), VecDeque::new());
        let (mut waits, mut state, mut most) = (HashMap::new(), 7u64, 0);
        for round in 0..400_000u64 {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            let block = short((state >> 40) as u32 % 3000);
            match state >> 60 {
                // Nothing is told for a while, now and then: what comes and goes meanwhile is out of date.
                0..4 if round / 50_000 % 2 == 0 => loop {
                    let turn = turns.pop(true);
                    let expected = plain.pop_front();
                    match (turn, expected) {
                        (Some(Turn::Block(turn, block)), expected) if waits.get(&block) != Some(&turn) => {
                            plain.extend(expected);
                            plain.rotate_right(usize::from(expected.is_some()));
                        }
                        (turn, mut expected) => {
                            while let Some(Turn::Block(number, block)) = expected
                                && waits.get(&block) != Some(&number)
                            {
                                expected = plain.pop_front();
                            }
                            assert_eq!(turn, expected);
                            if let Some(Turn::Block(_, block)) = turn {
                                waits.remove(&block);
                            }
                            break;
                        }
                    }
                },
                15 if state % 64 == 0 => {
                    turns.clear(None);
                    if !plain.contains(&Turn::Cleared(None)) {
                        plain.push_back(Turn::Cleared(None));
                    }
                }
                8..12 => _ = waits.remove(&block),
                _ if waits.get(&block).is_some_and(|turn| turns.is_in_time(*turn)) => {}
                _ => {
                    let turn = turns.push(block);
                    plain.push_back(Turn::Block(turn, block));
                    waits.insert(block, turn);
                    if turns.len() > 2 * waits.len() {
                        turns.drop_some(|turn, block| waits.get(block) == Some(&turn));
                    }
                    most = most.max(turns.len());
                }
            }
            assert!(turns.chunks.iter().all(|chunk| chunk.len() <= CHUNK));
        }
        assert!(most < 3 * 3000 + 2 * CHUNK, "{most} waited");
    }
}
