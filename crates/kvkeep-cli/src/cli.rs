//! The command line: what can be asked for, checked before any work begins.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand};

/// Something failed; standard error says what and what to do.
pub(crate) const FAILED: u8 = 1;
/// An answer with the cache was not the answer without.
pub(crate) const ANSWERS_DIFFER: u8 = 3;
/// Something on the disk is not what was stored.
pub(crate) const DAMAGED: u8 = 4;

pub(crate) const EXIT_CODES: &str = "Exit codes:
  0  done
  1  something failed: standard error says what, and what to do
  2  the command line is not valid
  3  demo: an answer with the cache differs from the answer without
  4  verify, export: something stored is damaged, cannot be read, or is missing";

/// Prefill once: a KV cache for LLM prefixes.
#[derive(Debug, Parser)]
#[command(name = "kvkeep", version, about, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a real model without and with the cache, and compare
    Demo(DemoCommand),
    /// Answer OpenAI's API with a model whose prompts stay warm
    Serve(Box<crate::serve::ServeOptions>),
    /// Keep KV in RAM that all processes of this host share
    #[cfg(target_os = "linux")]
    Daemon(crate::daemon::DaemonOptions),
    /// Show what a running server and its cache are like now
    #[command(after_help = EXIT_CODES)]
    Stats(crate::operate::StatsOptions),
    /// Show which prefixes requests to a running server had in common
    #[command(after_help = EXIT_CODES)]
    Prefixes(crate::operate::PrefixesOptions),
    /// Have a running server read a prompt, so that the first request with it is warm
    #[command(after_help = EXIT_CODES)]
    Warm(crate::operate::WarmOptions),
    /// Keep a prefix in a running server's RAM
    #[command(after_help = EXIT_CODES)]
    Pin(crate::operate::PrefixOptions),
    /// Let a pinned prefix be evicted again
    #[command(after_help = EXIT_CODES)]
    Unpin(crate::operate::PrefixOptions),
    /// Remove a prefix from a running server's cache, with all that is behind it
    #[command(after_help = EXIT_CODES)]
    Remove(crate::operate::RemoveOptions),
    /// Remove everything that a running server has cached, or one namespace
    #[command(after_help = EXIT_CODES)]
    Clear(crate::operate::ClearOptions),
    /// Measure the cache against memcpy and other references, in seconds
    Bench(BenchOptions),
    /// Replay recorded traffic: hit rates of policies and capacities, beside the optimum
    Replay(crate::replay::ReplayOptions),
    /// Check every byte of a cache's directory
    ///
    /// Reads all segments, records and payloads and compares checksums, decrypting what is
    /// encrypted. Nothing is changed. A directory that a process has open is refused.
    #[command(after_help = EXIT_CODES)]
    Verify(DirOptions),
    /// Show what lies in a cache's directory: namespaces, entries, sizes, ages
    ///
    /// Only headers are read, so it is fast, and a damaged payload is not noticed: see verify.
    #[command(after_help = EXIT_CODES)]
    Inspect(InspectOptions),
    /// Write entries of a cache's directory as safetensors
    ///
    /// K and V of every layer become tensors of their own: NAMESPACE.KEY.layer.N.k and .v, where
    /// NAMESPACE is the first 16 hexadecimal digits of the namespace and KEY all 64 of the key.
    /// Shapes are those that were stored; a block's are `[tokens, kv_heads, head_dim]` or
    /// `[kv_heads, tokens, head_dim]`, as its model orders them. What is damaged is left out.
    #[command(after_help = EXIT_CODES)]
    Export(ExportOptions),
    /// Print what a shell needs to complete this command: kvkeep completions bash
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

/// Which directory, and how it is shown.
#[derive(Debug, Args)]
pub(crate) struct DirOptions {
    /// The directory of a cache's disk tier
    #[arg(value_name = "DIR")]
    pub(crate) dir: PathBuf,
    /// The key of an encrypted directory: 32 bytes or 64 hexadecimal digits, readable by its owner alone
    #[arg(long, value_name = "FILE")]
    pub(crate) key_file: Option<PathBuf>,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub(crate) json: bool,
}

/// Which entries.
#[derive(Debug, Args)]
pub(crate) struct SelectOptions {
    /// Only namespaces whose id begins with these hexadecimal digits
    #[arg(long, value_name = "HEX", value_parser = hex_digits)]
    pub(crate) namespace: Option<String>,
    /// Only entries whose key begins with these hexadecimal digits
    #[arg(long, value_name = "HEX", value_parser = hex_digits)]
    pub(crate) key: Option<String>,
    /// At most so many entries, the oldest first
    #[arg(long, value_name = "N")]
    pub(crate) limit: Option<usize>,
}

#[derive(Debug, Args)]
pub(crate) struct InspectOptions {
    #[command(flatten)]
    pub(crate) dir: DirOptions,
    #[command(flatten)]
    pub(crate) select: SelectOptions,
    /// Also list the entries one by one [20 of them unless --limit or --json is given]
    #[arg(long)]
    pub(crate) records: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ExportOptions {
    #[command(flatten)]
    pub(crate) dir: DirOptions,
    #[command(flatten)]
    pub(crate) select: SelectOptions,
    /// The file to write; one that is there is replaced
    #[arg(long, value_name = "FILE.safetensors")]
    pub(crate) out: PathBuf,
}

/// Runs a real model (135M parameters, on the CPU) on real texts: every request first without,
/// then with the cache, and compares times and answers.
///
/// Without a subcommand, agent and comparison run, shortened to about two minutes on two cores.
/// The model is downloaded on first use (93 MB).
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct DemoCommand {
    #[command(subcommand)]
    pub(crate) which: Option<Which>,
    #[command(flatten)]
    pub(crate) options: DemoOptions,
}

#[derive(Debug, Clone, PartialEq, Eq, Subcommand)]
pub(crate) enum Which {
    /// Many questions about a few long documents
    #[command(after_help = EXIT_CODES)]
    Comparison,
    /// Two agent sessions whose prompts grow turn by turn
    ///
    /// A scripted tool loop: which tool is called is fixed, its result is computed from the texts,
    /// and the assistant's turns are the model's own answers.
    #[command(after_help = EXIT_CODES)]
    Agent,
    /// One long prompt, answered cold, and again from disk by a process started after the first ended
    ///
    /// The two processes share nothing but the directory.
    #[command(after_help = EXIT_CODES)]
    Restart(RestartOptions),
}

#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub(crate) struct RestartOptions {
    /// The directory of the disk tier; up to 4 GiB are used [default: a temporary one, removed at the end]
    #[arg(long, value_name = "DIR")]
    pub(crate) disk: Option<PathBuf>,
    /// Documents in the prompt: about 2,000 tokens each
    #[arg(long, value_name = "N", default_value = "2", value_parser = clap::value_parser!(u8).range(1..=3))]
    pub(crate) documents: u8,
    /// For the demo's own processes: answer once, in this namespace, and print what it took
    #[arg(long, value_name = "SALT", hide = true, requires = "disk")]
    pub(crate) answer_in: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct DemoOptions {
    /// A model of your own, in GGUF format [default: SmolLM2-135M-Instruct.Q4_1, downloaded on first use]
    #[arg(long, global = true, value_name = "PATH.gguf", value_parser = model_file)]
    pub(crate) model: Option<PathBuf>,
    /// Compute threads [default: one for each core]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) threads: Option<u16>,
    /// Requests of each demo [default: comparison 36, agent 50, both together 14 and 18]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(4..=1000))]
    pub(crate) requests: Option<u16>,
    /// Memory that the cache may use, in GiB
    #[arg(long, alias = "capacity-gb", global = true, value_name = "GIB", default_value = "1", value_parser = gib)]
    pub(crate) capacity_gib: f64,
    /// Tokens of a cache block; a prompt's last, partial block is computed again
    #[arg(long, global = true, value_name = "N", default_value = "16",
          value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) block_tokens: u32,
    /// The most tokens of an answer
    #[arg(long, global = true, value_name = "N", default_value = "16",
          value_parser = clap::value_parser!(u16).range(1..=512))]
    pub(crate) max_tokens: u16,
    /// Draw the time to first token of every request
    #[arg(long, global = true, value_name = "FILE.svg", value_parser = svg_file)]
    pub(crate) plot: Option<PathBuf>,
    /// Print one JSON object instead of tables
    #[arg(long, global = true)]
    pub(crate) json: bool,
}

/// Measures the cache; each figure with its reference, taken in the same run.
///
/// Medians of several rounds; rounds of the reference lie between those of the cache.
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct BenchOptions {
    #[command(subcommand)]
    pub(crate) what: Option<BenchCommand>,
    /// Fewer and smaller rounds
    #[arg(long, global = true)]
    pub(crate) quick: bool,
    /// Also measure the model and the server: warm time to first token, prefill and decode
    #[arg(long)]
    pub(crate) engine: bool,
    /// Also measure a disk tier in this directory, against fio with direct I/O where that is
    /// installed; takes up to 9 GB there while it runs, 1 GB with --quick
    #[arg(long, value_name = "DIR", value_parser = existing_dir)]
    pub(crate) disk: Option<PathBuf>,
    /// A model of your own for --engine, in GGUF format
    #[arg(long, value_name = "PATH.gguf", value_parser = model_file, requires = "engine")]
    pub(crate) model: Option<PathBuf>,
    /// Compute threads of --engine [default: one for each core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024), requires = "engine")]
    pub(crate) threads: Option<u16>,
    /// Draw each figure against its bar or reference
    #[arg(long, value_name = "FILE.svg", value_parser = svg_file)]
    pub(crate) plot: Option<PathBuf>,
    /// Print one JSON object instead of a table
    #[arg(long, global = true)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// How small and how fast codecs make the KV of a real model that reads a real text, and what is predicted behind it
    ///
    /// On one core, beside memcpy of the same bytes and, where it is installed, zstd at level 1 on the same byte planes.
    #[command(after_help = EXIT_CODES)]
    Codecs(CodecsBench),
    /// What codecs cost in quality: what a real model predicts and answers behind KV that went through them
    ///
    /// Against the same KV as it was: next-token distributions over real text, perplexity, greedy answers, a needle.
    #[command(after_help = EXIT_CODES)]
    Quality(QualityOptions),
}

#[derive(Debug, Args)]
pub(crate) struct CodecsBench {
    #[command(flatten)]
    pub(crate) model: CodecsOptions,
    /// Also load blocks through codecs from a disk, in turns with raw ones; takes up to 1.5 GB in this directory while it runs
    #[arg(long, value_name = "DIR", value_parser = existing_dir)]
    pub(crate) cold: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct QualityOptions {
    #[command(flatten)]
    pub(crate) model: CodecsOptions,
    /// Draw quality against ratio
    #[arg(long, value_name = "FILE.svg", value_parser = svg_file)]
    pub(crate) plot: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct CodecsOptions {
    /// A model of your own, in GGUF format [default: SmolLM2-135M-Instruct.Q4_1, downloaded on first use]
    #[arg(long, value_name = "PATH.gguf", value_parser = model_file)]
    pub(crate) model: Option<PathBuf>,
    /// Compute threads of the model [default: one for each core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) threads: Option<u16>,
    /// Tokens of a block
    #[arg(long, value_name = "N", default_value = "64", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) block_tokens: u32,
}

/// Prints a shell's completions.
pub(crate) fn completions(shell: clap_complete::Shell) -> anyhow::Result<ExitCode> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "kvkeep", &mut text);
    crate::style::say(String::from_utf8_lossy(&text).trim_end())?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn gib(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(gib) if gib > 0.0 && gib <= 16_384.0 => Ok(gib),
        _ => Err("give a size in GiB above 0 and up to 16384, such as 0.5".to_owned()),
    }
}

/// A number, perhaps in thousands or millions: 5000, 5k, 2m.
pub(crate) fn counted(text: &str) -> Option<u64> {
    let (digits, unit) = match text.char_indices().next_back()? {
        (end, 'k' | 'K') => (text.get(..end)?, 1_000),
        (end, 'm' | 'M') => (text.get(..end)?, 1_000_000),
        _ => (text, 1),
    };
    let is_number = digits.bytes().all(|digit| digit.is_ascii_digit());
    digits.parse::<u64>().ok().filter(|_| is_number)?.checked_mul(unit)
}

/// What to say of a name that there is not: what there is, and which of it was meant, if one is near.
pub(crate) fn no_such(what: &str, name: &str, names: &[&str]) -> String {
    let near = names.iter().map(|other| (slips(name, other), other)).min().filter(|(slips, _)| *slips <= 2);
    let meant = near.map_or_else(String::new, |(_, other)| format!(", perhaps {other}"));
    format!("there is no {what} {name}: choose from {}{meant}", names.join(", "))
}

/// Letters left out, added, mistaken or swapped between two words (optimal string alignment).
fn slips(one: &str, other: &str) -> usize {
    let (one, other): (Vec<char>, Vec<char>) = (one.chars().collect(), other.chars().collect());
    let mut rows: [Vec<usize>; 3] = [Vec::new(), Vec::new(), (0..=other.len()).collect()];
    for (row, letter) in one.iter().enumerate() {
        rows.rotate_left(1);
        let [before_last, last, this] = &mut rows;
        this.clear();
        this.push(row + 1);
        for (column, against) in other.iter().enumerate() {
            let at = |row: &[usize], column: usize| row.get(column).copied().unwrap_or(usize::MAX - 1);
            let mistaken = at(last, column) + usize::from(letter != against);
            let mut least = mistaken.min(at(last, column + 1) + 1).min(at(this, column) + 1);
            let swapped =
                row > 0 && column > 0 && one.get(row - 1) == Some(against) && Some(letter) == other.get(column - 1);
            if swapped {
                least = least.min(at(before_last, column - 1) + 1);
            }
            this.push(least);
        }
    }
    rows.last().and_then(|row| row.last()).copied().unwrap_or(usize::MAX)
}

pub(crate) fn hex_digits(text: &str) -> Result<String, String> {
    let right = !text.is_empty() && text.len() <= 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if right { Ok(text.to_ascii_lowercase()) } else { Err("give 1 to 64 hexadecimal digits".to_owned()) }
}

fn model_file(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if path.is_file() { Ok(path) } else { Err("no such file: give the path of a model in GGUF format".to_owned()) }
}

fn existing_dir(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if path.is_dir() { Ok(path) } else { Err("there is no such directory: create it first".to_owned()) }
}

pub(crate) fn svg_file(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if !path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("svg")) {
        return Err("plots are SVG: give a name that ends in .svg".to_owned());
    }
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if dir.is_dir() { Ok(path) } else { Err(format!("there is no directory {}: create it first", dir.display())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    /// On a terminal of 60 columns words were broken in the middle, by the terminal.
    #[test]
    fn help_fits_a_narrow_terminal() {
        let command = Cli::command().term_width(60);
        for sub in command.get_subcommands() {
            let help = sub.clone().term_width(60).render_long_help().to_string();
            let wide = |line: &&str| line.chars().count() > 60 && line.split_whitespace().all(|word| word.len() < 40);
            assert_eq!(help.lines().find(wide), None, "{}", sub.get_name());
        }
    }

    #[test]
    fn a_number_may_be_in_thousands_or_millions() {
        let read = ["5000", "5k", "2M", "0", "k", "", "1.5k", "-1", "+1", "5kk", "5 k", "99999999999999999999"];
        let number = [Some(5_000), Some(5_000), Some(2_000_000), Some(0)];
        assert_eq!(read.map(counted)[..4], number);
        assert!(read.iter().skip(4).all(|text| counted(text).is_none()));
    }

    #[test]
    fn a_name_that_there_is_not_is_answered_with_the_nearest() {
        for (name, says) in [
            ("chta", "perhaps chat"),
            ("lrru", "perhaps lru"),
            ("adaptve", "perhaps adaptive"),
            ("adpative", "perhaps adaptive"),
            ("flod", "perhaps flood"),
        ] {
            let said = no_such("name", name, &["chat", "lru", "lru2", "adaptive", "flood"]);
            assert!(said.ends_with(says), "{said}");
        }
        assert!(!no_such("name", "nothing", &["chat", "lru"]).contains("perhaps"));
    }

    #[test]
    fn options_may_stand_before_and_after_the_subcommand() {
        for args in [["kvkeep", "demo", "--json", "agent"], ["kvkeep", "demo", "agent", "--json"]] {
            let Command::Demo(demo) = Cli::parse_from(args).command else { panic!("not the demo") };
            assert_eq!(demo.which, Some(Which::Agent));
            assert!(demo.options.json);
        }
    }

    #[test]
    fn bad_values_are_refused_with_what_to_do() {
        for (option, value, says) in [
            ("--capacity-gib", "NaN", "above 0"),
            ("--capacity-gib", "-1", "above 0"),
            ("--requests", "3", "4..=1000"),
            ("--block-tokens", "0", "1..=1024"),
            ("--plot", "plot.png", "ends in .svg"),
            ("--plot", "/no/such/dir/plot.svg", "create it first"),
            ("--model", "/no/such/model.gguf", "GGUF"),
        ] {
            let option = format!("{option}={value}");
            let error = Cli::try_parse_from(["kvkeep", "demo", option.as_str()]).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(says), "{error}");
        }
    }
}
