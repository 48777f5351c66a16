//! Promise 5, warm restart: a child process stores and flushes under load and is killed with
//! SIGKILL at a random moment; then everything flushed is there byte for byte, nothing torn
//! is visible, accounting equals the files, and the cap holds.
//!
//! `KVKEEP_CRASH_ROUNDS` says how often; a few times unless said otherwise.

#![expect(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test that panics fails")]

mod common;

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{assert_right, namespace, store};
use kvkeep::{
    Admission, Archive, CacheConfig, DType, DiskConfig, KvCache, Outcome, SimpleKvCache, TensorView, TokenId,
    WritePolicy,
};

const CHILD: &str = "KVKEEP_CRASH_CHILD";
const RAM_BYTES: u64 = 1 << 20;

/// Rounds that go on in one directory.
const ROUNDS_A_DIRECTORY: u64 = 20;

/// The cap. Every second directory has room for everything, so that nothing at all may be missing; the others
/// fill, and segments are evicted.
fn disk_bytes(round: u64) -> u64 {
    if is_roomy(round) { 1 << 30 } else { 24 << 20 }
}

fn is_roomy(round: u64) -> bool {
    (round / ROUNDS_A_DIRECTORY).is_multiple_of(2)
}

fn open(dir: &Path, round: u64) -> (KvCache, SimpleKvCache) {
    let policy = if round.is_multiple_of(2) { WritePolicy::Through } else { WritePolicy::Back };
    let admission = if needs_a_second_use(round) { Admission::SecondUse } else { Admission::All };
    let disk = DiskConfig::new(dir, disk_bytes(round)).write_policy(policy).admission(admission);
    let cache = KvCache::new(CacheConfig::new(RAM_BYTES).disk(disk)).unwrap();
    let simple = SimpleKvCache::over(cache.store_handle().clone(), "s");
    (cache, simple)
}

/// Then the child uses everything that it stores, so that all of it is admitted.
fn needs_a_second_use(round: u64) -> bool {
    round % 3 == 2
}

fn prompt(round: u64, number: u32) -> Vec<TokenId> {
    let start = round as u32 * 1_000_000 + number * 100;
    (start..start + 16).collect()
}

fn named(round: u64, number: u32) -> Vec<u8> {
    let seed = round.wrapping_mul(977) ^ u64::from(number);
    (0..5_000 + number % 7 * 3_000).map(|i| (u64::from(i).wrapping_mul(seed | 1) >> 7) as u8).collect()
}

/// Stores without an end; says what it has flushed, one line at a time.
fn child(dir: &Path, round: u64) {
    let (cache, simple) = open(dir, round);
    let mut out = std::io::stdout();
    // What RAM evicts while the queue is full is not written: until it is flushed, nothing is evicted.
    let (mut prompts, mut pairs) = (Vec::new(), Vec::new());
    for number in 0.. {
        assert_eq!(store(&cache, &namespace("m"), &prompt(round, number)).rejected_blocks, 0);
        let bytes = named(round, number);
        let view = TensorView::new(DType::U8, &[bytes.len()], &bytes).unwrap();
        let prefix = format!("prefix {}", number % 5);
        assert_eq!(simple.cache_kv(&prefix, 0, view, view).unwrap(), Outcome::Stored);
        if needs_a_second_use(round) {
            assert_eq!(cache.lookup(&namespace("m"), &prompt(round, number)).unwrap().cached_tokens(), 16);
            assert!(simple.get_cached_kv(&prefix, 0).unwrap().is_some());
        }
        prompts.push(cache.pin(&namespace("m"), &prompt(round, number)).unwrap());
        pairs.push(simple.get_cached_kv(&prefix, 0).unwrap());
        if number % 3 == 2 {
            cache.flush().unwrap();
            prompts.clear();
            pairs.clear();
            // A line of its own, whatever else the harness printed.
            writeln!(out, "\nflushed {number}").unwrap();
            out.flush().unwrap();
        }
    }
}

/// Kills a child after a while; the last number that it had flushed.
fn killed(dir: &Path, round: u64, after: Duration) -> Option<u32> {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "what_was_flushed_survives_a_kill_at_any_moment", "--nocapture"])
        .env(CHILD, format!("{round} {}", dir.display()))
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let reader = std::thread::spawn(move || {
        let flushed = lines.map_while(Result::ok).filter_map(|line| line.strip_prefix("flushed ")?.parse().ok());
        flushed.last()
    });
    std::thread::sleep(after);
    child.kill().unwrap();
    child.wait().unwrap();
    reader.join().unwrap()
}

/// Bytes of all files, as `du` counts them.
fn du(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let files = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().metadata().unwrap());
    files.map(|metadata| metadata.blocks() * 512).sum::<u64>() + std::fs::metadata(dir).unwrap().blocks() * 512
}

/// Looks for everything that was flushed; says how much of it was there.
fn check(dir: &Path, round: u64, flushed: Option<u32>) -> (u32, u32) {
    let cap = disk_bytes(round);
    assert!(du(dir) <= cap, "the cap holds while nobody runs: {}", du(dir));
    let (cache, simple) = open(dir, round);
    let stats = cache.stats().tier("disk").unwrap().clone();
    assert!(du(dir) <= cap && stats.used_bytes <= cap);
    assert!(du(dir) <= stats.used_bytes && stats.used_bytes <= du(dir) + (64 << 10), "{stats:?}, {}", du(dir));
    assert_eq!((stats.damaged_total, stats.foreign_files, stats.dropped_total), (0, 0, 0), "{stats:?}");
    let Some(flushed) = flushed else { return (0, 0) };
    let mut there = 0;
    for number in 0..=flushed {
        let tokens = prompt(round, number);
        let found = cache.lookup(&namespace("m"), &tokens).unwrap();
        assert_right(&found, &tokens);
        there += u32::from(found.cached_tokens() == tokens.len());
        // Where segments are evicted the oldest may be there and newer ones not: what is hot is written again.
        assert!(!is_roomy(round) || found.cached_tokens() == tokens.len(), "{number} of {flushed} is missing");
    }
    // The newest flushed is never evicted: the cap is much larger than what one flush writes.
    let newest = prompt(round, flushed);
    assert_eq!(cache.lookup(&namespace("m"), &newest).unwrap().cached_tokens(), newest.len());
    for slot in 0..5 {
        let possible: HashMap<Vec<u8>, u32> = (0..=flushed + 4)
            .filter(|number| number % 5 == slot)
            .map(|number| (named(round, number), number))
            .collect();
        let Some(newest_flushed) = (0..=flushed).rfind(|number| number % 5 == slot) else { continue };
        let hit = simple.get_cached_kv(&format!("prefix {slot}"), 0).unwrap();
        let hit = hit.unwrap_or_else(|| panic!("prefix {slot} is gone"));
        let number = possible.get(hit.k().bytes()).unwrap_or_else(|| panic!("wrong bytes under prefix {slot}"));
        assert!(*number >= newest_flushed, "prefix {slot}: {number} is older than {newest_flushed}");
        assert_eq!(hit.v().bytes(), hit.k().bytes());
    }
    assert_eq!(cache.stats().tier("disk").unwrap().clone().damaged_total, 0, "nothing torn is visible");
    (there, flushed + 1)
}

#[test]
fn what_was_flushed_survives_a_kill_at_any_moment() {
    if let Ok(task) = std::env::var(CHILD) {
        let (round, dir) = task.split_once(' ').unwrap();
        return child(Path::new(dir), round.parse().unwrap());
    }
    let rounds: u64 = std::env::var("KVKEEP_CRASH_ROUNDS").map_or(6, |rounds| rounds.parse().unwrap());
    // On the disk that the build is on: /tmp may be memory.
    let home = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (mut there, mut flushed, mut seed) = (0u32, 0u32, u64::from(std::process::id()) | 1);
    for round in 0..rounds {
        let dir = home.path().join((round / ROUNDS_A_DIRECTORY).to_string());
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        let after = Duration::from_micros(30_000 + seed % 370_000);
        let last = killed(&dir, round, after);
        if !dir.exists() {
            continue;
        }
        let (found, of) = check(&dir, round, last);
        (there, flushed) = (there + found, flushed + of);
        let archive = Archive::open(&dir, None, 0).unwrap().verify(|_| {});
        assert!(archive.is_whole() && archive.unsealed_segments == 0, "{archive:?}");
        if round % ROUNDS_A_DIRECTORY == ROUNDS_A_DIRECTORY - 1 {
            std::fs::remove_dir_all(&dir).unwrap();
        }
    }
    println!("{rounds} kills: {there} of {flushed} flushed prompts were there, the rest evicted");
    assert!(flushed > 0, "no child got as far as a flush");
}
