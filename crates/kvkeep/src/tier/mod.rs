//! Where payloads lie. RAM, and a disk behind it.
//!
//! Tiers never import each other; only the store knows their order.

pub(crate) mod disk;
pub(crate) mod ram;
