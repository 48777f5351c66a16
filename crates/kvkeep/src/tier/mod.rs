//! Where payloads lie. RAM, and a disk behind it.
//!
//! Tiers never import each other; only the store knows their order.

pub(crate) mod disk;
pub(crate) mod ram;

/// Where a block lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Tier {
    /// In this process's arena.
    Ram,
    /// In the disk tier's directory.
    Disk,
}
