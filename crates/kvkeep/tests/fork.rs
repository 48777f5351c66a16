//! What a fork must not break: the parent's bytes, and its directory.
#![cfg(unix)]
#![expect(unsafe_code, reason = "a fork")]
#![allow(clippy::indexing_slicing, clippy::unwrap_used, clippy::allow_attributes, reason = "a test that panics fails")]

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{Kv, assert_right, namespace, store};
use kvkeep::{
    CacheConfig, DType, DiskConfig, Error, KvCache, LayerKv, LayerViewMut, Outcome, Process, SimpleKvCache,
    StoreOptions, TensorView, TensorViewMut,
};

const MIB: u64 = 1 << 20;

/// A child of this process; waited for.
struct Child(libc::pid_t);

/// Runs `work` in a forked child. It may take half a minute: a lock that nobody lets go of is a failure.
fn fork(work: impl FnOnce()) -> Child {
    // SAFETY: the child runs this test's code and leaves without running anything of the parent's.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        // SAFETY: plain calls of the C library.
        unsafe { libc::alarm(30) };
        let worked = catch_unwind(AssertUnwindSafe(work)).is_ok();
        // SAFETY: as above.
        unsafe { libc::_exit(i32::from(!worked)) };
    }
    Child(child)
}

impl Child {
    fn assert_well(self) {
        let mut status = 0;
        // SAFETY: our own child, waited for once.
        let waited = unsafe { libc::waitpid(self.0, &raw mut status, 0) };
        assert_eq!((waited, status), (self.0, 0), "the child failed, or hung");
    }
}

/// Two pipes to take turns by.
struct Turns {
    to_child: (i32, i32),
    to_parent: (i32, i32),
}

impl Turns {
    fn new() -> Self {
        let pipe = || {
            let mut ends = [0; 2];
            // SAFETY: room for two descriptors.
            assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
            (ends[0], ends[1])
        };
        Self { to_child: pipe(), to_parent: pipe() }
    }

    fn say(fd: i32) {
        // SAFETY: one byte that is there.
        assert_eq!(unsafe { libc::write(fd, [1u8].as_ptr().cast(), 1) }, 1);
    }

    fn hear(fd: i32) {
        let mut byte = [0u8];
        // SAFETY: room for one byte.
        assert_eq!(unsafe { libc::read(fd, byte.as_mut_ptr().cast(), 1) }, 1);
    }

    fn let_child(&self) {
        Self::say(self.to_child.1);
    }

    fn let_parent(&self) {
        Self::say(self.to_parent.1);
    }

    fn wait_in_child(&self) {
        Self::hear(self.to_child.0);
    }

    fn wait_in_parent(&self) {
        Self::hear(self.to_parent.0);
    }
}

fn tokens(from: u32) -> Vec<u32> {
    (from..from + 64).collect()
}

#[expect(clippy::needless_pass_by_value, reason = "results are handed over as calls return them")]
fn forked<T>(result: Result<T, Error>) -> bool {
    matches!(result, Err(Error::Forked))
}

/// A child stored into the cache that it had inherited: its bytes went into pages that it shares with its parent, and
/// the parent served them under keys of its own.
#[test]
fn a_child_cannot_write_into_its_parents_pages() {
    let cache = KvCache::new(CacheConfig::new(MIB)).unwrap();
    let named = SimpleKvCache::over(cache.store_handle().clone(), "named");
    store(&cache, &namespace("m"), &tokens(0));
    fork(|| {
        for from in (1000..100_000).step_by(64) {
            let prompt = tokens(from);
            let kv = Kv::of(&prompt, 0);
            let stored = cache.store_from(&namespace("m"), &prompt, 0, &kv.views(), &StoreOptions::default());
            assert!(forked(stored));
            let view = TensorView::new(DType::U8, &[8], &[9; 8]).unwrap();
            assert!(forked(named.cache_kv("p", 0, view, view)));
        }
    })
    .assert_well();
    // Whatever a child did with pages that were free is seen by who takes them next.
    for from in (200_000..210_000).step_by(64) {
        store(&cache, &namespace("m"), &tokens(from));
        assert_right(&cache.lookup(&namespace("m"), &tokens(from)).unwrap(), &tokens(from));
    }
}

/// Every call of both doors, with and without a disk tier, ends in a child, and says so where it can.
#[test]
fn every_call_in_a_child_is_refused_or_does_nothing() {
    let dir = tempfile::tempdir().unwrap();
    for disk in [None, Some(DiskConfig::new(dir.path(), 8 * MIB))] {
        let mut config = CacheConfig::new(MIB);
        if let Some(disk) = disk {
            config = config.disk(disk);
        }
        let cache = KvCache::new(config).unwrap();
        let named = SimpleKvCache::over(cache.store_handle().clone(), "named");
        let (space, prompt) = (namespace("m"), tokens(0));
        store(&cache, &space, &prompt);
        let view = TensorView::new(DType::U8, &[8], &[9; 8]).unwrap();
        assert_eq!(named.cache_kv("p", 0, view, view).unwrap(), Outcome::Stored);
        let hashed = named.hashed("p").unwrap();
        let held = cache.lookup(&space, &prompt).unwrap();
        let (pair, layers) = (named.get_cached_kv("p", 0).unwrap(), named.get_all_layers("p", 1).unwrap().unwrap());
        let private = named.get_cached_kv("p", 0).unwrap().unwrap().into_private().unwrap();
        let process = Process::current();
        fork(move || {
            assert!(!process.is_current() && Process::current().is_current());
            let mut bytes = [0u8; 8];
            let (k, v) = bytes.split_at_mut(4);
            let mut target = [LayerViewMut {
                k: TensorViewMut::new(DType::U8, &[4], k).unwrap(),
                v: TensorViewMut::new(DType::U8, &[4], v).unwrap(),
            }];
            assert!(forked(cache.lookup(&space, &prompt)));
            assert!(forked(cache.look(&space, &prompt)));
            assert!(forked(cache.pin(&space, &prompt)));
            assert!(forked(cache.prefetch(&space, &prompt)));
            assert!(forked(cache.remove(&space, &prompt)));
            assert!(forked(cache.flush()));
            assert!(forked(cache.get_or_prefill(&space, &prompt, |_| Ok::<(), Error>(()))));
            assert!(forked(named.get_cached_kv("p", 0)));
            assert!(forked(named.get_hashed(&hashed, 0)));
            assert!(forked(named.get_all_layers("p", 1)));
            assert!(forked(named.cache_all_layers("p", &[LayerKv { layer: 0, k: view, v: view }])));
            assert!(forked(named.evict("p", None)));
            assert!(forked(named.flush()));
            assert_eq!((named.longest_prefix("p"), cache.clear().entries, named.clear().entries), (None, 0, 0));
            assert_eq!((cache.clear_namespace(space.id()).entries, cache.store_handle().sweep()), (0, 0));
            assert_eq!((cache.stats().entries, cache.store_handle().usage().len()), (0, 0));
            assert!(forked(held.layer(0, 0)) && forked(held.load(0..1, &mut target)));
            assert!(
                forked(layers.layer(0)) && layers.iter().all(|(k, v)| k.bytes().is_empty() && v.bytes().is_empty())
            );
            assert!(forked(pair.unwrap().into_private()));
            // Dropped here, they give nothing back and wait for nobody.
            drop((held, layers, private));
            assert!(forked(named.clone().close()) && forked(cache.clone().close()));
            drop((cache, named));
        })
        .assert_well();
    }
}

/// A child was born while another thread held the cache's lock, and waited for it for ever.
#[test]
fn a_child_born_while_others_use_the_cache_does_not_hang() {
    let dir = tempfile::tempdir().unwrap();
    let cache = KvCache::new(CacheConfig::new(MIB).disk(DiskConfig::new(dir.path(), 8 * MIB))).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..3 {
            let (cache, stop) = (&cache, &stop);
            scope.spawn(move || {
                let mut from = thread * 1_000_000;
                while !stop.load(Ordering::Relaxed) {
                    store(cache, &namespace("m"), &tokens(from));
                    drop(cache.lookup(&namespace("m"), &tokens(from)).unwrap());
                    let _ = cache.stats();
                    from += 64;
                }
            });
        }
        for _ in 0..40 {
            let mine = cache.clone();
            fork(move || {
                let _ = mine.stats();
                mine.clear();
                assert!(forked(mine.lookup(&namespace("m"), &tokens(0))));
                drop(mine);
            })
            .assert_well();
            std::thread::sleep(Duration::from_millis(1));
        }
        stop.store(true, Ordering::Relaxed);
    });
    cache.close().unwrap();
}

#[test]
fn a_child_has_caches_of_its_own_and_so_have_its_children() {
    let parents = KvCache::new(CacheConfig::new(MIB)).unwrap();
    store(&parents, &namespace("m"), &tokens(0));
    fork(|| {
        let own = KvCache::new(CacheConfig::new(MIB)).unwrap();
        store(&own, &namespace("m"), &tokens(0));
        assert_right(&own.lookup(&namespace("m"), &tokens(0)).unwrap(), &tokens(0));
        fork(|| {
            assert!(forked(own.lookup(&namespace("m"), &tokens(0))));
            assert!(forked(parents.lookup(&namespace("m"), &tokens(0))));
            let own = KvCache::new(CacheConfig::new(MIB)).unwrap();
            store(&own, &namespace("m"), &tokens(0));
            assert_eq!(own.lookup(&namespace("m"), &tokens(0)).unwrap().cached_tokens(), 64);
        })
        .assert_well();
        assert_eq!(own.lookup(&namespace("m"), &tokens(0)).unwrap().cached_tokens(), 64);
    })
    .assert_well();
    assert_right(&parents.lookup(&namespace("m"), &tokens(0)).unwrap(), &tokens(0));
}

fn open(dir: &Path) -> Result<KvCache, Error> {
    KvCache::new(CacheConfig::new(MIB).disk(DiskConfig::new(dir, 8 * MIB)))
}

/// A child inherits the open file that the directory is locked by: after its parent had closed the cache, the
/// directory stayed locked for as long as the child lived, by the parent's own id.
#[test]
fn a_parent_closes_and_opens_again_while_a_child_lives_and_so_does_the_child() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path()).unwrap();
    store(&cache, &namespace("m"), &tokens(0));
    let turns = Turns::new();
    let child = fork(|| {
        turns.wait_in_child();
        // The parent has it again.
        assert!(matches!(open(dir.path()), Err(Error::DiskLocked { .. })));
        turns.let_parent();
        turns.wait_in_child();
        let own = open(dir.path()).unwrap();
        assert_right(&own.lookup(&namespace("m"), &tokens(0)).unwrap(), &tokens(0));
        assert_eq!(own.lookup(&namespace("m"), &tokens(0)).unwrap().cached_tokens(), 64);
        own.close().unwrap();
    });
    cache.close().unwrap();
    let again = open(dir.path()).unwrap();
    assert_eq!(again.lookup(&namespace("m"), &tokens(0)).unwrap().cached_tokens(), 64);
    turns.let_child();
    turns.wait_in_parent();
    again.close().unwrap();
    turns.let_child();
    child.assert_well();
    open(dir.path()).unwrap().close().unwrap();
}

/// The lock must not go with the child either: what it drops is its parent's.
#[test]
fn a_child_that_drops_its_cache_or_ends_does_not_unlock_its_parents_directory() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path()).unwrap();
    let inherited = cache.clone();
    fork(move || drop(inherited)).assert_well();
    assert!(matches!(open(dir.path()), Err(Error::DiskLocked { pid, .. }) if pid == Some(std::process::id())));
    store(&cache, &namespace("m"), &tokens(0));
    cache.close().unwrap();
    let again = open(dir.path()).unwrap();
    assert_eq!(again.lookup(&namespace("m"), &tokens(0)).unwrap().cached_tokens(), 64);
}

/// A process that was killed had left a child behind: the directory stayed locked by an id that was gone.
#[test]
fn a_killed_parents_directory_is_free_while_its_child_lives_on() {
    let dir = tempfile::tempdir().unwrap();
    let turns = Turns::new();
    let parent = fork(|| {
        let cache = open(dir.path()).unwrap();
        store(&cache, &namespace("m"), &tokens(0));
        cache.flush().unwrap();
        let _grandchild = fork(|| {
            turns.let_parent();
            turns.wait_in_child();
        });
        // As a kill does: nothing is dropped.
        std::mem::forget(cache);
    });
    turns.wait_in_parent();
    parent.assert_well();
    let cache = open(dir.path()).unwrap();
    assert_eq!(cache.lookup(&namespace("m"), &tokens(0)).unwrap().cached_tokens(), 64);
    turns.let_child();
}
