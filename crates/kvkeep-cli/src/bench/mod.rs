//! Measures the cache.
use crate::cli::BenchOptions;
pub(crate) fn run(_: &BenchOptions) -> anyhow::Result<std::process::ExitCode> {
    anyhow::bail!("not yet")
}
