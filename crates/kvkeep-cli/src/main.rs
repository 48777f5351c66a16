//! The `kvkeep` command: a thin binary over the library and the engine.
//!
//! Standard output carries results and nothing else; progress goes to standard error.
//! Exit codes are part of the interface, see [`cli::EXIT_CODES`].

mod archive;
mod bench;
mod cli;
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
            eprintln!("kvkeep: {}", whole(&error));
            ExitCode::from(cli::FAILED)
        }
    }
}

/// What went wrong and why. A cause that is named already is not said twice.
fn whole(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |text, cause| match text.as_str() {
        "" => cause,
        said if said.contains(&cause) => text,
        said => format!("{said}: {cause}"),
    })
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    /// What the server could not write at its end was said three times.
    #[test]
    fn a_cause_is_said_once() {
        let error =
            anyhow!("the disk is full").context("cannot flush: the disk is full").context("the server has ended");
        assert_eq!(whole(&error), "the server has ended: cannot flush: the disk is full");
    }
}
