//! A disk tier's directory, looked at from outside: `verify`, `inspect`, `export`.
//!
//! Invariant: nothing in the directory is changed, also not what is damaged, and what is
//! handed out was checked. Opening a cache on it was the alternative: that seals, evicts, and
//! drops what it finds torn, which is just what somebody who looks wants to see.

mod export;
mod inspect;
mod verify;

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use kvkeep::{Archive, Contents, KvLayout, RecordInfo, RecordState};

use crate::cli::{DirOptions, SelectOptions};
use crate::style::{count, size, span};

pub(crate) use export::run as export;
pub(crate) use inspect::run as inspect;
pub(crate) use verify::run as verify;

/// Opens the directory as of now.
fn open(options: &DirOptions) -> Result<Archive> {
    Ok(Archive::open(&options.dir, options.key_file.as_deref(), now_ms()?)?)
}

/// Milliseconds since the Unix epoch.
fn now_ms() -> Result<u64> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970: set it")?;
    Ok(u64::try_from(now.as_millis())?)
}

/// Is it one of those asked for, and can it still be found?
fn chosen(record: &RecordInfo, select: &SelectOptions) -> bool {
    let begins = |bytes: &[u8], wanted: &Option<String>| wanted.as_ref().is_none_or(|w| hex(bytes).starts_with(w));
    record.state == RecordState::Live
        && begins(record.namespace.as_bytes(), &select.namespace)
        && begins(&record.key, &select.key)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The first digits of a namespace or key: enough for people, and for `--namespace` and `--key`.
fn short(bytes: &[u8]) -> String {
    hex(bytes.get(..6).unwrap_or(bytes))
}

/// What a block is made of, in one line.
fn layout_words(layout: &KvLayout) -> String {
    let tokens = layout.block_tokens();
    if layout.is_opaque() {
        return format!("opaque, {} bytes and {tokens} tokens a block", layout.block_bytes());
    }
    let dims = match (layout.k_head_dim(), layout.v_head_dim()) {
        (k, v) if k == v => k.to_string(),
        (k, 0) => format!("{k} in one tensor"),
        (k, v) => format!("{k}/{v}"),
    };
    let (layers, heads, dtype) = (layout.layers(), layout.kv_heads(), layout.dtype());
    let mixed = if layout.is_uniform() { "" } else { " (some layers differ)" };
    format!("{layers} layers, {heads} kv_heads, head_dim {dims}{mixed}, {dtype}, {tokens} tokens a block")
}

/// The layout and the model of a block.
fn block_of(contents: Option<Contents>) -> Option<(KvLayout, String)> {
    match contents {
        Some(Contents::Block { layout, model }) => Some((layout, model)),
        _ => None,
    }
}

fn record_bar(records: u64, message: &'static str) -> ProgressBar {
    let template = "{msg} [{bar:32}] {pos} of {len} records ({elapsed} so far, {eta} left)";
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(records).with_style(style.progress_chars("=> ")).with_message(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_cut_to_what_tells_them_apart() {
        assert_eq!(short(&[0xab; 32]), "abababababab");
    }
}
