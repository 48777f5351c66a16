//! A connection's bytes, and what becomes of a client that has nothing more to send.
//!
//! Invariant: a client that has closed its own direction gets its answer, and one that is gone
//! ends its request. Both look the same until something is sent: who is gone then resets the
//! connection. So the first byte of the answer, which is `H` of `HTTP` whatever the answer will
//! be, goes out ahead of it. Taking every end of input for a client that left was the
//! alternative, and the usual one; `nc -N` and some proxies got no answer.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Sleep, sleep};

use crate::connections::{Connection, Phase};

/// With this every answer begins.
const FIRST: &[u8] = b"H";
/// How often the server looks whether a client that sends nothing more is still there.
const LOOK: Duration = Duration::from_millis(50);

/// A client's stream.
#[derive(Debug)]
pub(crate) struct Wire {
    stream: TcpStream,
    connection: Arc<Connection>,
    /// Since the client has closed its direction: when to look next.
    ended: Option<Pin<Box<Sleep>>>,
    /// [`FIRST`] is out, and what writes the answer does not know.
    ahead: bool,
    /// The client does not read: something is still to be sent.
    blocked: bool,
}

/// What a client is that sends nothing more.
enum Client {
    /// Nothing is owed to it: its input is over.
    Done,
    /// It is gone.
    Gone,
    /// It waits for its answer.
    Waits,
}

impl Wire {
    pub(crate) fn new(stream: TcpStream, connection: Arc<Connection>) -> Self {
        Self { stream, connection, ended: None, ahead: false, blocked: false }
    }

    fn look(&mut self) -> Client {
        if self.connection.phase() != Phase::Answering {
            return Client::Done;
        }
        match self.stream.take_error() {
            Ok(None) => (),
            Ok(Some(_)) | Err(_) => return Client::Gone,
        }
        if !self.connection.is_answered() && !self.ahead && !self.blocked {
            self.ahead = matches!(self.stream.try_write(FIRST), Ok(1..));
        }
        Client::Waits
    }
}

impl AsyncRead for Wire {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.ended.is_none() {
            let before = into.filled().len();
            ready!(Pin::new(&mut this.stream).poll_read(cx, into))?;
            // Between two requests, or before the first one, there is nobody to answer.
            if into.filled().len() > before || this.connection.phase() == Phase::Idle {
                return Poll::Ready(Ok(()));
            }
        }
        loop {
            // Not at once: what has come of a body may still be on its way to who reads it.
            let next = this.ended.get_or_insert_with(|| Box::pin(sleep(LOOK)));
            if this.connection.phase() == Phase::Idle {
                return Poll::Ready(Ok(()));
            }
            ready!(next.as_mut().poll(cx));
            this.ended = Some(Box::pin(sleep(LOOK)));
            match this.look() {
                Client::Done => return Poll::Ready(Ok(())),
                Client::Gone => return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
                Client::Waits => (),
            }
        }
    }
}

impl AsyncWrite for Wire {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let out = if this.ahead { bytes.strip_prefix(FIRST).map_or(0, |_| FIRST.len()) } else { 0 };
        let rest = bytes.get(out..).unwrap_or_default();
        let sent = if rest.is_empty() { Poll::Ready(Ok(0)) } else { Pin::new(&mut this.stream).poll_write(cx, rest) };
        this.blocked = sent.is_pending();
        let sent = ready!(sent)? + out;
        if sent > 0 {
            this.ahead = false;
            this.connection.sent();
        }
        Poll::Ready(Ok(sent))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}
