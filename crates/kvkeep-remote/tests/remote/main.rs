//! What remote tiers promise, on real stores. What needs a server is ignored here: `make test-remote` runs it.

#![expect(clippy::unwrap_used, reason = "a test that panics fails")]
#![cfg_attr(feature = "redis", expect(clippy::expect_used, reason = "a test that panics fails"))]
#![expect(clippy::indexing_slicing, reason = "a test that panics fails")]
#![cfg(feature = "file")]

mod common;
#[cfg(all(feature = "redis", feature = "s3"))]
mod faults;
mod file;
#[cfg(all(feature = "redis", feature = "s3"))]
mod redis;
#[cfg(all(feature = "redis", feature = "s3"))]
mod s3;
