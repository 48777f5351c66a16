//! `kvkeep daemon` from outside: what it says, whom it serves, and how it ends.

#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, reason = "helpers of tests, where a panic is the report")]

use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvkeep::{CacheConfig, Chain, KvCache, KvLayout, Namespace, StoreOptions};
use kvkeep_daemon::{DaemonTier, DaemonTierConfig};
use rustix::process::{Pid, Signal, kill_process};
use zeromq::{Socket, SocketRecv, SubSocket};

struct Running {
    child: Child,
    stderr: BufReader<ChildStderr>,
    said: String,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Started, and listening.
fn daemon(args: &[&str]) -> Running {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvkeep"));
    let mut child = command.arg("daemon").args(args).stderr(Stdio::piped()).spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut said = String::new();
    while !said.contains("kvkeep: listening at ") {
        assert!(stderr.read_line(&mut said).unwrap() > 0, "it ended: {said}");
    }
    Running { child, stderr, said }
}

fn place() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    (dir, socket)
}

fn cache(config: &DaemonTierConfig) -> KvCache {
    let tier = Arc::new(DaemonTier::open(&config.clone().deadline(Duration::from_secs(5))).unwrap());
    KvCache::new(CacheConfig::new(1 << 20).tier(tier)).unwrap()
}

fn chain() -> Chain {
    let layout = KvLayout::opaque(4096, 4).unwrap();
    Chain::of(&Namespace::new("m", layout), &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap()
}

fn store(cache: &KvCache) {
    cache.store_blocks(&chain(), 0, &[&[1; 4096], &[2; 4096]], &StoreOptions::default()).unwrap();
    cache.flush().unwrap();
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn it_serves_says_what_it_has_and_ends_when_it_is_told() {
    let (dir, socket) = place();
    let disk = dir.path().join("disk");
    let args = ["--socket", text(&socket), "--ram-gb", "0.0625", "--disk", text(&disk), "--disk-gib", "0.125"];
    let began = Instant::now();
    let mut first = daemon(&args);
    println!("listening after {:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(1));
    assert!(first.said.contains("64.0 MiB of RAM, whoever runs as this user"), "{}", first.said);
    assert!(first.said.contains("128.0 MiB in "), "{}", first.said);
    let config = DaemonTierConfig::new(&socket);
    store(&cache(&config));
    assert_eq!(cache(&config).lookup_chain(&chain()).blocks(), 2);

    let second = Command::new(env!("CARGO_BIN_EXE_kvkeep")).arg("daemon").args(args).output().unwrap();
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(second.status.code() == Some(1) && said.contains("another daemon has it"), "{said}");

    kill_process(Pid::from_child(&first.child), Signal::TERM).unwrap();
    assert!(first.child.wait().unwrap().success());
    first.stderr.read_to_string(&mut first.said).unwrap();
    assert!(first.said.contains("kvkeep: ending") && !socket.exists(), "{}", first.said);
    // Warm after its own restart.
    let _again = daemon(&args);
    assert_eq!(cache(&config).lookup_chain(&chain()).blocks(), 2);
}

#[test]
fn tenants_have_what_their_file_says_and_everybody_the_rest() {
    let (dir, socket) = place();
    let file = dir.path().join("tenants");
    std::fs::write(&file, "a 0123456789abcdef 0.03125\n").unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    let running = daemon(&["--socket", text(&socket), "--ram-gib", "0.0625", "--tenants", text(&file)]);
    assert!(running.said.contains("32.0 MiB of RAM, with its token"), "{}", running.said);
    let everybody = DaemonTierConfig::new(&socket);
    let tenant = everybody.clone().tenant("a", "0123456789abcdef");
    store(&cache(&tenant));
    assert_eq!(cache(&tenant).lookup_chain(&chain()).blocks(), 2);
    assert_eq!(cache(&everybody).lookup_chain(&chain()).blocks(), 0);
    assert!(!running.said.contains("0123456789abcdef"));
    let wrong = Command::new(env!("CARGO_BIN_EXE_kvkeep"))
        .args(["daemon", "--socket", text(&dir.path().join("t")), "--ram-gib", "0.01", "--tenants", text(&file)])
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("give more"));
}

/// A port that is free now.
fn port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[tokio::test]
async fn routers_hear_over_zeromq_what_comes_to_everybodys_memory_and_goes_from_it() {
    let (_dir, socket) = place();
    let endpoint = format!("tcp://127.0.0.1:{}", port());
    let args = ["--socket", text(&socket), "--ram-gib", "0.0625", "--kv-events", &endpoint, "--kv-events-topic", "kv"];
    let running = daemon(&args);
    assert!(running.said.contains(&format!("{endpoint}, of memory that needs no token")), "{}", running.said);
    let mut reader = SubSocket::new();
    reader.subscribe("kv").await.unwrap();
    reader.connect(&endpoint).await.unwrap();
    let cache = cache(&DaemonTierConfig::new(&socket));
    // A subscriber hears nothing that was sent before it was known.
    let mut said = Vec::new();
    while said.is_empty() {
        cache.clear();
        store(&cache);
        let heard = tokio::time::timeout(Duration::from_millis(100), reader.recv()).await;
        said.extend(heard.ok().map(|message| message.unwrap().into_vec().pop().unwrap()));
    }
    let mut until = async |word: &[u8]| {
        while !said.iter().any(|batch| batch.windows(word.len()).any(|part| part == word)) {
            let message = tokio::time::timeout(Duration::from_secs(20), reader.recv()).await.unwrap().unwrap();
            said.push(message.into_vec().pop().unwrap());
        }
        said.clear();
    };
    until(b"BlockStored").await;
    cache.remove_chain(&chain(), 4);
    until(b"BlockRemoved").await;
    cache.clear();
    until(b"AllBlocksCleared").await;

    let args = ["daemon", "--socket", text(&socket), "--kv-events", "tcp://*:0"];
    let open = Command::new(env!("CARGO_BIN_EXE_kvkeep")).args(args).output().unwrap();
    assert!(String::from_utf8_lossy(&open.stderr).contains("--kv-events-anyone"));
}
