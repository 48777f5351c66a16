//! An engine's rows of KV in mapped memory, and page-aligned memory beside them.
//!
//! Invariant: a row is touched only under the lock that [`Rows`] is behind, and nobody waits for a disk while that is
//! held. So an engine that wants its rows back waits for a copy at most. What is in memory already (a daemon's) is copied straight
//! into rows. Reading from the disk straight into them was the alternative: a read that the kernel has begun cannot be called back, and one
//! that ends late would write over what the engine keeps there by then.

#![expect(unsafe_code, reason = "memory that an engine maps")]

use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;

use crate::error::raise;
use crate::memory::{Access, Lent};

const PAGE_BYTES: usize = 4096;

/// Rows of equal size, which an engine and its workers read and write, too: each row belongs to one job at a time.
#[derive(Debug)]
pub(crate) struct Rows {
    address: usize,
    count: usize,
    row_bytes: usize,
    _owner: Lent,
}

impl Rows {
    /// A contiguous array of bytes, `[rows, bytes]`, that stays where it is until this is dropped.
    pub(crate) fn new(array: &Bound<'_, PyAny>) -> PyResult<Self> {
        let (count, row_bytes): (usize, usize) = array.getattr("shape")?.extract()?;
        let owner = Lent::new(array, Access::Write)?;
        if row_bytes == 0 || !row_bytes.is_multiple_of(PAGE_BYTES) || owner.bytes() != count * row_bytes {
            return Err(raise("ConfigError", "rows must be bytes, and each of whole pages of 4 KiB"));
        }
        Ok(Self { address: owner.address(), count, row_bytes, _owner: owner })
    }

    pub(crate) fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    pub(crate) fn count(&self) -> usize {
        self.count
    }

    fn row(&self, row: usize) -> Option<*mut u8> {
        (row < self.count).then(|| (self.address + row * self.row_bytes) as *mut u8)
    }

    /// Copies a row out; says whether there is such a row.
    pub(crate) fn copy_out(&self, row: usize, into: &mut [u8]) -> bool {
        let Some(from) = self.row(row).filter(|_| into.len() == self.row_bytes) else { return false };
        // SAFETY: the array, which is held, has so many bytes there, and `into` is memory of our own.
        unsafe { from.copy_to_nonoverlapping(into.as_mut_ptr(), self.row_bytes) };
        true
    }

    /// Has a row filled; says whether there is such a row, and it was.
    pub(crate) fn fill(&self, row: usize, copy: &mut dyn FnMut(&mut [u8]) -> bool) -> bool {
        let Some(into) = self.row(row) else { return false };
        // SAFETY: the array, which is held, has so many bytes there; it was lent to be written, and the row is this job's.
        copy(unsafe { std::slice::from_raw_parts_mut(into, self.row_bytes) })
    }
}

/// Page-aligned memory for one row, as a disk without page cache wants it. Goes back to its pool.
#[derive(Debug)]
pub(crate) struct Page {
    bytes: Vec<u8>,
    first: usize,
    row_bytes: usize,
    pool: Arc<Pool>,
}

/// Rows of memory that were used and will be again.
#[derive(Debug)]
pub(crate) struct Pool {
    free: Mutex<Vec<Vec<u8>>>,
    row_bytes: usize,
    /// More are given back to the system.
    kept: usize,
}

impl Pool {
    pub(crate) fn new(row_bytes: usize, kept: usize) -> Arc<Self> {
        Arc::new(Self { free: Mutex::default(), row_bytes, kept })
    }

    /// Has one more row ready, and the system has cleared it: memory that nobody has touched yet is read into at a tenth of the rate. Says
    /// whether more may be kept.
    pub(crate) fn make_ready(&self) -> bool {
        let mut bytes = vec![0; self.row_bytes + PAGE_BYTES];
        bytes.iter_mut().step_by(PAGE_BYTES).for_each(|byte| *std::hint::black_box(byte) = 0);
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if free.len() < self.kept {
            free.push(bytes);
        }
        free.len() < self.kept
    }

    pub(crate) fn take(self: &Arc<Self>) -> Page {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let bytes = free.unwrap_or_else(|| vec![0; self.row_bytes + PAGE_BYTES]);
        let first = bytes.as_ptr().align_offset(PAGE_BYTES).min(PAGE_BYTES);
        Page { bytes, first, row_bytes: self.row_bytes, pool: Arc::clone(self) }
    }
}

impl Page {
    pub(crate) fn bytes(&self) -> &[u8] {
        self.bytes.get(self.first..self.first + self.row_bytes).unwrap_or_default()
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        self.bytes.get_mut(self.first..self.first + self.row_bytes).unwrap_or_default()
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        let mut free = self.pool.free.lock().unwrap_or_else(PoisonError::into_inner);
        if free.len() < self.pool.kept {
            free.push(std::mem::take(&mut self.bytes));
        }
    }
}
