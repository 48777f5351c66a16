//! What a `fork` must not break.
//!
//! A child has the parent's locks as they stood, maybe locked for ever, and the cache's pages
//! mapped, but not the say over them. So in the child every call is refused, and nothing there
//! takes a lock, not even to let go. In the parent, pages that a tensor showed when the child
//! was born are never let go again: the child may still read them.
//!
//! Python calls the two hooks around `os.fork`, with the GIL held. A look at the process id in
//! each call was the alternative: a system call in a hit of two microseconds.

use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicU64, Ordering};

use pyo3::prelude::*;

/// Forks that this process or one that it comes from has made.
static FORKS: AtomicU64 = AtomicU64::new(0);
/// Forks that lie between the first process and this one.
static GENERATION: AtomicU64 = AtomicU64::new(0);

/// A value of the process that made it.
#[derive(Debug)]
pub(crate) struct Here<T> {
    value: ManuallyDrop<T>,
    generation: u64,
}

/// Something that holds pages of the cache while it lives. It is let go of only if no child
/// can see the pages; else it stays.
#[derive(Debug)]
pub(crate) struct Holding<T> {
    value: ManuallyDrop<T>,
    forks: u64,
}

/// Counts a fork that is about to happen.
#[pyfunction]
pub(crate) fn before_fork() {
    FORKS.fetch_add(1, Ordering::SeqCst);
}

/// Makes everything that came from the parent unusable in the child.
#[pyfunction]
pub(crate) fn after_fork_in_child() {
    GENERATION.fetch_add(1, Ordering::SeqCst);
}

impl<T> Here<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { value: ManuallyDrop::new(value), generation: GENERATION.load(Ordering::SeqCst) }
    }

    /// The value, or `ForkError` in a child of the process that made it.
    pub(crate) fn get(&self) -> PyResult<&T> {
        if self.generation == GENERATION.load(Ordering::SeqCst) {
            return Ok(&self.value);
        }
        Err(crate::error::raise(
            "ForkError",
            "this cache belongs to the process that made it and cannot be used after a fork: \
             make one in the child, or start processes with the method 'spawn'",
        ))
    }
}

impl<T> Drop for Here<T> {
    /// In a child nothing is let go of: a disk tier that is closed there would write into the
    /// parent's directory, and wait for threads that the child does not have.
    #[expect(unsafe_code, reason = "a value that may have to stay")]
    fn drop(&mut self) {
        if self.generation == GENERATION.load(Ordering::SeqCst) {
            // SAFETY: dropped here and nowhere else.
            unsafe { ManuallyDrop::drop(&mut self.value) };
        }
    }
}

impl<T> Holding<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { value: ManuallyDrop::new(value), forks: FORKS.load(Ordering::SeqCst) }
    }

    pub(crate) fn get(&self) -> &T {
        &self.value
    }
}

impl<T> Drop for Holding<T> {
    #[expect(unsafe_code, reason = "a value that may have to stay")]
    fn drop(&mut self) {
        if self.forks == FORKS.load(Ordering::SeqCst) {
            // SAFETY: dropped here and nowhere else.
            unsafe { ManuallyDrop::drop(&mut self.value) };
        }
    }
}
