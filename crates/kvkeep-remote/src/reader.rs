//! What is asked of the store while somebody waits: what is there, and blocks.
//!
//! Invariant: a read is completed once, and not later than the deadline after the last block that came. One deadline
//! for all blocks of a request was the alternative: a long prompt over a thin network would then never be read.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Instant;

use bytes::Bytes;
use futures_util::future::{Either, select};
use futures_util::stream::{FuturesUnordered, StreamExt};
use kvkeep::tiers::{BlockMeta, Located, Read};

use crate::shared::Shared;
use crate::store::{Lane, Name, StoreError};

/// What the store says of a key: its number, and what is there.
pub(crate) type Answer = (usize, Option<Located>);

/// Asks what these keys are, and sends each answer as it comes, until the time is over.
pub(crate) async fn ask(shared: Arc<Shared>, names: Vec<(usize, Name)>, answers: Sender<Answer>, until: Instant) {
    let one = |(number, name): (usize, Name)| {
        let shared = &shared;
        async move { (number, name, shared.store.head(&name).await) }
    };
    let asked = names.len();
    let mut heads: FuturesUnordered<_> = names.into_iter().map(one).collect();
    let (mut came, mut failed) = (0, None);
    let over = tokio::time::sleep_until(until.into());
    let mut over = std::pin::pin!(over);
    while let Either::Right((Some((number, name, head)), _)) = select(over.as_mut(), heads.next()).await {
        match head {
            Ok(head) => {
                came += 1;
                let _ = answers.send((number, learn(&shared, &name, head)));
            }
            Err(error) => failed = Some(error),
        }
    }
    if came > 0 {
        return shared.health.works();
    }
    if failed.is_none() && asked > 0 {
        shared.lock().counters.timeouts_total += 1;
        // What is still to come would be in the way of the next one.
        shared.store.give_up(Lane::Ask);
        failed = Some(StoreError::Late);
    }
    failed.iter().for_each(|error| shared.health.fails(error));
}

/// Remembers what an object is, or that it is not there.
fn learn(shared: &Shared, name: &Name, head: Option<(Bytes, u64)>) -> Option<Located> {
    let now_ms = shared.clock.now_ms();
    let described = head.and_then(|(header, bytes)| Some((shared.messages.describe(&header, now_ms)?, bytes)));
    let right = described.filter(|(meta, _)| Name::of(meta) == *name && meta.expires_at_ms > now_ms);
    let mut state = shared.lock();
    match right {
        Some((meta, bytes)) => state.learned(&meta, bytes),
        None => {
            state.missed(*name, Instant::now());
            None
        }
    }
}

/// Reads a block, or misses it.
pub(crate) async fn read(shared: Arc<Shared>, read: Read) {
    let began = Instant::now();
    let Read { key, namespace, range, waited, mut target, .. } = read;
    let began = began.checked_sub(waited).unwrap_or(began);
    let name = Name { namespace, key };
    if !shared.health.allows() || shared.lock().is_removed(&name) {
        return target.complete(None);
    }
    let got = {
        let mut get = std::pin::pin!(async {
            let _turn = shared.reading.acquire().await;
            get(&shared, &name).await
        });
        loop {
            let late_at = shared.late_at(began);
            match tokio::time::timeout_at(late_at.into(), &mut get).await {
                Ok(got) => break got,
                Err(_) if shared.late_at(began) > late_at => {}
                Err(_) => break Err(StoreError::Late),
            }
        }
    };
    let read = match got {
        Ok(Some(message)) => {
            let now_ms = shared.clock.now_ms();
            let into = target.bytes_mut();
            // Memory that its owner has taken back says nothing of the block.
            let described = || shared.messages.describe(&message, now_ms).map_or(0, |meta| meta.raw_bytes);
            let wanted_bytes = range.as_ref().map_or_else(described, |range| range.len() as u64);
            if (into.len() as u64) < wanted_bytes {
                shared.health.works();
                return target.complete(None);
            }
            let meta = shared.messages.decode((&key, namespace), &message, range, into, now_ms);
            came(&shared, name, message.len() as u64, meta.as_ref());
            meta.filter(|meta| meta.expires_at_ms > now_ms)
        }
        Ok(None) => {
            shared.health.works();
            shared.lock().missed(name, Instant::now());
            None
        }
        Err(error) => {
            failed(&shared, began, &error);
            None
        }
    };
    target.complete(read.map(BlockMeta::decoded));
}

/// Asks for an object, and once more if it takes long and that is wanted.
async fn get(shared: &Shared, name: &Name) -> Result<Option<Bytes>, StoreError> {
    let Some(after) = shared.hedge else { return shared.store.get(name).await };
    let again = async {
        tokio::time::sleep(after).await;
        shared.store.get(name).await
    };
    match select(shared.store.get(name), Box::pin(again)).await {
        Either::Left((Err(_), other)) => other.await,
        Either::Right((Err(_), other)) => other.await,
        Either::Left((got, _)) | Either::Right((got, _)) => got,
    }
}

/// Counts an object that came, right or not.
fn came(shared: &Shared, name: Name, bytes: u64, meta: Option<&BlockMeta>) {
    let mut state = shared.lock();
    if meta.is_some() {
        state.counters.hits += 1;
        state.counters.read_bytes_total += bytes;
        state.index.touch(&name.key);
        drop(state);
        shared.progress();
        return shared.health.works();
    }
    state.counters.damaged_total += 1;
    state.missed(name, Instant::now());
    drop(state);
    // Where a byte was wrong, others may be: in what is still to come, too.
    shared.store.give_up(Lane::Read);
    shared.health.fails(&StoreError::Broken("a block was damaged".into()));
}

fn failed(shared: &Shared, began: Instant, error: &StoreError) {
    let mut state = shared.lock();
    match error {
        StoreError::Late => state.counters.timeouts_total += 1,
        _ => state.counters.read_errors_total += 1,
    }
    drop(state);
    if matches!(error, StoreError::Late) && shared.late_at(began) <= Instant::now() {
        shared.store.give_up(Lane::Read);
    }
    shared.health.fails(error);
}
