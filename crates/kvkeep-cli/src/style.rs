//! How results reach people: what tables and numbers look like, and standard output.

use std::io::{ErrorKind, IsTerminal, Write};

use anyhow::{Context, Result};
use comfy_table::{ContentArrangement, Table, presets};

/// An empty table: colours only if standard output is a terminal and `NO_COLOR` is not set.
pub(crate) fn table() -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    // On a narrow terminal cells break between words; the terminal itself would break within them.
    table.set_content_arrangement(ContentArrangement::Dynamic);
    if !std::io::stdout().is_terminal() || std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty()) {
        table.force_no_tty();
    }
    table
}

/// Whoever read standard output has seen enough.
#[derive(Debug)]
pub(crate) struct ReaderLeft;

impl std::fmt::Display for ReaderLeft {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("nobody reads standard output any more")
    }
}

impl std::error::Error for ReaderLeft {}

/// Writes a line to standard output. `println!` would panic where a reader, such as `head`, has left.
pub(crate) fn say(text: &str) -> Result<()> {
    match writeln!(std::io::stdout(), "{text}") {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Err(ReaderLeft.into()),
        written => written.context("cannot write to standard output"),
    }
}

/// 1,234,567.
pub(crate) fn count(number: u64) -> String {
    let digits = number.to_string();
    let grouped = |(position, digit): (usize, char)| {
        let comma = position > 0 && (digits.len() - position).is_multiple_of(3);
        [comma.then_some(','), Some(digit)].into_iter().flatten()
    };
    digits.chars().enumerate().flat_map(grouped).collect()
}

/// 1.5 GiB.
#[expect(clippy::cast_precision_loss, reason = "for people to read")]
pub(crate) fn size(bytes: u64) -> String {
    let units = [("GiB", 1u64 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    match units.iter().find(|(_, unit)| bytes >= *unit) {
        Some((name, unit)) => format!("{:.1} {name}", bytes as f64 / *unit as f64),
        None => format!("{bytes} bytes"),
    }
}

/// 3 min: one unit, rounded down.
pub(crate) fn span(ms: u64) -> String {
    let units = [("d", 86_400_000u64), ("h", 3_600_000), ("min", 60_000), ("s", 1_000)];
    match units.iter().find(|(_, unit)| ms >= *unit) {
        Some((name, unit)) => format!("{} {name}", ms / unit),
        None => format!("{ms} ms"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_readable() {
        assert_eq!([0, 999, 1_000, 12_345_678].map(count), ["0", "999", "1,000", "12,345,678"]);
        assert_eq!([0, 1023, 1536, 5 << 30].map(size), ["0 bytes", "1023 bytes", "1.5 KiB", "5.0 GiB"]);
        assert_eq!([0, 1_999, 61_000, 3_600_000, 200_000_000].map(span), ["0 ms", "1 s", "1 min", "1 h", "2 d"]);
    }
}
