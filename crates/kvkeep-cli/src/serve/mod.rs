//! `kvkeep serve`: settings, the model, the cache, and then the server until it is told to stop.

mod banner;
mod memory;
mod settings;

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use kvkeep::tiers::Codecs;
use kvkeep::{CacheConfig, DiskConfig, Error as CacheError, KvCache, Tier};
use kvkeep_engine::{Engine, user_cache_dir};
use kvkeep_remote::{RemoteConfig, RemoteTier};
use kvkeep_server::{ApiKeys, KvEvents, KvEventsConfig, Server, ServerConfig};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::filter::LevelFilter;

use self::banner::Banner;
pub(crate) use self::settings::Settings;
use self::settings::{LogFormat, LogLevel};
use crate::{cli, model, style};

/// Tokenising and closing; more at once would only fight over the cores.
const BLOCKING_THREADS: usize = 4;
/// What waits to be written to the remote tier is at most this part of RAM.
const REMOTE_QUEUE_DIVISOR: u64 = 8;

/// Answers OpenAI's API with a model whose prompts stay warm, also over a restart.
///
/// Every setting is a flag, a variable or a line in --config; a flag wins over its variable, that
/// over the file, and that over the default. In the file a setting is called as its flag, with
/// _ for -; see --print-config.
#[derive(Debug, Args)]
#[command(after_help = cli::EXIT_CODES)]
pub(crate) struct ServeOptions {
    /// Read settings from this file
    #[arg(long, env = "KVKEEP_SERVE_CONFIG", value_name = "FILE.toml")]
    config: Option<PathBuf>,
    /// Print the settings that hold, as a file for --config, and end
    #[arg(long)]
    print_config: bool,
    #[command(flatten)]
    settings: Settings,
}

pub(crate) fn run(options: ServeOptions) -> Result<ExitCode> {
    settings::refuse_renamed(|name| std::env::var_os(name).is_some())?;
    let settings = options.settings.merged(options.config.as_deref())?;
    if options.print_config {
        style::say(settings.toml()?.trim_end())?;
        return Ok(ExitCode::SUCCESS);
    }
    log(&settings);
    let mut config = config(&settings)?;
    let dir = disk_dir(&settings)?;
    // Outlives the server: the last events are sent after its cache has closed.
    let events = kv_events(&settings)?;
    config.kv_events = events.as_ref().map(KvEvents::meter);
    let cache = cache(&settings, dir.as_deref(), events.as_ref())?;
    let engine = model::load(settings.model.as_deref(), &model::options(settings.threads).background(true))?;
    let asked_tokens = config.context_tokens;
    config.context_tokens = asked_tokens.min(engine.context_tokens());
    let (model, context_tokens) = (config.model_name.clone().unwrap_or_default(), config.context_tokens);
    let (weights_bytes, stats) = (engine.weights_bytes(), cache.stats());
    let up = |address: SocketAddr| {
        let disk = dir.as_deref().zip(stats.tier("disk").map(|disk| disk.capacity_bytes));
        let (settings, model, ram_bytes) = (&settings, model.as_str(), stats.capacity_bytes);
        let events = events.as_ref();
        let banner =
            Banner { settings, address, model, context_tokens, asked_tokens, weights_bytes, ram_bytes, disk, events };
        eprint!("{}", banner.text());
        eprintln!("kvkeep: listening at http://{address}");
    };
    serve(engine, cache, config, up)?;
    Ok(ExitCode::SUCCESS)
}

/// `up` is told where the server listens.
fn serve(engine: Engine, cache: KvCache, config: ServerConfig, up: impl FnOnce(SocketAddr)) -> Result<()> {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(2).max_blocking_threads(BLOCKING_THREADS).enable_all().build();
    runtime.context("cannot start the server's threads")?.block_on(async {
        let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        let server = Server::bind(engine, cache, config).await?;
        up(server.address()?);
        let told = async move {
            tokio::select! {
                _ = interrupt.recv() => (),
                _ = terminate.recv() => (),
            }
            eprintln!("kvkeep: ending; what is under way is finished first");
        };
        Ok(server.run(told).await?)
    })
}

fn config(settings: &Settings) -> Result<ServerConfig> {
    let seconds = |setting: Option<u32>, default: Duration| {
        setting.map_or(default, |seconds| Duration::from_secs(seconds.into()))
    };
    let count = |setting: Option<u32>, default: usize| setting.map_or(default, |count| count as usize);
    let mut config = ServerConfig::new(address(settings)?);
    config.api_keys = settings.api_key_file.as_deref().map(ApiKeys::read).transpose()?;
    config.connections = count(settings.connections, config.connections);
    config.body_bytes = settings.max_body_mib.map_or(config.body_bytes, |mib| (mib as usize) << 20);
    config.client_timeout = seconds(settings.client_timeout_s, config.client_timeout);
    config.allow_origins = settings.allow_origin.clone().unwrap_or_default();
    let name = settings.model_name.clone();
    config.model_name = Some(name.unwrap_or_else(|| model::name(settings.model.as_deref())));
    config.model_aliases = settings.model_alias.clone().unwrap_or_default();
    config.context_tokens = count(settings.context_tokens, config.context_tokens);
    config.block_tokens = settings.block_tokens.unwrap_or(config.block_tokens);
    config.parallel = settings.parallel.map_or(config.parallel, usize::from);
    config.queue = count(settings.queue, config.queue);
    config.request_timeout = seconds(settings.request_timeout_s, config.request_timeout);
    config.stream_error_window = seconds(settings.stream_error_window_s, config.stream_error_window);
    config.shutdown_grace = seconds(settings.shutdown_grace_s, config.shutdown_grace);
    config.log_prompts = settings.log_prompts.unwrap_or_default();
    Ok(config)
}

/// Where to listen. Of a name's addresses the first of IPv4 is taken, as clients try that one too.
fn address(settings: &Settings) -> Result<SocketAddr> {
    let (host, port) = (settings.host.as_deref().unwrap_or("127.0.0.1"), settings.port.unwrap_or_default());
    if let Ok(address) = host.trim_matches(['[', ']']).parse::<IpAddr>() {
        return Ok(SocketAddr::new(address, port));
    }
    let found = (host, port).to_socket_addrs();
    let found = found.with_context(|| format!("--host {host} is no address and no name of this machine"))?;
    let addresses: Vec<SocketAddr> = found.collect();
    let first = addresses.iter().find(|address| address.is_ipv4()).or(addresses.first());
    first.copied().with_context(|| format!("--host {host} has no address"))
}

/// Where the disk tier is, if there is one.
fn disk_dir(settings: &Settings) -> Result<Option<PathBuf>> {
    match (settings.no_disk, &settings.disk) {
        (Some(true), _) => Ok(None),
        (_, Some(dir)) => Ok(Some(dir.clone())),
        // The daemon has what is to outlive this server.
        (_, None) if settings.daemon.is_some() => Ok(None),
        // The models lie beside it.
        (_, None) => Ok(Some(user_cache_dir()?.with_file_name("serve"))),
    }
}

/// Where the cache's events are published, if they are.
fn kv_events(settings: &Settings) -> Result<Option<KvEvents>> {
    let Some(endpoint) = &settings.kv_events else {
        let more = [settings.kv_events_replay.is_some(), settings.kv_events_tokens == Some(true)];
        ensure!(!more.contains(&true), "nothing is published without --kv-events: give it an endpoint too");
        return Ok(None);
    };
    let mut config = KvEventsConfig::new(endpoint.clone());
    config.replay.clone_from(&settings.kv_events_replay);
    config.topic = settings.kv_events_topic.clone().unwrap_or_default();
    config.tokens = settings.kv_events_tokens.unwrap_or_default();
    config.anyone = settings.kv_events_anyone.unwrap_or_default();
    Ok(Some(KvEvents::bind(&config)?))
}

fn cache(settings: &Settings, dir: Option<&Path>, events: Option<&KvEvents>) -> Result<KvCache> {
    let ram_gib = settings.ram_gib.unwrap_or(1.0);
    memory::check(ram_gib)?;
    let mut config = CacheConfig::from_gib(ram_gib)?;
    if let Some(dir) = dir {
        let mut disk = DiskConfig::from_gib(dir, settings.disk_gib.unwrap_or(8.0))?;
        if let Some(key) = &settings.disk_key_file {
            disk = disk.key_file(key);
        }
        if let Some(codec) = &settings.disk_codec {
            disk = disk.codecs(Codecs::named(codec)?);
        }
        config = config.disk(disk);
    }
    if let Some(socket) = &settings.daemon {
        config = config.tier_before_disk(daemon(socket, settings.daemon_token_file.as_deref(), ram_gib)?);
    }
    if let Some(url) = &settings.remote {
        config = config.tier(Arc::new(remote(settings, url)?));
    }
    if let Some(events) = events {
        config = config.events(events.sink());
    }
    KvCache::new(config).map_err(|error| match error {
        CacheError::DiskLocked { .. } => anyhow::Error::new(error).context(
            "another server keeps its cache there: stop that one, or start this one with --disk DIR or --no-disk",
        ),
        error => error.into(),
    })
}

/// The tier that several servers share.
fn remote(settings: &Settings, url: &str) -> Result<RemoteTier> {
    let gib = settings.remote_gib.unwrap_or(10.0);
    let mut config = RemoteConfig::new(url)
        .prefix(settings.remote_prefix.as_deref().unwrap_or("kvkeep"))
        .capacity_bytes(bytes_of(gib))
        .deadline(Duration::from_millis(settings.remote_deadline_ms.unwrap_or(50).into()))
        .ttl(settings.remote_ttl_s.map(|seconds| Duration::from_secs(seconds.into())))
        .queue_bytes(bytes_of(settings.ram_gib.unwrap_or(1.0)) / REMOTE_QUEUE_DIVISOR)
        .variables(
            std::env::vars_os().filter_map(|(name, value)| name.into_string().ok().zip(value.into_string().ok())),
        );
    if let Some(key) = &settings.remote_key_file {
        config = config.key_file(key);
    }
    if let Some(codec) = &settings.remote_codec {
        config = config.codecs(Codecs::named(codec)?);
    }
    Ok(RemoteTier::open(&config)?)
}

/// GiB, which the command line has checked, in bytes.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates, and is above 0")]
fn bytes_of(gib: f64) -> u64 {
    (gib * f64::from(1 << 30)) as u64
}

#[cfg(target_os = "linux")]
fn daemon(socket: &Path, token_file: Option<&Path>, ram_gib: f64) -> Result<Arc<dyn Tier>> {
    Ok(Arc::new(crate::daemon::tier(socket, token_file, ram_gib)?))
}

#[cfg(not(target_os = "linux"))]
fn daemon(_: &Path, _: Option<&Path>, _: f64) -> Result<Arc<dyn Tier>> {
    anyhow::bail!("--daemon needs Linux: leave it out")
}

fn log(settings: &Settings) {
    let level = match settings.log_level {
        Some(LogLevel::Error) => LevelFilter::ERROR,
        Some(LogLevel::Warn) => LevelFilter::WARN,
        Some(LogLevel::Info) | None => LevelFilter::INFO,
        Some(LogLevel::Debug) => LevelFilter::DEBUG,
        Some(LogLevel::Trace) => LevelFilter::TRACE,
    };
    let lines = tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr);
    if settings.log_format == Some(LogFormat::Json) {
        lines.json().flatten_event(true).init();
    } else {
        lines.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).with_target(false).init();
    }
}
