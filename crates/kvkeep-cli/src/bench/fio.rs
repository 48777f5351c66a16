//! What the disk itself can do: fio with direct I/O where it is installed, a plain loop if not.
//!
//! Same file system, block size, and bytes as the cache's figures; rounds take turns with them.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::fs::OFlags;
use serde_json::Value;

use super::Aligned;

const BLOCK_BYTES: usize = 2 << 20;
/// What `O_DIRECT` asks of memory on every file system that has it.
const DIRECT_ALIGN: usize = 4096;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    Write,
    Read,
}

/// Measures one file of the given size.
#[derive(Debug)]
pub(super) struct Reference {
    file: PathBuf,
    bytes: usize,
    fio: bool,
    direct: bool,
}

impl Reference {
    pub(super) fn new(dir: &Path, bytes: usize) -> Result<Self> {
        let fio = Command::new("fio").arg("--version").output().is_ok_and(|output| output.status.success());
        let file = dir.join("reference");
        let direct = open(&file, true).is_ok();
        let reference = Self { file, bytes, fio, direct };
        reference.plain(Direction::Write)?;
        if !fio {
            eprintln!("kvkeep bench: fio is not installed: the reference is a plain loop of reads and writes");
        }
        if !direct {
            eprintln!("kvkeep bench: this file system has no direct I/O: all figures are those of its page cache");
        }
        Ok(reference)
    }

    /// What the figures stand beside.
    pub(super) fn name(&self, depth: u8) -> &'static str {
        match (self.fio, self.direct, depth) {
            (true, true, 1) => "fio, direct, iodepth 1",
            (true, true, _) => "fio, direct, iodepth 4",
            (true, false, _) => "fio, page cache",
            (false, true, _) => "plain O_DIRECT loop",
            (false, false, _) => "plain loop, page cache",
        }
    }

    /// Moves all bytes once.
    pub(super) fn run(&self, direction: Direction, depth: u8) -> Result<Duration> {
        if self.fio { self.fio(direction, depth) } else { self.plain(direction) }
    }

    fn fio(&self, direction: Direction, depth: u8) -> Result<Duration> {
        let name = if direction == Direction::Write { "write" } else { "read" };
        if direction == Direction::Write {
            // The cache's segments are new files, too.
            std::fs::remove_file(&self.file).context("cannot remove the reference's file")?;
        }
        let output = Command::new("fio")
            .arg("--name=reference")
            .arg(format!("--filename={}", self.file.display()))
            .args([format!("--rw={name}"), format!("--size={}", self.bytes), format!("--bs={BLOCK_BYTES}")])
            .args([format!("--direct={}", u8::from(self.direct)), format!("--iodepth={depth}")])
            .args(["--ioengine=libaio", "--end_fsync=1", "--output-format=json"])
            .output()
            .context("cannot run fio")?;
        ensure!(output.status.success(), "fio failed: {}", String::from_utf8_lossy(&output.stderr));
        let json: Value = serde_json::from_slice(&output.stdout).context("fio printed no JSON")?;
        let rate = json.pointer(&format!("/jobs/0/{name}/bw_bytes")).and_then(Value::as_f64);
        let rate = rate.filter(|rate| *rate > 0.0).context("fio measured nothing")?;
        #[expect(clippy::cast_precision_loss, reason = "sizes here are far below 2^52")]
        Ok(Duration::from_secs_f64(self.bytes as f64 / rate))
    }

    fn plain(&self, direction: Direction) -> Result<Duration> {
        let mut buffer = Aligned::at(DIRECT_ALIGN, BLOCK_BYTES, 7);
        let file = open(&self.file, self.direct).context("cannot open the reference's file")?;
        let begin = Instant::now();
        for at in (0..self.bytes as u64).step_by(BLOCK_BYTES) {
            match direction {
                Direction::Write => file.write_all_at(buffer.get(), at)?,
                Direction::Read => file.read_exact_at(buffer.get_mut(), at)?,
            }
        }
        if direction == Direction::Write {
            file.sync_data()?;
        }
        Ok(begin.elapsed())
    }
}

fn open(file: &Path, direct: bool) -> std::io::Result<File> {
    let flags = i32::try_from(if direct { OFlags::DIRECT.bits() } else { 0 }).unwrap_or_default();
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(flags).open(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_moves_all_bytes_with_and_without_fio() {
        let dir = tempfile::tempdir().unwrap();
        let mut reference = Reference::new(dir.path(), 4 * BLOCK_BYTES).unwrap();
        assert_eq!(std::fs::metadata(dir.path().join("reference")).unwrap().len(), 4 * BLOCK_BYTES as u64);
        for fio in [reference.fio, false] {
            reference.fio = fio;
            for direction in [Direction::Write, Direction::Read] {
                assert!(reference.run(direction, 1).unwrap() > Duration::ZERO);
            }
        }
    }
}
