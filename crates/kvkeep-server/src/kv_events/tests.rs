use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use kvkeep::{CacheConfig, DType, KvCache, KvLayout, LayerView, Namespace, TensorView};
use zeromq::{ReqSocket, Socket, SocketRecv, SocketSend, SubSocket, ZmqMessage};

use super::*;

const LONG: Duration = Duration::from_secs(20);

fn config() -> KvEventsConfig {
    let endpoint: Endpoint = "tcp://127.0.0.1:0".parse().unwrap();
    KvEventsConfig { replay: Some(endpoint.clone()), ..KvEventsConfig::new(endpoint) }
}

async fn subscriber(events: &KvEvents) -> SubSocket {
    let mut socket = SubSocket::new();
    socket.subscribe("").await.unwrap();
    socket.connect(&format!("tcp://{}", events.address())).await.unwrap();
    socket
}

/// The number of a message, and its batch.
fn numbered(message: ZmqMessage) -> (u64, Bytes) {
    let [_, number, batch] = message.into_vec().try_into().unwrap();
    (u64::from_be_bytes(number.as_ref().try_into().unwrap()), batch)
}

async fn next(socket: &mut SubSocket) -> (u64, Bytes) {
    numbered(tokio::time::timeout(LONG, socket.recv()).await.unwrap().unwrap())
}

/// What a reader is given first that asks from this number on: a batch, or the end.
async fn missed(events: &KvEvents, from: u64) -> u64 {
    let mut socket = ReqSocket::new();
    socket.connect(&format!("tcp://{}", events.replay_address().unwrap())).await.unwrap();
    socket.send(Bytes::copy_from_slice(&from.to_be_bytes()).into()).await.unwrap();
    // This library's REQ takes one answer.
    numbered(tokio::time::timeout(LONG, socket.recv()).await.unwrap().unwrap()).0
}

/// Waits until a reader gets what is sent from now on.
async fn settled(events: &KvEvents, socket: &mut SubSocket) -> u64 {
    loop {
        events.sink.send(Bytes::from_static(b"hello"));
        if let Ok(message) = tokio::time::timeout(Duration::from_millis(50), socket.recv()).await {
            return numbered(message.unwrap()).0;
        }
    }
}

/// Connects and subscribes to everything, and reads nothing after that.
fn reader_that_stops(events: &KvEvents) -> TcpStream {
    let mut stream = TcpStream::connect(events.address()).unwrap();
    let mut greeting = [0; 64];
    greeting[..12].copy_from_slice(&[0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0x7f, 3, 0]);
    greeting[12..16].copy_from_slice(b"NULL");
    stream.write_all(&greeting).unwrap();
    let mut theirs = [0; 64];
    stream.read_exact(&mut theirs).unwrap();
    let ready = b"\x05READY\x0bSocket-Type\x00\x00\x00\x03SUB";
    stream.write_all(&[4, u8::try_from(ready.len()).unwrap()]).unwrap();
    stream.write_all(ready).unwrap();
    stream.write_all(&[0, 1, 1]).unwrap();
    stream
}

#[tokio::test]
async fn whoever_missed_batches_gets_them_by_number_and_then_the_end() {
    let events = KvEvents::bind(&config()).unwrap();
    for at in 0..3_u8 {
        events.sink.send(Bytes::from(vec![at]));
    }
    assert_eq!(missed(&events, 1).await, 1);
    assert_eq!(missed(&events, 3).await, u64::MAX);
    assert_eq!(events.meter().counts().replays_total, 2);
}

/// The library keeps up to 100,000 batches for each reader that does not read, however large they are.
#[tokio::test]
async fn a_reader_that_does_not_read_slows_nobody_and_is_cut_off() {
    let events = KvEvents::bind_with(&config(), 1 << 20).unwrap();
    let mut reads = subscriber(&events).await;
    settled(&events, &mut reads).await;
    let stops = reader_that_stops(&events);
    std::thread::sleep(Duration::from_millis(200));
    let (began, mut slowest) = (Instant::now(), Duration::ZERO);
    while events.meter().counts().cut_off_total == 0 {
        let sent = Instant::now();
        events.sink.send(Bytes::from(vec![0; 64 << 10]));
        slowest = slowest.max(sent.elapsed());
        assert!(began.elapsed() < LONG, "{:?}", events.meter().counts());
        // The one that reads keeps up.
        drop(tokio::time::timeout(Duration::from_millis(1), reads.recv()).await);
        assert!(events.shared.unread_bytes.load(Ordering::Relaxed) <= (1 << 20) + (64 << 10));
    }
    assert!(slowest < Duration::from_millis(500), "{slowest:?}");
    let counts = events.meter().counts();
    assert!(counts.dropped_total > 0, "{counts:?}");
    // Who reads is back, and sees by the numbers what to ask for.
    let mut again = subscriber(&events).await;
    let number = settled(&events, &mut again).await;
    assert_eq!(missed(&events, number - 1).await, number - 1);
    drop(stops);
}

#[tokio::test]
async fn without_readers_nothing_is_kept_but_for_who_asks() {
    let events = KvEvents::bind(&config()).unwrap();
    for _ in 0..100 {
        events.sink.send(Bytes::from(vec![0; 1 << 20]));
    }
    let began = Instant::now();
    while events.shared.unread_bytes.load(Ordering::Relaxed) > 0 {
        assert!(began.elapsed() < LONG);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(events.shared.log().from(0).len(), 64);
}

/// The format knows no clearing of one namespace: readers believed its blocks to be there for ever.
#[tokio::test]
async fn clearing_one_namespace_is_told_as_the_removal_of_its_blocks_and_of_all_as_such() {
    let events = KvEvents::bind(&config()).unwrap();
    let mut reader = subscriber(&events).await;
    settled(&events, &mut reader).await;
    let cache = KvCache::new(CacheConfig::new(1 << 20).events(events.sink())).unwrap();
    let layout = KvLayout::new(1, 1, 4, DType::F32).unwrap().with_block_tokens(2).unwrap();
    let space = |name: &str| Namespace::new(name, layout);
    let (tokens, zeros) = ([1, 2, 3, 4], [0.0_f32; 16]);
    let tensor = TensorView::of(&zeros, &[4, 1, 4]).unwrap();
    for name in ["a", "b"] {
        cache.store(&space(name), &tokens, &[LayerView { k: tensor, v: tensor }]).unwrap();
    }
    // One after the other: a reader that is behind is told only what is so in the end.
    let mut text = Vec::new();
    let mut until = async |name: &[u8], times: usize| loop {
        let count = |name: &[u8]| text.windows(name.len()).filter(|part| *part == name).count();
        if count(name) == times {
            return (count(b"BlockRemoved"), count(b"AllBlocksCleared"));
        }
        text.extend_from_slice(&next(&mut reader).await.1);
    };
    assert_eq!(until(b"BlockStored", 2).await, (0, 0));
    cache.clear_namespace(space("a").id());
    assert_eq!(until(b"BlockRemoved", 1).await, (1, 0));
    cache.clear();
    assert_eq!(until(b"AllBlocksCleared", 1).await, (1, 1));
}

#[test]
fn an_endpoint_that_others_reach_needs_a_word_that_they_may_read() {
    let open = KvEventsConfig::new("tcp://*:0".parse().unwrap());
    let error = KvEvents::bind(&open).unwrap_err().to_string();
    assert!(error.contains("--kv-events-anyone"), "{error}");
    KvEvents::bind(&KvEventsConfig { anyone: true, ..open }).unwrap();
    let first = KvEvents::bind(&config()).unwrap();
    let taken = KvEventsConfig::new(format!("tcp://{}", first.address()).parse().unwrap());
    assert!(matches!(KvEvents::bind(&taken), Err(ServerError::KvEventsListen { .. })));
}
