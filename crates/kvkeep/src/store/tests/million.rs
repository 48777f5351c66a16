//! How long the ledger's lock is held at a million blocks, by what is done.

use super::*;
use crate::event::{Event, EventSink};
use crate::store::ledger;
use crate::tests::Slices;
use crate::tiers::{Fault, MemoryTier};

const BLOCKS: u64 = 1_000_000;

/// Hears everything, and keeps nothing.
#[derive(Debug)]
struct Deaf;

impl EventSink for Deaf {
    fn publish(&self, _: Vec<Event>) {}
}

/// Blocks whose pages nobody has written: what is measured does not look at them.
fn fill(cache: &KvCache, numbers: std::ops::Range<u64>, expires_at_ms: u64) {
    let (store, of) = (cache.store_handle(), namespace().id());
    for number in numbers {
        let extent = loop {
            match store.shared.with(|ledger| ledger.reserve_one(of, PAGE as usize, 0)) {
                Ok(extent) => break extent,
                // What goes is offered before.
                Err(_) => store.offer(),
            }
        };
        store.shared.with(|ledger| {
            let entry = ledger::new_entry(ObjectKey::numbered(number), extent, PAGE as usize, None, 7);
            let written = Written { entry, expires_at_ms, parent: None, place: Place::default() };
            ledger.seal_all(of, std::iter::once(written), OnPresent::Keep, crate::Priority::default());
        });
        store.offer();
    }
}

/// `cargo test --release --workspace --lib -- --ignored --nocapture million`
#[test]
#[ignore = "a measurement: a million blocks, in release"]
fn nothing_at_a_million_blocks_holds_the_lock_for_a_millisecond() {
    let (mut long, mut all) = (0, 0);
    for listens in [false, true] {
        let lab = Lab::new();
        let (arena, pages) = ram::reserve(BLOCKS * PAGE).unwrap();
        let announcer = listens.then(|| Announcer::new(Arc::new(Deaf)));
        let ledger = Ledger::new(pages, lab.policy, &[]);
        let shared = Arc::new(Shared::new(ledger, arena, lab.clock.clone(), None, None, announcer));
        let fault = Arc::new(Fault::new(Arc::new(MemoryTier::new("memory", MIB, lab.clock.clone()))));
        // It takes nothing: a flush then asks about each block, and nothing is copied.
        fault.fail_offers(true);
        let cache = lab.over(Arc::clone(&shared), fault, BLOCKS);
        let mut measure = |what: &str, action: &dyn Fn()| {
            *shared.holds.lock().unwrap() = Slices::default();
            action();
            let slices = std::mem::take(&mut *shared.holds.lock().unwrap());
            println!("listens: {listens}. {what}: {slices}");
            (long, all) = (long + slices.long, all + slices.count);
        };
        measure("filling it, half with what expires", &|| {
            fill(&cache, 0..BLOCKS / 2, 2_000_000);
            fill(&cache, BLOCKS / 2..BLOCKS, NEVER);
        });
        measure("100 statistics", &|| (0..100).for_each(|_| _ = cache.stats()));
        measure("a flush", &|| _ = cache.flush());
        lab.clock.advance(Duration::from_secs(2000));
        measure("sweeping half a million", &|| assert_eq!(cache.stats().entries, BLOCKS / 2));
        measure("a million more, which evict", &|| fill(&cache, BLOCKS..BLOCKS * 2, NEVER));
        measure("clearing a namespace", &|| _ = cache.clear_namespace(&namespace()));
        measure("filling it again", &|| fill(&cache, 0..BLOCKS, NEVER));
        measure("clearing everything", &|| _ = cache.clear());
    }
    // Where somebody else has the machine now and then, that counts, too.
    assert!(cfg!(debug_assertions) || long * 100_000 < all, "{long} of {all}");
}
