//! Plots as SVG.
//!
//! Times span two orders of magnitude between a cold and a warm request, so the axis of time
//! is logarithmic: on a linear one all warm requests lie on the zero line.
//!
//! One look for all: a grid only where values are read off, colours that the colour-blind tell apart, labels with a halo so that no line crosses
//! them, and the reader's dark mode, by CSS inside the file.

use std::path::Path;

use anyhow::{Context, Result, anyhow};
use plotters::coord::{CoordTranslate, Shift};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Times to first token of one demo, request by request.
#[derive(Debug)]
pub(crate) struct Panel {
    pub(crate) title: String,
    pub(crate) without_ms: Vec<f64>,
    pub(crate) with_ms: Vec<f64>,
}

/// How many times better than promised, or than the reference.
#[derive(Debug)]
pub(crate) struct Bar {
    pub(crate) name: String,
    pub(crate) better: f64,
    /// Measured against a promise, not only against a reference.
    pub(crate) promised: bool,
}

const WIDTH: u32 = 900;
const PANEL_HEIGHT: u32 = 420;
pub(crate) const FONT: &str = "sans-serif";
pub(crate) const INK: RGBColor = RGBColor(40, 40, 40);
/// Told apart by people who do not tell red from green.
const WITHOUT: RGBColor = RGBColor(213, 94, 0);
const WITH: RGBColor = RGBColor(0, 114, 178);
/// What nothing is promised of.
const GREY: RGBColor = RGBColor(165, 165, 165);

/// What drawing on an SVG returns.
pub(crate) type Drawn<'a> = Result<(), DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>>;

/// A place to draw on.
pub(crate) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// What the reader's settings change, and what the drawing library has no word for.
const STYLE: &str = r##"<style>
text { font-family: system-ui, sans-serif; paint-order: stroke; stroke: #FFFFFF; stroke-width: 3px; stroke-linejoin: round }
@media (prefers-color-scheme: dark) {
  rect[fill="#FFFFFF"] { fill: #15191E }
  text { fill: #DDE3EA; stroke: #15191E }
  [fill="#282828"]:not(text) { fill: #DDE3EA }
  [stroke="#282828"], [stroke="#000000"] { stroke: #DDE3EA }
}
</style>
"##;

/// One panel below the other, written to a file.
pub(crate) fn panels<T>(
    path: &Path,
    panel_height: u32,
    panels: &[T],
    draw: impl for<'a> Fn(&Area<'a>, &T) -> Drawn<'a>,
) -> Result<()> {
    let mut svg = String::new();
    {
        let height = panel_height * u32::try_from(panels.len())?;
        let root = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        root.fill(&WHITE).map_err(|error| anyhow!("{error}"))?;
        for (area, panel) in root.split_evenly((panels.len(), 1)).iter().zip(panels) {
            draw(area, panel).map_err(|error| anyhow!("{error}"))?;
        }
        root.present().map_err(|error| anyhow!("{error}"))?;
    }
    let drawing = svg.find('\n').map_or(0, |end| end + 1);
    svg.insert_str(drawing, STYLE);
    std::fs::write(path, svg).with_context(|| format!("cannot write {}", path.display()))
}

/// Times to first token.
pub(crate) fn ttft(path: &Path, demos: &[Panel]) -> Result<()> {
    panels(path, PANEL_HEIGHT, demos, draw)
}

fn draw<'a>(area: &Area<'a>, panel: &Panel) -> Drawn<'a> {
    let all = || panel.without_ms.iter().chain(&panel.with_ms).copied();
    let (low, high) = (all().fold(f64::INFINITY, f64::min), all().fold(1.0, f64::max));
    let requests = panel.without_ms.len().max(panel.with_ms.len());
    let times = (decade_below(low)..high * 2.0).log_scale();
    let mut chart = ChartBuilder::on(area)
        .margin(16)
        .caption(&panel.title, (FONT, 20, &INK))
        .x_label_area_size(46)
        .y_label_area_size(78)
        .build_cartesian_2d(0..requests + 1, times)?;
    chart
        .configure_mesh()
        .x_desc("request")
        .y_desc("time to first token (ms, log scale)")
        .axis_desc_style((FONT, 15, &INK))
        .label_style((FONT, 13, &INK))
        .y_label_formatter(&|ms| format!("{ms}"))
        .y_labels(6)
        .x_labels(requests.min(13))
        .bold_line_style(INK.mix(0.12))
        .light_line_style(TRANSPARENT)
        .draw()?;
    for (name, times, color) in [("without cache", &panel.without_ms, WITHOUT), ("with kvkeep", &panel.with_ms, WITH)] {
        let points = || (1..).zip(times.iter().copied());
        chart.draw_series(LineSeries::new(points(), color.stroke_width(2)))?;
        chart
            .draw_series(points().map(|point| Circle::new(point, 3, color.filled())))?
            .label(name)
            .legend(move |(x, y)| Circle::new((x + 8, y), 4, color.filled()));
    }
    legend(&mut chart, SeriesLabelPosition::LowerRight)
}

/// Says in the lower right what the lines are.
pub(crate) fn legend<'a, 'b: 'a, CT: CoordTranslate>(
    chart: &mut ChartContext<'a, SVGBackend<'b>, CT>,
    position: SeriesLabelPosition,
) -> Drawn<'b> {
    chart
        .configure_series_labels()
        .position(position)
        .label_font((FONT, 14, &INK))
        .background_style(WHITE.mix(0.9))
        .border_style(INK.mix(0.3))
        .draw()
}

/// 10, 100, ... so that the lowest time is not on the frame.
fn decade_below(ms: f64) -> f64 {
    10f64.powf(ms.max(0.01).log10().floor())
}

/// A codec: how small it is, and what it costs.
#[derive(Debug)]
pub(crate) struct Point {
    pub(crate) name: String,
    pub(crate) ratio: f64,
    /// In nats.
    pub(crate) kl: f64,
}

/// Divergence of predictions against ratio: to the right is smaller, downwards is better.
pub(crate) fn quality(path: &Path, model: &str, points: &[Point]) -> Result<()> {
    let root = SVGBackend::new(path, (WIDTH, PANEL_HEIGHT)).into_drawing_area();
    root.fill(&WHITE).map_err(|error| anyhow!("{error}"))?;
    draw_quality(&root, model, points).map_err(|error| anyhow!("{error}"))?;
    root.present().map_err(|error| anyhow!("{error}"))
}

fn draw_quality<'a>(area: &DrawingArea<SVGBackend<'a>, Shift>, model: &str, points: &[Point]) -> Drawn<'a> {
    let all = || points.iter().map(|point| point.kl);
    let (low, high) = (all().fold(0.01, f64::min) / 2.0, all().fold(0.02, f64::max) * 3.0);
    let widest = points.iter().map(|point| point.ratio).fold(4.0, f64::max) + 0.4;
    let mut chart = ChartBuilder::on(area)
        .margin(16)
        .caption(format!("{model}: predictions behind reused KV"), (FONT, 20, &INK))
        .x_label_area_size(46)
        .y_label_area_size(78)
        .build_cartesian_2d(1.0..widest, (low..high).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("times smaller than bfloat16")
        .y_desc("KL divergence from exact KV (nats, log scale)")
        .axis_desc_style((FONT, 15, &INK))
        .label_style((FONT, 13, &INK))
        .y_label_formatter(&|kl| format!("{kl}"))
        .bold_line_style(INK.mix(0.18))
        .light_line_style(INK.mix(0.05))
        .draw()?;
    chart.draw_series(points.iter().map(|point| Circle::new((point.ratio, point.kl), 5, WITH.filled())))?;
    for point in points {
        let (x, y) = chart.backend_coord(&(point.ratio, point.kl));
        let name = (FONT, 14, &INK).into_text_style(area).pos(Pos::new(HPos::Left, VPos::Center));
        area.draw_text(&point.name, &name, (x + 9, y))?;
    }
    Ok(())
}

/// One bar for each figure, in their order from top to bottom, from 1 to the right if better
/// and to the left if worse.
pub(crate) fn ratios(path: &Path, bars: &[Bar]) -> Result<()> {
    panels(path, 110 + 30 * u32::try_from(bars.len())?, &[bars], |area, bars| draw_ratios(area, bars))
}

fn draw_ratios<'a>(area: &Area<'a>, bars: &[Bar]) -> Drawn<'a> {
    let better = || bars.iter().map(|bar| bar.better);
    let (low, high) = (better().fold(0.7, f64::min) * 0.8, better().fold(2.0, f64::max) * 2.5);
    let count = i32::try_from(bars.len()).unwrap_or(i32::MAX);
    let rows = (0..count).rev().map(|row| (f64::from(row), f64::from(row) + 0.5));
    let mut chart = ChartBuilder::on(area)
        .margin(16)
        .caption("kvkeep bench: times better than promised (or than the reference)", (FONT, 20, &INK))
        .x_label_area_size(46)
        .y_label_area_size(340)
        .build_cartesian_2d((low..high).log_scale(), 0.0..f64::from(count))?;
    chart
        .configure_mesh()
        .x_desc("times better (log scale); 1 is the promise or the reference")
        .axis_desc_style((FONT, 15, &INK))
        .label_style((FONT, 13, &INK))
        .x_label_formatter(&|times| format!("{times}"))
        .disable_y_mesh()
        .y_labels(0)
        .bold_line_style(INK.mix(0.12))
        .light_line_style(TRANSPARENT)
        .draw()?;
    for (bar, (bottom, middle)) in bars.iter().zip(rows) {
        let color = if bar.promised { WITH } else { GREY };
        let (from, to) = (bar.better.min(1.0), bar.better.max(1.0));
        let color = if bar.better < 1.0 && bar.promised { WITHOUT } else { color };
        chart.draw_series([Rectangle::new([(from, bottom + 0.18), (to, bottom + 0.82)], color.filled())])?;
        let (x, y) = chart.backend_coord(&(low, middle));
        let name = Pos::new(HPos::Right, VPos::Center);
        area.draw_text(&bar.name, &(FONT, 14, &INK).into_text_style(area).pos(name), (x - 8, y))?;
        let (x, y) = chart.backend_coord(&(to, middle));
        let value = Pos::new(HPos::Left, VPos::Center);
        area.draw_text(&format!("{:.2}x", bar.better), &(FONT, 13, &INK).into_text_style(area).pos(value), (x + 6, y))?;
    }
    chart.draw_series(LineSeries::new([(1.0, 0.0), (1.0, f64::from(count))], INK.stroke_width(2))).map(drop)
}
