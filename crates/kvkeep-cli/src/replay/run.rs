//! The work: every trace with every policy at every capacity, spread over the cores.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use indicatif::{ProgressBar, ProgressStyle};
use kvkeep::{Admission, PolicyKind, Simulation};
use serde::Serialize;

use super::trace::Trace;

/// A cache to be tried.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Setup {
    pub(crate) policy: PolicyKind,
    pub(crate) ram_blocks: u32,
    pub(crate) unpinned: bool,
    /// 0 for none.
    pub(crate) disk_blocks: u32,
    pub(crate) admission: Admission,
}

/// What came out of one replay, in blocks and tokens.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Outcome {
    pub(crate) hit_blocks: usize,
    pub(crate) disk_hit_blocks: usize,
    pub(crate) hit_tokens: u64,
    pub(crate) written_blocks: u64,
    pub(crate) policy_bytes: usize,
    pub(crate) resident_blocks: usize,
    pub(crate) touches_per_s: f64,
}

pub(crate) fn replay(trace: &Trace, setup: Setup) -> Result<Outcome> {
    let mut cache = if setup.unpinned {
        Simulation::unpinned(setup.ram_blocks, setup.policy, trace.longest_request_blocks())?
    } else {
        Simulation::new(setup.ram_blocks, setup.policy)?
    };
    if setup.disk_blocks > 0 {
        cache = cache.with_disk(setup.disk_blocks, setup.admission)?;
    }
    let mut outcome = Outcome::default();
    let begin = Instant::now();
    for request in &trace.requests {
        let hits = cache.request(&request.blocks);
        outcome.hit_blocks += hits.total();
        outcome.disk_hit_blocks += hits.disk;
        outcome.hit_tokens += trace.cached_tokens(request, hits.total());
    }
    outcome.touches_per_s = crate::stats::float(trace.blocks()) / begin.elapsed().as_secs_f64().max(1e-9);
    outcome.written_blocks = cache.disk_written_blocks();
    outcome.policy_bytes = cache.policy_bytes();
    outcome.resident_blocks = cache.resident_blocks();
    Ok(outcome)
}

/// Runs `work` on each item, on as many threads as there are cores; answers in their order. On a terminal a bar says
/// how far `what` is, and is gone when this returns: the next one has the line.
pub(crate) fn in_parallel<T: Sync, R: Send>(
    what: &'static str,
    items: &[T],
    work: impl Fn(&T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let bar = progress(what, items.len());
    let done = spread(items, &bar, work);
    bar.finish_and_clear();
    done
}

fn progress(what: &'static str, steps: usize) -> ProgressBar {
    let bar = ProgressBar::new(steps as u64);
    if let Ok(style) = ProgressStyle::with_template("{msg} {bar:30} {pos}/{len} {elapsed}") {
        bar.set_style(style);
    }
    bar.set_message(what);
    bar.enable_steady_tick(Duration::from_millis(250));
    bar
}

fn spread<T: Sync, R: Send>(items: &[T], bar: &ProgressBar, work: impl Fn(&T) -> Result<R> + Sync) -> Result<Vec<R>> {
    let next = AtomicUsize::new(0);
    let done: Mutex<Vec<(usize, Result<R>)>> = Mutex::new(Vec::new());
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(items.len());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(item) = items.get(at) else { return };
                    let result = work(item);
                    bar.inc(1);
                    if let Ok(mut done) = done.lock() {
                        done.push((at, result));
                    }
                }
            });
        }
    });
    let mut done = done.into_inner().map_err(|_| anyhow!("a replaying thread panicked"))?;
    done.sort_by_key(|(at, _)| *at);
    done.into_iter().map(|(_, result)| result).collect()
}

/// The smallest number from 1 to `most` that satisfies a condition that, once satisfied, stays so.
pub(crate) fn smallest(most: u32, mut enough: impl FnMut(u32) -> Result<bool>) -> Result<Option<u32>> {
    if most == 0 || !enough(most)? {
        return Ok(None);
    }
    let (mut low, mut high) = (0, most);
    while high - low > 1 + high / 100 {
        let middle = low + (high - low) / 2;
        if enough(middle)? { high = middle } else { low = middle }
    }
    Ok(Some(high))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_come_in_the_order_of_the_questions() {
        let items: Vec<usize> = (0..100).collect();
        let squares = in_parallel("squares", &items, |n| Ok(n * n)).unwrap();
        assert_eq!(squares, items.iter().map(|n| n * n).collect::<Vec<_>>());
        let failed = in_parallel("failures", &items, |n| if *n == 50 { Err(anyhow!("50")) } else { Ok(()) });
        assert_eq!(failed.unwrap_err().to_string(), "50");
    }

    #[test]
    fn the_smallest_enough_is_found_within_one_percent() {
        let found = smallest(10_000, |n| Ok(n >= 1_234)).unwrap().unwrap();
        assert!((1_234..1_250).contains(&found), "{found}");
        assert_eq!(smallest(10, |_| Ok(false)).unwrap(), None);
        assert_eq!(smallest(10, |n| Ok(n >= 1)).unwrap(), Some(1));
    }
}
