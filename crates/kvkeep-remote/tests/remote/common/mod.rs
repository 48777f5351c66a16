//! Real servers, a proxy that breaks what goes through it, and nodes that share a store.

#[cfg(all(feature = "redis", feature = "s3"))]
pub(crate) mod proxy;
#[cfg(all(feature = "redis", feature = "s3"))]
pub(crate) mod server;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use kvkeep::{CacheConfig, DType, KvCache, KvLayout, LayerView, Namespace, TensorView, TokenId};
use kvkeep_remote::{RemoteConfig, RemoteTier};

/// Tokens of a block.
pub(crate) const BLOCK_TOKENS: usize = BLOCK as usize;
const BLOCK: u32 = 4;
/// Elements of one side of a token: a block takes 32 KiB.
const DIM: u32 = 1024;

/// A prefix that no other test has.
pub(crate) fn prefix() -> String {
    static LAST: AtomicU32 = AtomicU32::new(0);
    format!("test-{}-{}", std::process::id(), LAST.fetch_add(1, Ordering::Relaxed))
}

pub(crate) fn namespace(model: &str) -> Namespace {
    let layout = KvLayout::new(1, 1, DIM, DType::F32).unwrap().with_block_tokens(BLOCK).unwrap();
    Namespace::new(model, layout)
}

/// A cache of so much RAM before a remote tier, and the tier.
pub(crate) struct Node {
    pub(crate) cache: KvCache,
    pub(crate) tier: Arc<RemoteTier>,
}

impl Node {
    pub(crate) fn new(config: &RemoteConfig, ram_bytes: u64) -> Self {
        let tier = Arc::new(RemoteTier::open(config).unwrap());
        let cache = KvCache::new(CacheConfig::new(ram_bytes).tier(Arc::clone(&tier) as _)).unwrap();
        Self { cache, tier }
    }

    /// Stores a prompt; its KV follows from its tokens.
    pub(crate) fn store(&self, namespace: &Namespace, tokens: &[TokenId]) {
        let kv = kv_of(tokens);
        let view = TensorView::of(&kv, &[tokens.len(), 1, DIM as usize]).unwrap();
        let _ = self.cache.store(namespace, tokens, &[LayerView { k: view, v: view }]).unwrap();
    }

    /// Looks a prompt up; says how many tokens were found, all of them right, and how long it took.
    pub(crate) fn lookup(&self, namespace: &Namespace, tokens: &[TokenId]) -> (usize, Duration) {
        let began = Instant::now();
        let found = self.cache.lookup(namespace, tokens).unwrap();
        let took = began.elapsed();
        if found.cached_tokens() > 0 {
            let layer = found.layer(0, 0).unwrap();
            assert_eq!(layer.k.elements::<f32>().unwrap(), &kv_of(&tokens[..BLOCK_TOKENS]), "a wrong byte");
            for block in 0..found.cached_tokens() / BLOCK_TOKENS {
                let of = &tokens[block * BLOCK_TOKENS..][..BLOCK_TOKENS];
                let layer = found.layer(block, 0).unwrap();
                assert_eq!(layer.k.elements::<f32>().unwrap(), &kv_of(of), "a wrong byte");
                assert_eq!(layer.v.elements::<f32>().unwrap(), &kv_of(of), "a wrong byte");
            }
        }
        (found.cached_tokens(), took)
    }

    /// Waits until it knows all that lies in the store.
    pub(crate) fn know_all(&self) {
        until("the node knows the store", || self.tier.knows_all());
    }
}

/// The prompt of this number.
pub(crate) fn prompt(number: u32, blocks: usize) -> Vec<TokenId> {
    (number * 1000..).take(blocks * BLOCK_TOKENS + 1).collect()
}

fn kv_of(tokens: &[TokenId]) -> Vec<f32> {
    tokens.iter().flat_map(|token| (0..DIM).map(move |at| (*token * 31 + at) as f32)).collect()
}

/// Waits for something that has to come.
pub(crate) fn until(what: &str, mut is_so: impl FnMut() -> bool) -> Duration {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < Duration::from_secs(20), "{what}: not within 20 s");
        std::thread::sleep(Duration::from_millis(2));
    }
    began.elapsed()
}
