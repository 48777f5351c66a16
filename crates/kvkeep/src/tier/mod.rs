//! Where payloads lie. One tier so far: RAM.
//!
//! Tiers never import each other; only the store knows their order.

pub(crate) mod ram;

/// Where a block lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Tier {
    /// In this process's arena.
    Ram,
}
