//! A store's RAM as one piece of memory, for devices that copy from and to it past the processor.
//!
//! Invariant: memory that a device has been told of stays the same memory until it is forgotten: it is not given back to
//! the system meanwhile. Copies through a buffer of the device's were the alternative: every byte is then moved twice,
//! and one thread moves fewer than the bus.

use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use super::{Shared, Store};

/// The memory of a store's RAM tier. It stays mapped while this lives.
#[derive(Clone)]
pub struct Ram {
    shared: Arc<Shared>,
}

impl Store {
    /// The memory that blocks in RAM lie in.
    #[must_use]
    pub fn ram(&self) -> Ram {
        Ram { shared: Arc::clone(&self.shared) }
    }
}

impl Ram {
    /// Where it begins: a multiple of 2 MiB.
    #[must_use]
    pub fn address(&self) -> NonNull<u8> {
        self.shared.arena.span().0
    }

    /// Its size: the capacity, in whole pages.
    #[must_use]
    pub fn capacity_bytes(&self) -> usize {
        self.shared.arena.span().1
    }

    /// Brings memory behind its first `bytes` bytes, and keeps it there until another call says fewer: before a device is
    /// told of them. Takes as long as the system needs to clear so much. Does nothing in a child of the process that made it.
    pub fn keep_until(&self, bytes: usize) {
        if self.shared.check().is_ok() {
            self.shared.arena.keep_until(bytes);
        }
    }
}

impl fmt::Debug for Ram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ram").field("capacity_bytes", &self.capacity_bytes()).finish_non_exhaustive()
    }
}
