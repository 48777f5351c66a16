//! The model: what a cached prefix costs against one that never left the engine, and its speed.

use std::ops::ControlFlow;

use anyhow::{Result, ensure};
use kvkeep::{CacheConfig, KvCache};
use kvkeep_engine::{Engine, GenerateOptions, Generator, Step};

use super::{Bar, Effort, Figure, alternate, time};
use crate::stats::float;

const PREFIX: usize = 1024;
const NEW: usize = 32;
const BLOCK_TOKENS: u32 = 64;

pub(super) fn figures(engine: &Engine, effort: Effort) -> Result<Vec<Figure>> {
    let mut figures = vec![warm(engine, effort)?];
    figures.extend(prefill(engine, effort)?);
    figures.push(decode(engine, effort)?);
    Ok(figures)
}

/// Tokens of no meaning; speed does not depend on them.
fn tokens(engine: &Engine, number: usize, count: usize) -> Vec<u32> {
    let vocabulary = u32::try_from(engine.tokenizer().vocabulary()).unwrap_or(u32::MAX);
    let first = u32::try_from(number % 40_000).unwrap_or_default();
    (0..u32::MAX).map(|token| token.wrapping_mul(7919).wrapping_add(first) % vocabulary).take(count).collect()
}

/// 1,024 tokens that are known and 32 new ones, in other words each time.
fn warm(engine: &Engine, effort: Effort) -> Result<Figure> {
    let prefix = tokens(engine, 0, PREFIX);
    let cache = KvCache::new(CacheConfig::new(256 << 20))?;
    let mut generator = Generator::new(engine, PREFIX + NEW + 1, engine.namespace(BLOCK_TOKENS)?)?;
    let one = GenerateOptions::greedy(1);
    let go_on = &mut |_: Step<'_>| ControlFlow::Continue(());
    let full = [prefix.as_slice(), &tokens(engine, 1, NEW)].concat();
    generator.generate(&full, Some(&cache), &one, go_on)?;
    let mut kept = engine.kv(PREFIX + NEW)?;
    engine.prefill(&prefix, &mut kept)?;
    let (mut there, mut here) = (2, 2);
    let [never_left, warm] = alternate(
        effort.pick(31, 11),
        [
            &mut || {
                there += 1;
                let new = tokens(engine, there, NEW);
                kept.truncate(PREFIX);
                time(|| Ok(engine.prefill(&new, &mut kept)?.argmax()))
            },
            &mut || {
                here += 1;
                let prompt = [prefix.as_slice(), &tokens(engine, here, NEW)].concat();
                let answer = generator.generate(&prompt, Some(&cache), &one, go_on)?;
                ensure!(answer.cached_tokens == PREFIX, "{} of {PREFIX} tokens were cached", answer.cached_tokens);
                Ok(answer.ttft)
            },
        ],
    )?
    .map(|seconds| seconds * 1e3);
    let name = "time to first token, 1,024 tokens cached, 32 new";
    Ok(Figure::cost(name, warm, "ms", never_left, "KV never left").bar(Bar::AtMost(1.05)))
}

fn prefill(engine: &Engine, effort: Effort) -> Result<Vec<Figure>> {
    let mut kvs = [engine.kv(2048)?, engine.kv(2048)?, engine.kv(2048)?];
    let [short, middle, long] = &mut kvs;
    let mut run = [(256, short), (PREFIX, middle), (2 * PREFIX, long)].map(|(count, kv)| {
        let prompt = tokens(engine, 0, count);
        move || {
            kv.truncate(0);
            time(|| Ok(engine.prefill(&prompt, kv)?))
        }
    });
    let [short, middle, long] = &mut run;
    let [short, middle, long] = alternate(effort.pick(3, 1), [short, middle, long])?;
    let (short, middle, long) = (256.0 / short, float(PREFIX) / middle, float(2 * PREFIX) / long);
    Ok(vec![
        Figure::rate("prefill of 1,024 tokens", middle, "tokens/s", short, "of 256 tokens"),
        Figure::rate("prefill of 2,048 tokens", long, "tokens/s", middle, "of 1,024 tokens"),
    ])
}

fn decode(engine: &Engine, effort: Effort) -> Result<Figure> {
    const STEPS: usize = 16;
    let mut kvs = [engine.kv(2048)?, engine.kv(2048)?];
    let [near, far] = &mut kvs;
    let mut run = [(16, near), (PREFIX, far)].map(|(context, kv)| {
        let prompt = tokens(engine, 0, context);
        move || {
            if kv.len() < context {
                engine.prefill(&prompt, kv)?;
            }
            kv.truncate(context);
            time(|| (0..STEPS).try_for_each(|_| Ok(engine.decode(100, kv).map(drop)?)))
        }
    });
    let [near, far] = &mut run;
    let [near, far] = alternate(effort.pick(9, 3), [near, far])?.map(|seconds| float(STEPS) / seconds);
    Ok(Figure::rate("decode behind 1,024 tokens", far, "tokens/s", near, "behind 16 tokens"))
}
