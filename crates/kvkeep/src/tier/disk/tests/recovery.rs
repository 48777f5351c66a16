//! Opening what is not as it was left.

use super::super::Archive;
use super::super::format::RecordHeader;
use super::super::manifest;
use super::super::segment::segment_name;
use super::*;
use crate::error::{Error, OneLine};

/// A closed directory of several segments: blocks 0..n, and named records of two versions.
pub(super) fn filled() -> (Sim, Vec<Thing>) {
    let sim = Sim::default();
    let disk = open(&sim, 4 * MIB);
    let mut things = Vec::new();
    for number in 0..6 {
        named(500 + number, 1, 2).store(&disk);
    }
    for number in 0..60 {
        things.push(block(number, 4));
        if number % 10 == 5 {
            things.push(named(500 + number / 10, 2, 3));
        }
    }
    things.iter().for_each(|thing| assert!(thing.store(&disk)));
    drop(disk);
    assert!(segments(&sim).len() >= 4, "{:?}", sim.names());
    (sim, things)
}

pub(super) fn segments(sim: &Sim) -> Vec<String> {
    sim.names().into_iter().filter(|name| name.starts_with("segment")).collect()
}

/// How many of the things are there; whatever is there is right.
pub(super) fn count(sim: &Sim, things: &[Thing]) -> usize {
    let disk = open(sim, 4 * MIB);
    things.iter().filter(|thing| thing.is_there(&disk)).count()
}

#[test]
fn without_a_manifest_the_segments_speak_for_themselves() {
    let (sim, things) = filled();
    sim.delete(manifest::NAME);
    assert_eq!(count(&sim, &things), things.len());
    assert_eq!(count(&sim, &things), things.len(), "and then there is one again");
}

#[test]
fn without_indexes_the_headers_are_read() {
    let (sim, things) = filled();
    let all = segments(&sim);
    for name in &all {
        let bytes = sim.get(name).unwrap();
        sim.put(name, bytes[..bytes.len() - 4096].to_vec());
    }
    let blocks: Vec<Thing> = things.iter().copied().filter(|thing| !thing.named).collect();
    assert_eq!(count(&sim, &blocks), blocks.len());
    assert_eq!(open(&sim, 4 * MIB).stats().damaged_total, 0, "the indexes were written again");
}

/// Its end overflowed: without checks for that, the headers before it would have been read again and again.
#[test]
fn a_header_that_claims_more_pages_than_can_be_counted_ends_nothing() {
    let sim = Sim::default();
    let disk = open(&sim, 4 * MIB);
    (0..4).for_each(|number| assert!(block(number, 2).store(&disk)));
    drop(disk);
    let name = segment_name(1);
    let mut bytes = sim.get(&name).unwrap();
    let mut header = RecordHeader::decode(&bytes[4 * 4096..5 * 4096]).unwrap();
    let half = (u64::from(u32::MAX - 1) * 4096 / 2) as usize;
    let shape = Shape::new(&[half]).unwrap();
    header.content = Content::Named(PairSpec { k: (DType::U8, shape), v: (DType::U8, shape), prefix_bytes: 1, tag: 0 });
    (header.meta.kind, header.meta.facts.stored_bytes) = (Kind::Named, half as u64 * 2);
    header.list = vec![0; 256 * 8];
    header.encode(&mut bytes[4 * 4096..5 * 4096]);
    assert!(RecordHeader::decode(&bytes[4 * 4096..5 * 4096]).is_some(), "it fits itself");
    bytes.truncate(bytes.len() - 4096);
    sim.put(&name, bytes);
    let disk = open(&sim, 4 * MIB);
    assert_eq!([0, 1, 2, 3].map(|number| block(number, 2).is_there(&disk)), [true, false, true, true]);
}

#[test]
fn a_torn_tail_is_cut_off_and_what_was_flushed_before_it_is_there() {
    let sim = Sim::default();
    let disk = open(&sim, 4 * MIB);
    let things: Vec<Thing> = (0..5).map(|number| block(number, 4)).collect();
    things[..4].iter().for_each(|thing| assert!(thing.store(&disk)));
    disk.flush().unwrap();
    things[4].store(&disk);
    assert!(disk.wait_for_writer(Duration::from_secs(60)));
    let left = sim.copy();
    drop(disk);
    // The last record's header got there, its payload only in part.
    let name = &segments(&left)[0];
    let mut bytes = left.get(name).unwrap();
    let last_page = (1 + 4 * 5 + 3) * 4096;
    bytes[last_page..last_page + 4096].fill(0);
    left.put(name, bytes);
    let disk = open(&left, 4 * MIB);
    assert_eq!(disk.stats().entries, 4, "a torn record is not even in the index");
    assert!(things[..4].iter().all(|thing| thing.is_there(&disk)));
}

/// A process was killed after it had made a segment's file, and before it wrote the header: that
/// counted as damage once, and named records were dropped for it.
#[test]
fn a_segment_that_was_only_just_begun_is_no_damage() {
    for length in [0, 4096 * 32] {
        let sim = Sim::default();
        let disk = open(&sim, 4 * MIB);
        let things: Vec<Thing> = (0..5).map(|number| named(number, 1, 4)).collect();
        things.iter().for_each(|thing| assert!(thing.store(&disk)));
        disk.flush().unwrap();
        // As the next process leaves it that is killed there.
        drop(disk);
        let next = segment_name(2);
        let manifest = sim.get(manifest::NAME).unwrap();
        let mut read = super::super::format::Manifest::decode(&manifest).unwrap();
        read.next_segment = 3;
        read.segments.push(super::super::format::SegmentLine::open(2));
        let mut bytes = vec![0; read.encoded_bytes()];
        read.encode(&mut bytes);
        bytes.resize(bytes.len() + super::super::format::MARK_PAGES * 4096, 0);
        sim.put(manifest::NAME, bytes);
        sim.put(&next, vec![0; length]);
        let disk = open(&sim, 4 * MIB);
        assert_eq!(disk.stats().damaged_total, 0);
        assert!(things.iter().all(|thing| thing.is_there(&disk)) && !sim.names().contains(&next));
    }
}

/// The segment that is lost held the newer version: the older one must not come back.
#[test]
fn a_lost_segment_brings_back_nothing_that_it_replaced() {
    let (sim, things) = filled();
    for name in segments(&sim) {
        for damage in ["missing", "empty", "cut", "header"] {
            let left = sim.copy();
            match damage {
                "missing" => left.delete(&name),
                "empty" => left.put(&name, Vec::new()),
                "cut" => left.put(&name, left.get(&name).unwrap()[..5 * 4096].to_vec()),
                _ => {
                    let mut bytes = left.get(&name).unwrap();
                    bytes[100] ^= 4;
                    left.put(&name, bytes);
                }
            }
            let there = count(&left, &things);
            assert!(there > things.len() / 2 && there < things.len(), "{damage} {name}: {there}");
        }
    }
}

/// What was dropped for a loss when the directory was opened came back when it was opened once more: the manifest had
/// stopped to name what was lost.
#[test]
fn what_a_loss_puts_in_doubt_does_not_come_back_at_the_second_opening() {
    let (old, new) = (named(1, 1, 2), named(1, 2, 2));
    let (sim, lost) = replaced_later(&old, &new);
    for damage in ["missing", "header", "cut", "missing and no manifest", "cut and no manifest"] {
        let left = sim.copy();
        let mut bytes = left.get(&lost).unwrap();
        match damage.split(' ').next() {
            Some("missing") => left.delete(&lost),
            Some("header") => {
                bytes[100] ^= 4;
                left.put(&lost, bytes);
            }
            _ => left.put(&lost, bytes[..2 * 4096].to_vec()),
        }
        if damage.ends_with("no manifest") {
            left.delete(manifest::NAME);
        }
        // The power may go at any operation of the first opening.
        for cut in 1..60 {
            let left = left.copy();
            left.cut_at(cut);
            let _ = open_with(&left, 4 * MIB, None, clock());
            let left = left.after_power_cut(|| cut % 2 == 0);
            for opening in 0..3 {
                let disk = open(&left, 4 * MIB);
                assert!(old.load(&disk).is_none(), "{damage}, cut at {cut}, opening {opening}");
                assert!(block(0, 4).is_there(&disk) && block(31, 4).is_there(&disk));
                assert!(sim.peak_bytes() <= 4 * MIB);
            }
            // What is stored anew is there to stay.
            let disk = open(&left, 4 * MIB);
            assert_eq!(disk.stats().damaged_total, 0, "{damage}: it is settled");
            assert!(new.store(&disk));
            drop(disk);
            assert!(new.is_there(&open(&left, 4 * MIB)));
        }
    }
}

/// Closed, with an old version in the first segment and a newer one in a later one, whose name is returned. Blocks 0 to
/// 11 and 20 to 31 stand around it.
pub(super) fn replaced_later(old: &Thing, new: &Thing) -> (Sim, String) {
    let sim = Sim::default();
    let disk = open(&sim, 4 * MIB);
    old.store(&disk);
    disk.flush().unwrap();
    (0..12).for_each(|number| assert!(block(number, 4).store(&disk)));
    new.store(&disk);
    (20..32).for_each(|number| assert!(block(number, 4).store(&disk)));
    drop(disk);
    let id = (2..20).find(|id| sim.get(&segment_name(*id)).is_some() && is_in(&sim, *id, new)).unwrap();
    (sim, segment_name(id))
}

/// A directory without a manifest was opened segment number by segment number up to the highest that any file had in its
/// name.
#[test]
fn a_file_with_an_absurd_number_in_its_name_harms_nothing() {
    for number in [u64::MAX, u64::MAX - 1, 1 << 63] {
        let (sim, things) = filled();
        sim.put(&segment_name(number), b"mine".to_vec());
        assert_eq!(count(&sim, &things), things.len());
        sim.delete(manifest::NAME);
        let blocks: Vec<Thing> = things.iter().copied().filter(|thing| !thing.named).collect();
        assert_eq!(count(&sim, &blocks), blocks.len());
        assert!(sim.names().contains(&segment_name(number)));
    }
}

#[test]
fn without_a_manifest_a_gap_in_the_segments_counts_as_a_loss() {
    let (sim, things) = filled();
    sim.delete(manifest::NAME);
    sim.delete(&segments(&sim)[1]);
    assert!(count(&sim, &things) < things.len());
}

#[test]
fn foreign_files_are_left_alone_and_counted() {
    let (sim, things) = filled();
    let (other, _) = {
        let sim = Sim::default();
        let disk = open(&sim, 4 * MIB);
        named(500, 9, 3).store(&disk);
        drop(disk);
        (sim.clone(), ())
    };
    let segment = other.get(&segments(&other)[0]).unwrap();
    sim.put("notes.txt", b"mine".to_vec());
    sim.put("segment-zz", b"mine".to_vec());
    sim.put(&segment_name(77), segment.clone());
    sim.put(&segment_name(78), Vec::new());
    assert_eq!(count(&sim, &things), things.len());
    assert_eq!(open(&sim, 4 * MIB).stats().foreign_files, 4);
    assert_eq!(sim.get("notes.txt").unwrap(), b"mine");
    assert_eq!(sim.get(&segment_name(77)).unwrap(), segment);
    let disk = open(&sim, 4 * MIB);
    block(70, 3).store(&disk);
    drop(disk);
    assert!(sim.names().contains(&segment_name(79)), "a new segment stands behind all others: {:?}", sim.names());
}

#[test]
fn swapped_and_duplicated_segments_are_misses() {
    let (sim, things) = filled();
    let names = segments(&sim);
    let (a, b) = (sim.get(&names[0]).unwrap(), sim.get(&names[1]).unwrap());
    let swapped = sim.copy();
    swapped.put(&names[0], b.clone());
    swapped.put(&names[1], a.clone());
    assert!(count(&swapped, &things) < things.len());
    let twice = sim.copy();
    twice.put(&names[1], a);
    assert!(count(&twice, &things) < things.len());
    let copied = sim.copy();
    copied.put(&segment_name(99), b);
    assert_eq!(count(&copied, &things), things.len(), "a copy beside the segments is foreign");
}

/// A segment that was evicted, but whose file was still there when the power went.
#[test]
fn evicted_segments_that_are_still_there_do_not_come_back() {
    let sim = Sim::default();
    let disk = open(&sim, 2 * MIB);
    named(1, 1, 3).store(&disk);
    disk.flush().unwrap();
    let first = segments(&sim)[0].clone();
    let evicted = sim.get(&first).unwrap();
    (0..200).for_each(|number| assert!(block(number, 4).store(&disk)));
    drop(disk);
    assert!(!sim.names().contains(&first));
    sim.put(&first, evicted);
    let disk = open(&sim, 2 * MIB);
    assert!(named(1, 1, 3).load(&disk).is_none());
    assert!(!sim.names().contains(&first), "it is removed, so that the cap holds");
}

#[test]
fn another_version_is_refused_and_a_flipped_version_is_not_taken_for_one() {
    let (sim, things) = filled();
    let mut bytes = sim.get(manifest::NAME).unwrap();
    bytes[8] ^= 2;
    sim.put(manifest::NAME, bytes.clone());
    assert_eq!(count(&sim, &things), things.len(), "as if there were no manifest");
    let newer = 9u32.to_le_bytes();
    bytes[8..12].copy_from_slice(&newer);
    bytes[33..37].copy_from_slice(&newer);
    sim.put(manifest::NAME, bytes);
    let error = open_with(&sim, 4 * MIB, None, clock()).unwrap_err();
    assert!(error.to_string().contains("version 9"), "{error}");
}

// On a real file system.

pub(super) fn real(dir: &Path) -> Result<Disk> {
    Disk::open(&options(dir, 4 * MIB), clock())
}

#[test]
fn a_directory_belongs_to_one_process_at_a_time_and_the_error_names_it() {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("a/b");
    let disk = real(&dir).unwrap();
    let error = real(&dir).unwrap_err();
    assert!(error.to_string().contains(&format!("process {}", std::process::id())), "{error}");
    assert!(matches!(Archive::open(&dir, None, NOW_MS), Err(Error::DiskLocked { .. })));
    drop(disk);
    drop(real(&dir).unwrap());
    let readers = (Archive::open(&dir, None, NOW_MS).unwrap(), Archive::open(&dir, None, NOW_MS).unwrap());
    assert!(matches!(real(&dir), Err(Error::DiskLocked { .. })));
    drop(readers);
}

#[test]
fn files_and_directories_are_for_their_owner_alone_and_stay_under_the_cap() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("cache");
    let disk = real(&dir).unwrap();
    for number in 0..300 {
        block(number, 8).store(&disk);
        if number % 20 == 0 {
            disk.flush().unwrap();
            let files = std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().metadata());
            // A file may go between being listed and being looked at.
            let bytes: u64 = files.flatten().map(|metadata| metadata.blocks() * 512).sum();
            assert!(bytes + 4096 <= 4 * MIB, "{bytes}");
        }
    }
    drop(disk);
    assert_eq!(std::fs::metadata(&dir).unwrap().permissions().mode() & 0o777, 0o700);
    for entry in std::fs::read_dir(&dir).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{entry:?}");
    }
    let disk = real(&dir).unwrap();
    assert!(block(299, 8).is_there(&disk) && block(290, 8).is_there(&disk));
}

#[test]
fn a_path_that_is_no_directory_or_may_not_be_written_is_a_clear_error() {
    let home = tempfile::tempdir().unwrap();
    let (file, link) = (home.path().join("file"), home.path().join("link"));
    std::fs::write(&file, b"x").unwrap();
    std::os::unix::fs::symlink(home.path().join("nowhere"), &link).unwrap();
    for path in [file.clone(), file.join("below"), link.clone()] {
        let error = real(&path).unwrap_err();
        assert!(matches!(error, Error::Disk { doing: "open", .. }), "{error}");
        assert!(OneLine(&error).to_string().contains("give a directory"), "{error}");
        let error = Archive::open(&path, None, NOW_MS).unwrap_err();
        assert!(OneLine(&error).to_string().contains("give a directory"), "{error}");
    }
    assert!(std::fs::read_link(&link).is_ok() && !home.path().join("nowhere").exists());
}

/// Does this segment hold the record?
pub(super) fn is_in(sim: &Sim, segment: u64, thing: &Thing) -> bool {
    let bytes = sim.get(&segment_name(segment)).unwrap();
    bytes.chunks(4096).any(|page| page.starts_with(b"KVKRECRD") && page[48..80] == *thing.key().hash())
}
