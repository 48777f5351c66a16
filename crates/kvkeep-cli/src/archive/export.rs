//! `kvkeep export`: chosen entries as safetensors, for looking at KV with other tools.
//!
//! One tensor for K and one for V of every layer of every entry, named
//! `NAMESPACE.KEY.layer.N.k` and `.v`, where NAMESPACE is the first 16 hexadecimal digits of
//! the namespace and KEY all 64 of the key; one for the whole of an opaque block,
//! `NAMESPACE.KEY.block`. One tensor a block was the alternative: K and V
//! may differ in their last dimension.
//!
//! Invariant: a file appears under its name only when every byte in it was checked.
//! Payloads are read while the file is written, so that memory holds one at a time; a first
//! pass leaves out what is damaged or cannot be read.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow, ensure};
use indicatif::ProgressBar;
use kvkeep::tiers::{Frame, Side};
use kvkeep::{Archive, Contents, DType, KvLayout, RecordInfo, Shape};
use safetensors::{Dtype, View};
use serde::Serialize;
use serde_json::json;

use super::{block_of, chosen, count, hex, open, record_bar, short, size};
use crate::cli::{DAMAGED, ExportOptions};
use crate::style;

/// What readers of safetensors take is 100 MB of names; ours are at most 260 bytes each.
const MAX_TENSORS: usize = 350_000;
/// V begins at a multiple of this behind K in a named entry.
const NAMED_ALIGN: usize = 64;

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    out: String,
    entries: usize,
    tensors: usize,
    tensor_bytes: u64,
    /// Keys of entries that were chosen, and left out because a byte of them is damaged or cannot be read.
    damaged: Vec<String>,
}

/// Reads payloads for the tensors that are written, one at a time.
struct Source<'a> {
    archive: &'a Archive,
    bar: &'a ProgressBar,
    last: RefCell<Option<(usize, Vec<u8>)>>,
    failed: RefCell<Option<anyhow::Error>>,
}

/// A part of an entry's payload.
struct Tensor<'a> {
    source: &'a Source<'a>,
    number: usize,
    record: &'a RecordInfo,
    range: Range<usize>,
    dtype: Dtype,
    shape: Vec<usize>,
}

pub(crate) fn run(options: &ExportOptions) -> Result<ExitCode> {
    let archive = open(&options.dir)?;
    let out = out_file(&options.out, &options.dir.dir)?;
    let limit = options.select.limit.unwrap_or(usize::MAX);
    let wanted = archive.records().iter().filter(|record| chosen(record, &options.select)).take(limit);
    let wanted: Vec<&RecordInfo> = wanted.collect();
    ensure!(!wanted.is_empty(), "nothing was chosen: kvkeep inspect --records lists what is there");

    let bar = record_bar(2 * wanted.len() as u64, "exporting");
    let (mut whole, mut damaged) = (Vec::new(), Vec::new());
    for record in wanted {
        match archive.load(record) {
            Ok(Some((contents, _))) => whole.push((record, contents)),
            Ok(None) | Err(_) => damaged.push(hex(&record.key)),
        }
        bar.inc(1);
    }
    ensure!(!whole.is_empty(), "all of what was chosen is damaged or cannot be read: see kvkeep verify");
    let source = Source { archive: &archive, bar: &bar, last: RefCell::default(), failed: RefCell::default() };
    let tensors = tensors(&source, &whole)?;
    let report = Report {
        out: options.out.display().to_string(),
        entries: whole.len(),
        tensors: tensors.len(),
        tensor_bytes: tensors.iter().map(|(_, tensor)| tensor.range.len() as u64).sum(),
        damaged,
    };
    write(tensors, metadata(&whole), &source, &out)?;
    bar.finish_and_clear();
    style::say(&if options.dir.json { serde_json::to_string_pretty(&report)? } else { report.text() })?;
    Ok(if report.damaged.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(DAMAGED) })
}

/// The directory of the cache is only read, so nothing is written into it either.
fn out_file(out: &Path, dir: &Path) -> Result<PathBuf> {
    let parent = out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let parent = parent.canonicalize().with_context(|| format!("cannot write to {}", parent.display()))?;
    let inside = dir.canonicalize().is_ok_and(|dir| parent.starts_with(dir));
    ensure!(!inside, "{} lies in the cache's directory: write it elsewhere", out.display());
    Ok(parent.join(out.file_name().context("--out has no file name")?))
}

fn tensors<'a>(source: &'a Source<'a>, whole: &[(&'a RecordInfo, Contents)]) -> Result<Vec<(String, Tensor<'a>)>> {
    let mut tensors = Vec::new();
    for (number, (record, contents)) in whole.iter().enumerate() {
        let namespace = hex(record.namespace.as_bytes().get(..8).unwrap_or_default());
        let name = format!("{namespace}.{}", hex(&record.key));
        for (of, range, dtype, shape) in parts(record, contents)? {
            let tensor =
                Tensor { source, number, record, range, dtype: dtype_of(dtype)?, shape: shape.dims().to_vec() };
            let of = of.map_or_else(|| "block".to_owned(), |(layer, side)| format!("layer.{layer}.{side}"));
            tensors.push((format!("{name}.{of}"), tensor));
        }
        ensure!(tensors.len() <= MAX_TENSORS, "more than {MAX_TENSORS} tensors: choose fewer entries with --limit");
    }
    Ok(tensors)
}

/// Which layer, and what of it: `None` for an opaque block, which has no layers.
type Part = (Option<(usize, char)>, Range<usize>, DType, Shape);

/// Where K and V of each layer lie in a payload.
fn parts(record: &RecordInfo, contents: &Contents) -> Result<Vec<Part>> {
    match contents {
        Contents::Block { layout, .. } => Ok(block_parts(layout)),
        Contents::Named { k: (k_dtype, k_shape), v: (v_dtype, v_shape), .. } => {
            let bytes = |dtype: &DType, shape: &Shape| shape.size_bytes(*dtype).context("a shape overflows");
            let k_end = bytes(k_dtype, k_shape)?;
            let v_start = k_end.next_multiple_of(NAMED_ALIGN);
            let v_end = v_start + bytes(v_dtype, v_shape)?;
            let layer = record.layer as usize;
            let k = (Some((layer, 'k')), 0..k_end, *k_dtype, *k_shape);
            Ok(vec![k, (Some((layer, 'v')), v_start..v_end, *v_dtype, *v_shape)])
        }
        _ => Err(anyhow!("this release does not know what the entry {} is", short(&record.key))),
    }
}

fn block_parts(layout: &KvLayout) -> Vec<Part> {
    let letter = |side| if side == Side::K { 'k' } else { 'v' };
    let part = |frame: Frame| {
        let of = frame.side.map(|side| (frame.layer as usize, letter(side)));
        (of, frame.range, frame.dtype, frame.shape)
    };
    layout.frames().into_iter().map(part).collect()
}

fn dtype_of(dtype: DType) -> Result<Dtype> {
    Ok(match dtype {
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::F8E4M3 => Dtype::F8_E4M3,
        DType::F8E5M2 => Dtype::F8_E5M2,
        DType::I8 => Dtype::I8,
        DType::U8 => Dtype::U8,
        other => return Err(anyhow!("safetensors has no {other}")),
    })
}

/// What the namespaces are: the names of tensors have room for their first digits only.
fn metadata(whole: &[(&RecordInfo, Contents)]) -> HashMap<String, String> {
    let mut metadata = HashMap::from([("format".to_owned(), "kvkeep export 1".to_owned())]);
    for (record, contents) in whole {
        let namespace = hex(record.namespace.as_bytes());
        let key = format!("namespace.{}", namespace.get(..16).unwrap_or_default());
        metadata.entry(key).or_insert_with(|| match block_of(Some(contents.clone())) {
            Some((layout, model)) => json!({
                "id": namespace, "model": model, "block_tokens": layout.block_tokens(), "layers": layout.layers(),
                "order": format!("{:?}", layout.order()),
            })
            .to_string(),
            None => json!({ "id": namespace }).to_string(),
        });
    }
    metadata
}

/// Under another name first: what could not be read while it was written must not be left.
fn write(
    tensors: Vec<(String, Tensor<'_>)>,
    metadata: HashMap<String, String>,
    source: &Source<'_>,
    out: &Path,
) -> Result<()> {
    let mut partial = out.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let written = safetensors::serialize_to_file(tensors, Some(metadata), &partial);
    let written = written.with_context(|| format!("cannot write {}", out.display()));
    let written = source.failed.take().map_or(written, Err);
    let done = written.and_then(|()| std::fs::rename(&partial, out).map_err(Into::into));
    if done.is_err() {
        // It may not be there, and the error that is reported says more than this one.
        let _ = std::fs::remove_file(&partial);
    }
    done
}

impl Source<'_> {
    /// Zeros once a payload could not be read: then the file is thrown away.
    fn bytes(&self, number: usize, record: &RecordInfo, range: Range<usize>) -> Vec<u8> {
        let mut last = self.last.borrow_mut();
        if last.as_ref().is_none_or(|(loaded, _)| *loaded != number) {
            *last = None;
            match self.archive.load(record) {
                Ok(Some((_, payload))) => *last = Some((number, payload)),
                Ok(None) => drop(self.failed.replace(Some(anyhow!("an entry was damaged while it was exported")))),
                Err(error) => drop(self.failed.replace(Some(error.into()))),
            }
            self.bar.inc(1);
        }
        let bytes = last.as_ref().and_then(|(_, payload)| payload.get(range.clone()));
        if bytes.is_none() && self.failed.borrow().is_none() {
            self.failed.replace(Some(anyhow!("the entry {} is shorter than its shapes", short(&record.key))));
        }
        bytes.map_or_else(|| vec![0; range.len()], <[u8]>::to_vec)
    }
}

impl View for Tensor<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(self.source.bytes(self.number, self.record, self.range.clone()))
    }

    fn data_len(&self) -> usize {
        self.range.len()
    }
}

impl Report {
    /// For people.
    fn text(&self) -> String {
        let Self { out, entries, tensors, tensor_bytes, damaged } = self;
        let (entries, tensors) = (count(*entries as u64), count(*tensors as u64));
        let mut text = format!("{entries} entries, {tensors} tensors, {} written to {out}", size(*tensor_bytes));
        if !damaged.is_empty() {
            text += &format!(
                "\nLeft out, because damaged or not to be read: {} entries. See kvkeep verify.",
                damaged.len()
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_a_block_cover_it_without_gaps() {
        let layout = KvLayout::new(3, 2, 8, DType::F16).unwrap().with_v_head_dim(4).unwrap();
        let parts = block_parts(&layout);
        assert_eq!(parts.len(), 6);
        let mut at = 0;
        for (_, range, ..) in &parts {
            assert_eq!(range.start, at);
            at = range.end;
        }
        assert_eq!(at, layout.block_bytes());
    }

    #[test]
    fn nothing_is_written_into_the_directory_of_the_cache() {
        let dir = std::env::temp_dir();
        assert!(out_file(&dir.join("x.safetensors"), &dir).is_err());
        assert!(out_file(Path::new("/no/such/dir/x.safetensors"), &dir).is_err());
        assert_eq!(out_file(&dir.join("x.safetensors"), Path::new("/proc")).unwrap(), dir.join("x.safetensors"));
    }
}
