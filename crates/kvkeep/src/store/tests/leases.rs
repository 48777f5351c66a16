//! Leases: what an owner elsewhere keeps in RAM, until it says so, its time is over, or it is removed.

use super::*;
use crate::chain::Chain;
use crate::store::{Lease, LeaseId, Leased};

fn chain(start: u32, blocks: u32) -> Chain {
    Chain::of(&namespace(), &prompt(start, blocks)).unwrap()
}

fn second() -> Duration {
    Duration::from_secs(1)
}

/// RAM of so many pages alone, and its clock.
fn ram(pages: u64) -> (KvCache, Arc<ManualClock>) {
    let clock = Arc::new(ManualClock::at(1_000_000));
    (KvCache::new(CacheConfig::new(pages * PAGE).clock(clock.clone())).unwrap(), clock)
}

/// Four blocks, leased.
fn leased(cache: &KvCache, owner: &str, ttl: Option<Duration>) -> Lease {
    store(cache, &prompt(0, 4), &plain());
    cache.store_handle().lease(&chain(0, 4), owner, ttl).unwrap()
}

#[test]
fn a_lease_keeps_its_blocks_until_it_is_ended() {
    let (cache, _) = ram(8);
    let handle = cache.store_handle();
    let lease = leased(&cache, "operator", None);
    assert_eq!((lease.blocks, lease.tokens, lease.expires_at_ms), (4, 16, None));
    for start in (100..1000).step_by(100) {
        store(&cache, &prompt(start, 4), &plain());
    }
    assert_eq!(look(&cache, &prompt(0, 4)), 16);
    assert_eq!(
        (handle.leases(), handle.leased().tokens, cache.stats().held_bytes),
        (vec![lease.clone()], 16, 4 * PAGE)
    );
    assert!(handle.end_lease(lease.id) && !handle.end_lease(lease.id));
    assert_eq!((handle.leased(), cache.stats().held_bytes), (Leased::default(), 0));
}

#[test]
fn a_lease_whose_time_is_over_frees_its_pin() {
    let (cache, clock) = ram(8);
    let handle = cache.store_handle();
    let lease = leased(&cache, "client", Some(second()));
    assert_eq!(lease.expires_at_ms, Some(1_001_000));
    clock.advance(Duration::from_millis(999));
    assert_eq!(handle.leases().len(), 1);
    // Renewed, it goes on from now.
    assert_eq!(handle.renew_lease(lease.id, Some(second())).unwrap().expires_at_ms, Some(1_001_999));
    clock.advance(Duration::from_millis(999));
    assert_eq!(cache.stats().held_bytes, 4 * PAGE);
    clock.advance(Duration::from_millis(1));
    assert_eq!(cache.stats().held_bytes, 0);
    assert_eq!((handle.leases(), handle.renew_lease(lease.id, None)), (vec![], None));
}

/// A store that needs the pages of a lease that is over must not be refused because nobody has looked at it since.
#[test]
fn what_a_lease_held_is_room_as_soon_as_its_time_is_over() {
    let (cache, clock) = ram(8);
    leased(&cache, "client", Some(second()));
    assert!(store(&cache, &prompt(100, 8), &plain()).rejection.is_some());
    clock.advance(second());
    let report = store(&cache, &prompt(200, 8), &plain());
    assert_eq!((report.stored_blocks, report.rejection), (8, None));
}

#[test]
fn leases_hold_at_most_half_of_ram_and_what_they_share_counts_once() {
    let (cache, _) = ram(12);
    let handle = cache.store_handle();
    leased(&cache, "one", None);
    let mut longer = prompt(0, 4);
    longer.extend(prompt(500, 2));
    store(&cache, &longer, &plain());
    let longer = handle.lease(&Chain::of(&namespace(), &longer).unwrap(), "two", None).unwrap();
    assert_eq!((handle.leased().leases, handle.leased().tokens, handle.leased().bytes), (2, 24, 6 * PAGE));
    store(&cache, &prompt(900, 1), &plain());
    let error = handle.lease(&chain(900, 1), "three", None).unwrap_err();
    assert!(error.to_string().contains("end another one first"), "{error}");
    assert_eq!(cache.stats().held_bytes, 6 * PAGE, "what was refused holds nothing");
    handle.end_lease(longer.id);
    assert_eq!((handle.leased().tokens, cache.stats().held_bytes), (16, 4 * PAGE));
    assert!(handle.lease(&chain(900, 1), "three", None).is_ok());
    assert_eq!(handle.end_leases(|lease| lease.owner == "one"), 1);
}

#[test]
fn what_is_removed_or_cleared_is_not_leased_any_more() {
    let (cache, _) = ram(16);
    let handle = cache.store_handle();
    leased(&cache, "one", None);
    store(&cache, &prompt(500, 2), &plain());
    let other = handle.lease(&chain(500, 2), "two", None).unwrap();
    cache.remove_from(&namespace(), &prompt(0, 4), 8).unwrap();
    assert_eq!(handle.leases(), [other], "one of its blocks is gone");
    cache.clear_namespace(NamespaceId::named("another"));
    assert_eq!(handle.leases().len(), 1);
    cache.clear_namespace(namespace().id());
    assert_eq!((handle.leases().len(), cache.stats().used_bytes), (0, 0));
}

#[test]
fn an_id_is_read_back_and_names_nothing_in_another_store() {
    let [(one, _), (other, _)] = [ram(8), ram(8)];
    let (lease, theirs) = (leased(&one, "a", None), leased(&other, "a", None));
    assert_ne!(lease.id, theirs.id, "also the first one of each");
    let sent: LeaseId = lease.id.to_string().parse().unwrap();
    assert_eq!(sent, lease.id);
    assert!(!other.store_handle().end_lease(sent) && other.store_handle().renew_lease(sent, None).is_none());
    assert!(one.store_handle().end_lease(sent));
    for wrong in ["", "ab", &"g".repeat(32), &"+".repeat(32), &"ä".repeat(16)] {
        assert!(wrong.parse::<LeaseId>().is_err(), "{wrong}");
    }
}

#[test]
fn a_lease_loads_what_is_on_the_disk_and_says_how_much_it_holds() {
    let lab = Lab::new();
    let cache = lab.open(16);
    store(&cache, &prompt(0, 4), &plain());
    drop(cache);
    let cache = lab.open(16);
    let lease = cache.store_handle().lease(&chain(0, 6), "warm", None).unwrap();
    assert_eq!((lease.blocks, lease.tokens), (4, 16));
    assert_eq!(cache.stats().held_bytes, 4 * PAGE);
    // Not the last holder of the memory: the store ends, and its leases with it.
    drop(cache);
    assert_eq!(look(&lab.open(16), &prompt(0, 4)), 16);
}
