//! Both runs of a demo as one JSON object, and as a table for people.

use comfy_table::{Attribute, Cell, CellAlignment, Color, Table};
use serde::Serialize;

use super::{Outcome, Run};
use crate::stats::{TimesMs, float, ratio};
use crate::style;

/// What `--json` prints for one demo.
#[derive(Debug, Serialize)]
pub(super) struct Summary {
    model: String,
    threads: usize,
    block_tokens: u32,
    pub(super) requests: usize,
    prompt_tokens: usize,
    without: Half,
    with: Half,
    /// Average time to first token without, by that with the cache.
    pub(super) speedup: f64,
    /// The same without the first request of each session or document, which nobody had asked before.
    speedup_after_first: f64,
    /// Cached tokens in percent of all prompt tokens.
    hit_rate_percent: f64,
    /// The same without the first request of each session or document.
    hit_rate_after_first_percent: f64,
    /// Sum of the times to first token without, minus the sum with the cache.
    time_saved_s: f64,
    /// What the cache itself counts: reported compute time of the blocks that it handed out.
    cache_time_saved_s: f64,
    pub(super) answers_identical: bool,
}

/// Both demos in one object.
#[derive(Debug, Serialize)]
pub(super) struct Both<'a> {
    pub(super) comparison: &'a Summary,
    pub(super) agent: &'a Summary,
}

#[derive(Debug, Serialize)]
struct Half {
    ttft_ms: TimesMs,
    total_s: f64,
    /// Answer tokens by the total time.
    tokens_per_s: f64,
}

impl Half {
    fn of(run: &Run) -> Self {
        let total_s = run.total.as_secs_f64();
        let tokens_per_s = ratio(float(run.answer_tokens()), total_s);
        Self { ttft_ms: TimesMs::of(&run.ttft_ms()), total_s, tokens_per_s }
    }
}

impl Summary {
    pub(super) fn of(outcome: &Outcome) -> Self {
        let (without, with) = (Half::of(&outcome.without), Half::of(&outcome.with));
        let sum = |run: &Run| run.ttft_ms().iter().sum::<f64>() / 1e3;
        let after_first = |run: &Run| {
            let times = run.ttft_ms().into_iter().enumerate();
            times.filter(|(request, _)| !outcome.first_turns.contains(request)).map(|(_, ms)| ms).sum::<f64>()
        };
        Self {
            model: outcome.model.clone(),
            threads: outcome.threads,
            block_tokens: outcome.block_tokens,
            requests: outcome.with.answers.len(),
            prompt_tokens: outcome.with.answers.iter().map(|answer| answer.prompt_tokens).sum(),
            speedup: ratio(without.ttft_ms.avg, with.ttft_ms.avg),
            speedup_after_first: ratio(after_first(&outcome.without), after_first(&outcome.with)),
            hit_rate_percent: outcome.with.hit_rate_percent(|_| true),
            hit_rate_after_first_percent: outcome
                .with
                .hit_rate_percent(|request| !outcome.first_turns.contains(&request)),
            time_saved_s: sum(&outcome.without) - sum(&outcome.with),
            cache_time_saved_s: outcome.cache.time_saved_seconds(),
            answers_identical: outcome.difference().is_none(),
            without,
            with,
        }
    }
}

/// For people. Colours only if standard output is a terminal.
pub(super) fn text(outcome: &Outcome, summary: &Summary) -> String {
    let Outcome { title, about, model, threads, block_tokens, cache, .. } = outcome;
    let identical = if summary.answers_identical {
        format!("identical, all {} tokens", outcome.with.answer_tokens())
    } else {
        "THEY DIFFER".to_owned()
    };
    let whole = if *title == "Agent" { "session" } else { "document" };
    let facts = [
        (
            "speed-up",
            format!(
                "{:.1}x on the average time to first token, cold first requests included; {:.1}x after the first of each \
                 {whole}",
                summary.speedup, summary.speedup_after_first
            ),
        ),
        (
            "hit rate",
            format!(
                "{:.1}% of {} prompt tokens; {:.1}% after the first of each {whole}",
                summary.hit_rate_percent, summary.prompt_tokens, summary.hit_rate_after_first_percent
            ),
        ),
        ("time saved", format!("{:.1} s: the times to first token, summed, without minus with", summary.time_saved_s)),
        ("answers", identical),
        ("cache", format!("{:.0} MiB in {} blocks of {block_tokens} tokens", cache.size_mib(), cache.entries)),
    ];
    let facts: String = facts.iter().map(|(name, value)| format!("  {name:<11} {value}\n")).collect();
    let said =
        |(who, text): &(&str, String)| format!("  {who:<11} {}\n", text.trim().replace('\n', &format!("\n{:14}", "")));
    let example: String = outcome.example.iter().map(said).collect();
    format!(
        "{title}: {about}\n{model}, {threads} threads\n{}\n{facts}\nOne of them, as the model answered it\n{example}",
        table(&summary.without, &summary.with)
    )
}

fn table(without: &Half, with: &Half) -> Table {
    let mut table = style::table();
    let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
    let bold = |text: &str| Cell::new(text).add_attribute(Attribute::Bold);
    table.set_header(vec![
        bold(""),
        bold("without").set_alignment(CellAlignment::Right),
        bold("with kvkeep").set_alignment(CellAlignment::Right).fg(Color::Green),
        bold("better by").set_alignment(CellAlignment::Right),
    ]);
    let mut row = |name: &str, without: String, with: String, gain: f64| {
        let gain = right(format!("{gain:.1}x")).add_attribute(Attribute::Bold);
        table.add_row(vec![Cell::new(name), right(without), right(with).fg(Color::Green), gain]);
    };
    let (slow, fast) = (&without.ttft_ms, &with.ttft_ms);
    for (name, slow, fast) in [
        ("time to first token, average", slow.avg, fast.avg),
        ("  p50", slow.p50, fast.p50),
        ("  p95", slow.p95, fast.p95),
        ("  p99", slow.p99, fast.p99),
    ] {
        row(name, ms(slow), ms(fast), ratio(slow, fast));
    }
    let seconds = |value: f64| format!("{value:.1} s");
    row(
        "total time, answers included",
        seconds(without.total_s),
        seconds(with.total_s),
        ratio(without.total_s, with.total_s),
    );
    let rate = |value: f64| format!("{value:.1}");
    let gain = ratio(with.tokens_per_s, without.tokens_per_s);
    row("answer tokens per second", rate(without.tokens_per_s), rate(with.tokens_per_s), gain);
    table
}

fn ms(value: f64) -> String {
    if value < 9_999.5 { format!("{value:.0} ms") } else { format!("{:.1} s", value / 1e3) }
}

#[cfg(test)]
mod tests {
    use super::super::tests::outcome;
    use super::*;

    #[test]
    fn the_json_has_the_promised_keys_and_figures() {
        let outcome = outcome();
        let json = serde_json::to_value(Summary::of(&outcome)).unwrap();
        for half in ["without", "with"] {
            for key in ["avg", "p50", "p95", "p99"] {
                assert!(json[half]["ttft_ms"][key].is_number(), "{half} {key}");
            }
        }
        assert_eq!(json["without"]["ttft_ms"]["avg"], 1000.0);
        assert_eq!(json["with"]["total_s"], 1.0);
        assert_eq!(json["with"]["tokens_per_s"], 3.0);
        assert_eq!(json["speedup"], 10.0);
        assert_eq!(json["speedup_after_first"], 22.0);
        assert_eq!(json["hit_rate_percent"], 50.0);
        assert!((json["time_saved_s"].as_f64().unwrap() - 1.8).abs() < 1e-9);
        assert_eq!(json["requests"], 2);
        assert_eq!(json["answers_identical"], true);
    }

    #[test]
    fn the_text_names_the_speed_up_and_whether_answers_are_identical() {
        let mut outcome = outcome();
        let said = text(&outcome, &Summary::of(&outcome));
        assert!(said.contains("10.0x") && said.contains("identical, all 3 tokens"), "{said}");
        outcome.with.answers[0].tokens.clear();
        assert!(text(&outcome, &Summary::of(&outcome)).contains("THEY DIFFER"));
    }
}
