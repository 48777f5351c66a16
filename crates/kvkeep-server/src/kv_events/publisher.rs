//! The thread that readers are connected to, with a small runtime of its own: ending that runtime cuts all of them off.

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Semaphore;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{sleep, timeout};
use zeromq::{
    PubSocket, RouterRecvHalf, RouterSendHalf, RouterSocket, Socket, SocketRecv, SocketSend, ZmqMessage, ZmqResult,
};

use super::{Shared, unread};

/// At the end, readers may take what is left for this long.
const LAST_CALL: Duration = Duration::from_secs(1);
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// After the sockets could not be opened.
const PAUSE: Duration = Duration::from_secs(1);
/// Readers that are given what they missed at the same time, and how long one may take.
const REPLAYS: usize = 16;
const REPLAY_TIME: Duration = Duration::from_secs(30);
/// What is given them waits while they have left this much unread. One batch is always given.
const MAX_REPLAYED_BYTES: usize = 8 << 20;
/// The number that ends a replay: -1.
const END: [u8; 8] = u64::MAX.to_be_bytes();

/// What the thread is to do.
#[derive(Debug)]
pub(super) enum Order {
    /// Send the batch of this number.
    Batch(u64, Bytes),
    /// Nothing more comes.
    End,
}

/// Bound once: they outlive the sockets, so nobody is refused while readers are cut off.
#[derive(Debug)]
pub(super) struct Listeners {
    pub(super) events: TcpListener,
    pub(super) replay: Option<TcpListener>,
}

#[derive(Debug)]
pub(super) struct Publisher {
    shared: Arc<Shared>,
    listeners: Listeners,
    orders: UnboundedReceiver<Order>,
}

/// Why publishing stopped.
enum Stopped {
    Ended,
    TooMuchUnread,
}

impl Publisher {
    pub(super) fn new(shared: Arc<Shared>, listeners: Listeners, orders: UnboundedReceiver<Order>) -> Self {
        Self { shared, listeners, orders }
    }

    /// Publishes until nothing more comes.
    pub(super) fn run(mut self) {
        loop {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let stopped = runtime.map_err(zeromq::ZmqError::from).and_then(|runtime| runtime.block_on(self.publish()));
            match stopped {
                Ok(Stopped::Ended) => return,
                Ok(Stopped::TooMuchUnread) => {
                    self.shared.cut_off.fetch_add(1, Ordering::Relaxed);
                    tracing::warn!(
                        "readers of KV events left too much unread: all were cut off, and may connect again"
                    );
                }
                Err(error) => {
                    tracing::warn!(%error, "KV events cannot be published: trying again");
                    std::thread::sleep(PAUSE);
                }
            }
        }
    }

    async fn publish(&mut self) -> ZmqResult<Stopped> {
        let mut socket = PubSocket::new();
        socket.bind_listener(self.listeners.events.try_clone()?).await?;
        if let Some(listener) = &self.listeners.replay {
            let mut replay = RouterSocket::new();
            replay.bind_listener(listener.try_clone()?).await?;
            let (answers, requests) = replay.split();
            tokio::spawn(answer(Arc::clone(&self.shared), answers, requests));
        }
        loop {
            let order = tokio::select! {
                () = self.shared.too_much.notified() => return Ok(Stopped::TooMuchUnread),
                order = self.orders.recv() => order,
            };
            match order {
                // Waits for nobody: who is slow is given it later, or never.
                Some(Order::Batch(number, batch)) => {
                    let number = Bytes::copy_from_slice(&number.to_be_bytes());
                    socket.send(message([self.shared.topic.clone(), number, batch])).await?;
                }
                Some(Order::End) | None => break,
            }
        }
        drop(timeout(LAST_CALL, at_most(0, &self.shared.unread_bytes)).await);
        Ok(Stopped::Ended)
    }
}

/// Gives readers what they missed, some at a time.
async fn answer(shared: Arc<Shared>, answers: RouterSendHalf, mut requests: RouterRecvHalf) {
    let places = Arc::new(Semaphore::new(REPLAYS));
    while let Ok(request) = requests.recv().await {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let (shared, answers) = (Arc::clone(&shared), answers.clone());
        tokio::spawn(async move {
            if timeout(REPLAY_TIME, replay(&shared, answers, request)).await.is_err() {
                tracing::debug!("a reader of KV events did not take in time what it had missed");
                // What waits for it would wait for ever, and hold up others.
                shared.too_much.notify_one();
            }
            drop(place);
        });
    }
}

/// A request is whose it is, nothing, and the first number that is missing.
async fn replay(shared: &Shared, mut answers: RouterSendHalf, request: ZmqMessage) {
    let [reader, delimiter, first] = request.into_vec().try_into().unwrap_or_default();
    let Ok(first) = <[u8; 8]>::try_from(first.as_ref()).map(u64::from_be_bytes) else {
        tracing::debug!("a request for KV events is not the eight bytes of a number");
        return;
    };
    shared.replays.fetch_add(1, Ordering::Relaxed);
    let missed = shared.log().from(first);
    let batches = missed.into_iter().map(|(number, batch)| (shared.topic.clone(), number.to_be_bytes(), batch));
    for (topic, number, batch) in batches.chain([(Bytes::new(), END, Bytes::new())]) {
        at_most(MAX_REPLAYED_BYTES, &shared.replayed_unread_bytes).await;
        let batch = unread(batch, &shared.replayed_unread_bytes);
        let answer = [reader.clone(), delimiter.clone(), topic, Bytes::copy_from_slice(&number), batch];
        if let Err(error) = answers.send(message(answer)).await {
            tracing::debug!(%error, "a reader of KV events went before it had what it missed");
            return;
        }
    }
}

/// Waits until no more than this is unread.
async fn at_most(bytes: usize, unread: &AtomicUsize) {
    while unread.load(Ordering::Relaxed) > bytes {
        sleep(LOOK_AGAIN).await;
    }
}

fn message<const N: usize>(parts: [Bytes; N]) -> ZmqMessage {
    let mut parts = parts.into_iter();
    let mut message = ZmqMessage::from(parts.next().unwrap_or_default());
    parts.for_each(|part| message.push_back(part));
    message
}
