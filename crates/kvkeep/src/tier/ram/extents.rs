//! Which pages of the arena are free: best fit, exact, coalescing.
//!
//! An allocator crate (`offset-allocator`, a TLSF) was the alternative. It looks for
//! holes by size class, so a hole of exactly the size of an evicted block may not
//! take the next block of that size (classes are 12.5% wide), and it keeps 32 bytes
//! for every allocation out of a fixed number. A cache is always full, so exact reuse
//! of holes is what matters; this keeps 2 small tree nodes a hole and nothing for
//! what is in use.

use std::collections::{BTreeMap, BTreeSet};

#[derive(Debug)]
pub(super) struct FreePages {
    /// First page → pages of the hole that begins there.
    by_place: BTreeMap<u32, u32>,
    /// (pages, first page) of the same holes.
    by_size: BTreeSet<(u32, u32)>,
}

impl FreePages {
    pub(super) fn new(pages: u32) -> Self {
        let mut free = Self { by_place: BTreeMap::new(), by_size: BTreeSet::new() };
        free.insert(0, pages);
        free
    }

    /// Takes `pages` contiguous pages from the smallest hole that has them.
    pub(super) fn take(&mut self, pages: u32) -> Option<u32> {
        let &(hole_pages, first_page) = self.by_size.range((pages, 0)..).next()?;
        self.remove(first_page, hole_pages);
        self.insert(first_page + pages, hole_pages - pages);
        Some(first_page)
    }

    /// Gives pages back and joins them with the holes on both sides.
    pub(super) fn give(&mut self, mut first_page: u32, mut pages: u32) {
        if let Some((&place, &hole)) = self.by_place.range(..first_page).next_back()
            && place + hole == first_page
        {
            self.remove(place, hole);
            first_page = place;
            pages += hole;
        }
        if let Some(&hole) = self.by_place.get(&(first_page + pages)) {
            self.remove(first_page + pages, hole);
            pages += hole;
        }
        self.insert(first_page, pages);
    }

    fn insert(&mut self, first_page: u32, pages: u32) {
        if pages > 0 {
            self.by_place.insert(first_page, pages);
            self.by_size.insert((pages, first_page));
        }
    }

    fn remove(&mut self, first_page: u32, pages: u32) {
        self.by_place.remove(&first_page);
        self.by_size.remove(&(pages, first_page));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_hole_takes_exactly_what_left_it() {
        let mut free = FreePages::new(257 * 3);
        let places: Vec<_> = (0..3).map(|_| free.take(257).unwrap()).collect();
        assert_eq!(free.take(1), None);
        free.give(places[1], 257);
        assert_eq!(free.take(258), None);
        assert_eq!(free.take(257), Some(places[1]));
    }

    proptest! {
        /// Against a bitmap: what is handed out is free, and after all is given back
        /// there is one hole again.
        #[test]
        fn agrees_with_a_bitmap(ops in prop::collection::vec((any::<bool>(), 1u32..20), 1..200)) {
            let mut free = FreePages::new(64);
            let mut used = [false; 64];
            let mut taken: Vec<(u32, u32)> = Vec::new();
            for (take, pages) in ops {
                if take {
                    let hole = used.split(|used| *used).map(<[bool]>::len).filter(|len| *len >= pages as usize).min();
                    let place = free.take(pages);
                    prop_assert_eq!(place.is_some(), hole.is_some());
                    if let Some(place) = place {
                        let span = &mut used[place as usize..(place + pages) as usize];
                        prop_assert!(span.iter().all(|used| !used));
                        span.fill(true);
                        taken.push((place, pages));
                    }
                } else if !taken.is_empty() {
                    let (place, pages) = taken.swap_remove(pages as usize % taken.len());
                    used[place as usize..(place + pages) as usize].fill(false);
                    free.give(place, pages);
                }
            }
            taken.drain(..).for_each(|(place, pages)| free.give(place, pages));
            prop_assert_eq!(free.take(64), Some(0));
        }
    }
}
