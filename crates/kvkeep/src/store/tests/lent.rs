//! Blocks between the disk and an engine's own memory.

use std::sync::mpsc::{Receiver, Sender, channel};

use super::*;
use crate::block::BlockMeta;
use crate::tier::around::Fault;
use crate::tier::memory::MemoryTier;
use crate::tier::{Payload, ReadTarget, Tier};
use crate::{CacheConfig, Chain};

struct Row(Vec<u8>);

impl Payload for Row {
    fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// The number of a block, and its bytes if they came.
type Came = (usize, Option<Vec<u8>>);

struct Room(Vec<u8>, usize, Sender<Came>);

impl ReadTarget for Room {
    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }

    fn complete(mut self: Box<Self>, read: Option<BlockMeta>) {
        let bytes = read.map(|_| std::mem::take(&mut self.0));
        self.2.send((self.1, bytes)).unwrap();
    }
}

fn row(number: usize) -> Vec<u8> {
    (0..PAGE as usize).map(|at| ((at * (number + 3)) >> 3) as u8).collect()
}

fn rooms(count: usize) -> (Vec<Box<dyn ReadTarget>>, Receiver<Came>) {
    let (sender, receiver) = channel();
    let room = |number| Box::new(Room(vec![0; PAGE as usize], number, sender.clone())) as Box<dyn ReadTarget>;
    ((0..count).map(room).collect(), receiver)
}

fn has_lent(cache: &KvCache, chain: &Chain) -> Vec<bool> {
    cache.where_lent(chain).iter().map(Option::is_some).collect()
}

/// An engine with RAM of its own wants the disk alone.
#[test]
fn a_store_without_ram_keeps_and_gives_back_what_an_engine_lends() {
    let mut lab = Lab::new();
    lab.config = lab.config.queue_bytes(MIB);
    let cache = lab.open(1);
    let hashes: Vec<[u8; 32]> = (0..20u8).map(|number| [number; 32]).collect();
    let chain = Chain::external(&namespace(), &hashes).unwrap();
    let rows = (0..20).map(|number| Arc::new(Row(row(number))) as Arc<dyn Payload>).collect();
    assert_eq!(cache.write_lent(&chain, 0, rows, &plain()), 20);
    cache.flush().unwrap();
    let (targets, answers) = rooms(24);
    assert_eq!(cache.read_lent(&chain, 0, targets), 20);
    let mut answers: Vec<_> = answers.iter().collect();
    answers.sort_by_key(|(number, _)| *number);
    assert_eq!(answers.len(), 24, "each is completed once, also what is not there");
    for (number, bytes) in answers {
        assert!(bytes == (number < 20).then(|| row(number)), "block {number}");
    }
    let (targets, answers) = rooms(2);
    assert_eq!(cache.read_lent(&chain, 18, targets), 2);
    assert!(answers.iter().all(|(number, bytes)| bytes == Some(row(18 + number))));
    assert_eq!((cache.stats().used_bytes, disk(&cache).entries), (0, 20));
    cache.remove_chain(&chain, 0);
    let (targets, answers) = rooms(1);
    assert_eq!((cache.read_lent(&chain, 0, targets), answers.recv().unwrap().1), (0, None));
}

#[test]
fn an_engine_asks_what_is_there_without_loading_it() {
    let mut lab = Lab::new();
    lab.config = lab.config.queue_bytes(MIB);
    let cache = lab.open(1);
    let hashes: Vec<Vec<u8>> = (0..6u8).map(|number| vec![number; 12 + usize::from(number)]).collect();
    let chain = Chain::external(&namespace(), &hashes).unwrap();
    assert_eq!(has_lent(&cache, &chain), [false; 6]);
    let even = |number: &usize| number.is_multiple_of(2);
    for number in (0..6).filter(even) {
        let one = Chain::external(&namespace(), &hashes[number..=number]).unwrap();
        assert_eq!(cache.write_lent(&one, 0, vec![Arc::new(Row(row(number)))], &plain()), 1);
    }
    cache.flush().unwrap();
    assert_eq!(has_lent(&cache, &chain), [true, false, true, false, true, false]);
    assert_eq!(disk(&cache).hits, 0);
    cache.remove_chain(&Chain::external(&namespace(), &hashes[2..3]).unwrap(), 0);
    assert_eq!(has_lent(&cache, &chain), [true, false, false, false, true, false]);
}

/// What an engine uses in its own memory is never read from the disk, and went first from there.
#[test]
fn what_was_touched_or_retained_outlives_what_was_not() {
    let mut lab = Lab::new();
    lab.config = lab.config.queue_bytes(MIB);
    let cache = lab.open(1);
    let chain = |from: u32, count: u32| {
        let hashes: Vec<[u8; 4]> = (from..from + count).map(u32::to_be_bytes).collect();
        Chain::external(&namespace(), &hashes).unwrap()
    };
    let store = |from: u32, count: u32| {
        let rows = (0..count).map(|number| Arc::new(Row(row(number as usize))) as Arc<dyn Payload>).collect();
        cache.write_lent(&chain(from, count), 0, rows, &plain());
        cache.flush().unwrap();
    };
    let (retained, touched, others) = (chain(0, 2), chain(100, 2), chain(200, 2));
    [0, 100, 200].into_iter().for_each(|from| store(from, 2));
    assert_eq!(cache.retain_lent(&retained, None), 2);
    let mut next = 1_000;
    let mut fill = |rounds: u32, touch: bool| {
        for _ in 0..rounds {
            store(next, 16);
            next += 16;
            if touch {
                cache.touch_lent(&touched);
            }
        }
    };
    let evicted = |cache: &KvCache| disk(cache).evictions;
    while evicted(&cache) < 500 {
        fill(4, true);
    }
    assert_eq!((has_lent(&cache, &retained), has_lent(&cache, &touched)), (vec![true; 2], vec![true; 2]));
    assert_eq!(has_lent(&cache, &others), [false; 2]);
    cache.release_lent(&retained);
    let before = evicted(&cache);
    while evicted(&cache) < before + 1_500 {
        fill(4, false);
    }
    assert_eq!((has_lent(&cache, &retained), has_lent(&cache, &touched)), (vec![false; 2], vec![false; 2]));
}

/// An engine's blocks counted as lost when the first tier refused them, though the second one had taken them; and with a daemon
/// behind the disk all came at the disk's pace.
#[test]
fn what_any_tier_took_is_taken_and_is_read_from_the_first_tier_that_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let clock: Arc<dyn Clock> = Arc::new(ManualClock::at(1_000));
    let memory = |name: &str| Arc::new(MemoryTier::new(name, MIB, Arc::clone(&clock))) as Arc<dyn Tier>;
    let near = Arc::new(Fault::new(memory("near")));
    let config = CacheConfig::without_ram().clock(Arc::clone(&clock)).tier(memory("far"));
    let config = config.disk(DiskConfig::new(dir.path(), 4 * MIB).queue_bytes(MIB)).tier_before_disk(near.clone());
    let cache = KvCache::new(config).unwrap();
    let chain = |number: u8| Chain::external(&namespace(), &[[number; 8]]).unwrap();
    let write = |number: u8| cache.write_lent(&chain(number), 0, vec![Arc::new(Row(row(number.into())))], &plain());
    assert_eq!(cache.stats().tiers.iter().map(|tier| tier.name.as_str()).collect::<Vec<_>>(), ["near", "disk", "far"]);
    assert_eq!(write(1), 1);
    near.fail_offers(true);
    assert_eq!(write(2), 1, "the disk took it");
    cache.flush().unwrap();
    assert_eq!((cache.where_lent(&chain(1)), cache.where_lent(&chain(2))), (vec![Some("near")], vec![Some("disk")]));
    near.go_away(true);
    assert_eq!((cache.where_lent(&chain(1)), cache.where_lent(&chain(3))), (vec![Some("disk")], vec![None]));
    let (targets, answers) = rooms(1);
    assert_eq!(cache.read_lent(&chain(1), 0, targets), 1);
    assert_eq!(answers.recv().unwrap().1, Some(row(1)));
}
