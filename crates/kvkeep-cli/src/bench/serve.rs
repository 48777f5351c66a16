//! The server: what asking over HTTP adds to a warm time to first token.
//!
//! A chat as text, over a connection that stays open, until the event with the first token is
//! here: parsing, tokenising, the template, threads and sockets are in it. The reference gets tokens
//! and answers the same question in the same process.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kvkeep::{CacheConfig, KvCache};
use kvkeep_engine::{ChatMessage, Engine, GenerateOptions, Generator, Step};
use kvkeep_server::{Server, ServerConfig};
use tokio::sync::oneshot;

use super::{Bar, Effort, Figure, alternate};
use crate::texts::DOCUMENTS;

/// Tokens that are known, about: the same text for both.
const PREFIX: usize = 1024;
const CONTEXT: usize = 2048;
const RAM_BYTES: u64 = 256 << 20;

pub(super) fn figure(engine: &Engine, effort: Effort) -> Result<Figure> {
    let mut config = ServerConfig::new(SocketAddr::from(([127, 0, 0, 1], 0)));
    (config.context_tokens, config.parallel) = (CONTEXT, 1);
    let namespace = engine.namespace(config.block_tokens)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let server = Server::bind(engine.clone(), KvCache::new(CacheConfig::new(RAM_BYTES))?, config);
    let server = runtime.block_on(server)?;
    let address = server.address()?;
    let (stop, stopped) = oneshot::channel::<()>();
    let running = runtime.spawn(async move { server.run(async { drop(stopped.await) }).await });

    let mut client = TcpStream::connect(address)?;
    client.set_nodelay(true)?;
    let cache = KvCache::new(CacheConfig::new(RAM_BYTES))?;
    let mut library = Library { engine, cache, generator: Generator::new(engine, CONTEXT, namespace)? };
    let system = system(engine)?;
    let (mut here, mut there) = (0, 0);
    let [within, over_http] = alternate(
        effort.pick(31, 11),
        [
            &mut || {
                here += 1;
                library.ttft(&messages(&system, here))
            },
            &mut || {
                there += 1;
                ttft_over_http(&mut client, &messages(&system, there))
            },
        ],
    )?
    .map(|seconds| seconds * 1e3);
    drop((client, stop));
    runtime.block_on(running)??;
    let name = "time to first token over HTTP, 1,024 tokens cached";
    Ok(Figure::cost(name, over_http, "ms", within, "the library's own").bar(Bar::AtMost(1.10)))
}

struct Library<'a> {
    engine: &'a Engine,
    cache: KvCache,
    generator: Generator,
}

impl Library<'_> {
    fn ttft(&mut self, messages: &[ChatMessage]) -> Result<Duration> {
        let prompt = self.engine.chat_tokens(messages, true)?;
        let one = GenerateOptions::greedy(1);
        let go_on = &mut |_: Step<'_>| ControlFlow::Continue(());
        Ok(self.generator.generate(&prompt, Some(&self.cache), &one, go_on)?.ttft)
    }
}

/// The beginning of a real text.
fn system(engine: &Engine) -> Result<String> {
    let text = DOCUMENTS.iter().map(|document| document.text).collect::<String>();
    let tokens = engine.tokenizer().encode(&text, false)?;
    ensure!(tokens.len() >= PREFIX, "the texts have only {} tokens", tokens.len());
    Ok(engine.tokenizer().decode(tokens.get(..PREFIX).unwrap_or_default()))
}

/// The system's prompt, and another question each time.
fn messages(system: &str, number: usize) -> [ChatMessage; 2] {
    let question =
        format!("Question {number}: what is this text about? Answer in one short and simple sentence, please.");
    [ChatMessage::new("system", system), ChatMessage::new("user", question)]
}

fn ttft_over_http(client: &mut TcpStream, messages: &[ChatMessage]) -> Result<Duration> {
    let messages: Vec<_> =
        messages.iter().map(|message| serde_json::json!({"role": message.role, "content": message.content})).collect();
    let body = serde_json::json!({"messages": messages, "max_tokens": 1, "temperature": 0, "stream": true}).to_string();
    let head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json";
    let request = format!("{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    let begin = Instant::now();
    client.write_all(request.as_bytes())?;
    let (mut answer, mut first) = (Vec::new(), None);
    // A stream's last chunk is empty.
    while !answer.ends_with(b"\r\n0\r\n\r\n") {
        let mut piece = [0; 4096];
        let read = client.read(&mut piece)?;
        ensure!(read > 0, "the server answered {:?}", String::from_utf8_lossy(&answer));
        answer.extend_from_slice(piece.get(..read).unwrap_or_default());
        // The first event says whose turn it is, the second has the token.
        if first.is_none() && answer.windows(6).filter(|window| window == b"data: ").count() >= 2 {
            first = Some(begin.elapsed());
        }
    }
    first.with_context(|| format!("the server answered {:?}", String::from_utf8_lossy(&answer)))
}
