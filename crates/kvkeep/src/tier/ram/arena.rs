//! One contiguous, lazily committed mapping, and the tokens that give access to
//! parts of it. All `unsafe` of the RAM tier is in this file, in `huge` and in `lanes`.
//!
//! Soundness rests on two rules that the types enforce:
//! 1. An [`Extent`] is unique: it cannot be cloned, only [`super::Pages`] makes one,
//!    out of pages that no other extent has, and takes it back only when no
//!    [`ReadGrant`] of it is left.
//! 2. Writing needs `&mut Extent` without grants; reading needs a grant.
//!
//! On Linux the mapping is a memfd, so that private copy-on-write views (see `lanes`),
//! and later another process, can map the same pages.

#![expect(unsafe_code, reason = "the mapping is raw memory; see the rules above")]

use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::slice;

use rustix::fd::OwnedFd;
use rustix::mm::{MapFlags, ProtFlags};

use super::huge::{HUGE_BYTES, HugePages};
use super::lanes::{Lanes, Source, View};
use super::{PAGE_BYTES, page_bytes};
use crate::error::{Error, Result};
use crate::sync::Mutex;

/// The memory, and who may see which part of it.
#[derive(Debug)]
pub(crate) struct Arena {
    _mapping: Mapping,
    /// Aligned to a huge page.
    base: NonNull<u8>,
    bytes: usize,
    huge: HugePages,
    lanes: Lanes,
    /// The first bytes, which a device has been told of: their memory stays. Held while memory is given back; no other
    /// lock is taken then.
    kept_bytes: Mutex<usize>,
}

/// Address space that is given back when this goes.
#[derive(Debug)]
struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
}

/// Pages of the arena that belong to whoever holds this value. Dropping it leaks the
/// pages until the arena goes; [`super::Pages::free`] gives them back.
#[derive(Debug)]
pub(crate) struct Extent {
    first_page: u32,
    pages: u32,
    grants: u32,
}

/// The right to read an extent. While one is left the extent is not freed.
#[derive(Debug)]
pub(crate) struct ReadGrant {
    first_page: u32,
    pages: u32,
}

// SAFETY: the mapping belongs to this value alone and is plain memory; access to it is
// governed by `Extent` and `ReadGrant` as described at the top, on any thread.
unsafe impl Send for Arena {}
// SAFETY: as above: shared access reads through grants only.
unsafe impl Sync for Arena {}

impl Arena {
    /// Reserves address space for `capacity_bytes`, rounded down to whole pages. Memory is
    /// committed page by page as it is first written.
    ///
    /// `is_shared`: other processes will map it, and none of them can write to it, with whatever descriptor.
    pub(super) fn reserve(capacity_bytes: u64, is_shared: bool) -> Result<(Self, u32)> {
        let pages = capacity_bytes / PAGE_BYTES as u64;
        if pages == 0 {
            return Err(Error::Config(format!(
                "a capacity of {capacity_bytes} bytes holds no page: give at least {PAGE_BYTES}"
            )));
        }
        let too_large = || Error::Config(format!("a capacity of {capacity_bytes} bytes is more than 16 TiB"));
        let pages = u32::try_from(pages).map_err(|_| too_large())?;
        let bytes = usize::try_from(page_bytes(pages)).map_err(|_| too_large())?;
        let mapped = Mapping::aligned(bytes).and_then(|mapping| {
            let base = mapping.base();
            Ok((fill(base, bytes, is_shared)?, base, mapping))
        });
        let (memfd, base, mapping) = mapped.map_err(|source| Error::Memory { bytes: page_bytes(pages), source })?;
        let lanes = Lanes::of(memfd.map(|memfd| Source { memfd, bytes }));
        let (huge, kept_bytes) = (HugePages::of(bytes), Mutex::new(0));
        Ok((Self { _mapping: mapping, base, bytes, huge, lanes, kept_bytes }, pages))
    }

    /// The bytes of an extent that is being read.
    pub(crate) fn bytes<'a>(&'a self, grant: &'a ReadGrant) -> &'a [u8] {
        let (start, len) = self.bounds(grant.first_page, grant.pages);
        // SAFETY: `bounds` keeps the range inside the mapping, whose pages are initialised
        // (zero when fresh). While `grant` lives its extent cannot be freed, handed out
        // again or written (rules 1 and 2), so nobody writes these bytes.
        unsafe { slice::from_raw_parts(self.base.as_ptr().add(start), len) }
    }

    /// The bytes of an extent that is being written.
    pub(crate) fn bytes_mut<'a>(&'a self, extent: &'a mut Extent) -> &'a mut [u8] {
        let bytes = extent.pages as usize * PAGE_BYTES;
        self.part_mut(extent, 0..bytes)
    }

    /// A part of the bytes of an extent that is being written.
    pub(crate) fn part_mut<'a>(&'a self, extent: &'a mut Extent, part: Range<usize>) -> &'a mut [u8] {
        assert!(!extent.is_read(), "an extent is written before it is read");
        let (start, len) = self.bounds(extent.first_page, extent.pages);
        assert!(part.start <= part.end && part.end <= len, "a part of another extent");
        let (start, len) = (start + part.start, part.len());
        self.huge.touch(self.base, start..start + len);
        // SAFETY: inside the mapping as above. The extent is unique and exclusively borrowed
        // and has no grants, so these bytes are reachable through this borrow alone.
        unsafe { slice::from_raw_parts_mut(self.base.as_ptr().add(start), len) }
    }

    /// Writable memory that shows these extents: one view for each run of neighbours among
    /// them. To be given back before the grants are.
    pub(crate) fn private_views(&self, grants: &[&ReadGrant]) -> io::Result<Vec<View>> {
        let mut views = Vec::new();
        for run in grants.chunk_by(|one, next| one.first_page + one.pages == next.first_page) {
            let (Some(first), Some(last)) = (run.first(), run.last()) else { continue };
            let pages = last.first_page + last.pages - first.first_page;
            let view = self.lanes.take(first.first_page, pages).map_or_else(|| self.copy(run, pages), Ok);
            match view {
                Ok(view) => views.push(view),
                Err(error) => {
                    views.into_iter().for_each(|view| self.give_back(view));
                    return Err(error);
                }
            }
        }
        Ok(views)
    }

    /// Takes a private view back; what was written into it is gone.
    pub(crate) fn give_back(&self, view: View) {
        self.lanes.give(view);
    }

    /// Where it begins, and how many bytes it has.
    pub(crate) fn span(&self) -> (NonNull<u8>, usize) {
        (self.base, self.bytes)
    }

    /// The file behind it, if it is one.
    #[cfg(unix)]
    pub(crate) fn file(&self) -> Option<rustix::fd::BorrowedFd<'_>> {
        use rustix::fd::AsFd;

        self.lanes.memfd().map(AsFd::as_fd)
    }

    /// Brings memory behind the first `bytes` bytes, and keeps it there: from now on a device may go to it past the
    /// page tables. Without this a piece that was given back would be new memory for the processor and the old one for
    /// the device.
    pub(crate) fn keep_until(&self, bytes: usize) {
        let bytes = bytes.min(self.bytes);
        let from = std::mem::replace(&mut *self.kept_bytes.lock(), bytes);
        self.huge.populate(self.base, from..bytes);
    }

    /// Is there memory behind this piece of 2 MiB that could be given back?
    pub(super) fn is_committed(&self, piece: u32) -> bool {
        let is_kept = || (piece as usize).saturating_mul(HUGE_BYTES) < *self.kept_bytes.lock();
        self.lanes.memfd().is_some() && self.huge.is_touched(piece as usize) && !is_kept()
    }

    /// Gives the memory behind these pages back to the system; when they are next touched they are new. Where
    /// that fails they keep it.
    #[cfg(target_os = "linux")]
    pub(crate) fn decommit(&self, extent: &mut Extent) {
        use rustix::fs::{FallocateFlags, fallocate};

        assert!(!extent.is_read(), "pages that are read stay");
        let (start, len) = self.bounds(extent.first_page, extent.pages);
        let Some(memfd) = self.lanes.memfd() else { return };
        let kept_bytes = self.kept_bytes.lock();
        if start < *kept_bytes {
            return;
        }
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // The extent is unique and has no grants, so nobody reads or writes these bytes, in no mapping of them.
        if fallocate(memfd, punch, start as u64, len as u64).is_ok() {
            self.huge.forget(start..start + len);
        }
    }

    /// Keeps them: there is no file with holes here.
    #[cfg(not(target_os = "linux"))]
    pub(crate) fn decommit(&self, _: &mut Extent) {}

    /// Gives memory back that held what was written into private views.
    pub(crate) fn trim_views(&self) {
        self.lanes.trim();
    }

    fn copy(&self, run: &[&ReadGrant], pages: u32) -> io::Result<View> {
        let mut view = View::blank(run.first().map_or(0, |grant| grant.first_page), pages)?;
        let bytes = run.iter().flat_map(|grant| self.bytes(grant).chunks(PAGE_BYTES));
        view.bytes_mut().chunks_mut(PAGE_BYTES).zip(bytes).for_each(|(to, from)| to.copy_from_slice(from));
        Ok(view)
    }

    #[cfg(test)]
    pub(super) fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Is there memory behind the first page of this piece?
    #[cfg(all(test, target_os = "linux"))]
    fn is_resident(&self, piece: usize) -> bool {
        let mut states = [0u8];
        // SAFETY: a page of the mapping, and a byte for what is said of it.
        let asked = unsafe {
            libc::mincore(self.base.add(piece * HUGE_BYTES).as_ptr().cast(), PAGE_BYTES, states.as_mut_ptr())
        };
        asked == 0 && states[0] & 1 == 1
    }

    fn bounds(&self, first_page: u32, pages: u32) -> (usize, usize) {
        let (start, len) = (first_page as usize * PAGE_BYTES, pages as usize * PAGE_BYTES);
        assert!(start + len <= self.bytes, "an extent of another arena");
        (start, len)
    }
}

impl Mapping {
    /// Reserves address space with room to align so many bytes in it; there is no memory behind it yet.
    fn aligned(bytes: usize) -> io::Result<Self> {
        let bytes = bytes + HUGE_BYTES;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), bytes, ProtFlags::empty(), flags)? };
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mmap gave a null address"))?;
        Ok(Self { start, bytes })
    }

    /// The first aligned address in it.
    fn base(&self) -> NonNull<u8> {
        // SAFETY: less than `HUGE_BYTES` are skipped, and the mapping is at least that long.
        unsafe { self.start.add(self.start.align_offset(HUGE_BYTES)) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made with this length and nothing borrows it any more.
        // A failure leaves it mapped, which harms nobody.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

impl Extent {
    pub(super) fn new(first_page: u32, pages: u32) -> Self {
        Self { first_page, pages, grants: 0 }
    }

    pub(crate) fn pages(&self) -> u32 {
        self.pages
    }

    /// Where it begins in the arena, in bytes.
    pub(crate) fn offset(&self) -> usize {
        self.first_page as usize * PAGE_BYTES
    }

    pub(super) fn first_page(&self) -> u32 {
        self.first_page
    }

    /// The page behind it.
    pub(crate) fn end_page(&self) -> u32 {
        self.first_page + self.pages
    }

    /// One more reader.
    pub(crate) fn grant(&mut self) -> ReadGrant {
        self.grants = self.grants.checked_add(1).unwrap_or_else(|| panic!("4 billion readers"));
        ReadGrant { first_page: self.first_page, pages: self.pages }
    }

    /// One reader less.
    #[expect(clippy::needless_pass_by_value, reason = "consuming the grant is the point")]
    pub(crate) fn revoke(&mut self, grant: ReadGrant) {
        assert!(grant.first_page == self.first_page && self.grants > 0, "a grant of another extent");
        self.grants -= 1;
    }

    /// How many are reading?
    pub(crate) fn readers(&self) -> u32 {
        self.grants
    }

    /// Is anybody reading?
    pub(crate) fn is_read(&self) -> bool {
        self.grants > 0
    }
}

impl ReadGrant {
    pub(crate) fn pages(&self) -> u32 {
        self.pages
    }

    /// Where the extent begins in the arena, in bytes.
    #[cfg(feature = "disk")]
    pub(crate) fn offset(&self) -> usize {
        self.first_page as usize * PAGE_BYTES
    }

    /// Where this extent begins in the view that shows it.
    pub(crate) fn address_in(&self, views: &[View]) -> Option<NonNull<u8>> {
        views.iter().find(|view| view.shows(self.first_page)).map(|view| view.address(self.first_page))
    }
}

/// Puts memory behind reserved addresses, which nothing else uses: a memfd, whose beginning is aligned as `base` is.
#[cfg(target_os = "linux")]
fn fill(base: NonNull<u8>, bytes: usize, is_shared: bool) -> io::Result<Option<OwnedFd>> {
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

    let memfd = memfd_create("kvkeep", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&memfd, bytes as u64)?;
    // Whoever gets the descriptor can cut off nothing that somebody reads.
    fcntl_add_seals(&memfd, SealFlags::SHRINK | SealFlags::GROW)?;
    let (access, flags) =
        (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::NORESERVE | MapFlags::FIXED);
    // SAFETY: these addresses were reserved for this. The file is sealed: nobody can
    // shrink it, with this descriptor or another one.
    unsafe { rustix::mm::mmap(base.as_ptr().cast(), bytes, access, flags, &memfd, 0)? };
    // After this mapping there is no other that can write: the kernel refuses it, and `write` too.
    let last = if is_shared { SealFlags::FUTURE_WRITE } else { SealFlags::empty() };
    fcntl_add_seals(&memfd, last | SealFlags::SEAL)?;
    Ok(Some(memfd))
}

/// Puts memory behind reserved addresses, which nothing else uses.
#[cfg(not(target_os = "linux"))]
fn fill(base: NonNull<u8>, bytes: usize, is_shared: bool) -> io::Result<Option<OwnedFd>> {
    if is_shared {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "memory for other processes needs Linux"));
    }
    let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::FIXED);
    // SAFETY: these addresses were reserved for this.
    unsafe { rustix::mm::mmap_anonymous(base.as_ptr().cast(), bytes, access, flags)? };
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::super::{page_bytes, reserve};
    use crate::error::Error;

    #[test]
    fn what_is_written_is_read_until_the_last_reader_is_gone() {
        let (arena, mut pages) = reserve(page_bytes(4)).unwrap();
        let mut extent = pages.allocate(3).unwrap();
        arena.bytes_mut(&mut extent).fill(7);
        let (one, two) = (extent.grant(), extent.grant());
        assert!(arena.bytes(&one).iter().all(|byte| *byte == 7));
        extent.revoke(one);
        let mut extent = pages.free(extent).unwrap_err();
        extent.revoke(two);
        pages.free(extent).unwrap();
        assert_eq!(pages.used_pages(), 0);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn memory_that_a_device_was_told_of_is_not_given_back() {
        // A device goes to the pages that it was told of. Punched out of the file, they were the device's alone, and
        // what was stored later never reached it.
        let piece = super::HUGE_BYTES;
        let (arena, mut pages) = reserve(4 * piece as u64).unwrap();
        arena.keep_until(piece + 1);
        for (first, stays) in [(0, true), (1, true), (2, false), (3, false)] {
            let mut extent = pages.allocate(512).unwrap();
            arena.bytes_mut(&mut extent).fill(7);
            assert_eq!(arena.is_committed(first), !stays, "piece {first}");
            arena.decommit(&mut extent);
            let grant = extent.grant();
            assert!(arena.bytes(&grant).iter().all(|byte| *byte == if stays { 7 } else { 0 }), "piece {first}");
        }
        arena.keep_until(0);
        assert!(arena.is_committed(0));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn memory_for_a_device_is_there_before_it_is_told() {
        let (arena, _) = reserve(page_bytes(3 * 512)).unwrap();
        arena.keep_until(2 * super::HUGE_BYTES);
        assert!(arena.is_resident(0) && arena.is_resident(1) && !arena.is_resident(2));
    }

    #[test]
    fn a_capacity_without_a_page_or_beyond_the_address_space_is_refused() {
        assert!(matches!(reserve(0), Err(Error::Config(_))));
        assert!(matches!(reserve(4095), Err(Error::Config(_))));
        assert!(matches!(reserve(u64::MAX), Err(Error::Config(_))));
        let error = reserve(16 << 40).unwrap_err();
        assert!(matches!(error, Error::Config(_) | Error::Memory { .. }), "{error}");
    }
}
