//! The transformer: tokens in, KV and logits out.
//!
//! Threads split outputs, heads and query blocks, never a sum, so neither their number nor
//! their luck changes a bit. How a prompt is cut into passes is a matter of speed
//! only. Of the last layer only the rows whose logits are wanted are computed beyond their KV.
//!
//! One pass may carry tokens of several sequences, each with KV of its own: the weights, which
//! decoding alone spends its time reading, are then read once for all of them.

use half::f16;
use rayon::prelude::*;

use crate::acts::Acts;
use crate::attention::{self, Attention, Sequence};
use crate::config::Config;
use crate::kv::KvBuffer;
use crate::simd::{Into, Kernels, LANES, Product};
use crate::weights::{Layer, Packed, Weights};

/// Elementwise work on fewer rows is not worth waking a thread.
const SERIAL_ROWS: usize = 8;

/// A loaded model.
#[derive(Debug)]
pub(crate) struct Model {
    pub(crate) config: Config,
    pub(crate) weights: Weights,
    pub(crate) kernels: Kernels,
    pub(crate) threads: usize,
}

/// Activations, kept between calls: fresh memory would cost a page fault every 4 KiB.
#[derive(Debug)]
pub(crate) struct Scratch {
    x: Acts,
    normed: Acts,
    qkv: Acts,
    attended: Acts,
    gate_up: Acts,
    hidden: Acts,
    cos: Acts,
    sin: Acts,
    logits: Acts,
    inverse: Vec<f32>,
    attention: attention::Scratch,
}

/// Tokens of one sequence that go through the layers in one pass, perhaps beside those of others.
#[derive(Debug)]
pub(crate) struct Segment<'a> {
    pub(crate) tokens: &'a [u32],
    /// What comes before them; their KV is appended. The caller has checked tokens and room.
    pub(crate) kv: &'a mut KvBuffer,
    pub(crate) want: Want,
}

/// Which rows' logits are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Want {
    /// None: more of the prompt follows.
    Nothing,
    Last,
    All,
}

impl Model {
    pub(crate) fn new(config: Config, weights: Weights, kernels: Kernels, threads: usize) -> Self {
        Self { config, weights, kernels, threads }
    }

    pub(crate) fn scratch(&self) -> Scratch {
        let config = &self.config;
        Scratch {
            x: Acts::new(config.hidden),
            normed: Acts::new(config.hidden),
            qkv: Acts::new(config.q_dim() + 2 * config.kv_dim()),
            attended: Acts::new(config.q_dim()),
            gate_up: Acts::new(2 * config.feed_forward),
            hidden: Acts::new(config.feed_forward),
            cos: Acts::new(config.head_dim),
            sin: Acts::new(config.head_dim),
            logits: Acts::new(config.vocabulary),
            inverse: Vec::new(),
            attention: attention::Scratch::new(self.threads),
        }
    }

    /// Appends the KV of every segment, and to `logits` the wanted rows, segment after segment.
    pub(crate) fn pass(&self, segments: &mut [Segment<'_>], scratch: &mut Scratch, logits: &mut Vec<f32>) {
        segments.iter_mut().for_each(|segment| segment.kv.tile_imported(self.kernels));
        if self.layers(segments, scratch) {
            self.logits(scratch, logits);
        }
        segments.iter_mut().for_each(|segment| segment.kv.advance_tiled(segment.tokens.len()));
    }

    /// Runs all layers; true if the rows in `x` are to become logits.
    fn layers(&self, segments: &mut [Segment<'_>], s: &mut Scratch) -> bool {
        self.embed(segments, &mut s.x);
        self.angles(segments, s);
        let last_layer = self.weights.layers.len() - 1;
        for (index, layer) in self.weights.layers.iter().enumerate() {
            self.project(layer, s);
            self.rotate(s);
            self.write_kv(&s.qkv, segments, index);
            let wanted = index == last_layer;
            if wanted {
                let rows = wanted_rows(segments);
                if rows.is_empty() {
                    return false;
                }
                keep_rows(&mut s.x, &rows);
                keep_rows(&mut s.qkv, &rows);
            }
            self.attend(&sequences(segments, index, wanted), s);
            self.product(&s.attended, &layer.output, &mut s.x, Into::Add);
            self.feed_forward(layer, s);
        }
        true
    }

    fn embed(&self, segments: &[Segment<'_>], x: &mut Acts) {
        x.set_rows(segments.iter().map(|segment| segment.tokens.len()).sum());
        let mut values = vec![0.0; self.config.hidden];
        for (row, token) in segments.iter().flat_map(|segment| segment.tokens).enumerate() {
            for (to, value) in values.iter_mut().zip(self.weights.embedding.row(*token as usize)) {
                *to = value;
            }
            x.set_row(row, &values);
        }
    }

    /// Cosines and signed sines for each row's position, in the panels of one head.
    fn angles(&self, segments: &[Segment<'_>], s: &mut Scratch) {
        let config = &self.config;
        s.cos.set_rows(s.x.rows());
        s.sin.set_rows(s.x.rows());
        let (mut cos, mut sin) = (vec![1.0f32; config.head_dim], vec![0.0f32; config.head_dim]);
        let positions = segments.iter().flat_map(|segment| (segment.kv.len()..).take(segment.tokens.len()));
        for (row, position) in positions.enumerate() {
            let pairs = cos.chunks_exact_mut(2).zip(sin.chunks_exact_mut(2)).take(config.rope_dims / 2);
            for (i, (cos, sin)) in pairs.enumerate() {
                let (sine, cosine) = self.angle(position, i).sin_cos();
                cos.fill(cosine);
                sin.copy_from_slice(&[-sine, sine]);
            }
            s.cos.set_row(row, &cos);
            s.sin.set_row(row, &sin);
        }
    }

    fn normalize(&self, weight: &[f32], s: &mut Scratch) {
        let (rows, stride, kernels) = (s.x.rows(), s.x.stride(), self.kernels);
        s.inverse.resize(rows, 0.0);
        kernels.rms_inverse(s.x.data(), self.config.hidden, self.config.rms_eps, &mut s.inverse);
        s.normed.set_rows(rows);
        let (x, inverse) = (&s.x, &s.inverse);
        self.each_panel(s.normed.data_mut(), stride, rows, |panel, out| {
            let weight = weight.get(panel * LANES..).unwrap_or_default();
            kernels.normalize(x.panels(panel..panel + 1), inverse, weight, out);
        });
    }

    fn project(&self, layer: &Layer, s: &mut Scratch) {
        self.normalize(&layer.attention_norm, s);
        s.qkv.set_rows(s.x.rows());
        self.product(&s.normed, &layer.qkv, &mut s.qkv, Into::Set);
    }

    /// RoPE on queries and keys; queries also get the softmax's scale, in units of log2.
    fn rotate(&self, s: &mut Scratch) {
        let (config, kernels) = (&self.config, self.kernels);
        #[expect(clippy::cast_precision_loss, reason = "head sizes are far below 2^24")]
        let scale = std::f32::consts::LOG2_E / (config.head_dim as f32).sqrt();
        let panels = config.head_dim / LANES;
        let rows = s.qkv.rows();
        let head_len = panels * s.qkv.stride();
        let (cos, sin) = (s.cos.data(), s.sin.data());
        let rotated = s.qkv.panels_mut(0..(config.heads + config.kv_heads) * panels);
        self.each_panel(rotated, head_len, rows, |head, x| {
            kernels.rope(x, cos, sin, if head < config.heads { scale } else { 1.0 });
        });
    }

    fn write_kv(&self, qkv: &Acts, segments: &mut [Segment<'_>], layer: usize) {
        let config = &self.config;
        let (kv_dim, k_panel) = (config.kv_dim(), config.q_dim() / LANES);
        let kv_panels = kv_dim / LANES;
        let mut first_row = 0;
        for Segment { tokens, kv, .. } in segments {
            let positions = kv.len()..kv.len() + tokens.len();
            let Some(kv) = kv.layers_mut().get_mut(layer) else { continue };
            let write = |first_panel: usize, all: &mut [f16]| {
                let rows = all.get_mut(positions.start * kv_dim..positions.end * kv_dim).unwrap_or_default();
                self.each_panel(rows, kv_dim, tokens.len(), |row, to| {
                    let from = qkv.row(first_row + row).skip(first_panel).take(kv_panels);
                    from.zip(to.chunks_exact_mut(LANES)).for_each(|(from, to)| self.kernels.narrow(from, to));
                });
            };
            write(k_panel, &mut kv.k);
            write(k_panel + kv_panels, &mut kv.v);
            kv.tile(self.kernels, positions, config.kv_heads, config.head_dim);
            first_row += tokens.len();
        }
    }

    fn attend(&self, sequences: &[Sequence<'_>], s: &mut Scratch) {
        s.attended.set_rows(s.qkv.rows());
        let attention = Attention { kernels: self.kernels, config: &self.config, queries: &s.qkv, sequences };
        attention.run(&mut s.attention, &mut s.attended);
    }

    fn feed_forward(&self, layer: &Layer, s: &mut Scratch) {
        self.normalize(&layer.feed_forward_norm, s);
        let (rows, stride, kernels) = (s.x.rows(), s.x.stride(), self.kernels);
        s.gate_up.set_rows(rows);
        s.hidden.set_rows(rows);
        let per_task = self.panels_per_task(layer.gate_up.panels() / 2, rows);
        let pairs = s.gate_up.data_mut().par_chunks_mut(2 * per_task * stride);
        let hidden = s.hidden.data_mut().par_chunks_mut(per_task * stride);
        let normed = &s.normed;
        pairs.zip(hidden).enumerate().for_each(|(task, (pairs, hidden))| {
            self.panels(normed, &layer.gate_up, 2 * task * per_task, pairs, Into::Set);
            kernels.swiglu(pairs, stride, hidden);
        });
        self.product(&s.hidden, &layer.down, &mut s.x, Into::Add);
    }

    /// Logits of every row in `x`, appended row after row.
    fn logits(&self, s: &mut Scratch, logits: &mut Vec<f32>) {
        self.normalize(&self.weights.norm, s);
        let head = self.weights.head();
        let out = &mut s.logits;
        out.set_rows(s.x.rows());
        self.product(&s.normed, head, out, Into::Set);
        for row in 0..out.rows() {
            let end = logits.len() + self.config.vocabulary;
            out.row(row).for_each(|part| logits.extend_from_slice(part));
            logits.truncate(end);
        }
    }

    /// `out (+)= a * w`, panels of outputs split over the threads.
    fn product(&self, a: &Acts, w: &Packed, out: &mut Acts, into: Into) {
        let stride = out.stride();
        let per_task = self.panels_per_task(w.panels(), out.rows());
        out.data_mut().par_chunks_mut(per_task * stride).enumerate().for_each(|(task, out)| {
            self.panels(a, w, task * per_task, out, into);
        });
    }

    fn panels(&self, a: &Acts, w: &Packed, first: usize, out: &mut [f32], into: Into) {
        let product = Product {
            a: a.data(),
            a_stride: a.stride(),
            w: w.tail(first),
            w_stride: w.stride(),
            w_step: LANES,
            k: w.inputs(),
            rows: a.rows(),
            panels: out.len() / a.stride(),
            out_stride: a.stride(),
        };
        self.kernels.product(&product, out, into);
    }

    fn panels_per_task(&self, panels: usize, rows: usize) -> usize {
        let tasks_per_thread = if rows <= SERIAL_ROWS { 1 } else { 6 };
        panels.div_ceil(self.threads * tasks_per_thread).max(1)
    }

    /// Elementwise work on pieces of a slice, on all threads if it is enough.
    fn each_panel<T: Send>(&self, all: &mut [T], len: usize, rows: usize, work: impl Fn(usize, &mut [T]) + Sync) {
        if rows <= SERIAL_ROWS {
            all.chunks_exact_mut(len).enumerate().for_each(|(i, piece)| work(i, piece));
        } else {
            all.par_chunks_exact_mut(len).with_min_len(4).enumerate().for_each(|(i, piece)| work(i, piece));
        }
    }

    /// The angle of one pair of dimensions at a position, computed in `f64`.
    #[expect(clippy::cast_precision_loss, reason = "positions and dimensions are far below 2^52")]
    fn angle(&self, position: usize, pair: usize) -> Angle {
        let exponent = -2.0 * pair as f64 / self.config.rope_dims as f64;
        let factor = self.weights.rope_factors.as_ref().and_then(|factors| factors.get(pair)).copied().unwrap_or(1.0);
        Angle(position as f64 * self.config.rope_base.powf(exponent) / f64::from(factor))
    }
}

struct Angle(f64);

impl Angle {
    #[expect(clippy::cast_possible_truncation, reason = "rounded to f32 on purpose, after the f64 sine")]
    fn sin_cos(&self) -> (f32, f32) {
        let (sin, cos) = self.0.sin_cos();
        (sin as f32, cos as f32)
    }
}

/// Which rows of the batch are to become logits.
fn wanted_rows(segments: &[Segment<'_>]) -> Vec<usize> {
    let mut end = 0;
    let wanted = segments.iter().flat_map(|segment| {
        end += segment.tokens.len();
        end - segment.want.rows(segment.tokens.len())..end
    });
    wanted.collect()
}

/// What attention reads of each segment in one layer, of all its rows or of the wanted ones only.
fn sequences<'a>(segments: &'a [Segment<'_>], layer: usize, wanted: bool) -> Vec<Sequence<'a>> {
    let mut end = 0;
    let sequence = |segment: &'a Segment<'_>| {
        let (all, kv) = (segment.tokens.len(), segment.kv.layer(layer)?);
        let rows = if wanted { segment.want.rows(all) } else { all };
        let start = segment.kv.len() + all - rows;
        end += rows;
        Some(Sequence { key_tiles: &kv.tiles, values: &kv.v, rows: end - rows..end, start })
    };
    segments.iter().filter_map(sequence).collect()
}

/// Keeps these rows, which are in ascending order.
fn keep_rows(acts: &mut Acts, rows: &[usize]) {
    if rows.len() == acts.rows() {
        return;
    }
    let mut kept = Acts::new(acts.columns());
    kept.set_rows(rows.len());
    rows.iter().enumerate().for_each(|(to, row)| kept.set_row_from(to, acts, *row));
    // Back into the old memory, which the next pass needs in full again.
    acts.set_rows(rows.len());
    (0..rows.len()).for_each(|row| acts.set_row_from(row, &kept, row));
}

impl Want {
    /// How many of the last rows of a segment of so many.
    pub(crate) fn rows(self, all: usize) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Last => all.min(1),
            Self::All => all,
        }
    }
}
