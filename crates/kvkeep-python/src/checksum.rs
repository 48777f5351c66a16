//! A checksum of memory at the speed of memory, for `kvkeep._weights`: weights whose SHA-256 is
//! known already are recognised by it, and not hashed again.
//!
//! It is seeded with a number that is drawn at random, so nobody can prepare two weights that
//! have one checksum. It decides what is hashed, and is never an identity itself. A memory that
//! only remembered which tensors it had seen was the alternative: it does not see an edit.

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use xxhash_rust::xxh3::xxh3_128_with_seed;

use crate::memory::lent;

/// xxh3 (128 bits, little-endian) of memory that the caller keeps alive. The GIL is released.
#[pyfunction]
pub(crate) fn checksum(py: Python<'_>, address: usize, bytes: usize, seed: u64) -> Bound<'_, PyBytes> {
    let sum = py.detach(|| xxh3_128_with_seed(lent(address, bytes), seed));
    PyBytes::new(py, &sum.to_le_bytes())
}
