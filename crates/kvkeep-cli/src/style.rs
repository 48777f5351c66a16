//! How results reach people: what tables look like, and standard output.

use std::io::{IsTerminal, Write};

use anyhow::{Context, Result};
use comfy_table::{Table, presets};

/// An empty table: colours only if standard output is a terminal and `NO_COLOR` is not set.
pub(crate) fn table() -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    if !std::io::stdout().is_terminal() || std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty()) {
        table.force_no_tty();
    }
    table
}

/// Writes a line to standard output. `println!` would panic where a reader, such as `head`, has left.
pub(crate) fn say(text: &str) -> Result<()> {
    writeln!(std::io::stdout(), "{text}").context("cannot write to standard output")
}
