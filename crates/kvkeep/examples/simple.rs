//! The ten-line use: store the KV of a prefix once, get it back for every prompt that begins with it.

use kvkeep::{SimpleKvCache, TensorView};

fn main() -> kvkeep::Result<()> {
    let cache = SimpleKvCache::with_max_size_gib(1.0)?;
    let prefix = "You are a helpful assistant.";
    let k = vec![0.25f32; 3 * 7 * 64]; // [kv_heads, tokens, head_dim]
    let k = TensorView::of(&k, &[3, 7, 64])?;
    println!("{:?}", cache.cache_kv(prefix, 0, k, k)?);

    let prompt = "You are a helpful assistant. What is a KV cache?";
    let known = cache.longest_prefix(prompt).unwrap_or_default();
    if let Some(hit) = cache.get_cached_kv(known, 0)? {
        println!("{known:?} is cached: K is {} {}", hit.k().dtype(), hit.k().shape());
    }
    cache.print_stats();
    Ok(())
}
