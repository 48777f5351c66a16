//! Codecs on the KV of a real model that has read a real text: how small, how fast, how right.
//!
//! Invariant: a figure's reference is taken in the same run, on the same bytes: memcpy of them, and zstd at level 1 on the
//! same byte planes. Each frame counts with the least of its rounds, so what else the machine does is left out. Noise
//! shaped like KV was the alternative: it is not the exponents of a model.

use std::io::Write;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use comfy_table::{Attribute, Cell, CellAlignment};
use kvkeep::DType;
use kvkeep::tiers::{Codec, Codecs};
use kvkeep_engine::Engine;
use serde::Serialize;

use super::cold::{self, ColdLoad};
use super::sample::{Measured, Sample, Setting, compare, values};
use crate::cli::CodecsBench;
use crate::stats::{float, ratio};
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
    #[serde(skip_serializing_if = "Vec::is_empty")]
    cold_loads: Vec<ColdLoad>,
}

pub(super) fn run(bench: &CodecsBench, quick: bool, json: bool) -> Result<ExitCode> {
    let CodecsBench { model: options, cold } = bench;
    let engine = model::load(options.model.as_deref(), &model::options(options.threads))?;
    let namespace = engine.namespace(options.block_tokens)?;
    let tokens = text(&engine)?;
    let (context, next) = tokens.split_at(CONTEXT - CONTEXT % namespace.layout().block_tokens());
    let setting = Setting { engine: &engine, namespace: &namespace, context, next };
    let mut kv = engine.kv(CONTEXT)?;
    eprintln!("kvkeep bench: the model reads {} tokens", context.len());
    engine.prefill(context, &mut kv)?;
    let (mut results, mut zstd) = (Vec::new(), Vec::new());
    let kinds = [DType::BF16, DType::F16, DType::F32, DType::F8E4M3].map(|dtype| (dtype, false));
    for (dtype, is_opaque) in kinds.into_iter().chain([(DType::BF16, true)]) {
        let sample = Sample::new(&kv, &namespace, dtype, is_opaque)?;
        let exact = sample.predictions(&setting, &sample.bytes())?;
        for name in Codecs::names().into_iter().filter(|name| *name != "raw") {
            eprintln!("kvkeep bench: {name}, {}", sample.name);
            let codecs = Codecs::named(name)?;
            let codec = codecs.writing(namespace.id()).context("a codec that writes nothing")?;
            if (is_opaque || dtype == DType::F8E4M3) && !codec.is_exact() {
                // Nobody knows what in the one is K, and the other is small already: they go through `lossless`.
                continue;
            }
            let measured = sample.measure(codec.as_ref(), if quick { 3 } else { 15 })?;
            let mut row = sample.row(codec.as_ref(), &measured);
            (row.kl, row.top1) = compare(&exact, &sample.predictions(&setting, &measured.decoded)?);
            results.push(row);
        }
        zstd.extend(sample.zstd()?);
    }
    let cold_loads = match cold {
        Some(dir) => {
            let sample = Sample::new(&kv, &namespace, DType::BF16, false)?;
            cold::loads(dir, &sample, namespace.layout(), quick)?
        }
        None => Vec::new(),
    };
    let model = model::name(options.model.as_deref());
    let (context_tokens, block_tokens) = (context.len(), options.block_tokens);
    let report = Report { model, context_tokens, block_tokens, results, zstd_level_1: zstd, cold_loads };
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
    fn row(&self, codec: &dyn Codec, measured: &Measured) -> Row {
        let (raw, Measured { times, stored_bytes, decoded }) = (self.bytes(), measured);
        let rate = |seconds: f64| float(raw.len()) / seconds / 1e9;
        let values = values(&raw, self.dtype).into_iter().zip(values(decoded, self.dtype));
        Row {
            codec: codec.name().to_owned(),
            kv: self.name.clone(),
            ratio: ratio(float(raw.len()), float(*stored_bytes)),
            encode_gb_s: rate(times.encode),
            decode_gb_s: rate(times.decode),
            memcpy_gb_s: rate(times.copy),
            kl: 0.0,
            top1: 0.0,
            max_error: values.map(|(one, other)| f64::from((one - other).abs())).fold(0.0, f64::max),
            bit_exact: raw == *decoded,
        }
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

/// Byte planes with exponents in one of them, as `lossless` has them.
fn split(raw: &[u8], dtype: DType) -> Vec<u8> {
    let size = dtype.size_bytes();
    let turned: Vec<u8> = match size {
        1 => return raw.to_vec(),
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
        if self.cold_loads.is_empty() {
            return table.to_string();
        }
        let mut loads = style::table();
        let head = ["cold load of bf16 from the disk", "GB/s", "against raw"];
        loads.set_header(head.map(|text| Cell::new(text).add_attribute(Attribute::Bold)));
        for load in &self.cold_loads {
            let numbers = [format!("{:.2}", load.load_gb_s), format!("{:.2}x", load.against_raw)].map(right);
            loads.add_row([Cell::new(&load.codec)].into_iter().chain(numbers));
        }
        format!("{table}\n{loads}")
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn what_zstd_prints_is_understood() {
        let text = "\r 1#planes :  47185920 ->\r 1#planes : 47185920 -> 31981568 (x1.475),  405.3 MB/s \r 1#planes : 47185920 \
                    ->  31981568 (x1.475),  405.3 MB/s, 1345.6 MB/s \n";
        assert_eq!(figures(text), Some([1.475, 405.3, 1345.6]));
        assert_eq!(figures("zstd: error"), None);
    }

    #[test]
    fn planes_have_the_exponents_together() {
        let bytes: Vec<u8> = [1.0f32, -1.5].iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect();
        assert_eq!(split(&bytes, DType::BF16), [0, 0x81, 127, 127]);
    }
}
