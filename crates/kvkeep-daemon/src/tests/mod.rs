//! The daemon with real processes. A test program runs itself again as another process: see [`child`].

mod promises;
mod sharing;

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvkeep::tiers::{BlockMeta, Deadline, Offer};
use kvkeep::{CacheConfig, Chain, KvCache, KvLayout, Namespace, StoreOptions};

use crate::config::{DaemonConfig, DaemonTierConfig};
use crate::server::Daemon;
use crate::tenants::Tenant;
use crate::tier::DaemonTier;

const BLOCK_BYTES: usize = 64 << 10;
const ROLE: &str = "KVKEEP_DAEMON_ROLE";
const SOCKET: &str = "KVKEEP_DAEMON_SOCKET";
const PATIENCE: Duration = Duration::from_secs(30);

/// A folder with a socket to be.
struct Place {
    _dir: tempfile::TempDir,
    socket: PathBuf,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("daemon.sock");
        Self { _dir: dir, socket }
    }

    fn config(&self, ram_bytes: u64) -> DaemonConfig {
        DaemonConfig::new(&self.socket, vec![Tenant::without_token(ram_bytes)])
    }

    /// Machines that run tests are slow: late is not gone here.
    fn tier_config(&self) -> DaemonTierConfig {
        DaemonTierConfig::new(&self.socket).deadline(Duration::from_secs(5))
    }

    fn tier(&self) -> Arc<DaemonTier> {
        Arc::new(DaemonTier::open(&self.tier_config()).unwrap())
    }

    fn cache(&self) -> KvCache {
        cache(self.tier())
    }
}

/// RAM of its own for some blocks, and the daemon behind it.
fn cache(tier: Arc<DaemonTier>) -> KvCache {
    KvCache::new(CacheConfig::new(40 * BLOCK_BYTES as u64).tier(tier)).unwrap()
}

fn namespace() -> Namespace {
    Namespace::new("m", KvLayout::opaque(u32::try_from(BLOCK_BYTES).unwrap(), 4).unwrap())
}

fn chain(seed: u32, blocks: u32) -> Chain {
    let tokens: Vec<u32> = (0..4 * blocks).map(|token| seed * 100_000 + token).collect();
    Chain::of(&namespace(), &tokens).unwrap()
}

fn content(seed: u32, block: u32) -> Vec<u8> {
    let mut state = u64::from(seed) << 32 | u64::from(block) | 1;
    let mut words = (0..BLOCK_BYTES / 8).flat_map(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_le_bytes()
    });
    words.by_ref().collect()
}

fn store(cache: &KvCache, seed: u32, blocks: u32) {
    let bytes: Vec<Vec<u8>> = (0..blocks).map(|block| content(seed, block)).collect();
    let slices: Vec<&[u8]> = bytes.iter().map(Vec::as_slice).collect();
    let stored = cache.store_blocks(&chain(seed, blocks), 0, &slices, &StoreOptions::default()).unwrap();
    assert_eq!(stored.rejected_blocks, 0);
}

/// Blocks of a prompt that are found; each is what was stored.
fn found(cache: &KvCache, seed: u32, blocks: u32) -> usize {
    let found = cache.lookup_chain(&chain(seed, blocks));
    for block in 0..found.blocks() {
        let right = content(seed, u32::try_from(block).unwrap());
        assert!(found.block(block).unwrap() == right, "wrong bytes: prompt {seed}, block {block}");
    }
    found.blocks()
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) -> Duration {
    let begin = Instant::now();
    while !is_so() {
        assert!(begin.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
    begin.elapsed()
}

/// Another process, which does what it is told line by line.
struct Process {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Process {
    fn start(role: &str, socket: &Path) -> Self {
        Self::started(role, socket, |_| {})
    }

    fn started(role: &str, socket: &Path, change: impl FnOnce(&mut Command)) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["tests::child", "--exact", "--nocapture", "--ignored", "--test-threads=1"]);
        command.env(ROLE, role).env(SOCKET, socket).stdin(Stdio::piped()).stdout(Stdio::piped());
        change(&mut command);
        let mut child = command.spawn().unwrap();
        let (to, from) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut started = Self { child, to, from };
        started.said("ready");
        started
    }

    /// Waits for a line that begins so, and gives the rest of it.
    fn said(&mut self, begins: &str) -> String {
        for line in (&mut self.from).lines() {
            // The harness writes the test's name in front of what it says.
            if let Some((_, rest)) = line.unwrap().split_once(&format!("> {begins}")) {
                return rest.trim().to_owned();
            }
        }
        panic!("the other process ended without {begins:?}");
    }

    fn ask(&mut self, line: &str) -> String {
        writeln!(self.to, "{line}").unwrap();
        self.to.flush().unwrap();
        self.said("done")
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn say(line: &str) {
    println!("> {line}");
    std::io::stdout().flush().unwrap();
}

/// Not a test: what the other processes run.
#[test]
#[ignore = "run by other tests, as another process"]
fn child() {
    let (Ok(role), Ok(socket)) = (std::env::var(ROLE), std::env::var(SOCKET)) else { return };
    match role.as_str() {
        "daemon" => {
            let config = DaemonConfig::new(&socket, vec![Tenant::without_token(64 << 20)]);
            let _daemon = Daemon::start(&config).unwrap();
            say("ready");
            std::io::stdin().lines().for_each(drop);
        }
        "client" => serve_lines(Path::new(&socket)),
        "holder" => hold_for_ever(Path::new(&socket)),
        "stranger" => {
            let refused = DaemonTier::open(&DaemonTierConfig::new(&socket)).unwrap_err();
            say("ready");
            say(&format!("done {refused}"));
        }
        other => panic!("{other}"),
    }
}

/// A cache that stores and looks up as it is told.
fn serve_lines(socket: &Path) {
    let config = DaemonTierConfig::new(socket).deadline(Duration::from_secs(5));
    let cache = cache(Arc::new(DaemonTier::open(&config).unwrap()));
    say("ready");
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |at: usize| words[at].parse::<u32>().unwrap();
        match words[0] {
            "store" => {
                store(&cache, number(1), number(2));
                cache.flush().unwrap();
                say("done");
            }
            "find" => say(&format!("done {}", found(&cache, number(1), number(2)))),
            other => panic!("{other}"),
        }
    }
}

/// Holds blocks of prompt 1, and is writing one, until it is killed.
fn hold_for_ever(socket: &Path) {
    use crate::wire::{Answer, Purpose, Request};
    let config = DaemonTierConfig::new(socket);
    let mut reader = crate::link::connect(&config, Purpose::Read).unwrap().channel;
    let wanted = chain(1, 4).hashes().map(|hash| (key(&hash), namespace().id())).collect();
    let deadline = Deadline::after(PATIENCE);
    let Answer::Held(held) = reader.ask(&Request::Hold(wanted), deadline).unwrap() else { panic!() };
    assert_eq!(held.iter().flatten().count(), 4);
    let mut writer = crate::link::connect(&config, Purpose::Write).unwrap().channel;
    let Answer::Begun(fates) = writer.ask(&Request::Begin(vec![meta(9)]), deadline).unwrap() else { panic!() };
    assert_eq!(fates, [crate::wire::Fate::Room]);
    say("ready");
    std::thread::sleep(PATIENCE);
}

fn key(hash: &kvkeep::BlockHash) -> kvkeep::tiers::BlockKey {
    kvkeep::tiers::BlockKey::new(*hash.as_bytes(), 0)
}

/// The first block of a prompt, as a cache offers it.
fn meta(seed: u32) -> BlockMeta {
    offers(seed, 1).remove(0).meta
}

/// What a cache offers to its tiers when it stores a prompt.
fn offers(seed: u32, blocks: u32) -> Vec<Offer> {
    let catcher = Arc::new(Catcher::default());
    let cache = KvCache::new(CacheConfig::new(64 << 20).tier(Arc::clone(&catcher) as Arc<dyn kvkeep::Tier>)).unwrap();
    store(&cache, seed, blocks);
    std::mem::take(&mut *catcher.offers.lock().unwrap())
}

/// A tier that keeps what it is offered.
#[derive(Debug, Default)]
struct Catcher {
    offers: std::sync::Mutex<Vec<Offer>>,
}

impl kvkeep::Tier for Catcher {
    fn name(&self) -> &str {
        "catcher"
    }
    fn locate(
        &self,
        _: kvkeep::NamespaceId,
        keys: &[kvkeep::tiers::BlockKey],
        _: Deadline,
    ) -> Vec<Option<kvkeep::tiers::Located>> {
        vec![None; keys.len()]
    }
    fn read(&self, _: Vec<kvkeep::tiers::Read>) {}
    fn offer(&self, offers: Vec<Offer>, _: Deadline) -> Vec<Offer> {
        self.offers.lock().unwrap().extend(offers);
        Vec::new()
    }
    fn forget(&self, _: &kvkeep::tiers::Forget<'_>, _: u64) -> kvkeep::tiers::Forgotten {
        kvkeep::tiers::Forgotten::default()
    }
    fn flush(&self, _: Duration) -> kvkeep::Result<()> {
        Ok(())
    }
    fn close(&self) -> kvkeep::Result<()> {
        Ok(())
    }
    fn stats(&self) -> kvkeep::TierStats {
        kvkeep::TierStats::default()
    }
}
