//! Real file systems that are full or read-only: a small tmpfs, which takes root to mount.
//! Without that the tests say so and pass; on CI that is a failure.

#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, reason = "a test that panics fails")]

mod common;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::{assert_right, namespace, store};
use kvkeep::{Archive, CacheConfig, DiskConfig, Error, KvCache};

const MIB: u64 = 1 << 20;

/// A file system of its own; unmounted when dropped.
struct Mount(tempfile::TempDir);

impl Mount {
    fn new(options: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        if mount(&["-t", "tmpfs", "-o", options, "tmpfs"], dir.path()) {
            return Some(Self(dir));
        }
        assert!(std::env::var_os("CI").is_none(), "a tmpfs cannot be mounted here");
        eprintln!("SKIPPED: a tmpfs cannot be mounted here (it takes root)");
        None
    }

    fn remount(&self, options: &str) {
        assert!(mount(&["-o", &format!("remount,{options}")], self.0.path()));
    }

    fn dir(&self) -> std::path::PathBuf {
        self.0.path().join("kv")
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

fn mount(arguments: &[&str], dir: &Path) -> bool {
    Command::new("mount").args(arguments).arg(dir).output().is_ok_and(|output| output.status.success())
}

fn open(dir: &Path) -> kvkeep::Result<KvCache> {
    KvCache::new(CacheConfig::new(32 * MIB).disk(DiskConfig::new(dir, 256 * MIB)))
}

fn prompt(number: u32) -> Vec<u32> {
    // 32 blocks of 4 tokens.
    (number * 1000..number * 1000 + 128).collect()
}

#[test]
fn a_full_disk_is_shown_serving_goes_on_from_ram_and_writing_once_there_is_room() {
    let Some(mount) = Mount::new("size=4m") else { return };
    let (cache, namespace) = (open(&mount.dir()).unwrap(), namespace("m"));
    // 32 blocks of 2 pages on the disk each: 10 MiB, where 4 fit.
    let prompts: Vec<Vec<u32>> = (0..40).map(prompt).collect();
    prompts.iter().for_each(|tokens| drop_report(store(&cache, &namespace, tokens)));
    assert!(cache.flush().is_err(), "not all of it can be durable");
    let disk = cache.stats().tier("disk").unwrap().clone();
    assert!(disk.failing && disk.write_errors_total > 0, "{disk:?}");
    for tokens in &prompts {
        let found = cache.lookup(&namespace, tokens).unwrap();
        assert_eq!(found.cached_tokens(), tokens.len());
        assert_right(&found, tokens);
    }

    mount.remount("size=64m");
    let begin = Instant::now();
    while cache.flush().is_err() {
        assert!(begin.elapsed() < Duration::from_secs(60), "{:?}", cache.stats().tiers);
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(!cache.stats().tier("disk").unwrap().clone().failing);
    drop(cache);
    let cache = open(&mount.dir()).unwrap();
    for tokens in &prompts {
        let found = cache.lookup(&namespace, tokens).unwrap();
        assert_eq!(found.cached_tokens(), tokens.len());
        assert_right(&found, tokens);
    }
}

#[test]
fn a_read_only_directory_is_a_clear_error_and_can_still_be_looked_into() {
    let Some(mount) = Mount::new("size=16m") else { return };
    let namespace = namespace("m");
    let cache = open(&mount.dir()).unwrap();
    drop_report(store(&cache, &namespace, &prompt(0)));
    drop(cache);
    mount.remount("ro");
    let error = open(&mount.dir()).unwrap_err();
    assert!(matches!(error, Error::Disk { .. }), "{error}");
    assert!(error.to_string().contains("Read-only"), "{error}");
    let archive = Archive::open(mount.dir(), None, 0).unwrap();
    assert_eq!(archive.records().len(), 32);
}

fn drop_report(report: kvkeep::StoreReport) {
    assert_eq!(report.rejection, None);
}
