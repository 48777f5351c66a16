//! What codecs cost in quality: what a real model predicts and answers behind KV that went through them, against the same
//! KV as it was.
//!
//! Invariant: the reference is the same model behind the same KV in bf16, in the same run; so a difference is the
//! codec's alone. Answers of `raw` are what they are: a small model that finds no needle says nothing of codecs, so its own
//! number is printed beside theirs. Perplexity alone was the alternative: it hides what changes and what does not.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use comfy_table::{Attribute, Cell, CellAlignment};
use kvkeep::tiers::{Codec, Codecs, Side};
use kvkeep::{DType, Namespace};
use kvkeep_engine::{ChatMessage, Engine, Logits};
use serde::Serialize;

use super::sample::{Sample, Setting, compare, surprise, values};
use crate::cli::{CodecsOptions, QualityOptions};
use crate::stats::{float, mean, ratio};
use crate::texts::{self, DOCUMENTS};
use crate::{model, plot, style};

/// A window of text: so many tokens through the codec, and so many behind them predicted.
const CONTEXT: usize = 1024;
const NEXT: usize = 256;
/// Windows begin so many tokens apart.
const STRIDE: usize = 512;
/// Tokens of an answer.
const ANSWER: usize = 24;
/// Questions about each document.
const QUESTIONS: usize = 8;
/// Where the needle is, in parts of the text.
const DEPTHS: [f64; 5] = [0.0, 0.25, 0.5, 0.75, 1.0];
const NEEDLE: &str = "The number of the golden key is 48213.";
const ASKED: &str = "What is the number of the golden key?";
const FOUND: &str = "48213";

/// A codec. Rates are in 1e9 bytes of KV a second, on one core; errors are of elements.
#[derive(Debug, Default, Serialize)]
struct Row {
    codec: String,
    ratio: f64,
    encode_gb_s: f64,
    decode_gb_s: f64,
    k_mean_error: f64,
    k_max_error: f64,
    v_mean_error: f64,
    v_max_error: f64,
    /// Mean divergence of next-token distributions, in nats.
    kl: f64,
    /// Of predictions, the part whose likeliest token is the same.
    top1: f64,
    /// Of the text behind the windows.
    perplexity: f64,
    /// Greedy answers that are the same, token for token.
    same_answers: usize,
    /// Needles that the answer names.
    needles: usize,
}

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    predictions: usize,
    answers: usize,
    needles: usize,
    results: Vec<Row>,
}

/// A text that was read, as KV, and what is asked behind it.
struct Reading {
    context: Vec<u32>,
    sample: Sample,
    asked: Vec<Vec<u32>>,
}

pub(super) fn run(options: &QualityOptions, quick: bool, json: bool) -> Result<ExitCode> {
    let CodecsOptions { model: path, threads, block_tokens } = &options.model;
    let engine = model::load(path.as_deref(), &model::options(*threads))?;
    let bench = Bench { namespace: engine.namespace(*block_tokens)?, engine, quick };
    let (windows, chats, needles) = (bench.windows()?, bench.chats()?, bench.needles()?);
    let mut results: Vec<Row> = Vec::new();
    let mut exact = Answers::default();
    for name in Codecs::names() {
        eprintln!("kvkeep bench quality: {name}");
        let codec = Codecs::known_as(name)?;
        let answers = Answers {
            predictions: windows.iter().map(|window| bench.predictions(window, &*codec)).collect::<Result<_>>()?,
            chats: bench.answers(&chats, &*codec)?,
            needles: bench.answers(&needles, &*codec)?,
        };
        if name == "raw" {
            exact = answers;
            results.push(bench.row(&*codec, &windows, &exact, &exact)?);
        } else {
            results.push(bench.row(&*codec, &windows, &answers, &exact)?);
        }
    }
    let report = Report {
        model: model::name(path.as_deref()),
        predictions: exact.predictions.iter().map(Vec::len).sum(),
        answers: exact.chats.len(),
        needles: exact.needles.len(),
        results,
    };
    if let Some(path) = &options.plot {
        report.plot(path)?;
    }
    style::say(&if json { serde_json::to_string_pretty(&report)? } else { report.table() })?;
    Ok(ExitCode::SUCCESS)
}

/// The model, and how much is asked of it.
struct Bench {
    engine: Engine,
    namespace: Namespace,
    quick: bool,
}

/// What a model says behind KV of a codec.
#[derive(Default)]
struct Answers {
    predictions: Vec<Vec<Logits>>,
    chats: Vec<Vec<u32>>,
    needles: Vec<Vec<u32>>,
}

impl Bench {
    /// Windows of the texts of the demos, each with the text behind it.
    fn windows(&self) -> Result<Vec<Reading>> {
        let all: Vec<&str> = DOCUMENTS.iter().map(|document| document.text).chain([texts::AGENT]).collect();
        let tokens = self.engine.tokenizer().encode_prompt(&all.join("\n\n"))?;
        let windows = tokens.windows(CONTEXT + NEXT).step_by(STRIDE).take(if self.quick { 2 } else { usize::MAX });
        let read: Vec<Reading> = windows.map(|window| self.read(window, CONTEXT, vec![])).collect::<Result<_>>()?;
        ensure!(!read.is_empty(), "the texts have only {} tokens", tokens.len());
        Ok(read)
    }

    /// Questions about each document, behind its text.
    fn chats(&self) -> Result<Vec<Reading>> {
        let questions = if self.quick { 2 } else { QUESTIONS };
        let documents = DOCUMENTS.iter().map(|document| {
            let asked: Vec<&str> = document.questions.iter().take(questions).copied().collect();
            self.chat(document.text, &asked)
        });
        documents.collect()
    }

    /// A fact somewhere in a text.
    fn needles(&self) -> Result<Vec<Reading>> {
        let text = DOCUMENTS.first().map_or("", |document| document.text);
        let sentences: Vec<&str> = text.split_inclusive(". ").collect();
        let hidden = DEPTHS.iter().map(|depth| {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a place among sentences")]
            let at = (float(sentences.len()) * depth) as usize;
            let (before, behind) = sentences.split_at(at.min(sentences.len()));
            self.chat(&format!("{} {NEEDLE} {}", before.concat(), behind.concat()), &[ASKED])
        });
        hidden.take(if self.quick { 2 } else { usize::MAX }).collect()
    }

    /// Chats that all begin with this text, read as far as they have whole blocks in common.
    fn chat(&self, text: &str, questions: &[&str]) -> Result<Reading> {
        let chat = |question: &str| {
            let said = format!("{text}\n\nAnswer in one short sentence. {question}");
            Ok(self.engine.chat_tokens(&[ChatMessage::new("user", said)], true)?)
        };
        let chats: Vec<Vec<u32>> = questions.iter().map(|question| chat(question)).collect::<Result<_>>()?;
        // The question's own tokens, and a few before them, differ.
        let other = chat("?")?;
        let first = chats.first().context("no question")?;
        let common =
            chats.iter().chain([&other]).map(|chat| chat.iter().zip(first).take_while(|(a, b)| a == b).count());
        let common = common.min().unwrap_or(0);
        let mut reading = self.read(first, common, chats.clone())?;
        let read = reading.context.len();
        reading.asked = chats.iter().map(|chat| chat.get(read..).unwrap_or_default().to_vec()).collect();
        Ok(reading)
    }

    /// Reads the whole blocks of the first `context` tokens; what is behind them is the text that follows.
    fn read(&self, tokens: &[u32], context: usize, asked: Vec<Vec<u32>>) -> Result<Reading> {
        let context = context - context % self.namespace.layout().block_tokens();
        let (context, next) = tokens.split_at_checked(context).context("a text is too short")?;
        let mut kv = self.engine.kv(context.len())?;
        self.engine.prefill(context, &mut kv)?;
        let sample = Sample::new(&kv, &self.namespace, DType::BF16, false)?;
        let asked = if asked.is_empty() { vec![next.to_vec()] } else { asked };
        Ok(Reading { context: context.to_vec(), sample, asked })
    }

    fn setting<'a>(&'a self, reading: &'a Reading, next: &'a [u32]) -> Setting<'a> {
        Setting { engine: &self.engine, namespace: &self.namespace, context: &reading.context, next }
    }

    /// What is predicted behind each token of the text that follows.
    fn predictions(&self, reading: &Reading, codec: &dyn Codec) -> Result<Vec<Logits>> {
        let next = reading.asked.first().map_or(&[][..], Vec::as_slice);
        reading.sample.predictions(&self.setting(reading, next), &reading.sample.through(codec)?)
    }

    /// The greedy answer to each question.
    fn answers(&self, readings: &[Reading], codec: &dyn Codec) -> Result<Vec<Vec<u32>>> {
        let mut answers = Vec::new();
        for reading in readings {
            let bytes = reading.sample.through(codec)?;
            for asked in &reading.asked {
                let mut kv = reading.sample.reused(&self.setting(reading, asked), &bytes, asked.len() + ANSWER)?;
                let mut answer = vec![self.engine.prefill(asked, &mut kv)?.argmax()];
                while let Some(last) = answer.last().filter(|last| !self.engine.tokenizer().is_end(**last))
                    && answer.len() < ANSWER
                {
                    answer.push(self.engine.decode(*last, &mut kv)?.argmax());
                }
                answers.push(answer);
            }
        }
        Ok(answers)
    }

    fn row(&self, codec: &dyn Codec, windows: &[Reading], answers: &Answers, exact: &Answers) -> Result<Row> {
        let sample = &windows.first().context("no window")?.sample;
        let measured = sample.measure(codec, if self.quick { 3 } else { 15 })?;
        let raw_bytes = float(sample.bytes().len());
        let (k_mean_error, k_max_error) = errors(sample, &measured.decoded, Side::K);
        let (v_mean_error, v_max_error) = errors(sample, &measured.decoded, Side::V);
        let all = |answers: &Answers| answers.predictions.iter().flatten().cloned().collect::<Vec<Logits>>();
        let (kl, top1) = compare(&all(exact), &all(answers));
        let same = answers.chats.iter().zip(&exact.chats).filter(|(one, other)| one == other).count();
        let names = |answer: &&Vec<u32>| self.engine.tokenizer().decode(answer).replace([',', ' '], "").contains(FOUND);
        Ok(Row {
            codec: codec.name().to_owned(),
            ratio: ratio(raw_bytes, float(measured.stored_bytes)),
            encode_gb_s: raw_bytes / measured.times.encode / 1e9,
            decode_gb_s: raw_bytes / measured.times.decode / 1e9,
            k_mean_error,
            k_max_error,
            v_mean_error,
            v_max_error,
            kl,
            top1,
            perplexity: perplexity(windows, answers),
            same_answers: same,
            needles: answers.needles.iter().filter(names).count(),
        })
    }
}

/// Of the text behind the windows, of which each token but the first is predicted by the one before.
fn perplexity(windows: &[Reading], answers: &Answers) -> f64 {
    let surprises = windows.iter().zip(&answers.predictions).flat_map(|(window, predictions)| {
        let text = window.asked.first().map_or(&[][..], Vec::as_slice);
        predictions.iter().zip(text.iter().skip(1)).map(|(logits, token)| surprise(logits.as_slice(), *token))
    });
    mean(&surprises.collect::<Vec<f64>>()).exp()
}

/// Mean and largest difference of the elements of K, or of V.
fn errors(sample: &Sample, decoded: &[u8], side: Side) -> (f64, f64) {
    let (mut at, mut all) = (0, Vec::new());
    for (frame, raw) in &sample.frames {
        let came = decoded.get(at..at + raw.len()).unwrap_or_default();
        at += raw.len();
        if frame.side == Some(side) {
            let both = values(raw, sample.dtype).into_iter().zip(values(came, sample.dtype));
            all.extend(both.map(|(one, other)| f64::from((one - other).abs())));
        }
    }
    (mean(&all), all.into_iter().fold(0.0, f64::max))
}

impl Report {
    fn table(&self) -> String {
        let mut table = style::table();
        let head = [
            "codec",
            "ratio",
            "encode GB/s",
            "decode GB/s",
            "K error",
            "V error",
            "KL",
            "top 1",
            "perplexity",
            "same answers",
            "needles",
        ];
        table.set_header(head.map(|text| Cell::new(text).add_attribute(Attribute::Bold)));
        for row in &self.results {
            let cells = [
                format!("{:.2}", row.ratio),
                format!("{:.2}", row.encode_gb_s),
                format!("{:.2}", row.decode_gb_s),
                format!("{:.4}, at most {:.2}", row.k_mean_error, row.k_max_error),
                format!("{:.4}, at most {:.2}", row.v_mean_error, row.v_max_error),
                format!("{:.5}", row.kl),
                format!("{:.2}%", row.top1 * 100.0),
                format!("{:.3}", row.perplexity),
                format!("{} of {}", row.same_answers, self.answers),
                format!("{} of {}", row.needles, self.needles),
            ];
            let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
            table.add_row([Cell::new(&row.codec)].into_iter().chain(cells.map(right)));
        }
        format!("{}, {} predictions\n{table}", self.model, self.predictions)
    }

    fn plot(&self, path: &Path) -> Result<()> {
        let lossy = self.results.iter().filter(|row| row.kl > 0.0);
        let points: Vec<plot::Point> =
            lossy.map(|row| plot::Point { name: row.codec.clone(), ratio: row.ratio, kl: row.kl }).collect();
        plot::quality(path, &self.model, &points)
            .with_context(|| format!("cannot write the plot {}", path.display()))?;
        eprintln!("plot written to {}", path.display());
        Ok(())
    }
}
