//! What can go wrong, by meaning. Every message says what to do.
//!
//! An error says its own part, and hands out what caused it as its source: whoever prints the whole chain, as
//! [`OneLine`] does, says everything once. Messages that contain their source were the alternative: then each printer
//! of chains says it twice.
//!
//! A miss and a rejection are not errors: a miss is `None`, a rejection is a
//! [`Rejection`] inside a stated result.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::path::PathBuf;

use crate::tensor::{DType, Shape};

/// A call that cannot be carried out as given, or memory that cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A configuration value that makes no cache.
    #[error("invalid configuration: {0}")]
    Config(String),
    /// A layout with a zero or absurd dimension.
    #[error("invalid KV layout: {0}")]
    Layout(String),
    /// Text that is not the id of a namespace or the hash of a block.
    #[error("{0:?} is no id: give its 64 hexadecimal digits")]
    BadId(String),
    /// No tokens were given.
    #[error("no tokens given: pass the token ids of the prompt")]
    EmptyTokens,
    /// An empty prefix text.
    #[error("the prefix is empty: pass the text whose KV this is")]
    EmptyPrefix,
    /// No layers were given or asked for.
    #[error("no layers given: pass at least one layer")]
    ZeroLayers,
    /// A layer that the layout (or the limit of the named cache) does not have.
    #[error("layer {layer} is out of range: layers run from 0 to {}", .layers - 1)]
    LayerOutOfRange {
        /// The layer asked for.
        layer: usize,
        /// How many layers there are.
        layers: usize,
    },
    /// More or fewer layers than asked for.
    #[error("{got} layers given, {expected} expected: pass one entry for each layer")]
    LayerCount {
        /// How many there should be.
        expected: usize,
        /// How many were given.
        got: usize,
    },
    /// A block that was not matched.
    #[error("block {block} was not matched: the match has {blocks} blocks")]
    BlockOutOfRange {
        /// The block asked for.
        block: usize,
        /// How many were matched.
        blocks: usize,
    },
    /// The same layer twice in one batch.
    #[error("layer {0} is given twice: pass each layer once")]
    DuplicateLayer(usize),
    /// A tensor whose dtype is not the one of the layout.
    #[error("{tensor} has dtype {got}, the layout stores {expected}: convert it first")]
    DTypeMismatch {
        /// Which tensor, for example `k of layer 3`.
        tensor: String,
        /// What the layout says.
        expected: DType,
        /// What was given.
        got: DType,
    },
    /// A tensor whose shape is not the one of the layout.
    #[error("{tensor} has shape {got}, expected {expected}")]
    ShapeMismatch {
        /// Which tensor, for example `k of layer 3`.
        tensor: String,
        /// The expected shape, in words.
        expected: String,
        /// What was given.
        got: Shape,
    },
    /// A byte buffer that is not as long as its shape and dtype say.
    #[error("a tensor of shape {shape} and dtype {dtype} takes {expected_bytes} bytes, the buffer has {got_bytes}")]
    BufferLength {
        /// The stated shape.
        shape: Shape,
        /// The stated dtype.
        dtype: DType,
        /// Bytes that shape and dtype ask for.
        expected_bytes: usize,
        /// Bytes of the buffer.
        got_bytes: usize,
    },
    /// A shape with too many dimensions.
    #[error("a tensor of {rank} dimensions is not supported: at most {max} are")]
    Rank {
        /// Dimensions given.
        rank: usize,
        /// Dimensions supported.
        max: usize,
    },
    /// A tensor without elements.
    #[error("{0} is empty: every dimension must be at least 1")]
    EmptyTensor(String),
    /// A size that does not fit the machine's words.
    #[error("{0} overflows: the sizes given are too large")]
    SizeOverflow(&'static str),
    /// A buffer that cannot be read as elements of the asked-for type.
    #[error("cannot view the tensor as {wanted}: {reason}")]
    Cast {
        /// The element type asked for.
        wanted: DType,
        /// Why not.
        reason: String,
    },
    /// The RAM arena could not be reserved.
    #[error("cannot reserve {bytes} bytes of address space for the RAM tier (choose a smaller capacity)")]
    Memory {
        /// Bytes asked for.
        bytes: u64,
        /// What the operating system said.
        source: io::Error,
    },
    /// The disk tier's directory cannot be used.
    #[error("cannot {doing} the disk tier at {}", .dir.display())]
    Disk {
        /// The directory.
        dir: PathBuf,
        /// What was tried: `open`, `flush`, `close`.
        doing: &'static str,
        /// What the operating system said.
        source: io::Error,
    },
    /// A tier other than the disk did not do what it was to.
    #[error("cannot {doing} the tier {tier:?}")]
    Tier {
        /// The tier's name.
        tier: String,
        /// What was tried: `flush`, `close`.
        doing: &'static str,
        /// What it said.
        source: io::Error,
    },
    /// A flush left blocks in RAM alone.
    #[error(
        "{blocks} blocks were not flushed: the tier {tier:?} does not take them now. They are still in RAM: flush again \
         when it works"
    )]
    NotTaken {
        /// The tier's name.
        tier: String,
        /// Blocks that it handed back.
        blocks: usize,
    },
    /// Another process has the directory.
    #[error(
        "the disk tier at {} is in use by {}: close it there, or give this one a directory of its own",
        .dir.display(), holder(*.pid)
    )]
    DiskLocked {
        /// The directory.
        dir: PathBuf,
        /// The process that has it, if it said so.
        pid: Option<u32>,
    },
    /// The directory was written with another key, or none, or by another release.
    #[error("the disk tier at {} does not open: {reason}", .dir.display())]
    DiskRefused {
        /// The directory.
        dir: PathBuf,
        /// Why, and what to do.
        reason: String,
    },
    /// Leases hold at most a part of RAM.
    #[error("leases would hold {needed_bytes} bytes, and may hold {limit_bytes}, half of RAM: end another one first")]
    LeasesFull {
        /// Bytes that all of them would hold, in whole pages.
        needed_bytes: u64,
        /// Bytes that they may hold.
        limit_bytes: u64,
    },
    /// A text that is no name of a lease.
    #[error("{0:?} is no lease: give the 32 hexadecimal digits that it was given by")]
    BadLeaseId(String),
    /// A child of the process that made the cache.
    #[error(
        "this cache belongs to the process that made it and cannot be used after a fork: \
         make one in the child, or spawn processes instead of forking them"
    )]
    Forked,
    /// Whoever stored said that it should stop.
    #[error("the store was stopped: nothing of it was stored")]
    Stopped,
    /// There is no disk tier.
    #[error("the cache has no disk tier: configure one")]
    NoDisk,
    /// No memory for a private view of what was found.
    #[error("cannot map {bytes} bytes for a private view (drop views that are no longer needed)")]
    PrivateMemory {
        /// Bytes asked for.
        bytes: u64,
        /// What the operating system said.
        source: io::Error,
    },
}

fn holder(pid: Option<u32>) -> String {
    match pid {
        None => "another process".into(),
        Some(pid) if pid == std::process::id() => format!("process {pid}, which is this one"),
        Some(pid) => format!("process {pid}"),
    }
}

/// An error and everything that caused it, in one line: for where nothing but text can go.
///
/// ```
/// use std::io;
/// use kvkeep::{Error, OneLine};
///
/// let source = io::Error::other("it is away");
/// let error = Error::Disk { dir: "/cache".into(), doing: "flush", source };
/// assert_eq!(error.to_string(), "cannot flush the disk tier at /cache");
/// assert_eq!(OneLine(&error).to_string(), "cannot flush the disk tier at /cache: it is away");
/// ```
#[derive(Debug, Clone, Copy)]
pub struct OneLine<'a>(pub &'a (dyn StdError + 'static));

impl fmt::Display for OneLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut said = self.0.to_string();
        f.write_str(&said)?;
        let mut next = self.0.source();
        while let Some(error) = next {
            next = error.source();
            let cause = error.to_string();
            // Not every library leaves its causes to whoever prints them.
            if !said.ends_with(&cause) {
                write!(f, ": {cause}")?;
                said = cause;
            }
        }
        Ok(())
    }
}

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why something was not admitted. A stated result, not an error: the cache works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum Rejection {
    /// It is larger than the whole cache.
    #[error("it needs {needed_bytes} bytes, the cache holds {capacity_bytes}: raise the capacity")]
    LargerThanCapacity {
        /// Bytes it needs, in whole pages.
        needed_bytes: u64,
        /// The cap.
        capacity_bytes: u64,
    },
    /// Everything that could make room is pinned or being written.
    #[error("it needs {needed_bytes} bytes, and {held_bytes} bytes are pinned or being written: drop pins first")]
    AllPinned {
        /// Bytes it needs, in whole pages.
        needed_bytes: u64,
        /// Bytes that cannot be evicted now.
        held_bytes: u64,
    },
    /// Its namespace's share is in use by this very request, pinned or being written, and no other namespace has
    /// more than its own.
    #[error(
        "it needs {needed_bytes} bytes more, its namespace's share of {share_bytes} bytes is in use, and no other one \
         has more than its own: drop pins, or raise the quota or the capacity"
    )]
    OverQuota {
        /// Bytes it needs, in whole pages.
        needed_bytes: u64,
        /// What the namespace's weight comes to.
        share_bytes: u64,
    },
    /// A block before the first token given is not in the cache (any more), so what comes
    /// behind it could never be found.
    #[error("the block at token {token} is not in the cache and was not given: store from there on")]
    PrefixGone {
        /// Where the missing block begins.
        token: usize,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::DType;

    /// Each variant once. The match has no wildcard: a new variant has to be added here, too.
    fn every() -> Vec<Error> {
        let (cause, shape) = (|| io::Error::other("the cause"), Shape::new(&[1]).unwrap());
        let all = vec![
            Error::Config("c".into()),
            Error::Layout("l".into()),
            Error::BadId("i".into()),
            Error::EmptyTokens,
            Error::EmptyPrefix,
            Error::ZeroLayers,
            Error::LayerOutOfRange { layer: 2, layers: 2 },
            Error::LayerCount { expected: 2, got: 1 },
            Error::BlockOutOfRange { block: 1, blocks: 1 },
            Error::DuplicateLayer(1),
            Error::DTypeMismatch { tensor: "k".into(), expected: DType::U8, got: DType::I8 },
            Error::ShapeMismatch { tensor: "k".into(), expected: "s".into(), got: shape },
            Error::BufferLength { shape, dtype: DType::U8, expected_bytes: 1, got_bytes: 2 },
            Error::Rank { rank: 9, max: 8 },
            Error::EmptyTensor("k".into()),
            Error::SizeOverflow("s"),
            Error::Cast { wanted: DType::F32, reason: "r".into() },
            Error::Memory { bytes: 1, source: cause() },
            Error::Disk { dir: "d".into(), doing: "open", source: cause() },
            Error::DiskLocked { dir: "d".into(), pid: None },
            Error::DiskRefused { dir: "d".into(), reason: "r".into() },
            Error::Forked,
            Error::Stopped,
            Error::NoDisk,
            Error::PrivateMemory { bytes: 1, source: cause() },
            Error::LeasesFull { needed_bytes: 2, limit_bytes: 1 },
            Error::BadLeaseId("l".into()),
            Error::NotTaken { tier: "t".into(), blocks: 2 },
            Error::Tier { tier: "t".into(), doing: "flush", source: cause() },
        ];
        let number = |error: &Error| match error {
            Error::Config(_) => 0,
            Error::Layout(_) => 1,
            Error::BadId(_) => 2,
            Error::EmptyTokens => 3,
            Error::EmptyPrefix => 4,
            Error::ZeroLayers => 5,
            Error::LayerOutOfRange { .. } => 6,
            Error::LayerCount { .. } => 7,
            Error::BlockOutOfRange { .. } => 8,
            Error::DuplicateLayer(_) => 9,
            Error::DTypeMismatch { .. } => 10,
            Error::ShapeMismatch { .. } => 11,
            Error::BufferLength { .. } => 12,
            Error::Rank { .. } => 13,
            Error::EmptyTensor(_) => 14,
            Error::SizeOverflow(_) => 15,
            Error::Cast { .. } => 16,
            Error::Memory { .. } => 17,
            Error::Disk { .. } => 18,
            Error::DiskLocked { .. } => 19,
            Error::DiskRefused { .. } => 20,
            Error::Forked => 21,
            Error::Stopped => 22,
            Error::NoDisk => 23,
            Error::PrivateMemory { .. } => 24,
            Error::LeasesFull { .. } => 25,
            Error::BadLeaseId(_) => 26,
            Error::NotTaken { .. } => 27,
            Error::Tier { .. } => 28,
        };
        assert!(all.iter().map(number).eq(0..29));
        all
    }

    /// The operating system's words were said twice by whoever printed the chain, and three times at the server's end.
    #[test]
    fn no_error_says_its_source_and_the_whole_line_says_it_once() {
        let mut sources = 0;
        for error in every() {
            let (own, line) = (error.to_string(), OneLine(&error).to_string());
            assert!(!own.is_empty() && !own.contains("the cause"), "{own}");
            if let Some(source) = error.source() {
                sources += 1;
                assert_eq!(line, format!("{own}: {source}"));
            } else {
                assert_eq!(line, own);
            }
        }
        assert_eq!(sources, 4);
    }

    #[test]
    fn a_cause_that_another_library_says_twice_is_said_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("it failed: {0}")]
        struct Talkative(#[source] io::Error);
        let error = Talkative(io::Error::other("the disk is full"));
        assert_eq!(OneLine(&error).to_string(), "it failed: the disk is full");
    }
}
