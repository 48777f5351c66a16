//! Against the number of nodes: what is found, and what each node moves to and from the store.

use std::path::Path;

use anyhow::Result;
use plotters::prelude::*;

use super::{Routing, Row};
use crate::plot::{Area, Drawn, FONT, INK, legend, panels};

const PANEL_HEIGHT: u32 = 420;

/// Name, color, points.
type Line = (String, RGBColor, Vec<(f64, f64)>);

struct Panel {
    title: String,
    y_desc: String,
    lines: Vec<Line>,
}

pub(super) fn scale(path: &Path, rows: &[Row]) -> Result<()> {
    let mut traces: Vec<&str> = rows.iter().map(|row| row.trace.as_str()).collect();
    traces.dedup();
    let of_trace = |trace: &&str| {
        let rows: Vec<&Row> = rows.iter().filter(|row| row.trace == **trace).collect();
        [found(trace, &rows), moved(trace, &rows)]
    };
    let drawn: Vec<Panel> = traces.iter().flat_map(of_trace).collect();
    panels(path, PANEL_HEIGHT, &drawn, draw)
}

/// Told apart by people who do not tell red from green (Okabe and Ito 2008).
fn color(routing: Routing) -> RGBColor {
    match routing {
        Routing::RoundRobin => RGBColor(213, 94, 0),
        Routing::BySession => RGBColor(230, 159, 0),
        Routing::ByEvents => RGBColor(0, 114, 178),
    }
}

fn line(rows: &[&Row], routing: Routing, value: impl Fn(&Row) -> f64) -> Vec<(f64, f64)> {
    let of_routing = rows.iter().filter(|row| row.routing == routing);
    let mut points: Vec<(f64, f64)> = of_routing.map(|row| (f64::from(row.nodes), value(row))).collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    points
}

fn found(trace: &str, rows: &[&Row]) -> Panel {
    let mut lines: Vec<_> = Routing::ALL
        .iter()
        .map(|routing| {
            let points = line(rows, *routing, |row| row.ram_block_hit_rate * 100.0);
            (format!("RAM, {}", routing.name()), color(*routing), points)
        })
        .collect();
    let shared = line(rows, Routing::RoundRobin, |row| row.store_block_hit_rate * 100.0);
    lines.push(("with a shared store".to_owned(), RGBColor(0, 158, 115), shared));
    Panel { title: trace.to_owned(), y_desc: "block hit rate (%)".to_owned(), lines }
}

fn moved(trace: &str, rows: &[&Row]) -> Panel {
    let unit = if rows.iter().all(|row| row.block_bytes.is_some()) { "GB/s" } else { "blocks/s" };
    let per_node = |row: &Row, blocks: f64| row.gb_per_s(blocks).unwrap_or(blocks) / f64::from(row.nodes);
    let reads = Routing::ALL.iter().map(|routing| {
        let points = line(rows, *routing, |row| per_node(row, row.store_read_blocks_per_s));
        (format!("read, {}", routing.name()), color(*routing), points)
    });
    let mut lines: Vec<_> = reads.collect();
    let written = line(rows, Routing::RoundRobin, |row| per_node(row, row.store_written_blocks_per_s));
    lines.push(("written".to_owned(), RGBColor(204, 121, 167), written));
    Panel { title: format!("{trace}: to and from the store"), y_desc: format!("of each node ({unit})"), lines }
}

fn draw<'a>(area: &Area<'a>, panel: &Panel) -> Drawn<'a> {
    let points = || panel.lines.iter().flat_map(|(.., points)| points);
    let right = points().map(|(nodes, _)| *nodes).fold(2.0, f64::max);
    let top = points().map(|(_, value)| *value).fold(f64::MIN_POSITIVE, f64::max) * 1.12;
    let mut chart = ChartBuilder::on(area)
        .margin(16)
        .caption(&panel.title, (FONT, 20, &INK))
        .x_label_area_size(46)
        .y_label_area_size(70)
        .build_cartesian_2d((0.9..right * 1.1).log_scale(), 0.0..top)?;
    chart
        .configure_mesh()
        .x_desc("nodes (log scale)")
        .y_desc(&panel.y_desc)
        .axis_desc_style((FONT, 15, &INK))
        .label_style((FONT, 13, &INK))
        .x_label_formatter(&|nodes| super::super::plot::tick(*nodes))
        .y_label_formatter(&|value| if top > 10.0 { format!("{value:.0}") } else { format!("{value:.1}") })
        .y_labels(8)
        .bold_line_style(INK.mix(0.12))
        .light_line_style(TRANSPARENT)
        .draw()?;
    for (name, color, points) in &panel.lines {
        let color = *color;
        chart.draw_series(LineSeries::new(points.iter().copied(), color.stroke_width(2)))?;
        chart
            .draw_series(points.iter().map(|point| Circle::new(*point, 3, color.filled())))?
            .label(name)
            .legend(move |(x, y)| Rectangle::new([(x, y - 2), (x + 14, y + 2)], color.filled()));
    }
    legend(&mut chart, SeriesLabelPosition::MiddleRight)
}
