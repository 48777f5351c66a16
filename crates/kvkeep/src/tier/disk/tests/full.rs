//! A disk that is full before its cap: it rotates within what there is.

use super::*;

/// What a disk can be like on which there is less room than the cap.
#[derive(Debug, Clone, Copy, Default)]
struct Kind {
    quota: bool,
    /// Files get their space when they are written.
    sparse: bool,
}

const KINDS: [Kind; 4] = [
    Kind { quota: false, sparse: false },
    Kind { quota: true, sparse: false },
    Kind { quota: false, sparse: true },
    Kind { quota: true, sparse: true },
];

fn disk_with(kind: Kind, capacity: u64, space: u64) -> (Sim, Arc<ManualClock>, Disk) {
    let (sim, clock) = (Sim::default(), Arc::new(ManualClock::at(NOW_MS)));
    sim.quota(kind.quota);
    sim.sparse(kind.sparse);
    sim.space_bytes(Some(space));
    let disk = open_with(&sim, capacity, None, clock.clone()).unwrap();
    (sim, clock, disk)
}

fn store(disk: &Disk, numbers: std::ops::Range<u32>) {
    for number in numbers {
        assert!(block(number, 8).store(disk));
        if number % 25 == 0 {
            disk.flush().unwrap();
        }
    }
    disk.flush().unwrap();
}

fn there(disk: &Disk, numbers: std::ops::Range<u32>) -> usize {
    numbers.filter(|number| block(*number, 8).is_there(disk)).count()
}

/// On a disk of 64 MiB with a cap of 1 GiB the first entries stayed for ever: 0 evictions in 1,500 stores, and nothing
/// new was written.
#[test]
fn a_disk_smaller_than_the_cap_rotates_within_what_it_has() {
    for kind in KINDS {
        let (sim, _, disk) = disk_with(kind, 64 * MIB, 4 * MIB);
        store(&disk, 0..600);
        let stats = disk.stats();
        assert!(!stats.failing && stats.evictions > 400 && stats.dropped_total == 0, "{kind:?}: {stats:?}");
        // 9 pages a record.
        assert!(there(&disk, 540..600) == 60 && there(&disk, 0..100) == 0, "{kind:?}");
        assert!(sim.peak_bytes() <= 4 * MIB && sim.used_bytes() > 3 * MIB, "{kind:?}: {}", sim.used_bytes());
        let before = there(&disk, 0..600);
        assert!(before > 80, "{kind:?}: {before} of the 113 that fit");
        drop(disk);
        let disk = open(&sim, 64 * MIB);
        assert_eq!(there(&disk, 0..600), before, "{kind:?}: closed cleanly");
    }
}

/// What others take must not cost everything, and what they give back is used again.
#[test]
fn room_that_others_take_and_give_back_is_given_up_and_taken_again() {
    for kind in KINDS {
        let (sim, clock, disk) = disk_with(kind, 8 * MIB, 16 * MIB);
        store(&disk, 0..200);
        assert_eq!(disk.stats().evictions, 0);
        // Everything that was free is taken.
        sim.space_bytes(Some(sim.used_bytes()));
        store(&disk, 200..300);
        let stats = disk.stats();
        assert!(!stats.failing && there(&disk, 270..300) == 30, "{kind:?}: {stats:?}");
        assert!(stats.entries > 120, "{kind:?}: what went made room for what came: {stats:?}");
        sim.space_bytes(None);
        for round in 0..20 {
            clock.advance(Duration::from_secs(100));
            store(&disk, 300 + round * 20..320 + round * 20);
        }
        assert!(disk.stats().used_bytes > 7 * MIB && sim.peak_bytes() <= 8 * MIB, "{kind:?}: {:?}", disk.stats());
    }
}

/// Under a snapshot, what is removed frees nothing: then not everything goes in vain.
#[test]
fn where_evicting_frees_nothing_most_is_kept_and_the_disk_is_tried_again_later() {
    for kind in KINDS {
        let (sim, clock, disk) = disk_with(kind, 64 * MIB, 64 * MIB);
        drop(disk);
        let disk = open_with(&sim, 8 * MIB, None, clock.clone()).unwrap();
        store(&disk, 0..150);
        sim.take_snapshot();
        sim.space_bytes(Some(sim.used_bytes()));
        (150..200).for_each(|number| _ = block(number, 8).store(&disk));
        let _ = disk.flush();
        let stats = disk.stats();
        assert!(stats.failing && stats.entries > 60, "{kind:?}: {stats:?}");
        sim.space_bytes(None);
        clock.advance(Duration::from_secs(100));
        store(&disk, 200..210);
        assert!(!disk.stats().failing && there(&disk, 200..210) == 10, "{kind:?}");
    }
}

/// A record that is larger than all that the disk has is refused; nothing goes for it in vain.
#[test]
fn a_record_larger_than_the_disk_costs_nothing_else() {
    let (_, _, disk) = disk_with(Kind::default(), 64 * MIB, 2 * MIB);
    store(&disk, 0..100);
    let before = disk.stats().entries;
    block(1_000, 700).store(&disk);
    let _ = disk.flush();
    let stats = disk.stats();
    assert!(!block(1_000, 700).is_there(&disk) && stats.entries + 8 > before, "{before}: {stats:?}");
    assert!(!stats.failing, "{stats:?}");
}

/// Removals and clearing hold on a disk that rotates, also for what is written again.
#[test]
fn what_is_removed_on_a_full_disk_does_not_come_back() {
    for kind in KINDS {
        let (sim, _, disk) = disk_with(kind, 64 * MIB, 2 * MIB);
        let mut removed = Vec::new();
        for number in 0..300 {
            named(number % 20, number as u8, 2).store(&disk);
            block(1_000 + number, 4).store(&disk);
            if number % 7 == 6 {
                let gone = [named(number % 20, 0, 2).key(), block(1_000 + number - 3, 4).key()];
                disk.remove(&gone);
                removed.push(block(1_000 + number - 3, 4));
                disk.flush().unwrap();
            }
        }
        disk.remove(&[named(4, 0, 2).key()]);
        disk.flush().unwrap();
        let left = sim.copy();
        drop(disk);
        for sim in [left, sim] {
            let disk = open(&sim, 64 * MIB);
            assert!(removed.iter().all(|thing| !thing.is_there(&disk)), "{kind:?}");
            assert!(named(4, 0, 2).load(&disk).is_none(), "{kind:?}");
            assert_eq!(disk.stats().damaged_total, 0, "{kind:?}");
        }
    }
}
