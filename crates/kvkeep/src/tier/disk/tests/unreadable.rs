//! Opening what the disk fails to read, or has no room to write.

use super::super::segment::segment_name;
use super::super::{Archive, manifest};
use super::recovery::{count, filled, is_in, replaced_later, segments};
use super::*;

/// The file was deleted: an error of the disk that may pass cost a whole segment.
#[test]
fn a_segment_that_cannot_be_read_when_it_is_opened_is_kept_and_back_the_next_time() {
    let (old, new) = (named(1, 1, 2), named(1, 2, 2));
    let (sim, name) = replaced_later(&old, &new);
    let all: Vec<Thing> = (0..12).chain(20..32).map(|number| block(number, 4)).chain([new]).collect();
    let index_page = sim.get(&name).unwrap().len() as u64 / 4096 - 1;
    for fault in ["header", "file", "index and a record"] {
        let left = sim.copy();
        match fault {
            "header" => left.lose_page(&name, 0),
            "file" => left.shut(&name),
            _ => [index_page, 1].into_iter().for_each(|page| left.lose_page(&name, page)),
        }
        for _ in 0..2 {
            let disk = open(&left, 4 * MIB);
            let there = all.iter().filter(|thing| thing.is_there(&disk)).count();
            assert!((12..all.len()).contains(&there), "{fault}: {there}");
            assert!(old.load(&disk).is_none(), "{fault}: it may have been replaced there");
            let stats = disk.stats();
            assert!(stats.read_errors_total > 0 && stats.damaged_total == 0 && !stats.failing, "{fault}: {stats:?}");
            let whole = sim.used_bytes() + super::super::room::OVERHEAD_BYTES;
            assert!(
                stats.used_bytes + 4096 >= whole - sim.get(manifest::NAME).unwrap().len() as u64,
                "{fault}: {stats:?}"
            );
        }
        assert_eq!(left.get(&name), sim.get(&name), "{fault}");
        // The cable is in its place again.
        let disk = open(&left.copy(), 4 * MIB);
        assert!(all.iter().all(|thing| thing.is_there(&disk)), "{fault}");
    }
}

/// What is in a segment that cannot be read is not in the index either: it would not have been known, and removing or
/// replacing it would have left it there.
#[test]
fn what_is_removed_or_replaced_while_its_segment_cannot_be_read_does_not_come_back_with_it() {
    let (old, new) = (named(1, 1, 2), named(1, 2, 2));
    let (sim, name) = replaced_later(&old, &new);
    let in_it = (0..32).map(|number| block(number, 4)).find(|thing| is_in(&sim, 3, thing)).unwrap();
    assert_eq!(name, segment_name(3));
    for end in ["removed", "replaced", "replaced and dropped", "cleared"] {
        let left = sim.copy();
        left.lose_page(&name, 0);
        let disk = open(&left, 4 * MIB);
        let newest = named(1, 3, 2);
        match end {
            "removed" => drop(disk.remove(&[new.key(), in_it.key()])),
            "replaced" => assert!(newest.store(&disk)),
            "cleared" => drop(disk.clear(Some(new.meta().namespace))),
            _ => disk.hide(&[new.key()]),
        }
        disk.flush().unwrap();
        drop(disk);
        let disk = open(&left.copy(), 4 * MIB);
        let expected = (end == "replaced").then(|| newest.bytes().to_vec());
        assert!(new.load(&disk) == expected, "{end}");
        assert_eq!(
            in_it.is_there(&disk),
            end != "removed" && (end != "cleared" || in_it.meta().namespace != new.meta().namespace)
        );
    }
}

/// So many removals at once were taken for too many to remember, and removed everything.
#[test]
fn many_removals_at_once_remove_what_they_name_and_nothing_else() {
    let (sim, things) = filled();
    sim.lose_page(&segments(&sim)[0], 0);
    let disk = open(&sim, 128 * MIB);
    let kept = named(3_000_000, 1, 1);
    let kept_block = things.iter().rev().find(|thing| !thing.named && thing.is_there(&disk)).unwrap();
    // Nobody knows what is in that segment: all of these are removed there.
    let unknown: Vec<ObjectKey> = (1_000_000..1_070_000).map(|number| named(number, 1, 1).key()).collect();
    sim.hang(true);
    assert!(kept.store(&disk));
    disk.hide(&unknown);
    sim.hang(false);
    disk.flush().unwrap();
    assert!(kept.is_there(&disk) && kept_block.is_there(&disk));
    disk.remove(&unknown);
    disk.flush().unwrap();
    assert!(kept.is_there(&disk) && kept_block.is_there(&disk), "{:?}", disk.stats());
    drop(disk);
    let disk = open(&sim, 128 * MIB);
    assert!(kept.is_there(&disk), "its own removal is not behind it");
}

#[test]
fn a_segment_that_cannot_be_read_counts_under_the_cap_and_goes_in_its_turn() {
    let (sim, things) = filled();
    for name in segments(&sim) {
        let left = sim.copy();
        left.lose_page(&name, 0);
        let disk = open(&left, 4 * MIB);
        (1_000..1_100).for_each(|number| assert!(block(number, 8).store(&disk)));
        disk.flush().unwrap();
        assert!(left.peak_bytes() <= 4 * MIB && !left.names().contains(&name), "{name}");
        assert!(block(1_099, 8).is_there(&disk));
        drop(disk);
        // Also where it is opened with a smaller cap than what lies there.
        let left = sim.copy();
        left.lose_page(&name, 0);
        let disk = open(&left, MIB);
        assert!(left.used_bytes() <= MIB && disk.stats().used_bytes <= MIB, "{name}");
        assert!(things.iter().filter(|thing| thing.is_there(&disk)).count() < things.len());
    }
}

/// The newest segment was being written and is not in order any more: what the disk fails to read is
/// not taken for torn.
#[test]
fn a_record_that_cannot_be_read_is_not_taken_for_a_torn_one() {
    let sim = Sim::default();
    let disk = open(&sim, 4 * MIB);
    (0..3).for_each(|number| assert!(block(number, 2).store(&disk)));
    disk.flush().unwrap();
    let copy = sim.copy();
    copy.lose_page(&segment_name(1), 5);
    let archive = Archive::over(Arc::new(copy.clone()), "sim".into(), None, NOW_MS).unwrap();
    let verified = archive.verify(|_| {});
    assert_eq!((verified.records, verified.torn_records, verified.unreadable.len()), (3, 0, 1));
    let disk = open(&copy, 4 * MIB);
    let there = [0, 1, 2].map(|number| block(number, 2).is_there(&disk));
    assert_eq!((there, disk.stats().read_errors_total), ([true, false, true], 1));
}

/// A cache on a full disk could not be opened, though all of it could be read.
#[test]
fn a_full_disk_is_opened_and_read() {
    let (sim, things) = filled();
    for capacity_bytes in [4 * MIB, MIB] {
        let left = sim.copy();
        left.space_bytes(Some(left.used_bytes()));
        let disk = open_with(&left, capacity_bytes, None, clock()).unwrap();
        let there = things.iter().filter(|thing| thing.is_there(&disk)).count();
        if capacity_bytes == MIB {
            // Evicting made room.
            assert!(there > 0 && there < things.len() && left.used_bytes() <= MIB && !disk.stats().failing);
            continue;
        }
        assert_eq!(there, things.len());
        assert!(disk.stats().failing && disk.stats().write_errors_total == 1);
        left.space_bytes(None);
        drop(disk);
        assert_eq!(count(&left, &things), things.len());
    }
}
