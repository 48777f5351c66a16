//! `kvkeep replay`: what the cache would do with recorded traffic, without a model and without
//! payloads: the library's own index and policies on block numbers.

mod codecs;
mod nodes;
mod optimum;
mod plot;
mod report;
mod run;
pub(crate) mod synthetic;
mod trace;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::Args;
use kvkeep::{Admission, PolicyKind};
use serde::Serialize;

use crate::cli;
use crate::stats::{float, ratio};
use codecs::Codec;
use run::{Outcome, Setup, in_parallel, replay, smallest};
use trace::Trace;

/// Replays recorded traffic and says what each policy would have hit at each capacity, beside
/// the unbounded cache and the exact optimum.
///
/// A trace is JSON lines with `input_length` (tokens) and `hash_ids` (one number for each block,
/// equal where the block and everything before it are equal); plain, gzip or zstd.
/// `synthetic:NAME` makes one: chat, agents, documents, flood, loop, shift, retrieval, branches,
/// batches or tenants.
#[derive(Debug, Args)]
#[command(after_help = crate::cli::EXIT_CODES)]
pub(crate) struct ReplayOptions {
    /// Traces: files, or synthetic:NAME
    #[arg(required = true, value_name = "TRACE", value_parser = trace::source)]
    pub(crate) traces: Vec<String>,
    /// RAM, in blocks, such as 5000, 5k or 2m; several with commas [default: six shares of the trace's different blocks]
    #[arg(long, value_name = "N,...", value_delimiter = ',', value_parser = blocks)]
    pub(crate) capacity: Vec<u32>,
    /// Policies, with commas: lru, s3fifo, arc, lru2, adaptive [default: all]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', value_parser = policy)]
    pub(crate) policy: Vec<PolicyKind>,
    /// Requests hold none of their blocks: all are used or stored, and then the policy drives out
    /// what is too much, the request's own as well. No live cache works so; published figures do
    #[arg(long, conflicts_with = "disk_capacity")]
    pub(crate) unpinned: bool,
    /// A disk tier behind the RAM, in blocks, such as 20000 or 20k
    #[arg(long, value_name = "N", value_parser = blocks)]
    pub(crate) disk_capacity: Option<u32>,
    /// What is written to disk, several with commas: all, second-use, or worth:R (kinds of blocks
    /// that are read at least R times for each write)
    #[arg(long, value_name = "RULE,...", value_delimiter = ',', default_value = "all")]
    pub(crate) admission: Vec<Admission>,
    /// Codecs, with commas: the same bytes hold more blocks, of the disk if there is one, else of RAM.
    /// raw, lossless, int8, fp8, k8v4, int4, nf4 with measured figures, or `NAME=RATIO@GB_PER_S` (decoding, by one core)
    #[arg(long, value_name = "CODEC,...", value_delimiter = ',', default_value = "raw")]
    pub(crate) codec: Vec<Codec>,
    /// Say how much RAM, and how much disk behind each --capacity, reaches this block hit rate
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub(crate) target_hit_rate: Option<f64>,
    /// Tokens of a block [default: what `input_length` and the number of blocks say]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub(crate) block_tokens: Option<u64>,
    /// KV bytes of a token, to show sizes in bytes: 2 x layers x `kv_heads` x `head_dim` x bytes of an
    /// element, such as 131072 for Llama-3-8B in f16
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1 << 30))]
    pub(crate) bytes_per_token: Option<u64>,
    /// The engine's prefill rate, to show the prefill time that hits save
    #[arg(long, value_name = "TOKENS_PER_S", value_parser = positive)]
    pub(crate) prefill_tokens_per_s: Option<f64>,
    #[command(flatten)]
    pub(crate) nodes: nodes::NodesOptions,
    /// Draw hit rate against capacity, one line a policy; with several --admission, hit rate against
    /// blocks written to disk, one point a rule; with --nodes, against the number of nodes
    #[arg(long, value_name = "FILE.svg", value_parser = crate::cli::svg_file)]
    pub(crate) plot: Option<PathBuf>,
    /// Print one JSON object instead of tables
    #[arg(long)]
    pub(crate) json: bool,
}

/// One row: one trace, one policy, one capacity.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) trace: String,
    pub(crate) policy: &'static str,
    pub(crate) capacity_blocks: u32,
    pub(crate) disk_capacity_blocks: u32,
    /// Of the disk, or of RAM alone: capacities are of raw blocks, and hold more of its blocks.
    pub(crate) codec: String,
    /// What is written to disk; null without one.
    pub(crate) admission: Option<String>,
    pub(crate) block_hit_rate: f64,
    pub(crate) token_hit_rate: f64,
    pub(crate) disk_block_hit_rate: f64,
    pub(crate) optimum_block_hit_rate: f64,
    pub(crate) unbounded_block_hit_rate: f64,
    pub(crate) disk_written_blocks: u64,
    /// Null where nobody said what a token takes.
    pub(crate) disk_written_bytes: Option<u64>,
    /// Null where nobody said how fast prefill is.
    pub(crate) prefill_seconds_saved: Option<f64>,
    /// Decoding of what was hit, by one core; null where nobody said what a token takes. Not part of what was saved.
    pub(crate) decode_seconds: Option<f64>,
    pub(crate) policy_bytes_per_block: f64,
    pub(crate) touches_per_s: f64,
}

/// What reaches the target: RAM alone, or RAM with disk.
#[derive(Debug, Serialize)]
pub(crate) struct Answer {
    pub(crate) trace: String,
    pub(crate) policy: &'static str,
    /// Of the disk, or of RAM alone; sizes are of raw blocks.
    pub(crate) codec: String,
    /// What is written to disk; null without one.
    pub(crate) admission: Option<String>,
    pub(crate) target_block_hit_rate: f64,
    pub(crate) unbounded_block_hit_rate: f64,
    pub(crate) ram_blocks: Option<u32>,
    /// 0: no disk is needed or asked for.
    pub(crate) disk_blocks: u32,
    pub(crate) ram_bytes: Option<u64>,
    pub(crate) disk_bytes: Option<u64>,
}

/// Everything asked of one trace and policy.
#[derive(Debug, Clone, Copy)]
struct Job<'a> {
    codec: &'a Codec,
    trace: &'a Trace,
    limits: &'a Limits,
    policy: PolicyKind,
    admission: Admission,
    capacity: u32,
}

/// What no policy can change.
#[derive(Debug)]
struct Limits {
    unbounded_hits: usize,
    different_blocks: u32,
    /// Capacity and the best hits at it.
    optimum: Vec<(u32, usize)>,
}

impl ReplayOptions {
    /// What is written to disk. Without a disk one rule is as good as another.
    fn rules(&self) -> impl Iterator<Item = Admission> {
        let rules = if self.disk_capacity.is_some() { self.admission.len() } else { 1 };
        self.admission.iter().copied().take(rules)
    }
}

pub(crate) fn run(options: &ReplayOptions) -> Result<ExitCode> {
    let traces: Vec<Trace> =
        options.traces.iter().map(|source| Trace::open(source, options.block_tokens)).collect::<Result<_>>()?;
    if !options.nodes.nodes.is_empty() {
        return nodes::run(&traces, options);
    }
    let policies = if options.policy.is_empty() { PolicyKind::ALL.to_vec() } else { options.policy.clone() };
    let limits = in_parallel("the optimum", &traces, |trace| Ok(limits(trace, &capacities(options, trace))))?;
    let mut jobs = Vec::new();
    for (trace, limits) in traces.iter().zip(&limits) {
        for (policy, admission) in policies.iter().flat_map(|policy| options.rules().map(move |rule| (*policy, rule))) {
            for codec in &options.codec {
                let job =
                    |(capacity, _): &(u32, usize)| Job { codec, trace, limits, policy, admission, capacity: *capacity };
                jobs.extend(limits.optimum.iter().map(job));
            }
        }
    }
    let rows = in_parallel("replays", &jobs, |job| row(job, options))?;
    let answers = match options.target_hit_rate {
        Some(target) => {
            jobs.dedup_by(|a, b| {
                a.trace.name == b.trace.name && (a.policy, a.admission) == (b.policy, b.admission) && a.codec == b.codec
            });
            let answers = in_parallel("searches", &jobs, |job| answers(job, target, options))?;
            answers.into_iter().flatten().collect()
        }
        None => Vec::new(),
    };
    if let Some(path) = &options.plot {
        if options.rules().count() > 1 { plot::writes(path, &rows)? } else { plot::hit_rates(path, &rows)? }
    }
    report::print(&traces, &rows, &answers, options)?;
    Ok(ExitCode::SUCCESS)
}

fn limits(trace: &Trace, capacities: &[u32]) -> Limits {
    let different = trace.different_blocks();
    let best = |capacity: &u32| (*capacity, optimum::hits(&trace.requests, *capacity as usize));
    Limits {
        unbounded_hits: optimum::hits(&trace.requests, different),
        different_blocks: u32::try_from(different).unwrap_or(u32::MAX),
        optimum: capacities.iter().map(best).collect(),
    }
}

/// The capacities asked for, or shares of what the whole trace would take.
fn capacities(options: &ReplayOptions, trace: &Trace) -> Vec<u32> {
    let mut capacities = options.capacity.clone();
    if capacities.is_empty() {
        let different = trace.different_blocks();
        let shares = [1, 2, 5, 10, 25, 50].map(|percent| (different * percent).div_ceil(100));
        capacities = shares.map(|blocks| u32::try_from(blocks).unwrap_or(u32::MAX)).to_vec();
    }
    capacities.sort_unstable();
    capacities.dedup();
    capacities
}

fn row(job: &Job<'_>, options: &ReplayOptions) -> Result<Row> {
    let Job { codec, trace, limits, policy, admission, capacity } = *job;
    let disk_blocks = options.disk_capacity.unwrap_or(0);
    let outcome = replay(trace, setup(job, capacity, disk_blocks, options))?;
    let best = limits.optimum.iter().find(|(at, _)| *at == capacity).map_or(0, |(_, hits)| *hits);
    let of_blocks = |hits: usize| ratio(float(hits), float(trace.blocks()));
    let Outcome { hit_tokens, written_blocks, .. } = outcome;
    let tokens = |tokens: u64| float(usize::try_from(tokens).unwrap_or(usize::MAX));
    Ok(Row {
        trace: trace.name.clone(),
        policy: policy.name(),
        capacity_blocks: capacity,
        disk_capacity_blocks: disk_blocks,
        codec: codec.name.clone(),
        admission: (disk_blocks > 0).then(|| admission.to_string()),
        block_hit_rate: of_blocks(outcome.hit_blocks),
        token_hit_rate: ratio(tokens(hit_tokens), tokens(trace.tokens())),
        disk_block_hit_rate: of_blocks(outcome.disk_hit_blocks),
        optimum_block_hit_rate: of_blocks(best),
        unbounded_block_hit_rate: of_blocks(limits.unbounded_hits),
        disk_written_blocks: written_blocks,
        disk_written_bytes: bytes(trace, written_blocks, options).map(|bytes| smaller(bytes, codec)),
        prefill_seconds_saved: options.prefill_tokens_per_s.map(|rate| tokens(hit_tokens) / rate),
        decode_seconds: decode_seconds(trace, &outcome, codec, options),
        policy_bytes_per_block: ratio(float(outcome.policy_bytes), float(outcome.resident_blocks)),
        touches_per_s: outcome.touches_per_s,
    })
}

/// A cache of these bytes: more blocks where the codec is.
fn setup(job: &Job<'_>, ram_blocks: u32, disk_blocks: u32, options: &ReplayOptions) -> Setup {
    let Job { codec, policy, admission, .. } = *job;
    let (ram_blocks, disk_blocks) = match disk_blocks {
        0 => (codec.blocks(ram_blocks), 0),
        disk_blocks => (ram_blocks, codec.blocks(disk_blocks)),
    };
    Setup { policy, ram_blocks, unpinned: options.unpinned, disk_blocks, admission }
}

/// Of hits in the tier that the codec is in.
fn decode_seconds(trace: &Trace, outcome: &Outcome, codec: &Codec, options: &ReplayOptions) -> Option<f64> {
    let hits = if options.disk_capacity.is_some() { outcome.disk_hit_blocks } else { outcome.hit_blocks };
    let bytes = bytes(trace, hits as u64, options)?;
    Some(float(usize::try_from(bytes).ok()?) / codec.decode_bytes_per_s)
}

/// So many bytes of blocks, as the codec makes them.
fn smaller(bytes: u64, codec: &Codec) -> u64 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss, reason = "a size")]
    let bytes = (bytes as f64 / codec.ratio) as u64;
    bytes
}

/// RAM alone that reaches the target; with a disk, also what each RAM asked for needs behind it.
fn answers(job: &Job<'_>, target: f64, options: &ReplayOptions) -> Result<Vec<Answer>> {
    let Job { codec, trace, limits, policy, admission, .. } = *job;
    let enough = |ram_blocks: u32, disk_blocks: u32| -> Result<bool> {
        let setup = setup(job, ram_blocks, disk_blocks, options);
        Ok(ratio(float(replay(trace, setup)?.hit_blocks), float(trace.blocks())) >= target)
    };
    let answer = |ram_blocks: Option<u32>, disk_blocks: u32| Answer {
        trace: trace.name.clone(),
        policy: policy.name(),
        codec: codec.name.clone(),
        admission: (disk_blocks > 0).then(|| admission.to_string()),
        target_block_hit_rate: target,
        unbounded_block_hit_rate: ratio(float(limits.unbounded_hits), float(trace.blocks())),
        ram_blocks,
        disk_blocks,
        ram_bytes: ram_blocks.and_then(|blocks| bytes(trace, u64::from(blocks), options)),
        disk_bytes: bytes(trace, u64::from(disk_blocks), options),
    };
    let most = limits.different_blocks;
    let ram = smallest(most, |blocks| enough(blocks, 0))?;
    let mut answers = vec![answer(ram, 0)];
    if let Some(alone) = ram {
        for ram in options.capacity.iter().filter(|ram| **ram < alone) {
            if let Some(disk) = smallest(most, |blocks| enough(*ram, blocks))? {
                answers.push(answer(Some(*ram), disk));
            }
        }
    }
    Ok(answers)
}

fn bytes(trace: &Trace, blocks: u64, options: &ReplayOptions) -> Option<u64> {
    options.bytes_per_token.map(|bytes| bytes.saturating_mul(trace.block_tokens).saturating_mul(blocks))
}

fn policy(name: &str) -> Result<PolicyKind, String> {
    let names = PolicyKind::ALL.map(PolicyKind::name);
    PolicyKind::from_name(name).ok_or_else(|| cli::no_such("policy", name, &names))
}

fn blocks(text: &str) -> Result<u32, String> {
    let blocks = cli::counted(text).and_then(|blocks| u32::try_from(blocks).ok()).filter(|blocks| *blocks > 0);
    blocks.ok_or_else(|| format!("give blocks in 1..={}, such as 5000, 5k (5,000) or 2m (2,000,000)", u32::MAX))
}

fn rate(text: &str) -> Result<f64, String> {
    let checked = || -> Result<f64> {
        let rate = text.parse::<f64>()?;
        ensure!(rate > 0.0 && rate <= 1.0, "out of range");
        Ok(rate)
    };
    checked().map_err(|_| "give a rate above 0 and up to 1, such as 0.8".to_owned())
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number > 0.0 && number.is_finite() => Ok(number),
        _ => Err("give a number above 0".to_owned()),
    }
}
