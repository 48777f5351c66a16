//! How much memory this machine, or the container around this process, has.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};

use crate::style::size;

const GIB: f64 = 1024.0 * 1024.0 * 1024.0;

/// Refuses a RAM tier that the machine has no memory for: it would be taken bit by bit, until the
/// system ends the server in the middle of its work.
pub(super) fn check(ram_gib: f64) -> Result<()> {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a setting above 0, and far below 2^64"
    )]
    let ram_bytes = (ram_gib * GIB) as u64;
    fits(ram_bytes, limit(Path::new("/")))
}

fn fits(ram_bytes: u64, limit: Option<u64>) -> Result<()> {
    let Some(limit) = limit else { return Ok(()) };
    ensure!(
        ram_bytes < limit,
        "--ram-gib asks for {}, and this machine has {} of memory for everything: the model and each of --parallel \
         requests need some too",
        size(ram_bytes),
        size(limit)
    );
    if ram_bytes > limit / 5 * 4 {
        eprintln!(
            "kvkeep: the cache may take {} of this machine's {}: the model and each of --parallel requests need some too",
            size(ram_bytes),
            size(limit)
        );
    }
    Ok(())
}

/// The machine's memory, or less if the process may use less; `None` where the system does not say.
fn limit(root: &Path) -> Option<u64> {
    let read = |path: &str| fs::read_to_string(root.join(path)).ok();
    let machine = read("proc/meminfo").and_then(|text| {
        let kib = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?.trim().strip_suffix(" kB")?;
        kib.parse::<u64>().ok()?.checked_mul(1024)
    });
    let container = read("sys/fs/cgroup/memory.max").and_then(|text| text.trim().parse().ok());
    machine.into_iter().chain(container).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 64 GiB of RAM were promised on a machine with 16, and the server was ended by the system later.
    #[test]
    fn more_ram_than_there_is_is_refused() {
        let gib = |n: u64| n << 30;
        assert!(fits(gib(64), Some(gib(16))).unwrap_err().to_string().contains("this machine has 16.0 GiB"));
        assert!(fits(gib(16), Some(gib(16))).is_err());
        assert!(fits(gib(15), Some(gib(16))).is_ok() && fits(gib(1), Some(gib(16))).is_ok());
        assert!(fits(gib(64), None).is_ok());
    }

    #[test]
    fn a_containers_limit_counts_where_it_is_less() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(limit(root.path()), None);
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("proc/meminfo", "MemTotal:       16384 kB\nMemFree: 5 kB\n");
        assert_eq!(limit(root.path()), Some(16 << 20));
        write("sys/fs/cgroup/memory.max", "max\n");
        assert_eq!(limit(root.path()), Some(16 << 20));
        write("sys/fs/cgroup/memory.max", "1048576\n");
        assert_eq!(limit(root.path()), Some(1 << 20));
    }
}
