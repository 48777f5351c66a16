//! `kvkeep verify`: reads every byte that is stored and says what it found.
//!
//! Damage is told from what only looks like it: a segment without an index and a torn record
//! are what a killed process leaves behind, foreign files are not ours. Both harm nothing.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Result;
use comfy_table::{Attribute, Cell, CellAlignment, Color};
use kvkeep::{Archive, ManifestState, RecordInfo, RecordState, Verified};
use serde::Serialize;

use super::{count, hex, open, record_bar, size};
use crate::cli::{DAMAGED, DirOptions};
use crate::stats::ratio;
use crate::style;

/// More damaged records than this are not listed one by one in the table.
const LISTED: usize = 20;

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    dir: String,
    /// Is every byte what it was?
    whole: bool,
    encrypted: bool,
    /// `whole`, `missing`, `damaged` or `unreadable`.
    manifest: &'static str,
    segments: Segments,
    records: Records,
    /// Of good records, whatever their state.
    payload_bytes: u64,
    /// On the disk, as the cap counts it.
    used_bytes: u64,
    /// Names of files that are not the disk tier's.
    foreign: Vec<String>,
    damaged: Vec<Damaged>,
    /// Records that the disk fails to read.
    unreadable: Vec<Damaged>,
    seconds: f64,
    bytes_per_s: f64,
}

#[derive(Debug, Serialize)]
struct Segments {
    read: u64,
    /// Of these, without an index: the cache was not closed.
    unsealed: u64,
    damaged: u64,
    /// The disk fails to read what says which records lie there.
    unreadable: u64,
    missing: u64,
}

#[derive(Debug, Serialize)]
struct Records {
    good: u64,
    damaged: u64,
    unreadable: u64,
    /// Being written when the process ended, and not durable.
    torn: u64,
    /// Of the good ones: of a codec that this release does not know.
    unknown_codec: u64,
    /// Good or damaged: a cache that opens the directory finds it.
    live: usize,
    expired: usize,
    /// Replaced, removed, or in doubt because of what is lost.
    gone: usize,
}

#[derive(Debug, Serialize)]
struct Damaged {
    namespace: String,
    key: String,
    layer: u32,
    segment: u64,
    page: u32,
    payload_bytes: u64,
}

pub(crate) fn run(options: &DirOptions) -> Result<ExitCode> {
    let archive = open(options)?;
    let bar = record_bar(archive.records().len() as u64, "verifying");
    let begin = Instant::now();
    let verified = archive.verify(|done| bar.set_position(done));
    bar.finish_and_clear();
    let report = Report::of(&options.dir.display().to_string(), &archive, &verified, begin.elapsed());
    style::say(&if options.json { serde_json::to_string_pretty(&report)? } else { report.text() })?;
    Ok(if report.whole { ExitCode::SUCCESS } else { ExitCode::from(DAMAGED) })
}

impl Report {
    fn of(dir: &str, archive: &Archive, verified: &Verified, took: Duration) -> Self {
        let in_state = |state| archive.records().iter().filter(|record| record.state == state).count();
        let (damaged, unreadable) = (verified.damaged.len() as u64, verified.unreadable.len() as u64);
        #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
        let bytes = verified.payload_bytes as f64;
        Self {
            dir: dir.to_owned(),
            whole: verified.is_whole(),
            encrypted: archive.is_encrypted(),
            manifest: manifest_name(verified.manifest),
            segments: Segments {
                read: verified.segments,
                unsealed: verified.unsealed_segments,
                damaged: verified.damaged_segments,
                unreadable: verified.unreadable_segments,
                missing: verified.lost_segments,
            },
            records: Records {
                good: verified.records - damaged - unreadable,
                damaged,
                unreadable,
                torn: verified.torn_records,
                unknown_codec: verified.unknown_codec,
                live: in_state(RecordState::Live),
                expired: in_state(RecordState::Expired),
                gone: in_state(RecordState::Gone),
            },
            payload_bytes: verified.payload_bytes,
            used_bytes: archive.used_bytes(),
            foreign: verified.foreign.clone(),
            damaged: verified.damaged.iter().map(Damaged::of).collect(),
            unreadable: verified.unreadable.iter().map(Damaged::of).collect(),
            seconds: took.as_secs_f64(),
            bytes_per_s: ratio(bytes, took.as_secs_f64()),
        }
    }

    /// For people.
    fn text(&self) -> String {
        let Segments { read, unsealed, damaged, unreadable, missing } = self.segments;
        let records = &self.records;
        let mut table = style::table();
        let mut row = |what: &str, number: u64, bad: bool, meaning: String| {
            let color = if bad && number > 0 { Color::Red } else { Color::Reset };
            let number = Cell::new(count(number)).set_alignment(CellAlignment::Right).fg(color);
            table.add_row(vec![Cell::new(what), number.add_attribute(Attribute::Bold), Cell::new(meaning)]);
        };
        row("segments", read, false, "read".to_owned());
        row("", unsealed, false, "of these without an index: the cache was not closed, which harms nothing".to_owned());
        row("", damaged, true, "damaged: something durable of them is lost".to_owned());
        row("", unreadable, true, "not to be read: the disk fails where it says what lies there".to_owned());
        row("", missing, true, "missing".to_owned());
        let states = format!(
            "good, {}: of all records {} live, {} expired, {} replaced or removed",
            size(self.payload_bytes),
            count(records.live as u64),
            count(records.expired as u64),
            count(records.gone as u64)
        );
        row("records", records.good, false, states);
        row("", records.damaged, true, "damaged: each is a miss".to_owned());
        row("", records.unreadable, true, "not to be read: the disk fails".to_owned());
        if records.unknown_codec > 0 {
            let meaning = "of these of a codec that this release does not know: misses to it";
            row("", records.unknown_codec, false, meaning.to_owned());
        }
        row("", records.torn, false, "torn: not durable when the process ended, left out".to_owned());
        row("files", self.foreign.len() as u64, false, format!("foreign, left alone {}", self.foreign_names()));
        let encrypted = if self.encrypted { "encrypted" } else { "not encrypted" };
        let rate = self.bytes_per_s / 1e9;
        let time = format!("checked in {:.1} s, {rate:.2} GB/s", self.seconds);
        let head = format!("{}: {} on the disk, {encrypted}, {time}", self.dir, size(self.used_bytes));
        let verdict = if self.whole { "Whole: every byte is what was stored.".to_owned() } else { self.damage() };
        format!("{head}\n{table}\n{verdict}")
    }

    fn foreign_names(&self) -> String {
        let names: Vec<&str> = self.foreign.iter().take(3).map(String::as_str).collect();
        let more = if self.foreign.len() > names.len() { ", …" } else { "" };
        if names.is_empty() { String::new() } else { format!("({}{more})", names.join(", ")) }
    }

    fn manifest_words(&self) -> String {
        let then = match self.manifest {
            "whole" => return String::new(),
            "unreadable" => "a cache opens the directory once it can be read, or once the file MANIFEST is removed",
            _ => "the segments speak for themselves, and a cache that opens the directory writes a new one",
        };
        format!("\n  the manifest is {}: {then}", self.manifest)
    }

    fn damage(&self) -> String {
        let line = |record: &Damaged| {
            let name = |text: &str| text.get(..12).unwrap_or(text).to_owned();
            format!(
                "\n  segment {:016x} page {}: key {} layer {} of namespace {}",
                record.segment,
                record.page,
                name(&record.key),
                record.layer,
                name(&record.namespace)
            )
        };
        let head = "DAMAGED: to a cache that opens this directory, what is damaged or cannot be read is a miss.";
        let mut text = format!("{head}{}", self.manifest_words());
        let lost = self.damaged.iter().chain(&self.unreadable);
        lost.take(LISTED).for_each(|record| text += &line(record));
        let more = (self.damaged.len() + self.unreadable.len()).saturating_sub(LISTED);
        if more > 0 {
            text += &format!("\n  and {more} more: --json lists all");
        }
        text
    }
}

fn manifest_name(state: ManifestState) -> &'static str {
    match state {
        ManifestState::Whole => "whole",
        ManifestState::Missing => "missing",
        ManifestState::Unreadable => "unreadable",
        _ => "damaged",
    }
}

impl Damaged {
    fn of(record: &RecordInfo) -> Self {
        Self {
            namespace: hex(record.namespace.as_bytes()),
            key: hex(&record.key),
            layer: record.layer,
            segment: record.segment,
            page: record.page,
            payload_bytes: record.stored_bytes,
        }
    }
}
