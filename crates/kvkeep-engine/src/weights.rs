//! A model's weights: `f16`, packed once at load into the panels that the kernels read.
//!
//! `f16` was chosen over the file's own 4-bit blocks: a wide product has nothing to
//! unpack, and two bytes a weight keep decode near the speed of memory.

use half::f16;
use rayon::prelude::*;

use crate::config::Config;
use crate::error::Result;
use crate::gguf::Gguf;
use crate::simd::{Kernels, LANES};

/// A matrix of `outputs` x `inputs` in panels `[outputs / 16][inputs][16]`.
#[derive(Debug)]
pub(crate) struct Packed {
    data: Vec<f16>,
    inputs: usize,
}

/// The weights of one transformer layer.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) attention_norm: Vec<f32>,
    /// Queries, keys and values, one below the other.
    pub(crate) qkv: Packed,
    pub(crate) output: Packed,
    pub(crate) feed_forward_norm: Vec<f32>,
    /// A panel of gate, a panel of up, in turn.
    pub(crate) gate_up: Packed,
    pub(crate) down: Packed,
}

/// All weights of a model.
#[derive(Debug)]
pub(crate) struct Weights {
    pub(crate) embedding: Packed,
    /// `None` where the embedding serves as output matrix too.
    pub(crate) head: Option<Packed>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) norm: Vec<f32>,
    /// Divisors of the RoPE frequencies (Llama 3 and later).
    pub(crate) rope_factors: Option<Vec<f32>>,
}

impl Weights {
    /// Memory that they take, but for a few vectors.
    pub(crate) fn bytes(&self) -> usize {
        let of = |layer: &Layer| [&layer.qkv, &layer.output, &layer.gate_up, &layer.down].map(Packed::bytes);
        let layers: usize = self.layers.iter().flat_map(of).sum();
        layers + self.embedding.bytes() + self.head.as_ref().map_or(0, Packed::bytes)
    }
}

impl Packed {
    fn bytes(&self) -> usize {
        size_of_val(self.data.as_slice())
    }

    fn zeroed(outputs: usize, inputs: usize) -> Self {
        Self { data: vec![f16::ZERO; outputs.next_multiple_of(LANES) * inputs], inputs }
    }

    /// Puts row-major `rows` where `panel_of` says: from the n-th panel of `rows` to a panel of this matrix.
    fn put(&mut self, kernels: Kernels, rows: &[f32], panel_of: impl Fn(usize) -> usize + Sync) {
        let (inputs, stride) = (self.inputs, self.stride());
        let mut targets: Vec<Option<&mut [f16]>> = self.data.chunks_exact_mut(stride).map(Some).collect();
        let mut jobs = Vec::new();
        for (n, rows) in rows.chunks(LANES * inputs).enumerate() {
            if let Some(target) = targets.get_mut(panel_of(n)).and_then(Option::take) {
                jobs.push((rows, target));
            }
        }
        jobs.into_par_iter().with_min_len(8).for_each_init(
            || vec![0.0f32; stride],
            |columns, (rows, target)| {
                for (lane, row) in rows.chunks_exact(inputs).enumerate() {
                    for (to, value) in columns.iter_mut().skip(lane).step_by(LANES).zip(row) {
                        *to = *value;
                    }
                }
                kernels.narrow(columns, target);
            },
        );
    }

    /// Elements from one panel to the next.
    pub(crate) fn stride(&self) -> usize {
        self.inputs * LANES
    }

    pub(crate) fn inputs(&self) -> usize {
        self.inputs
    }

    pub(crate) fn panels(&self) -> usize {
        self.data.len() / self.stride()
    }

    /// This panel and all behind it.
    pub(crate) fn tail(&self, panel: usize) -> &[f16] {
        self.data.get(panel * self.stride()..).unwrap_or_default()
    }

    /// One output's weights, in order.
    pub(crate) fn row(&self, n: usize) -> impl Iterator<Item = f32> {
        self.tail(n / LANES).iter().skip(n % LANES).step_by(LANES).take(self.inputs).map(|value| value.to_f32())
    }
}

impl Weights {
    pub(crate) fn load(gguf: &Gguf, config: &Config, kernels: Kernels) -> Result<Self> {
        let mut reader = gguf.reader()?;
        let (vocabulary, hidden) = (config.vocabulary, config.hidden);
        let mut table = |name: &str| -> Result<Packed> {
            let rows = gguf.tensor(&mut reader, name, &[vocabulary, hidden])?;
            let mut packed = Packed::zeroed(vocabulary, hidden);
            packed.put(kernels, &rows, |n| n);
            Ok(packed)
        };
        let embedding = table("token_embd.weight")?;
        let head = if gguf.has_tensor("output.weight") { Some(table("output.weight")?) } else { None };
        let norm = gguf.tensor(&mut reader, "output_norm.weight", &[hidden])?;
        let factors = "rope_freqs.weight";
        let rope_factors =
            gguf.has_tensor(factors).then(|| gguf.tensor(&mut reader, factors, &[config.rope_dims / 2])).transpose()?;
        let layers = (0..config.layers)
            .into_par_iter()
            .map(|layer| Layer::load(gguf, config, kernels, layer))
            .collect::<Result<Vec<_>>>()?;
        Ok(Self { embedding, head, layers, norm, rope_factors })
    }

    /// The output matrix.
    pub(crate) fn head(&self) -> &Packed {
        self.head.as_ref().unwrap_or(&self.embedding)
    }
}

impl Layer {
    fn load(gguf: &Gguf, config: &Config, kernels: Kernels, layer: usize) -> Result<Self> {
        let mut reader = gguf.reader()?;
        let mut tensor =
            |name: &str, dims: &[usize]| gguf.tensor(&mut reader, &format!("blk.{layer}.{name}.weight"), dims);
        let (hidden, q_dim, kv_dim, ff) = (config.hidden, config.q_dim(), config.kv_dim(), config.feed_forward);
        let mut qkv = Packed::zeroed(q_dim + 2 * kv_dim, hidden);
        let mut at = 0;
        for (name, dim) in [("attn_q", q_dim), ("attn_k", kv_dim), ("attn_v", kv_dim)] {
            qkv.put(kernels, &tensor(name, &[dim, hidden])?, |n| at + n);
            at += dim / LANES;
        }
        let mut gate_up = Packed::zeroed(2 * ff, hidden);
        gate_up.put(kernels, &tensor("ffn_gate", &[ff, hidden])?, |n| 2 * n);
        gate_up.put(kernels, &tensor("ffn_up", &[ff, hidden])?, |n| 2 * n + 1);
        let mut output = Packed::zeroed(hidden, q_dim);
        output.put(kernels, &tensor("attn_output", &[hidden, q_dim])?, |n| n);
        let mut down = Packed::zeroed(hidden, ff);
        down.put(kernels, &tensor("ffn_down", &[hidden, ff])?, |n| n);
        Ok(Self {
            attention_norm: tensor("attn_norm", &[hidden])?,
            qkv,
            output,
            feed_forward_norm: tensor("ffn_norm", &[hidden])?,
            gate_up,
            down,
        })
    }
}
