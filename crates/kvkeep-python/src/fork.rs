//! What a `fork` must not break, as far as Python adds to what the library does.
//!
//! The library refuses every call in a child and gives nothing back there. Two things are left. A lock of this
//! module's own may be held for ever in a child, so what is behind one is asked for its process first. And pages that a
//! tensor showed when a child was born are never let go again in the parent: the child may still read them.
//!
//! Python calls `before_fork` with the GIL held, before `os.fork` alone: to count every `fork` of the C library would
//! keep pages for each program that is started.

use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicU64, Ordering};

use kvkeep::Process;
use pyo3::prelude::*;

use crate::error::to_python;

/// Forks that this process or one that it comes from has made.
static FORKS: AtomicU64 = AtomicU64::new(0);

/// A value of the process that made it.
#[derive(Debug)]
pub(crate) struct Here<T> {
    value: T,
    process: Process,
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

impl<T> Here<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { value, process: Process::current() }
    }

    /// The value, or `ForkError` in a child of the process that made it.
    pub(crate) fn get(&self) -> PyResult<&T> {
        if self.process.is_current() { Ok(&self.value) } else { Err(to_python(&kvkeep::Error::Forked)) }
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
