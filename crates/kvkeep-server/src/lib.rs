//! An OpenAI-compatible server whose prompts stay warm, and a page that shows what its
//! cache does.
//!
//! Async stops at the scheduler: requests are checked here, wait in a bounded queue, and are
//! answered on threads of the scheduler's own, which call the synchronous engine and cache.
//! Every answer, however it ended, becomes one `served::Served`, and metrics, the list of
//! recent requests and the tree of prefixes are made from nothing else.

mod auth;
mod config;
mod connections;
mod dashboard;
mod describe;
mod error;
mod extract;
mod front;
mod guard;
mod half_closed;
mod http;
mod kv_events;
mod metrics;
mod observed;
mod openai;
mod operator;
mod prefixes;
mod recent;
mod scheduler;
mod served;
mod state;
mod stops;
mod worker;

pub use auth::{ApiKeys, Tenant};
pub use config::ServerConfig;
pub use error::ServerError;
pub use guard::Origin;
pub use http::Server;
pub use kv_events::{Endpoint, KvEvents, KvEventsConfig, KvEventsCounts, KvEventsMeter};
