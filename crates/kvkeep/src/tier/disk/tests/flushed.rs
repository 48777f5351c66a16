//! Verifying tells everything that was flushed and is gone, and nothing after a plain kill.

use super::super::segment::segment_name;
use super::super::{Archive, Verified, manifest};
use super::recovery::{filled, segments};
use super::*;

/// What verifying finds; `None` where it refuses the directory by name.
fn verify(sim: &Sim, cipher: bool) -> Option<Verified> {
    let cipher = cipher.then(|| Cipher::new(&[7; 32]));
    let archive = Archive::over(Arc::new(sim.clone()), "sim".into(), cipher, NOW_MS).ok()?;
    Some(archive.verify(|_| {}))
}

fn is_whole(sim: &Sim) -> bool {
    verify(sim, false).is_some_and(|verified| verified.is_whole())
}

/// As a killed process leaves it: flushed several times over several segments, and gone on since.
fn killed() -> (Sim, Vec<Thing>) {
    let sim = Sim::default();
    let disk = open(&sim, 4 * MIB);
    let mut things = Vec::new();
    for number in 0..27 {
        let thing = if number % 5 == 3 { named(500 + number, 1, 3) } else { block(number, 4) };
        assert!(thing.store(&disk));
        things.push(thing);
        if number % 4 == 2 {
            disk.flush().unwrap();
        }
    }
    disk.flush().unwrap();
    assert!(segments(&sim).len() >= 4);
    let left = sim.copy();
    // Not a clean end: the copy is of before.
    drop(disk);
    (left, things)
}

/// Damages a copy, and looks whether what is missing of what was flushed was told.
fn told(sim: &Sim, flushed: &[Thing], what: &str, damage: impl FnOnce(&Sim)) -> bool {
    let left = sim.copy();
    damage(&left);
    let whole = is_whole(&left);
    let disk = open(&left, 4 * MIB);
    let missing = flushed.iter().filter(|thing| !thing.is_there(&disk)).count();
    assert!(missing == 0 || !whole, "{what}: {missing} are missing, and it is called whole");
    missing > 0
}

/// The newest segment of a killed process was deleted with 27 flushed blocks, or the header of the last flushed record
/// was damaged: verifying said that all was whole.
#[test]
fn a_flushed_record_that_is_gone_is_told_whatever_became_of_its_file() {
    for (how, (sim, things)) in [("killed", killed()), ("closed", filled())] {
        assert!(is_whole(&sim), "{how}: {:?}", verify(&sim, false));
        let mut losses = 0;
        for name in sim.names() {
            let bytes = sim.get(&name).unwrap();
            let mut check = |what: &str, damage: &dyn Fn(&Sim)| {
                losses += usize::from(told(&sim, &things, &format!("{how}, {what} of {name}"), damage));
            };
            check("all", &|left| left.delete(&name));
            check("all but the name", &|left| left.put(&name, Vec::new()));
            for page in 0..bytes.len() / 4096 {
                let at = page * 4096;
                check(&format!("all from page {page}"), &|left| left.put(&name, bytes[..at].to_vec()));
                check(&format!("all from the middle of page {page}"), &|left| {
                    left.put(&name, bytes[..at + 700].to_vec());
                });
                for (byte, value) in [(at, bytes[at] ^ 1), (at + 60, bytes[at + 60] ^ 4)] {
                    check(&format!("byte {byte}"), &|left| {
                        let mut bytes = bytes.clone();
                        bytes[byte] = value;
                        left.put(&name, bytes);
                    });
                }
                check(&format!("page {page}"), &|left| {
                    let mut bytes = bytes.clone();
                    bytes[at..at + 4096].fill(0);
                    left.put(&name, bytes);
                });
            }
        }
        assert!(losses > 100, "{how}: only {losses} damages took something");
    }
}

#[test]
fn a_flushed_removal_that_is_gone_is_told() {
    let sim = Sim::default();
    let disk = open(&sim, 4 * MIB);
    let thing = named(1, 1, 2);
    thing.store(&disk);
    disk.flush().unwrap();
    disk.remove(&[thing.key()]);
    disk.flush().unwrap();
    let left = sim.copy();
    let name = segment_name(1);
    let mut bytes = left.get(&name).unwrap();
    let removal = bytes.chunks(4096).rposition(|page| page.starts_with(b"KVKRECRD")).unwrap();
    bytes[removal * 4096 + 5] ^= 1;
    left.put(&name, bytes);
    assert!(is_whole(&sim) && !is_whole(&left));
    assert!(thing.load(&open(&left, 4 * MIB)).is_none());
}

/// What a flush notes takes no second sync.
#[test]
fn a_flush_syncs_once() {
    let sim = Sim::default();
    let disk = open(&sim, 4 * MIB);
    let syncs = |number| {
        let before = sim.syncs().len();
        block(number, 2).store(&disk);
        disk.flush().unwrap();
        sim.syncs().len() - before
    };
    syncs(0);
    assert_eq!((1..6).map(syncs).collect::<Vec<_>>(), [1; 5]);
}

/// One mark may be torn by a power cut: the one before it counts, and nothing is said to be damaged.
#[test]
fn a_torn_mark_is_no_damage() {
    let (sim, things) = killed();
    let bytes = sim.get(manifest::NAME).unwrap();
    let marks: Vec<usize> =
        (0..bytes.len() / 4096).filter(|page| bytes[page * 4096..].starts_with(b"KVKMARKS")).collect();
    assert!(!marks.is_empty());
    for page in marks {
        let left = sim.copy();
        let mut bytes = bytes.clone();
        bytes[page * 4096 + 512..page * 4096 + 4096].fill(7);
        left.put(manifest::NAME, bytes);
        assert!(is_whole(&left));
        let disk = open(&left, 4 * MIB);
        assert!(things.iter().all(|thing| thing.is_there(&disk)));
    }
}

/// Releases before there were marks wrote none, and a directory of theirs has to open for ever.
#[test]
fn a_manifest_without_marks_is_whole() {
    let (sim, things) = killed();
    let mut old = super::super::format::Manifest::decode(&sim.get(manifest::NAME).unwrap()).unwrap();
    old.has_marks = false;
    old.segments.iter_mut().for_each(|line| line.durable_pages = 0);
    let mut bytes = vec![0; old.encoded_bytes()];
    old.encode(&mut bytes);
    sim.put(manifest::NAME, bytes);
    assert!(is_whole(&sim));
    let disk = open(&sim, 4 * MIB);
    assert!(things.iter().all(|thing| thing.is_there(&disk)) && disk.stats().damaged_total == 0);
}

/// A process that is killed at an operation leaves what it had done, all of it, and nothing of the rest.
#[test]
fn after_a_kill_verifying_says_whole() {
    for (capacity, space, cipher) in
        [(8 * MIB, None, false), (MIB, None, false), (8 * MIB, Some(MIB), false), (MIB, None, true)]
    {
        let run = |sim: &Sim| {
            sim.space_bytes(space);
            let Ok(disk) = open_with(sim, capacity, cipher.then(|| Cipher::new(&[7; 32])), clock()) else { return };
            for number in 0..60 {
                block(number, 1 + number % 7).store(&disk);
                named(number % 9, number as u8, 2).store(&disk);
                match number % 6 {
                    1 => drop(disk.remove(&[block(number - 1, 1).key()])),
                    4 if disk.flush().is_err() => return,
                    _ => {}
                }
            }
        };
        let whole = Sim::default();
        run(&whole);
        for cut in (1 + capacity / MIB % 5..=whole.operations()).step_by(11) {
            let sim = Sim::default();
            sim.cut_at(cut);
            run(&sim);
            let left = sim.after_power_cut(|| true);
            let Some(verified) = verify(&left, cipher) else { continue };
            assert!(verified.is_whole(), "{capacity} {space:?} cut at {cut}: {verified:?}");
        }
    }
}
