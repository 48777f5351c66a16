//! The power is cut: what was flushed is there, nothing torn is visible.
//!
//! Cuts are made at every operation of one workload, and at and behind every sync of those that encrypt or evict, where
//! what is durable changes. `make crash-test` cuts those at every operation, too.

use std::collections::HashMap;

use super::*;

/// One step of the workload.
#[derive(Debug, Clone, Copy)]
enum Step {
    Store(Thing),
    Remove(Thing),
    /// A namespace, or everything.
    Clear(Option<u32>),
    Flush,
}

/// With payloads of so many pages at most.
fn workload(rounds: u32, most_pages: usize) -> Vec<Step> {
    let mut random = Random(0x5eed);
    let mut steps = Vec::new();
    for round in 0..rounds {
        for _ in 0..4 {
            let pages = 1 + random.below(most_pages) as u32;
            steps.push(if random.coin() {
                Step::Store(block(random.below(200) as u32 * 16 + pages, pages))
            } else {
                Step::Store(named(random.below(12) as u32, round as u8, pages))
            });
        }
        match random.below(4) {
            0 => steps.push(Step::Remove(named(random.below(12) as u32, 0, 1))),
            1 if round % 9 == 8 => steps.push(Step::Clear(Some(random.below(3) as u32))),
            _ if round == 7 => steps.push(Step::Clear(None)),
            _ => {}
        }
        if random.coin() {
            steps.push(Step::Flush);
        }
    }
    steps.push(Step::Flush);
    steps
}

/// What may be found under each key: what was flushed last, or anything later. `None` is nothing.
#[derive(Debug, Default)]
struct Known(HashMap<(u32, bool), Vec<Option<Thing>>>);

impl Known {
    fn note(&mut self, thing: &Thing, now: Option<Thing>) {
        self.0.entry((thing.number, thing.named)).or_insert_with(|| vec![None]).push(now);
    }

    fn flushed(&mut self) {
        for versions in self.0.values_mut() {
            versions.drain(..versions.len() - 1);
        }
    }
}

/// Room for all of the workload, or for a part of it.
fn capacity(evicted: bool) -> u64 {
    if evicted { MIB } else { 8 * MIB }
}

/// Runs the workload until the power goes; the disk and what is known of it.
fn run(steps: &[Step], sim: &Sim, cipher: bool, capacity: u64) -> Known {
    let mut known = Known::default();
    let Ok(disk) = open_with(sim, capacity, cipher.then(|| Cipher::new(&[7; 32])), clock()) else { return known };
    for step in steps {
        match *step {
            Step::Store(thing) => {
                thing.store(&disk);
                known.note(&thing, Some(thing));
            }
            Step::Remove(thing) => {
                disk.remove(&[thing.key()]);
                known.note(&thing, None);
            }
            Step::Clear(number) => {
                disk.clear(number.map(namespace));
                let of = |thing: &Option<Thing>| {
                    thing.is_some_and(|thing| number.is_none_or(|number| thing.number % 3 == number))
                };
                for versions in known.0.values_mut() {
                    if versions.iter().any(of) {
                        versions.push(None);
                    }
                }
            }
            Step::Flush => {
                if disk.flush().is_err() {
                    break;
                }
                known.flushed();
            }
        }
    }
    known
}

fn check(left: &Sim, known: &Known, cipher: bool, evicted: bool) {
    let capacity = capacity(evicted);
    let disk = open_with(left, capacity, cipher.then(|| Cipher::new(&[7; 32])), clock()).unwrap();
    assert!(left.used_bytes() <= capacity);
    for versions in known.0.values() {
        let Some(thing) = versions.iter().flatten().next() else { continue };
        let found = thing.load(&disk);
        let right = versions.iter().any(|version| match (version, &found) {
            (Some(thing), Some(bytes)) => *thing.bytes() == *bytes,
            (None, None) => true,
            // The oldest segments may have gone before the power did.
            (Some(_), None) => evicted,
            (None, Some(_)) => false,
        });
        assert!(right, "{versions:?} found: {}; {:?}; {:?}", found.is_some(), disk.stats(), left.names());
    }
    assert_eq!(disk.stats().read_errors_total, 0);
    // And it goes on.
    let thing = block(9_999, 3);
    thing.store(&disk);
    disk.flush().unwrap();
    assert!(thing.is_there(&disk));
}

/// Where to cut a run that went through.
fn cuts(whole: &Sim, everywhere: bool) -> Vec<u64> {
    if everywhere {
        return (1..=whole.operations()).collect();
    }
    let mut cuts: Vec<u64> = whole.syncs().into_iter().flat_map(|sync| [sync, sync + 1]).collect();
    cuts.dedup();
    cuts
}

fn cut_power(steps: &[Step], cipher: bool, evicted: bool, everywhere: bool) {
    let whole = Sim::default();
    run(steps, &whole, cipher, capacity(evicted));
    let cuts = cuts(&whole, everywhere);
    assert!(cuts.len() > 40, "only {} cuts", cuts.len());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for part in cuts.chunks(cuts.len().div_ceil(threads)) {
            scope.spawn(|| part.iter().for_each(|cut| cut_at(*cut, steps, cipher, evicted)));
        }
    });
}

fn cut_at(cut: u64, steps: &[Step], cipher: bool, evicted: bool) {
    let sim = Sim::default();
    sim.cut_at(cut);
    let known = run(steps, &sim, cipher, capacity(evicted));
    let mut random = Random(cut << 8 | 1);
    // The worst: nothing that was not synced got there. The best: all of it. And some of it.
    for kind in 0..3 {
        let left = sim.after_power_cut(|| match kind {
            0 => false,
            1 => true,
            _ => random.coin(),
        });
        check(&left, &known, cipher, evicted);
    }
}

/// Few enough steps that nothing is evicted: then everything flushed must be there.
#[test]
fn everything_flushed_is_there_after_a_power_cut_at_every_operation() {
    cut_power(&workload(60, 12)[..80], false, false, true);
}

#[test]
fn everything_flushed_is_there_also_when_it_is_encrypted() {
    cut_power(&workload(60, 2)[..100], true, false, false);
}

#[test]
fn nothing_wrong_is_found_after_a_power_cut_while_segments_come_and_go() {
    cut_power(&workload(40, 12), false, true, false);
}

#[test]
#[ignore = "takes minutes: make crash-test runs it"]
fn nothing_wrong_is_found_after_a_power_cut_at_every_operation_of_every_workload() {
    cut_power(&workload(60, 2)[..100], true, false, true);
    cut_power(&workload(40, 12), false, true, true);
}
