//! What a listener is told, against what is there.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, OnceLock};

use super::*;
use crate::Chain;
use crate::event::{Event, EventSink};
use crate::key::{BlockHash, NamespaceId};
use crate::tier::Tier;
use crate::tiers::MemoryTier;

/// Tier, namespace, block.
type Place = (String, NamespaceId, BlockHash);

/// Keeps a plain set by applying every event to it, and what was said of each block.
#[derive(Debug, Default)]
struct Listener {
    heard: Mutex<Heard>,
    wants_tokens: bool,
    wants_recovered: bool,
    cache: OnceLock<KvCache>,
    panics: AtomicBool,
    is_stuck: (Mutex<bool>, Condvar),
    calls: AtomicUsize,
}

#[derive(Debug, Default)]
struct Heard {
    places: BTreeSet<Place>,
    parents: BTreeMap<BlockHash, Option<BlockHash>>,
    block_tokens: BTreeSet<Option<usize>>,
    tokens: BTreeMap<BlockHash, Vec<TokenId>>,
    cleared: Vec<Option<NamespaceId>>,
    removed: usize,
    events: usize,
}

impl Heard {
    fn apply(&mut self, event: Event) {
        self.events += 1;
        match event {
            Event::Stored { tier, namespace, blocks, mut parent, block_tokens, tokens } => {
                self.block_tokens.insert(block_tokens);
                let tokens = tokens.chunks(BLOCK_TOKENS).map(<[TokenId]>::to_vec);
                self.tokens.extend(blocks.iter().copied().zip(tokens));
                for block in blocks {
                    let is_new = self.places.insert((tier.to_string(), namespace, block));
                    assert!(is_new, "{block} is told to come to {tier} where it is already");
                    self.parents.insert(block, parent.or(self.parents.get(&block).copied().flatten()));
                    parent = Some(block);
                }
            }
            Event::Removed { tier, namespace, blocks } => {
                self.removed += blocks.len();
                blocks.into_iter().for_each(|block| _ = self.places.remove(&(tier.to_string(), namespace, block)));
            }
            Event::Cleared { namespace } => {
                self.places.retain(|(_, of, _)| namespace.is_some_and(|namespace| namespace != *of));
                self.cleared.push(namespace);
            }
        }
    }

    fn tier(&self, tier: &str) -> BTreeSet<BlockHash> {
        self.places.iter().filter(|(of, ..)| of == tier).map(|(_, _, block)| *block).collect()
    }
}

impl EventSink for Listener {
    fn publish(&self, events: Vec<Event>) {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let mut stuck = self.is_stuck.0.lock().unwrap();
        while *stuck {
            stuck = self.is_stuck.1.wait(stuck).unwrap();
        }
        drop(stuck);
        events.into_iter().for_each(|event| self.heard.lock().unwrap().apply(event));
        if let Some(cache) = self.cache.get() {
            // Whatever it asks or does, it waits for nobody who waits for it.
            assert!(cache.stats().capacity_bytes > 0);
            look(cache, &prompt(0, 4));
            store(cache, &prompt(77_000, 2), &plain());
            cache.remove(&namespace(), &prompt(77_000, 2)).unwrap();
        }
        assert!(!self.panics.load(Ordering::SeqCst), "on request");
    }

    fn wants_tokens(&self) -> bool {
        self.wants_tokens
    }

    fn wants_recovered(&self) -> bool {
        self.wants_recovered
    }
}

impl Listener {
    fn stick(&self, sticks: bool) {
        *self.is_stuck.0.lock().unwrap() = sticks;
        self.is_stuck.1.notify_all();
    }
}

fn other() -> Namespace {
    namespace().with_salt("other")
}

fn settle(cache: &KvCache) {
    cache.store_handle().shared.announcer().unwrap().settle();
}

/// Of these chains, the blocks that can be found, tier by tier, whoever was told.
fn truth(cache: &KvCache, chains: &[Chain]) -> BTreeSet<Place> {
    let mut places = BTreeSet::new();
    for chain in chains {
        for (tier, has) in cache.store_handle().residency(chain.namespace().id(), chain.keys()) {
            let there = chain.hashes().zip(has).filter(|(_, has)| *has);
            places.extend(there.map(|(block, _)| (tier.clone(), chain.namespace().id(), block)));
        }
    }
    places
}

#[track_caller]
fn assert_heard_what_is_there(cache: &KvCache, listener: &Listener, chains: &[Chain]) {
    cache.store_handle().sweep();
    settle(cache);
    let heard = listener.heard.lock().unwrap().places.clone();
    let there = truth(cache, chains);
    let (missed, wrong): (Vec<_>, Vec<_>) = (there.difference(&heard).collect(), heard.difference(&there).collect());
    assert!(missed.is_empty() && wrong.is_empty(), "not told of {missed:?}, told wrongly of {wrong:?}");
}

fn store_in(cache: &KvCache, namespace: &Namespace, tokens: &[TokenId], options: &StoreOptions) {
    let layers = [kv(tokens, 0), kv(tokens, 1)];
    let view = |bytes| TensorView::new(DType::U8, &[tokens.len(), 1, TOKEN_BYTES / 4], bytes).unwrap();
    let views = layers.each_ref().map(|bytes| LayerView { k: view(bytes), v: view(bytes) });
    cache.store_from(namespace, tokens, 0, &views, options).unwrap();
}

/// A small, quick generator: tests must be repeatable.
fn random(state: &mut u64, below: u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) % below
}

/// RAM of 24 blocks and a disk of 1 MiB, both always full; prompts that share prefixes, in two namespaces.
fn act(cache: &KvCache, lab: &Lab, state: &mut u64) {
    let namespace = if random(state, 3) == 0 { other() } else { namespace() };
    let tokens = prompt(random(state, 40) as u32 * 1000, 1 + random(state, 12) as u32);
    match random(state, 40) {
        0 => drop(cache.remove_from(&namespace, &tokens, 8).unwrap()),
        1 => drop(cache.clear_namespace(&namespace)),
        2 if random(state, 4) == 0 => drop(cache.clear()),
        3 => lab.clock.advance(Duration::from_millis(random(state, 900))),
        4 => drop(cache.flush()),
        5..18 => drop(cache.lookup(&namespace, &tokens).unwrap()),
        18 => drop(cache.prefetch(&namespace, &tokens).unwrap()),
        19 => lab.sim.fail_writes(random(state, 4) == 0),
        20..25 => store_in(cache, &namespace, &tokens, &plain().ttl(Duration::from_millis(1 + random(state, 2000)))),
        _ => store_in(cache, &namespace, &tokens, &plain()),
    }
}

fn all_chains() -> Vec<Chain> {
    let chains = (0..40).flat_map(|number| {
        [namespace(), other()].map(|namespace| Chain::of(&namespace, &prompt(number * 1000, 12)).unwrap())
    });
    chains.collect()
}

/// The listener was told of RAM alone, and "everything went" after what had come since: it lost that.
#[test]
fn whoever_applies_every_event_to_a_plain_set_knows_what_is_in_every_tier() {
    let mut went = [0; 3];
    for (seed, back) in (0..6).flat_map(|seed| [(seed, false), (seed, true)]) {
        let mut lab = if back { Lab::new().back() } else { Lab::new() };
        lab.config.capacity_bytes = MIB;
        let (listener, mut state) = (Arc::new(Listener::default()), seed * 77 + 5);
        let cache = lab.open_with(24, Some(Arc::clone(&listener) as Arc<dyn EventSink>));
        for _ in 0..20 {
            (0..30).for_each(|_| act(&cache, &lab, &mut state));
            lab.sim.fail_writes(false);
            let _ = cache.flush();
            assert_heard_what_is_there(&cache, &listener, &all_chains());
        }
        let heard = listener.heard.lock().unwrap();
        let stats = cache.stats();
        let of_cache = [disk(&cache).evictions, stats.evictions, stats.expirations];
        went.iter_mut().zip(of_cache).for_each(|(sum, of)| *sum += of);
        assert!(heard.cleared.contains(&Some(namespace().id())) && heard.events > 500, "{}", heard.events);
        for chain in all_chains() {
            let mut parent = None;
            for block in chain.hashes() {
                if let Some(told) = heard.parents.get(&block) {
                    assert_eq!(*told, parent, "a block is told with the one before it");
                }
                parent = Some(block);
            }
        }
        assert_eq!(heard.block_tokens, BTreeSet::from([Some(BLOCK_TOKENS)]));
    }
    assert!(went.iter().all(|went| *went > 0), "evicted by the disk, by RAM, and expired: {went:?}");
}

#[test]
fn a_listener_is_right_also_while_many_threads_store_remove_and_clear() {
    let mut lab = Lab::new();
    lab.config.capacity_bytes = MIB;
    let listener = Arc::new(Listener::default());
    let cache = lab.open_with(48, Some(Arc::clone(&listener) as Arc<dyn EventSink>));
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let (cache, lab) = (&cache, &lab);
            scope.spawn(move || {
                let mut state = seed * 991 + 3;
                (0..300).for_each(|_| match random(&mut state, 40) {
                    0 => drop(cache.clear()),
                    _ => act(cache, lab, &mut state),
                });
            });
        }
    });
    lab.sim.fail_writes(false);
    let _ = cache.flush();
    assert_heard_what_is_there(&cache, &listener, &all_chains());
}

#[test]
fn what_lies_on_the_disk_at_opening_is_told_to_whoever_wants_it_and_its_removal_to_everybody() {
    let lab = Lab::new();
    let tokens = prompt(0, 8);
    let cache = lab.open(64);
    store(&cache, &tokens, &plain());
    store(&cache, &prompt(5000, 3), &plain());
    cache.remove(&namespace(), &prompt(5000, 3)).unwrap();
    drop(cache);
    let chain = Chain::of(&namespace(), &tokens).unwrap();
    for wants_recovered in [true, false] {
        let listener = Arc::new(Listener { wants_recovered, ..Listener::default() });
        let cache = lab.open_with(64, Some(Arc::clone(&listener) as Arc<dyn EventSink>));
        settle(&cache);
        let on_disk: BTreeSet<BlockHash> = if wants_recovered { chain.hashes().collect() } else { BTreeSet::new() };
        assert_eq!(listener.heard.lock().unwrap().tier("disk"), on_disk);
        if wants_recovered {
            assert_eq!(look(&cache, &tokens), tokens.len());
            settle(&cache);
            assert_eq!(listener.heard.lock().unwrap().tier("ram"), on_disk, "what is loaded is in RAM, too");
        } else {
            cache.remove(&namespace(), &tokens).unwrap();
            settle(&cache);
            assert_eq!(listener.heard.lock().unwrap().removed, 8);
        }
    }
}

#[test]
fn tokens_are_told_only_to_whoever_wants_them() {
    let (lab, tokens) = (Lab::new(), prompt(0, 8));
    for wants_tokens in [true, false] {
        let listener = Arc::new(Listener { wants_tokens, ..Listener::default() });
        let cache = lab.open_with(64, Some(Arc::clone(&listener) as Arc<dyn EventSink>));
        cache.clear();
        store(&cache, &tokens, &plain());
        settle(&cache);
        let heard = listener.heard.lock().unwrap();
        assert_eq!(heard.tokens.len(), if wants_tokens { 8 } else { 0 });
        for (block, at) in Chain::of(&namespace(), &tokens).unwrap().hashes().zip(tokens.chunks(BLOCK_TOKENS)) {
            assert!(!wants_tokens || heard.tokens[&block] == at);
        }
    }
}

/// A router that matches prompts by tokens knew nothing of what a restarted server loads from its disk.
#[test]
fn tokens_of_what_an_earlier_process_left_are_told_once_a_prompt_has_them() {
    let (lab, tokens) = (Lab::new(), prompt(0, 8));
    let cache = lab.open(64);
    store(&cache, &tokens, &plain());
    drop(cache);
    let listener = Arc::new(Listener { wants_tokens: true, wants_recovered: true, ..Listener::default() });
    let cache = lab.open_with(64, Some(Arc::clone(&listener) as Arc<dyn EventSink>));
    settle(&cache);
    assert!(listener.heard.lock().unwrap().tokens.is_empty());
    listener.heard.lock().unwrap().block_tokens.clear();
    let found = cache.get_or_prefill::<Error>(&namespace(), &tokens, |_| panic!("all of it is on the disk")).unwrap();
    assert_eq!(found.cached_tokens(), tokens.len());
    settle(&cache);
    let heard = listener.heard.lock().unwrap();
    assert_eq!(heard.tier("ram").len(), 8);
    assert_eq!(heard.block_tokens, BTreeSet::from([Some(BLOCK_TOKENS)]));
    for (block, at) in Chain::of(&namespace(), &tokens).unwrap().hashes().zip(tokens.chunks(BLOCK_TOKENS)) {
        assert_eq!(heard.tokens[&block], at);
    }
}

#[test]
fn a_listener_that_panics_harms_nothing_and_is_told_what_comes_next() {
    let (lab, listener) = (Lab::new(), Arc::new(Listener::default()));
    let cache = lab.open_with(64, Some(Arc::clone(&listener) as Arc<dyn EventSink>));
    listener.panics.store(true, Ordering::SeqCst);
    store(&cache, &prompt(0, 4), &plain());
    settle(&cache);
    listener.panics.store(false, Ordering::SeqCst);
    assert_eq!(look(&cache, &prompt(0, 4)), 4 * BLOCK_TOKENS);
    let before = listener.heard.lock().unwrap().events;
    store(&cache, &prompt(1000, 4), &plain());
    settle(&cache);
    assert!(listener.heard.lock().unwrap().events > before);
}

#[test]
fn a_listener_that_blocks_holds_up_nobody_keeps_no_more_than_there_is_and_is_right_afterwards() {
    let mut lab = Lab::new();
    lab.config.capacity_bytes = MIB;
    let listener = Arc::new(Listener::default());
    let cache = lab.open_with(24, Some(Arc::clone(&listener) as Arc<dyn EventSink>));
    listener.stick(true);
    let mut state = 9;
    for round in 0..200 {
        (0..20).for_each(|_| act(&cache, &lab, &mut state));
        // The same block comes and goes, and is never told.
        (0..20).for_each(|_| {
            store(&cache, &prompt(900_000, 1), &plain());
            cache.remove(&namespace(), &prompt(900_000, 1)).unwrap();
        });
        let (turns, blocks) = cache.store_handle().shared.announcer().unwrap().sizes();
        assert!(blocks < 1500 && turns < 6000, "round {round}: {turns} turns of {blocks} blocks");
    }
    assert_eq!(listener.calls.load(Ordering::SeqCst), 1, "it sits in its first call");
    lab.sim.fail_writes(false);
    listener.stick(false);
    let _ = cache.flush();
    assert_heard_what_is_there(&cache, &listener, &all_chains());
}

#[test]
fn a_listener_may_ask_and_change_the_cache() {
    let (lab, listener) = (Lab::new(), Arc::new(Listener::default()));
    let cache = lab.open_with(64, Some(Arc::clone(&listener) as Arc<dyn EventSink>));
    listener.cache.set(cache.clone()).unwrap();
    store(&cache, &prompt(0, 4), &plain());
    while listener.heard.lock().unwrap().tier("ram").len() < 4 {
        std::thread::yield_now();
    }
    assert_eq!(look(&cache, &prompt(0, 4)), 4 * BLOCK_TOKENS);
}

/// Holds the last clone, and lets go of it when it is told something.
#[derive(Debug, Default)]
struct Last(Mutex<Option<KvCache>>, AtomicBool);

impl EventSink for Last {
    fn publish(&self, _: Vec<Event>) {
        let last = self.0.lock().unwrap().take();
        if last.is_some() {
            drop(last);
            self.1.store(true, Ordering::SeqCst);
        }
    }
}

#[test]
fn a_listener_may_drop_the_last_clone_of_the_cache() {
    let (lab, listener) = (Lab::new(), Arc::new(Last::default()));
    let cache = lab.open_with(64, Some(Arc::clone(&listener) as Arc<dyn EventSink>));
    *listener.0.lock().unwrap() = Some(cache.clone());
    store(&cache, &prompt(0, 4), &plain());
    drop(cache);
    while !listener.1.load(Ordering::SeqCst) {
        std::thread::yield_now();
    }
}

#[test]
fn a_tier_given_by_the_caller_is_heard_under_its_name_with_what_it_had_before() {
    let lab = Lab::new();
    let clock: Arc<dyn Clock> = lab.clock.clone();
    let memory: Arc<dyn Tier> = Arc::new(MemoryTier::new("memory", 8 * MIB, clock));
    let open = |listener: &Arc<Listener>| {
        let config = CacheConfig::new(16 * PAGE).clock(lab.clock.clone()).tier(Arc::clone(&memory));
        KvCache::new(config.events(Arc::clone(listener) as Arc<dyn EventSink>)).unwrap()
    };
    let listener = Arc::new(Listener { wants_recovered: true, ..Listener::default() });
    let cache = open(&listener);
    store(&cache, &prompt(0, 12), &plain());
    store(&cache, &prompt(1000, 12), &plain());
    assert_heard_what_is_there(&cache, &listener, &all_chains());
    let before = listener.heard.lock().unwrap().tier("memory");
    assert!(before.len() >= 12, "{}", before.len());
    let again = Arc::new(Listener { wants_recovered: true, ..Listener::default() });
    let second = open(&again);
    settle(&second);
    assert_eq!(again.heard.lock().unwrap().tier("memory"), before);
}
