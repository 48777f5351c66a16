//! Codecs on the KV of a real model that has read a real text: how small, how fast, how right.
//!
//! Invariant: a figure's reference is taken in the same run, on the same bytes: memcpy of them, and zstd at level 1 on the
//! same byte planes. Each frame counts with the least of its rounds, so what else the machine does is left out. Noise
//! shaped like KV was the alternative: it is not the exponents of a model.

use std::io::Write;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use comfy_table::{Attribute, Cell, CellAlignment};
use half::{bf16, f16};
use kvkeep::tiers::{Codec, Codecs, Frame};
use kvkeep::{CacheConfig, DType, KvCache, KvLayout, LayerView, Namespace, TensorView};
use kvkeep_engine::{Engine, KvBuffer, Logits};
use serde::Serialize;

use crate::cli::CodecsOptions;
use crate::stats::{float, mean, ratio};
use crate::{model, style, texts};

/// Tokens that are read, and those behind them whose predictions are compared.
const CONTEXT: usize = 2048;
const NEXT: usize = 64;

/// A codec on KV of a dtype. Rates are in 1e9 bytes of KV a second, on one core.
#[derive(Debug, Serialize)]
struct Row {
    codec: String,
    /// What its blocks hold: a dtype, or `opaque bf16` for blocks of which it is not known.
    kv: String,
    ratio: f64,
    encode_gb_s: f64,
    decode_gb_s: f64,
    memcpy_gb_s: f64,
    /// Mean divergence of next-token distributions, in nats, from those with the KV as it was.
    kl: f64,
    /// Of predictions, the part whose likeliest token is the same.
    top1: f64,
    /// The largest difference of an element.
    max_error: f64,
    bit_exact: bool,
}

/// What `zstd -b1` says of the same planes.
#[derive(Debug, Serialize)]
struct Zstd {
    kv: String,
    ratio: f64,
    encode_gb_s: f64,
    decode_gb_s: f64,
}

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    context_tokens: usize,
    block_tokens: u32,
    results: Vec<Row>,
    zstd_level_1: Vec<Zstd>,
}

/// A model, and the tokens that it reads: whole blocks, and what comes behind them.
#[derive(Debug)]
struct Setting<'a> {
    engine: &'a Engine,
    namespace: &'a Namespace,
    context: &'a [u32],
    next: &'a [u32],
}

/// KV of a text in some dtype, as frames; block behind block.
#[derive(Debug)]
struct Sample {
    name: String,
    dtype: DType,
    frames: Vec<(Frame, Vec<u8>)>,
}

/// How long each way took: the least of the rounds, summed over frames.
#[derive(Debug, Default)]
struct Times {
    encode: f64,
    decode: f64,
    copy: f64,
}

pub(super) fn run(options: &CodecsOptions, quick: bool, json: bool) -> Result<ExitCode> {
    let engine = model::load(options.model.as_deref(), &model::options(options.threads))?;
    let namespace = engine.namespace(options.block_tokens)?;
    let tokens = text(&engine)?;
    let (context, next) = tokens.split_at(CONTEXT - CONTEXT % namespace.layout().block_tokens());
    let setting = Setting { engine: &engine, namespace: &namespace, context, next };
    let mut kv = engine.kv(CONTEXT)?;
    eprintln!("kvkeep bench: the model reads {} tokens", context.len());
    engine.prefill(context, &mut kv)?;
    let (mut results, mut zstd) = (Vec::new(), Vec::new());
    for (dtype, is_opaque) in [(DType::BF16, false), (DType::BF16, true), (DType::F16, false), (DType::F32, false)] {
        let sample = Sample::new(&kv, &namespace, dtype, is_opaque)?;
        let exact = sample.predictions(&setting, &sample.bytes())?;
        for name in Codecs::names().into_iter().filter(|name| *name != "raw") {
            eprintln!("kvkeep bench: {name}, {}", sample.name);
            let codecs = Codecs::named(name)?;
            let codec = codecs.writing(namespace.id()).context("a codec that writes nothing")?;
            if is_opaque && !codec.is_exact() {
                // Nobody knows what in them is K: they go through `lossless`.
                continue;
            }
            let (mut row, decoded) = sample.measure(codec.as_ref(), if quick { 3 } else { 15 })?;
            (row.kl, row.top1) = compare(&exact, &sample.predictions(&setting, &decoded)?);
            results.push(row);
        }
        zstd.extend(sample.zstd()?);
    }
    let model = model::name(options.model.as_deref());
    let (context_tokens, block_tokens) = (context.len(), options.block_tokens);
    let report = Report { model, context_tokens, block_tokens, results, zstd_level_1: zstd };
    style::say(&if json { serde_json::to_string_pretty(&report)? } else { report.table() })?;
    Ok(ExitCode::SUCCESS)
}

/// So many tokens of the texts of the demos.
fn text(engine: &Engine) -> Result<Vec<u32>> {
    let all: Vec<&str> = texts::DOCUMENTS.iter().map(|document| document.text).collect();
    let mut tokens = engine.tokenizer().encode_prompt(&all.join("\n\n"))?;
    ensure!(tokens.len() >= CONTEXT + NEXT, "the texts have only {} tokens", tokens.len());
    tokens.truncate(CONTEXT + NEXT);
    Ok(tokens)
}

impl Sample {
    /// The whole blocks of what an engine has, in another dtype.
    fn new(kv: &KvBuffer, namespace: &Namespace, dtype: DType, is_opaque: bool) -> Result<Self> {
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

    fn bytes(&self) -> Vec<u8> {
        self.frames.iter().flat_map(|(_, raw)| raw.iter().copied()).collect()
    }

    fn measure(&self, codec: &dyn Codec, rounds: usize) -> Result<(Row, Vec<u8>)> {
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
        Ok((self.row(codec, &times, stored_bytes, &decoded), decoded))
    }

    fn row(&self, codec: &dyn Codec, times: &Times, stored_bytes: usize, decoded: &[u8]) -> Row {
        let raw = self.bytes();
        let rate = |seconds: f64| float(raw.len()) / seconds / 1e9;
        let values = values(&raw, self.dtype).into_iter().zip(values(decoded, self.dtype));
        Row {
            codec: codec.name().to_owned(),
            kv: self.name.clone(),
            ratio: ratio(float(raw.len()), float(stored_bytes)),
            encode_gb_s: rate(times.encode),
            decode_gb_s: rate(times.decode),
            memcpy_gb_s: rate(times.copy),
            kl: 0.0,
            top1: 0.0,
            max_error: values.map(|(one, other)| f64::from((one - other).abs())).fold(0.0, f64::max),
            bit_exact: raw == decoded,
        }
    }

    /// What the model predicts behind KV of these bytes, which it has from a cache.
    fn predictions(&self, setting: &Setting<'_>, bytes: &[u8]) -> Result<Vec<Logits>> {
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
        let mut kv = setting.engine.kv(CONTEXT + NEXT)?;
        found.load(0..layers, &mut kv.import(found.cached_tokens())?)?;
        Ok(setting.engine.prefill_all_logits(setting.next, &mut kv)?)
    }

    /// The same planes through zstd, where it is installed: frame by frame, as codecs must.
    fn zstd(&self) -> Result<Option<Zstd>> {
        let mut planes = tempfile::NamedTempFile::new()?;
        for (_, raw) in &self.frames {
            planes.write_all(&split(raw, self.dtype))?;
        }
        planes.flush()?;
        let frame_bytes = self.frames.first().map_or(0, |(_, raw)| raw.len());
        let mut zstd = Command::new("zstd");
        zstd.args(["-b1", "-e1", "-i2"]).arg(format!("-B{frame_bytes}")).arg(planes.path());
        let Ok(output) = zstd.output() else {
            eprintln!("kvkeep bench: zstd is not installed: its figures are left out");
            return Ok(None);
        };
        let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        Ok(figures(&text).map(|[ratio, encode, decode]| Zstd {
            kv: self.name.clone(),
            ratio,
            encode_gb_s: encode / 1e3,
            decode_gb_s: decode / 1e3,
        }))
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
        dtype => anyhow::bail!("KV in {dtype} is not measured"),
    })
}

fn values(bytes: &[u8], dtype: DType) -> Vec<f32> {
    let halves = bytes.as_chunks::<2>().0.iter();
    match dtype {
        DType::F32 => bytes.as_chunks::<4>().0.iter().map(|element| f32::from_le_bytes(*element)).collect(),
        DType::BF16 => halves.map(|element| bf16::from_le_bytes(*element).to_f32()).collect(),
        _ => halves.map(|element| f16::from_le_bytes(*element).to_f32()).collect(),
    }
}

/// Byte planes with exponents in one of them, as `lossless` has them.
fn split(raw: &[u8], dtype: DType) -> Vec<u8> {
    let size = dtype.size_bytes();
    let turned: Vec<u8> = match size {
        2 => raw.as_chunks().0.iter().flat_map(|half| u16::from_le_bytes(*half).rotate_left(1).to_le_bytes()).collect(),
        _ => raw.as_chunks().0.iter().flat_map(|one| u32::from_le_bytes(*one).rotate_left(1).to_le_bytes()).collect(),
    };
    (0..size).flat_map(|plane| turned.iter().skip(plane).step_by(size).copied()).collect()
}

/// Ratio, and MB/s of both ways, of what `zstd -b` prints last: `... -> 123 (x1.475), 405.3 MB/s, 1345.6 MB/s`.
fn figures(text: &str) -> Option<[f64; 3]> {
    let last = text.rsplit("->").find(|part| part.matches("MB/s").count() >= 2)?;
    let (_, ratio) = last.split_once('(')?;
    let (ratio, rates) = ratio.split_once(')')?;
    let mut rates = rates.split(',').filter_map(|rate| rate.trim().split_once(' ')?.0.trim().parse().ok());
    Some([ratio.trim_start_matches('x').trim().parse().ok()?, rates.next()?, rates.next()?])
}

/// Mean divergence of the distributions, and the part of equal likeliest tokens.
fn compare(exact: &[Logits], others: &[Logits]) -> (f64, f64) {
    let both = || exact.iter().zip(others);
    let divergences: Vec<f64> = both().map(|(one, other)| divergence(one.as_slice(), other.as_slice())).collect();
    let same = both().filter(|(one, other)| one.argmax() == other.argmax()).count();
    (mean(&divergences), ratio(float(same), float(exact.len())))
}

/// Kullback and Leibler's, of the distributions of these logits.
fn divergence(exact: &[f32], other: &[f32]) -> f64 {
    let log_sum = |logits: &[f32]| {
        let most = f64::from(logits.iter().copied().fold(f32::MIN, f32::max));
        most + logits.iter().map(|logit| (f64::from(*logit) - most).exp()).sum::<f64>().ln()
    };
    let (exact_sum, other_sum) = (log_sum(exact), log_sum(other));
    let each = exact.iter().zip(other).map(|(one, other)| {
        let (p, q) = (f64::from(*one) - exact_sum, f64::from(*other) - other_sum);
        p.exp() * (p - q)
    });
    each.sum::<f64>().max(0.0)
}

impl Report {
    fn table(&self) -> String {
        let mut table = style::table();
        let head = ["codec", "KV", "ratio", "encode GB/s", "decode GB/s", "memcpy GB/s", "KL", "top 1", "max error"];
        table.set_header(head.map(|text| Cell::new(text).add_attribute(Attribute::Bold)));
        let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
        for row in &self.results {
            let error = if row.bit_exact { "none: bit-exact".to_owned() } else { format!("{:.4}", row.max_error) };
            let numbers = [row.ratio, row.encode_gb_s, row.decode_gb_s, row.memcpy_gb_s];
            let mut cells = vec![Cell::new(&row.codec), Cell::new(&row.kv)];
            cells.extend(numbers.map(|number| right(format!("{number:.2}"))));
            cells.extend([format!("{:.5}", row.kl), format!("{:.1}%", row.top1 * 100.0), error].map(right));
            table.add_row(cells);
        }
        for zstd in &self.zstd_level_1 {
            let numbers = [zstd.ratio, zstd.encode_gb_s, zstd.decode_gb_s].map(|number| right(format!("{number:.2}")));
            let name = [Cell::new("zstd -1, same planes"), Cell::new(&zstd.kv)];
            table.add_row(name.into_iter().chain(numbers));
        }
        table.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_zstd_prints_is_understood() {
        let text = "\r 1#planes :  47185920 ->\r 1#planes : 47185920 -> 31981568 (x1.475),  405.3 MB/s \r 1#planes : 47185920 \
                    ->  31981568 (x1.475),  405.3 MB/s, 1345.6 MB/s \n";
        assert_eq!(figures(text), Some([1.475, 405.3, 1345.6]));
        assert_eq!(figures("zstd: error"), None);
    }

    #[test]
    fn equal_distributions_do_not_diverge_and_others_do() {
        assert_eq!(divergence(&[1.0, 2.0, 3.0], &[1.0, 2.0, 3.0]), 0.0);
        let (even, certain) = ([0.0, 0.0], [100.0, 0.0]);
        assert!((divergence(&certain, &even) - std::f64::consts::LN_2).abs() < 1e-9);
    }

    #[test]
    fn planes_have_the_exponents_together() {
        let bytes: Vec<u8> = [1.0f32, -1.5].iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect();
        assert_eq!(split(&bytes, DType::BF16), [0, 0x81, 127, 127]);
    }
}
