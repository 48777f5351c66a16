//! Memory that two processes share: mapped, and copied from and into. All `unsafe` of this crate is in this file.
//!
//! Invariant: nobody gets a reference into it, since another process may write there at any moment. What was copied out
//! is looked at after that, by its sum or under a lease.

#![expect(unsafe_code, reason = "the mapping is raw memory; see the rule above")]

use std::hash::Hasher as _;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags};
use twox_hash::xxhash3_64::Hasher as Sum;

/// Bytes that are copied and then added to the sum: they are still in the processor's cache.
const STEP_BYTES: usize = 32 << 10;

/// A file of memory, mapped.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping belongs to this value alone; bytes go in and out by copies.
unsafe impl Send for Mapping {}
// SAFETY: as above; two copies at a time may mix their bytes, which sums and leases tell.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// To be read. The file must be one that nobody can cut off.
    pub(crate) fn of_reader(file: impl AsFd, bytes: u64) -> io::Result<Self> {
        Self::map(file, bytes, ProtFlags::READ)
    }

    /// To be written.
    pub(crate) fn of_writer(file: impl AsFd, bytes: u64) -> io::Result<Self> {
        Self::map(file, bytes, ProtFlags::READ | ProtFlags::WRITE)
    }

    fn map(file: impl AsFd, bytes: u64, access: ProtFlags) -> io::Result<Self> {
        let wrong = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
        let size = fstat(&file)?.st_size;
        if u64::try_from(size) != Ok(bytes) || bytes == 0 {
            return Err(wrong("the memory that came has not the size that was said"));
        }
        if !fcntl_get_seals(&file)?.contains(SealFlags::SHRINK) {
            return Err(wrong("the memory that came can be cut off"));
        }
        let bytes = usize::try_from(bytes).map_err(|_| wrong("the memory that came is too large"))?;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, access, flags, file, 0)? };
        let start = NonNull::new(start.cast()).ok_or_else(|| wrong("mmap gave a null address"))?;
        Ok(Self { start, bytes })
    }

    /// Fills `into` from here; `false` if that is not all in it.
    pub(crate) fn copy_out(&self, at: u64, into: &mut [u8]) -> bool {
        let Some(from) = self.at(at, into.len()) else { return false };
        // SAFETY: `at` has checked the range; `into` is ours alone and lies elsewhere.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), into.as_mut_ptr(), into.len()) };
        true
    }

    /// As [`Mapping::copy_out`], with the sum of what came.
    pub(crate) fn copy_out_summed(&self, at: u64, into: &mut [u8]) -> Option<u64> {
        let (mut sum, mut at) = (Sum::new(), at);
        for step in into.chunks_mut(STEP_BYTES) {
            if !self.copy_out(at, step) {
                return None;
            }
            sum.write(step);
            at += step.len() as u64;
        }
        Some(sum.finish())
    }

    /// Writes `from` here, and says its sum; `None` if there is no room. For mappings made to be written.
    pub(crate) fn copy_in_summed(&self, at: u64, from: &[u8]) -> Option<u64> {
        let (mut sum, start) = (Sum::new(), self.at(at, from.len())?);
        for (number, step) in from.chunks(STEP_BYTES).enumerate() {
            // SAFETY: `at` has checked the whole range; `from` lies elsewhere.
            unsafe {
                let to = start.add(number * STEP_BYTES);
                std::ptr::copy_nonoverlapping(step.as_ptr(), to.as_ptr(), step.len());
            }
            sum.write(step);
        }
        Some(sum.finish())
    }

    fn at(&self, at: u64, bytes: usize) -> Option<NonNull<u8>> {
        let at = usize::try_from(at).ok()?;
        at.checked_add(bytes).filter(|end| *end <= self.bytes)?;
        // SAFETY: just checked to lie inside the mapping.
        Some(unsafe { self.start.add(at) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped with this length, and nobody has a reference into it.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

/// New memory for one writer and the daemon, which neither can cut off.
pub(crate) fn staging(bytes: u64) -> io::Result<OwnedFd> {
    let file = memfd_create("kvkeep-staging", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&file, bytes)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_in_comes_out_with_the_same_sum_and_nothing_beyond_the_end() {
        let file = staging(1 << 20).unwrap();
        let (writer, reader) =
            (Mapping::of_writer(&file, 1 << 20).unwrap(), Mapping::of_reader(&file, 1 << 20).unwrap());
        let bytes: Vec<u8> = (0..100_000u32).map(|at| at.to_le_bytes()[0]).collect();
        let sum = writer.copy_in_summed(4096, &bytes).unwrap();
        let mut back = vec![0; bytes.len()];
        assert_eq!(reader.copy_out_summed(4096, &mut back), Some(sum));
        assert_eq!(back, bytes);
        assert!(!reader.copy_out((1 << 20) - 10, &mut back) && !reader.copy_out(u64::MAX, &mut back));
        assert_eq!(writer.copy_in_summed((1 << 20) - 10, &bytes), None);
    }

    #[test]
    fn memory_of_another_size_or_that_can_be_cut_off_is_not_mapped() {
        let file = staging(4096).unwrap();
        assert!(Mapping::of_reader(&file, 8192).is_err() && Mapping::of_reader(&file, 0).is_err());
        let unsealed = memfd_create("t", MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&unsealed, 4096).unwrap();
        assert!(Mapping::of_reader(&unsealed, 4096).is_err());
    }
}
