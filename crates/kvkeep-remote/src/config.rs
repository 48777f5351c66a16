//! Settings of a remote tier: explicit, checked when it opens.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kvkeep::tiers::Codecs;

/// Settings of a [`RemoteTier`](crate::RemoteTier).
#[derive(Clone)]
pub struct RemoteConfig {
    pub(crate) url: String,
    pub(crate) prefix: String,
    pub(crate) capacity_bytes: u64,
    pub(crate) queue_bytes: u64,
    pub(crate) deadline: Duration,
    pub(crate) waits: bool,
    pub(crate) refresh: Duration,
    pub(crate) ttl: Option<Duration>,
    pub(crate) key_file: Option<PathBuf>,
    pub(crate) codecs: Codecs,
    pub(crate) hedge: Option<Duration>,
    pub(crate) variables: Vec<(String, String)>,
}

impl RemoteConfig {
    /// The store at this URL:
    /// - `redis://[user:password@]host[:6379][/database]`, `rediss://` with TLS;
    /// - `redis-cluster://host:port,host:port`, `rediss-cluster://` with TLS;
    /// - `redis-sentinel://host:26379,host:26379/name-of-the-master[/database]`, `rediss-sentinel://` with TLS;
    /// - `s3://bucket[/path]`, with what [`RemoteConfig::variables`] says;
    /// - `gs://bucket[/path]` and `az://container[/path]`, as `s3://`, in builds with the features `gs` and `az`;
    /// - `file:///directory`, on a file system that several machines share.
    ///
    /// What it has is under the prefix `kvkeep`, at most 10 GiB.
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            prefix: "kvkeep".to_owned(),
            capacity_bytes: 10 << 30,
            queue_bytes: 64 << 20,
            deadline: Duration::from_millis(50),
            waits: true,
            refresh: Duration::from_secs(10),
            ttl: None,
            key_file: None,
            hedge: None,
            codecs: Codecs::default(),
            variables: Vec::new(),
        }
    }

    /// Every name in the store begins with this. Caches share what they have under the same prefix, and see nothing of
    /// another one.
    #[must_use]
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = prefix.into();
        self
    }

    /// All objects under the prefix take no more than this, as far as this cache knows of them: what is used least
    /// lately is removed first. What others write at the same time is known a little later.
    #[must_use]
    pub fn capacity_bytes(mut self, capacity_bytes: u64) -> Self {
        self.capacity_bytes = capacity_bytes;
        self
    }

    /// Bytes that may wait to be written, pinned in RAM; 64 MiB unless said otherwise. What does not fit is not written.
    #[must_use]
    pub fn queue_bytes(mut self, queue_bytes: u64) -> Self {
        self.queue_bytes = queue_bytes;
        self
    }

    /// How long a lookup waits for the store's answer, and for the next block while blocks come; 50 ms unless said
    /// otherwise. What is late is a miss.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// A lookup waits for nothing: what the store has to be asked for is asked in the background, and not there until it has
    /// answered ([`RemoteTier::is_asking`](crate::RemoteTier::is_asking)). For callers that must not wait, such as an engine's
    /// scheduler.
    #[must_use]
    pub fn never_waits(mut self) -> Self {
        self.waits = false;
        self
    }

    /// How often the objects of a store are listed that does not tell what others write; 10 s unless said otherwise.
    /// Redis tells.
    #[must_use]
    pub fn refresh(mut self, refresh: Duration) -> Self {
        self.refresh = refresh;
        self
    }

    /// What is written is gone after this time at the latest, where the store knows time: Redis does.
    #[must_use]
    pub fn ttl(mut self, ttl: Option<Duration>) -> Self {
        self.ttl = ttl;
        self
    }

    /// Asks for a block once more where the store has not sent it after this time, and takes what comes first; never,
    /// unless said otherwise. For stores of which some requests take far longer than most: give the time that 95 of 100
    /// take. Each such block may cost a second request.
    #[must_use]
    pub fn hedge(mut self, after: Option<Duration>) -> Self {
        self.hedge = after;
        self
    }

    /// Encrypts payloads with XChaCha20-Poly1305 under the key in this file, as the disk tier does.
    #[must_use]
    pub fn key_file(mut self, key_file: impl AsRef<Path>) -> Self {
        self.key_file = Some(key_file.as_ref().to_owned());
        self
    }

    /// How blocks are encoded in the store: as they are, unless said otherwise.
    #[must_use]
    pub fn codecs(mut self, codecs: Codecs) -> Self {
        self.codecs = codecs;
        self
    }

    /// What the store itself is told, as variables of the environment are called: of S3 `AWS_ACCESS_KEY_ID`,
    /// `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT` and what else the crate `object_store` knows. What it does
    /// not know is passed over, so all variables may be given.
    #[must_use]
    pub fn variables<N: Into<String>, V: Into<String>>(mut self, variables: impl IntoIterator<Item = (N, V)>) -> Self {
        self.variables.extend(variables.into_iter().map(|(name, value)| (name.into(), value.into())));
        self
    }
}

impl fmt::Debug for RemoteConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Neither the URL nor the variables: they have passwords.
        let Self { prefix, capacity_bytes, deadline, ttl, key_file, .. } = self;
        f.debug_struct("RemoteConfig")
            .field("prefix", prefix)
            .field("capacity_bytes", capacity_bytes)
            .field("deadline", deadline)
            .field("ttl", ttl)
            .field("key_file", key_file)
            .finish_non_exhaustive()
    }
}
