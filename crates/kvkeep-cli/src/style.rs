//! How tables look, in one place.

use std::io::IsTerminal;

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
