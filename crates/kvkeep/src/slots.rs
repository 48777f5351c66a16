//! Values by number, in parts: what is there never moves, so one more value takes no longer at a million than at a thousand.
//!
//! One list was the alternative: where it grows it is copied, which held a lock for 20 ms at a million entries.

/// Values of a part.
const PART: usize = 1 << PART_BITS;
const PART_BITS: u32 = 10;

/// What is kept of each entry, by its number. Never more than a part of slack, and an eighth of what there is where that is less:
/// slack counts as index memory.
#[derive(Debug)]
pub(crate) struct Slots<T> {
    /// All of them full but the last one.
    parts: Vec<Vec<T>>,
}

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self { parts: Vec::new() }
    }
}

impl<T> Slots<T> {
    pub(crate) fn get(&self, id: u32) -> Option<&T> {
        let (part, place) = place_of(id);
        self.parts.get(part)?.get(place)
    }

    pub(crate) fn get_mut(&mut self, id: u32) -> Option<&mut T> {
        let (part, place) = place_of(id);
        self.parts.get_mut(part)?.get_mut(place)
    }

    pub(crate) fn len(&self) -> usize {
        self.parts.last().map_or(0, |last| (self.parts.len() - 1) * PART + last.len())
    }

    /// Adds one behind the last.
    pub(crate) fn push(&mut self, value: T) {
        match self.parts.last_mut().filter(|last| last.len() < PART) {
            Some(part) => {
                if part.len() == part.capacity() {
                    part.reserve_exact((part.len() / 8).clamp(16, PART - part.len()));
                }
                part.push(value);
            }
            None => {
                let mut part = Vec::with_capacity(if self.parts.is_empty() { 16 } else { PART });
                part.push(value);
                self.parts.push(part);
            }
        }
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        let values: usize = self.parts.iter().map(Vec::capacity).sum();
        values * size_of::<T>() + self.parts.capacity() * size_of::<Vec<T>>()
    }
}

impl<T: Copy> Slots<T> {
    /// The slot of an id, after growing to it with `empty` ones.
    pub(crate) fn grow(&mut self, id: u32, empty: T) -> Option<&mut T> {
        while self.len() <= id as usize {
            self.push(empty);
        }
        self.get_mut(id)
    }
}

fn place_of(id: u32) -> (usize, usize) {
    ((id >> PART_BITS) as usize, id as usize % PART)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PART: u32 = 1 << PART_BITS;

    #[test]
    fn what_is_there_does_not_move_and_little_is_spare() {
        let mut slots = Slots::default();
        for value in 0..5 * PART {
            slots.push(value);
            let spare = slots.memory_bytes() / 4 - slots.len();
            assert!(
                spare <= PART as usize + slots.parts.capacity() * size_of::<Vec<u32>>() / 4,
                "{spare} behind {value}"
            );
        }
        let first: *const u32 = slots.get(PART).unwrap();
        *slots.grow(20 * PART + 7, 1).unwrap() = 2;
        assert_eq!(slots.len(), 20 * PART as usize + 8);
        assert!((0..5 * PART).all(|id| slots.get(id) == Some(&id)));
        assert_eq!((slots.get(19 * PART), slots.get(20 * PART + 7)), (Some(&1), Some(&2)));
        assert_eq!(slots.get(20 * PART + 8), None);
        assert!(std::ptr::eq(first, slots.get(PART).unwrap()));
    }
}
