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

    /// Takes the first run of free pieces at or behind page `from` that are wanted, at most `most` of them. A piece is
    /// `piece` pages, aligned to as many; the last one ends with page `end` and may be shorter.
    pub(super) fn take_pieces(
        &mut self,
        from: u32,
        end: u32,
        piece: u32,
        most: usize,
        wanted: impl Fn(u32) -> bool,
    ) -> Option<(u32, u32)> {
        let before = self.by_place.range(..from).next_back();
        let (hole, hole_pages, first, last) =
            before.into_iter().chain(self.by_place.range(from..)).find_map(|(&hole, &hole_pages)| {
                let hole_end = hole + hole_pages;
                let whole_end = if hole_end == end { end } else { hole_end - hole_end % piece };
                let begin = hole.max(from).checked_next_multiple_of(piece)?;
                let pieces = (begin..whole_end).step_by(piece as usize);
                let mut run = pieces.skip_while(|page| !wanted(page / piece)).take_while(|page| wanted(page / piece));
                let first = run.next()?;
                let last = run.take(most.saturating_sub(1)).last().unwrap_or(first);
                Some((hole, hole_pages, first, last.saturating_add(piece).min(whole_end)))
            })?;
        self.remove(hole, hole_pages);
        self.insert(hole, first - hole);
        self.insert(last, hole + hole_pages - last);
        Some((first, last - first))
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

    #[test]
    fn whole_free_pieces_are_taken_in_order_and_nothing_beside_them() {
        let mut free = FreePages::new(35);
        assert_eq!(free.take(5), Some(0));
        // Free are 5 to 35: whole pieces of 8 are 8, 16, 24, and what is behind 32.
        assert_eq!(free.take_pieces(0, 35, 8, 2, |_| true), Some((8, 16)));
        assert_eq!(free.take_pieces(24, 35, 8, 2, |piece| piece != 3), Some((32, 3)));
        assert_eq!(free.take_pieces(0, 35, 8, 2, |piece| piece != 3), None);
        assert_eq!(free.take_pieces(35, 35, 8, 2, |_| true), None);
        assert_eq!((free.take(3), free.take(8), free.take(1)), (Some(5), Some(24), None));
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
