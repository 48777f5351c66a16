//! Blocks between the disk and an engine's own memory.

use std::sync::mpsc::{Receiver, Sender, channel};

use super::*;
use crate::Chain;
use crate::block::BlockMeta;
use crate::tier::{Payload, ReadTarget};

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
