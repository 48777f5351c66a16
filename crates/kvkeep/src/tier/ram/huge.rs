//! Huge pages under the arena, asked for when each 2 MiB of it are first touched.
//!
//! Direct I/O moves a block that lies in one huge page in one piece; in 512 pages of 4 KiB it is
//! split by what the device takes at once, and every page is pinned by itself. Nothing depends on
//! it: where the kernel refuses, small pages serve.
//!
//! What lost: `MADV_HUGEPAGE`, which shared memory heeds only where an administrator has set
//! `shmem_enabled`, and hugetlbfs, whose pages are taken from everybody else beforehand.

#![expect(unsafe_code, reason = "advice on raw memory; see `ask`")]

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

/// A huge page.
pub(super) const HUGE_BYTES: usize = 2 << 20;

/// Which huge pages of an arena have been asked for: a bit for each that lies in it whole.
#[derive(Debug)]
pub(super) struct HugePages {
    asked: Box<[AtomicU64]>,
    whole: usize,
}

impl HugePages {
    /// Those of an arena of so many bytes.
    pub(super) fn of(bytes: usize) -> Self {
        let whole = bytes / HUGE_BYTES;
        Self { asked: (0..whole.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(), whole }
    }

    /// Has this huge page been touched? Not known of what is no whole one.
    pub(super) fn is_touched(&self, page: usize) -> bool {
        let asked = self.asked.get(page / 64).map_or(0, |asked| asked.load(Ordering::Relaxed));
        page >= self.whole || asked & (1 << (page % 64)) != 0
    }

    /// There is no memory any more behind this part, which is the caller's alone.
    pub(super) fn forget(&self, part: Range<usize>) {
        for page in part.start.div_ceil(HUGE_BYTES)..part.end / HUGE_BYTES {
            if let Some(asked) = self.asked.get(page / 64) {
                asked.fetch_and(!(1 << (page % 64)), Ordering::Relaxed);
            }
        }
    }

    /// Brings memory behind a part of the arena at `base`, whoever's it is: in huge pages where the kernel gives them, and
    /// no byte is changed.
    pub(super) fn populate(&self, base: NonNull<u8>, part: Range<usize>) {
        for page in part.start / HUGE_BYTES..part.end.div_ceil(HUGE_BYTES).min(self.whole) {
            let Some(asked) = self.asked.get(page / 64) else { continue };
            if asked.fetch_or(1 << (page % 64), Ordering::Relaxed) & 1 << (page % 64) == 0 {
                bring(base, page * HUGE_BYTES);
            }
        }
    }

    /// A part of the arena at `base`, which is the caller's alone, is about to be written.
    pub(super) fn touch(&self, base: NonNull<u8>, part: Range<usize>) {
        for page in part.start / HUGE_BYTES..part.end.div_ceil(HUGE_BYTES).min(self.whole) {
            let (Some(asked), bit) = (self.asked.get(page / 64), 1 << (page % 64)) else { continue };
            let is_new = asked.load(Ordering::Relaxed) & bit == 0 && asked.fetch_or(bit, Ordering::Relaxed) & bit == 0;
            if is_new {
                ask(base, page * HUGE_BYTES, part.start.max(page * HUGE_BYTES));
            }
        }
    }
}

/// Asks for the huge page that begins at an offset; `ours` is the offset of a byte of the caller's in it.
/// Says whether it was given.
#[cfg(target_os = "linux")]
fn ask(base: NonNull<u8>, start: usize, ours: usize) -> bool {
    // SAFETY: both offsets lie in the arena. The byte is the caller's alone, so reading it races with
    // nobody; it brings a first small page, without which there is nothing to make a huge one of.
    // Pages that others write meanwhile are moved beneath them: the advice changes no byte.
    unsafe {
        let _ = base.add(ours).read_volatile();
        libc::madvise(base.add(start).as_ptr().cast(), HUGE_BYTES, libc::MADV_COLLAPSE) == 0
    }
}

/// Brings the huge page that begins at an offset. Where that is refused, whoever touches it first brings small ones.
#[cfg(target_os = "linux")]
fn bring(base: NonNull<u8>, start: usize) {
    // SAFETY: the piece lies in the arena, and the kernel alone touches it: the first advice brings a first small page as if it
    // had been written, without writing; the second is as in `ask`.
    unsafe {
        let start = base.add(start).as_ptr().cast();
        libc::madvise(start, super::PAGE_BYTES, libc::MADV_POPULATE_WRITE);
        libc::madvise(start, HUGE_BYTES, libc::MADV_COLLAPSE);
        libc::madvise(start, HUGE_BYTES, libc::MADV_POPULATE_WRITE);
    }
}

#[cfg(not(target_os = "linux"))]
fn bring(_: NonNull<u8>, _: usize) {}

#[cfg(not(target_os = "linux"))]
fn ask(_: NonNull<u8>, _: usize, _: usize) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::super::{page_bytes, reserve};
    use super::HUGE_BYTES;

    #[test]
    fn asking_for_huge_pages_changes_no_byte_that_others_write_meanwhile() {
        let (arena, mut pages) = reserve(page_bytes(4 * 512 + 7)).unwrap();
        let extents: Vec<_> = (0..40).map(|_| pages.allocate(50).unwrap()).collect();
        std::thread::scope(|scope| {
            for (fill, mut extent) in (1..).zip(extents) {
                let arena = &arena;
                scope.spawn(move || {
                    arena.bytes_mut(&mut extent).fill(fill);
                    let grant = extent.grant();
                    assert!(arena.bytes(&grant).iter().all(|byte| *byte == fill));
                    extent.revoke(grant);
                });
            }
        });
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn an_arena_lies_in_huge_pages_where_the_kernel_gives_them() {
        let (arena, mut pages) = reserve(page_bytes(3 * 512 + 7)).unwrap();
        let mut whole = pages.allocate(3 * 512 + 7).unwrap();
        let bytes = arena.bytes_mut(&mut whole);
        let begin = bytes.as_ptr() as usize;
        assert!(begin.is_multiple_of(HUGE_BYTES));
        bytes.fill(1);

        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut ours = maps.lines().skip_while(|line| !line.starts_with(&format!("{begin:x}-")));
        let line = ours.find(|line| line.starts_with("ShmemPmdMapped:")).unwrap();
        let kib: usize = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        // Before Linux 6.1, with `shmem_enabled` on deny, or with memory in pieces there are none.
        let (other, _) = reserve(page_bytes(512)).unwrap();
        let given = super::ask(other.base(), 0, 0);
        assert_eq!(kib << 10, if given { 3 * HUGE_BYTES } else { 0 });
    }
}
