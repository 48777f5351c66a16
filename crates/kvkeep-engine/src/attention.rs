//! Causal attention over `f16` KV, in tiles of 64 keys with an online softmax.
//!
//! Invariant: a query meets the tiles at positions 0, 64, 128, ... in order, and in each
//! its keys in order, up to its own position and none behind. So its result depends on
//! nothing else in the batch. Memory does not grow with the square of the prompt. One pass
//! over all keys at once was the alternative: its scores fall out of every cache.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use half::f16;
use rayon::prelude::*;

use crate::acts::Acts;
use crate::config::Config;
use crate::simd::{Into, Kernels, LANES, Product, SoftmaxTile, TILE_KEYS};

/// Positions whose queries one task takes through the tiles together.
const BLOCK_POSITIONS: usize = 64;

/// Some rows of a batch that follow each other in one sequence, and that sequence's KV in one layer.
#[derive(Debug, Clone)]
pub(crate) struct Sequence<'a> {
    /// All keys, the batch's own included: `[tile][kv_head][head_dim][64]`.
    pub(crate) key_tiles: &'a [f16],
    /// All values: `[token][kv_head][head_dim]`.
    pub(crate) values: &'a [f16],
    /// Its rows in the batch. Sequences lie in the batch one behind the other, without gaps.
    pub(crate) rows: Range<usize>,
    /// Position of the first of these rows.
    pub(crate) start: usize,
}

/// Memory that attention uses again in every layer.
#[derive(Debug)]
pub(crate) struct Scratch {
    /// One for each thread: never contended.
    locals: Vec<Mutex<Local>>,
    /// Each task's output: `[head_dim / 16][positions * group][16]`.
    blocks: Vec<f32>,
}

#[derive(Debug, Default)]
struct Local {
    queries: Vec<f32>,
    scores: Vec<f32>,
    max: Vec<f32>,
    sum: Vec<f32>,
}

/// The inputs of one layer's attention.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attention<'a> {
    pub(crate) kernels: Kernels,
    pub(crate) config: &'a Config,
    /// Queries first, rotated and scaled to units of log2.
    pub(crate) queries: &'a Acts,
    pub(crate) sequences: &'a [Sequence<'a>],
}

/// Some rows of one sequence. With one KV head and its query heads it is a task.
#[derive(Debug)]
struct Block<'a> {
    sequence: &'a Sequence<'a>,
    rows: Range<usize>,
}

impl Scratch {
    pub(crate) fn new(threads: usize) -> Self {
        Self { locals: (0..threads.max(1)).map(|_| Mutex::default()).collect(), blocks: Vec::new() }
    }
}

impl Attention<'_> {
    /// Writes the attended values of all heads to `out`.
    pub(crate) fn run(&self, scratch: &mut Scratch, out: &mut Acts) {
        let kv_heads = self.config.kv_heads;
        let longest = self.sequences.iter().map(|sequence| sequence.rows.len()).max().unwrap_or(0);
        let positions = BLOCK_POSITIONS.min(longest).max(1);
        let blocks: Vec<Block<'_>> = self.sequences.iter().flat_map(|sequence| sequence.blocks(positions)).collect();
        let block_len = positions * self.config.group() * self.config.head_dim;
        scratch.blocks.resize(blocks.len() * kv_heads * block_len, 0.0);
        let locals = &scratch.locals;
        scratch.blocks.par_chunks_mut(block_len).enumerate().for_each(|(task, out)| {
            let thread = rayon::current_thread_index().unwrap_or(0) % locals.len().max(1);
            if let (Some(block), Some(local)) = (blocks.get(task / kv_heads), locals.get(thread)) {
                let local = &mut local.lock().unwrap_or_else(PoisonError::into_inner);
                self.block(block, task % kv_heads, local, out);
            }
        });
        self.gather(&scratch.blocks, &blocks, block_len, out);
    }

    fn block(&self, block: &Block<'_>, kv_head: usize, local: &mut Local, out: &mut [f32]) {
        let (group, head_dim) = (self.config.group(), self.config.head_dim);
        let rows = block.rows.len() * group;
        let stride = rows * LANES;
        let out = out.get_mut(..rows * head_dim).unwrap_or_default();
        local.prepare(rows, head_dim);
        self.pack_queries(&block.rows, kv_head, &mut local.queries);
        out.fill(0.0);
        let sequence = block.sequence;
        let first = sequence.start + block.rows.start - sequence.rows.start;
        let end = first + block.rows.len();
        for tile in (0..end).step_by(TILE_KEYS) {
            // Rows of earlier positions do not see this tile.
            let hidden = tile.saturating_sub(first) * group;
            let first_visible = first + hidden / group - tile + 1;
            let at = tile * self.config.kv_dim();
            let keys = sequence.key_tiles.get(at + kv_head * head_dim * TILE_KEYS..).unwrap_or_default();
            let values = sequence.values.get(at + kv_head * head_dim..).unwrap_or_default();
            let scores = Product {
                a: local.queries.get(hidden * LANES..).unwrap_or_default(),
                a_stride: stride,
                w: keys,
                w_stride: LANES,
                w_step: TILE_KEYS,
                k: head_dim,
                rows: rows - hidden,
                panels: TILE_KEYS / LANES,
                out_stride: stride,
            };
            self.kernels.product(&scores, local.scores.get_mut(hidden * LANES..).unwrap_or_default(), Into::Set);
            self.kernels.softmax(&mut SoftmaxTile {
                scores: &mut local.scores,
                stride,
                rows: hidden..rows,
                first_visible,
                group,
                max: &mut local.max,
                sum: &mut local.sum,
                acc: out,
                acc_panels: head_dim / LANES,
            });
            self.add_values(local, values, hidden..rows, first_visible, out);
        }
        for panel in out.chunks_exact_mut(stride) {
            self.kernels.divide(panel, &local.sum);
        }
    }

    /// `out += probabilities * values`, to each row only the keys that it sees.
    fn add_values(&self, local: &Local, values: &[f16], rows: Range<usize>, first_visible: usize, out: &mut [f32]) {
        let (group, panels) = (self.config.group(), self.config.head_dim / LANES);
        let stride = local.sum.len() * LANES;
        let mut product = |rows: Range<usize>, keys: usize| {
            let product = Product {
                a: local.scores.get(rows.start * LANES..).unwrap_or_default(),
                a_stride: stride,
                w: values,
                w_stride: LANES,
                w_step: self.config.kv_dim(),
                k: keys,
                rows: rows.len(),
                panels,
                out_stride: stride,
            };
            self.kernels.product(&product, out.get_mut(rows.start * LANES..).unwrap_or_default(), Into::Chain);
        };
        let mut row = rows.start;
        for visible in first_visible..TILE_KEYS {
            if row >= rows.end {
                return;
            }
            product(row..row + group, visible);
            row += group;
        }
        product(row..rows.end, TILE_KEYS);
    }

    /// All query heads of a position next to each other: `[head_dim / 16][position][group][16]`.
    fn pack_queries(&self, rows: &Range<usize>, kv_head: usize, to: &mut [f32]) {
        let (group, panels) = (self.config.group(), self.config.head_dim / LANES);
        let stride = rows.len() * group * LANES;
        for (panel, to) in to.chunks_exact_mut(stride).enumerate() {
            for head in 0..group {
                let at = (kv_head * group + head) * panels + panel;
                let from = self.queries.panels(at..at + 1);
                let from = from.get(rows.start * LANES..rows.end * LANES).unwrap_or_default();
                let to = to.chunks_exact_mut(LANES).skip(head).step_by(group);
                from.chunks_exact(LANES).zip(to).for_each(|(from, to)| to.copy_from_slice(from));
            }
        }
    }

    fn gather(&self, attended: &[f32], blocks: &[Block<'_>], block_len: usize, out: &mut Acts) {
        let (group, panels, kv_heads) = (self.config.group(), self.config.head_dim / LANES, self.config.kv_heads);
        let stride = out.stride();
        for (at, out) in out.data_mut().chunks_exact_mut(stride).enumerate() {
            let (head, panel) = (at / panels, at % panels);
            let (kv_head, member) = (head / group, head % group);
            for (n, block) in blocks.iter().enumerate() {
                let out = out.get_mut(block.rows.start * LANES..block.rows.end * LANES).unwrap_or_default();
                let block_rows = block.rows.len() * group;
                let from = (n * kv_heads + kv_head) * block_len + panel * block_rows * LANES;
                let from = attended.get(from..from + block_rows * LANES).unwrap_or_default();
                let from = from.chunks_exact(LANES).skip(member).step_by(group);
                out.chunks_exact_mut(LANES).zip(from).for_each(|(out, from)| out.copy_from_slice(from));
            }
        }
    }
}

impl Sequence<'_> {
    fn blocks(&self, positions: usize) -> impl Iterator<Item = Block<'_>> {
        let Range { start, end } = self.rows;
        let block = move |first| Block { sequence: self, rows: first..(first + positions).min(end) };
        (start..end).step_by(positions).map(block)
    }
}

impl Local {
    fn prepare(&mut self, rows: usize, head_dim: usize) {
        self.queries.resize(rows * head_dim, 0.0);
        self.scores.resize(TILE_KEYS * rows, 0.0);
        self.max.clear();
        self.max.resize(rows, f32::NEG_INFINITY);
        self.sum.clear();
        self.sum.resize(rows, 0.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::LayerKv;

    fn config() -> Config {
        Config {
            name: String::new(),
            layers: 1,
            hidden: 64,
            feed_forward: 16,
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            vocabulary: 16,
            context: 1024,
            rms_eps: 1e-5,
            rope_base: 1e4,
            rope_dims: 16,
        }
    }

    fn value(i: usize) -> f32 {
        ((i * 7919 + 13) % 1009) as f32 / 504.5 - 1.0
    }

    /// Query rows `start..start + rows`, head after head, from an oracle in `f64`.
    fn oracle(config: &Config, q: &[Vec<f32>], k: &[f16], v: &[f16], start: usize) -> Vec<Vec<f64>> {
        let (dim, kv_dim) = (config.head_dim, config.kv_dim());
        let row = |(i, q): (usize, &Vec<f32>)| {
            let mut out = Vec::new();
            for head in 0..config.heads {
                let kv = head / config.group() * dim;
                let key = |t: usize, d: usize| f64::from(k[t * kv_dim + kv + d].to_f32());
                let dot = |t: usize| (0..dim).map(|d| f64::from(q[head * dim + d]) * key(t, d)).sum::<f64>();
                let weights: Vec<f64> = (0..=start + i).map(|t| dot(t).exp2()).collect();
                let sum: f64 = weights.iter().sum();
                for d in 0..dim {
                    let value = |t: usize| f64::from(v[t * kv_dim + kv + d].to_f32());
                    out.push(weights.iter().enumerate().map(|(t, w)| w * value(t)).sum::<f64>() / sum);
                }
            }
            out
        };
        q.iter().enumerate().map(row).collect()
    }

    fn attend(config: &Config, kernels: Kernels, q: &[Vec<f32>], k: &[f16], v: &[f16], start: usize) -> Vec<Vec<f32>> {
        let mut queries = Acts::new(config.q_dim());
        queries.set_rows(q.len());
        q.iter().enumerate().for_each(|(row, q)| queries.set_row(row, q));
        let mut out = Acts::new(config.q_dim());
        out.set_rows(q.len());
        let tokens = start + q.len();
        let tiles = vec![f16::NAN; tokens.next_multiple_of(TILE_KEYS) * config.kv_dim()];
        let mut kv = LayerKv { k: k.to_vec(), v: v.to_vec(), tiles };
        kv.tile(kernels, 0..tokens, config.kv_heads, config.head_dim);
        let sequences = [Sequence { key_tiles: &kv.tiles, values: &kv.v, rows: 0..q.len(), start }];
        let attention = Attention { kernels, config, queries: &queries, sequences: &sequences };
        attention.run(&mut Scratch::new(2), &mut out);
        (0..q.len()).map(|row| out.row(row).flatten().copied().collect()).collect()
    }

    #[test]
    fn attention_agrees_with_an_oracle_and_with_itself_row_by_row() {
        let config = config();
        for (start, rows) in [(0, 1), (0, 70), (63, 2), (64, 1), (100, 131), (5, 64)] {
            let tokens = start + rows;
            let half = |i: usize| f16::from_f32(value(i));
            let k: Vec<f16> = (0..tokens * config.kv_dim()).map(half).collect();
            let v: Vec<f16> = (0..tokens * config.kv_dim()).map(|i| half(i + 500)).collect();
            let row = |r: usize| (0..config.q_dim()).map(|i| 3.0 * value(r * 64 + i + 77)).collect();
            let q: Vec<Vec<f32>> = (0..rows).map(row).collect();
            let got = attend(&config, Kernels::detect(), &q, &k, &v, start);
            assert_eq!(got, attend(&config, Kernels::scalar(), &q, &k, &v, start));
            for (i, (got, exact)) in got.iter().zip(oracle(&config, &q, &k, &v, start)).enumerate() {
                for (got, exact) in got.iter().zip(exact) {
                    assert!((f64::from(*got) - exact).abs() < 1e-5, "{got} {exact}");
                }
                // Alone, with no keys behind its own position.
                let seen = (start + i + 1) * config.kv_dim();
                let alone = attend(&config, Kernels::detect(), &q[i..=i], &k[..seen], &v[..seen], start + i);
                assert_eq!(got, &alone[0]);
            }
        }
    }
}
