//! A directory looked at from outside.

use super::super::segment::segment_name;
use super::super::{Archive, RecordState, manifest};
use super::recovery::{count, is_in, real};
use super::*;
use crate::error::{Error, OneLine};

#[test]
fn an_archive_lists_every_record_and_what_became_of_it_and_checks_it() {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path();
    let disk = real(dir).unwrap();
    let things = [block(1, 3), named(2, 1, 2), named(2, 2, 2), block(3, 1), block(4, 1)];
    for thing in &things {
        thing.store(&disk);
        disk.flush().unwrap();
    }
    Thing { expires_at_ms: NOW_MS + 5, ..block(5, 1) }.store(&disk);
    disk.flush().unwrap();
    disk.remove(&[block(3, 1).key()]);
    drop(disk);
    let archive = Archive::open(dir, None, NOW_MS + 5).unwrap();
    let states: Vec<RecordState> = archive.records().iter().map(|record| record.state).collect();
    use RecordState::{Expired, Gone, Live};
    assert_eq!(states, [Live, Gone, Live, Gone, Live, Expired]);
    let (contents, payload) = archive.load(&archive.records()[0]).unwrap().unwrap();
    assert_eq!(payload, things[0].bytes()[..things[0].payload_bytes()]);
    assert!(matches!(contents, super::super::Contents::Block { model, .. } if model == "model"));
    let verified = archive.verify(|_| {});
    assert!(verified.is_whole() && verified.records == 6, "{verified:?}");
    // A flipped bit in a payload is found.
    let name = segment_name(1);
    let mut bytes = std::fs::read(dir.join(&name)).unwrap();
    bytes[2 * 4096 + 17] ^= 1;
    std::fs::write(dir.join(&name), bytes).unwrap();
    let verified = Archive::open(dir, None, NOW_MS).unwrap().verify(|_| {});
    assert_eq!(verified.damaged.len(), 1);
    assert_eq!(verified.damaged[0].key, *things[0].key().hash());
}

/// Verifying ended with the first error of the disk, and said nothing of what lies behind it.
#[test]
fn verifying_goes_on_behind_what_cannot_be_read_and_counts_it() {
    let sim = Sim::default();
    let disk = open(&sim, 4 * MIB);
    // 32 records of three pages a segment.
    let things: Vec<Thing> = (0..100).map(|number| block(number, 2)).collect();
    things.iter().for_each(|thing| assert!(thing.store(&disk)));
    drop(disk);
    let verify = |sim: &Sim| {
        let archive = Archive::over(Arc::new(sim.clone()), "sim".into(), None, NOW_MS).unwrap();
        let verified = archive.verify(|_| {});
        let good = verified.records - (verified.damaged.len() + verified.unreadable.len()) as u64;
        assert_eq!(verified.damaged_segments + verified.lost_segments, 0);
        (good, verified.unreadable.len(), verified.unreadable_segments, verified.is_whole())
    };
    assert_eq!(verify(&sim), (100, 0, 0, true));
    // A payload's page: one record.
    sim.lose_page(&segment_name(1), 2);
    assert_eq!(verify(&sim), (99, 1, 0, false));
    // The whole index: every header is found one by one, and the payload that is lost again.
    let indexed = sim.get(&segment_name(2)).unwrap().len() as u64 / 4096;
    sim.lose_page(&segment_name(2), indexed - 1);
    assert_eq!(verify(&sim), (99, 1, 1, false));
    // And one of the headers: what lies behind it is found.
    sim.lose_page(&segment_name(2), 4);
    assert_eq!(verify(&sim), (98, 1, 1, false));
    // The first page of a segment: nothing says whose it is.
    let of_third = things.iter().filter(|thing| is_in(&sim, 3, thing)).count() as u64;
    sim.lose_page(&segment_name(3), 0);
    assert_eq!(verify(&sim), (98 - of_third, 1, 2, false));
    // The manifest.
    sim.lose_page("MANIFEST", 0);
    let (good, unreadable, segments, whole) = verify(&sim);
    assert_eq!((good, unreadable, segments, whole), (98 - of_third, 1, 2, false));
    // A cache makes misses of the rest, and does not forget what a manifest says that it cannot read.
    let error = open_with(&sim, 4 * MIB, None, clock()).unwrap_err();
    assert!(
        matches!(error, Error::Disk { .. }) && OneLine(&error).to_string().contains("remove the file MANIFEST"),
        "{error}"
    );
    sim.delete(manifest::NAME);
    assert!(count(&sim, &things) > 0);
}

#[test]
fn an_archive_of_a_directory_in_which_no_disk_tier_lies_is_a_clear_error() {
    let home = tempfile::tempdir().unwrap();
    std::fs::write(home.path().join("letter.txt"), b"not ours").unwrap();
    let error = Archive::open(home.path(), None, NOW_MS).unwrap_err();
    assert!(matches!(error, Error::DiskRefused { .. }) && error.to_string().contains("nothing of a disk tier"));
    // One that was opened and closed is a disk tier, if an empty one.
    drop(real(home.path()).unwrap());
    let archive = Archive::open(home.path(), None, NOW_MS).unwrap();
    assert_eq!((archive.records().len(), archive.is_encrypted()), (0, false));
    assert_eq!(archive.verify(|_| {}).foreign, ["letter.txt"]);
}

/// The process is killed while a record is being written: the cache that opens the directory
/// drops the record and finds what it would have replaced, and an archive must say the same.
#[test]
fn an_archive_leaves_out_a_torn_record_as_the_cache_does() {
    let (home, copy) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let disk = real(home.path()).unwrap();
    named(1, 1, 2).store(&disk);
    disk.flush().unwrap();
    named(1, 2, 2).store(&disk);
    while disk.stats().queued_bytes > 0 {
        std::thread::yield_now();
    }
    for entry in std::fs::read_dir(home.path()).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    let segment = copy.path().join(segment_name(1));
    let mut bytes = std::fs::read(&segment).unwrap();
    // Behind the segment's header and the first record; the last page of the second.
    bytes[(1 + 3 + 2) * 4096 + 100] ^= 1;
    std::fs::write(&segment, bytes).unwrap();
    let archive = Archive::open(copy.path(), None, NOW_MS).unwrap();
    let verified = archive.verify(|_| {});
    assert_eq!((verified.torn_records, verified.records, verified.segments), (1, 1, 1));
    assert!(verified.is_whole(), "{verified:?}");
    assert_eq!(archive.records()[0].state, RecordState::Live);
    drop(archive);
    let disk = real(copy.path()).unwrap();
    assert_eq!(named(1, 1, 2).load(&disk).unwrap(), *named(1, 1, 2).bytes());
}
