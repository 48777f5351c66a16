//! A disk that fails: dropped and counted, latched, tried again; reads are misses.

use super::super::shared::Shared;
use super::*;
use crate::error::Error;

#[test]
fn a_failing_disk_drops_writes_and_is_tried_again_later() {
    let (sim, clock) = (Sim::default(), Arc::new(ManualClock::at(NOW_MS)));
    let disk = open_with(&sim, 4 * MIB, None, clock.clone()).unwrap();
    let kept = block(0, 4);
    kept.store(&disk);
    disk.flush().unwrap();
    sim.fail_writes(true);
    (1..60).for_each(|number| _ = block(number, 8).store(&disk));
    let _ = disk.flush();
    let stats = disk.stats();
    assert!(stats.failing && stats.dropped_total > 20 && stats.write_errors_total > 0, "{stats:?}");
    assert!(kept.is_there(&disk), "what was there can still be read");
    sim.fail_writes(false);
    clock.advance(Duration::from_secs(100));
    let after = block(100, 4);
    assert!(after.store(&disk));
    disk.flush().unwrap();
    assert!(after.is_there(&disk) && !disk.stats().failing);
    drop(disk);
    let disk = open(&sim, 4 * MIB);
    assert!(after.is_there(&disk) && kept.is_there(&disk));
    assert!(sim.peak_bytes() <= 4 * MIB);
}

#[test]
fn while_the_disk_fails_it_is_asked_ever_more_seldom() {
    let (sim, clock) = (Sim::default(), Arc::new(ManualClock::at(NOW_MS)));
    let disk = open_with(&sim, 4 * MIB, None, clock.clone()).unwrap();
    sim.fail_writes(true);
    for number in 0..10_000 {
        block(number, 1).store(&disk);
        clock.advance(Duration::from_millis(10));
    }
    let _ = disk.flush();
    let errors = disk.stats().write_errors_total;
    assert!((3..20).contains(&errors), "{errors} tries in 100 s");
}

#[test]
fn a_removal_is_not_forgotten_while_the_disk_fails() {
    let (sim, clock) = (Sim::default(), Arc::new(ManualClock::at(NOW_MS)));
    let disk = open_with(&sim, 4 * MIB, None, clock.clone()).unwrap();
    let things: Vec<Thing> = (0..4).map(|number| named(number, 1, 1)).collect();
    things.iter().for_each(|thing| assert!(thing.store(&disk)));
    disk.flush().unwrap();
    sim.fail_writes(true);
    disk.remove(&[things[0].key()]);
    assert!(disk.flush().is_err(), "a flush that did not happen says so");
    // A newer version that does not get there must not leave the older one to be found.
    named(1, 2, 1).store(&disk);
    disk.cancel_writes();
    let _ = disk.flush();
    assert!(named(1, 1, 1).load(&disk).is_none());
    sim.fail_writes(false);
    disk.flush().unwrap();
    drop(disk);
    let disk = open(&sim, 4 * MIB);
    let there: Vec<bool> = things.iter().map(|thing| thing.load(&disk).is_some()).collect();
    assert_eq!(there, [false, false, true, true]);
}

/// The disk failed behind the write and said so: nobody knew of the record any more, removing it left it there, and
/// after a restart it was back.
#[test]
fn what_was_written_before_the_disk_failed_does_not_come_back_once_it_was_removed() {
    let sim = Sim::default();
    let disk = open(&sim, 4 * MIB);
    for thing in [named(1, 1, 2), block(2, 2)] {
        sim.fail_behind_writes(true);
        thing.store(&disk);
        assert!(disk.flush().is_err());
        disk.remove(&[thing.key()]);
        sim.fail_behind_writes(false);
        disk.flush().unwrap();
    }
    drop(disk);
    let disk = open(&sim, 4 * MIB);
    assert!(named(1, 1, 2).load(&disk).is_none() && block(2, 2).load(&disk).is_none());
}

#[test]
fn many_small_records_are_written_with_few_writes() {
    let sim = Sim::default();
    let disk = open(&sim, 4 * MIB);
    block(0, 1).store(&disk);
    disk.flush().unwrap();
    let before = sim.operations();
    sim.hang(true);
    (1..200).for_each(|number| assert!(block(number, 1).store(&disk)));
    sim.hang(false);
    disk.flush().unwrap();
    // 398 pages in segments of 32, each of them made, filled, sealed and named in some 14 operations; one write for
    // each record would be 199 more.
    let operations = sim.operations() - before;
    assert!(operations < 250, "{operations}");
    assert!((0..200).all(|number| block(number, 1).is_there(&disk)));
}

/// 60 things on a disk that has no room for more, and whose newest segment was given up.
fn full(sim: &Sim) -> (Disk, Vec<Thing>) {
    let disk = open(sim, 4 * MIB);
    let things: Vec<Thing> = (0..60).map(|number| block(number, 8)).collect();
    things.iter().for_each(|thing| assert!(thing.store(&disk)));
    disk.flush().unwrap();
    sim.fail_writes(true);
    block(100, 8).store(&disk);
    assert!(disk.flush().is_err() && disk.stats().failing);
    sim.fail_writes(false);
    sim.space_bytes(Some(sim.used_bytes()));
    (disk, things)
}

/// A removal that found no room on a full disk was lost with the process: after a restart the entry was back.
#[test]
fn on_a_full_disk_the_oldest_segment_makes_room_for_removals() {
    let sim = Sim::default();
    let (disk, things) = full(&sim);
    let before = disk.stats().entries;
    disk.remove(&[things[55].key()]);
    disk.clear(Some(things[57].meta().namespace));
    drop(disk);
    sim.space_bytes(None);
    let disk = open(&sim, 4 * MIB);
    assert!(!things[55].is_there(&disk) && !things[57].is_there(&disk) && things[58].is_there(&disk));
    // A third was cleared, and two segments of three made room: for this, and for what comes next.
    assert!(disk.stats().entries >= before * 2 / 3 - 8, "{} of {before}", disk.stats().entries);
}

/// What was to say that all is gone found no room on a full disk: after a restart everything was back.
#[test]
fn a_full_disk_is_cleared_and_has_room_then() {
    let sim = Sim::default();
    let (disk, _) = full(&sim);
    let evicted = disk.stats().evictions;
    disk.clear(None);
    disk.flush().unwrap();
    let stats = disk.stats();
    assert!(!stats.failing && stats.entries == 0 && stats.evictions == evicted, "{stats:?}");
    assert!(sim.used_bytes() < MIB && stats.used_bytes < MIB, "{stats:?}");
    let after = block(200, 8);
    assert!(after.store(&disk));
    disk.flush().unwrap();
    drop(disk);
    sim.space_bytes(None);
    let disk = open(&sim, 4 * MIB);
    assert!(after.is_there(&disk) && disk.stats().entries == 1);
}

#[test]
fn reads_that_fail_are_misses_and_soon_nobody_asks_any_more() {
    let (sim, clock) = (Sim::default(), Arc::new(ManualClock::at(NOW_MS)));
    let disk = open_with(&sim, 4 * MIB, None, clock.clone()).unwrap();
    let things: Vec<Thing> = (0..20).map(|number| block(number, 1)).collect();
    things.iter().for_each(|thing| assert!(thing.store(&disk)));
    disk.flush().unwrap();
    sim.fail_reads(true);
    assert!(things.iter().all(|thing| !thing.is_there(&disk)));
    let stats = disk.stats();
    assert!(stats.failing && stats.read_errors_total < 5, "{stats:?}");
    sim.fail_reads(false);
    assert!(!things[19].is_there(&disk), "not before the pause is over");
    clock.advance(Duration::from_secs(100));
    assert!(things.iter().all(|thing| thing.is_there(&disk)));
    assert!(!disk.stats().failing);
}

#[test]
fn a_directory_that_was_gone_and_is_back_is_used_again() {
    let (sim, clock) = (Sim::default(), Arc::new(ManualClock::at(NOW_MS)));
    let disk = open_with(&sim, 4 * MIB, None, clock.clone()).unwrap();
    let kept = block(0, 4);
    kept.store(&disk);
    disk.flush().unwrap();
    sim.vanish(true);
    block(1, 4).store(&disk);
    assert!(disk.flush().is_err(), "what was stored meanwhile is not there");
    assert!(disk.stats().write_errors_total > 0);
    clock.advance(Duration::from_secs(100));
    block(2, 4).store(&disk);
    disk.flush().unwrap();
    assert!(block(2, 4).is_there(&disk) && kept.is_there(&disk) && !disk.stats().failing);
}

/// A file that is open is written also when nobody can find it any more: that went on unseen until the next segment was
/// begun.
#[test]
fn a_directory_that_is_deleted_is_seen_with_the_next_write_and_made_again() {
    let (home, clock) = (tempfile::tempdir().unwrap(), Arc::new(ManualClock::at(NOW_MS)));
    let dir = home.path().join("kv");
    let disk = Disk::open(&options(&dir, 4 * MIB), clock.clone()).unwrap();
    let settle = || assert!(disk.wait_for_writer(Duration::from_secs(60)));
    block(0, 4).store(&disk);
    settle();
    std::fs::remove_dir_all(&dir).unwrap();
    block(1, 4).store(&disk);
    settle();
    let stats = disk.stats();
    assert!(stats.failing && stats.write_errors_total == 1 && !dir.exists(), "{stats:?}");
    clock.advance(Duration::from_secs(100));
    block(2, 4).store(&disk);
    settle();
    assert!(!disk.stats().failing && block(2, 4).is_there(&disk) && !block(0, 4).is_there(&disk));
    drop(disk);
    let disk = Disk::open(&options(&dir, 4 * MIB), clock).unwrap();
    assert!(block(2, 4).is_there(&disk) && disk.stats().entries == 1);
}

#[test]
fn a_full_queue_drops_what_comes_and_says_so() {
    let sim = Sim::default();
    let disk = open(&sim, 8 * MIB);
    sim.hang(true);
    let taken: Vec<bool> = (0..40).map(|number| block(number, 100).offer(&disk, false)).collect();
    while sim.waiting() == 0 {
        std::thread::yield_now();
    }
    let expected = 4 * MIB as usize / (100 * 4096);
    assert_eq!(taken.iter().filter(|taken| **taken).count(), expected, "{taken:?}");
    let stats = disk.stats();
    assert_eq!((stats.dropped_total, stats.queued_bytes), (40 - expected as u64, expected as u64 * 100 * 4096));
    assert!(!disk.wait_for_writer(Duration::from_millis(1)) && disk.hangs());
    // Whoever needs the pages gets all but those that are being written: one, or the two that may be at once.
    let cancelled = disk.cancel_writes();
    assert!((expected - 2..expected).contains(&cancelled), "{cancelled} of {expected}");
    sim.hang(false);
    disk.flush().unwrap();
    assert!(block(0, 100).is_there(&disk) && !block(2, 100).is_there(&disk) && !disk.hangs());
    // A record larger than the queue is taken when nothing else waits.
    assert!(block(50, 1_100).offer(&disk, false));
}

/// Where nobody flushed and RAM had room, nobody waited for a disk that hung, and nothing said so.
#[test]
fn a_disk_that_hangs_while_writing_is_seen_by_its_full_queue_and_counted_once() {
    let (sim, clock) = (Sim::default(), Arc::new(ManualClock::at(NOW_MS)));
    let disk = open_with(&sim, 8 * MIB, None, clock.clone()).unwrap();
    sim.hang(true);
    let offer =
        |numbers: std::ops::Range<u32>| numbers.filter(|number| block(*number, 100).offer(&disk, false)).count();
    assert!(offer(0..20) < 20 && !disk.stats().failing, "it has only just begun");
    clock.advance(Duration::from_secs(59));
    assert_eq!((offer(20..30), disk.stats().failing), (0, false));
    clock.advance(Duration::from_secs(1));
    assert_eq!(offer(30..40), 0);
    assert_eq!((disk.stats().failing, disk.stats().timeouts_total), (true, 1));
    sim.hang(false);
    assert!(disk.wait_for_writer(Duration::from_secs(61)));
    disk.flush().unwrap();
    assert!(!disk.stats().failing && offer(50..51) == 1);
}

#[test]
fn a_disk_that_cannot_be_made_fails_softly_when_full_from_the_start() {
    let sim = Sim::default();
    sim.space_bytes(Some(16 << 10));
    let disk = open(&sim, 4 * MIB);
    block(1, 4).store(&disk);
    assert!(disk.flush().is_err());
    assert!(disk.stats().failing && !block(1, 4).is_there(&disk));
}

#[test]
fn a_closed_disk_takes_nothing_and_says_so() {
    let sim = Sim::default();
    let disk = open(&sim, 4 * MIB);
    assert!(block(1, 4).store(&disk));
    disk.close().unwrap();
    assert!(!block(2, 4).store(&disk));
    assert!(disk.flush().is_err());
    assert!(block(1, 4).is_there(&disk), "it can still be read");
    disk.close().unwrap();
}

// A disk that hangs.

/// A tier that waits this long for a disk that gets nothing done.
fn open_impatient(sim: &Sim, flush_timeout: Duration) -> Disk {
    let options = Options { flush_timeout, ..options(Path::new("sim"), 4 * MIB) };
    super::super::sim::open(sim, &options, None, clock()).unwrap()
}

fn assert_timed_out(result: Result<()>, doing: &str) {
    let error = result.unwrap_err();
    let Error::Disk { doing: what, source, .. } = &error else { panic!("{error}") };
    assert_eq!((*what, source.kind()), (doing, std::io::ErrorKind::TimedOut));
    assert!(source.to_string().contains("flush_timeout"), "{error}");
}

/// Both waited for ever for a disk that began to hang.
#[test]
fn flushing_and_closing_end_with_a_clear_error_on_a_disk_that_hangs() {
    for stored in 1..=3 {
        let sim = Sim::default();
        let disk = open_impatient(&sim, Duration::from_millis(250));
        let kept = block(0, 4);
        kept.store(&disk);
        disk.flush().unwrap();
        sim.hang(true);
        // Of the last case, the queue is full, too.
        (0..stored).for_each(|number| assert!(block(1 + number, 400 * stored).offer(&disk, true)));
        assert_timed_out(if stored == 3 { disk.wait_for_queue() } else { disk.flush() }, "flush");
        assert!(disk.stats().failing);
        assert_timed_out(disk.flush(), "flush");
        if stored == 1 {
            // It is back: so is the promise.
            sim.hang(false);
            disk.wait_for_writer(Duration::from_secs(60));
            disk.flush().unwrap();
            assert!(block(1, 400).is_there(&disk) && !disk.stats().failing);
            continue;
        }
        assert_timed_out(disk.close(), "close");
        drop(disk);
        sim.hang(false);
    }
}

#[test]
fn settings_with_which_nothing_could_be_written_are_refused() {
    let (sim, some) = (Sim::default(), Duration::from_secs(1));
    for (capacity_bytes, flush_timeout, says) in [(MIB - 1, some, "too small"), (MIB, Duration::ZERO, "flush_timeout")]
    {
        let options = Options { flush_timeout, ..options(Path::new("sim"), capacity_bytes) };
        let error = super::super::sim::open(&sim, &options, None, clock()).unwrap_err();
        assert!(matches!(error, Error::Config(_)) && error.to_string().contains(says), "{error}");
    }
    assert!(sim.names().is_empty());
}

#[test]
fn a_flush_waits_for_a_slow_disk_for_as_long_as_it_gets_on() {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    let (shared, looks, ended) =
        (Shared::new(Path::new("sim"), clock(), Codecs::default()), AtomicUsize::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::SeqCst) {
                shared.progress();
                std::thread::yield_now();
            }
        });
        // Looks twice each time that it has waited: it waits four times as long as it may in vain.
        let so = |_: &_| looks.fetch_add(1, Ordering::SeqCst) < 8;
        let waited = shared.wait_while(Duration::from_millis(200), so);
        ended.store(true, Ordering::SeqCst);
        assert!(waited);
    });
    assert!(!shared.wait_while(Duration::from_millis(1), |_| true), "nothing gets on any more");
}

/// Evicting a prefix looked for its layers in RAM and on the disk, not in the queue between them: what was just
/// on its way came back.
#[test]
fn what_is_on_its_way_to_the_disk_counts_among_the_layers_that_are_there() {
    let sim = Sim::default();
    let disk = open(&sim, 4 * MIB);
    sim.hang(true);
    let thing = named(4, 1, 1);
    let namespace = thing.meta().namespace;
    assert_eq!(disk.layers(namespace), 0);
    assert!(thing.store(&disk));
    assert_eq!(disk.layers(namespace), 5);
    sim.hang(false);
    disk.flush().unwrap();
    assert_eq!(disk.layers(namespace), 5);
    disk.remove(&[thing.key()]);
    assert_eq!(disk.layers(namespace), 0);
}
