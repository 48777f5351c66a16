//! `kvkeep serve`: settings, the model, the cache, and then the server until it is told to stop.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use kvkeep::{CacheConfig, KvCache};
use kvkeep_engine::DEFAULT_MODEL;
use kvkeep_server::{Server, ServerConfig};

use crate::model;

/// Answers OpenAI's API, and keeps every prompt prefix warm.
#[derive(Debug, Args)]
pub(crate) struct ServeOptions {
    /// Where to listen
    #[arg(long, default_value = "127.0.0.1")]
    host: IpAddr,
    /// 0 takes a free one
    #[arg(long, default_value = "8080")]
    port: u16,
    /// A model of your own, in GGUF format [default: SmolLM2-135M-Instruct, downloaded on first use]
    #[arg(long, value_name = "PATH.gguf")]
    model: Option<PathBuf>,
    /// Compute threads [default: one for each core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Memory that the cache may use, in GiB
    #[arg(long, value_name = "GIB", default_value = "1", value_parser = crate::cli::gib)]
    ram_gb: f64,
}

pub(crate) fn run(options: &ServeOptions) -> Result<ExitCode> {
    let engine = model::load(options.model.as_deref(), options.threads.map(usize::from))?;
    let cache = KvCache::new(CacheConfig::from_gib(options.ram_gb)?)?;
    let mut config = ServerConfig::new(SocketAddr::new(options.host, options.port));
    config.context_tokens = config.context_tokens.min(engine.context_tokens());
    let file = options.model.as_deref().unwrap_or(Path::new(DEFAULT_MODEL));
    config.model_name = file.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.context("cannot start the server's threads")?.block_on(async {
        let server = Server::bind(engine, cache, config).await?;
        eprintln!("kvkeep: listening at http://{}", server.address()?);
        server.run(async { tokio::signal::ctrl_c().await.unwrap_or_default() }).await
    })?;
    Ok(ExitCode::SUCCESS)
}
