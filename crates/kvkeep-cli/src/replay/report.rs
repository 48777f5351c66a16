//! Results as one JSON object, and as tables for people.

use anyhow::Result;
use comfy_table::{Attribute, Cell, CellAlignment};
use serde::Serialize;

use super::trace::Trace;
use super::{Answer, ReplayOptions, Row};
use crate::style;

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Results<'a> {
    results: &'a [Row],
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    targets: &'a [Answer],
}

pub(super) fn print(traces: &[Trace], rows: &[Row], answers: &[Answer], options: &ReplayOptions) -> Result<()> {
    if options.json {
        return style::say(&serde_json::to_string_pretty(&Results { results: rows, targets: answers })?);
    }
    for trace in traces {
        let of_trace: Vec<&Row> = rows.iter().filter(|row| row.trace == trace.name).collect();
        style::say(&format!(
            "{}: {} requests, {} blocks of {} tokens, {} of them different",
            trace.name,
            trace.requests.len(),
            trace.blocks(),
            trace.block_tokens,
            trace.different_blocks()
        ))?;
        style::say(&table(&of_trace))?;
    }
    for answer in answers {
        style::say(&sentence(answer))?;
    }
    if options.bytes_per_token.is_none() && (options.disk_capacity.is_some() || !answers.is_empty()) {
        style::say("Sizes are in blocks; --bytes-per-token shows bytes.")?;
    }
    Ok(())
}

fn table(rows: &[&Row]) -> String {
    let disk = rows.iter().any(|row| row.disk_capacity_blocks > 0);
    let saved = rows.iter().any(|row| row.prefill_seconds_saved.is_some());
    let coded = rows.iter().any(|row| row.codec != "raw");
    let mut head = vec!["capacity", "policy"];
    if coded {
        head.push("codec");
    }
    head.extend(["blocks", "tokens", "optimum", "unbounded"]);
    if disk {
        head.extend(["admission", "from disk", "written"]);
    }
    if saved {
        // Decoding is taken off where it is known what a token takes.
        head.push(if coded { "prefill saved, net" } else { "prefill saved" });
    }
    head.push("policy memory");
    let mut table = style::table();
    table.set_header(head.into_iter().map(|text| Cell::new(text).add_attribute(Attribute::Bold)));
    let mut before = None;
    let best = |row: &Row| {
        let same = rows.iter().filter(|other| other.capacity_blocks == row.capacity_blocks);
        same.map(|other| other.block_hit_rate).fold(0.0, f64::max)
    };
    let mut sorted = rows.to_vec();
    sorted.sort_by_key(|row| row.capacity_blocks);
    for row in sorted {
        let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
        let first = before.replace(row.capacity_blocks) != Some(row.capacity_blocks);
        let capacity = if first { row.capacity_blocks.to_string() } else { String::new() };
        let mut rate = right(percent(row.block_hit_rate));
        if row.block_hit_rate >= best(row) {
            rate = rate.add_attribute(Attribute::Bold);
        }
        let mut cells = vec![right(capacity), Cell::new(row.policy)];
        if coded {
            cells.push(Cell::new(&row.codec));
        }
        cells.extend([
            rate,
            right(percent(row.token_hit_rate)),
            right(if first { percent(row.optimum_block_hit_rate) } else { String::new() }),
            right(if first { percent(row.unbounded_block_hit_rate) } else { String::new() }),
        ]);
        if disk {
            let written = row.disk_written_bytes.map_or(format!("{} blocks", row.disk_written_blocks), size);
            let rule = Cell::new(row.admission.as_deref().unwrap_or_default());
            cells.extend([rule, right(percent(row.disk_block_hit_rate)), right(written)]);
        }
        if let Some(seconds) = row.prefill_seconds_saved {
            let net = seconds - row.decode_seconds.unwrap_or(0.0);
            cells.push(right(format!("{net:.0} s")));
        }
        cells.push(right(format!("{:.0} B/block", row.policy_bytes_per_block)));
        table.add_row(cells);
    }
    table.to_string()
}

fn sentence(answer: &Answer) -> String {
    let Answer { trace, target_block_hit_rate, unbounded_block_hit_rate, .. } = answer;
    let policy = match answer.codec.as_str() {
        "raw" => answer.policy.to_owned(),
        codec => format!("{} and {codec}", answer.policy),
    };
    let target = percent(*target_block_hit_rate);
    let amount = |blocks: u32, bytes: Option<u64>| match bytes {
        Some(bytes) => format!("{} ({blocks} blocks)", size(bytes)),
        None => format!("{blocks} blocks"),
    };
    match answer.ram_blocks {
        None => format!(
            "{trace}, {policy}: no capacity reaches {target}; an unbounded cache reaches {}",
            percent(*unbounded_block_hit_rate)
        ),
        Some(ram) if answer.disk_blocks == 0 => {
            format!("{trace}, {policy}: {target} takes {} of RAM", amount(ram, answer.ram_bytes))
        }
        Some(ram) => format!(
            "{trace}, {policy}: {target} takes {} of RAM with {} of disk",
            amount(ram, answer.ram_bytes),
            amount(answer.disk_blocks, answer.disk_bytes)
        ),
    }
}

fn percent(rate: f64) -> String {
    format!("{:.1}%", rate * 100.0)
}

fn size(bytes: u64) -> String {
    let gib = crate::stats::float(usize::try_from(bytes).unwrap_or(usize::MAX)) / f64::from(1 << 30);
    if gib >= 10.0 { format!("{gib:.0} GiB") } else { format!("{gib:.2} GiB") }
}
