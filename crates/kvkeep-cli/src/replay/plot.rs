//! Hit rate against capacity: one panel a trace, one line a policy, the optimum on top. Or against
//! what is written to disk: one panel a trace, one line a policy and capacity, one point a rule.

use std::path::Path;

use anyhow::Result;
use plotters::prelude::*;

use super::Row;
use crate::plot::{Area, Drawn, FONT, INK, legend, panels};

const PANEL_HEIGHT: u32 = 460;
/// Told apart by people who do not tell red from green (Okabe and Ito 2008).
const COLORS: [(&str, RGBColor); 5] = [
    ("lru", RGBColor(213, 94, 0)),
    ("s3fifo", RGBColor(0, 158, 115)),
    ("arc", RGBColor(204, 121, 167)),
    ("lru2", RGBColor(230, 159, 0)),
    ("adaptive", RGBColor(0, 114, 178)),
];

pub(super) fn hit_rates(path: &Path, rows: &[Row]) -> Result<()> {
    by_trace(path, rows, draw)
}

pub(super) fn writes(path: &Path, rows: &[Row]) -> Result<()> {
    by_trace(path, rows, draw_writes)
}

fn by_trace(path: &Path, rows: &[Row], draw: for<'a> fn(&Area<'a>, &str, &[&Row]) -> Drawn<'a>) -> Result<()> {
    let mut traces: Vec<&str> = rows.iter().map(|row| row.trace.as_str()).collect();
    traces.dedup();
    panels(path, PANEL_HEIGHT, &traces, |area, trace| {
        let of_trace: Vec<&Row> = rows.iter().filter(|row| row.trace == **trace).collect();
        draw(area, trace, &of_trace)
    })
}

fn draw<'a>(area: &Area<'a>, trace: &str, rows: &[&Row]) -> Drawn<'a> {
    let capacities = || rows.iter().map(|row| f64::from(row.capacity_blocks));
    let (low, high) = (capacities().fold(f64::INFINITY, f64::min), capacities().fold(1.0, f64::max));
    let top = rows.iter().map(|row| row.unbounded_block_hit_rate.max(row.block_hit_rate)).fold(0.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .margin(16)
        .caption(trace, (FONT, 20, &INK))
        .x_label_area_size(46)
        .y_label_area_size(70)
        .build_cartesian_2d((low * 0.95..high * 1.05 + 1.0).log_scale(), 0.0..(top * 108.0).clamp(1.0, 100.0))?;
    chart
        .configure_mesh()
        .x_desc("capacity (blocks, log scale)")
        .y_desc("block hit rate (%)")
        .axis_desc_style((FONT, 15, &INK))
        .label_style((FONT, 13, &INK))
        .x_label_formatter(&|blocks| tick(*blocks))
        .y_label_formatter(&|rate| format!("{rate:.0}"))
        .y_labels(8)
        .bold_line_style(INK.mix(0.12))
        .light_line_style(TRANSPARENT)
        .draw()?;
    let unbounded = rows.first().map_or(0.0, |row| row.unbounded_block_hit_rate * 100.0);
    chart.draw_series(DashedLineSeries::new([(low, unbounded), (high, unbounded)], 6, 5, INK.mix(0.6).into()))?;
    let best = line(rows.iter().filter(|row| Some(row.policy) == rows.first().map(|first| first.policy)), |row| {
        row.optimum_block_hit_rate
    });
    let mut lines = vec![("optimum", INK, best)];
    for (policy, color) in COLORS {
        let of_policy = line(rows.iter().filter(|row| row.policy == policy), |row| row.block_hit_rate);
        lines.push((policy, color, of_policy));
    }
    for (name, color, points) in lines.into_iter().filter(|(_, _, points)| !points.is_empty()) {
        let width = if name == "adaptive" { 3 } else { 2 };
        chart.draw_series(LineSeries::new(points.iter().copied(), color.stroke_width(width)))?;
        chart
            .draw_series(points.into_iter().map(|point| Circle::new(point, 3, color.filled())))?
            .label(name)
            .legend(move |(x, y)| Rectangle::new([(x, y - 2), (x + 14, y + 2)], color.filled()));
    }
    legend(&mut chart, SeriesLabelPosition::LowerRight)
}

fn draw_writes<'a>(area: &Area<'a>, trace: &str, rows: &[&Row]) -> Drawn<'a> {
    let point = |row: &&Row| (thousands(row.disk_written_blocks), row.block_hit_rate * 100.0);
    let right = rows.iter().map(|row| point(row).0).fold(1.0, f64::max);
    let top = rows.iter().map(|row| point(row).1).fold(1.0, f64::max);
    let disk = rows.first().map_or(0, |row| row.disk_capacity_blocks);
    let mut chart = ChartBuilder::on(area)
        .margin(16)
        .caption(format!("{trace}, {disk} blocks of disk"), (FONT, 20, &INK))
        .x_label_area_size(46)
        .y_label_area_size(70)
        .build_cartesian_2d(0.0..right * 1.18, 0.0..(top * 1.12).min(100.0))?;
    chart
        .configure_mesh()
        .x_desc("blocks written to disk (thousands)")
        .y_desc("block hit rate (%)")
        .axis_desc_style((FONT, 15, &INK))
        .label_style((FONT, 13, &INK))
        .x_label_formatter(&|blocks| format!("{blocks:.0}"))
        .y_label_formatter(&|rate| format!("{rate:.0}"))
        .bold_line_style(INK.mix(0.12))
        .light_line_style(TRANSPARENT)
        .draw()?;
    for (policy, color) in COLORS {
        let mut capacities: Vec<u32> =
            rows.iter().filter(|row| row.policy == policy).map(|row| row.capacity_blocks).collect();
        capacities.dedup();
        for capacity in capacities {
            let mut rules: Vec<&Row> = rows.iter().copied().filter(|row| row.policy == policy).collect();
            rules.retain(|row| row.capacity_blocks == capacity);
            rules.sort_by_key(|row| row.disk_written_blocks);
            chart.draw_series(LineSeries::new(rules.iter().map(point), color.stroke_width(2)))?;
            chart
                .draw_series(rules.iter().map(|row| Circle::new(point(row), 4, color.filled())))?
                .label(format!("{policy}, {capacity} blocks of RAM"))
                .legend(move |(x, y)| Rectangle::new([(x, y - 2), (x + 14, y + 2)], color.filled()));
            // The line rises to the right: there is room below it. A label that would lie on another goes further down.
            let mut placed: Vec<(i32, i32)> = Vec::new();
            for row in &rules {
                let (x, y) = chart.backend_coord(&point(row));
                let is_taken =
                    |down: i32| placed.iter().any(|(px, py)| (x - px).abs() < 90 && (y + down - py).abs() < 16);
                let down = (6..).step_by(4).find(|down| !is_taken(*down)).unwrap_or(6);
                placed.push((x, y + down));
                let rule =
                    Text::new(row.admission.clone().unwrap_or_default(), (8, down), (FONT, 13).into_font().color(&INK));
                chart.draw_series([EmptyElement::at(point(row)) + rule])?;
            }
        }
    }
    legend(&mut chart, SeriesLabelPosition::LowerRight)
}

fn thousands(blocks: u64) -> f64 {
    crate::stats::float(usize::try_from(blocks).unwrap_or(usize::MAX)) / 1e3
}

/// 1, 2 and 5 of each decade: the others run into each other.
pub(super) fn tick(blocks: f64) -> String {
    let text = format!("{blocks:.0}");
    if ["1", "2", "5"].contains(&text.trim_end_matches('0')) { text } else { String::new() }
}

fn line<'r>(rows: impl Iterator<Item = &'r &'r Row>, rate: impl Fn(&Row) -> f64) -> Vec<(f64, f64)> {
    let mut points: Vec<(f64, f64)> = rows.map(|row| (f64::from(row.capacity_blocks), rate(row) * 100.0)).collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    points
}
