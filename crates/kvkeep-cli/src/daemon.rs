//! `kvkeep daemon`: RAM that the processes of this host share, until it is told to stop.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Args;
use kvkeep_daemon::{Daemon, DaemonConfig, DaemonTier, DaemonTierConfig, Tenant};
use kvkeep_server::{Endpoint, KvEvents, KvEventsConfig};
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::{self, gib};
use crate::style::size;

const GIB: f64 = 1024.0 * 1024.0 * 1024.0;

/// Keeps KV in RAM that all processes of this host share: `kvkeep serve --daemon`, `KVCache(daemon=...)` in Python.
///
/// What one of them has computed, the others find, at the speed of memory, and it outlives them. See docs/daemon.md.
#[derive(Debug, Args)]
#[command(after_help = cli::EXIT_CODES)]
pub(crate) struct DaemonOptions {
    /// Where to listen [default: kvkeep.sock in the user's folder of sockets, `$XDG_RUNTIME_DIR`]
    #[arg(long, env = "KVKEEP_DAEMON_SOCKET", value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Memory that all tenants together may use, in GiB
    #[arg(long, alias = "ram-gb", env = "KVKEEP_DAEMON_RAM_GIB", value_name = "GIB", default_value = "4", value_parser = gib)]
    ram_gib: f64,
    /// Tenants with a region of their own: lines of NAME TOKEN GIB, readable by its owner alone; what they leave is everybody's
    #[arg(long, env = "KVKEEP_DAEMON_TENANTS", value_name = "FILE")]
    tenants: Option<PathBuf>,
    /// Directory behind RAM, so that the daemon is warm after its own restart [default: none]
    #[arg(long, env = "KVKEEP_DAEMON_DISK", value_name = "DIR")]
    disk: Option<PathBuf>,
    /// What the directory may use, in GiB
    #[arg(long, alias = "disk-gb", env = "KVKEEP_DAEMON_DISK_GIB", value_name = "GIB", default_value = "8", value_parser = gib)]
    disk_gib: f64,
    /// Publish which blocks come and go to routers over ZeroMQ, as vLLM does, at this endpoint, such as `tcp://127.0.0.1:5557`; nothing of tenants with a token
    #[arg(long, env = "KVKEEP_DAEMON_KV_EVENTS", value_name = "ENDPOINT")]
    kv_events: Option<Endpoint>,
    /// Where routers ask for events that they missed, such as `tcp://127.0.0.1:5558`
    #[arg(long, env = "KVKEEP_DAEMON_KV_EVENTS_REPLAY", value_name = "ENDPOINT", requires = "kv_events")]
    kv_events_replay: Option<Endpoint>,
    /// The topic that routers subscribe to [default: an empty one]
    #[arg(long, env = "KVKEEP_DAEMON_KV_EVENTS_TOPIC", value_name = "TOPIC", requires = "kv_events")]
    kv_events_topic: Option<String>,
    /// Let whoever reaches the endpoints read: needed where other machines do, as ZeroMQ asks for no key
    #[arg(long, env = "KVKEEP_DAEMON_KV_EVENTS_ANYONE", requires = "kv_events")]
    kv_events_anyone: bool,
}

pub(crate) fn run(options: &DaemonOptions) -> Result<ExitCode> {
    tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::INFO)
        .with_writer(std::io::stderr)
        .init();
    let socket = socket(options.socket.as_ref())?;
    let tenants = tenants(options)?;
    let mut config = DaemonConfig::new(&socket, tenants.clone());
    if let Some(dir) = &options.disk {
        config = config.disk(dir, bytes_of(options.disk_gib));
    }
    // Ends after the daemon: what it tells last is still told.
    let events = kv_events(options)?;
    if let Some(events) = &events {
        config = config.events(events.sink());
    }
    let daemon = Daemon::start(&config)?;
    keep_memory_private()?;
    eprint!("{}", banner(options, &tenants));
    eprintln!("kvkeep: listening at {}", daemon.socket().display());
    wait()?;
    eprintln!("kvkeep: ending; what is to be on the disk is written first");
    daemon.stop()?;
    Ok(ExitCode::SUCCESS)
}

/// The tier by which a server uses a daemon.
///
/// What waits to be written to it is at most an eighth of the server's RAM.
pub(crate) fn tier(socket: &Path, token_file: Option<&Path>, ram_gib: f64) -> Result<DaemonTier> {
    let mut config = DaemonTierConfig::new(socket).queue_bytes(bytes_of(ram_gib) / 8);
    if let Some(file) = token_file {
        let (name, token) = kvkeep_daemon::read_token(file)?;
        config = config.tenant(name, token);
    }
    Ok(DaemonTier::open(&config)?)
}

/// Where the daemon's events are published, if they are.
fn kv_events(options: &DaemonOptions) -> Result<Option<KvEvents>> {
    let Some(endpoint) = &options.kv_events else { return Ok(None) };
    let mut config = KvEventsConfig::new(endpoint.clone());
    config.replay.clone_from(&options.kv_events_replay);
    config.topic = options.kv_events_topic.clone().unwrap_or_default();
    config.anyone = options.kv_events_anyone;
    Ok(Some(KvEvents::bind(&config)?))
}

fn socket(given: Option<&PathBuf>) -> Result<PathBuf> {
    let runtime_dir = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let socket = given.cloned().or_else(|| kvkeep_daemon::default_socket(runtime_dir.as_deref()));
    socket.context("there is no $XDG_RUNTIME_DIR: give --socket PATH, in a folder that is yours alone")
}

/// Those of the file, and everybody with what they leave.
fn tenants(options: &DaemonOptions) -> Result<Vec<Tenant>> {
    let all = bytes_of(options.ram_gib);
    let Some(file) = &options.tenants else { return Ok(vec![Tenant::without_token(all)]) };
    let mut tenants = kvkeep_daemon::read_tenants(file)?;
    let taken: u64 = tenants.iter().map(Tenant::ram_bytes).sum();
    match all.checked_sub(taken) {
        None => bail!(
            "the tenants of {} have {} together, and --ram-gib is {}: give more",
            file.display(),
            size(taken),
            options.ram_gib
        ),
        Some(0) => {}
        Some(left) => tenants.push(Tenant::without_token(left)),
    }
    Ok(tenants)
}

fn banner(options: &DaemonOptions, tenants: &[Tenant]) -> String {
    let disk = options.disk.as_ref().map_or_else(
        || "none: what is here is gone when the daemon ends".to_owned(),
        |dir| format!("{} in {}", size(bytes_of(options.disk_gib)), dir.display()),
    );
    let mut text = String::new();
    for tenant in tenants {
        let whose = if tenant.needs_token() { "with its token" } else { "whoever runs as this user" };
        text += &format!("  {:<10} {} of RAM, {whose}\n", tenant.name(), size(tenant.ram_bytes()));
    }
    text += &format!("  {:<10} {disk}\n", "disk");
    if let Some(endpoint) = &options.kv_events {
        text += &format!("  {:<10} {endpoint}, of memory that needs no token\n", "events");
    }
    text
}

/// Other processes of the same user cannot look into this one, nor take its descriptors.
fn keep_memory_private() -> Result<()> {
    use rustix::process::{DumpableBehavior, set_dumpable_behavior};
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .context("cannot keep other processes out of the daemon's memory")
}

fn wait() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.context("cannot wait for signals")?.block_on(async {
        let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        tokio::select! {
            _ = interrupt.recv() => (),
            _ = terminate.recv() => (),
        }
        Ok(())
    })
}

/// GiB, which the command line has checked, in bytes.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates, and is above 0")]
fn bytes_of(gib: f64) -> u64 {
    (gib * GIB) as u64
}
