//! What requests may cost each other: waiting, room, and work under the lock.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use super::*;
use crate::block::BlockKey;
use crate::eviction::PolicyKind;
use crate::named::SimpleKvCache;
use crate::tier::{Epoch, Forget, Forgotten, Located, Offer, Read, Tier};
use crate::tiers::MemoryTier;

fn big(lab: Lab) -> Lab {
    Lab { config: DiskConfig { capacity_bytes: 64 * MIB, ..lab.config }, ..lab }
}

/// Blocks of these prompts that are there, in RAM or on the disk.
fn there(cache: &KvCache, prompts: &[Vec<TokenId>]) -> usize {
    let tokens = |tokens: &Vec<TokenId>| {
        let found = cache.look(&namespace(), tokens).unwrap();
        found.worth_tokens() + found.not_worth_tokens
    };
    prompts.iter().map(tokens).sum::<usize>() / BLOCK_TOKENS
}

fn prompts(count: u32, blocks: u32) -> Vec<Vec<TokenId>> {
    (0..count).map(|number| prompt(number * 10_000, blocks)).collect()
}

/// RAM was full of blocks that were not written. One more block evicted 128 of them, as many as the queue took, and
/// lost one: a victim's pages were not free before it was written, so the next victim went too.
#[test]
fn one_store_evicts_what_it_needs_and_loses_nothing_that_was_not_written() {
    let lab = Lab { policy: PolicyKind::Lru, ..big(Lab::new().back()) };
    let cache = lab.open(1024);
    let prompts = prompts(64, 16);
    prompts.iter().for_each(|tokens| _ = store(&cache, tokens, &plain()));
    assert_eq!((cache.stats().entries, disk(&cache).stored_total), (1024, 0));
    assert_eq!(store(&cache, &prompt(9_000_000, 1), &plain()).stored_blocks, 1);
    assert_eq!((cache.stats().evictions, cache.stats().entries), (1, 1024));
    assert_eq!(there(&cache, &prompts), 1024);
}

/// With prompts of 16 blocks 256 of 1,024 were lost, with prompts of 128 it was 608; and written through, 320.
#[test]
fn a_disk_that_keeps_up_loses_nothing_whatever_the_length_of_prompts() {
    for (lab, blocks) in [(Lab::new().back(), 16), (Lab::new().back(), 128), (Lab::new(), 64)] {
        let lab = big(lab);
        let cache = lab.open(256);
        let prompts = prompts(1024 / blocks, blocks);
        for tokens in &prompts {
            assert_eq!(store(&cache, tokens, &plain()).stored_blocks, blocks as usize);
        }
        assert_eq!(there(&cache, &prompts), 1024, "prompts of {blocks}: {:?}", disk(&cache));
        // Written through, what the queue has no room for gets its chance when it is evicted.
        assert!(disk(&cache).dropped_total == 0 || lab.config.write_policy == WritePolicy::Through);
    }
}

/// A prompt of more blocks than the write queue takes.
#[test]
fn a_store_that_needs_more_pages_than_the_queue_takes_loses_nothing() {
    let lab = big(Lab::new().back());
    let cache = lab.open(64);
    let prompts = prompts(4, 48);
    prompts.iter().for_each(|tokens| assert_eq!(store(&cache, tokens, &plain()).stored_blocks, 48));
    assert_eq!(there(&cache, &prompts), 4 * 48);
}

/// What was chosen to go was no longer found, though its pages were still there.
#[test]
fn what_waits_to_be_written_is_found_and_stays_if_it_is_used() {
    let mut lab = Lab { policy: PolicyKind::Lru, ..big(Lab::new().back()) };
    lab.config = lab.config.read_timeout(Duration::from_millis(300));
    let cache = lab.open(8);
    let (first, second) = (prompt(0, 4), prompt(1000, 4));
    store(&cache, &first, &plain());
    store(&cache, &second, &plain());
    lab.sim.hang(true);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| store(&cache, &prompt(2000, 4), &plain()));
        while lab.sim.waiting() == 0 {
            std::thread::yield_now();
        }
        assert_eq!((look(&cache, &first), look(&cache, &second)), (16, 16));
        lab.sim.hang(false);
        assert_eq!(waiting.join().unwrap().stored_blocks, 4);
    });
    cache.flush().unwrap();
    assert_eq!(there(&cache, &[first, second, prompt(2000, 4)]), 12);
}

/// The timeout held for each block: eight threads waited for 0.3, 0.6, and up to 2.4 s.
#[test]
fn no_request_waits_longer_than_its_timeout_whatever_the_disk_does() {
    let stopwatch = |cache: &KvCache, tokens: &[TokenId]| {
        let begin = Instant::now();
        look(cache, tokens);
        begin.elapsed()
    };
    for hangs in [true, false] {
        let mut lab = Lab::new();
        lab.config = lab.config.read_timeout(Duration::from_millis(300));
        let cache = lab.open(64);
        let tokens = prompt(0, 32);
        store(&cache, &tokens, &plain());
        drop(cache);
        let cache = lab.open(64);
        lab.sim.hang(hangs);
        lab.sim.delay_reads(Duration::from_millis(if hangs { 0 } else { 250 }));
        let longest = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| stopwatch(&cache, &tokens))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).max().unwrap()
        });
        assert!(longest < Duration::from_millis(700), "{longest:?}, hangs: {hangs}");
        assert_eq!(disk(&cache).failing, hangs, "slow is not dead");
        lab.sim.delay_reads(Duration::ZERO);
        lab.sim.hang(false);
    }
}

/// Reads that waited in our own queue counted as the disk's silence: nobody found anything until it was empty.
#[test]
fn a_busy_disk_is_not_called_dead_and_what_is_asked_for_now_goes_before_what_is_prefetched() {
    let mut lab = big(Lab::new());
    lab.config = lab.config.read_timeout(Duration::from_millis(800));
    let cache = lab.open(1024);
    let (ahead, now) = (prompt(0, 400), prompt(100_000, 8));
    store(&cache, &ahead, &plain());
    store(&cache, &now, &plain());
    drop(cache);
    let cache = lab.open(1024);
    lab.sim.delay_reads(Duration::from_millis(10));
    assert!(cache.prefetch(&namespace(), &ahead).unwrap() >= 200 * BLOCK_TOKENS);
    assert_eq!((look(&cache, &now), disk(&cache).failing), (now.len(), false));
    lab.sim.delay_reads(Duration::ZERO);
}

/// Of 32 requests 12 were served.
#[test]
fn a_burst_of_requests_after_a_restart_is_served() {
    let mut lab = big(Lab::new());
    lab.config = lab.config.read_timeout(Duration::from_secs(2));
    let cache = lab.open(512);
    let prompts = prompts(32, 8);
    prompts.iter().for_each(|tokens| _ = store(&cache, tokens, &plain()));
    drop(cache);
    let cache = lab.open(512);
    lab.sim.delay_reads(Duration::from_millis(10));
    let served = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for tokens in &prompts {
            let (cache, served) = (&cache, &served);
            scope.spawn(move || served.fetch_add(usize::from(look(cache, tokens) == tokens.len()), Ordering::SeqCst));
        }
    });
    assert_eq!((served.into_inner(), disk(&cache).failing), (32, false));
}

/// A prefetch as large as RAM took all pages: hot prompts went, and stores were refused.
#[test]
fn a_prefetch_takes_a_part_of_ram_and_no_more() {
    let lab = big(Lab::new());
    let cache = lab.open(256);
    let large = prompt(0, 256);
    store(&cache, &large, &plain());
    drop(cache);
    let cache = lab.open(64);
    let hot = prompt(500_000, 16);
    store(&cache, &hot, &plain());
    cache.flush().unwrap();
    (0..4).for_each(|_| assert_eq!(look(&cache, &hot), hot.len()));
    assert_eq!(cache.prefetch(&namespace(), &large).unwrap(), 16 * BLOCK_TOKENS, "a quarter of 64");
    (0..8).for_each(|_| _ = cache.prefetch(&namespace(), &large[..64 * BLOCK_TOKENS]).unwrap());
    assert_eq!(store(&cache, &prompt(700_000, 32), &plain()).stored_blocks, 32);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(cache.look(&namespace(), &hot).unwrap().ram_tokens, hot.len());
    assert!(cache.stats().entries <= 64);
}

/// Asks the cache for its counters at every event: whoever logs under a lock waits for itself.
struct Asks;

static ASKED: std::sync::Mutex<Option<KvCache>> = std::sync::Mutex::new(None);

impl tracing::Subscriber for Asks {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, _: &tracing::Event<'_>) {
        let cache = ASKED.lock().unwrap().clone();
        if let Some(cache) = cache {
            let _ = cache.stats();
        }
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

/// Shown on "does not answer", which was logged under the disk's lock.
#[test]
fn a_log_that_asks_the_cache_for_its_counters_gets_them() {
    let mut lab = Lab::new();
    lab.config = lab.config.read_timeout(Duration::from_millis(100)).flush_timeout(Duration::from_millis(100));
    let cache = lab.open(64);
    let tokens = prompt(0, 4);
    store(&cache, &tokens, &plain());
    drop(cache);
    let cache = lab.open(16);
    let _ = tracing::subscriber::set_global_default(Asks);
    *ASKED.lock().unwrap() = Some(cache.clone());
    // It does not answer, and answers again.
    lab.sim.hang(true);
    assert_eq!(look(&cache, &tokens), 0);
    // It gets nothing done, and gets on again.
    store(&cache, &prompt(1000, 8), &plain());
    assert!(cache.flush().is_err());
    lab.sim.hang(false);
    while disk(&cache).failing {
        std::thread::yield_now();
    }
    // It cannot be read, and can again; it cannot be written, and can again.
    lab.sim.fail_reads(true);
    lab.sim.fail_writes(true);
    (0..5).for_each(|_| _ = look(&cache, &tokens));
    store(&cache, &prompt(2000, 4), &plain());
    assert!(cache.flush().is_err());
    lab.sim.fail_reads(false);
    lab.sim.fail_writes(false);
    lab.clock.advance(Duration::from_secs(100));
    cache.flush().unwrap();
    assert_eq!(look(&cache, &tokens), tokens.len());
    *ASKED.lock().unwrap() = None;
}

/// A lookup took several locks for each block where there was a disk.
#[test]
fn a_lookup_that_finds_all_in_ram_takes_the_lock_once_also_with_a_disk() {
    let cache = Lab::new().open(1024);
    let tokens = prompt(0, 512);
    store(&cache, &tokens, &plain());
    cache.flush().unwrap();
    let holds = || std::mem::take(&mut *cache.store_handle().shared.holds.lock().unwrap()).count;
    holds();
    let found = cache.lookup(&namespace(), &tokens).unwrap();
    assert_eq!((found.blocks(), holds()), (512, 1));
    drop(found);
    assert_eq!(holds(), 1, "one for letting go of all blocks");
}

/// A sweep looked at every entry, under the lock: 134 ms at a million.
#[test]
fn work_under_the_lock_is_done_in_slices_and_only_where_there_is_some() {
    let cache = Lab::new().open(4096);
    let ttl = plain().ttl(Duration::from_secs(10));
    store(&cache, &prompt(0, 2 * ledger::SLICE as u32), &ttl);
    store(&cache, &prompt(100_000, 2 * ledger::SLICE as u32), &plain());
    let shared = &cache.store_handle().shared;
    shared.with(|ledger| {
        assert_eq!(ledger.sweep(1_000_000), 0);
        assert_eq!((ledger.sweep(2_000_000), ledger.sweep(2_000_000)), (ledger::SLICE, ledger::SLICE));
        assert_eq!(ledger.sweep(2_000_000), 0);
        let mut removed = Removed::default();
        assert!(ledger.remove_some(0, ledger::SLICE, |_| true, &mut removed).is_some());
        assert!(removed.entries <= ledger::SLICE as u64);
    });
    assert_eq!(cache.clear().entries, 2 * ledger::SLICE as u64);
    assert_eq!(cache.stats().entries, 0);
}

/// Prompts that share more and more of a comb's spine waited for one another in turn: eight times 0.1 s.
#[test]
fn prompts_that_branch_at_different_depths_do_not_compute_one_after_another() {
    let cache = Lab::new().open(256);
    let spine = prompt(0, 8);
    let begin = Instant::now();
    std::thread::scope(|scope| {
        for tooth in 0..8usize {
            let (cache, spine) = (&cache, &spine);
            scope.spawn(move || {
                let own = prompt(10_000 * (tooth as u32 + 1), 1);
                let tokens = [&spine[..(tooth + 1) * BLOCK_TOKENS], &own].concat();
                let found = cache.get_or_prefill::<Error>(&namespace(), &tokens, |_| {
                    std::thread::sleep(Duration::from_millis(200));
                    store(cache, &tokens, &plain());
                    Ok(())
                });
                assert_eq!(found.unwrap().cached_tokens(), tokens.len());
            });
        }
    });
    assert!(begin.elapsed() < Duration::from_millis(800), "{:?}", begin.elapsed());
}

/// What the first one computed was not stored; each of the others then waited for the one before it.
#[test]
fn equal_prompts_whose_blocks_are_refused_are_computed_at_once_and_not_in_turn() {
    let cache = Lab::new().open(4);
    let tokens = prompt(0, 8);
    let begin = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                cache
                    .get_or_prefill::<Error>(&namespace(), &tokens, |_| {
                        std::thread::sleep(Duration::from_millis(200));
                        assert!(store(&cache, &tokens, &plain()).rejection.is_some());
                        Ok(())
                    })
                    .unwrap();
            });
        }
    });
    assert!(begin.elapsed() < Duration::from_millis(900), "{:?}", begin.elapsed());
}

/// A block that is only in RAM, behind one that is only on the disk, ended the run: 8 tokens instead of 64.
#[test]
fn layers_are_loaded_as_far_as_a_lookup_goes_counted_and_judged_as_it_is() {
    let lab = Lab::new();
    let cache = lab.open(64);
    let tokens = prompt(0, 16);
    store(&cache, &tokens, &plain().compute_time(Duration::from_millis(160)));
    cache.flush().unwrap();
    let keys: Vec<ObjectKey> =
        namespace().block_hashes(&tokens).unwrap().into_iter().map(crate::BlockHash::key).collect();
    let shared = &cache.store_handle().shared;
    // In RAM are the blocks 0, 1 and 8 to 15; of those, 12 are in RAM alone.
    shared.with(|ledger| ledger.remove(&keys[2..8], 0));
    let load = || {
        let (mut k, mut v) = (vec![0u8; 64 * 128], vec![0u8; 64 * 128]);
        let view = |bytes| TensorViewMut::new(DType::U8, &[64, 1, 128], bytes).unwrap();
        let mut target = [LayerViewMut { k: view(&mut k), v: view(&mut v) }];
        let loaded = cache.load_layers(&namespace(), &tokens, 0..1, &mut target).unwrap();
        assert!(k[..loaded * 128] == kv(&tokens, 0)[..loaded * 128]);
        loaded
    };
    let before = cache.stats();
    assert_eq!(load(), 64);
    let after = cache.stats();
    assert_eq!((after.hits - before.hits, after.cached_tokens_total - before.cached_tokens_total), (1, 64));
    assert!(after.time_saved > before.time_saved && after.entries == 10);
    // Reading takes far longer than computing again, and that is known from a lookup.
    lab.sim.slow_reads(lab.clock.clone(), 1000);
    let measured = prompt(50_000, 4);
    store(&cache, &measured, &plain());
    cache.flush().unwrap();
    shared.with(|ledger| ledger.remove(crate::Chain::of(&namespace(), &measured).unwrap().keys(), 0));
    assert_eq!(look(&cache, &measured), 16);
    shared.with(|ledger| ledger.remove(&keys[2..], 0));
    assert_eq!(load(), 8, "the rest is not worth it");
    assert_eq!(disk(&cache).not_worth_tokens_total, 14 * BLOCK_TOKENS as u64);
}

/// Blocks on the disk counted as rejected, and the reason was the capacity where one page was wanted.
#[test]
fn a_refused_store_says_what_is_missing_and_counts_what_is_there() {
    let lab = Lab::new();
    let cache = lab.open(16);
    let (tokens, longer) = (prompt(0, 16), prompt(0, 17));
    store(&cache, &tokens, &plain());
    cache.flush().unwrap();
    let other = prompt(5000, 16);
    store(&cache, &other, &plain());
    cache.flush().unwrap();
    let pin = cache.pin(&namespace(), &other).unwrap();
    assert_eq!(pin.blocks(), 16, "all of RAM");
    let report = store(&cache, &tokens, &plain());
    assert!(report.rejection.is_some(), "no lookup could load it while all of RAM is pinned");
    let report = store(&cache, &longer, &plain());
    assert_eq!((report.present_blocks, report.rejected_blocks), (16, 1), "the last one alone is missing");
    let bytes = [kv(&longer, 0), kv(&longer, 1)];
    let rest = 16 * BLOCK_TOKENS * TOKEN_BYTES / 4;
    let view = |bytes: &'static [u8]| TensorView::new(DType::U8, &[4, 1, 128], bytes).unwrap();
    let layers = bytes.map(|bytes| {
        let bytes: &'static [u8] = Vec::leak(bytes[rest..].to_vec());
        LayerView { k: view(bytes), v: view(bytes) }
    });
    let report = cache.store_from(&namespace(), &longer, 64, &layers, &plain()).unwrap();
    let held_bytes = 16 * PAGE;
    assert_eq!((report.present_blocks, report.rejected_blocks), (16, 1));
    assert_eq!(report.rejection, Some(Rejection::AllPinned { needed_bytes: PAGE, held_bytes }));
    drop(pin);
}

/// A named value that waits behind an older one of its key must not be overtaken by it, nor both be lost.
#[test]
fn of_values_stored_by_many_threads_the_one_in_ram_is_the_one_on_the_disk() {
    let lab = Lab::new();
    let simple = SimpleKvCache::over(lab.open(16).store_handle().clone(), "s");
    let put = &|value: u8| {
        let bytes = vec![value; 3000];
        let view = TensorView::new(DType::U8, &[3000], &bytes).unwrap();
        let _ = simple.cache_kv("p", 0, view, view).unwrap();
    };
    for _ in 0..20 {
        std::thread::scope(|scope| (0..4).for_each(|value| _ = scope.spawn(move || put(value))));
        let get = || simple.get_cached_kv("p", 0).unwrap().map(|hit| hit.k().bytes()[0]);
        let in_ram = get();
        simple.flush().unwrap();
        let key = crate::key::PrefixHash::of(NamespaceId::named("s"), "p").key(0);
        simple.store_handle().shared.with(|ledger| ledger.remove(&[key], 0));
        assert_eq!(get(), in_ram);
    }
}

/// Each flush wrote every named entry again, and so did each eviction: the disk was offered what it had.
#[test]
fn what_is_on_the_disk_is_not_written_again() {
    let lab = Lab::new();
    let cache = lab.open(256);
    let named = SimpleKvCache::over(cache.store_handle().clone(), "default");
    let elements = [1.0f32; 64];
    let tensor = || crate::TensorView::of(&elements, &[8, 8]).unwrap();
    assert_eq!(named.cache_kv("a prefix", 0, tensor(), tensor()).unwrap(), Outcome::Stored);
    store(&cache, &prompt(0, 4), &plain());
    for _ in 0..3 {
        cache.flush().unwrap();
        assert_eq!(disk(&cache).stored_total, 5, "{:?}", disk(&cache));
    }
    // A new value is another one.
    assert_eq!(named.cache_kv("a prefix", 0, tensor(), tensor()).unwrap(), Outcome::Stored);
    cache.flush().unwrap();
    cache.flush().unwrap();
    assert_eq!(disk(&cache).stored_total, 6);
}

/// A tier with a deadline, which holds what it is to write for as long as it is told to.
#[derive(Debug)]
struct Holding {
    inner: MemoryTier,
    deadline: Duration,
    holds: AtomicBool,
    held: Mutex<Vec<Offer>>,
}

impl Holding {
    fn let_go(&self) {
        self.holds.store(false, Ordering::SeqCst);
        let held = std::mem::take(&mut *self.held.lock());
        assert!(self.inner.offer(held, Deadline::over()).is_empty());
    }
}

impl Tier for Holding {
    fn name(&self) -> &str {
        self.inner.name()
    }
    fn locate(&self, namespace: NamespaceId, keys: &[BlockKey], deadline: Deadline) -> Vec<Option<Located>> {
        self.inner.locate(namespace, keys, deadline)
    }
    fn read(&self, reads: Vec<Read>) {
        self.inner.read(reads);
    }
    fn offer(&self, offers: Vec<Offer>, deadline: Deadline) -> Vec<Offer> {
        if self.holds.load(Ordering::SeqCst) {
            self.held.lock().extend(offers);
            return Vec::new();
        }
        self.inner.offer(offers, deadline)
    }
    fn deadline(&self) -> Option<Duration> {
        Some(self.deadline)
    }
    fn forget(&self, what: &Forget<'_>, epoch: Epoch) -> Forgotten {
        self.inner.forget(what, epoch)
    }
    fn flush(&self, patience: Duration) -> crate::Result<()> {
        self.inner.flush(patience)
    }
    fn close(&self) -> crate::Result<()> {
        self.let_go();
        self.inner.close()
    }
    fn stats(&self) -> crate::TierStats {
        self.inner.stats()
    }
}

/// A store over a network held the memory of a write whose answer never came, for five seconds; a lookup that needed room
/// waited for it, where the tier promises 50 ms.
#[test]
fn a_lookup_does_not_wait_for_a_write_longer_than_its_tier_lets_it_wait() {
    let lab = Lab { policy: PolicyKind::Lru, ..Lab::new().back() };
    let tier = Arc::new(Holding {
        inner: MemoryTier::new("away", MIB, lab.clock.clone()),
        deadline: Duration::from_millis(20),
        holds: AtomicBool::new(false),
        held: Mutex::default(),
    });
    let cache = lab.open_over(8, tier.clone());
    let (away, here) = (prompt(0, 4), prompt(1000, 8));
    store(&cache, &away, &plain());
    cache.flush().unwrap();
    assert_eq!(store(&cache, &here, &plain()).stored_blocks, 8);
    tier.holds.store(true, Ordering::SeqCst);
    // All of RAM is still to be written. What is away is a miss, soon; what is here stays, and is not given up.
    let begin = Instant::now();
    assert_eq!(look(&cache, &away), 0);
    assert!(begin.elapsed() < Duration::from_secs(1), "{:?} of a request's two seconds", begin.elapsed());
    assert_eq!(look(&cache, &here), here.len());
    tier.let_go();
    assert_eq!((look(&cache, &away), look(&cache, &here)), (away.len(), here.len()));
}
