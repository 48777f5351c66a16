//! A store that all nodes share, without payload: least recently used goes first, as a Redis that is told so has it.
//!
//! The index of RAM as a store was the alternative: it takes seven times the memory for each block.

use std::collections::HashMap;

const NOBODY: u32 = u32::MAX;

#[derive(Debug)]
pub(super) struct Store {
    capacity: usize,
    at: HashMap<u64, u32>,
    slots: Vec<Slot>,
    oldest: u32,
    newest: u32,
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    block: u64,
    older: u32,
    newer: u32,
}

impl Store {
    pub(super) fn new(capacity_blocks: u64) -> Self {
        let capacity = usize::try_from(capacity_blocks.min(u64::from(NOBODY))).unwrap_or(0);
        Self { capacity, at: HashMap::new(), slots: Vec::new(), oldest: NOBODY, newest: NOBODY }
    }

    /// How many of these are there, from the first one on. They count as used.
    pub(super) fn read_run(&mut self, blocks: &[u64]) -> usize {
        blocks.iter().take_while(|block| self.touch(**block)).count()
    }

    /// Writes a block, unless it is there; says whether it was new.
    pub(super) fn write(&mut self, block: u64) -> bool {
        if self.touch(block) {
            return false;
        }
        let slot = Slot { block, older: NOBODY, newer: NOBODY };
        let id = if self.slots.len() < self.capacity {
            self.slots.push(slot);
            u32::try_from(self.slots.len() - 1).unwrap_or(NOBODY)
        } else {
            let id = self.oldest;
            self.unlink(id);
            if let Some(old) = self.slots.get_mut(id as usize) {
                self.at.remove(&old.block);
                *old = slot;
            }
            id
        };
        self.at.insert(block, id);
        self.append(id);
        true
    }

    fn touch(&mut self, block: u64) -> bool {
        let Some(id) = self.at.get(&block).copied() else { return false };
        self.unlink(id);
        self.append(id);
        true
    }

    fn unlink(&mut self, id: u32) {
        let Some(Slot { older, newer, .. }) = self.slots.get(id as usize).copied() else { return };
        match self.slots.get_mut(older as usize) {
            Some(slot) => slot.newer = newer,
            None => self.oldest = newer,
        }
        match self.slots.get_mut(newer as usize) {
            Some(slot) => slot.older = older,
            None => self.newest = older,
        }
    }

    fn append(&mut self, id: u32) {
        let before = std::mem::replace(&mut self.newest, id);
        match self.slots.get_mut(before as usize) {
            Some(slot) => slot.newer = id,
            None => self.oldest = id,
        }
        if let Some(slot) = self.slots.get_mut(id as usize) {
            (slot.older, slot.newer) = (before, NOBODY);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_used_longest_ago_goes_and_the_capacity_holds() {
        let mut store = Store::new(3);
        assert!([1, 2, 3].into_iter().all(|block| store.write(block)));
        assert!(!store.write(1), "it was there, and is used now");
        assert!(store.write(4));
        assert_eq!((store.read_run(&[1, 4, 2]), store.read_run(&[3])), (2, 1), "2 went");
        assert!(store.write(5));
        assert_eq!((store.read_run(&[1]), store.read_run(&[4, 3, 5])), (0, 3));
    }
}
