//! Traces: one JSON object a line, `timestamp`, `input_length`, `output_length`, `hash_ids`; plain,
//! gzip or zstd, told apart by their first bytes.
//!
//! A line that cannot be read ends the run with its file and number: a figure over part of a
//! trace would look like one over all of it.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use super::synthetic;

/// Requests, in the order of their time.
#[derive(Debug)]
pub(crate) struct Trace {
    pub(crate) name: String,
    pub(crate) block_tokens: u64,
    pub(crate) requests: Vec<Request>,
}

/// One request.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Request {
    /// Milliseconds since the trace began, where it says so.
    #[serde(rename = "timestamp", default)]
    pub(crate) at_ms: Option<f64>,
    /// The prompt, in tokens.
    #[serde(rename = "input_length")]
    pub(crate) tokens: u64,
    /// One number for each block of the prompt; equal numbers mean equal blocks and equal
    /// everything before them.
    #[serde(rename = "hash_ids")]
    pub(crate) blocks: Vec<u64>,
}

impl Trace {
    /// A file, or `synthetic:NAME`.
    pub(crate) fn open(source: &str, block_tokens: Option<u64>) -> Result<Self> {
        let (name, requests) = match source.strip_prefix("synthetic:") {
            Some(name) => (source.to_owned(), synthetic::requests(name)?),
            None => {
                let path = Path::new(source);
                let name = path.file_name().map_or(source, |name| name.to_str().unwrap_or(source));
                (name.to_owned(), read(path)?)
            }
        };
        ensure!(!requests.is_empty(), "{source}: the trace has no requests");
        ensure!(requests.iter().any(|r| !r.blocks.is_empty()), "{source}: no request of the trace has a block");
        let block_tokens = block_tokens.or_else(|| infer_block_tokens(&requests)).with_context(|| {
            format!("{source}: the tokens of a block do not follow from input_length: give --block-tokens")
        })?;
        Ok(Self { name, block_tokens, requests })
    }

    pub(crate) fn blocks(&self) -> usize {
        self.requests.iter().map(|request| request.blocks.len()).sum()
    }

    pub(crate) fn tokens(&self) -> u64 {
        self.requests.iter().map(|request| request.tokens).sum()
    }

    /// Different blocks: a cache of so many never evicts.
    pub(crate) fn different_blocks(&self) -> usize {
        let all = self.requests.iter().flat_map(|request| &request.blocks);
        all.collect::<std::collections::HashSet<_>>().len()
    }

    pub(crate) fn longest_request_blocks(&self) -> u32 {
        let longest = self.requests.iter().map(|request| request.blocks.len()).max();
        u32::try_from(longest.unwrap_or(0)).unwrap_or(u32::MAX)
    }

    /// Tokens that the first `hits` blocks of a request hold.
    pub(crate) fn cached_tokens(&self, request: &Request, hits: usize) -> u64 {
        (hits as u64 * self.block_tokens).min(request.tokens)
    }
}

/// A trace as it may be asked for: a synthetic one that there is, or a file, which is opened later.
pub(super) fn source(text: &str) -> Result<String, String> {
    match text.strip_prefix("synthetic:") {
        Some(name) if !synthetic::NAMES.contains(&name) => {
            Err(crate::cli::no_such("synthetic trace", name, &synthetic::NAMES))
        }
        _ => Ok(text.to_owned()),
    }
}

fn read(path: &Path) -> Result<Vec<Request>> {
    let shown = path.display();
    let file = File::open(path).with_context(|| format!("cannot open the trace {shown}"))?;
    let reader = decompressed(BufReader::new(file)).with_context(|| format!("cannot read the trace {shown}"))?;
    let mut requests: Vec<Request> = Vec::new();
    for (number, line) in (1..).zip(BufReader::new(reader).lines()) {
        let line = line.with_context(|| format!("{shown}, line {number}: cannot be read"))?;
        if line.trim().is_empty() {
            continue;
        }
        let request = serde_json::from_str(&line)
            .with_context(|| format!("{shown}, line {number}: not a request with input_length and hash_ids"))?;
        requests.push(request);
    }
    Ok(requests)
}

/// By content, whatever the name.
fn decompressed(mut file: BufReader<File>) -> Result<Box<dyn Read>> {
    let head = file.fill_buf()?;
    if head.starts_with(&[0x1f, 0x8b]) {
        return Ok(Box::new(flate2::bufread::MultiGzDecoder::new(file)));
    }
    if head.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        match ruzstd::decoding::StreamingDecoder::new(file) {
            Ok(decoder) => return Ok(Box::new(decoder)),
            Err(error) => bail!("bad zstd: {error}"),
        }
    }
    Ok(Box::new(file))
}

/// The size of block with which every request has one block for each full, and perhaps one
/// for a last partial one.
fn infer_block_tokens(requests: &[Request]) -> Option<u64> {
    let fits = |size: &u64| {
        requests.iter().all(|Request { tokens, blocks, .. }| {
            let blocks = blocks.len() as u64;
            blocks == tokens / size || blocks == tokens.div_ceil(*size)
        })
    };
    (0..16).map(|power| 1u64 << power).find(fits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const LINES: &str = "{\"timestamp\": 0, \"input_length\": 40, \"output_length\": 3, \"hash_ids\": [1, 2, 3]}\n\n\
                         {\"timestamp\": 5, \"input_length\": 32, \"output_length\": 3, \"hash_ids\": [1, 2]}\n";

    fn file(name: &str, bytes: &[u8]) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!("kvkeep-trace-{}-{name}", std::process::id()));
        std::fs::write(&path, bytes).unwrap();
        path
    }

    fn open(name: &str, bytes: &[u8]) -> Result<Trace> {
        let path = file(name, bytes);
        let trace = Trace::open(path.to_str().unwrap(), None);
        std::fs::remove_file(path).unwrap();
        trace
    }

    #[test]
    fn plain_and_gzip_are_told_apart_by_content() {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(LINES.as_bytes()).unwrap();
        for bytes in [LINES.as_bytes().to_vec(), gzip.finish().unwrap()] {
            let trace = open("plain", &bytes).unwrap();
            assert_eq!((trace.requests.len(), trace.blocks(), trace.block_tokens), (2, 5, 16));
            assert_eq!((trace.tokens(), trace.different_blocks()), (72, 3));
            assert_eq!(trace.cached_tokens(&trace.requests[0], 3), 40, "the last block is partial");
        }
    }

    #[test]
    fn zstd_is_read_too() {
        let bytes = ruzstd::encoding::compress_to_vec(LINES.as_bytes(), ruzstd::encoding::CompressionLevel::Fastest);
        assert_eq!(open("zstd", &bytes).unwrap().blocks(), 5);
    }

    #[test]
    fn a_bad_line_is_named_by_file_and_number() {
        for bad in ["{\"input_length\": 3}", "[]", "{\"input_length\": -1, \"hash_ids\": [1]}", "nonsense"] {
            let error = format!("{:#}", open("bad", format!("{LINES}{bad}\n").as_bytes()).unwrap_err());
            assert!(error.contains("kvkeep-trace-") && error.contains("line 4"), "{error}");
        }
        assert!(format!("{:#}", open("empty", b"").unwrap_err()).contains("no requests"));
        assert!(format!("{:#}", Trace::open("/no/such/trace", None).unwrap_err()).contains("cannot open"));
    }
}
