//! The same transformer on candle tensors, for any of candle's devices.
//!
//! On the CPU it is the independent oracle of the kernels' tests; with the feature `cuda`
//! it runs on a GPU. There the order of a sum depends on the shapes of a launch, so prompts
//! run on a fixed grid of positions: KV of a grid cell has the same bits in every request, and
//! the grid is part of the namespace. The CPU's own kernels need no grid.

use std::path::Path;

use candle_core::{D, DType, Device, Tensor};
use half::f16;
use kvkeep::{KvLayout, Namespace};

use crate::config::Config;
use crate::engine::Logits;
use crate::error::{EngineError, Result};
use crate::gguf::Gguf;
use crate::kv::KvBuffer;

/// A model on a candle device, computing in `f32` over `f16` KV.
#[derive(Debug)]
pub struct DeviceModel {
    config: Config,
    device: Device,
    revision: String,
    /// Tokens of a prefill cell; cells begin at multiples of it.
    grid: usize,
    embedding: Tensor,
    head: Tensor,
    norm: Tensor,
    layers: Vec<Layer>,
    /// Angle of each pair of dimensions per position.
    frequencies: Vec<f64>,
}

#[derive(Debug)]
struct Layer {
    attention_norm: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    feed_forward_norm: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
}

/// KV on the device: for each layer K and V, `[tokens, kv_heads, head_dim]`, `f16`.
#[derive(Debug, Clone)]
pub struct DeviceKv {
    layers: Vec<Option<(Tensor, Tensor)>>,
    len: usize,
}

impl DeviceKv {
    /// Tokens whose KV is there.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Is there none?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl DeviceModel {
    /// Loads a GGUF file onto a device. `grid` is the number of tokens that a prefill computes at
    /// once: the cache's block size.
    ///
    /// # Errors
    /// As [`Engine::load`](crate::Engine::load), and [`EngineError::Device`].
    pub fn load(path: impl AsRef<Path>, device: &Device, grid: usize) -> Result<Self> {
        let gguf = Gguf::open(path.as_ref())?;
        let config = Config::read(&gguf)?;
        if config.rope_dims != config.head_dim {
            return Err(EngineError::Unsupported("it rotates only part of each head".to_owned()));
        }
        let mut reader = gguf.reader()?;
        let mut tensor = |name: &str, dims: &[usize]| -> Result<Tensor> {
            let tensor = Tensor::from_vec(gguf.tensor(&mut reader, name, dims)?, dims, device)?;
            // Matrices are rounded as the kernels' are, vectors are not.
            Ok(if dims.len() < 2 { tensor } else { tensor.to_dtype(DType::F16)?.to_dtype(DType::F32)? })
        };
        let table = [config.vocabulary, config.hidden];
        let embedding = tensor("token_embd.weight", &table)?;
        let head = if gguf.has_tensor("output.weight") { tensor("output.weight", &table)? } else { embedding.clone() };
        let norm = tensor("output_norm.weight", &[config.hidden])?;
        let factors = match gguf.has_tensor("rope_freqs.weight") {
            true => tensor("rope_freqs.weight", &[config.rope_dims / 2])?.to_vec1::<f32>()?,
            false => vec![1.0; config.rope_dims / 2],
        };
        let layers = (0..config.layers).map(|i| Layer::load(&config, i, &mut tensor)).collect::<Result<_>>()?;
        let frequencies = frequencies(&config, &factors);
        let (revision, device) = (gguf.sha256()?, device.clone());
        Ok(Self { config, device, revision, grid: grid.max(1), embedding, head, norm, layers, frequencies })
    }

    /// An empty KV.
    #[must_use]
    pub fn kv(&self) -> DeviceKv {
        DeviceKv { layers: vec![None; self.config.layers], len: 0 }
    }

    /// What this model's KV is cached under: it is not the CPU kernels' KV.
    ///
    /// # Errors
    /// [`EngineError::Cache`] if the grid makes no block size.
    pub fn namespace(&self) -> Result<Namespace> {
        let dim = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
        let (layers, heads, head_dim) = (dim(self.config.layers), dim(self.config.kv_heads), dim(self.config.head_dim));
        let layout = KvLayout::new(layers, heads, head_dim, kvkeep::DType::F16)?.with_block_tokens(dim(self.grid))?;
        let device = format!("{:?}", self.device.location());
        let engine = format!("kvkeep-engine candle 1: f32 over f16 KV on {device}, grid {}", self.grid);
        Ok(Namespace::new(&self.config.name, layout).with_revision(&self.revision).with_engine(engine))
    }

    /// Appends the KV of `tokens`; returns the logits of the last one.
    ///
    /// # Errors
    /// [`EngineError::EmptyTokens`], [`EngineError::UnknownToken`],
    /// [`EngineError::ContextOverflow`], [`EngineError::Device`].
    pub fn prefill(&self, tokens: &[u32], kv: &mut DeviceKv) -> Result<Logits> {
        self.check(tokens, kv)?;
        let mut rest = tokens;
        let mut last = None;
        while !rest.is_empty() {
            let cell = self.grid - kv.len % self.grid;
            let (now, later) = rest.split_at(cell.min(rest.len()));
            last = Some(self.cell(now, kv)?);
            rest = later;
        }
        let x = last.ok_or(EngineError::EmptyTokens)?;
        let x = x.narrow(0, x.dim(0)? - 1, 1)?;
        let logits = self.normalize(&x, &self.norm)?.matmul(&self.head.t()?)?;
        Ok(Logits(logits.flatten_all()?.to_vec1::<f32>()?))
    }

    /// Copies KV from the host, as [`KvBuffer::import`] had it filled from a cache.
    ///
    /// # Errors
    /// [`EngineError::ForeignKv`], [`EngineError::Device`].
    pub fn import(&self, from: &KvBuffer) -> Result<DeviceKv> {
        if !from.fits(&self.config) {
            return Err(EngineError::ForeignKv);
        }
        let mut kv = self.kv();
        if from.is_empty() {
            return Ok(kv);
        }
        let shape = (from.len(), self.config.kv_heads, self.config.head_dim);
        for (to, from) in kv.layers.iter_mut().zip(from.views()?) {
            let tensor = |view: &kvkeep::TensorView<'_>| -> Result<Tensor> {
                Ok(Tensor::from_slice(view.elements::<f16>()?, shape, &self.device)?)
            };
            *to = Some((tensor(&from.k)?, tensor(&from.v)?));
        }
        kv.len = from.len();
        Ok(kv)
    }

    /// Copies KV to the host, to be stored in a cache. Only whole cells of the grid have the
    /// same bits in every request.
    ///
    /// # Errors
    /// [`EngineError::ForeignKv`], [`EngineError::ContextOverflow`], [`EngineError::Device`].
    pub fn export(&self, from: &DeviceKv, to: &mut KvBuffer) -> Result<()> {
        if !to.fits(&self.config) {
            return Err(EngineError::ForeignKv);
        }
        to.check_room(from.len)?;
        let elements = from.len * self.config.kv_dim();
        for (from, to) in from.layers.iter().zip(to.layers_mut()) {
            let Some((k, v)) = from else { continue };
            for (from, to) in [(k, &mut to.k), (v, &mut to.v)] {
                let host = from.flatten_all()?.to_vec1::<f16>()?;
                to.get_mut(..elements).unwrap_or_default().copy_from_slice(&host);
            }
        }
        to.truncate(0);
        to.advance(from.len);
        Ok(())
    }

    fn check(&self, tokens: &[u32], kv: &DeviceKv) -> Result<()> {
        let (vocabulary, context) = (self.config.vocabulary, self.config.context);
        if tokens.is_empty() {
            return Err(EngineError::EmptyTokens);
        }
        if let Some(token) = tokens.iter().find(|token| **token as usize >= vocabulary) {
            return Err(EngineError::UnknownToken { token: *token, vocabulary });
        }
        match kv.len + tokens.len() {
            tokens if tokens > context => Err(EngineError::ContextOverflow { tokens, capacity: context }),
            _ => Ok(()),
        }
    }

    /// All layers for the tokens of one cell; the hidden state of each.
    fn cell(&self, tokens: &[u32], kv: &mut DeviceKv) -> Result<Tensor> {
        let ids = Tensor::new(tokens, &self.device)?;
        let mut x = self.embedding.index_select(&ids, 0)?;
        let turns = self.turns(kv.len, tokens.len())?;
        let mask = self.mask(kv.len, tokens.len())?;
        for (layer, kv) in self.layers.iter().zip(&mut kv.layers) {
            let normed = self.normalize(&x, &layer.attention_norm)?;
            x = (x + self.attend(layer, &normed, &turns, &mask, kv)?)?;
            let normed = self.normalize(&x, &layer.feed_forward_norm)?;
            let hidden = (normed.matmul(&layer.gate.t()?)?.silu()? * normed.matmul(&layer.up.t()?)?)?;
            x = (x + hidden.matmul(&layer.down.t()?)?)?;
        }
        kv.len += tokens.len();
        Ok(x)
    }

    fn attend(
        &self,
        layer: &Layer,
        x: &Tensor,
        turns: &(Tensor, Tensor),
        mask: &Tensor,
        kv: &mut Option<(Tensor, Tensor)>,
    ) -> Result<Tensor> {
        let (rows, config) = (x.dim(0)?, &self.config);
        let heads = |x: Tensor, heads: usize| x.reshape((rows, heads, config.head_dim));
        let q = rotate(&heads(x.matmul(&layer.q.t()?)?, config.heads)?, turns)?;
        let k = rotate(&heads(x.matmul(&layer.k.t()?)?, config.kv_heads)?, turns)?.to_dtype(DType::F16)?;
        let v = heads(x.matmul(&layer.v.t()?)?, config.kv_heads)?.to_dtype(DType::F16)?;
        let (k, v) = match kv.take() {
            Some((old_k, old_v)) => (Tensor::cat(&[&old_k, &k], 0)?, Tensor::cat(&[&old_v, &v], 0)?),
            None => (k, v),
        };
        // [kv_head, member of its group, row, head_dim]
        let grouped = q.reshape((rows, config.kv_heads, config.group(), config.head_dim))?.permute((1, 2, 0, 3))?;
        let (spread_k, spread_v) = (self.spread(&k)?, self.spread(&v)?);
        #[expect(clippy::cast_precision_loss, reason = "head sizes are far below 2^52")]
        let scale = (config.head_dim as f64).sqrt();
        let scores = (grouped.contiguous()?.matmul(&spread_k.transpose(2, 3)?.contiguous()?)? / scale)?;
        let scores = scores.broadcast_add(mask)?;
        let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        let out = weights.matmul(&spread_v)?.permute((2, 0, 1, 3))?.reshape((rows, config.q_dim()))?;
        *kv = Some((k, v));
        Ok(out.matmul(&layer.output.t()?)?)
    }

    /// `[tokens, kv_heads, head_dim]` to `[kv_heads, group, tokens, head_dim]` in `f32`.
    fn spread(&self, x: &Tensor) -> Result<Tensor> {
        let (tokens, kv_heads, head_dim) = x.dims3()?;
        let x = x.to_dtype(DType::F32)?.transpose(0, 1)?.unsqueeze(1)?;
        Ok(x.expand((kv_heads, self.config.group(), tokens, head_dim))?.contiguous()?)
    }

    fn normalize(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
        let inverse = (mean + f64::from(self.config.rms_eps))?.sqrt()?.recip()?;
        Ok(x.broadcast_mul(&inverse)?.broadcast_mul(weight)?)
    }

    /// Cosines and sines, `[rows, 1, head_dim / 2]`.
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "as the kernels do it")]
    fn turns(&self, start: usize, rows: usize) -> Result<(Tensor, Tensor)> {
        let angles = (start..start + rows).flat_map(|at| self.frequencies.iter().map(move |f| at as f64 * f));
        let (sin, cos): (Vec<f32>, Vec<f32>) = angles.map(|angle| (angle.sin() as f32, angle.cos() as f32)).unzip();
        let shape = (rows, 1, self.frequencies.len());
        Ok((Tensor::from_vec(cos, shape, &self.device)?, Tensor::from_vec(sin, shape, &self.device)?))
    }

    /// 0 where a row sees a key, minus infinity where not: `[rows, start + rows]`.
    fn mask(&self, start: usize, rows: usize) -> Result<Tensor> {
        let seen = |row: usize, key: usize| if key <= start + row { 0.0 } else { f32::NEG_INFINITY };
        let mask = (0..rows).flat_map(|row| (0..start + rows).map(move |key| seen(row, key))).collect::<Vec<f32>>();
        Ok(Tensor::from_vec(mask, (rows, start + rows), &self.device)?)
    }
}

impl Layer {
    fn load(config: &Config, layer: usize, tensor: &mut impl FnMut(&str, &[usize]) -> Result<Tensor>) -> Result<Self> {
        let (hidden, q, kv, ff) = (config.hidden, config.q_dim(), config.kv_dim(), config.feed_forward);
        let mut tensor = |name: &str, dims: &[usize]| tensor(&format!("blk.{layer}.{name}.weight"), dims);
        Ok(Self {
            attention_norm: tensor("attn_norm", &[hidden])?,
            q: tensor("attn_q", &[q, hidden])?,
            k: tensor("attn_k", &[kv, hidden])?,
            v: tensor("attn_v", &[kv, hidden])?,
            output: tensor("attn_output", &[hidden, q])?,
            feed_forward_norm: tensor("ffn_norm", &[hidden])?,
            gate: tensor("ffn_gate", &[ff, hidden])?,
            up: tensor("ffn_up", &[ff, hidden])?,
            down: tensor("ffn_down", &[hidden, ff])?,
        })
    }
}

#[expect(clippy::cast_precision_loss, reason = "dimensions are far below 2^52")]
fn frequencies(config: &Config, factors: &[f32]) -> Vec<f64> {
    let exponent = |pair: usize| -2.0 * pair as f64 / config.rope_dims as f64;
    factors.iter().enumerate().map(|(i, f)| config.rope_base.powf(exponent(i)) / f64::from(*f)).collect()
}

/// Turns neighbouring pairs of `[rows, heads, head_dim]`.
fn rotate(x: &Tensor, (cos, sin): &(Tensor, Tensor)) -> Result<Tensor> {
    let (rows, heads, dim) = x.dims3()?;
    let pairs = x.reshape((rows, heads, dim / 2, 2))?;
    let (even, odd) = (pairs.narrow(3, 0, 1)?.squeeze(3)?, pairs.narrow(3, 1, 1)?.squeeze(3)?);
    let turned_even = (even.broadcast_mul(cos)? - odd.broadcast_mul(sin)?)?;
    let turned_odd = (odd.broadcast_mul(cos)? + even.broadcast_mul(sin)?)?;
    Ok(Tensor::stack(&[turned_even, turned_odd], 3)?.reshape((rows, heads, dim))?)
}
