//! What a remote tier promises, on a real server that speaks S3. `make test-remote` runs it.

use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use crate::common::server::free_port;
use crate::common::{BLOCK_TOKENS, Node, namespace, prefix, prompt, until};
use kvkeep::tiers::contract;
use kvkeep::{ManualClock, Tier};
use kvkeep_remote::{RemoteConfig, RemoteTier};

const RAM_BYTES: u64 = 8 << 20;

struct S3 {
    port: u16,
    child: Child,
    _dir: tempfile::TempDir,
}

impl S3 {
    fn start() -> Self {
        let binary =
            std::env::var("KVKEEP_S3_SERVER").expect("KVKEEP_S3_SERVER names the program s3s-fs: make test-remote");
        let (port, dir) = (free_port(), tempfile::tempdir().unwrap());
        std::fs::create_dir(dir.path().join("bucket")).unwrap();
        let child = Command::new(binary)
            .args(["--access-key", "key", "--secret-key", "secret", "--host", "127.0.0.1", "--port", &port.to_string()])
            .arg(dir.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        until("the S3 server listens", || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
        Self { port, child, _dir: dir }
    }

    fn config(&self) -> RemoteConfig {
        let endpoint = format!("http://127.0.0.1:{}", self.port);
        RemoteConfig::new("s3://bucket/deep").prefix(prefix()).deadline(Duration::from_secs(5)).variables([
            ("AWS_ACCESS_KEY_ID", "key"),
            ("AWS_SECRET_ACCESS_KEY", "secret"),
            ("AWS_REGION", "us-east-1"),
            ("AWS_ENDPOINT", &endpoint),
            ("PATH", "passed over"),
        ])
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        let _ = (self.child.kill(), self.child.wait());
    }
}

#[test]
#[ignore = "needs an S3 server: make test-remote"]
fn s3_keeps_what_a_tier_promises() {
    let server = S3::start();
    contract::check(&|| {
        let config = server.config().capacity_bytes(contract::CAPACITY_BYTES);
        Arc::new(RemoteTier::open_at(&config, Arc::new(ManualClock::at(1000))).unwrap()) as Arc<dyn Tier>
    });
}

#[test]
#[ignore = "needs an S3 server: make test-remote"]
fn what_one_node_writes_to_s3_another_finds() {
    let server = S3::start();
    let config = server.config().refresh(Duration::from_millis(100));
    let (one, two) = (Node::new(&config, RAM_BYTES), Node::new(&config, RAM_BYTES));
    two.know_all();
    one.store(&namespace("m"), &prompt(1, 3));
    one.cache.flush().unwrap();
    until("the other node hears of it", || two.lookup(&namespace("m"), &prompt(1, 3)).0 == 3 * BLOCK_TOKENS);
    let wrong = server.config().variables([("AWS_SECRET_ACCESS_KEY", "wrong")]);
    let stranger = Node::new(&wrong, RAM_BYTES);
    assert_eq!(stranger.lookup(&namespace("m"), &prompt(1, 3)).0, 0);
    assert!(stranger.tier.stats().failing);
}
