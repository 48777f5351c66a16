//! What a server is told once, at its start. Flags, environment and files are the command's.

use std::net::SocketAddr;
use std::time::Duration;

use crate::auth::ApiKeys;
use crate::guard::Origin;
use crate::kv_events::KvEventsMeter;

/// How to serve.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ServerConfig {
    /// Where to listen. Any address but a loopback one needs `api_keys`.
    pub address: SocketAddr,
    /// Who may ask; `None` lets everybody on this machine, as the operator.
    pub api_keys: Option<ApiKeys>,
    /// Requests that are answered at once; each has a KV buffer of its own.
    pub parallel: usize,
    /// Requests that may wait; one more is told to come back later.
    pub queue: usize,
    /// The most tokens of a prompt and its answer together.
    pub context_tokens: usize,
    /// Tokens of a cache block.
    pub block_tokens: u32,
    /// From its arrival to its last token a request may take this long.
    pub request_timeout: Duration,
    /// At the end, what is under way may take this long before it is cancelled.
    pub shutdown_grace: Duration,
    /// What the model is called; `None` takes the name in its file.
    pub model_name: Option<String>,
    /// What it may be called too.
    pub model_aliases: Vec<String>,
    /// Origins of web pages, apps and extensions that may use this server from a browser, such as
    /// `http://localhost:3000` or `app://obsidian.md`. All others are refused.
    pub allow_origins: Vec<Origin>,
    /// An answer that is streamed has its own status if it fails within this time. Then its headers
    /// are sent, and a comment now and then, so that nobody on the way takes the server for dead.
    pub stream_error_window: Duration,
    /// The largest body of a request.
    pub body_bytes: usize,
    /// A client may keep the server waiting this long: for a request's headers (after the last
    /// answer, too), for its body, and to read what it was sent.
    pub client_timeout: Duration,
    /// Whether what was asked is logged too.
    pub log_prompts: bool,
    /// Connections at the same time. One more takes the place of the idlest; while all are being answered
    /// only probes and operators are let in.
    pub connections: usize,
    /// What is counted of the cache's events, where they are published.
    pub kv_events: Option<KvEventsMeter>,
}

impl ServerConfig {
    /// Listens at `address` with what is usual.
    #[must_use]
    pub fn new(address: SocketAddr) -> Self {
        Self {
            address,
            api_keys: None,
            parallel: 4,
            queue: 64,
            context_tokens: 4096,
            block_tokens: 16,
            request_timeout: Duration::from_secs(600),
            shutdown_grace: Duration::from_secs(30),
            model_name: None,
            model_aliases: Vec::new(),
            allow_origins: Vec::new(),
            stream_error_window: Duration::from_secs(3),
            body_bytes: 4 << 20,
            client_timeout: Duration::from_secs(30),
            log_prompts: false,
            connections: 256,
            kv_events: None,
        }
    }
}
