//! A GPU with its KV in the cache: time to first token cold and warm, and that no bit differs.
//!
//! `cargo run --release -p kvkeep-engine --features cuda --example gpu [MODEL.gguf] [TOKENS]`

use std::time::Instant;

use kvkeep::{CacheConfig, KvCache};
use kvkeep_engine::{Device, DeviceModel, Engine, EngineOptions, KvBuffer, Logits, default_model_path, user_cache_dir};

type AnyError = Box<dyn std::error::Error>;

/// Tokens of a prefill cell and of a block.
const GRID: usize = 64;
const NEW: usize = 32;
const ROUNDS: usize = 7;

fn main() -> Result<(), AnyError> {
    let mut args = std::env::args().skip(1);
    let path = match args.next() {
        Some(path) => path.into(),
        None => default_model_path(&user_cache_dir()?, &mut |done, total| eprint!("\r{done} / {total} bytes"))?,
    };
    let prefix_tokens = args.next().map_or(Ok(2048), |tokens| tokens.parse::<usize>())? / GRID * GRID;
    let host = Engine::load(&path, &EngineOptions::default())?;
    let gpu = DeviceModel::load(&path, &Device::new_cuda(0)?, GRID)?;
    let mut buffer = host.kv(prefix_tokens + NEW)?;
    let prompt = tokens(&host, prefix_tokens + NEW);
    let (prefix, new) = prompt.split_at(prefix_tokens);
    let cache = fill(&gpu, prefix, &mut buffer)?;

    let (mut cold, mut warm) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let begin = Instant::now();
        let plain = gpu.prefill(&prompt, &mut gpu.kv())?;
        cold.push(begin.elapsed());
        let begin = Instant::now();
        let reused = resume(&gpu, &cache, &prompt, new, &mut buffer)?;
        warm.push(begin.elapsed());
        if reused != plain {
            return Err("logits with reused KV differ".into());
        }
    }
    cold.sort_unstable();
    warm.sort_unstable();
    let (cold, warm) = (cold.get(ROUNDS / 2).ok_or("no round")?, warm.get(ROUNDS / 2).ok_or("no round")?);
    println!("{} on {:?}: {prefix_tokens} tokens cached, {NEW} new", host.model_name(), gpu.namespace()?.id());
    println!("time to first token: cold {cold:.2?}, warm {warm:.2?}, {:.1}x", cold.as_secs_f64() / warm.as_secs_f64());
    println!("logits are equal bit for bit");

    let short = tokens(&host, GRID);
    let on_gpu = gpu.prefill(&short, &mut gpu.kv())?;
    let on_cpu = host.prefill(&short, &mut host.kv(GRID)?)?;
    println!("largest difference of a logit from the CPU's own kernels: {:.2e}", largest(&on_gpu, &on_cpu));
    Ok(())
}

/// Computes a prefix on the GPU and stores it.
fn fill(gpu: &DeviceModel, prefix: &[u32], buffer: &mut KvBuffer) -> Result<KvCache, AnyError> {
    let mut kv = gpu.kv();
    gpu.prefill(prefix, &mut kv)?;
    gpu.export(&kv, buffer)?;
    let cache = KvCache::new(CacheConfig::new(1 << 30))?;
    let report = cache.store(&gpu.namespace()?, prefix, &buffer.views()?)?;
    match report.rejection {
        Some(rejection) => Err(rejection.into()),
        None => Ok(cache),
    }
}

/// Takes the prefix from the cache and computes the rest.
fn resume(
    gpu: &DeviceModel,
    cache: &KvCache,
    prompt: &[u32],
    new: &[u32],
    buffer: &mut KvBuffer,
) -> Result<Logits, AnyError> {
    let found = cache.lookup(&gpu.namespace()?, prompt)?;
    if found.cached_tokens() + new.len() != prompt.len() {
        return Err(format!("{} tokens were cached", found.cached_tokens()).into());
    }
    let mut layers = buffer.import(found.cached_tokens())?;
    found.load(0..layers.len(), &mut layers)?;
    Ok(gpu.prefill(new, &mut gpu.import(buffer)?)?)
}

/// Tokens of no meaning; speed does not depend on them.
fn tokens(engine: &Engine, count: usize) -> Vec<u32> {
    let vocabulary = u32::try_from(engine.tokenizer().vocabulary()).unwrap_or(u32::MAX);
    (0..u32::MAX).map(|i| (100 + i.wrapping_mul(7919)) % vocabulary).take(count).collect()
}

fn largest(one: &Logits, other: &Logits) -> f32 {
    one.as_slice().iter().zip(other.as_slice()).map(|(one, other)| (one - other).abs()).fold(0.0, f32::max)
}
