//! `kvkeep replay --nodes`: the same traffic on many nodes, each with the library's own index, by three ways of sending
//! requests to nodes, with and without a store that they share.
//!
//! RAM does not know whether what it misses was computed or came from the store: both come to it in the same way. So one
//! run says what RAM hits alone, and what the store adds. A cache tells the two apart when it judges what to keep.

mod load;
mod plot;
mod router;
mod store;

use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::Args;
use comfy_table::{Attribute, Cell, CellAlignment};
use kvkeep::{Changes, PolicyKind, Simulation};
use serde::Serialize;

use super::ReplayOptions;
use super::run::in_parallel;
use super::trace::Trace;
use crate::stats::{float, ratio};
use crate::{cli, style};
use load::{Load, Sessions};
use router::Router;
use store::Store;

/// Peaks are means of so long.
const WINDOW_MS: u32 = 10_000;

/// What `--nodes` takes besides.
#[derive(Debug, Args)]
pub(crate) struct NodesOptions {
    /// Replays the trace on so many nodes, with commas, such as 1,10,100: each alone, behind a shared store, and with
    /// requests sent where events say that their prefix is. --capacity is of each node
    #[arg(long, value_name = "N,...", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=10_000), requires = "capacity",
          conflicts_with_all = ["unpinned", "disk_capacity", "admission", "codec", "target_hit_rate", "prefill_tokens_per_s"])]
    pub(crate) nodes: Vec<u16>,
    /// Requests for each node: the first of the trace [default: all]
    #[arg(long, value_name = "N", value_parser = requests, requires = "nodes")]
    pub(crate) requests: Option<u64>,
    /// The trace once, however many nodes there are. Otherwise each node more brings the trace's load once more, with
    /// users of its own
    #[arg(long, requires = "nodes")]
    pub(crate) fixed_load: bool,
    /// The shared store, in blocks for each node [default: without bound]
    #[arg(long, value_name = "N", value_parser = super::blocks, requires = "nodes")]
    pub(crate) store: Option<u32>,
    /// How late the router hears of an event, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 100, requires = "nodes")]
    pub(crate) event_delay_ms: u32,
    /// No node is given a request by its prefix that has so many times the mean of requests under way
    #[arg(long, value_name = "TIMES", default_value_t = 1.25, value_parser = load_limit, requires = "nodes")]
    pub(crate) load_limit: f64,
    /// Requests a second of one trace, evenly, in place of its timestamps
    #[arg(long, value_name = "REQUESTS_PER_S", value_parser = super::positive, requires = "nodes")]
    pub(crate) rate: Option<f64>,
}

/// How a request comes to its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Routing {
    RoundRobin,
    BySession,
    ByEvents,
}

impl Routing {
    const ALL: [Self; 3] = [Self::RoundRobin, Self::BySession, Self::ByEvents];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::RoundRobin => "round robin",
            Self::BySession => "by session",
            Self::ByEvents => "by events",
        }
    }
}

/// One row: one trace, one number of nodes, one routing. Rates a second are means over the run, peaks over 10 seconds.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) trace: String,
    pub(super) nodes: u16,
    pub(super) routing: Routing,
    policy: &'static str,
    capacity_blocks_per_node: u32,
    /// Null without a bound.
    store_blocks_per_node: Option<u32>,
    requests: usize,
    seconds: f64,
    /// In the RAM of the node that was asked.
    pub(super) ram_block_hit_rate: f64,
    ram_token_hit_rate: f64,
    /// There, or behind it in the store.
    pub(super) store_block_hit_rate: f64,
    store_token_hit_rate: f64,
    pub(super) store_read_blocks_per_s: f64,
    pub(super) store_written_blocks_per_s: f64,
    store_peak_blocks_per_s: f64,
    /// Of the node with the highest peak.
    node_peak_blocks_per_s: f64,
    /// Requests of the node that had most, in means.
    busiest_node_requests: f64,
    /// From all nodes to one router, without token ids.
    events_bytes_per_s: f64,
    /// Null where nobody said what a token takes.
    pub(super) block_bytes: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Results<'r> {
    nodes: &'r [Row],
}

struct Job<'a> {
    trace: &'a Trace,
    sessions: &'a Sessions,
    nodes: u16,
    routing: Routing,
}

pub(super) fn run(traces: &[Trace], options: &ReplayOptions) -> Result<ExitCode> {
    ensure!(
        options.capacity.len() == 1 && options.policy.len() <= 1,
        "--nodes compares ways at one size: give one --capacity and at most one --policy"
    );
    let sessions: Vec<Sessions> = traces.iter().map(Sessions::of).collect();
    let mut jobs = Vec::new();
    for (trace, sessions) in traces.iter().zip(&sessions) {
        for nodes in options.nodes.nodes.iter().copied() {
            jobs.extend(Routing::ALL.map(|routing| Job { trace, sessions, nodes, routing }));
        }
    }
    let rows = in_parallel("replays", &jobs, |job| row(job, options))?;
    if let Some(path) = &options.plot {
        plot::scale(path, &rows)?;
    }
    if options.json {
        style::say(&serde_json::to_string_pretty(&Results { nodes: &rows })?)?;
    } else {
        for trace in traces {
            style::say(&table(&trace.name, &rows))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Blocks in the present window and the most of any.
#[derive(Debug, Clone, Copy, Default)]
struct Peak {
    window: u32,
    now: usize,
    most: usize,
}

impl Peak {
    fn add(&mut self, at_ms: u32, blocks: usize) {
        let window = at_ms / WINDOW_MS;
        if std::mem::replace(&mut self.window, window) != window {
            self.now = 0;
        }
        self.now += blocks;
        self.most = self.most.max(self.now);
    }

    fn per_s(self) -> f64 {
        float(self.most) * 1e3 / f64::from(WINDOW_MS)
    }
}

#[derive(Debug)]
struct Node {
    ram: Simulation,
    requests: usize,
    moved: Peak,
}

#[derive(Debug, Default)]
struct Sums {
    blocks: usize,
    ram: usize,
    read: usize,
    written: usize,
    tokens: u64,
    ram_tokens: u64,
    found_tokens: u64,
    event_bytes: usize,
    moved: Peak,
}

fn row(job: &Job<'_>, options: &ReplayOptions) -> Result<Row> {
    let Job { trace, sessions, nodes: count, routing } = *job;
    let of = &options.nodes;
    let policy = options.policy.first().copied().unwrap_or(PolicyKind::Adaptive);
    let capacity = options.capacity.first().copied().unwrap_or(0);
    let wanted = of.requests.and_then(|count| usize::try_from(count).ok()).unwrap_or(usize::MAX);
    let copies = if of.fixed_load { 1 } else { count };
    let load = Load::new(trace, sessions, copies, wanted, of.rate)?;
    let node = |_| Ok(Node { ram: Simulation::new(capacity, policy)?, requests: 0, moved: Peak::default() });
    let mut nodes: Vec<Node> = (0..count).map(node).collect::<Result<_>>()?;
    let mut store = Store::new(of.store.map_or(u64::MAX, |blocks| u64::from(blocks) * u64::from(count)));
    let mut router = Router::new(count, of.event_delay_ms, of.load_limit);
    let mut sums = Sums::default();
    let mut blocks = Vec::new();
    for (turn, sent) in load.sent.iter().enumerate() {
        load.blocks(*sent, &mut blocks);
        let at = match routing {
            Routing::RoundRobin => turn % nodes.len(),
            Routing::BySession => usize::try_from(load.session(*sent) % u64::from(count)).unwrap_or(0),
            Routing::ByEvents => usize::from(router.choose(sent.at_ms, &blocks)),
        };
        let Some(node) = nodes.get_mut(at) else { continue };
        let (hits, changes) = node.ram.request_told(&blocks);
        let behind = blocks.get(hits.ram..).unwrap_or_default();
        let read = store.read_run(behind);
        let written = behind.iter().skip(read).filter(|block| store.write(**block)).count();
        node.requests += 1;
        node.moved.add(sent.at_ms, read + written);
        sums.add(trace, sent.request, hits.ram, read, written);
        sums.moved.add(sent.at_ms, read + written);
        sums.event_bytes += event_bytes(&changes);
        if routing == Routing::ByEvents {
            router.tell(sent.at_ms, u16::try_from(at).unwrap_or(0), changes);
        }
    }
    let seconds = load.seconds();
    let per_s = |count: usize| float(count) / seconds;
    let tokens = |tokens: u64| float(usize::try_from(tokens).unwrap_or(usize::MAX));
    let busiest = nodes.iter().map(|node| node.requests).max().unwrap_or(0);
    Ok(Row {
        trace: trace.name.clone(),
        nodes: count,
        routing,
        policy: policy.name(),
        capacity_blocks_per_node: capacity,
        store_blocks_per_node: of.store,
        requests: load.sent.len(),
        seconds,
        ram_block_hit_rate: ratio(float(sums.ram), float(sums.blocks)),
        ram_token_hit_rate: ratio(tokens(sums.ram_tokens), tokens(sums.tokens)),
        store_block_hit_rate: ratio(float(sums.ram + sums.read), float(sums.blocks)),
        store_token_hit_rate: ratio(tokens(sums.found_tokens), tokens(sums.tokens)),
        store_read_blocks_per_s: per_s(sums.read),
        store_written_blocks_per_s: per_s(sums.written),
        store_peak_blocks_per_s: sums.moved.per_s(),
        node_peak_blocks_per_s: nodes.iter().map(|node| node.moved.per_s()).fold(0.0, f64::max),
        busiest_node_requests: ratio(float(busiest) * f64::from(count), float(load.sent.len())),
        events_bytes_per_s: per_s(sums.event_bytes),
        block_bytes: options.bytes_per_token.map(|bytes| bytes.saturating_mul(trace.block_tokens)),
    })
}

impl Sums {
    fn add(&mut self, trace: &Trace, request: u32, ram: usize, read: usize, written: usize) {
        let Some(request) = trace.requests.get(request as usize) else { return };
        self.blocks += request.blocks.len();
        self.ram += ram;
        self.read += read;
        self.written += written;
        self.tokens += request.tokens;
        self.ram_tokens += trace.cached_tokens(request, ram);
        self.found_tokens += trace.cached_tokens(request, ram + read);
    }
}

/// What the server publishes of one request (docs/events.md): a batch, in it one event of what came and one of what went,
/// with 9 bytes for each block.
fn event_bytes(changes: &Changes) -> usize {
    let event = |frame: usize, blocks: &[u64]| if blocks.is_empty() { 0 } else { frame + 9 * blocks.len() };
    match event(117, &changes.stored) + event(46, &changes.removed) {
        0 => 0,
        events => 20 + events,
    }
}

fn table(trace: &str, rows: &[Row]) -> String {
    let mut table = style::table();
    let head = [
        "nodes",
        "routing",
        "RAM",
        "with store",
        "store reads",
        "writes",
        "peak",
        "a node's peak",
        "busiest",
        "events",
    ];
    table.set_header(head.map(|text| Cell::new(text).add_attribute(Attribute::Bold)));
    let of_trace: Vec<&Row> = rows.iter().filter(|row| row.trace == trace).collect();
    for row in &of_trace {
        let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
        let percent = |rate: f64| right(format!("{:.1}%", rate * 100.0));
        let flow = |blocks: f64| right(row.flow(blocks));
        table.add_row([
            right(row.nodes.to_string()),
            Cell::new(row.routing.name()),
            percent(row.ram_block_hit_rate),
            percent(row.store_block_hit_rate),
            flow(row.store_read_blocks_per_s),
            flow(row.store_written_blocks_per_s),
            flow(row.store_peak_blocks_per_s),
            flow(row.node_peak_blocks_per_s),
            right(format!("{:.2}x", row.busiest_node_requests)),
            right(format!("{:.1} kB/s", row.events_bytes_per_s / 1e3)),
        ]);
    }
    let (requests, seconds) = of_trace.last().map_or((0, 0.0), |row| (row.requests, row.seconds));
    format!("{trace}: up to {requests} requests in {seconds:.0} s; % of blocks\n{table}")
}

impl Row {
    /// GB/s where it is known what a token takes, else blocks a second.
    fn flow(&self, blocks_per_s: f64) -> String {
        match self.gb_per_s(blocks_per_s) {
            Some(rate) => format!("{rate:.2} GB/s"),
            None => format!("{blocks_per_s:.1} blocks/s"),
        }
    }

    pub(super) fn gb_per_s(&self, blocks_per_s: f64) -> Option<f64> {
        let bytes = float(usize::try_from(self.block_bytes?).ok()?);
        Some(blocks_per_s * bytes / 1e9)
    }
}

fn requests(text: &str) -> Result<u64, String> {
    let count = cli::counted(text).filter(|count| *count > 0);
    count.ok_or_else(|| "give a number of requests above 0, such as 3000 or 3k".to_owned())
}

fn load_limit(text: &str) -> Result<f64, String> {
    let limit = text.parse::<f64>().ok().filter(|limit| *limit >= 1.0 && limit.is_finite());
    limit.ok_or_else(|| "give 1 or more, such as 1.25: a quarter above the mean".to_owned())
}
