//! Live traffic as a trace that `kvkeep replay` reads: one JSON object a request, with hashes of
//! blocks and never a token.
//!
//! Requests go through a bounded queue to a thread of its own, so that no request waits for the
//! disk. What does not fit, and what cannot be written, is counted and lost: a cache must not
//! fail because its log does.

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crate::process::Process;

/// Requests that may wait to be written.
const QUEUE: usize = 1024;
/// Of a block's hash, so many bits are its number: JSON's numbers are exact up to here, and two of
/// a million blocks share one with a chance of one in ten thousand.
const NUMBER_BITS: u32 = 52;

/// Writes a trace. Dropping the last handle, or [`TraceRecorder::finish`], writes what waits.
#[derive(Debug)]
pub struct TraceRecorder {
    queue: Mutex<Option<SyncSender<Recorded>>>,
    writer: Mutex<Option<JoinHandle<()>>>,
    counts: Arc<Counts>,
    started_ms: AtomicU64,
    process: Process,
}

#[derive(Debug, Default)]
struct Counts {
    written: AtomicU64,
    lost: AtomicU64,
}

#[derive(Debug)]
struct Recorded {
    timestamp_ms: u64,
    tokens: usize,
    blocks: Vec<u64>,
}

impl TraceRecorder {
    /// Starts a new trace; nobody but its owner may read it.
    ///
    /// # Errors
    /// Whatever creating the file says, also that it is there already.
    pub fn create(path: impl AsRef<Path>) -> std::io::Result<Self> {
        let mut options = OpenOptions::new();
        options.write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let file = options.open(path)?;
        let counts = Arc::new(Counts::default());
        let (sender, receiver) = sync_channel(QUEUE);
        let counting = Arc::clone(&counts);
        let writer = std::thread::Builder::new()
            .name("kvkeep-trace".to_owned())
            .spawn(move || write_all(BufWriter::new(file), &receiver, &counting))?;
        let (queue, writer) = (Mutex::new(Some(sender)), Mutex::new(Some(writer)));
        Ok(Self { queue, writer, counts, started_ms: AtomicU64::new(u64::MAX), process: Process::current() })
    }

    /// Requests written so far.
    #[must_use]
    pub fn written_total(&self) -> u64 {
        self.counts.written.load(Ordering::Relaxed)
    }

    /// Requests that were lost: the queue was full, or the file could not be written.
    #[must_use]
    pub fn lost_total(&self) -> u64 {
        self.counts.lost.load(Ordering::Relaxed)
    }

    /// Writes what waits and ends the trace; later requests are lost.
    pub fn finish(&self) {
        // A child of the process that made it has no such thread.
        if !self.process.is_current() {
            return;
        }
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).take();
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(writer) = writer {
            // A writer that panicked has nothing left to say.
            let _ = writer.join();
        }
    }

    /// One request of so many tokens, by the first bytes of its blocks' hashes.
    pub(crate) fn request(&self, now_ms: u64, tokens: usize, hashes: impl Iterator<Item = u64>) {
        let start = match self.started_ms.compare_exchange(u64::MAX, now_ms, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => now_ms,
            Err(started) => started,
        };
        let blocks = hashes.map(|hash| hash >> (u64::BITS - NUMBER_BITS)).collect();
        let recorded = Recorded { timestamp_ms: now_ms.saturating_sub(start), tokens, blocks };
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if queue.is_none_or(|queue| queue.try_send(recorded).is_err()) {
            self.counts.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Drop for TraceRecorder {
    fn drop(&mut self) {
        self.finish();
    }
}

fn write_all(mut file: BufWriter<File>, queue: &Receiver<Recorded>, counts: &Counts) {
    for request in queue {
        let counter = match write(&mut file, &request) {
            Ok(()) => &counts.written,
            Err(_) => &counts.lost,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
    // What is still buffered is lost with the file, if it cannot be written now.
    let _ = file.flush();
}

fn write(file: &mut impl Write, request: &Recorded) -> std::io::Result<()> {
    let Recorded { timestamp_ms, tokens, blocks } = request;
    // The answer's length is not known when a prompt is looked up.
    write!(file, "{{\"timestamp\": {timestamp_ms}, \"input_length\": {tokens}, \"output_length\": 0, \"hash_ids\": [")?;
    for (position, block) in blocks.iter().enumerate() {
        let comma = if position > 0 { ", " } else { "" };
        write!(file, "{comma}{block}")?;
    }
    writeln!(file, "]}}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_one_line_of_json_with_hashes_and_no_token() {
        let mut line = Vec::new();
        write(&mut line, &Recorded { timestamp_ms: 5, tokens: 33, blocks: vec![7, 8] }).unwrap();
        let expected = "{\"timestamp\": 5, \"input_length\": 33, \"output_length\": 0, \"hash_ids\": [7, 8]}\n";
        assert_eq!(String::from_utf8(line).unwrap(), expected);
    }

    /// A device that is always full stands for a disk that is.
    #[test]
    fn a_full_disk_loses_lines_and_nothing_else() {
        let counts = Counts::default();
        let (sender, receiver) = sync_channel(QUEUE);
        for _ in 0..100 {
            sender.send(Recorded { timestamp_ms: 0, tokens: 16_000, blocks: (0..1000).collect() }).unwrap();
        }
        drop(sender);
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        write_all(BufWriter::new(full), &receiver, &counts);
        assert!(counts.lost.load(Ordering::Relaxed) > 50);
    }
}
