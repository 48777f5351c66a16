//! Real requests to a real model, first without, then with the cache.
//!
//! Invariant: both runs send the same requests in the same order through the same code; the
//! only difference is the cache handed to the generator. Every answer is compared token by token.

mod agent;
mod comparison;
mod report;
mod restart;

use std::ops::ControlFlow;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use kvkeep::{CacheConfig, KvCache};
use kvkeep_engine::{Engine, GenerateOptions, Generation, Generator, Step};

use crate::cli::{ANSWERS_DIFFER, DemoCommand, DemoOptions, Which};
use crate::stats::{float, ratio};
use crate::{model, plot, style};
use report::Both;

/// Requests of each demo alone, and of both in one go.
const COMPARISON_REQUESTS: usize = 36;
const AGENT_REQUESTS: usize = 50;
const SHORT_COMPARISON_REQUESTS: usize = 14;
const SHORT_AGENT_REQUESTS: usize = 18;
/// Read before anything is timed, so that no run pays for the process's first touch of memory.
const WARM_UP_TOKENS: u32 = 128;

/// One request and what came of it.
#[derive(Debug)]
struct Answer {
    ttft: Duration,
    prompt_tokens: usize,
    cached_tokens: usize,
    tokens: Vec<u32>,
    text: String,
}

/// All requests of a demo, without or with the cache.
#[derive(Debug)]
struct Run {
    answers: Vec<Answer>,
    total: Duration,
}

/// Both runs of a demo.
#[derive(Debug)]
struct Outcome {
    title: &'static str,
    about: String,
    model: String,
    threads: usize,
    block_tokens: u32,
    without: Run,
    with: Run,
    /// Requests that are the first of their session.
    first_turns: Vec<usize>,
    /// One request for people: who speaks, and what is said.
    example: [(&'static str, String); 2],
    cache: kvkeep::Stats,
}

/// What a demo is measured with.
struct Lab<'a> {
    engine: &'a Engine,
    options: &'a DemoOptions,
}

/// Runs what was asked for and prints it.
pub(crate) fn run(command: &DemoCommand) -> Result<ExitCode> {
    let options = &command.options;
    if let Some(Which::Restart(restart)) = &command.which {
        return restart::run(restart, options);
    }
    let engine = model::load(options.model.as_deref(), &model::options(options.threads))?;
    let lab = Lab { engine: &engine, options };
    let requests = |otherwise| options.requests.map_or(otherwise, usize::from);
    let outcomes = match &command.which {
        Some(Which::Comparison) => vec![comparison::run(&lab, requests(COMPARISON_REQUESTS))?],
        Some(Which::Agent) => vec![agent::run(&lab, requests(AGENT_REQUESTS))?],
        // The last thing that is read is a question and its answer.
        Some(Which::Restart(_)) | None => vec![
            agent::run(&lab, requests(SHORT_AGENT_REQUESTS))?,
            comparison::run(&lab, requests(SHORT_COMPARISON_REQUESTS))?,
        ],
    };
    print(&outcomes, options.json)?;
    if let Some(path) = &options.plot {
        let panels: Vec<plot::Panel> = outcomes.iter().map(Outcome::panel).collect();
        plot::ttft(path, &panels).with_context(|| format!("cannot write the plot {}", path.display()))?;
        eprintln!("plot written to {}", path.display());
    }
    Ok(exit_code(&outcomes))
}

/// Says loudly where answers differ.
fn exit_code(outcomes: &[Outcome]) -> ExitCode {
    let mut code = ExitCode::SUCCESS;
    for outcome in outcomes {
        if let Some(difference) = outcome.difference() {
            eprintln!("kvkeep: {}: ANSWERS DIFFER: {difference}", outcome.title);
            code = ExitCode::from(ANSWERS_DIFFER);
        }
    }
    code
}

fn print(outcomes: &[Outcome], json: bool) -> Result<()> {
    let summaries: Vec<report::Summary> = outcomes.iter().map(report::Summary::of).collect();
    match (json, summaries.as_slice()) {
        (true, [one]) => style::say(&serde_json::to_string_pretty(one)?),
        (true, [agent, comparison]) => style::say(&serde_json::to_string_pretty(&Both { comparison, agent })?),
        _ => outcomes
            .iter()
            .zip(&summaries)
            .try_for_each(|(outcome, summary)| style::say(&report::text(outcome, summary))),
    }
}

impl Lab<'_> {
    /// Runs `requests` without, then with a fresh cache. It gets a place to send its requests to.
    fn measure(
        &self,
        requests: usize,
        capacity_tokens: usize,
        mut send_all: impl FnMut(&mut Client<'_>) -> Result<()>,
    ) -> Result<(Run, Run, kvkeep::Stats)> {
        let cache = KvCache::new(CacheConfig::from_gib(self.options.capacity_gib)?)?;
        let namespace = self.engine.namespace(self.options.block_tokens)?;
        let mut generator = Generator::new(self.engine, capacity_tokens, namespace)?;
        warm_up(&mut generator)?;

        let mut run = |cache: Option<&KvCache>| -> Result<Run> {
            let bar = request_bar(requests, if cache.is_some() { "with kvkeep" } else { "without" });
            let options = GenerateOptions::greedy(self.options.max_tokens.into());
            let mut client = Client { generator: &mut generator, cache, options, bar, answers: Vec::new() };
            let begin = Instant::now();
            send_all(&mut client)?;
            let total = begin.elapsed();
            client.bar.finish_and_clear();
            Ok(Run { answers: client.answers, total })
        };
        let (without, with) = (run(None)?, run(Some(&cache))?);
        Ok((without, with, cache.stats()))
    }
}

fn warm_up(generator: &mut Generator) -> Result<()> {
    let tokens: Vec<u32> = (0..WARM_UP_TOKENS).collect();
    generator.generate(&tokens, None, &GenerateOptions::greedy(4), &mut |_| ControlFlow::Continue(()))?;
    Ok(())
}

/// Sends requests one after the other, without or with a cache.
struct Client<'a> {
    generator: &'a mut Generator,
    cache: Option<&'a KvCache>,
    options: GenerateOptions,
    bar: ProgressBar,
    answers: Vec<Answer>,
}

impl Client<'_> {
    fn send(&mut self, prompt: &[u32]) -> Result<&Answer> {
        let go_on = &mut |_: Step<'_>| ControlFlow::Continue(());
        let Generation { ttft, prompt_tokens, cached_tokens, tokens, text, .. } =
            self.generator.generate(prompt, self.cache, &self.options, go_on)?;
        self.answers.push(Answer { ttft, prompt_tokens, cached_tokens, tokens, text });
        self.bar.inc(1);
        self.answers.last().context("an answer was just pushed")
    }
}

impl Run {
    fn ttft_ms(&self) -> Vec<f64> {
        self.answers.iter().map(|answer| answer.ttft.as_secs_f64() * 1e3).collect()
    }

    fn answer_tokens(&self) -> usize {
        self.answers.iter().map(|answer| answer.tokens.len()).sum()
    }

    /// Cached tokens in percent of the prompt tokens of these requests.
    fn hit_rate_percent(&self, counts: impl Fn(usize) -> bool) -> f64 {
        let counted = || self.answers.iter().enumerate().filter(|(request, _)| counts(*request));
        let cached: usize = counted().map(|(_, answer)| answer.cached_tokens).sum();
        let asked: usize = counted().map(|(_, answer)| answer.prompt_tokens).sum();
        ratio(float(cached) * 100.0, float(asked))
    }
}

impl Outcome {
    /// The first request whose answers differ, in words.
    fn difference(&self) -> Option<String> {
        let (without, with) = (&self.without.answers, &self.with.answers);
        if without.len() != with.len() {
            return Some(format!("{} answers without, {} with the cache", without.len(), with.len()));
        }
        let differs = |(without, with): (&Answer, &Answer)| {
            without.tokens != with.tokens || without.prompt_tokens != with.prompt_tokens
        };
        let request = without.iter().zip(with).position(differs)?;
        let text = |answers: &[Answer]| answers.get(request).map(|answer| answer.text.clone()).unwrap_or_default();
        Some(format!("request {}: without {:?}, with {:?}", request + 1, text(without), text(with)))
    }

    fn panel(&self) -> plot::Panel {
        plot::Panel {
            title: format!("{}: {:.1}x faster to the first token", self.title, report::Summary::of(self).speedup),
            without_ms: self.without.ttft_ms(),
            with_ms: self.with.ttft_ms(),
        }
    }
}

fn request_bar(requests: usize, message: &'static str) -> ProgressBar {
    let template = "{msg:11} [{bar:32}] {pos} of {len} requests ({elapsed} so far, {eta} left)";
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(requests as u64).with_style(style.progress_chars("=> ")).with_message(message);
    bar.enable_steady_tick(Duration::from_millis(250));
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(ttft_ms: u64, prompt_tokens: usize, cached_tokens: usize, tokens: &[u32]) -> Answer {
        let ttft = Duration::from_millis(ttft_ms);
        Answer { ttft, prompt_tokens, cached_tokens, tokens: tokens.to_vec(), text: format!("{tokens:?}") }
    }

    pub(super) fn outcome() -> Outcome {
        let seconds = Duration::from_secs;
        let without =
            Run { answers: vec![answer(900, 100, 0, &[1, 2]), answer(1100, 110, 0, &[3])], total: seconds(3) };
        let with = Run { answers: vec![answer(150, 100, 0, &[1, 2]), answer(50, 110, 105, &[3])], total: seconds(1) };
        Outcome {
            title: "Comparison",
            about: String::new(),
            model: "m".to_owned(),
            threads: 2,
            block_tokens: 16,
            without,
            with,
            first_turns: vec![0],
            example: Default::default(),
            cache: kvkeep::Stats::default(),
        }
    }

    #[test]
    fn equal_answers_have_no_difference_and_one_wrong_token_is_one() {
        let mut outcome = outcome();
        assert_eq!(outcome.difference(), None);
        outcome.with.answers[1].tokens = vec![4];
        assert!(outcome.difference().unwrap().contains("request 2"));
        outcome.with.answers.pop();
        assert!(outcome.difference().unwrap().contains("2 answers without, 1 with"));
    }

    #[test]
    fn hit_rates_count_only_the_requests_asked_for() {
        let run = outcome().with;
        assert_eq!(run.hit_rate_percent(|_| true), 50.0);
        assert!((run.hit_rate_percent(|request| request == 1) - 100.0 * 105.0 / 110.0).abs() < 1e-9);
        assert_eq!(run.hit_rate_percent(|_| false), 0.0);
    }
}
