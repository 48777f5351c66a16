//! The bars of docs/benchmarks.md, each beside its reference in the same run.

#![expect(clippy::expect_used, clippy::indexing_slicing, reason = "a benchmark that cannot run panics")]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kvkeep::{
    CacheConfig, DType, KvCache, KvLayout, LayerView, LayerViewMut, Namespace, PolicyKind, Simulation, TensorView,
    TensorViewMut,
};

/// A cache, a namespace whose blocks have `layers` layers of `layer_bytes` each for K and for V, and its KV.
struct Setup {
    cache: KvCache,
    namespace: Namespace,
    tokens: Vec<u32>,
    kv: Vec<u8>,
    dims: [usize; 3],
    layers: usize,
}

impl Setup {
    fn new(capacity_bytes: u64, layers: u32, head_dim: u32, block_tokens: u32, blocks: u32) -> Self {
        let layout = KvLayout::new(layers, 1, head_dim, DType::U8)
            .and_then(|layout| layout.with_block_tokens(block_tokens))
            .expect("a layout");
        let tokens: Vec<u32> = (0..block_tokens * blocks).collect();
        let dims = [tokens.len(), 1, head_dim as usize];
        let kv = vec![7u8; dims.iter().product()];
        let cache = KvCache::new(CacheConfig::new(capacity_bytes)).expect("a cache");
        Self { cache, namespace: Namespace::new("bench", layout), tokens, kv, dims, layers: layers as usize }
    }

    fn view(&self) -> LayerView<'_> {
        let tensor = TensorView::new(DType::U8, &self.dims, &self.kv).expect("a view");
        LayerView { k: tensor, v: tensor }
    }

    fn store(&self, tokens: &[u32]) {
        let views = vec![self.view(); self.layers];
        self.cache.store(&self.namespace, tokens, &views).expect("stored");
    }
}

fn ram_hit(c: &mut Criterion) {
    let mut group = c.benchmark_group("ram_hit_zero_copy");
    for (name, head_dim) in [("64KiB", 512), ("2MiB", 16384), ("16MiB", 131_072)] {
        let setup = Setup::new(64 << 20, 1, head_dim, 64, 1);
        setup.store(&setup.tokens);
        group.bench_function(name, |b| {
            b.iter(|| {
                let found = setup.cache.lookup(&setup.namespace, &setup.tokens).expect("a lookup");
                black_box(found.layer(0, 0).expect("a layer").k.bytes().len())
            });
        });
    }
}

fn copies(c: &mut Criterion) {
    let mut group = c.benchmark_group("copies");
    for mib in [2usize, 16] {
        let head_dim = u32::try_from((mib << 20) / 64 / 2).expect("small");
        let setup = Setup::new(256 << 20, 1, head_dim, 64, 1);
        let mut k = vec![1u8; mib << 19];
        let mut v = vec![1u8; mib << 19];
        group.throughput(Throughput::Bytes((mib as u64) << 20));
        group.bench_function(BenchmarkId::new("memcpy", mib), |b| {
            b.iter(|| {
                k.copy_from_slice(black_box(&setup.kv));
                v.copy_from_slice(black_box(&setup.kv));
            });
        });
        setup.store(&setup.tokens);
        let found = setup.cache.lookup(&setup.namespace, &setup.tokens).expect("a lookup");
        group.bench_function(BenchmarkId::new("load", mib), |b| {
            b.iter(|| {
                let target = LayerViewMut {
                    k: TensorViewMut::new(DType::U8, &setup.dims, &mut k).expect("a view"),
                    v: TensorViewMut::new(DType::U8, &setup.dims, &mut v).expect("a view"),
                };
                found.load(0..1, &mut [target]).expect("loaded");
            });
        });
        drop(found);
        // A store under eviction writes all over its 256 MiB; so does its reference.
        let mut ring = vec![1u8; 256 << 20];
        let (half, mut at) = (mib << 19, 0);
        group.bench_function(BenchmarkId::new("memcpy_all_over", mib), |b| {
            b.iter(|| {
                for _ in 0..2 {
                    ring[at..at + half].copy_from_slice(black_box(&setup.kv));
                    at = (at + half) % (256 << 20);
                }
            });
        });
        let mut tokens = setup.tokens.clone();
        group.bench_function(BenchmarkId::new("store_under_eviction", mib), |b| {
            b.iter(|| {
                tokens[0] += 1;
                setup.store(&tokens);
            });
        });
    }
}

fn lookup(c: &mut Criterion) {
    let setup = Setup::new(1 << 30, 1, 1, 64, 512);
    setup.store(&setup.tokens);
    c.bench_function("lookup_32k_tokens_all_hits", |b| {
        b.iter(|| black_box(setup.cache.lookup(&setup.namespace, &setup.tokens).expect("a lookup").blocks()));
    });
    c.bench_function("hash_32k_tokens_alone", |b| {
        b.iter(|| black_box(setup.namespace.block_hashes(&setup.tokens).expect("hashes").len()));
    });
}

fn threads(c: &mut Criterion) {
    const LOOKUPS: u64 = 4000;
    let setup = Setup::new(64 << 20, 1, 64, 64, 16);
    setup.store(&setup.tokens);
    let mut group = c.benchmark_group("lookups_of_16_blocks");
    group.throughput(Throughput::Elements(LOOKUPS));
    for threads in [1u64, 2, 4, 8] {
        group.bench_function(BenchmarkId::new("threads", threads), |b| {
            b.iter(|| {
                std::thread::scope(|scope| {
                    for _ in 0..threads {
                        scope.spawn(|| {
                            for _ in 0..LOOKUPS / threads {
                                black_box(setup.cache.lookup(&setup.namespace, &setup.tokens).expect("a lookup"));
                            }
                        });
                    }
                });
            });
        });
    }
}

/// Chats that grow turn by turn, a random one of 1,000 each time: block numbers of each request.
fn chats() -> Vec<Vec<u64>> {
    let mut turns = vec![0u64; 1000];
    let mut state = 1u64;
    let request = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // Some chats are far more often continued than others.
        let draw = (state >> 33) % 1_000_000;
        let chat = draw * draw / 1_000_000_000;
        let turn = turns.get_mut(usize::try_from(chat).expect("small")).expect("below 1,000");
        *turn = (*turn + 1) % 12;
        (0..8 + 4 * *turn).map(|block| chat << 32 | block).collect()
    };
    (0..4000).map(request).collect()
}

/// All of a touch: index, policy, accounting. What a policy costs is what it takes more than another one.
fn policies(c: &mut Criterion) {
    let requests = chats();
    let touches: usize = requests.iter().map(Vec::len).sum();
    let mut group = c.benchmark_group("touches");
    group.sample_size(20).throughput(Throughput::Elements(touches as u64));
    for capacity in [1000, 5000] {
        for policy in PolicyKind::ALL {
            group.bench_function(BenchmarkId::new(policy.name(), capacity), |b| {
                b.iter(|| {
                    let mut simulation = Simulation::new(capacity, policy).expect("a simulation");
                    requests.iter().map(|blocks| simulation.request(blocks).total()).sum::<usize>()
                });
            });
        }
    }
}

criterion_group! {
    name = cache;
    config = Criterion::default().sample_size(30).measurement_time(std::time::Duration::from_secs(3));
    targets = ram_hit, copies, lookup, threads, policies
}
criterion_main!(cache);
