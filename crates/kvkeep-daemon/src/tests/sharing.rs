//! What processes share, and what becomes of it when one of them dies.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::process::Signal;

use super::*;

#[test]
fn the_daemon_keeps_what_a_tier_promises() {
    let daemons = std::sync::Mutex::new(Vec::new());
    kvkeep::tiers::contract::check(&|| {
        let place = Place::new();
        let daemon = Daemon::start(&place.config(kvkeep::tiers::contract::CAPACITY_BYTES)).unwrap();
        let tier = place.tier();
        daemons.lock().unwrap().push((daemon, place));
        tier
    });
}

#[test]
fn what_one_process_stored_another_one_finds_byte_for_byte() {
    let place = Place::new();
    let daemon = Process::start("daemon", &place.socket);
    let (mut one, mut other) = (Process::start("client", &place.socket), Process::start("client", &place.socket));
    one.ask("store 1 30");
    assert_eq!(other.ask("find 1 30"), "30");
    other.ask("store 2 30");
    assert_eq!(one.ask("find 2 30"), "30");
    // What a client has stored outlives it.
    other.kill();
    let mut third = Process::start("client", &place.socket);
    assert_eq!(
        (third.ask("find 1 30"), third.ask("find 2 30"), third.ask("find 3 30")),
        ("30".into(), "30".into(), "0".into())
    );
    drop(daemon);
}

/// Which blocks are where, for whoever applies every event.
#[derive(Debug, Default)]
struct Heard(std::sync::Mutex<Vec<kvkeep::Event>>);

impl kvkeep::EventSink for Heard {
    fn publish(&self, events: Vec<kvkeep::Event>) {
        self.0.lock().unwrap().extend(events);
    }
}

#[test]
fn a_listener_hears_of_everybodys_blocks_and_of_none_that_needs_a_token() {
    use kvkeep::Event;
    let (place, heard) = (Place::new(), Arc::new(Heard::default()));
    let tenant = Tenant::new("a", "0123456789abcdef", 16 << 20);
    let of =
        |tenants| DaemonConfig::new(&place.socket, tenants).events(Arc::clone(&heard) as Arc<dyn kvkeep::EventSink>);
    let refused = Daemon::start(&of(vec![tenant.clone()])).unwrap_err().to_string();
    assert!(refused.contains("leave some"), "{refused}");
    let _daemon = Daemon::start(&of(vec![tenant, Tenant::without_token(16 << 20)])).unwrap();
    let theirs = DaemonTier::open(&place.tier_config().tenant("a", "0123456789abcdef")).unwrap();
    let (theirs, ours) = (super::cache(Arc::new(theirs)), place.cache());
    for (cache, seed) in [(&theirs, 1), (&ours, 2)] {
        store(cache, seed, 3);
        cache.flush().unwrap();
    }
    let hashes: Vec<_> = chain(2, 3).hashes().collect();
    let events = |tells: &dyn Fn(&Event) -> bool| {
        until("it is told", || heard.0.lock().unwrap().iter().any(tells));
        std::mem::take(&mut *heard.0.lock().unwrap())
    };
    let mut stored = Vec::new();
    while stored.len() < 3 {
        for event in events(&|event| matches!(event, Event::Stored { .. })) {
            let Event::Stored { tier, blocks, block_tokens, parent, tokens, .. } = event else { panic!("{event:?}") };
            assert_eq!((&*tier, block_tokens, parent, tokens), ("ram", Some(4), None, Vec::new()));
            stored.extend(blocks);
        }
    }
    stored.sort_unstable();
    let mut all = hashes.clone();
    all.sort_unstable();
    assert_eq!(stored, all);
    ours.remove_chain(&chain(2, 3), 8);
    let removed = events(&|event| matches!(event, Event::Removed { .. }));
    assert!(matches!(&removed[..], [Event::Removed { blocks, .. }] if blocks[..] == hashes[2..]), "{removed:?}");
    ours.store_handle().clear();
    let cleared = events(&|event| matches!(event, Event::Cleared { .. }));
    assert!(matches!(&cleared[..], [Event::Cleared { namespace: None, .. }]), "{cleared:?}");
    assert_eq!(found(&theirs, 1, 3), 3);
}

#[test]
fn a_client_that_is_killed_leaves_no_pin_and_no_half_written_block() {
    let place = Place::new();
    // A lease that does not end by itself while this runs.
    let daemon = Daemon::start(&place.config(64 << 20).lease(Duration::from_secs(600))).unwrap();
    let cache = place.cache();
    store(&cache, 1, 4);
    cache.flush().unwrap();
    let figures = || daemon.stats().remove(0).1;
    let stored = figures().used_bytes;
    let holder = Process::start("holder", &place.socket);
    assert_eq!(figures().held_bytes, 5 * BLOCK_BYTES as u64);
    assert_eq!(figures().used_bytes, stored + BLOCK_BYTES as u64);
    holder.kill();
    let took = until("its pins end", || figures().held_bytes == 0);
    println!("pins of a killed client ended after {took:?}");
    assert_eq!(figures().used_bytes, stored);
    assert!(took < Duration::from_secs(5));
}

/// Lookups as fast as they go, from some threads, each checked.
fn load<T>(cache: &KvCache, meanwhile: impl FnOnce(&AtomicU64) -> T) -> (T, Duration) {
    let (is_over, hits, slowest_us) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let made = std::thread::scope(|scope| {
        for thread in 0..3 {
            let (is_over, hits, slowest_us) = (&is_over, &hits, &slowest_us);
            scope.spawn(move || {
                let mut seed = thread;
                while !is_over.load(Ordering::SeqCst) {
                    seed = (seed + 1) % 12;
                    let begin = Instant::now();
                    hits.fetch_add(found(cache, seed, 8) as u64, Ordering::SeqCst);
                    let took = u64::try_from(begin.elapsed().as_micros()).unwrap();
                    slowest_us.fetch_max(took, Ordering::SeqCst);
                    store(cache, seed, 8);
                }
            });
        }
        let made = meanwhile(&hits);
        is_over.store(true, Ordering::SeqCst);
        made
    });
    (made, Duration::from_micros(slowest_us.into_inner()))
}

#[test]
fn a_daemon_that_is_killed_under_load_costs_misses_and_clients_are_back_with_the_next_one() {
    let place = Place::new();
    let first = Process::start("daemon", &place.socket);
    let cache = place.cache();
    (0..12).for_each(|seed| store(&cache, seed, 8));
    cache.flush().unwrap();
    let hits_of_the_daemon = || cache.stats().tier("daemon").unwrap().hits;
    let ((took, second), slowest) = load(&cache, |_| {
        let before = hits_of_the_daemon();
        until("hits under load", || hits_of_the_daemon() > before + 20);
        first.kill();
        std::thread::sleep(Duration::from_millis(300));
        assert!(cache.stats().tier("daemon").unwrap().failing);
        let second = Process::start("daemon", &place.socket);
        let (begin, before) = (Instant::now(), hits_of_the_daemon());
        until("hits of the next one", || hits_of_the_daemon() > before + 20);
        (begin.elapsed(), second)
    });
    println!("hits again {took:?} after the next daemon was there; the slowest lookup took {slowest:?}");
    assert!(took < Duration::from_secs(5) && slowest < Duration::from_secs(3));
    drop(second);
}

#[test]
fn a_daemon_that_hangs_is_waited_for_once_and_then_not_any_more() {
    let place = Place::new();
    let daemon = Process::start("daemon", &place.socket);
    let tier = Arc::new(DaemonTier::open(&place.tier_config().deadline(Duration::from_millis(100))).unwrap());
    let cache = cache(Arc::clone(&tier));
    store(&cache, 1, 8);
    cache.flush().unwrap();
    daemon.signal(Signal::STOP);
    let begin = Instant::now();
    let misses: usize = (0..50).map(|seed| found(&cache, 100 + seed, 8)).sum();
    let took = begin.elapsed();
    println!("50 lookups while the daemon hangs took {took:?}");
    assert_eq!(misses, 0);
    assert!(took < Duration::from_secs(2), "{took:?}");
    daemon.signal(Signal::CONT);
    let back = until("it is back", || tier.works());
    println!("it was back after {back:?}");
    until("hits again", || found(&cache, 1, 8) == 8);
}

/// What a daemon that hangs was to take held its memory for five seconds, and lookups that needed room waited for it.
#[test]
fn a_lookup_does_not_wait_for_a_write_to_a_daemon_that_hangs() {
    let place = Place::new();
    let daemon = Process::start("daemon", &place.socket);
    let disk = tempfile::tempdir().unwrap();
    let tier = Arc::new(DaemonTier::open(&place.tier_config().deadline(Duration::from_millis(100))).unwrap());
    let config = CacheConfig::new(40 * BLOCK_BYTES as u64)
        .tier_before_disk(tier)
        .disk(kvkeep::DiskConfig::new(disk.path(), 1 << 30));
    let cache = KvCache::new(config).unwrap();
    store(&cache, 1, 40);
    cache.flush().unwrap();
    daemon.signal(Signal::STOP);
    // All of RAM waits for the daemon. A store for which that leaves no room is refused.
    let block = content(2, 0);
    for seed in 2..6 {
        cache.store_blocks(&chain(seed, 20), 0, &[block.as_slice(); 20], &StoreOptions::default()).unwrap();
    }
    let begin = Instant::now();
    let hits = found(&cache, 1, 40);
    let took = begin.elapsed();
    println!("a lookup of {hits} blocks from the disk while the daemon hangs took {took:?}");
    assert!(took < Duration::from_secs(2), "{took:?}");
    daemon.signal(Signal::CONT);
    until("it is all found", || found(&cache, 1, 40) == 40);
}

#[test]
fn what_was_removed_while_the_daemon_hung_is_gone_when_it_is_back() {
    let place = Place::new();
    let daemon = Process::start("daemon", &place.socket);
    let (cache, other) = (place.cache(), place.cache());
    store(&cache, 1, 8);
    cache.flush().unwrap();
    daemon.signal(Signal::STOP);
    cache.store_handle().clear();
    daemon.signal(Signal::CONT);
    until("it is told", || found(&other, 1, 8) == 0);
    assert_eq!(found(&cache, 1, 8), 0);
}

#[test]
fn a_daemon_starts_in_less_than_a_second() {
    let place = Place::new();
    let begin = Instant::now();
    let daemon = Process::start("daemon", &place.socket);
    assert!(place.tier().works());
    let took = begin.elapsed();
    println!("a new process was a daemon with a client after {took:?}");
    assert!(took < Duration::from_secs(1), "{took:?}");
    drop(daemon);
}

#[test]
fn a_daemon_with_a_disk_is_warm_after_its_own_restart() {
    let place = Place::new();
    let disk = tempfile::tempdir().unwrap();
    let config = place.config(4 << 20).disk(disk.path(), 64 << 20);
    let daemon = Daemon::start(&config).unwrap();
    let cache = place.cache();
    store(&cache, 1, 30);
    cache.flush().unwrap();
    drop(cache);
    daemon.stop().unwrap();
    let _daemon = Daemon::start(&config).unwrap();
    assert_eq!(found(&place.cache(), 1, 30), 30);
}
