//! The one task that changes the store: writes in batches, removals in between, in the order in which they were asked for.
//!
//! Invariant: room is made in the store before anything is written there. A task for each write was the alternative:
//! then a removal may overtake what it removes.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::FutureExt;
use futures_util::stream::{FuturesUnordered, StreamExt};
use kvkeep::NamespaceId;
use kvkeep::tiers::Message;

use crate::shared::Shared;
use crate::state::{Op, Write};
use crate::store::{Lane, Listed, Name, StoreError};

/// Written at once, at most; and this part of the cap.
const BATCH_BYTES: u64 = 16 << 20;
const CAPACITY_PARTS: u64 = 4;
const BATCH_WRITES: usize = 256;
/// Removed at once.
const BATCH_KEYS: usize = 1000;
/// Before something that has to be done is tried again.
const PAUSE: Duration = Duration::from_millis(100);
/// What removing may take. Writing together may take a second more for each [`SLOWEST_BYTES_PER_S`].
const PATIENCE: Duration = Duration::from_secs(5);
/// In its place for writing, where a store needs the memory.
const NEEDED: Duration = Duration::from_secs(1);
const SLOWEST_BYTES_PER_S: u64 = 4 << 20;

/// Does what there is to do, for as long as this is awaited.
pub(crate) async fn run(shared: Arc<Shared>) {
    loop {
        let Some(op) = shared.lock().next() else {
            shared.work.notified().await;
            continue;
        };
        match op {
            Op::Write(first) => write(&shared, batch(&shared, *first)).await,
            Op::Remove(keys) => remove(&shared, &keys).await,
            Op::Clear(namespace, bytes) => clear(&shared, namespace, bytes).await,
        }
        {
            let mut state = shared.lock();
            state.is_busy = false;
            state.done += 1;
        }
        shared.room.notify_all();
    }
}

/// What is written together.
fn batch(shared: &Shared, first: Write) -> Vec<Write> {
    let most = BATCH_BYTES.min(shared.capacity_bytes / CAPACITY_PARTS);
    let mut bytes = first.payload.bytes().len() as u64;
    let mut writes = vec![first];
    let mut state = shared.lock();
    while bytes < most && writes.len() < BATCH_WRITES {
        let Some(write) = state.next_write() else { break };
        bytes += write.payload.bytes().len() as u64;
        writes.push(write);
    }
    writes
}

async fn write(shared: &Shared, writes: Vec<Write>) {
    let (wanted, unwanted): (Vec<_>, Vec<_>) = {
        let state = shared.lock();
        writes.into_iter().partition(|write| state.wants(write))
    };
    let mut written = Vec::new();
    {
        let now_ms = shared.clock.now_ms();
        // The header says so, too: not every store knows time.
        let latest_ms = shared.ttl.map_or(u64::MAX, |ttl| now_ms.saturating_add(millis(ttl)));
        let mut messages: Vec<Option<Message<'_>>> = Vec::with_capacity(wanted.len());
        messages.extend(wanted.iter().map(|write| {
            let mut meta = write.meta.clone();
            meta.facts.expires_at_ms = meta.expires_at_ms.min(latest_ms);
            shared.messages.encode(&meta, write.payload.bytes(), now_ms)
        }));
        let sizes: Vec<u64> = messages.iter().map(|message| message.as_ref().map_or(0, size)).collect();
        let total = sizes.iter().sum();
        let moving = Duration::from_millis(total * 1000 / SLOWEST_BYTES_PER_S);
        let made = if shared.health.allows() { make_room(shared, total).await } else { Err(StoreError::Away) };
        let mut writing: FuturesUnordered<_> = FuturesUnordered::new();
        for (number, message) in messages.iter().enumerate() {
            let made = made.is_ok();
            writing.push(async move {
                (
                    number,
                    if made { put(shared, message.as_ref(), PATIENCE + moving).await } else { Err(StoreError::Away) },
                )
            });
        }
        let mut left: Vec<_> = wanted.iter().zip(&messages).zip(&sizes).map(Some).collect();
        let mut end = |number: usize, put: &Result<(), StoreError>| {
            let Some(((write, message), bytes)) = left.get_mut(number).and_then(Option::take) else { return };
            written.extend(settle(shared, write, message.as_ref(), *bytes, made.is_ok(), put));
        };
        // What was needed of an earlier one is no matter.
        let _ = shared.needed.notified().now_or_never();
        let mut needed = pin!(is_needed(shared, NEEDED + moving));
        loop {
            tokio::select! {
                Some((number, put)) = writing.next() => end(number, &put),
                () = &mut needed, if !writing.is_empty() => {
                    shared.store.give_up(Lane::Write);
                    break;
                }
                else => break,
            }
        }
        drop(writing);
        (0..wanted.len()).for_each(|number| end(number, &Err(StoreError::Late)));
    }
    {
        let mut state = shared.lock();
        unwanted.iter().for_each(|write| _ = state.finish(write));
    }
    drop((wanted, unwanted));
    if !written.is_empty() {
        let told = shared.store.tell(&written).await;
        told.iter().for_each(|()| shared.health.works());
    }
}

fn size(message: &Message<'_>) -> u64 {
    (message.header.len() + message.payload.len()) as u64
}

/// Ends when somebody needs the memory, and not sooner than this.
async fn is_needed(shared: &Shared, at_least: Duration) {
    tokio::time::sleep(at_least).await;
    shared.needed.notified().await;
}

async fn put(shared: &Shared, message: Option<&Message<'_>>, patience: Duration) -> Result<(), StoreError> {
    let Some(message) = message else { return Err(StoreError::Refused("a block that no header describes".into())) };
    let left = message.meta.expires_at_ms.saturating_sub(shared.clock.now_ms());
    let ttl = (message.meta.expires_at_ms != u64::MAX).then(|| Duration::from_millis(left));
    let name = Name::of(&message.meta);
    let put = shared.store.put(&name, [&message.header, &message.payload], ttl);
    tokio::time::timeout(patience, put).await.unwrap_or_else(|_| {
        // What is still to come over its connection would be in the way.
        shared.store.give_up(Lane::Write);
        Err(StoreError::Late)
    })
}

/// What became of a write; gives what others are told.
fn settle(
    shared: &Shared,
    write: &Write,
    message: Option<&Message<'_>>,
    bytes: u64,
    has_room: bool,
    put: &Result<(), StoreError>,
) -> Option<Listed> {
    let expires_at_ms = message.map_or(u64::MAX, |message| message.meta.expires_at_ms);
    let listed = Listed { name: Name::of(&write.meta), bytes, expires_at_ms };
    let mut state = shared.lock();
    if has_room {
        state.moved(bytes);
    }
    let is_wanted = state.finish(write);
    let came = match (put, message) {
        (Ok(()), Some(message)) if is_wanted => {
            state.written(write, &message.meta, bytes);
            Some(listed)
        }
        // It was removed meanwhile: its removal is the next thing to do.
        (Ok(()), _) => None,
        (Err(error), _) => {
            state.counters.dropped_total += 1;
            if is_wanted {
                state.lost(write);
            }
            if has_room && message.is_some() {
                state.counters.write_errors_total += 1;
                // It may be there all the same.
                state.index.heard(listed);
            }
            shared.health.fails(error);
            None
        }
    };
    drop(state);
    if came.is_some() {
        write.payload.written(true);
    }
    shared.room.notify_all();
    came
}

/// Has so many bytes free in the store, and counts them as being written.
async fn make_room(shared: &Shared, bytes: u64) -> Result<(), StoreError> {
    if bytes > shared.capacity_bytes {
        return Err(StoreError::Refused("a block larger than the tier".into()));
    }
    let victims = shared.lock().make_room(bytes, shared.capacity_bytes);
    let removed = remove_from_store(shared, &victims).await;
    let mut state = shared.lock();
    let gone = victims.iter().map(|(_, bytes)| bytes).sum();
    state.moved(gone);
    match removed {
        Ok(()) => state.moves(bytes),
        // They are there still.
        Err(_) => victims.into_iter().for_each(|(name, bytes)| {
            state.index.heard(Listed { name, bytes, expires_at_ms: u64::MAX });
        }),
    }
    removed
}

async fn remove_from_store(shared: &Shared, removed: &[(Name, u64)]) -> Result<(), StoreError> {
    for part in removed.chunks(BATCH_KEYS) {
        let names: Vec<Name> = part.iter().map(|(name, _)| *name).collect();
        let removed = tokio::time::timeout(PATIENCE, shared.store.remove(&names)).await;
        removed.unwrap_or(Err(StoreError::Late)).inspect_err(|error| shared.health.fails(error))?;
    }
    Ok(())
}

/// Removes, and does not end before they are gone: what was removed must not come back.
async fn remove(shared: &Shared, keys: &[(Name, u64)]) {
    while !shared.lock().is_ended {
        if shared.health.allows() && remove_from_store(shared, keys).await.is_ok() {
            break;
        }
        tokio::time::sleep(PAUSE).await;
    }
    shared.lock().is_gone(keys);
}

/// As [`remove`], of all that belongs to a namespace, whoever wrote it.
async fn clear(shared: &Shared, namespace: Option<NamespaceId>, bytes: u64) {
    while !shared.lock().is_ended {
        if shared.health.allows() {
            match clear_once(shared, namespace).await {
                Ok(()) => break,
                Err(error) => shared.health.fails(&error),
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
    shared.lock().is_all_gone(namespace, bytes);
}

async fn clear_once(shared: &Shared, namespace: Option<NamespaceId>) -> Result<(), StoreError> {
    let mut goes = Vec::new();
    let mut each = |part: Vec<Listed>| goes.extend(part.into_iter().map(|listed| (listed.name, listed.bytes)));
    shared.store.list(namespace, &mut each).await?;
    remove_from_store(shared, &goes).await?;
    let mut state = shared.lock();
    goes.iter().for_each(|(name, _)| state.missed(*name, Instant::now()));
    Ok(())
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
