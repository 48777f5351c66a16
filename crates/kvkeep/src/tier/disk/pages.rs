//! Memory that the disk reads into and is written from, in whole pages, as `O_DIRECT` wants it.
//!
//! Invariant: what is as large as a huge page lies in such ones where the kernel gives them. A device takes so many pieces
//! at once (254 is usual), so 2 MiB in pages of 4 KiB are split and take four times as long. Small memory is the
//! allocator's. A crate for mappings was the alternative: it has no way to align them.

#![expect(unsafe_code, reason = "a page of bytes is plain data, and mappings")]

use std::cell::Cell;
use std::fmt;
use std::io;
use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::format::PAGE_BYTES;

const HUGE_BYTES: usize = 2 << 20;

/// A page-aligned page.
#[derive(Clone, Copy)]
#[repr(C, align(4096))]
struct Page([u8; PAGE_BYTES]);

// SAFETY: an array of bytes without padding: any bit pattern is valid, zero included.
unsafe impl bytemuck::Zeroable for Page {}
// SAFETY: as above; `Copy`, `'static` and free of pointers.
unsafe impl bytemuck::Pod for Page {}

/// Whole pages of zeroed, page-aligned memory.
pub(crate) struct Pages(Memory);

enum Memory {
    Allocated(Box<[Page]>),
    Mapped(Mapping),
}

impl Pages {
    pub(crate) fn new(pages: usize) -> Self {
        let bytes = pages * PAGE_BYTES;
        if bytes >= HUGE_BYTES
            && let Ok(mapping) = Mapping::new(bytes)
        {
            return Self(Memory::Mapped(mapping));
        }
        Self(Memory::Allocated(bytemuck::zeroed_slice_box(pages)))
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        match &self.0 {
            Memory::Allocated(pages) => bytemuck::cast_slice(pages),
            Memory::Mapped(mapping) => mapping.bytes(),
        }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.0 {
            Memory::Allocated(pages) => bytemuck::cast_slice_mut(pages),
            Memory::Mapped(mapping) => mapping.bytes_mut(),
        }
    }
}

impl AsMut<[u8]> for Pages {
    fn as_mut(&mut self) -> &mut [u8] {
        self.bytes_mut()
    }
}

impl fmt::Debug for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pages", self.bytes().len() / PAGE_BYTES)
    }
}

/// Memory of its own, aligned to huge pages. There is nothing behind it until it is touched.
struct Mapping {
    start: NonNull<u8>,
    mapped_bytes: usize,
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: it owns its memory, and hands it out as references only.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(bytes: usize) -> io::Result<Self> {
        let mapped_bytes = bytes.checked_add(HUGE_BYTES).ok_or(io::ErrorKind::OutOfMemory)?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let start =
            unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), mapped_bytes, access, MapFlags::PRIVATE)? };
        let start = NonNull::new(start.cast::<u8>()).ok_or_else(|| io::Error::other("mmap gave a null address"))?;
        // SAFETY: less than `HUGE_BYTES` are skipped, and the mapping is longer than that.
        let base = unsafe { start.add(start.align_offset(HUGE_BYTES)) };
        // Whole ones only: a part of one would take all its memory. A refusal leaves small pages.
        // SAFETY: within the mapping; advice changes no byte of it.
        let _ = unsafe {
            rustix::mm::madvise(base.as_ptr().cast(), bytes / HUGE_BYTES * HUGE_BYTES, Advice::LinuxHugepage)
        };
        Ok(Self { start, mapped_bytes, base, bytes })
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: inside the mapping, which is readable, zeroed by the kernel, and lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.bytes) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; writable, and `self` is borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.bytes) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made with this length and nothing borrows it any more.
        // A failure leaves it mapped, which harms nobody.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.mapped_bytes) };
    }
}

thread_local! {
    /// What this thread read its last record into.
    static LENT: Cell<Option<Pages>> = const { Cell::new(None) };
}

/// Memory for a record until it is decoded: whatever the thread's last one has left in it. The kernel needs longer to zero
/// new memory than to fill it from a fast disk.
pub(crate) struct Lent {
    pages: Pages,
    bytes: usize,
}

impl Lent {
    /// What is larger goes back to the kernel.
    const KEPT_BYTES: usize = 4 * HUGE_BYTES;

    pub(crate) fn new(pages: usize) -> Self {
        let bytes = pages * PAGE_BYTES;
        let large = |before: &Pages| before.bytes().len() >= bytes;
        let new = || Pages::new(bytes.max(1).next_multiple_of(HUGE_BYTES) / PAGE_BYTES);
        Self { pages: LENT.take().filter(large).unwrap_or_else(new), bytes }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.pages.bytes().get(..self.bytes).unwrap_or_default()
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        self.pages.bytes_mut().get_mut(..self.bytes).unwrap_or_default()
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let pages = std::mem::replace(&mut self.pages, Pages::new(0));
        if pages.bytes().len() <= Self::KEPT_BYTES {
            LENT.set(Some(pages));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_aligned_zeroed_and_of_the_size_that_was_asked_for() {
        for pages in [0, 1, 511, 512, 513, 1_300] {
            let mut memory = Pages::new(pages);
            assert_eq!(memory.bytes().len(), pages * PAGE_BYTES);
            assert_eq!(memory.bytes().as_ptr().align_offset(PAGE_BYTES), 0);
            assert!(memory.bytes().iter().all(|byte| *byte == 0));
            memory.bytes_mut().fill(7);
        }
    }

    #[test]
    fn a_record_is_read_into_what_the_last_one_left() {
        let place = |pages| {
            let mut lent = Lent::new(pages);
            assert_eq!(lent.bytes().len(), pages * PAGE_BYTES);
            lent.bytes_mut().fill(1);
            lent.bytes().as_ptr()
        };
        let first = place(700);
        assert_eq!(first, place(3));
        assert_eq!(first, place(1_024));
        // Two at once have memory of their own.
        let (one, other) = (Lent::new(1), Lent::new(1));
        assert_ne!(one.bytes().as_ptr(), other.bytes().as_ptr());
    }
}
