//! The `kvkeep` command: a thin binary over the library and the engine.
//!
//! Standard output carries results and nothing else; progress goes to standard error.
//! Exit codes are part of the interface, see [`cli::EXIT_CODES`].

mod archive;
mod bench;
mod cli;
#[cfg(target_os = "linux")]
mod daemon;
mod demo;
mod model;
mod operate;
mod plot;
mod replay;
mod serve;
mod stats;
mod style;
mod texts;

use std::process::ExitCode;

use clap::Parser;
use kvkeep::OneLine;

use crate::cli::{Cli, Command};

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Demo(command) => demo::run(&command),
        Command::Stats(options) => operate::stats(&options),
        Command::Prefixes(options) => operate::prefixes(&options),
        Command::Warm(options) => operate::warm(&options),
        Command::Pin(options) => operate::pin(&options),
        Command::Unpin(options) => operate::unpin(&options),
        Command::Remove(options) => operate::remove(&options),
        Command::Clear(options) => operate::clear(&options),
        #[cfg(target_os = "linux")]
        Command::Daemon(options) => daemon::run(&options),
        Command::Serve(options) => serve::run(*options),
        Command::Bench(options) => bench::run(&options),
        Command::Replay(options) => replay::run(&options),
        Command::Verify(options) => archive::verify(&options),
        Command::Inspect(options) => archive::inspect(&options),
        Command::Completions { shell } => cli::completions(shell),
        Command::Export(options) => archive::export(&options),
    };
    match outcome {
        Ok(code) => code,
        // As with head: nothing failed.
        Err(error) if error.is::<style::ReaderLeft>() => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kvkeep: {}", OneLine(error.as_ref()));
            ExitCode::from(cli::FAILED)
        }
    }
}
