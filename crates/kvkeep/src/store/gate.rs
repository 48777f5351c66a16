//! What of RAM goes to the disk at all: the admission rule, and what it has to know of each entry.
//!
//! Invariant: an entry that was kept off is not judged again before it is used again. So flushing, which
//! offers everything that RAM holds, lets nothing pass that eviction would not.
//!
//! The index's entries were the alternative place for it: the default rule, which admits everything, would
//! then cost memory for nothing.

use crate::config::WritePolicy;
use crate::eviction::{Admission, Admitter, EntryId, Place};

/// Uses beyond this are not told apart.
const MAX_TOUCHES: u8 = 15;

#[derive(Debug)]
pub(crate) struct Gate {
    admitter: Admitter,
    write_policy: WritePolicy,
    /// By the entry's id.
    uses: Vec<Use>,
    kept_off: u64,
}

#[derive(Debug, Clone, Copy, Default)]
struct Use {
    place: Place,
    touches: u8,
    /// Was it kept off since it was last used?
    denied: bool,
    /// Was it ever, and so has been counted?
    counted: bool,
    /// Has it been seen on the disk?
    below: bool,
}

impl Gate {
    /// `None` if everything passes.
    pub(crate) fn new(admission: Admission, write_policy: WritePolicy) -> Option<Self> {
        let admitter = Admitter::new(admission);
        (admission != Admission::All).then(|| Self { admitter, write_policy, uses: Vec::new(), kept_off: 0 })
    }

    /// A new entry.
    pub(super) fn stored(&mut self, id: EntryId, place: Place) {
        let slot = id as usize;
        if slot >= self.uses.len() {
            self.uses.resize(slot + 1, Use::default());
        }
        if let Some(entry) = self.uses.get_mut(slot) {
            *entry = Use { place, ..Use::default() };
        }
    }

    /// A request used an entry. Is it to be offered now? A write-through disk does not wait for RAM to evict.
    pub(super) fn touched(&mut self, id: EntryId, place: Place) -> bool {
        let Some(entry) = self.uses.get_mut(id as usize) else { return false };
        let touches = entry.touches.saturating_add(1).min(MAX_TOUCHES);
        *entry = Use { place, touches, denied: false, ..*entry };
        self.write_policy == WritePolicy::Through && !entry.below
    }

    /// The kind that an entry is written as, if it may pass.
    pub(super) fn admits(&mut self, id: EntryId) -> Option<u8> {
        let entry = self.uses.get_mut(id as usize)?;
        // What is there already has passed before.
        if entry.below || (!entry.denied && self.admitter.admits(entry.touches, entry.place)) {
            return Some(Admitter::kind(entry.touches, entry.place));
        }
        self.kept_off += u64::from(!entry.counted);
        (entry.denied, entry.counted) = (true, true);
        None
    }

    /// An entry that passed was taken.
    pub(super) fn wrote(&mut self, id: EntryId, kind: u8) {
        self.admitter.wrote(kind);
        self.is_below(id);
    }

    /// An entry is on the disk, or on its way there.
    pub(super) fn is_below(&mut self, id: EntryId) {
        if let Some(entry) = self.uses.get_mut(id as usize) {
            entry.below = true;
        }
    }

    /// What was written as this kind was read from the disk.
    pub(super) fn read(&mut self, kind: u8) {
        self.admitter.read(kind);
    }

    /// Entries that were kept off, at first or for good.
    pub(super) fn kept_off(&self) -> u64 {
        self.kept_off
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.uses.capacity() * size_of::<Use>()
    }
}
