//! One host, many processes: a daemon has RAM, and the caches of other processes use it as a tier.
//!
//! - `server` is the daemon: a socket, one region of RAM for each tenant. `session` is one connection to it.
//! - `tier` is what a cache has of it; `link` its connections, `reader` and `writer` its threads.
//! - `wire` says what every byte on the socket means, `channel` moves them, `memory` maps what is shared.
//!
//! Bytes of KV never go through the socket: a reader maps its tenant's region, which nobody but the daemon can write,
//! and copies under a lease; a writer fills pieces of memory that it shares with the daemon alone, and the daemon
//! copies them. So no client can change what another one reads, and what a dead client held is free at once.
//!
//! Pages that a client wrote, adopted as they are, were the alternative to that copy: whoever has mapped a page for
//! writing can change it later, unless the kernel takes the mapping away, which costs more than the copy.
//!
//! Linux only: elsewhere this crate is empty.

#![cfg(target_os = "linux")]

mod channel;
mod config;
mod hub;
mod link;
mod memory;
mod news;
mod reader;
mod server;
mod session;
mod shared;
mod tenants;
#[cfg(test)]
mod tests;
mod tier;
mod wire;
mod writer;

pub use config::{DaemonConfig, DaemonTierConfig};
pub use server::Daemon;
pub use tenants::{Tenant, default_socket, read_tenants, read_token};
pub use tier::DaemonTier;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// A lock without poisoning: nothing here panics while it holds one.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
