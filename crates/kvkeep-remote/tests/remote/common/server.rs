//! Servers of a test's own, on ports of their own, killed with it.

use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::{prefix, until};
use kvkeep_remote::RemoteConfig;

/// Ports below what clients get, and far enough below for a cluster's second port.
pub(crate) fn free_port() -> u16 {
    use std::sync::atomic::{AtomicU16, Ordering};
    static NEXT: AtomicU16 = AtomicU16::new(0);
    loop {
        let process = u16::try_from(std::process::id() % 60).unwrap();
        let port = 17_000 + process * 100 + NEXT.fetch_add(1, Ordering::Relaxed);
        if TcpListener::bind(("127.0.0.1", port)).is_ok() && TcpListener::bind(("127.0.0.1", port + 10_000)).is_ok() {
            return port;
        }
    }
}

/// A redis-server without a disk.
pub(crate) struct RedisServer {
    pub(crate) port: u16,
    child: Child,
    dir: tempfile::TempDir,
    args: Vec<String>,
}

impl RedisServer {
    pub(crate) fn start(args: &[&str]) -> Self {
        let (port, dir) = (free_port(), tempfile::tempdir().unwrap());
        let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
        let child = spawn(port, dir.path(), &args);
        Self { port, child, dir, args }
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// As `kill -9` does.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Again, with nothing in it.
    pub(crate) fn restart(&mut self) {
        self.child = spawn(self.port, self.dir.path(), &self.args);
    }

    /// What `redis-cli` says.
    pub(crate) fn ask(&self, args: &[&str]) -> String {
        let output = Command::new("redis-cli").args(["-p", &self.port.to_string()]).args(args).output().unwrap();
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        let _ = (self.child.kill(), self.child.wait());
    }
}

fn spawn(port: u16, dir: &Path, args: &[String]) -> Child {
    spawn_with(port, port, dir, args)
}

/// One that listens without TLS on `plain`, if that is not 0.
fn spawn_with(port: u16, plain: u16, dir: &Path, args: &[String]) -> Child {
    let port_text = plain.to_string();
    let child = Command::new("redis-server")
        .args(["--port", &port_text, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
        .args(args)
        .arg("--dir")
        .arg(dir)
        .stdout(Stdio::null())
        .spawn()
        .expect("redis-server is not installed: apt-get install redis-server");
    until("redis-server listens", || TcpStream::connect(("127.0.0.1", port)).is_ok());
    child
}

/// A redis-server that speaks TLS alone.
pub(crate) struct TlsServer(RedisServer);

impl TlsServer {
    /// With the certificate of this name in the folder.
    pub(crate) fn start(certificates: &Path, name: &str) -> Self {
        let (port, dir) = (free_port(), tempfile::tempdir().unwrap());
        let file = |end: &str| certificates.join(format!("{name}.{end}")).display().to_string();
        let args = ["--tls-port", &port.to_string(), "--tls-cert-file", &file("crt"), "--tls-key-file", &file("key")];
        let mut args: Vec<String> = args.map(str::to_owned).into();
        args.extend(["--tls-auth-clients", "no"].map(str::to_owned));
        let child = spawn_with(port, 0, dir.path(), &args);
        Self(RedisServer { port, child, dir, args })
    }

    pub(crate) fn url(&self) -> String {
        format!("rediss://127.0.0.1:{}", self.0.port)
    }
}

/// A master, its replica, and a Sentinel that watches both.
pub(crate) struct Sentinel {
    pub(crate) master: RedisServer,
    pub(crate) replica: RedisServer,
    watcher: RedisServer,
}

impl Sentinel {
    pub(crate) fn start() -> Self {
        let master = RedisServer::start(&[]);
        let replica = RedisServer::start(&["--replicaof", &format!("127.0.0.1 {}", master.port)]);
        let (port, dir) = (free_port(), tempfile::tempdir().unwrap());
        let settings = format!(
            "port {port}\nsentinel monitor shared 127.0.0.1 {} 1\nsentinel down-after-milliseconds shared 500\n\
             sentinel failover-timeout shared 3000\n",
            master.port
        );
        let file = dir.path().join("sentinel.conf");
        std::fs::write(&file, settings).unwrap();
        let child = Command::new("redis-server").arg(&file).arg("--sentinel").stdout(Stdio::null()).spawn().unwrap();
        let watcher = RedisServer { port, child, dir, args: Vec::new() };
        let knows_both = || watcher.ask(&["sentinel", "replicas", "shared"]).contains(&replica.port.to_string());
        until("Sentinel knows both", knows_both);
        Self { master, replica, watcher }
    }

    pub(crate) fn url(&self) -> String {
        format!("redis-sentinel://127.0.0.1:{}/shared", self.watcher.port)
    }

    /// The port of the master that it names.
    pub(crate) fn named(&self) -> u16 {
        let named = self.watcher.ask(&["sentinel", "get-master-addr-by-name", "shared"]);
        named.lines().last().and_then(|port| port.trim().parse().ok()).unwrap_or(0)
    }
}

/// A server that speaks S3.
pub(crate) struct S3Server {
    pub(crate) port: u16,
    child: Child,
    _dir: tempfile::TempDir,
}

impl S3Server {
    pub(crate) fn start() -> Self {
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
        until("the S3 server listens", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        Self { port, child, _dir: dir }
    }

    pub(crate) fn config(&self) -> RemoteConfig {
        self.config_at(self.port)
    }

    /// As if it listened there.
    pub(crate) fn config_at(&self, port: u16) -> RemoteConfig {
        let endpoint = format!("http://127.0.0.1:{port}");
        RemoteConfig::new("s3://bucket/deep").prefix(prefix()).deadline(Duration::from_secs(5)).variables([
            ("AWS_ACCESS_KEY_ID", "key"),
            ("AWS_SECRET_ACCESS_KEY", "secret"),
            ("AWS_REGION", "us-east-1"),
            ("AWS_ENDPOINT", &endpoint),
            ("PATH", "passed over"),
        ])
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        let _ = (self.child.kill(), self.child.wait());
    }
}

/// Three masters.
pub(crate) struct Cluster {
    pub(crate) servers: Vec<RedisServer>,
}

impl Cluster {
    pub(crate) fn start() -> Self {
        let args =
            ["--cluster-enabled", "yes", "--cluster-require-full-coverage", "no", "--cluster-node-timeout", "500"];
        let servers: Vec<RedisServer> = (0..3).map(|_| RedisServer::start(&args)).collect();
        let nodes = servers.iter().map(|server| format!("127.0.0.1:{}", server.port));
        let made = Command::new("redis-cli").args(["--cluster", "create"]).args(nodes).arg("--cluster-yes").output();
        let made = made.expect("redis-cli is not installed: apt-get install redis-tools");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stdout));
        for server in &servers {
            until("the cluster is up", || server.ask(&["cluster", "info"]).contains("cluster_state:ok"));
        }
        std::thread::sleep(Duration::from_millis(100));
        Self { servers }
    }

    pub(crate) fn url(&self) -> String {
        let nodes: Vec<String> = self.servers.iter().map(|server| format!("127.0.0.1:{}", server.port)).collect();
        format!("redis-cluster://{}", nodes.join(","))
    }
}
