//! Measures the cache, each figure with its reference taken in the same run.
//!
//! Invariant: rounds of the cache and of its reference alternate, after rounds that are not
//! counted, and medians are compared: what else the machine does hits both alike. Absolute
//! numbers of one machine were the alternative: they say nothing on another one.

mod blocks;
mod codecs;
mod cold;
mod disk;
mod engine;
mod fio;
mod hits;
mod named;
mod quality;
mod report;
mod sample;
mod serve;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use kvkeep::{DType, KvLayout, LayerView, LayerViewMut, Namespace, TensorView, TensorViewMut, TokenId};
use serde::Serialize;

use crate::cli::{BenchCommand, BenchOptions};
use crate::stats::{median, ratio};
use crate::{model, plot};

/// A figure with what it is measured against.
#[derive(Debug, Clone, Serialize)]
struct Figure {
    name: String,
    value: f64,
    unit: &'static str,
    reference: f64,
    /// Value by reference.
    ratio: f64,
    /// What the reference is.
    against: &'static str,
    /// What the ratio should be, if anything is promised.
    #[serde(skip_serializing_if = "Option::is_none")]
    bar: Option<Bar>,
    lower_is_better: bool,
}

/// What is promised of a ratio.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Bar {
    AtMost(f64),
    AtLeast(f64),
}

/// How much is measured.
#[derive(Debug, Clone, Copy)]
struct Effort {
    quick: bool,
}

/// For memory to be touched and clocks to rise.
const UNCOUNTED_ROUNDS: usize = 2;

type Measure = fn(Effort) -> Result<Vec<Figure>>;

const MEASURES: [(&str, Measure); 7] = [
    ("hits", hits::zero_copy),
    ("lookup", hits::long_lookup),
    ("threads", hits::threads),
    ("copies", blocks::copies),
    ("eviction", blocks::eviction),
    ("layers by prefix", named::layers),
    ("index", blocks::index),
];

/// Measures and prints.
pub(crate) fn run(options: &BenchOptions) -> Result<ExitCode> {
    match &options.what {
        Some(BenchCommand::Codecs(codecs)) => return codecs::run(codecs, options.quick, options.json),
        Some(BenchCommand::Quality(quality)) => return quality::run(quality, options.quick, options.json),
        None => {}
    }
    let effort = Effort { quick: options.quick };
    let load = || model::load(options.model.as_deref(), &model::options(options.threads));
    let engine = options.engine.then(load).transpose()?;
    let bar = measure_bar(MEASURES.len() + usize::from(options.engine) + usize::from(options.disk.is_some()));
    let mut figures = Vec::new();
    for (name, measure) in MEASURES {
        bar.set_message(name);
        figures.extend(measure(effort)?);
        bar.inc(1);
    }
    if let Some(dir) = &options.disk {
        bar.set_message("disk");
        figures.extend(disk::figures(dir, effort)?);
        bar.inc(1);
    }
    if let Some(engine) = &engine {
        bar.set_message("engine");
        figures.extend(engine::figures(engine, effort)?);
        figures.push(serve::figure(engine, effort)?);
    }
    bar.finish_and_clear();
    report::print(&figures, options.json)?;
    if let Some(path) = &options.plot {
        let bars: Vec<plot::Bar> = figures.iter().map(Figure::plotted).collect();
        plot::ratios(path, &bars).with_context(|| format!("cannot write the plot {}", path.display()))?;
        eprintln!("plot written to {}", path.display());
    }
    Ok(ExitCode::SUCCESS)
}

impl Figure {
    /// A time or a size: less is better.
    fn cost(name: impl Into<String>, value: f64, unit: &'static str, reference: f64, against: &'static str) -> Self {
        let (name, ratio) = (name.into(), ratio(value, reference));
        Self { name, value, unit, reference, ratio, against, bar: None, lower_is_better: true }
    }

    /// A rate: more is better.
    fn rate(name: impl Into<String>, value: f64, unit: &'static str, reference: f64, against: &'static str) -> Self {
        Self { lower_is_better: false, ..Self::cost(name, value, unit, reference, against) }
    }

    fn bar(mut self, bar: Bar) -> Self {
        self.bar = Some(bar);
        self
    }

    fn meets(&self) -> Option<bool> {
        Some(match self.bar? {
            Bar::AtMost(bar) => self.ratio <= bar,
            Bar::AtLeast(bar) => self.ratio >= bar,
        })
    }

    /// How many times better than the bar, or than the reference where there is no bar.
    fn plotted(&self) -> plot::Bar {
        let bar = match self.bar {
            Some(Bar::AtMost(bar) | Bar::AtLeast(bar)) => bar,
            None => 1.0,
        };
        let better = if self.lower_is_better { ratio(bar, self.ratio) } else { ratio(self.ratio, bar) };
        plot::Bar { name: self.name.clone(), better, promised: self.bar.is_some() }
    }
}

impl Effort {
    fn pick(self, full: usize, quick: usize) -> usize {
        if self.quick { quick } else { full }
    }
}

/// Medians, in seconds, of what the closures return; they take turns, and the first rounds
/// are not counted.
fn alternate<const N: usize>(rounds: usize, mut timed: [&mut dyn FnMut() -> Result<Duration>; N]) -> Result<[f64; N]> {
    let mut seconds = [const { Vec::new() }; N];
    for round in 0..rounds + UNCOUNTED_ROUNDS {
        for (timed, seconds) in timed.iter_mut().zip(&mut seconds) {
            let took = timed()?;
            if round >= UNCOUNTED_ROUNDS {
                seconds.push(took.as_secs_f64());
            }
        }
    }
    Ok(seconds.map(median))
}

/// How long it takes.
fn time<T>(work: impl FnOnce() -> Result<T>) -> Result<Duration> {
    let begin = Instant::now();
    let done = work()?;
    let took = begin.elapsed();
    std::hint::black_box(done);
    Ok(took)
}

/// Bytes from a multiple of 64 on, as tensor libraries lay them out.
///
/// A plain `Vec` of this size begins 16 bytes behind a page's beginning, and blocks begin at
/// a page's. Copies from a page's beginning to 16 bytes behind another's run at half of
/// memcpy's speed (measured on an AMD EPYC): each load seems to depend on the store before it.
#[derive(Debug)]
struct Aligned {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    const ALIGN: usize = 64;

    fn new(len: usize, fill: u8) -> Self {
        Self::at(Self::ALIGN, len, fill)
    }

    /// From a multiple of `align` on.
    fn at(align: usize, len: usize, fill: u8) -> Self {
        let bytes = vec![fill; len + align];
        let start = bytes.as_ptr().align_offset(align);
        Self { bytes, start, len }
    }

    fn get(&self) -> &[u8] {
        self.bytes.get(self.start..self.start + self.len).unwrap_or_default()
    }

    fn get_mut(&mut self) -> &mut [u8] {
        self.bytes.get_mut(self.start..self.start + self.len).unwrap_or_default()
    }
}

/// An engine's KV: K and V of every layer, each in memory of its own.
#[derive(Debug)]
struct Tensors {
    dims: [usize; 3],
    layers: Vec<(Aligned, Aligned)>,
}

impl Tensors {
    fn new(layout: &KvLayout, tokens: usize) -> Self {
        let dims = [tokens, layout.kv_heads(), layout.k_head_dim()];
        let bytes = dims.iter().product::<usize>() * layout.dtype().size_bytes();
        // Not zero: the kernel backs pages of zeros by one page until they are written.
        let layer = |layer: usize| {
            let fill = u8::try_from(layer % 255).unwrap_or_default() + 1;
            (Aligned::new(bytes, fill), Aligned::new(bytes, fill))
        };
        Self { dims, layers: (0..layout.layers()).map(layer).collect() }
    }

    /// Other bytes everywhere, so that no disk on the way can save itself work.
    fn scramble(&mut self) {
        let mut word = 1u64;
        for bytes in self.layers.iter_mut().flat_map(|(k, v)| [k, v]) {
            for eight in bytes.get_mut().chunks_mut(8) {
                word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                eight.copy_from_slice(word.to_le_bytes().get(..eight.len()).unwrap_or_default());
            }
        }
    }

    fn bytes(&self) -> usize {
        self.layers.iter().map(|(k, v)| k.len + v.len).sum()
    }

    fn views(&self) -> Result<Vec<LayerView<'_>>> {
        let view = |bytes| TensorView::new(DType::F16, &self.dims, bytes);
        self.layers.iter().map(|(k, v)| Ok(LayerView { k: view(k.get())?, v: view(v.get())? })).collect()
    }

    fn views_mut(&mut self) -> Result<Vec<LayerViewMut<'_>>> {
        let dims = self.dims;
        let mut layers = Vec::with_capacity(self.layers.len());
        for (k, v) in &mut self.layers {
            let k = TensorViewMut::new(DType::F16, &dims, k.get_mut())?;
            layers.push(LayerViewMut { k, v: TensorViewMut::new(DType::F16, &dims, v.get_mut())? });
        }
        Ok(layers)
    }

    /// What every copy is measured against: memcpy of the same bytes between the same kind of memory.
    fn copy_from(&mut self, from: &Self) {
        for ((to_k, to_v), (k, v)) in self.layers.iter_mut().zip(&from.layers) {
            to_k.get_mut().copy_from_slice(k.get());
            to_v.get_mut().copy_from_slice(v.get());
        }
        std::hint::black_box(&self.layers);
    }
}

/// A namespace of `f16` KV.
fn namespace(layers: u32, kv_heads: u32, head_dim: u32, block_tokens: u32) -> Result<Namespace> {
    let layout = KvLayout::new(layers, kv_heads, head_dim, DType::F16)?.with_block_tokens(block_tokens)?;
    Ok(Namespace::new("bench", layout))
}

/// A prompt that shares no block with one of another number.
fn prompt(number: u32, tokens: usize) -> Vec<TokenId> {
    (0..u32::MAX).map(|token| token.wrapping_mul(2_654_435_761).wrapping_add(number)).take(tokens).collect()
}

fn measure_bar(measures: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("measuring [{bar:32}] {pos} of {len}, now {msg} ({elapsed})");
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ");
    let bar = ProgressBar::new(measures as u64).with_style(style);
    bar.enable_steady_tick(Duration::from_millis(250));
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_met_from_the_right_side() {
        let cost = Figure::cost("a", 0.2, "ms", 0.3, "bar").bar(Bar::AtMost(1.0));
        assert_eq!(cost.meets(), Some(true));
        let rate = Figure::rate("b", 8.0, "GB/s", 10.0, "memcpy").bar(Bar::AtLeast(0.9));
        assert_eq!(rate.meets(), Some(false));
        assert!(rate.plotted().better < 1.0 && cost.plotted().better > 1.0);
        assert_eq!(Figure::cost("c", 1.0, "ns", 0.0, "nothing").ratio, 0.0);
        assert_eq!(Figure::cost("c", 1.0, "ns", 2.0, "other").meets(), None);
    }

    #[test]
    fn rounds_alternate_and_the_first_are_not_counted() {
        let (mut first, mut second) = (0u64, 0u64);
        let [a, b] = alternate(
            3,
            [
                &mut || {
                    first += 1;
                    Ok(Duration::from_secs(first))
                },
                &mut || {
                    second += 10;
                    Ok(Duration::from_secs(second))
                },
            ],
        )
        .unwrap();
        assert_eq!((a, b), (4.0, 40.0));
    }

    #[test]
    fn prompts_of_different_numbers_differ_in_their_first_token() {
        assert_ne!(prompt(0, 4)[0], prompt(1, 4)[0]);
        assert_eq!(prompt(3, 5).len(), 5);
    }
}
