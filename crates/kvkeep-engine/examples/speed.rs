//! Speed of the default model (or of the GGUF file given): prefill at several lengths,
//! decode alone and of several answers at once, the gaps between the tokens of an answer while a
//! long prompt is read, and time to first token with and without a cached prefix. Best and median.
//!
//! `cargo run --release -p kvkeep-engine --example speed [MODEL.gguf] [THREADS]`

#![expect(clippy::indexing_slicing, reason = "measurements are never empty")]
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "small counts"
)]

use std::ops::ControlFlow;
use std::thread;
use std::time::Instant;

use kvkeep::{CacheConfig, KvCache};
use kvkeep_engine::{
    Engine, EngineError, EngineOptions, GenerateOptions, Generator, default_model_path, user_cache_dir,
};

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
    together(&engine)?;
    beside_a_prompt(&engine)?;
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

/// Several answers at once: they share passes.
fn together(engine: &Engine) -> Result<(), AnyError> {
    for answers in [1, 2, 4, 8] {
        let begin = Instant::now();
        thread::scope(|scope| {
            let threads: Vec<_> = (0..answers).map(|_| scope.spawn(|| answer(engine, 64))).collect();
            threads.into_iter().try_for_each(|thread| thread.join().unwrap_or(Ok(Vec::new())).map(drop))
        })?;
        let seconds = begin.elapsed().as_secs_f64();
        println!("decode of {answers} at once: {:.1} tok/s together", f64::from(answers) * 64.0 / seconds);
    }
    Ok(())
}

fn beside_a_prompt(engine: &Engine) -> Result<(), AnyError> {
    let (prompt, mut kv) = (tokens(engine, 2000), engine.kv(2048)?);
    let alone = timed(1, || engine.prefill(&prompt, &mut kv).map(drop))?[0];
    kv.truncate(0);
    let begin = Instant::now();
    let mut gaps = thread::scope(|scope| {
        let answer = scope.spawn(|| answer(engine, 80));
        engine.prefill(&prompt, &mut kv)?;
        println!("prefill 2000: {alone:.2} s alone, {:.2} s beside an answer", begin.elapsed().as_secs_f64());
        answer.join().unwrap_or(Ok(Vec::new()))
    })?;
    gaps.sort_by(f64::total_cmp);
    let at = |part: f64| gaps[(gaps.len() as f64 * part) as usize] * 1e3;
    println!("between tokens of an answer beside it: median {:.0} ms, 95th percentile {:.0} ms", at(0.5), at(0.95));
    Ok(())
}

/// Answers a short prompt; seconds from token to token.
fn answer(engine: &Engine, tokens: u32) -> Result<Vec<f64>, EngineError> {
    let mut kv = engine.kv(128)?;
    let mut logits = engine.prefill(&[100, 200, 300, 400], &mut kv)?;
    timed(tokens as usize, || {
        logits = engine.decode(logits.argmax(), &mut kv)?;
        Ok(())
    })
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
            let answer = generator.generate(&prompt, cache, &options, &mut |_| ControlFlow::Continue(()))?;
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
