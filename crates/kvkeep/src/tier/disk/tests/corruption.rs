//! Ten thousand mutations of every kind of file: never a wrong byte, never a panic.

use super::*;

/// What a directory holds, newest versions only, and what each key held before.
struct Truth {
    sim: Sim,
    things: Vec<Thing>,
}

fn truth(cipher: bool) -> Truth {
    let sim = Sim::default();
    let disk = open_with(&sim, 2 * MIB, cipher.then(|| Cipher::new(&[7; 32])), clock()).unwrap();
    let mut things = Vec::new();
    for number in 0..8 {
        named(100 + number, 1, 1).store(&disk);
    }
    for number in 0..40 {
        things.push(block(number, 1 + number % 3));
        if number % 6 == 3 {
            things.push(named(100 + number / 6, 2, 2));
        }
    }
    things.iter().for_each(|thing| assert!(thing.store(&disk)));
    disk.flush().unwrap();
    drop(disk);
    Truth { sim, things }
}

impl Truth {
    /// Opens what is left and looks for everything. How much of it is there?
    fn check(&self, left: &Sim, cipher: bool, what: &str) -> usize {
        let disk = match open_with(left, 2 * MIB, cipher.then(|| Cipher::new(&[7; 32])), clock()) {
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

fn rounds(cipher: bool, rounds: usize, seed: u64) {
    let truth = truth(cipher);
    let other = self::truth(cipher);
    assert_eq!(truth.check(&truth.sim.copy(), cipher, "nothing"), truth.things.len());
    let mut random = Random(seed);
    let mut there = 0;
    for _ in 0..rounds {
        let left = truth.sim.copy();
        let mut what = String::new();
        for _ in 0..1 + random.below(3) {
            what += &mutate(&left, &other.sim, &mut random);
            what += ", ";
        }
        there += truth.check(&left, cipher, &what);
    }
    assert!(there > rounds * truth.things.len() / 4, "most of it survives: {there}");
}

#[test]
fn ten_thousand_mutations_serve_no_wrong_byte_and_panic_nowhere() {
    rounds(false, 10_000, 11);
}

#[test]
fn mutations_of_an_encrypted_directory_serve_no_wrong_byte() {
    rounds(true, 300, 12);
}
