//! The daemon: a socket, and a region of RAM for each tenant.
//!
//! Invariants:
//! - Only the daemon's own user is served, and a tenant's region goes to whoever has its token.
//! - One daemon a socket: a lock beside it says that somebody lives. So the socket of a dead one is replaced, and that of
//!   a living one, even one that hangs, is not.
//!
//! A thread for each connection: there are a few for each client. An async runtime was the alternative; it would copy no
//! faster.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvkeep::tiers::{Deadline, Host};
use kvkeep::{CacheConfig, DiskConfig, Error, Result};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::channel::Channel;
use crate::config::DaemonConfig;
use crate::hub::Hub;
use crate::lock;
use crate::session::Session;
use crate::tenants::{self, Tenant};

/// Connections at a time: some six for each client.
const MAX_CONNECTIONS: usize = 1024;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;
/// What a read of the disk may take: a client waits a little longer.
const DISK_TIME: Duration = Duration::from_millis(500);
/// What ending waits for connections.
const END_TIME: Duration = Duration::from_secs(2);
/// Nothing takes less than this of a disk.
const MIN_DISK_BYTES: u64 = 1 << 20;
/// What has expired is dropped so often, and leases that nobody looks at with it.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

/// A tenant's memory, and what is known of it.
#[derive(Debug)]
pub(crate) struct Region {
    pub(crate) tenant: Tenant,
    pub(crate) host: Host,
    /// Its memory, to be read.
    pub(crate) file: OwnedFd,
    pub(crate) bytes: u64,
    pub(crate) hub: Arc<Hub>,
}

/// What all connections share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) regions: Vec<Arc<Region>>,
    pub(crate) lease: Duration,
    pub(crate) is_over: AtomicBool,
    connections: AtomicUsize,
    /// Of each connection, to be shut down.
    streams: Mutex<Vec<(usize, UnixStream)>>,
}

/// A running daemon. Dropping it ends it: clients find nothing from then on, and come back when there is another one.
#[derive(Debug)]
pub struct Daemon {
    shared: Arc<Shared>,
    socket: PathBuf,
    /// Held while it lives.
    _lock: File,
    accepting: Option<JoinHandle<()>>,
}

impl Daemon {
    /// Begins to serve.
    ///
    /// # Errors
    /// [`Error::Config`] for tenants that are not right, events of nobody, a socket that another daemon has, or one that cannot be made;
    /// as [`Host::new`] for memory and disk that cannot be had.
    pub fn start(config: &DaemonConfig) -> Result<Self> {
        tenants::check(&config.tenants)?;
        if config.events.is_some() && config.tenants.iter().all(Tenant::needs_token) {
            let why =
                "events tell of the memory that needs no token, and tenants have all of it: leave some, or tell none";
            return Err(Error::Config(why.to_owned()));
        }
        let refused = |error: io::Error| Error::Config(format!("the socket {}: {error}", config.socket.display()));
        let lock = claim(&config.socket).map_err(refused)?;
        let regions = config.tenants.iter().map(|tenant| Region::open(tenant, config).map(Arc::new));
        let regions = regions.collect::<Result<Vec<_>>>()?;
        let listener = listen(&config.socket).map_err(refused)?;
        let shared = Arc::new(Shared {
            regions,
            lease: config.lease,
            is_over: AtomicBool::new(false),
            connections: AtomicUsize::new(0),
            streams: Mutex::default(),
        });
        let accepting = {
            let shared = Arc::clone(&shared);
            thread::Builder::new().name("kvkeep-accept".to_owned()).spawn(move || accept(&shared, &listener))
        };
        let sweeping = {
            let shared = Arc::downgrade(&shared);
            thread::Builder::new().name("kvkeep-sweep".to_owned()).spawn(move || {
                while let Some(shared) = shared.upgrade().filter(|shared| !shared.is_over.load(Ordering::SeqCst)) {
                    shared.regions.iter().for_each(|region| region.host.sweep());
                    drop(shared);
                    thread::sleep(SWEEP_EVERY);
                }
            })
        };
        sweeping.map_err(refused)?;
        let accepting = Some(accepting.map_err(refused)?);
        Ok(Self { shared, socket: config.socket.clone(), _lock: lock, accepting })
    }

    /// Where it listens.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Each tenant's name, and counters and sizes of its region.
    #[must_use]
    pub fn stats(&self) -> Vec<(String, kvkeep::Stats)> {
        self.shared.regions.iter().map(|region| (region.tenant.name.clone(), region.host.stats())).collect()
    }

    /// Ends it: no more connections, and what is to be on the disk is there.
    ///
    /// # Errors
    /// As [`Host::flush`].
    pub fn stop(mut self) -> Result<()> {
        self.end();
        self.shared.regions.iter().map(|region| region.host.flush()).fold(Ok(()), Result::and)
    }

    fn end(&mut self) {
        self.shared.is_over.store(true, Ordering::SeqCst);
        // Before its lock goes: the next one makes a socket of its own.
        let _ = std::fs::remove_file(&self.socket);
        lock(&self.shared.streams).iter().for_each(|(_, stream)| drop(stream.shutdown(std::net::Shutdown::Both)));
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
        // Those under way have the regions: a disk is closed once they have let go.
        let deadline = Deadline::after(END_TIME);
        while self.shared.connections.load(Ordering::SeqCst) > 0 && !deadline.is_over() {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.end();
    }
}

impl Region {
    fn open(tenant: &Tenant, config: &DaemonConfig) -> Result<Self> {
        // Whoever listens shows no token.
        let listener = config.events.clone().filter(|_| !tenant.needs_token());
        let hub = Arc::new(Hub::new(listener));
        let mut cache = CacheConfig::new(tenant.ram_bytes).events(Arc::clone(&hub) as Arc<dyn kvkeep::EventSink>);
        if let Some((dir, bytes)) = &config.disk {
            let all: u128 = config.tenants.iter().map(|tenant| u128::from(tenant.ram_bytes)).sum();
            let share = u128::from(*bytes) * u128::from(tenant.ram_bytes) / all.max(1);
            let share = u64::try_from(share).unwrap_or(u64::MAX).max(MIN_DISK_BYTES);
            cache = cache.disk(DiskConfig::new(dir.join(&tenant.name), share).read_timeout(DISK_TIME));
        }
        let host = Host::new(cache)?;
        let ram = host.ram();
        let no_memory = |source: io::Error| Error::Memory { bytes: tenant.ram_bytes, source };
        let file = ram.file().ok_or_else(|| no_memory(io::ErrorKind::Unsupported.into()))?;
        let file = for_readers(file).map_err(no_memory)?;
        Ok(Self { tenant: tenant.clone(), bytes: ram.capacity_bytes() as u64, host, file, hub })
    }
}

/// The same file, opened to be read alone.
fn for_readers(file: impl AsFd) -> io::Result<OwnedFd> {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
}

/// A lock beside the socket, for as long as a daemon lives.
fn claim(socket: &Path) -> io::Result<File> {
    let path = socket.with_extension("lock");
    let lock = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
    rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
        rustix::io::Errno::WOULDBLOCK => {
            io::Error::new(io::ErrorKind::AddrInUse, "another daemon has it: stop that one, or give another socket")
        }
        error => error.into(),
    })?;
    Ok(lock)
}

/// A socket for its owner alone, from the first moment: nobody connects before it listens.
fn listen(path: &Path) -> io::Result<UnixListener> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if !std::os::unix::fs::FileTypeExt::is_socket(&found.file_type()) => {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a file that is no socket: remove it"));
        }
        Ok(_) => std::fs::remove_file(path)?,
        Err(_) => {}
    }
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::fs::chmod(path, Mode::RUSR | Mode::WUSR)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(UnixListener::from(socket))
}

fn accept(shared: &Arc<Shared>, listener: &UnixListener) {
    // So that ending is seen: it connects to nobody, it only stops waiting.
    let every = Some(Duration::from_millis(50));
    let _ = rustix::net::sockopt::set_socket_timeout(listener, rustix::net::sockopt::Timeout::Recv, every);
    let mut number = 0;
    while !shared.is_over.load(Ordering::SeqCst) {
        match listener.accept() {
            Ok((stream, _)) => {
                number += 1;
                begin(shared, number, stream);
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => {
                tracing::warn!(%error, "a client could not connect");
                thread::sleep(Duration::from_millis(50));
            }
        }
    }
}

/// A thread for a connection, if it may be one.
fn begin(shared: &Arc<Shared>, number: usize, stream: UnixStream) {
    let Some((channel, copy)) = opened(stream) else { return };
    if shared.connections.load(Ordering::SeqCst) >= MAX_CONNECTIONS {
        tracing::warn!(MAX_CONNECTIONS, "a client could not connect: so many connections are open already");
        return;
    }
    shared.connections.fetch_add(1, Ordering::SeqCst);
    lock(&shared.streams).push((number, copy));
    let of = Arc::clone(shared);
    let run = move || {
        if let Err(error) = Session::serve(&of, channel) {
            tracing::debug!(%error, "a connection ended");
        }
        of.connection_ended(number);
    };
    if thread::Builder::new().name("kvkeep-client".to_owned()).spawn(run).is_err() {
        shared.connection_ended(number);
    }
}

fn opened(stream: UnixStream) -> Option<(Channel, UnixStream)> {
    let copy = stream.try_clone().ok()?;
    Some((Channel::over(stream).ok()?, copy))
}

impl Shared {
    fn connection_ended(&self, number: usize) {
        lock(&self.streams).retain(|(other, _)| *other != number);
        self.connections.fetch_sub(1, Ordering::SeqCst);
    }

    /// The region of whoever has this token.
    pub(crate) fn region(&self, tenant: &str, token: &str) -> Option<Arc<Region>> {
        self.regions.iter().find(|region| region.tenant.name == tenant && region.tenant.knows(token)).map(Arc::clone)
    }
}
