//! Tiers of the KV cache [`kvkeep`] over a network: what one node has computed, others find.
//!
//! [`RemoteTier`] is a [`Tier`](kvkeep::Tier): it stands behind RAM and disk, and is asked for what neither has. Which
//! store it is the URL says; above a small trait all stores are alike.
//!
//! ```no_run
//! use std::sync::Arc;
//! use kvkeep::{CacheConfig, KvCache};
//! use kvkeep_remote::{RemoteConfig, RemoteTier};
//!
//! let remote = RemoteTier::open(&RemoteConfig::new("redis://127.0.0.1:6379"))?;
//! let cache = KvCache::new(CacheConfig::new(1 << 30).tier(Arc::new(remote)))?;
//! # Ok::<(), kvkeep::Error>(())
//! ```
//!
//! - `store` is what a store does; `redis` and `object` do it.
//! - `index` knows what is there, and what is not: most misses cost no question. `scout` keeps it up to date.
//! - `reader` asks, while somebody waits: with a deadline. `writer` writes and removes, while nobody does.
//! - `health` keeps connections, and says when nobody should ask.
//!
//! tokio stays in here: two threads. What is public blocks, as the cache does, and for no longer than it says.

mod config;
mod health;
mod index;
#[cfg(any(feature = "http", feature = "file"))]
mod object;
mod reader;
#[cfg(feature = "redis")]
mod redis;
mod scout;
mod shared;
mod state;
mod store;
mod tier;
mod writer;

pub use config::RemoteConfig;
pub use store::StoreError;
pub use tier::RemoteTier;
