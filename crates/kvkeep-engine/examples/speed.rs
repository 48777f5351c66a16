//! Speed of the default model (or of the GGUF file given): prefill at several lengths,
//! decode, and time to first token with and without a cached prefix. Best and median.
//!
//! `cargo run --release -p kvkeep-engine --example speed [MODEL.gguf] [THREADS]`

#![expect(clippy::indexing_slicing, reason = "measurements are never empty")]

use std::ops::ControlFlow;
use std::time::Instant;

use kvkeep::{CacheConfig, KvCache};
use kvkeep_engine::{Engine, EngineOptions, GenerateOptions, Generator, default_model_path, user_cache_dir};

type AnyError = Box<dyn std::error::Error>;

fn main() -> Result<(), AnyError> {
    let mut args = std::env::args().skip(1);
    let path = match args.next() {
        Some(path) => path.into(),
        None => default_model_path(&user_cache_dir()?, &mut |done, total| eprint!("\r{done} / {total} bytes"))?,
    };
    let mut options = EngineOptions::default();
    if let Some(threads) = args.next() {
        options = options.threads(threads.parse()?);
    }
    let begin = Instant::now();
    let engine = Engine::load(path, &options)?;
    println!("{} on {} threads, loaded in {:.2?}", engine.model_name(), engine.threads(), begin.elapsed());
    prefill(&engine)?;
    decode(&engine)?;
    reuse(&engine)
}

/// Tokens of no meaning; speed does not depend on them.
fn tokens(engine: &Engine, n: u32) -> Vec<u32> {
    let vocabulary = u32::try_from(engine.tokenizer().vocabulary()).unwrap_or(u32::MAX);
    (0..n).map(|i| (100 + i * 7919) % vocabulary).collect()
}

fn prefill(engine: &Engine) -> Result<(), AnyError> {
    let mut kv = engine.kv(2048)?;
    for n in [16, 64, 256, 1024, 2048] {
        let tokens = tokens(engine, n);
        let seconds = timed(if n > 256 { 5 } else { 11 }, || {
            kv.truncate(0);
            engine.prefill(&tokens, &mut kv).map(drop)
        })?;
        report(&format!("prefill {n:>4}"), f64::from(n), &seconds);
    }
    Ok(())
}

fn decode(engine: &Engine) -> Result<(), AnyError> {
    let mut kv = engine.kv(2048)?;
    for at in [16, 1024] {
        kv.truncate(0);
        engine.prefill(&tokens(engine, at), &mut kv)?;
        let seconds = timed(100, || engine.decode(100, &mut kv).map(drop))?;
        report(&format!("decode at {at:>4}"), 1.0, &seconds);
    }
    Ok(())
}

/// A prompt of 1,024 + 32 tokens whose first 1,024 are cached, and one without a cache.
fn reuse(engine: &Engine) -> Result<(), AnyError> {
    let cache = KvCache::new(CacheConfig::new(256 << 20))?;
    let mut generator = Generator::new(engine, 2048, engine.namespace(64)?)?;
    let options = GenerateOptions::greedy(1);
    let mut prompt = tokens(engine, 1024);
    let mut ttft = [Vec::new(), Vec::new()];
    for round in 0..8 {
        prompt.truncate(1024);
        prompt.extend((0..32).map(|i| 1000 + round * 100 + i));
        for (cache, ttft) in [None, Some(&cache)].into_iter().zip(&mut ttft) {
            let answer = generator.generate(&prompt, cache, &options, &mut |_, _| ControlFlow::Continue(()))?;
            ttft.push(answer.ttft.as_secs_f64());
        }
    }
    // The first request with the cache fills it.
    ttft[1].remove(0);
    let [cold, warm] = ttft.map(|mut ttft| {
        ttft.sort_by(f64::total_cmp);
        ttft[ttft.len() / 2] * 1e3
    });
    println!("time to first token, 1056 tokens: {cold:.1} ms; 1024 of them cached: {warm:.1} ms ({:.1}x)", cold / warm);
    Ok(())
}

fn timed<E>(times: usize, mut run: impl FnMut() -> Result<(), E>) -> Result<Vec<f64>, E> {
    let mut seconds = Vec::with_capacity(times);
    for _ in 0..times {
        let begin = Instant::now();
        run()?;
        seconds.push(begin.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds)
}

fn report(what: &str, tokens: f64, seconds: &[f64]) {
    let (best, median) = (seconds[0], seconds[seconds.len() / 2]);
    println!("{what}: best {:.1} tok/s, median {:.1} tok/s ({:.1} ms)", tokens / best, tokens / median, median * 1e3);
}
