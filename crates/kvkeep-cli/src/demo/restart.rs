//! One long prompt, a process that ends, and another one that finds the prompt's KV on the disk.
//!
//! Invariant: the two halves are two processes of this same binary that share nothing but
//! the directory, and both answer through the same code. Closing and opening the cache within one
//! process was the alternative: it could not show that nothing of the first one is needed.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use comfy_table::{Attribute, Cell, CellAlignment, Color, Table};
use indicatif::ProgressBar;
use kvkeep::{CacheConfig, DiskConfig, KvCache};
use kvkeep_engine::{ChatMessage, Engine, GenerateOptions, Generator};
use serde::{Deserialize, Serialize};

use super::warm_up;
use crate::cli::{ANSWERS_DIFFER, DemoOptions, RestartOptions};
use crate::stats::ratio;
use crate::texts::DOCUMENTS;
use crate::{model, plot, style};

const QUESTION: &str = "In one short sentence: what is this text about?";
/// What the directory may take.
const DISK_GIB: f64 = 4.0;

/// What a process tells the one that started it.
#[derive(Debug, Serialize, Deserialize)]
struct Half {
    pid: u32,
    model: String,
    threads: usize,
    prompt_tokens: usize,
    cached_tokens: usize,
    /// On the disk and worth loading, and there but not worth it, as the cache saw it before the request.
    worth_tokens: usize,
    not_worth_tokens: usize,
    /// Opening the cache: reading what lies in the directory.
    open_ms: f64,
    ttft_ms: f64,
    /// Making durable what was stored.
    flush_ms: f64,
    loaded_bytes: u64,
    /// As the cache measured its loads; 0 if there were none.
    load_bytes_per_s: u64,
    written_bytes: u64,
    /// Records on the disk at the end.
    disk_entries: u64,
    answer_tokens: Vec<u32>,
    answer: String,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    disk: PathBuf,
    block_tokens: u32,
    cold: Half,
    warm: Half,
    /// Time to first token cold, by that after the restart.
    speedup: f64,
    answers_identical: bool,
}

/// Both processes, or one of them.
pub(super) fn run(restart: &RestartOptions, options: &DemoOptions) -> Result<ExitCode> {
    ensure!(options.requests.is_none(), "demo restart sends one request: leave out --requests");
    match (&restart.answer_in, &restart.disk) {
        (Some(salt), Some(dir)) => {
            style::say(&serde_json::to_string(&answer(salt, dir, restart, options)?)?)?;
            Ok(ExitCode::SUCCESS)
        }
        (Some(_), None) => anyhow::bail!("--answer-in is for the demo itself: leave it out"),
        (None, Some(dir)) => both(dir, restart, options),
        (None, None) => {
            let dir = tempfile::tempdir().context("cannot make a temporary directory: give one with --disk")?;
            both(&dir.path().join("kvkeep"), restart, options)
        }
    }
}

fn both(dir: &Path, restart: &RestartOptions, options: &DemoOptions) -> Result<ExitCode> {
    // A namespace of its own, so that the first answer is cold whatever the directory holds.
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let salt = format!("restart {} {since}", std::process::id());
    let cold = process(&salt, dir, restart, options)?;
    let warm = process(&salt, dir, restart, options)?;
    ensure!(
        warm.cached_tokens > 0,
        "the second process found nothing of the prompt on the disk: see kvkeep verify {}",
        dir.display()
    );
    let report = Report {
        disk: dir.to_owned(),
        block_tokens: options.block_tokens,
        speedup: ratio(cold.ttft_ms, warm.ttft_ms),
        answers_identical: cold.answer_tokens == warm.answer_tokens && cold.prompt_tokens == warm.prompt_tokens,
        cold,
        warm,
    };
    style::say(&if options.json { serde_json::to_string_pretty(&report)? } else { report.text() })?;
    if let Some(path) = &options.plot {
        plot::ttft(path, &[report.panel()]).with_context(|| format!("cannot write the plot {}", path.display()))?;
        eprintln!("plot written to {}", path.display());
    }
    if report.answers_identical {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("kvkeep: Restart: ANSWERS DIFFER: {:?} and {:?}", report.cold.answer, report.warm.answer);
    Ok(ExitCode::from(ANSWERS_DIFFER))
}

/// Starts this binary once more and waits until it has answered and ended.
fn process(salt: &str, dir: &Path, restart: &RestartOptions, options: &DemoOptions) -> Result<Half> {
    let mut command = Command::new(std::env::current_exe().context("cannot find this binary")?);
    command.args(["demo", "restart", "--answer-in", salt, "--disk"]).arg(dir);
    command.args(["--documents", &restart.documents.to_string()]);
    command.args(["--capacity-gib", &options.capacity_gib.to_string()]);
    command.args(["--block-tokens", &options.block_tokens.to_string()]);
    command.args(["--max-tokens", &options.max_tokens.to_string()]);
    if let Some(threads) = options.threads {
        command.args(["--threads", &threads.to_string()]);
    }
    if let Some(model) = &options.model {
        command.arg("--model").arg(model);
    }
    let output = command.stderr(Stdio::inherit()).output().context("cannot start this binary again")?;
    ensure!(output.status.success(), "the process that should answer ended with {}", output.status);
    serde_json::from_slice(&output.stdout).context("the process that should answer did not say what it did")
}

/// Answers the prompt, in a process of its own.
fn answer(salt: &str, dir: &Path, restart: &RestartOptions, options: &DemoOptions) -> Result<Half> {
    let engine = model::load(options.model.as_deref(), &model::options(options.threads))?;
    let prompt = prompt(&engine, restart.documents)?;
    let needed = prompt.len() + usize::from(options.max_tokens);
    ensure!(
        needed <= engine.context_tokens(),
        "the prompt and its answer take {needed} tokens, the model has room for {}: choose fewer --documents",
        engine.context_tokens()
    );
    let namespace = engine.namespace(options.block_tokens)?.with_salt(salt);
    let mut generator = Generator::new(&engine, needed, namespace)?;
    warm_up(&mut generator)?;

    let begin = Instant::now();
    let disk = DiskConfig::from_gib(dir, DISK_GIB)?;
    let cache = KvCache::new(CacheConfig::from_gib(options.capacity_gib)?.disk(disk))?;
    let open = begin.elapsed();
    let look = cache.look(generator.namespace(), &prompt)?;
    let bar = ProgressBar::new_spinner().with_message(format!("a prompt of {} tokens", prompt.len()));
    bar.enable_steady_tick(Duration::from_millis(100));
    let wanted = GenerateOptions::greedy(options.max_tokens.into());
    let given = generator.generate(&prompt, Some(&cache), &wanted, &mut |_| ControlFlow::Continue(()))?;
    bar.set_message("flushing");
    let begin = Instant::now();
    cache.flush()?;
    let flush = begin.elapsed();
    bar.finish_and_clear();
    let stats = cache.stats();
    let stats = stats.tier("disk").context("the cache has a disk tier")?;
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    Ok(Half {
        pid: std::process::id(),
        model: model::name(options.model.as_deref()),
        threads: engine.threads(),
        prompt_tokens: given.prompt_tokens,
        cached_tokens: given.cached_tokens,
        worth_tokens: look.worth_tokens(),
        not_worth_tokens: look.not_worth_tokens,
        open_ms: ms(open),
        ttft_ms: ms(given.ttft),
        flush_ms: ms(flush),
        loaded_bytes: stats.read_bytes_total,
        load_bytes_per_s: stats.load_bytes_per_s,
        written_bytes: stats.written_bytes_total,
        disk_entries: stats.entries,
        answer_tokens: given.tokens,
        answer: given.text,
    })
}

fn prompt(engine: &Engine, documents: u8) -> Result<Vec<u32>> {
    let texts =
        DOCUMENTS.iter().take(documents.into()).map(|document| format!("# {}\n\n{}", document.file, document.text));
    let system = texts.collect::<Vec<_>>().join("\n\n");
    let messages = [ChatMessage::new("system", system), ChatMessage::new("user", QUESTION)];
    Ok(engine.chat_tokens(&messages, true)?)
}

impl Report {
    fn panel(&self) -> plot::Panel {
        plot::Panel {
            title: format!("Restart: {:.1}x faster to the first token, from disk", self.speedup),
            without_ms: vec![self.cold.ttft_ms],
            with_ms: vec![self.warm.ttft_ms],
        }
    }

    /// For people.
    fn text(&self) -> String {
        let Self { cold, warm, .. } = self;
        let identical = if self.answers_identical {
            format!("identical, all {} tokens", warm.answer_tokens.len())
        } else {
            "THEY DIFFER".to_owned()
        };
        format!(
            "Restart: one prompt of {} tokens, answered by process {}, which ended, and by process {} after it\n\
             {}, {} threads, blocks of {} tokens, disk tier in {}\n{}\n  speed-up    {:.1}x on the time to first token\n  \
             answers     {identical}\n  the answer  {}",
            cold.prompt_tokens,
            cold.pid,
            warm.pid,
            cold.model,
            cold.threads,
            self.block_tokens,
            self.disk.display(),
            self.table(),
            self.speedup,
            warm.answer.trim(),
        )
    }

    fn table(&self) -> Table {
        let mut table = style::table();
        let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
        let bold = |text: &str| right(text.to_owned()).add_attribute(Attribute::Bold);
        table.set_header(vec![Cell::new(""), bold("cold"), bold("after the restart").fg(Color::Green)]);
        let mut row = |name: &str, value: &dyn Fn(&Half) -> String| {
            table.add_row(vec![Cell::new(name), right(value(&self.cold)), right(value(&self.warm)).fg(Color::Green)]);
        };
        row("time to first token", &|half| format!("{:.0} ms", half.ttft_ms));
        row("tokens on the disk, worth loading", &|half| half.worth_tokens.to_string());
        row("tokens there, not worth it", &|half| half.not_worth_tokens.to_string());
        row("tokens from the disk", &|half| half.cached_tokens.to_string());
        row("loaded from the disk", &|half| mib(half.loaded_bytes));
        row("measured load rate", &|half| match half.load_bytes_per_s {
            0 => "–".to_owned(),
            rate => format!("{}/s", mib(rate)),
        });
        row("written to the disk", &|half| mib(half.written_bytes));
        row("opening the cache", &|half| format!("{:.1} ms", half.open_ms));
        row("flushing", &|half| format!("{:.0} ms", half.flush_ms));
        table
    }
}

#[expect(clippy::cast_precision_loss, reason = "for people to read")]
fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn half(ttft_ms: f64, cached_tokens: usize) -> Half {
        Half {
            pid: 1,
            model: "m".to_owned(),
            threads: 2,
            prompt_tokens: 100,
            cached_tokens,
            worth_tokens: cached_tokens,
            not_worth_tokens: 0,
            open_ms: 1.0,
            ttft_ms,
            flush_ms: 2.0,
            loaded_bytes: 3 << 20,
            load_bytes_per_s: 700 << 20,
            written_bytes: 0,
            disk_entries: 6,
            answer_tokens: vec![1, 2],
            answer: "yes".to_owned(),
        }
    }

    #[test]
    fn the_report_names_both_times_and_whether_answers_are_identical() {
        let mut report = Report {
            disk: "/d".into(),
            block_tokens: 16,
            cold: half(1000.0, 0),
            warm: half(50.0, 96),
            speedup: 20.0,
            answers_identical: true,
        };
        let said = report.text();
        for words in ["1000 ms", "50 ms", "20.0x", "identical, all 2 tokens", "3.0 MiB", "700.0 MiB/s", "worth loading"]
        {
            assert!(said.contains(words), "{words}: {said}");
        }
        report.answers_identical = false;
        assert!(report.text().contains("THEY DIFFER"));
    }

    #[test]
    fn what_one_process_says_the_other_understands() {
        let said = serde_json::to_string(&half(0.25, 96)).unwrap();
        let heard: Half = serde_json::from_str(&said).unwrap();
        assert_eq!((heard.ttft_ms, heard.cached_tokens, heard.answer_tokens), (0.25, 96, vec![1, 2]));
    }
}
