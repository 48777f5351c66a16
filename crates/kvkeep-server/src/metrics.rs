//! Figures for Prometheus, in OpenMetrics' text format.
//!
//! What requests did is counted here as they end. What the cache and the queue are like is asked
//! for when somebody scrapes: a figure kept twice would be two figures.

use std::fmt;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use kvkeep::{Stats, TierStats};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use crate::kv_events::KvEventsCounts;
use crate::recent::is_warm;
use crate::served::{Endpoint, Outcome, Served, TokensIn};

pub(crate) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// From a hit in RAM on a GPU to a long prompt on a CPU.
const TTFT_SECONDS: [f64; 14] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0];
const QUEUE_SECONDS: [f64; 11] = [0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0, 300.0];

/// Beside the names of tiers: what no tier gave.
const COMPUTED: &str = "computed";

type Label = (&'static str, &'static str);
type Counters<const N: usize> = Family<[Label; N], Counter>;

/// What requests did since the start.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    prompt_tokens: Family<[(&'static str, String); 1], Counter>,
    /// The names of the cache's tiers, RAM's first.
    tiers: Vec<String>,
    completion_tokens: Counter,
    requests: Counters<2>,
    ttft: Family<[Label; 1], Histogram>,
    queue_time: Histogram,
    prefill: Histogram,
}

/// Tokens of prompts, by what gave their KV.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TokenTotals {
    pub(crate) tiers: Vec<TokensIn>,
    pub(crate) computed: u64,
}

/// What the server is like when somebody scrapes.
#[derive(Debug, Clone)]
pub(crate) struct Now<'a> {
    pub(crate) model: &'a str,
    pub(crate) uptime: Duration,
    pub(crate) stats: Stats,
    pub(crate) running: usize,
    pub(crate) waiting: usize,
    pub(crate) parallel: usize,
    pub(crate) queue: usize,
    pub(crate) rejected: u64,
    pub(crate) pinned_tokens: usize,
    /// Where the cache's events are published.
    pub(crate) kv_events: Option<KvEventsCounts>,
}

impl TokenTotals {
    pub(crate) fn cached(&self) -> u64 {
        self.tiers.iter().map(|tier| tier.tokens).sum()
    }

    pub(crate) fn requested(&self) -> u64 {
        self.cached() + self.computed
    }
}

impl Metrics {
    /// Of a cache with tiers of these names, RAM's among them.
    pub(crate) fn new(tiers: impl Iterator<Item = String>) -> Self {
        let metrics = Self {
            prompt_tokens: Family::default(),
            tiers: tiers.collect(),
            completion_tokens: Counter::default(),
            requests: Family::default(),
            ttft: Family::new_with_constructor(|| Histogram::new(TTFT_SECONDS)),
            queue_time: Histogram::new(QUEUE_SECONDS),
            prefill: Histogram::new(TTFT_SECONDS),
        };
        // All series are there from the start: a rate needs a first value.
        for tier in metrics.tiers.iter().map(String::as_str).chain([COMPUTED]) {
            drop(metrics.tokens_of(tier));
        }
        for (endpoint, outcome) in pairs() {
            drop(metrics.requests.get_or_create(&request_labels(endpoint, outcome)));
        }
        for warm in [false, true] {
            drop(metrics.ttft.get_or_create(&prompt_label(warm)));
        }
        metrics
    }

    /// Counts a request that has ended.
    pub(crate) fn observe(&self, served: &Served) {
        for (tier, tokens) in &served.tiers {
            self.tokens_of(tier).inc_by(*tokens as u64);
        }
        self.tokens_of(COMPUTED).inc_by(served.computed_tokens() as u64);
        self.completion_tokens.inc_by(served.completion_tokens as u64);
        self.requests.get_or_create(&request_labels(served.endpoint, served.outcome)).inc();
        self.queue_time.observe(served.queued.as_secs_f64());
        if served.was_read() {
            self.prefill.observe(served.prefill.as_secs_f64());
        }
        if let Some(ttft) = served.ttft.filter(|_| served.endpoint != Endpoint::Warm) {
            let warm = is_warm(served.cached_tokens(), served.prompt.len());
            self.ttft.get_or_create(&prompt_label(warm)).observe(ttft.as_secs_f64());
        }
    }

    pub(crate) fn tokens(&self) -> TokenTotals {
        let of = |name: &String| TokensIn { name: name.clone(), tokens: self.tokens_of(name).get() };
        TokenTotals { tiers: self.tiers.iter().map(of).collect(), computed: self.tokens_of(COMPUTED).get() }
    }

    /// Tokens of prompts whose KV this tier gave, or that were computed.
    fn tokens_of(&self, tier: &str) -> impl std::ops::Deref<Target = Counter> {
        self.prompt_tokens.get_or_create(&[("tier", tier.to_owned())])
    }

    /// Requests that ended in one of these ways.
    pub(crate) fn requests(&self, outcomes: &[Outcome]) -> u64 {
        let counted = pairs().filter(|(_, outcome)| outcomes.contains(outcome));
        counted.map(|(endpoint, outcome)| self.requests.get_or_create(&request_labels(endpoint, outcome)).get()).sum()
    }

    /// The page that Prometheus reads.
    pub(crate) fn text(&self, now: &Now<'_>) -> Result<String, fmt::Error> {
        let mut registry = Registry::with_prefix("kvkeep");
        self.register(&mut registry);
        let mut page = Page(&mut registry);
        page.server(now);
        page.ram(&now.stats);
        page.tiers(&now.stats);
        if let Some(counts) = now.kv_events {
            page.kv_events(counts);
        }
        let mut text = String::new();
        encode(&mut text, &registry)?;
        Ok(text)
    }

    fn register(&self, registry: &mut Registry) {
        let Self { prompt_tokens, completion_tokens, requests, ttft, queue_time, prefill, tiers: _ } = self.clone();
        registry.register(
            "prompt_tokens",
            "Tokens of prompts by what gave their KV: a tier, or computed",
            prompt_tokens,
        );
        registry.register("completion_tokens", "Tokens answered", completion_tokens);
        registry.register("requests", "Requests that ended, by endpoint and outcome", requests);
        registry.register(
            "time_to_first_token_seconds",
            "From a request's arrival to its first token; warm: at least half of its prompt was cached",
            ttft,
        );
        registry.register("prefill_seconds", "Computing the part of a prompt that was not cached", prefill);
        registry.register("queue_time_seconds", "From a request's arrival until a thread took it", queue_time);
    }
}

/// Figures as of now.
struct Page<'a>(&'a mut Registry);

impl Page<'_> {
    fn server(&mut self, now: &Now<'_>) {
        let build = Info::new([("version", env!("CARGO_PKG_VERSION").to_owned()), ("model", now.model.to_owned())]);
        self.0.register("build", "The server's version and its model", build);
        let uptime = Gauge::<f64, AtomicU64>::default();
        uptime.set(now.uptime.as_secs_f64());
        self.0.register("uptime_seconds", "Time since the server's start", uptime);
        self.gauge("requests_running", "Requests that are answered now", now.running as u64);
        self.gauge("requests_waiting", "Requests in the queue", now.waiting as u64);
        self.gauge("requests_parallel", "Requests that can be answered at once", now.parallel as u64);
        self.gauge("queue_capacity", "Requests that the queue takes", now.queue as u64);
        self.counter("requests_rejected", "Requests sent away because the queue was full", now.rejected);
        let saved = Counter::<f64, AtomicU64>::default();
        saved.inc_by(now.stats.time_saved.as_secs_f64());
        self.0.register("prefill_saved_seconds", "Time that computing what was cached took when it was stored", saved);
        self.gauge("pinned_tokens", "Tokens of prefixes that an operator has pinned", now.pinned_tokens as u64);
    }

    fn ram(&mut self, stats: &Stats) {
        self.gauge("ram_held_bytes", "RAM in use that cannot be evicted now", stats.held_bytes);
        self.counter("ram_rejections", "Stores refused: too large, or everything pinned", stats.rejections);
    }

    /// What each tier has, by its name: `ram`, and those behind it.
    fn tiers(&mut self, stats: &Stats) {
        let ram = |value: u64| std::iter::once(("ram".to_owned(), value));
        let behind =
            |value: fn(&TierStats) -> u64| stats.tiers.iter().map(move |tier| (tier.name.clone(), value(tier)));
        let used = ram(stats.used_bytes).chain(behind(|tier| tier.used_bytes));
        self.gauges("tier_used_bytes", "What a tier takes, RAM in whole pages", used);
        let capacity = ram(stats.capacity_bytes).chain(behind(|tier| tier.capacity_bytes));
        self.gauges("tier_capacity_bytes", "The cap of a tier", capacity);
        let entries = ram(stats.entries).chain(behind(|tier| tier.entries));
        self.gauges("tier_entries", "Blocks in a tier", entries);
        let evictions = ram(stats.evictions).chain(behind(|tier| tier.evictions));
        self.counters("tier_evictions", "Blocks that a tier has evicted", evictions);
        self.gauges("tier_queued_bytes", "Bytes that wait to be written", behind(|tier| tier.queued_bytes));
        self.gauges(
            "tier_failing",
            "1 while a tier fails and is tried again ever more seldom",
            behind(|tier| tier.failing.into()),
        );
        let dropped = behind(|tier| tier.dropped_total);
        self.counters("tier_dropped", "Blocks not written: the queue was full, or the tier failed", dropped);
        self.counters("tier_written_bytes", "Bytes of blocks written", behind(|tier| tier.written_bytes_total));
        let saved = behind(TierStats::saved_bytes_total);
        self.counters("tier_codec_saved_bytes", "Bytes that codecs have spared of what was written", saved);
        self.counters("tier_read_bytes", "Bytes of blocks read", behind(|tier| tier.read_bytes_total));
        self.errors(&stats.tiers);
    }

    fn kv_events(&mut self, counts: KvEventsCounts) {
        self.counter("kv_events_published", "Batches of events about blocks, for routers", counts.published_total);
        let help = "Batches of events not sent, because readers had left too much unread";
        self.counter("kv_events_dropped", help, counts.dropped_total);
        self.counter("kv_events_cut_off", "How often readers were cut off for that", counts.cut_off_total);
        self.counter("kv_events_replays", "Requests for events that were missed", counts.replays_total);
    }

    fn errors(&mut self, tiers: &[TierStats]) {
        let errors = Family::<[(&'static str, String); 2], Counter>::default();
        for tier in tiers {
            let kinds = [
                ("read", tier.read_errors_total),
                ("write", tier.write_errors_total),
                ("timeout", tier.timeouts_total),
                ("damaged", tier.damaged_total),
            ];
            for (kind, count) in kinds {
                errors.get_or_create(&[("tier", tier.name.clone()), ("kind", kind.to_owned())]).inc_by(count);
            }
        }
        self.0.register("tier_errors", "Reads and writes that failed or took too long, and records damaged", errors);
    }

    fn gauges(&mut self, name: &str, help: &str, values: impl Iterator<Item = (String, u64)>) {
        let gauges = Family::<[(&'static str, String); 1], Gauge<u64, AtomicU64>>::default();
        for (tier, value) in values {
            gauges.get_or_create(&[("tier", tier)]).set(value);
        }
        self.0.register(name, help, gauges);
    }

    fn counters(&mut self, name: &str, help: &str, values: impl Iterator<Item = (String, u64)>) {
        let counters = Family::<[(&'static str, String); 1], Counter>::default();
        for (tier, value) in values {
            counters.get_or_create(&[("tier", tier)]).inc_by(value);
        }
        self.0.register(name, help, counters);
    }

    fn gauge(&mut self, name: &str, help: &str, value: u64) {
        let gauge = Gauge::<u64, AtomicU64>::default();
        gauge.set(value);
        self.0.register(name, help, gauge);
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) {
        let counter = Counter::<u64, AtomicU64>::default();
        counter.inc_by(value);
        self.0.register(name, help, counter);
    }
}

fn pairs() -> impl Iterator<Item = (Endpoint, Outcome)> {
    Endpoint::ALL.into_iter().flat_map(|endpoint| Outcome::ALL.map(|outcome| (endpoint, outcome)))
}

fn request_labels(endpoint: Endpoint, outcome: Outcome) -> [Label; 2] {
    [("endpoint", endpoint.name()), ("outcome", outcome.name())]
}

fn prompt_label(warm: bool) -> [Label; 1] {
    [("prompt", if warm { "warm" } else { "cold" })]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::Value;

    use super::*;
    use crate::served::tests::served;

    fn now(stats: Stats) -> Now<'static> {
        Now {
            model: "m",
            uptime: Duration::from_secs(7),
            stats,
            running: 1,
            waiting: 2,
            parallel: 3,
            queue: 4,
            rejected: 5,
            pinned_tokens: 6,
            kv_events: Some(KvEventsCounts::default()),
        }
    }

    #[test]
    fn what_requests_did_is_on_the_page() {
        let metrics = metrics_of(&["ram", "disk", "redis"]);
        metrics.observe(&served(32, 16, 5));
        metrics.observe(&Served { outcome: Outcome::Cancelled, ttft: None, ..served(32, 0, 0) });
        let totals = metrics.tokens();
        let given: Vec<_> = totals.tiers.iter().map(|tier| (tier.name.as_str(), tier.tokens)).collect();
        assert_eq!((given, totals.computed), (vec![("ram", 16), ("disk", 5), ("redis", 0)], 11));
        assert_eq!((totals.cached(), totals.requested()), (21, 32));
        assert_eq!(metrics.requests(&[Outcome::Stop, Outcome::Length]), 1);
        assert_eq!(metrics.requests(&[Outcome::Cancelled]), 1);
        let text = metrics.text(&now(Stats::default())).unwrap();
        for line in [
            "kvkeep_prompt_tokens_total{tier=\"ram\"} 16",
            "kvkeep_prompt_tokens_total{tier=\"redis\"} 0",
            "kvkeep_prompt_tokens_total{tier=\"computed\"} 11",
            "kvkeep_completion_tokens_total 6",
            "kvkeep_requests_total{endpoint=\"chat\",outcome=\"stop\"} 1",
            "kvkeep_requests_total{endpoint=\"warm\",outcome=\"failed\"} 0",
            "kvkeep_time_to_first_token_seconds_count{prompt=\"warm\"} 1",
            "kvkeep_time_to_first_token_seconds_count{prompt=\"cold\"} 0",
            "kvkeep_queue_time_seconds_count 2",
            "kvkeep_prefill_seconds_count 1",
            "kvkeep_requests_rejected_total 5",
            "kvkeep_uptime_seconds 7.0",
            "# EOF",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        assert!(text.contains("kvkeep_build_info{version="), "{text}");
    }

    fn metrics_of(tiers: &[&str]) -> Metrics {
        Metrics::new(tiers.iter().map(|name| (*name).to_owned()))
    }

    /// What a store elsewhere gave was counted as the disk's.
    #[test]
    fn tokens_are_counted_under_the_name_of_the_tier_that_gave_them() {
        let metrics = metrics_of(&["ram", "redis"]);
        metrics.observe(&Served { tiers: vec![("ram".to_owned(), 8), ("redis".to_owned(), 16)], ..served(32, 0, 0) });
        let text = metrics.text(&now(Stats::default())).unwrap();
        assert!(text.contains("kvkeep_prompt_tokens_total{tier=\"redis\"} 16"), "{text}");
        assert!(!text.contains("kvkeep_prompt_tokens_total{tier=\"disk\"}"), "{text}");
    }

    fn with_tiers(names: &[&str]) -> Stats {
        let mut stats = Stats::default();
        stats.tiers = names
            .iter()
            .map(|name| {
                let mut tier = TierStats::default();
                (tier.name, tier.entries) = ((*name).to_owned(), 7);
                tier
            })
            .collect();
        stats
    }

    /// The page knew a tier called disk, and no other.
    #[test]
    fn every_tier_is_on_the_page_under_its_name_and_no_other() {
        let text = metrics_of(&["ram"]).text(&now(with_tiers(&["disk", "redis"]))).unwrap();
        for line in [
            "kvkeep_tier_entries{tier=\"ram\"} 0",
            "kvkeep_tier_entries{tier=\"disk\"} 7",
            "kvkeep_tier_entries{tier=\"redis\"} 7",
            "kvkeep_tier_errors_total{tier=\"redis\",kind=\"timeout\"} 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        let without = metrics_of(&["ram"]).text(&now(Stats::default())).unwrap();
        assert!(!without.contains("kvkeep_tier_entries{tier=\"disk\"}"), "{without}");
    }

    /// Names of all series on a page with a disk tier.
    fn series() -> BTreeSet<String> {
        let text = metrics_of(&["ram"]).text(&now(with_tiers(&["disk"]))).unwrap();
        let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
        let named = types.map(|(name, kind)| match kind {
            "counter" => format!("{name}_total"),
            "info" => format!("{name}_info"),
            "histogram" => format!("{name}_bucket"),
            _ => name.to_owned(),
        });
        named.collect()
    }

    #[test]
    fn the_dashboard_for_grafana_shows_every_figure_and_no_other() {
        let text = include_str!("../../../docs/grafana/kvkeep.json");
        let dashboard: Value = serde_json::from_str(text).unwrap();
        let panels = dashboard["panels"].as_array().unwrap();
        let ids: BTreeSet<_> = panels.iter().map(|panel| panel["id"].as_u64().unwrap()).collect();
        assert_eq!(ids.len(), panels.len());
        let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().into_iter().flatten());
        let words = targets.flat_map(|target| {
            let expression = target["expr"].as_str().unwrap();
            expression
                .split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
                .filter(|word| word.starts_with("kvkeep_"))
        });
        assert_eq!(words.map(str::to_owned).collect::<BTreeSet<_>>(), series());
    }
}
