//! Ten thousand mutations of every kind of file: never a wrong byte, never a panic.

use super::*;
use crate::codec::tests::planes::planes;

/// What a directory holds, newest versions only, and what each key held before.
struct Truth {
    sim: Sim,
    things: Vec<Thing>,
}

/// How records are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Way {
    is_encrypted: bool,
    is_coded: bool,
}

const PLAIN: Way = Way { is_encrypted: false, is_coded: false };

impl Way {
    fn open(self, sim: &Sim) -> Result<Disk> {
        let codecs = if self.is_coded { planes() } else { Codecs::default() };
        let options = Options { codecs, ..options(Path::new("sim"), 2 * MIB) };
        crate::tier::disk::sim::open(sim, &options, self.is_encrypted.then(|| Cipher::new(&[7; 32])), clock())
    }
}

/// With a codec, half of it becomes shorter.
fn truth(way: Way) -> Truth {
    let sim = Sim::default();
    let disk = way.open(&sim).unwrap();
    let smooth = |number: u32| if way.is_coded && number.is_multiple_of(2) { SMOOTH } else { 0 };
    let mut things = Vec::new();
    for number in 0..8 {
        named(100 + number, 1, 1).store(&disk);
    }
    for number in 0..40 {
        things.push(Thing { version: smooth(number), ..block(number, 1 + number % 3) });
        if number % 6 == 3 {
            things.push(named(100 + number / 6, 2 | smooth(number / 6), 2));
        }
    }
    things.iter().for_each(|thing| assert!(thing.store(&disk)));
    disk.flush().unwrap();
    drop(disk);
    Truth { sim, things }
}

impl Truth {
    /// Opens what is left and looks for everything. How much of it is there?
    fn check(&self, left: &Sim, way: Way, what: &str) -> usize {
        let disk = match way.open(left) {
            Ok(disk) => disk,
            Err(error) => panic!("{what}: {error}"),
        };
        let mut there = 0;
        for thing in &self.things {
            if let Some(bytes) = thing.load(&disk) {
                assert!(bytes == *thing.bytes(), "{what}: wrong bytes under {thing:?}");
                there += 1;
            }
        }
        // And it goes on working.
        let new = block(7_777, 2);
        new.store(&disk);
        disk.flush().unwrap();
        assert!(new.is_there(&disk), "{what}");
        there
    }
}

fn mutate(sim: &Sim, other: &Sim, random: &mut Random) -> String {
    let names = sim.names();
    let name = &names[random.below(names.len())];
    let mut bytes = sim.get(name).unwrap();
    let at = random.below(bytes.len());
    let pages = (bytes.len() / 4096).max(1);
    let page = |random: &mut Random| random.below(pages) * 4096;
    let kind = random.below(9);
    match kind {
        0 | 1 => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << random.below(8);
            }
        }
        2 => bytes.truncate(at),
        3 => bytes.truncate(page(random)),
        4 => {
            // A flip in the first bytes of a page, where the fields are.
            let at = page(random) + random.below(400);
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << random.below(8);
            }
        }
        5 => {
            let (a, b) = (page(random), page(random));
            if let (Some(one), Some(two)) =
                (sim.get(name).unwrap().get(a..a + 4096), sim.get(name).unwrap().get(b..b + 4096))
            {
                bytes[a..a + 4096].copy_from_slice(two);
                bytes[b..b + 4096].copy_from_slice(one);
            }
        }
        6 => {
            // A page of another directory's file of the same name, or of zeros.
            let at = page(random);
            let foreign = other.get(name).unwrap_or_default();
            let from = foreign.get(at..at + 4096).map_or_else(|| vec![0; 4096], <[u8]>::to_vec);
            if let Some(to) = bytes.get_mut(at..at + 4096) {
                to.copy_from_slice(&from);
            }
        }
        7 => {
            let other = &names[random.below(names.len())];
            let theirs = sim.get(other).unwrap();
            sim.put(other, bytes);
            bytes = theirs;
        }
        _ => {
            let length = random.below(3 * 4096);
            bytes.extend((0..length).map(|_| random.next() as u8));
        }
    }
    sim.put(name, bytes);
    format!("mutation {kind} of {name} at {at}")
}

fn rounds(way: Way, rounds: usize, seed: u64) {
    let truth = truth(way);
    let other = self::truth(way);
    assert_eq!(truth.check(&truth.sim.copy(), way, "nothing"), truth.things.len());
    let mut random = Random(seed);
    let mut there = 0;
    for _ in 0..rounds {
        let left = truth.sim.copy();
        let mut what = String::new();
        for _ in 0..1 + random.below(3) {
            what += &mutate(&left, &other.sim, &mut random);
            what += ", ";
        }
        there += truth.check(&left, way, &what);
    }
    assert!(there > rounds * truth.things.len() / 4, "most of it survives: {there}");
}

#[test]
fn ten_thousand_mutations_serve_no_wrong_byte_and_panic_nowhere() {
    rounds(PLAIN, 10_000, 11);
}

#[test]
fn mutations_of_an_encrypted_directory_serve_no_wrong_byte() {
    rounds(Way { is_encrypted: true, ..PLAIN }, 300, 12);
}

#[test]
fn mutations_of_a_directory_with_two_codecs_serve_no_wrong_byte() {
    rounds(Way { is_coded: true, ..PLAIN }, 600, 13);
    rounds(Way { is_coded: true, is_encrypted: true }, 100, 14);
}
