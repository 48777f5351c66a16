//! Finds, fetches and loads the model, with progress for people on standard error.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use kvkeep_engine::{DEFAULT_MODEL, Engine, EngineOptions, default_model_path, user_cache_dir};

/// How to run it: on so many threads, or one for each core.
pub(crate) fn options(threads: Option<u16>) -> EngineOptions {
    threads.map_or_else(EngineOptions::default, |threads| EngineOptions::default().threads(threads.into()))
}

/// What a model is called everywhere: as its file, without .gguf.
pub(crate) fn name(model: Option<&Path>) -> String {
    let file = model.unwrap_or(Path::new(DEFAULT_MODEL)).file_stem().unwrap_or_default();
    file.to_string_lossy().into_owned()
}

/// Loads the given model, or the default one, which is downloaded on first use.
pub(crate) fn load(model: Option<&Path>, options: &EngineOptions) -> Result<Engine> {
    let path = match model {
        Some(path) => path.to_owned(),
        None => fetch()?,
    };
    let bar = ProgressBar::new_spinner().with_message(format!("loading {}", path.display()));
    bar.enable_steady_tick(Duration::from_millis(100));
    let engine = Engine::load(&path, options).with_context(|| format!("cannot load the model {}", path.display()));
    bar.finish_and_clear();
    engine
}

fn fetch() -> Result<PathBuf> {
    let mut bar: Option<ProgressBar> = None;
    let path = default_model_path(&user_cache_dir()?, &mut |done, total| {
        bar.get_or_insert_with(|| byte_bar(total)).set_position(done);
    })?;
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    Ok(path)
}

fn byte_bar(total: u64) -> ProgressBar {
    let template = "{msg} [{bar:32}] {bytes} of {total_bytes} ({binary_bytes_per_sec}, {eta} left)";
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(total).with_style(style.progress_chars("=> ")).with_message(format!("downloading {DEFAULT_MODEL}"))
}
