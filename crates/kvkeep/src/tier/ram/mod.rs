//! The RAM tier: one reserved, lazily committed arena and the extents handed out
//! from it, in pages of 4 KiB.
//!
//! Malloc for each payload was the alternative: a page fault for every 4 KiB of every
//! large store, fragmentation that nobody accounts for, and no single region to
//! register as pinned memory for a GPU or to map into another process.

mod arena;
mod extents;
mod huge;
mod lanes;

use crate::error::Result;

pub(crate) use arena::{Arena, Extent, ReadGrant};
use extents::FreePages;
pub(crate) use lanes::View;

/// Bytes of one page: the unit of allocation and accounting.
pub(crate) const PAGE_BYTES: usize = 4096;

/// Huge pages that are given back to the system at once: 32 MiB, which takes about a millisecond.
const AT_ONCE: usize = 16;

/// Hands out extents of an [`Arena`] and takes them back.
#[derive(Debug)]
pub(crate) struct Pages {
    free: FreePages,
    capacity_pages: u32,
    used_pages: u32,
}

/// An arena of at most `capacity_bytes` and the pages in it.
#[cfg(test)]
pub(crate) fn reserve(capacity_bytes: u64) -> Result<(Arena, Pages)> {
    reserve_as(capacity_bytes, false)
}

/// As [`reserve`]; `is_shared`: other processes will map it, and cannot write to it.
pub(crate) fn reserve_as(capacity_bytes: u64, is_shared: bool) -> Result<(Arena, Pages)> {
    let (arena, capacity_pages) = Arena::reserve(capacity_bytes, is_shared)?;
    let free = FreePages::new(capacity_pages);
    Ok((arena, Pages { free, capacity_pages, used_pages: 0 }))
}

/// Pages without an arena, for bookkeeping without payload.
pub(crate) fn pages_without_arena(capacity_pages: u32) -> Pages {
    Pages { free: FreePages::new(capacity_pages), capacity_pages, used_pages: 0 }
}

/// Whole pages that `bytes` take; `None` if that is more than any arena has.
pub(crate) fn pages_for(bytes: usize) -> Option<u32> {
    u32::try_from(bytes.div_ceil(PAGE_BYTES)).ok()
}

/// Bytes of so many pages.
pub(crate) fn page_bytes(pages: u32) -> u64 {
    u64::from(pages) * PAGE_BYTES as u64
}

impl Pages {
    /// A run of `pages` contiguous pages, if there is one.
    pub(crate) fn allocate(&mut self, pages: u32) -> Option<Extent> {
        let first_page = self.free.take(pages)?;
        self.used_pages += pages;
        Some(Extent::new(first_page, pages))
    }

    /// Extents of so many pages each that lie behind each other in one run, if there is one.
    pub(crate) fn allocate_run(&mut self, pages: &[u32]) -> Option<Vec<Extent>> {
        let all = pages.iter().try_fold(0u32, |all, pages| all.checked_add(*pages))?;
        let mut first_page = self.free.take(all)?;
        self.used_pages += all;
        let extent = |pages: &u32| {
            let extent = Extent::new(first_page, *pages);
            first_page += pages;
            extent
        };
        Some(pages.iter().map(extent).collect())
    }

    /// Takes an extent back. One that is still being read stays with the caller.
    pub(crate) fn free(&mut self, extent: Extent) -> Result<(), Extent> {
        if extent.is_read() {
            return Err(extent);
        }
        self.used_pages -= extent.pages();
        self.free.give(extent.first_page(), extent.pages());
        Ok(())
    }

    /// Takes some free pages at or behind `from` that have memory which can be given back to the system.
    pub(crate) fn take_committed(&mut self, from: u32, arena: &Arena) -> Option<Extent> {
        let huge_pages = u32::try_from(huge::HUGE_BYTES / PAGE_BYTES).ok()?;
        let wanted = |piece| arena.is_committed(piece);
        let (first, pages) = self.free.take_pieces(from, self.capacity_pages, huge_pages, AT_ONCE, wanted)?;
        self.used_pages += pages;
        Some(Extent::new(first, pages))
    }

    pub(crate) fn capacity_pages(&self) -> u32 {
        self.capacity_pages
    }

    pub(crate) fn free_pages(&self) -> u32 {
        self.capacity_pages - self.used_pages
    }

    pub(crate) fn used_pages(&self) -> u32 {
        self.used_pages
    }
}
