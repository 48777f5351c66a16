//! `kvkeep stats`: what a server and its cache are like now.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use comfy_table::{Cell, CellAlignment};
use serde::Deserialize;
use serde_json::json;

use super::{Client, Namespace, Namespaces, ServerOptions, TokensIn, tier_name};
use crate::stats::{float, ratio};
use crate::style::{self, count, size, span};

/// Shows what a running server and its cache are like now.
#[derive(Debug, Args)]
pub(crate) struct StatsOptions {
    #[command(flatten)]
    server: ServerOptions,
}

#[derive(Debug, Deserialize)]
struct Stats {
    model: String,
    uptime_seconds: f64,
    tokens: Tokens,
    prefill_seconds_saved: f64,
    ttft_ms: Ttft,
    ram: Tier,
    tiers: Vec<TierBehind>,
    requests: Requests,
}

#[derive(Debug, Deserialize)]
struct Tokens {
    requested: u64,
    tiers: Vec<TokensIn>,
    computed: u64,
}

#[derive(Debug, Deserialize)]
struct Ttft {
    cold: Times,
    warm: Times,
    total: f64,
    total_if_cold: f64,
}

#[derive(Debug, Deserialize)]
struct Times {
    count: u64,
    p50: Option<f64>,
    p99: Option<f64>,
}

#[derive(Debug, Deserialize)]
struct Tier {
    used_bytes: u64,
    capacity_bytes: u64,
    entries: u64,
    evictions: u64,
}

#[derive(Debug, Deserialize)]
struct TierBehind {
    name: String,
    #[serde(flatten)]
    tier: Tier,
    failing: bool,
    damaged: u64,
    encrypted: bool,
    codec: String,
    codec_ratio: f64,
    saved_bytes: u64,
}

#[derive(Debug, Deserialize)]
struct Requests {
    running: u64,
    queued: u64,
    served: u64,
    cancelled: u64,
    rejected: u64,
    failed: u64,
}

pub(crate) fn run(options: &StatsOptions) -> Result<ExitCode> {
    let client = Client::new(&options.server)?;
    let (stats, namespaces) = (client.get("/cache/stats")?, client.get("/cache/namespaces")?);
    if options.server.json {
        let both = json!({"stats": stats, "namespaces": namespaces.get("namespaces")});
        style::say(&serde_json::to_string_pretty(&both)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let stats: Stats = client.shaped("/cache/stats", &stats)?;
    let namespaces: Namespaces = client.shaped("/cache/namespaces", &namespaces)?;
    style::say(&stats.table())?;
    if !namespaces.namespaces.is_empty() {
        style::say(&namespaces.table())?;
    }
    Ok(ExitCode::SUCCESS)
}

impl Stats {
    fn table(&self) -> String {
        let mut table = style::table();
        let mut row = |name: &str, value: String| {
            table.add_row([name.to_owned(), value]);
        };
        row("model", format!("{}, up for {}", self.model, span(ms(self.uptime_seconds))));
        row("tokens", self.tokens.words());
        row("saved", format!("{:.1} s of prefill", self.prefill_seconds_saved));
        row("first tokens", self.ttft_ms.words());
        row("first token, cold", self.ttft_ms.cold.words());
        row("first token, warm", self.ttft_ms.warm.words());
        row("RAM", self.ram.words());
        for behind in &self.tiers {
            row(&behind.name, behind.words());
        }
        row("requests", self.requests.words());
        table.to_string()
    }
}

impl Tokens {
    fn words(&self) -> String {
        let percent = |part| 100.0 * ratio(wide(part), wide(self.requested));
        let from = |tier: &TokensIn| format!("{:.1}% from {}, ", percent(tier.tokens), tier_name(&tier.name));
        let tiers: String = self.tiers.iter().map(from).collect();
        format!("{} asked for: {tiers}{:.1}% computed", count(self.requested), percent(self.computed))
    }
}

impl Ttft {
    fn words(&self) -> String {
        let (total, if_cold) = (self.total, self.total_if_cold);
        if total <= 0.0 {
            return "none yet".to_owned();
        }
        let (all, cold) = (total / 1e3, if_cold / 1e3);
        format!("{:.1} times sooner: {all:.1} s in all, {cold:.1} s if nothing had been cached", if_cold / total)
    }
}

impl Times {
    fn words(&self) -> String {
        match (self.p50, self.p99) {
            (Some(p50), Some(p99)) => {
                format!("p50 {p50:.0} ms, p99 {p99:.0} ms, of the last {}", count(self.count))
            }
            _ => "none yet".to_owned(),
        }
    }
}

impl Tier {
    fn words(&self) -> String {
        let (used, cap) = (size(self.used_bytes), size(self.capacity_bytes));
        format!("{used} of {cap} in {} blocks, {} evicted", count(self.entries), count(self.evictions))
    }
}

impl TierBehind {
    fn words(&self) -> String {
        let encrypted = if self.encrypted { ", encrypted" } else { "" };
        let failing = if self.failing { ", FAILING" } else { "" };
        let damaged = if self.damaged > 0 { format!(", {} damaged", self.damaged) } else { String::new() };
        let codec = match self.codec.as_str() {
            "raw" => String::new(),
            codec => format!(", {codec}: {:.2}x, {} saved", self.codec_ratio, size(self.saved_bytes)),
        };
        format!("{}{codec}{encrypted}{damaged}{failing}", self.tier.words())
    }
}

impl Requests {
    fn words(&self) -> String {
        let Self { running, queued, served, cancelled, rejected, failed } = self;
        let [served, cancelled] = [served, cancelled].map(|number| count(*number));
        let [rejected, failed] = [rejected, failed].map(|number| count(*number));
        format!(
            "{running} running, {queued} waiting; {served} served, {cancelled} cancelled, {rejected} rejected, {failed} \
             failed"
        )
    }
}

impl Namespaces {
    fn table(&self) -> String {
        let mut table = style::table();
        let tiers = self.namespaces.first().map_or(&[][..], |namespace| &namespace.tiers);
        let columns = tiers.iter().flat_map(|tier| [tier_name(&tier.name), "blocks"]);
        table.set_header(["namespace", "whose"].into_iter().chain(columns));
        for namespace in &self.namespaces {
            let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
            let whose = [Cell::new(namespace.id.get(..12).unwrap_or(&namespace.id)), Cell::new(namespace.whose())];
            let amounts = namespace.tiers.iter().flat_map(|of| [right(size(of.bytes)), right(count(of.entries))]);
            table.add_row(whose.into_iter().chain(amounts));
        }
        table.to_string()
    }
}

impl Namespace {
    fn whose(&self) -> String {
        let who = match (&self.tenant, self.known) {
            (Some(tenant), _) => tenant,
            (None, true) => "operator",
            (None, false) => "unknown",
        };
        format!("{who}{}", if self.cache_salt { ", with a salt" } else { "" })
    }
}

fn wide(number: u64) -> f64 {
    float(usize::try_from(number).unwrap_or(usize::MAX))
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates, and is never negative")]
fn ms(seconds: f64) -> u64 {
    (seconds * 1e3) as u64
}
