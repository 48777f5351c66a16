//! A server with the default model, and a client that hides nothing of HTTP.

#![allow(dead_code, clippy::allow_attributes, reason = "each test file uses its own part of it")]
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "helpers of tests fail as tests do")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::OnceLock;
use std::thread::JoinHandle;
use std::time::Duration;

use kvkeep::{CacheConfig, KvCache};
use kvkeep_engine::{Engine, EngineOptions, default_model_path, user_cache_dir};
use kvkeep_server::{Server, ServerConfig, ServerError};
use serde_json::Value;
use tokio::sync::oneshot;

/// Nothing here takes this long; a test that hangs fails instead.
const PATIENCE: Duration = Duration::from_secs(240);

/// A server in this process; dropping it ends it.
pub(crate) struct Running {
    pub(crate) address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<(), Box<ServerError>>>>,
}

/// An answer, its body perhaps still to be read.
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) head: String,
    body: BufReader<TcpStream>,
}

/// The default model. `None`, after saying so, if it cannot be had; on CI that is a failure.
pub(crate) fn engine() -> Option<&'static Engine> {
    static ENGINE: OnceLock<Option<Engine>> = OnceLock::new();
    let load = || match user_cache_dir().and_then(|dir| default_model_path(&dir, &mut |_, _| ())) {
        Ok(path) => Some(Engine::load(path, &EngineOptions::default().threads(2)).unwrap()),
        Err(error) => {
            assert!(std::env::var_os("CI").is_none(), "the default model cannot be had: {error}");
            eprintln!("SKIPPED: the default model cannot be had: {error}");
            None
        }
    };
    ENGINE.get_or_init(load).as_ref()
}

pub(crate) fn config() -> ServerConfig {
    let mut config = ServerConfig::new("127.0.0.1:0".parse().unwrap());
    (config.context_tokens, config.parallel) = (2048, 2);
    config
}

pub(crate) fn cache() -> KvCache {
    KvCache::new(CacheConfig::new(256 << 20)).unwrap()
}

impl Running {
    /// With an empty cache and a small context; `change` sets what the test needs.
    pub(crate) fn start(change: impl FnOnce(&mut ServerConfig)) -> Option<Self> {
        let mut config = config();
        change(&mut config);
        Some(Self::over(engine()?, cache(), config))
    }

    pub(crate) fn over(engine: &Engine, cache: KvCache, config: ServerConfig) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let server = runtime.block_on(Server::bind(engine.clone(), cache, config)).unwrap();
        let address = server.address().unwrap();
        let (stop, stopped) = oneshot::channel();
        let run = async { server.run(async { drop(stopped.await) }).await };
        let thread = std::thread::spawn(move || runtime.block_on(run).map_err(Box::new));
        Self { address, stop: Some(stop), thread: Some(thread) }
    }

    /// Tells it to end, and does not wait.
    pub(crate) fn tell(&mut self) {
        drop(self.stop.take());
    }

    /// Tells it to end, and waits until it has.
    pub(crate) fn end(mut self) {
        self.tell();
        self.thread.take().unwrap().join().unwrap().unwrap();
    }

    pub(crate) fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Sends a request and does not read the answer. HTTP/1.0: the answer ends with the connection.
    pub(crate) fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> TcpStream {
        let mut head = format!("{method} {path} HTTP/1.0\r\n");
        if !headers.iter().any(|(name, _)| *name == "Host") {
            head += &format!("Host: {}\r\n", self.address);
        }
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        if !body.is_empty() {
            head += &format!("Content-Length: {}\r\n", body.len());
        }
        let mut stream = self.connect();
        stream.write_all(format!("{head}\r\n{body}").as_bytes()).unwrap();
        stream
    }

    pub(crate) fn get(&self, path: &str) -> Response {
        Response::read(self.send("GET", path, &[], ""))
    }

    pub(crate) fn ask(&self, path: &str, body: &Value) -> TcpStream {
        self.send("POST", path, &[("Content-Type", "application/json")], &body.to_string())
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Response {
        Response::read(self.ask(path, body))
    }

    /// Posts, with the key of somebody.
    pub(crate) fn post_as(&self, key: &str, path: &str, body: &Value) -> Response {
        let bearer = format!("Bearer {key}");
        let headers = [("Content-Type", "application/json"), ("Authorization", bearer.as_str())];
        Response::read(self.send("POST", path, &headers, &body.to_string()))
    }

    /// Posts and expects an answer.
    pub(crate) fn answer(&self, path: &str, body: &Value) -> Value {
        let response = self.post(path, body);
        let status = response.status;
        let body = response.json();
        assert_eq!(status, 200, "{body}");
        body
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.tell();
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

impl Response {
    pub(crate) fn read(stream: TcpStream) -> Self {
        let mut body = BufReader::new(stream);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert!(body.read_line(&mut head).unwrap() > 0, "the connection ended in the headers: {head:?}");
        }
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Self { status, head, body }
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.head
            .lines()
            .find_map(|line| line.split_once(": ").filter(|(this, _)| *this == name).map(|(_, value)| value))
    }

    pub(crate) fn text(mut self) -> String {
        let mut text = String::new();
        self.body.read_to_string(&mut text).unwrap();
        text
    }

    pub(crate) fn json(self) -> Value {
        let text = self.text();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error} in {text:?}"))
    }

    /// The next line of the body, without its end.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.body.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// The next event of a stream; `None` at its end.
    pub(crate) fn event(&mut self) -> Option<String> {
        loop {
            let mut line = String::new();
            if self.body.read_line(&mut line).unwrap() == 0 {
                return None;
            }
            if let Some(data) = line.strip_prefix("data: ") {
                return Some(data.trim_end().to_owned());
            }
        }
    }

    /// All events but the last, which is `[DONE]`.
    pub(crate) fn events(mut self) -> Vec<Value> {
        let mut events: Vec<String> = std::iter::from_fn(|| self.event()).collect();
        assert_eq!(events.pop().as_deref(), Some("[DONE]"), "after {events:?}");
        events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }
}

/// A greedy chat request.
pub(crate) fn chat(system: &str, user: &str, max_tokens: u32) -> Value {
    serde_json::json!({
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
        "temperature": 0,
        "max_tokens": max_tokens,
    })
}

/// A request that is answered for minutes.
pub(crate) fn endless() -> Value {
    let mut body = serde_json::json!({"prompt": "1, 2, 3, 4,", "max_tokens": 2000, "temperature": 0, "stream": true});
    body["cache_salt"] = "endless".into();
    body
}

pub(crate) fn content(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().unwrap()
}

pub(crate) fn cached(answer: &Value) -> u64 {
    answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
}

pub(crate) const CHAT: &str = "/v1/chat/completions";
pub(crate) const COMPLETIONS: &str = "/v1/completions";
/// Long enough for some blocks.
pub(crate) const SYSTEM: &str = "You are the librarian of a small town. You know every book on your shelves, who wrote \
    it and when, and you answer questions of visitors in one short and friendly sentence.";
