//! The transformer: tokens in, KV and logits out.
//!
//! Threads split outputs, heads and query blocks, never a sum, so neither their number nor
//! their luck changes a bit. Prompts run in batches of [`BATCH_TOKENS`]: a matter of speed
//! only. Of the last layer only the last row is computed beyond its KV.

use half::f16;
use rayon::prelude::*;

use crate::acts::Acts;
use crate::attention::{self, Attention};
use crate::config::Config;
use crate::kv::{KvBuffer, LayerKv};
use crate::simd::{Into, Kernels, LANES, Product};
use crate::weights::{Layer, Packed, Weights};

/// Rows of a prefill batch: their activations stay in the second-level cache.
const BATCH_TOKENS: usize = 256;
/// Elementwise work on fewer rows is not worth waking a thread.
const SERIAL_ROWS: usize = 8;

/// A loaded model.
#[derive(Debug)]
pub(crate) struct Model {
    pub(crate) config: Config,
    pub(crate) weights: Weights,
    pub(crate) kernels: Kernels,
    pub(crate) threads: usize,
    /// Tokens a batch; tests choose odd ones.
    pub(crate) batch_tokens: usize,
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

/// Tokens that go through the layers together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Batch<'a> {
    pub(crate) tokens: &'a [u32],
    pub(crate) want: Want,
    /// Does the prompt end here?
    pub(crate) last: bool,
}

/// Which rows' logits are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Want {
    Last,
    All,
}

impl Model {
    pub(crate) fn new(config: Config, weights: Weights, kernels: Kernels, threads: usize) -> Self {
        Self { config, weights, kernels, threads, batch_tokens: BATCH_TOKENS }
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

    /// Appends the KV of one batch and its wanted logits, row after row. The caller has checked
    /// the tokens and the room, and says whether more of the prompt follows.
    pub(crate) fn pass(&self, batch: &Batch<'_>, kv: &mut KvBuffer, scratch: &mut Scratch, logits: &mut Vec<f32>) {
        kv.tile_imported(self.kernels);
        if self.layers(batch, kv, scratch) {
            self.logits(scratch, logits);
        }
        kv.advance_tiled(batch.tokens.len());
    }

    /// Runs all layers; true if the rows in `x` are to become logits.
    fn layers(&self, batch: &Batch<'_>, kv: &mut KvBuffer, s: &mut Scratch) -> bool {
        let tokens = batch.tokens;
        let start = kv.len();
        self.embed(tokens, &mut s.x);
        self.angles(start, tokens.len(), s);
        let last_layer = self.weights.layers.len() - 1;
        for (index, (layer, kv)) in self.weights.layers.iter().zip(kv.layers_mut()).enumerate() {
            self.project(layer, s);
            self.rotate(s);
            self.write_kv(&s.qkv, start, kv);
            let mut first = start;
            if index == last_layer && batch.want == Want::Last {
                if !batch.last {
                    return false;
                }
                first = start + tokens.len() - 1;
                keep_last_row(&mut s.x);
                keep_last_row(&mut s.qkv);
            }
            self.attend(kv, first, s);
            self.product(&s.attended, &layer.output, &mut s.x, Into::Add);
            self.feed_forward(layer, s);
        }
        true
    }

    fn embed(&self, tokens: &[u32], x: &mut Acts) {
        x.set_rows(tokens.len());
        let mut values = vec![0.0; self.config.hidden];
        for (row, token) in tokens.iter().enumerate() {
            for (to, value) in values.iter_mut().zip(self.weights.embedding.row(*token as usize)) {
                *to = value;
            }
            x.set_row(row, &values);
        }
    }

    /// Cosines and signed sines for each row's position, in the panels of one head.
    fn angles(&self, start: usize, rows: usize, s: &mut Scratch) {
        let config = &self.config;
        s.cos.set_rows(rows);
        s.sin.set_rows(rows);
        let (mut cos, mut sin) = (vec![1.0f32; config.head_dim], vec![0.0f32; config.head_dim]);
        for row in 0..rows {
            let pairs = cos.chunks_exact_mut(2).zip(sin.chunks_exact_mut(2)).take(config.rope_dims / 2);
            for (i, (cos, sin)) in pairs.enumerate() {
                let (sine, cosine) = self.angle(start + row, i).sin_cos();
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

    fn write_kv(&self, qkv: &Acts, start: usize, kv: &mut LayerKv) {
        let (kv_dim, q_panels) = (self.config.kv_dim(), self.config.q_dim() / LANES);
        let kv_panels = kv_dim / LANES;
        let range = start * kv_dim..(start + qkv.rows()) * kv_dim;
        let write = |first_panel: usize, all: &mut [f16]| {
            let rows = all.get_mut(range.clone()).unwrap_or_default();
            self.each_panel(rows, kv_dim, qkv.rows(), |row, to| {
                let from = qkv.row(row).skip(first_panel).take(kv_panels);
                from.zip(to.chunks_exact_mut(LANES)).for_each(|(from, to)| self.kernels.narrow(from, to));
            });
        };
        write(q_panels, &mut kv.k);
        write(q_panels + kv_panels, &mut kv.v);
        kv.tile(self.kernels, start..start + qkv.rows(), self.config.kv_heads, self.config.head_dim);
    }

    fn attend(&self, kv: &LayerKv, start: usize, s: &mut Scratch) {
        s.attended.set_rows(s.qkv.rows());
        let attention = Attention {
            kernels: self.kernels,
            config: &self.config,
            queries: &s.qkv,
            key_tiles: &kv.tiles,
            values: &kv.v,
            start,
        };
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

fn keep_last_row(acts: &mut Acts) {
    let mut last = Acts::new(acts.columns());
    last.set_rows(1);
    last.set_row_from(0, acts, acts.rows() - 1);
    acts.set_rows(1);
    acts.set_row_from(0, &last, 0);
}
