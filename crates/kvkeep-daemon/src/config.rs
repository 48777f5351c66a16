//! Settings of both sides: explicit, checked when they are used, never read from the environment.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kvkeep::EventSink;

use crate::tenants::Tenant;

/// No client is silent for longer.
const MAX_LEASE: Duration = Duration::from_secs(24 * 3600);

/// What the daemon has and where it listens.
#[derive(Debug, Clone)]
pub struct DaemonConfig {
    pub(crate) socket: PathBuf,
    pub(crate) tenants: Vec<Tenant>,
    pub(crate) disk: Option<(PathBuf, u64)>,
    pub(crate) lease: Duration,
    pub(crate) events: Option<Arc<dyn EventSink>>,
}

/// How a cache uses a daemon.
#[derive(Debug, Clone)]
pub struct DaemonTierConfig {
    pub(crate) socket: PathBuf,
    pub(crate) tenant: String,
    pub(crate) token: String,
    pub(crate) queue_bytes: u64,
    pub(crate) deadline: Duration,
}

impl DaemonConfig {
    /// A daemon on this socket with a region for each tenant.
    pub fn new(socket: impl AsRef<Path>, tenants: Vec<Tenant>) -> Self {
        let (disk, events) = (None, None);
        Self { socket: socket.as_ref().to_owned(), tenants, disk, lease: Duration::from_secs(10), events }
    }

    /// A directory behind RAM, with a folder for each tenant, which share its bytes as they share RAM: then the daemon is
    /// warm after its own restart.
    #[must_use]
    pub fn disk(mut self, dir: impl AsRef<Path>, capacity_bytes: u64) -> Self {
        self.disk = Some((dir.as_ref().to_owned(), capacity_bytes));
        self
    }

    /// Tells a listener which blocks of the tenant without a token come and go, what its disk held included. Of tenants
    /// with a token it is told nothing, and of no block the tokens or the block before it: the daemon does not know them.
    #[must_use]
    pub fn events(mut self, sink: Arc<dyn EventSink>) -> Self {
        self.events = Some(sink);
        self
    }

    /// How long a client may hold blocks, or be writing them, between two signs of life; 10 s unless said otherwise.
    #[must_use]
    pub fn lease(mut self, lease: Duration) -> Self {
        self.lease = lease.min(MAX_LEASE);
        self
    }
}

impl DaemonTierConfig {
    /// The daemon on this socket, as the tenant `default`.
    pub fn new(socket: impl AsRef<Path>) -> Self {
        Self {
            socket: socket.as_ref().to_owned(),
            tenant: Tenant::DEFAULT.to_owned(),
            token: String::new(),
            queue_bytes: 256 << 20,
            deadline: Duration::from_millis(50),
        }
    }

    /// As this tenant, who has this token.
    #[must_use]
    pub fn tenant(mut self, name: impl Into<String>, token: impl Into<String>) -> Self {
        (self.tenant, self.token) = (name.into(), token.into());
        self
    }

    /// Bytes that may wait to be written, pinned in the cache's own RAM; 256 MiB unless said otherwise.
    #[must_use]
    pub fn queue_bytes(mut self, queue_bytes: u64) -> Self {
        self.queue_bytes = queue_bytes;
        self
    }

    /// How long a lookup waits for the daemon; 50 ms unless said otherwise. Later is a miss.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }
}
