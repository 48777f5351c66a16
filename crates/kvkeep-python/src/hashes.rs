//! Hashes of memory, for `kvkeep._weights`: BLAKE3, which is what a weight is known by, and xxh3, which says at the speed
//! of memory whether that is known already.
//!
//! BLAKE3 is as hard to deceive as SHA-256, and several times as fast on processors with wide registers; on those without
//! instructions for SHA-256 by more. So SHA-256 lost here, where gigabytes are hashed.
//!
//! The checksum is seeded with a number that is drawn at random, so nobody can prepare two weights that have one
//! checksum. It decides what is hashed, and is never an identity itself. A memory that only remembered which
//! tensors it had seen was the alternative: it does not see an edit.

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use twox_hash::XxHash3_128;

use crate::memory::lent;

/// xxh3 (128 bits, little-endian) of memory that the caller keeps alive. The GIL is released.
#[pyfunction]
pub(crate) fn checksum(py: Python<'_>, address: usize, bytes: usize, seed: u64) -> Bound<'_, PyBytes> {
    let sum = py.detach(|| XxHash3_128::oneshot_with_seed(seed, lent(address, bytes)));
    PyBytes::new(py, &sum.to_le_bytes())
}

/// BLAKE3 (32 bytes) of memory that the caller keeps alive. The GIL is released.
#[pyfunction]
pub(crate) fn blake3(py: Python<'_>, address: usize, bytes: usize) -> Bound<'_, PyBytes> {
    let hash = py.detach(|| ::blake3::hash(lent(address, bytes)));
    PyBytes::new(py, hash.as_bytes())
}
