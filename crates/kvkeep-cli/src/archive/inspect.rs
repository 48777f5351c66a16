//! `kvkeep inspect`: what lies in a directory, namespace by namespace, or record by record.
//!
//! Only headers are read: sizes and ages are as the indexes say, no payload is checked.

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;

use anyhow::Result;
use comfy_table::{Attribute, Cell, CellAlignment, Color};
use kvkeep::{Archive, KvLayout, RecordInfo};
use serde::Serialize;

use super::{block_of, chosen, count, hex, layout_words, now_ms, open, size, span};
use crate::cli::InspectOptions;
use crate::style;

/// Records that are listed unless `--limit` says otherwise.
const LISTED: usize = 20;

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    dir: String,
    encrypted: bool,
    /// On the disk, as the cap counts it.
    used_bytes: u64,
    records: usize,
    namespaces: Vec<Group>,
    /// With `--records`.
    #[serde(skip_serializing_if = "Option::is_none")]
    listed: Option<Vec<Line>>,
}

/// What can be found of a namespace.
#[derive(Debug, Default, Serialize)]
struct Group {
    namespace: String,
    kind: &'static str,
    /// Of blocks: the model's name, cut off at 128 bytes.
    model: Option<String>,
    layout: Option<Layout>,
    #[serde(skip)]
    words: String,
    /// Blocks, or layers of named prefixes.
    entries: u64,
    /// Of blocks.
    tokens: u64,
    /// Of a named cache: prefix texts with at least one layer.
    prefixes: usize,
    /// On the disk, as their codecs made them.
    payload_bytes: u64,
    /// Before that.
    raw_bytes: u64,
    /// What it took to compute all of it, as far as anybody said.
    compute_s: f64,
    oldest_age_ms: u64,
    newest_age_ms: u64,
    /// Entries that expire, and when the first of them does.
    expiring: u64,
    next_expiry_ms: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Layout {
    layers: usize,
    kv_heads: usize,
    k_head_dim: usize,
    v_head_dim: usize,
    dtype: &'static str,
    block_tokens: usize,
}

/// One record.
#[derive(Debug, Serialize)]
struct Line {
    namespace: String,
    key: String,
    layer: u32,
    kind: &'static str,
    payload_bytes: u64,
    raw_bytes: u64,
    /// Its number; 0 for a record that is as it was.
    codec: u8,
    age_ms: u64,
    expires_in_ms: Option<u64>,
    compute_ms: Option<f64>,
    segment: u64,
    page: u32,
}

pub(crate) fn run(options: &InspectOptions) -> Result<ExitCode> {
    let archive = open(&options.dir)?;
    let now_ms = now_ms()?;
    let records: Vec<&RecordInfo> = archive.records().iter().filter(|record| chosen(record, &options.select)).collect();
    let limit = options.select.limit.unwrap_or(if options.dir.json { usize::MAX } else { LISTED });
    let report = Report {
        dir: options.dir.dir.display().to_string(),
        encrypted: archive.is_encrypted(),
        used_bytes: archive.used_bytes(),
        records: records.len(),
        namespaces: groups(&archive, &records, now_ms),
        listed: options.records.then(|| records.iter().take(limit).map(|record| Line::of(record, now_ms)).collect()),
    };
    style::say(&if options.dir.json { serde_json::to_string_pretty(&report)? } else { report.text() })?;
    Ok(ExitCode::SUCCESS)
}

/// The largest first.
fn groups(archive: &Archive, records: &[&RecordInfo], now_ms: u64) -> Vec<Group> {
    let mut by_namespace = BTreeMap::<(NamespaceBytes, bool), Vec<&RecordInfo>>::new();
    for record in records {
        by_namespace.entry((*record.namespace.as_bytes(), record.is_block)).or_default().push(record);
    }
    let groups = by_namespace.values().map(|records| Group::of(archive, records, now_ms));
    let mut groups: Vec<_> = groups.collect();
    groups.sort_by_key(|group| std::cmp::Reverse(group.payload_bytes));
    groups
}

type NamespaceBytes = [u8; 32];

impl Group {
    fn of(archive: &Archive, records: &[&RecordInfo], now_ms: u64) -> Self {
        let mut group = Self { newest_age_ms: u64::MAX, ..Self::default() };
        for record in records {
            group.add(record, now_ms);
        }
        let prefixes: BTreeSet<[u8; 32]> = records.iter().filter(|r| !r.is_block).map(|r| r.key).collect();
        group.prefixes = prefixes.len();
        // A header that is damaged or cannot be read does not say what the others do.
        for record in records.iter().filter(|record| record.is_block) {
            if let Some((layout, model)) = block_of(archive.contents(record).ok().flatten()) {
                group.tokens = group.entries * layout.block_tokens() as u64;
                group.words = layout_words(&layout);
                group.layout = Some(Layout::of(&layout));
                group.model = Some(model);
                break;
            }
        }
        group
    }

    fn add(&mut self, record: &RecordInfo, now_ms: u64) {
        let age_ms = now_ms.saturating_sub(record.stored_at_ms);
        if self.entries == 0 {
            self.namespace = hex(record.namespace.as_bytes());
            self.kind = kind(record);
        }
        self.entries += 1;
        self.payload_bytes += record.stored_bytes;
        self.raw_bytes += record.raw_bytes;
        self.compute_s += record.compute_time.unwrap_or_default().as_secs_f64();
        self.oldest_age_ms = self.oldest_age_ms.max(age_ms);
        self.newest_age_ms = self.newest_age_ms.min(age_ms);
        if let Some(expires_at_ms) = record.expires_at_ms {
            let left_ms = expires_at_ms.saturating_sub(now_ms);
            self.expiring += 1;
            self.next_expiry_ms = Some(self.next_expiry_ms.map_or(left_ms, |next_ms| next_ms.min(left_ms)));
        }
    }

    fn about(&self) -> String {
        match &self.model {
            Some(model) => format!("{model}\n{}", self.words),
            None if self.prefixes > 0 => format!("{} prefix texts", count(self.prefixes as u64)),
            None => "unknown: no header is whole".to_owned(),
        }
    }
}

impl Layout {
    fn of(layout: &KvLayout) -> Self {
        Self {
            layers: layout.layers(),
            kv_heads: layout.kv_heads(),
            k_head_dim: layout.k_head_dim(),
            v_head_dim: layout.v_head_dim(),
            dtype: layout.dtype().name(),
            block_tokens: layout.block_tokens(),
        }
    }
}

impl Line {
    fn of(record: &RecordInfo, now_ms: u64) -> Self {
        Self {
            namespace: hex(record.namespace.as_bytes()),
            key: hex(&record.key),
            layer: record.layer,
            kind: kind(record),
            payload_bytes: record.stored_bytes,
            raw_bytes: record.raw_bytes,
            codec: record.codec.0,
            age_ms: now_ms.saturating_sub(record.stored_at_ms),
            expires_in_ms: record.expires_at_ms.map(|at_ms| at_ms.saturating_sub(now_ms)),
            compute_ms: record.compute_time.map(|time| time.as_secs_f64() * 1e3),
            segment: record.segment,
            page: record.page,
        }
    }
}

fn kind(record: &RecordInfo) -> &'static str {
    if record.is_block { "block" } else { "named" }
}

impl Report {
    /// For people.
    fn text(&self) -> String {
        let encrypted = if self.encrypted { "encrypted" } else { "not encrypted" };
        let used = size(self.used_bytes);
        let head = format!("{}: {used} on the disk, {encrypted}, {} entries", self.dir, count(self.records as u64));
        let mut text = if self.namespaces.is_empty() {
            format!("{head}\nNothing here can be found: no entry was asked for, stored, or left.")
        } else {
            format!("{head}\n{}", self.namespace_table())
        };
        if let Some(listed) = &self.listed {
            text += &format!("\n{}", record_table(listed));
            if listed.len() < self.records {
                text += &format!("\n{} of {} records: --limit N lists more", listed.len(), self.records);
            }
        }
        text
    }

    fn namespace_table(&self) -> comfy_table::Table {
        let mut table = style::table();
        table.set_header(header(&["namespace", "", "entries", "tokens", "size", "computed in", "stored", "expires"]));
        for group in &self.namespaces {
            let expires = match group.next_expiry_ms {
                Some(next_ms) if group.expiring == group.entries => format!("from in {} on", span(next_ms)),
                Some(next_ms) => format!("{} of them, from in {} on", count(group.expiring), span(next_ms)),
                None => "never".to_owned(),
            };
            let tokens = if group.tokens == 0 { String::new() } else { count(group.tokens) };
            let computed = if group.compute_s > 0.0 { format!("{:.1} s", group.compute_s) } else { String::new() };
            table.add_row(vec![
                Cell::new(group.namespace.get(..12).unwrap_or_default()).fg(Color::Cyan),
                Cell::new(group.about()),
                right(count(group.entries)).add_attribute(Attribute::Bold),
                right(tokens),
                right(size(group.payload_bytes)),
                right(computed),
                Cell::new(stored(group.oldest_age_ms, group.newest_age_ms)),
                Cell::new(expires),
            ]);
        }
        table
    }
}

fn stored(oldest_ms: u64, newest_ms: u64) -> String {
    match (span(newest_ms), span(oldest_ms)) {
        (newest, oldest) if newest == oldest => format!("{newest} ago"),
        (newest, oldest) => format!("{newest} to {oldest} ago"),
    }
}

fn record_table(listed: &[Line]) -> comfy_table::Table {
    let mut table = style::table();
    table.set_header(header(&["namespace", "key", "layer", "size", "stored", "expires"]));
    for line in listed {
        let layer = if line.kind == "block" { "all".to_owned() } else { line.layer.to_string() };
        table.add_row(vec![
            Cell::new(line.namespace.get(..12).unwrap_or_default()).fg(Color::Cyan),
            Cell::new(line.key.get(..12).unwrap_or_default()),
            right(layer),
            right(size(line.payload_bytes)),
            right(format!("{} ago", span(line.age_ms))),
            right(line.expires_in_ms.map_or_else(|| "never".to_owned(), |ms| format!("in {}", span(ms)))),
        ]);
    }
    table
}

fn header(names: &[&str]) -> Vec<Cell> {
    names.iter().map(|name| Cell::new(name).add_attribute(Attribute::Bold)).collect()
}

fn right(text: String) -> Cell {
    Cell::new(text).set_alignment(CellAlignment::Right)
}
