//! What is removed, cleared or replaced does not come back.

use super::*;

/// It is not on the disk itself; its predecessor must not be found there instead.
#[test]
fn a_replaced_value_does_not_come_back_when_its_successor_is_not_admitted() {
    for lab in [Lab::new(), Lab::new().back()] {
        let lab = Lab { config: lab.config.admission(Admission::SecondUse), ..lab };
        let simple = SimpleKvCache::over(lab.open(8).store_handle().clone(), "s");
        let put = |value: u8| {
            let bytes = vec![value; 3000];
            let view = TensorView::new(DType::U8, &[3000], &bytes).unwrap();
            simple.cache_kv("p", 0, view, view).unwrap()
        };
        let get = |simple: &SimpleKvCache| simple.get_cached_kv("p", 0).unwrap().map(|hit| hit.k().bytes()[0]);
        assert_eq!((put(1), get(&simple)), (Outcome::Stored, Some(1)));
        simple.flush().unwrap();
        assert_eq!(put(2), Outcome::Stored);
        simple.flush().unwrap();
        drop(simple);
        let simple = SimpleKvCache::over(lab.open(8).store_handle().clone(), "s");
        assert_eq!(get(&simple), None);
    }
}

#[test]
fn what_is_removed_or_cleared_does_not_come_back_from_the_disk() {
    for flush in [false, true] {
        let lab = Lab::new();
        let cache = lab.open(64);
        let prompts: Vec<_> = (0..3).map(|number| prompt(number * 1000, 2)).collect();
        prompts.iter().for_each(|tokens| assert_eq!(store(&cache, tokens, &plain()).stored_blocks, 2));
        if flush {
            cache.store_handle().flush().unwrap();
        }
        assert_eq!(cache.remove(&namespace(), &prompts[0]).unwrap().entries, 2);
        assert_eq!(look(&cache, &prompts[0]), 0);
        drop(cache);
        let cache = lab.open(64);
        assert_eq!((look(&cache, &prompts[0]), look(&cache, &prompts[1])), (0, 8));
        assert_eq!(cache.clear_namespace(&namespace()).entries, 4);
        assert_eq!(look(&cache, &prompts[2]), 0);
        drop(cache);
        assert_eq!(look(&lab.open(64), &prompts[2]), 0);
    }
}

/// The newer value never gets to the disk: the older one there must not be found instead.
#[test]
fn a_replaced_value_does_not_come_back_when_its_successor_is_lost() {
    for lab in [Lab::new(), Lab::new().back()] {
        let cache = lab.open(8);
        let simple = SimpleKvCache::over(cache.store_handle().clone(), "s");
        let put = |value: u8| {
            let bytes = vec![value; 3000];
            let view = TensorView::new(DType::U8, &[3000], &bytes).unwrap();
            simple.cache_kv("p", 0, view, view).unwrap()
        };
        let get = || simple.get_cached_kv("p", 0).unwrap().map(|hit| hit.k().bytes()[0]);
        assert_eq!(put(1), Outcome::Stored);
        cache.store_handle().flush().unwrap();
        lab.sim.fail_writes(true);
        assert_eq!(put(2), Outcome::Stored);
        assert_eq!(get(), Some(2));
        for number in 0..8 {
            store(&cache, &prompt(number * 1000, 2), &plain());
        }
        assert_eq!(get(), None);
        lab.sim.fail_writes(false);
        lab.clock.advance(Duration::from_secs(100));
        drop((simple, cache));
        let simple = SimpleKvCache::over(lab.open(8).store_handle().clone(), "s");
        let found = simple.get_cached_kv("p", 0).unwrap().map(|hit| hit.k().bytes()[0]);
        // The newer one may have waited in the queue until the disk was well again.
        assert_ne!(found, Some(1));
    }
}

#[test]
fn removing_from_a_token_on_leaves_what_is_before_it() {
    let lab = Lab::new();
    let cache = lab.open(16);
    let (tokens, other) = (prompt(0, 6), [prompt(0, 2), prompt(500, 2)].concat());
    store(&cache, &tokens, &plain());
    store(&cache, &other, &plain());
    // Inside a block: that block begins before it, and stays.
    assert_eq!(cache.remove_from(&namespace(), &tokens, 2 * BLOCK_TOKENS - 1).unwrap().entries, 4);
    assert_eq!(look(&cache, &tokens), 2 * BLOCK_TOKENS);
    assert_eq!(look(&cache, &other), other.len());
    assert_eq!(cache.remove_from(&namespace(), &tokens, 1 << 40).unwrap().entries, 0);
    cache.close().unwrap();
    assert_eq!(look(&lab.open(16), &tokens), 2 * BLOCK_TOKENS);
}
