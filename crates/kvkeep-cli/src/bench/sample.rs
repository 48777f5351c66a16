//! KV of a real model that has read a real text, as codecs take it, and the model that goes on behind what they made of it.
//!
//! Invariant: each frame counts with the least of its rounds, so what else the machine does is left out.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use half::{bf16, f16};
use kvkeep::tiers::{Codec, Frame};
use kvkeep::{CacheConfig, DType, KvCache, KvLayout, LayerView, Namespace, TensorView};
use kvkeep_engine::{Engine, KvBuffer, Logits};

use crate::stats::{float, mean, ratio};

/// A model, and the tokens that it reads: whole blocks, and what comes behind them.
#[derive(Debug)]
pub(super) struct Setting<'a> {
    pub(super) engine: &'a Engine,
    pub(super) namespace: &'a Namespace,
    pub(super) context: &'a [u32],
    pub(super) next: &'a [u32],
}

/// KV of a text in some dtype, as frames; block behind block.
#[derive(Debug)]
pub(super) struct Sample {
    pub(super) name: String,
    pub(super) dtype: DType,
    pub(super) frames: Vec<(Frame, Vec<u8>)>,
}

/// How long each way took: the least of the rounds, summed over frames.
#[derive(Debug, Default)]
pub(super) struct Times {
    pub(super) encode: f64,
    pub(super) decode: f64,
    pub(super) copy: f64,
}

/// What came of a sample.
#[derive(Debug)]
pub(super) struct Measured {
    pub(super) times: Times,
    pub(super) stored_bytes: usize,
    pub(super) decoded: Vec<u8>,
}

impl Sample {
    /// The whole blocks of what an engine has, in another dtype.
    pub(super) fn new(kv: &KvBuffer, namespace: &Namespace, dtype: DType, is_opaque: bool) -> Result<Self> {
        let own = namespace.layout();
        let (layers, block_tokens) = (u32::try_from(own.layers())?, own.block_tokens());
        let layout = KvLayout::new(layers, u32::try_from(own.kv_heads())?, u32::try_from(own.k_head_dim())?, dtype)?;
        let layout = layout.with_block_tokens(u32::try_from(block_tokens)?)?;
        let (views, blocks) = (kv.views()?, kv.len() / block_tokens);
        let mut frames = Vec::new();
        for block in 0..blocks {
            let mut bytes = Vec::with_capacity(layout.block_bytes());
            for side in views.iter().flat_map(|layer| [layer.k, layer.v]) {
                let row = side.bytes().len() / kv.len();
                let of_block = side.bytes().get(block * block_tokens * row..(block + 1) * block_tokens * row);
                bytes.extend(converted(of_block.context("a view is too short")?, dtype)?);
            }
            let whole = if is_opaque { opaque(&layout)?.frames() } else { layout.frames() };
            for mut frame in whole {
                // As tiers do it with the first block of a prompt.
                frame.exact_tokens = [if block == 0 { 4 } else { 0 }, 0];
                let raw = bytes.get(frame.range.clone()).context("a frame is too long")?.to_vec();
                frames.push((frame, raw));
            }
        }
        let name = if is_opaque { format!("opaque {dtype}") } else { dtype.to_string() };
        Ok(Self { name, dtype, frames })
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        self.frames.iter().flat_map(|(_, raw)| raw.iter().copied()).collect()
    }

    /// Through a codec and back.
    pub(super) fn through(&self, codec: &dyn Codec) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        for (frame, raw) in &self.frames {
            let (mut stored, mut again) = (vec![0; raw.len() - 1], raw.clone());
            if let Some(kept) = codec.encode(frame, raw, &mut stored).and_then(|bytes| stored.get(..bytes)) {
                ensure!(codec.decode(frame, kept, &mut again), "{} cannot read what it wrote", codec.name());
            }
            all.extend(again);
        }
        Ok(all)
    }

    /// Through a codec and back, so many times.
    pub(super) fn measure(&self, codec: &dyn Codec, rounds: usize) -> Result<Measured> {
        let (mut times, mut stored_bytes, mut decoded) = (Times::default(), 0, Vec::new());
        for (frame, raw) in &self.frames {
            let (mut least, mut stored, mut again) = ([f64::MAX; 3], vec![0; raw.len()], vec![0; raw.len()]);
            let mut length = raw.len();
            for _ in 0..rounds {
                let [encode, decode, copy] = &mut least;
                // A frame that does not become shorter is kept as it is.
                let room = stored.len() - 1;
                let room = stored.get_mut(..room).unwrap_or_default();
                let shorter = least_of(encode, || codec.encode(frame, raw, room));
                length = shorter.unwrap_or(raw.len());
                let kept = stored.get(..length).unwrap_or_default();
                let is_right = least_of(decode, || match shorter {
                    Some(_) => codec.decode(frame, kept, &mut again),
                    None => {
                        again.copy_from_slice(raw);
                        true
                    }
                });
                ensure!(is_right, "{} cannot read what it wrote", codec.name());
                least_of(copy, || std::hint::black_box(&mut stored).copy_from_slice(raw));
            }
            let [encode, decode, copy] = least;
            times = Times { encode: times.encode + encode, decode: times.decode + decode, copy: times.copy + copy };
            stored_bytes += length;
            decoded.extend(again);
        }
        Ok(Measured { times, stored_bytes, decoded })
    }

    /// The model's memory with KV of these bytes in it, which it has from a cache, and room for more tokens.
    pub(super) fn reused(&self, setting: &Setting<'_>, bytes: &[u8], room: usize) -> Result<KvBuffer> {
        let halves: Vec<f16> = values(bytes, self.dtype).into_iter().map(f16::from_f32).collect();
        let (layout, layers) = (setting.namespace.layout(), setting.namespace.layout().layers());
        let dims = [setting.context.len(), layout.kv_heads(), layout.k_head_dim()];
        let piece = layout.block_tokens() * layout.kv_heads() * layout.k_head_dim();
        let side = |number| halves.chunks_exact(piece).skip(number).step_by(2 * layers).flatten().copied().collect();
        let sides: Vec<Vec<f16>> = (0..2 * layers).map(side).collect();
        let pairs = sides.as_chunks::<2>().0.iter();
        let views = pairs.map(|[k, v]| Ok(LayerView { k: TensorView::of(k, &dims)?, v: TensorView::of(v, &dims)? }));
        let cache = KvCache::new(CacheConfig::new(1 << 30))?;
        cache.store(setting.namespace, setting.context, &views.collect::<Result<Vec<_>>>()?)?;
        let found = cache.lookup(setting.namespace, setting.context)?;
        let mut kv = setting.engine.kv(setting.context.len() + room)?;
        found.load(0..layers, &mut kv.import(found.cached_tokens())?)?;
        Ok(kv)
    }

    /// What the model predicts behind such KV.
    pub(super) fn predictions(&self, setting: &Setting<'_>, bytes: &[u8]) -> Result<Vec<Logits>> {
        let mut kv = self.reused(setting, bytes, setting.next.len())?;
        Ok(setting.engine.prefill_all_logits(setting.next, &mut kv)?)
    }
}

/// Runs `work`, and keeps the time if it is the least so far.
fn least_of<R>(least: &mut f64, work: impl FnOnce() -> R) -> R {
    let began = Instant::now();
    let result = std::hint::black_box(work());
    *least = least.min(began.elapsed().as_secs_f64());
    result
}

fn opaque(layout: &KvLayout) -> Result<KvLayout> {
    Ok(KvLayout::opaque(u32::try_from(layout.block_bytes())?, u32::try_from(layout.block_tokens())?)?)
}

/// Elements of `f16`, as those of another dtype.
fn converted(halves: &[u8], dtype: DType) -> Result<Vec<u8>> {
    let values = values(halves, DType::F16).into_iter();
    Ok(match dtype {
        DType::F16 => halves.to_vec(),
        DType::BF16 => values.flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect(),
        DType::F32 => values.flat_map(f32::to_le_bytes).collect(),
        // As engines have it whose scale is 1, vLLM's own if no other is given.
        DType::F8E4M3 => values.map(to_e4m3).collect(),
        dtype => anyhow::bail!("KV in {dtype} is not measured"),
    })
}

pub(super) fn values(bytes: &[u8], dtype: DType) -> Vec<f32> {
    let halves = bytes.as_chunks::<2>().0.iter();
    match dtype {
        DType::F32 => bytes.as_chunks::<4>().0.iter().map(|element| f32::from_le_bytes(*element)).collect(),
        DType::F8E4M3 => bytes.iter().copied().map(from_e4m3).collect(),
        DType::BF16 => halves.map(|element| bf16::from_le_bytes(*element).to_f32()).collect(),
        _ => halves.map(|element| f16::from_le_bytes(*element).to_f32()).collect(),
    }
}

/// A float of 8 bits: 4 of them exponent, 3 mantissa; two patterns are no number.
fn from_e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7) / 8.0);
    let size = if exponent == 0 { mantissa * 2f32.powi(-6) } else { (1.0 + mantissa) * 2f32.powi(exponent - 7) };
    if code & 0x7f == 0x7f { f32::NAN } else { size.copysign(if code & 0x80 == 0 { 1.0 } else { -1.0 }) }
}

/// The nearest one.
fn to_e4m3(value: f32) -> u8 {
    const MOST: u8 = 0x7e;
    let (size, sign) = (value.abs(), u8::from(value.is_sign_negative()) << 7);
    // Codes of positive numbers are in order.
    let (mut low, mut high) = (0, MOST);
    while low < high {
        let middle = low + (high - low) / 2;
        if (from_e4m3(middle) + from_e4m3(middle + 1)) / 2.0 < size && middle < MOST {
            low = middle + 1
        } else {
            high = middle
        }
    }
    low | sign
}

/// Mean divergence of the distributions, and the part of equal likeliest tokens.
pub(super) fn compare(exact: &[Logits], others: &[Logits]) -> (f64, f64) {
    let both = || exact.iter().zip(others);
    let divergences: Vec<f64> = both().map(|(one, other)| divergence(one.as_slice(), other.as_slice())).collect();
    let same = both().filter(|(one, other)| one.argmax() == other.argmax()).count();
    (mean(&divergences), ratio(float(same), float(exact.len())))
}

/// How surprising a token is, in nats.
pub(super) fn surprise(logits: &[f32], token: u32) -> f64 {
    let of_token = logits.get(token as usize).copied().unwrap_or(f32::MIN);
    log_sum(logits) - f64::from(of_token)
}

fn log_sum(logits: &[f32]) -> f64 {
    let most = f64::from(logits.iter().copied().fold(f32::MIN, f32::max));
    most + logits.iter().map(|logit| (f64::from(*logit) - most).exp()).sum::<f64>().ln()
}

/// Kullback and Leibler's, of the distributions of these logits.
fn divergence(exact: &[f32], other: &[f32]) -> f64 {
    let (exact_sum, other_sum) = (log_sum(exact), log_sum(other));
    let each = exact.iter().zip(other).map(|(one, other)| {
        let (p, q) = (f64::from(*one) - exact_sum, f64::from(*other) - other_sum);
        p.exp() * (p - q)
    });
    each.sum::<f64>().max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_of_eight_bits_are_the_nearest() {
        assert_eq!(
            [0x00, 0x01, 0x08, 0x38, 0x7e, 0xb8].map(from_e4m3),
            [0.0, 1.0 / 512.0, 1.0 / 64.0, 1.0, 448.0, -1.0]
        );
        for code in (0..=u8::MAX).filter(|code| code & 0x7f != 0x7f) {
            assert_eq!(to_e4m3(from_e4m3(code)), code);
        }
        assert_eq!(to_e4m3(1e9), 0x7e);
        assert_eq!(to_e4m3(1.05), 0x38);
        assert_eq!(to_e4m3(-1.07), 0xb9);
    }

    #[test]
    fn equal_distributions_do_not_diverge_and_others_do() {
        assert_eq!(divergence(&[1.0, 2.0, 3.0], &[1.0, 2.0, 3.0]), 0.0);
        let (even, certain) = ([0.0, 0.0], [100.0, 0.0]);
        assert!((divergence(&certain, &even) - std::f64::consts::LN_2).abs() < 1e-9);
    }
}
