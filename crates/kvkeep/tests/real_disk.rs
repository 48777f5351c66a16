//! Real file systems that are full or read-only: a small tmpfs, which takes root to mount.
//! Without that the tests say so and pass; on CI that is a failure.

#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, reason = "a test that panics fails")]

mod common;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::{assert_right, namespace, store};
use kvkeep::{Archive, CacheConfig, DiskConfig, Error, KvCache, OneLine};

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

/// On 64 MiB with a cap of 1 GiB the oldest 430 entries stayed for ever: 0 evictions in 1,500 stores.
#[test]
fn a_disk_smaller_than_the_cap_rotates_within_what_it_has() {
    let Some(mount) = Mount::new("size=64m") else { return };
    let config = || CacheConfig::new(16 * MIB).disk(DiskConfig::new(mount.dir(), 1024 * MIB));
    let (cache, namespace) = (KvCache::new(config()).unwrap(), namespace("m"));
    // 32 blocks of 2 pages each: 256 KiB a prompt, 100 MiB in all.
    let prompts: Vec<Vec<u32>> = (0..400).map(prompt).collect();
    for (number, tokens) in prompts.iter().enumerate() {
        drop_report(store(&cache, &namespace, tokens));
        if number % 10 == 9 {
            cache.flush().unwrap();
        }
    }
    let disk = cache.stats().tier("disk").unwrap().clone();
    assert!(!disk.failing && disk.evictions > 1_000, "{disk:?}");
    drop(cache);
    let verified = Archive::open(mount.dir(), None, 0).unwrap().verify(|_| {});
    assert!(verified.is_whole(), "{verified:?}");
    let cache = KvCache::new(config()).unwrap();
    let there = |tokens: &&Vec<u32>| cache.lookup(&namespace, tokens).unwrap().cached_tokens() == tokens.len();
    let found = prompts.iter().filter(there).count();
    // 245 would fit without an index and headers.
    println!("{found} of 400 prompts are on the disk: {:?}", cache.stats().tier("disk").unwrap().clone());
    assert!(found > 180, "{found}");
    assert!(prompts.iter().rev().take(100).all(|tokens| there(&tokens)));
    assert!(!there(&&prompts[0]));
}

/// Somebody else fills the disk, and gives it back.
#[test]
fn a_disk_that_others_fill_goes_on_with_what_is_left_and_takes_again_what_they_give_back() {
    let Some(mount) = Mount::new("size=24m") else { return };
    let (cache, namespace) = (open(&mount.dir()).unwrap(), namespace("m"));
    let mut next = 0;
    let mut fill = |prompts: u32| {
        for _ in 0..prompts {
            drop_report(store(&cache, &namespace, &prompt(next)));
            next += 1;
            cache.flush().unwrap();
        }
        next
    };
    fill(40);
    let used = |cache: &KvCache| cache.stats().tier("disk").unwrap().clone().used_bytes;
    let other = mount.dir().join("../other");
    let file = std::fs::File::create(&other).unwrap();
    // As much as there is.
    let mut bytes = 24 * MIB;
    while bytes > 4096 && rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes).is_err() {
        bytes -= 64 << 10;
    }
    fill(60);
    assert!(
        !cache.stats().tier("disk").unwrap().clone().failing && used(&cache) < 16 * MIB,
        "{:?}",
        cache.stats().tiers
    );
    let small = used(&cache);
    std::fs::remove_file(&other).unwrap();
    drop(file);
    let begin = Instant::now();
    while used(&cache) < small + 4 * MIB {
        assert!(begin.elapsed() < Duration::from_secs(100), "{:?}", cache.stats().tiers);
        fill(2);
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_full_disk_serves_on_from_ram_and_takes_the_rest_once_there_is_room() {
    let Some(mount) = Mount::new("size=4m") else { return };
    let (cache, namespace) = (open(&mount.dir()).unwrap(), namespace("m"));
    // 32 blocks of 2 pages on the disk each: 10 MiB, where 4 fit.
    let prompts: Vec<Vec<u32>> = (0..40).map(prompt).collect();
    prompts.iter().for_each(|tokens| drop_report(store(&cache, &namespace, tokens)));
    cache.flush().unwrap();
    let disk = cache.stats().tier("disk").unwrap().clone();
    assert!(!disk.failing && disk.evictions > 0 && disk.used_bytes <= 4 * MIB + (64 << 10), "{disk:?}");
    let all_there = |cache: &KvCache| {
        for tokens in &prompts {
            let found = cache.lookup(&namespace, tokens).unwrap();
            assert_eq!(found.cached_tokens(), tokens.len());
            assert_right(&found, tokens);
        }
    };
    all_there(&cache);

    mount.remount("size=64m");
    let begin = Instant::now();
    while cache.stats().tier("disk").unwrap().clone().entries < 40 * 32 {
        assert!(begin.elapsed() < Duration::from_secs(60), "{:?}", cache.stats().tiers);
        cache.flush().unwrap();
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(!cache.stats().tier("disk").unwrap().clone().failing);
    drop(cache);
    all_there(&open(&mount.dir()).unwrap());
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
    assert!(OneLine(&error).to_string().contains("Read-only"), "{error}");
    let archive = Archive::open(mount.dir(), None, 0).unwrap();
    assert_eq!(archive.records().len(), 32);
}

fn drop_report(report: kvkeep::StoreReport) {
    assert_eq!(report.rejection, None);
}
