//! Private, writable views of pages that are being read: what a reader writes into its
//! view reaches neither the cache nor another reader.
//!
//! A lane is a private (copy-on-write) mapping of the whole arena. Readers of different
//! pages share a lane, readers of the same pages get different lanes, and what was written
//! into a view is dropped with one `madvise` before its pages are viewed again: neighbours,
//! such as the layers of a prefix, together. A hit therefore makes no mapping, and its cost
//! does not depend on its size. What lost: a mapping for each reader (two more system calls
//! a hit, and a process may have 65,530 mappings), and a copy for each reader (its cost
//! grows). Copies remain the way out where there is no memfd, or where as many readers as
//! there are lanes hold the same pages.
//!
//! Soundness rests on two rules:
//! 1. A page of a lane belongs to one [`View`] at most.
//! 2. A page that its reader has not written shows the arena's page. So a view is given
//!    back before the grants it was made from are revoked: see `store::guard`.

#![expect(unsafe_code, reason = "the mappings are raw memory; see the rules above")]

use std::collections::BTreeMap;
use std::io;
use std::ptr::NonNull;

use rustix::fd::OwnedFd;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::PAGE_BYTES;
use crate::sync::Mutex;

/// Readers of the same pages that get a view; the next one gets a copy. Lanes cost
/// address space only: at 256 an arena of 100 GiB takes a fifth of what a process has.
const MAX_LANES: usize = 256;

/// Pages that were given back and are not cleaned yet: at most so many (16 MiB), so that
/// little memory is kept for writes that nobody wants any more.
const MAX_STALE_PAGES: u32 = 4096;

/// The lanes of an arena.
#[derive(Debug)]
pub(super) struct Lanes {
    source: Option<Source>,
    /// Held for a look-up and, rarely, while a lane is mapped; no other lock is taken under it.
    lanes: Mutex<Vec<Lane>>,
}

/// What lanes are mappings of.
#[derive(Debug)]
pub(super) struct Source {
    /// The arena, and nothing else.
    pub(super) memfd: OwnedFd,
    pub(super) bytes: usize,
}

#[derive(Debug)]
struct Lane {
    base: NonNull<u8>,
    /// First page → pages of each view in it.
    taken: BTreeMap<u32, u32>,
    /// First page → pages of each run that was given back and may show what its reader wrote.
    stale: BTreeMap<u32, u32>,
    stale_pages: u32,
}

/// Memory of one reader: pages of a lane, or a copy.
#[derive(Debug)]
pub(crate) struct View {
    start: NonNull<u8>,
    first_page: u32,
    pages: u32,
    /// `None` for a copy.
    lane: Option<usize>,
}

// SAFETY: a lane is plain memory behind a lock; what is in it is reached through views alone.
unsafe impl Send for Lane {}
// SAFETY: a view is the only way to its memory, and that memory is plain.
unsafe impl Send for View {}
// SAFETY: a shared view gives out its address and nothing else.
unsafe impl Sync for View {}

impl Lanes {
    pub(super) fn of(source: Option<Source>) -> Self {
        Self { source, lanes: Mutex::new(Vec::new()) }
    }

    /// A private view of these pages, or `None` if every lane's are taken or no more can be mapped.
    pub(super) fn take(&self, first_page: u32, pages: u32) -> Option<View> {
        let source = self.source.as_ref()?;
        let mut lanes = self.lanes.lock();
        let free = lanes.iter().position(|lane| lane.is_free(first_page, pages));
        let number = match free {
            Some(number) => number,
            None if lanes.len() < MAX_LANES => {
                lanes.push(Lane::at(source.map().ok()?));
                lanes.len() - 1
            }
            None => return None,
        };
        let lane = lanes.get_mut(number)?;
        lane.clean(first_page, pages)?;
        lane.taken.insert(first_page, pages);
        // SAFETY: the pages are those of an extent, so they lie inside the arena, which the lane maps whole.
        let start = unsafe { lane.base.add(first_page as usize * PAGE_BYTES) };
        Some(View { start, first_page, pages, lane: Some(number) })
    }

    /// The memory that lanes show, if it is a file.
    pub(super) fn memfd(&self) -> Option<&OwnedFd> {
        self.source.as_ref().map(|source| &source.memfd)
    }

    /// Drops what was written into views that were given back.
    pub(super) fn trim(&self) {
        let lanes = self.lanes.lock().len();
        for number in 0..lanes {
            if let Some(lane) = self.lanes.lock().get_mut(number) {
                // What cannot be cleaned now stays stale and is tried again before it is viewed.
                let _ = lane.clean(0, u32::MAX);
            }
        }
    }

    /// Takes a view back and drops what was written into it.
    #[expect(clippy::needless_pass_by_value, reason = "consuming the view is the point")]
    pub(super) fn give(&self, view: View) {
        let Some(number) = view.lane else {
            // SAFETY: made by `copy` with this length, and the view was the only way to it.
            let _ = unsafe { rustix::mm::munmap(view.start.as_ptr().cast(), view.bytes()) };
            return;
        };
        if let Some(lane) = self.lanes.lock().get_mut(number) {
            lane.give(view.first_page, view.pages);
        }
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        let bytes = self.source.as_ref().map_or(0, |source| source.bytes);
        for lane in self.lanes.get_mut().drain(..) {
            // SAFETY: mapped by `Source::map` with this length; views keep the arena, and so the lanes, alive.
            let _ = unsafe { rustix::mm::munmap(lane.base.as_ptr().cast(), bytes) };
        }
    }
}

impl Source {
    fn map(&self) -> io::Result<NonNull<u8>> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory,
        // and a private one cannot change the file.
        let base = unsafe { rustix::mm::mmap(std::ptr::null_mut(), self.bytes, access, flags, &self.memfd, 0)? };
        NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mmap gave a null address"))
    }
}

impl Lane {
    fn at(base: NonNull<u8>) -> Self {
        Self { base, taken: BTreeMap::new(), stale: BTreeMap::new(), stale_pages: 0 }
    }

    fn is_free(&self, first_page: u32, pages: u32) -> bool {
        last_overlap(&self.taken, first_page, pages).is_none()
    }

    /// Takes pages of a view back.
    fn give(&mut self, mut first_page: u32, mut pages: u32) {
        self.taken.remove(&first_page);
        self.stale_pages = self.stale_pages.saturating_add(pages);
        if let Some((&before, &length)) = self.stale.range(..first_page).next_back()
            && before + length == first_page
        {
            self.stale.remove(&before);
            (first_page, pages) = (before, length + pages);
        }
        if let Some(length) = self.stale.remove(&(first_page + pages)) {
            pages += length;
        }
        self.stale.insert(first_page, pages);
        if self.stale_pages > MAX_STALE_PAGES {
            // What cannot be cleaned now stays stale and is tried again before it is viewed.
            let _ = self.clean(first_page, pages);
        }
    }

    /// Drops what was written into stale runs that touch these pages. `None` if that fails.
    fn clean(&mut self, first_page: u32, pages: u32) -> Option<()> {
        while let Some((first, length)) = last_overlap(&self.stale, first_page, pages) {
            let bytes = length as usize * PAGE_BYTES;
            // SAFETY: pages of extents, so inside the arena, which the lane maps whole; they were given
            // back and not taken again (rule 1), so no view shows them.
            unsafe {
                let start = self.base.add(first as usize * PAGE_BYTES);
                rustix::mm::madvise(start.as_ptr().cast(), bytes, Advice::LinuxDontNeed).ok()?;
            }
            self.stale.remove(&first);
            self.stale_pages -= length;
        }
        Some(())
    }
}

/// The last of these runs that shares a page with the given one.
fn last_overlap(runs: &BTreeMap<u32, u32>, first_page: u32, pages: u32) -> Option<(u32, u32)> {
    let (&first, &length) = runs.range(..first_page.saturating_add(pages)).next_back()?;
    (first.saturating_add(length) > first_page).then_some((first, length))
}

impl View {
    /// Memory of its own with room for so many pages, all zero.
    pub(super) fn blank(first_page: u32, pages: u32) -> io::Result<Self> {
        let bytes = pages as usize * PAGE_BYTES;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), bytes, access, MapFlags::PRIVATE)? };
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mmap gave a null address"))?;
        Ok(Self { start, first_page, pages, lane: None })
    }

    /// Is this page of the arena part of it?
    pub(super) fn shows(&self, page: u32) -> bool {
        (self.first_page..self.first_page + self.pages).contains(&page)
    }

    /// Where this page of the arena begins in this view.
    pub(super) fn address(&self, page: u32) -> NonNull<u8> {
        assert!(self.shows(page), "a page of another view");
        // SAFETY: just checked to lie inside the view.
        unsafe { self.start.add((page - self.first_page) as usize * PAGE_BYTES) }
    }

    /// The view's memory.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: mapped, initialised, this long, and reachable through this exclusive borrow alone (rule 1).
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes()) }
    }

    fn bytes(&self) -> usize {
        self.pages as usize * PAGE_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Arena, Extent, PAGE_BYTES, Pages, View, page_bytes, reserve};
    use super::MAX_LANES;

    fn written(arena: &Arena, pages: &mut Pages, counts: &[u32]) -> Vec<Extent> {
        let mut extents = pages.allocate_run(counts).unwrap();
        for (extent, byte) in extents.iter_mut().zip(1..) {
            arena.bytes_mut(extent).fill(byte);
        }
        extents
    }

    fn view(arena: &Arena, extent: &mut Extent) -> (super::super::ReadGrant, View) {
        let grant = extent.grant();
        let views = arena.private_views(&[&grant]).unwrap();
        (grant, views.into_iter().next().unwrap())
    }

    #[test]
    fn what_a_reader_writes_reaches_neither_the_arena_nor_other_readers_nor_the_next_one() {
        let (arena, mut pages) = reserve(page_bytes(8)).unwrap();
        let mut extent = written(&arena, &mut pages, &[2]).remove(0);
        let (_one, mut first) = view(&arena, &mut extent);
        let (two, mut second) = view(&arena, &mut extent);
        assert!(first.bytes_mut().iter().all(|byte| *byte == 1));
        first.bytes_mut().fill(99);
        assert!(second.bytes_mut().iter().all(|byte| *byte == 1));
        assert!(arena.bytes(&two).iter().all(|byte| *byte == 1));
        arena.give_back(first);
        let (_three, mut third) = view(&arena, &mut extent);
        assert!(third.bytes_mut().iter().all(|byte| *byte == 1), "the lane still shows the first reader's writes");
        arena.give_back(second);
        arena.give_back(third);
    }

    #[test]
    fn pages_that_changed_hands_show_their_new_bytes() {
        let (arena, mut pages) = reserve(page_bytes(2)).unwrap();
        let mut extent = written(&arena, &mut pages, &[2]).remove(0);
        let (grant, mut old) = view(&arena, &mut extent);
        old.bytes_mut().fill(99);
        arena.give_back(old);
        extent.revoke(grant);
        pages.free(extent).unwrap();
        let mut extent = pages.allocate(2).unwrap();
        arena.bytes_mut(&mut extent).fill(7);
        let (_grant, mut new) = view(&arena, &mut extent);
        assert!(new.bytes_mut().iter().all(|byte| *byte == 7));
        arena.give_back(new);
    }

    /// Layer after layer given back is one run, and cleaned as one before any of it is viewed again.
    #[test]
    fn stale_neighbours_are_cleaned_before_any_of_them_is_viewed_again() {
        let (arena, mut pages) = reserve(page_bytes(16)).unwrap();
        let mut extents = written(&arena, &mut pages, &[2, 1, 3, 2]);
        for order in [[0, 1, 2, 3], [3, 1, 0, 2], [2, 0, 3, 1]] {
            for at in order {
                let (_grant, mut scribbled) = view(&arena, &mut extents[at]);
                scribbled.bytes_mut().fill(99);
                arena.give_back(scribbled);
            }
            let grants: Vec<_> = extents.iter_mut().map(Extent::grant).collect();
            let mut all = arena.private_views(&grants.iter().collect::<Vec<_>>()).unwrap();
            assert!(all[0].bytes_mut().iter().all(|byte| *byte != 99));
            all[0].bytes_mut().fill(98);
            all.into_iter().for_each(|view| arena.give_back(view));
            let (_grant, mut middle) = view(&arena, &mut extents[2]);
            assert!(middle.bytes_mut().iter().all(|byte| *byte == 3));
            arena.give_back(middle);
        }
    }

    #[test]
    fn neighbours_share_one_view_and_overlapping_views_never_share_memory() {
        let (arena, mut pages) = reserve(page_bytes(8)).unwrap();
        let mut extents = written(&arena, &mut pages, &[1, 3, 2]);
        let grants: Vec<_> = extents.iter_mut().map(Extent::grant).collect();
        let mut all = arena.private_views(&grants.iter().collect::<Vec<_>>()).unwrap();
        assert_eq!(all.len(), 1, "one run of pages is one view");
        let (_grant, mut middle) = view(&arena, extents.get_mut(1).unwrap());
        middle.bytes_mut().fill(99);
        let bytes = all[0].bytes_mut();
        assert_eq!((bytes[0], bytes[PAGE_BYTES], bytes[4 * PAGE_BYTES]), (1, 2, 3));
        let apart = arena.private_views(&[&grants[0], &grants[2]]).unwrap();
        assert_eq!(apart.len(), 2, "pages in between are not part of it");
        all.into_iter().chain(apart).chain([middle]).for_each(|view| arena.give_back(view));
    }

    #[test]
    fn more_readers_than_lanes_get_copies_with_the_same_promise() {
        let (arena, mut pages) = reserve(page_bytes(2)).unwrap();
        let mut extent = written(&arena, &mut pages, &[1]).remove(0);
        let mut views: Vec<_> = (0..MAX_LANES + 2).map(|_| view(&arena, &mut extent)).collect();
        for (number, (_, view)) in views.iter_mut().enumerate() {
            assert!(view.bytes_mut().iter().all(|byte| *byte == 1), "reader {number}");
            view.bytes_mut().fill(99);
        }
        assert!(views.last().unwrap().1.lane.is_none());
        views.into_iter().for_each(|(_, view)| arena.give_back(view));
    }
}
