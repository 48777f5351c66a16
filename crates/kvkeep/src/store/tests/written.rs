//! What goes from RAM to the disk, when, and what a flush waits for.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

#[test]
fn what_ram_evicts_is_found_on_the_disk_with_either_policy() {
    for lab in [Lab::new(), Lab::new().back()] {
        let cache = lab.open(16);
        let prompts: Vec<_> = (0..10).map(|number| prompt(number * 1000, 4)).collect();
        for tokens in &prompts {
            assert_eq!(store(&cache, tokens, &plain()).stored_blocks, 4);
            // Not part of the promise: it gives the writer time, so that nothing is dropped.
            cache.store_handle().flush().unwrap();
        }
        for tokens in &prompts {
            assert_eq!(look(&cache, tokens), tokens.len(), "{:?}", disk(&cache));
        }
        let stats = cache.stats();
        assert!(stats.used_bytes <= 16 * PAGE && disk(&cache).hits >= 24, "{stats}");
        drop(cache);
        let cache = lab.open(16);
        assert!(prompts.iter().all(|tokens| look(&cache, tokens) == tokens.len()), "warm after a restart");
    }
}

#[test]
fn write_back_writes_nothing_before_it_is_evicted_or_flushed() {
    let lab = Lab::new().back();
    let cache = lab.open(64);
    store(&cache, &prompt(0, 4), &plain());
    assert_eq!((disk(&cache).stored_total, disk(&cache).queued_bytes), (0, 0));
    cache.store_handle().flush().unwrap();
    assert_eq!(disk(&cache).stored_total, 4);
    cache.store_handle().flush().unwrap();
    assert_eq!(disk(&cache).stored_total, 4, "what is there is not written again");
}

#[test]
fn what_admission_keeps_off_the_disk_is_not_written_evicted_flushed_or_closed_there() {
    for (lab, through) in [(Lab::new(), true), (Lab::new().back(), false)] {
        let lab = Lab { config: lab.config.admission(Admission::SecondUse), ..lab };
        let cache = lab.open(16);
        let (once, twice) = (prompt(0, 4), prompt(1000, 4));
        store(&cache, &once, &plain());
        store(&cache, &twice, &plain());
        assert_eq!(
            disk(&cache).not_admitted_total,
            if through { 2 } else { 0 },
            "a chain is asked about up to its gap"
        );
        assert_eq!(look(&cache, &twice), 16);
        // RAM still serves what is not admitted, and a flush is no use of it.
        (0..5).for_each(|_| cache.flush().unwrap());
        assert_eq!((disk(&cache).stored_total, disk(&cache).not_admitted_total), (4, if through { 5 } else { 4 }));
        // RAM evicts everything.
        (0..8).for_each(|number| _ = store(&cache, &prompt(5000 + number * 100, 4), &plain()));
        assert_eq!((look(&cache, &once), look(&cache, &twice)), (0, 16));
        drop(cache);
        let cache = lab.open(16);
        assert_eq!((look(&cache, &once), look(&cache, &twice)), (0, 16));
        assert_eq!(disk(&cache).entries, 4);
    }
}

/// Flushing offers everything each time: one in 16 of what is denied would pass each time.
#[test]
fn a_kind_of_blocks_that_is_never_read_from_the_disk_is_soon_written_rarely_and_not_by_flushing() {
    let written = |read: bool| {
        let mut lab = Lab::new();
        lab.config = lab.config.admission(Admission::Worth(0.5));
        let cache = lab.open(16);
        for number in 0..100 {
            store(&cache, &prompt(number * 1000, 4), &plain());
            (0..20).for_each(|_| cache.flush().unwrap());
            if read && number > 4 {
                // RAM holds four prompts: this one comes from the disk.
                look(&cache, &prompt((number - 5) * 1000, 4));
            }
        }
        disk(&cache).stored_total
    };
    let (never, read) = (written(false), written(true));
    assert!((100..200).contains(&never) && read > 300, "{never} never read, {read} read");
}

#[test]
fn queued_writes_give_their_pages_up_when_a_store_needs_them() {
    let mut lab = Lab::new();
    lab.config = lab.config.queue_bytes(MIB);
    let cache = lab.open(8);
    lab.sim.hang(true);
    store(&cache, &prompt(0, 8), &plain());
    assert_eq!(disk(&cache).queued_bytes, 8 * PAGE, "all of it waits for the disk");
    while lab.sim.waiting() == 0 {
        std::thread::yield_now();
    }
    // One write is under way and keeps its page.
    let report = store(&cache, &prompt(1000, 7), &plain());
    assert_eq!(report.stored_blocks, 7, "{report:?}");
    assert!(disk(&cache).failing && disk(&cache).dropped_total > 0);
    lab.sim.hang(false);
    cache.store_handle().flush().unwrap();
    assert_eq!(cache.stats().held_bytes, 0);
    assert_eq!(store(&cache, &prompt(2000, 8), &plain()).stored_blocks, 8);
}

/// A flush said that all was well while the disk paused between two tries and took nothing: what was stored then was in
/// RAM alone.
#[test]
fn a_flush_that_leaves_blocks_in_ram_alone_says_so() {
    let lab = Lab::new();
    let cache = lab.open(64);
    lab.sim.fail_writes(true);
    store(&cache, &prompt(0, 4), &plain());
    assert!(matches!(cache.flush(), Err(Error::Disk { .. })));
    for more in 1..4 {
        store(&cache, &prompt(1000 * more, 4), &plain());
        match cache.flush() {
            Err(Error::NotTaken { tier, blocks }) => {
                assert_eq!((tier.as_str(), blocks), ("disk", 4 * (more as usize + 1)));
            }
            other => panic!("{other:?}"),
        }
    }
    lab.sim.fail_writes(false);
    lab.clock.advance(Duration::from_secs(100));
    cache.flush().unwrap();
    drop(cache);
    let cache = lab.open(64);
    for more in 0..4 {
        let tokens = prompt(1000 * more, 4);
        assert_eq!(look(&cache, &tokens), tokens.len());
    }
}

/// A store had waited a second for a slow disk and called it silent; a flush, which may wait for 30 seconds, then did not wait
/// at all, and gave back what did not fit the queue.
#[test]
fn a_flush_waits_for_a_disk_that_is_slower_than_a_store_waits() {
    let mut lab = Lab::new().back();
    // A store waits 100 ms.
    lab.config = lab.config.read_timeout(Duration::from_millis(100)).queue_bytes(2 * PAGE);
    let cache = lab.open(8);
    let prompts: Vec<_> = (0..4).map(|number| prompt(1000 * number, 4)).collect();
    store(&cache, &prompts[0], &plain());
    lab.sim.hang(true);
    prompts[1..].iter().for_each(|tokens| _ = store(&cache, tokens, &plain()));
    assert!(disk(&cache).failing && disk(&cache).dropped_total > 0, "{:?}", disk(&cache));
    std::thread::scope(|scope| {
        let flush = scope.spawn(|| cache.flush());
        std::thread::sleep(Duration::from_millis(500));
        assert!(!flush.is_finished(), "{:?}", flush.join());
        lab.sim.hang(false);
        flush.join().unwrap().unwrap();
    });
    assert!(!disk(&cache).failing);
    let after = lab.after_a_crash().open(16);
    let found: Vec<(usize, usize)> =
        prompts.iter().map(|tokens| (look(&cache, tokens), look(&after, tokens))).collect();
    assert!(found.iter().all(|(now, then)| now == then) && found[1..].iter().any(|(now, _)| *now > 0), "{found:?}");
}

/// A flush had queued its blocks when a store that needed room gave up all that was queued: the flush ended well, and
/// the blocks were in RAM alone.
#[test]
fn a_flush_queues_again_what_stores_gave_up_meanwhile() {
    let mut lab = Lab::new().back();
    lab.config = lab.config.read_timeout(Duration::from_millis(100)).queue_bytes(64 * PAGE);
    let cache = lab.open(32);
    let (early, late) = (prompt(0, 32), prompt(1000, 4));
    store(&cache, &early, &plain());
    lab.sim.hang(true);
    std::thread::scope(|scope| {
        let flush = scope.spawn(|| cache.flush());
        while disk(&cache).queued_bytes < 32 * PAGE {
            std::thread::yield_now();
        }
        assert_eq!(store(&cache, &late, &plain()).stored_blocks, 4);
        assert!(disk(&cache).dropped_total > 0, "{:?}", disk(&cache));
        lab.sim.hang(false);
        flush.join().unwrap().unwrap();
    });
    let kept = look(&cache, &early);
    assert!(kept >= early.len() - late.len(), "{kept}");
    assert!(look(&lab.after_a_crash().open(64), &early) >= kept);
}

/// Under a load that gave up queued writes all the time, a flush ended with an error after three times, though the disk got on:
/// it counted what stores gave up of their own, which came long after the flush began.
#[test]
fn a_flush_under_a_load_that_never_ends_waits_for_what_was_there_before_it() {
    let mut lab = Lab::new();
    // A store waits no time at all.
    lab.config = lab.config.read_timeout(Duration::from_micros(1)).queue_bytes(64 * PAGE);
    let cache = lab.open(32);
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for first in [1_000_000, 2_000_000] {
            let (cache, is_over) = (&cache, &is_over);
            scope.spawn(move || {
                for number in 0.. {
                    if is_over.load(Ordering::Relaxed) {
                        break;
                    }
                    store(cache, &prompt(first + 100 * number, 8), &plain());
                }
            });
        }
        let flushed: Vec<_> = (0..20).map(|_| cache.flush()).collect();
        is_over.store(true, Ordering::Relaxed);
        assert!(flushed.iter().all(Result::is_ok), "{flushed:?}");
    });
    assert!(disk(&cache).dropped_total > 0, "{:?}", disk(&cache));
}
