//! Codecs: the form in which tiers keep blocks. Bytes to bytes and back, without I/O.
//!
//! - Here: the trait, [`Raw`], and [`Codecs`]: which codec writes what, and which ones can be read.
//! - `lossless`: byte planes and an entropy coder.
//! - `lossy`: codes of 8 and 4 bits, on scales.
//! - `wide`: both compiled once more, for processors with AVX2.
//! - `framed`: the stored form of a whole block, whose frames (K or V of one layer) are decoded one by one.
//!
//! Invariants:
//! - Decoding what was encoded gives the block, as exactly as the codec says.
//! - Each record carries its codec's number. So a tier holds blocks of several codecs, and a cache that has changed
//!   its codec reads what it wrote before. A codec for a whole directory was the alternative: changing it would throw
//!   the directory away.
//! - What a codec wrote that is not exact is a miss to a namespace that did not ask for it, whoever wrote it. And a
//!   namespace that asks has a name of its own in that cache, codec included: what has come back from it, and what was
//!   computed behind that, is never found where every bit is expected, in whatever tier it is.
//! - Blocks of [`Raw`] pass through untouched: nobody copies or allocates for them.

mod framed;
mod lossless;
mod lossy;
#[cfg(test)]
#[cfg(feature = "disk")]
pub(crate) mod tests;
mod wide;

use std::fmt;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::key::NamespaceId;
use crate::layout::Frame;

pub(crate) use framed::{Ends, decode_range, encode};
#[cfg(feature = "disk")]
pub(crate) use framed::{decode, frames_in};
pub use lossless::Lossless;
pub(crate) use lossy::numbers;

/// The number of a codec in a record's header. Numbers from 128 on are never given to a codec of this library.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CodecId(pub u8);

/// Makes the form of a block that tiers keep, frame by frame, and the block again.
pub trait Codec: Send + Sync + fmt::Debug {
    /// Its number, for ever.
    fn id(&self) -> CodecId;
    /// Its name in settings and statistics.
    fn name(&self) -> &'static str;
    /// Does every bit come back? A block that one wrote which is not exact is read only for namespaces that it writes.
    fn is_exact(&self) -> bool;
    /// Writes what tiers keep of a frame into the beginning of `into`, and says how many bytes that are. `None` if they
    /// are more than `into` has: then the frame is kept as it is. `into` is a little shorter than the frame.
    fn encode(&self, frame: &Frame, raw: &[u8], into: &mut [u8]) -> Option<usize>;
    /// The frame again, in a buffer of exactly its size. `false` if the bytes are not what [`Codec::encode`] made:
    /// whatever they are, it must neither panic nor read beyond them.
    #[must_use]
    fn decode(&self, frame: &Frame, stored: &[u8], raw: &mut [u8]) -> bool;
}

/// The bytes as they are. Tiers know it by its number and call neither method.
#[derive(Debug, Clone, Copy, Default)]
pub struct Raw;

/// Which codec writes what, and which ones can be read: of one tier.
#[derive(Debug, Clone)]
pub struct Codecs {
    /// Those that can be read. The built-in ones are among them.
    known: Vec<Arc<dyn Codec>>,
    written: CodecId,
    /// Only where its measured rates say that it pays.
    if_it_pays: bool,
    /// Instead of that for these namespaces.
    by_namespace: Vec<(NamespaceId, CodecId)>,
}

impl CodecId {
    /// Of [`Raw`].
    pub const RAW: Self = Self(0);
    /// Of [`Lossless`].
    pub const LOSSLESS: Self = Self(1);
}

impl fmt::Display for CodecId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Every codec of this library: what one wrote, any cache can read.
fn built_in() -> Vec<Arc<dyn Codec>> {
    let mut all: Vec<Arc<dyn Codec>> = vec![Arc::new(Raw), Arc::new(Lossless::new())];
    all.extend(lossy::Lossy::all().map(|codec| Arc::new(codec) as Arc<dyn Codec>));
    all
}

impl Default for Codecs {
    fn default() -> Self {
        Self { known: built_in(), written: CodecId::RAW, if_it_pays: false, by_namespace: Vec::new() }
    }
}

impl Codecs {
    /// What [`Codecs::named`] takes for [`Codecs::if_it_pays`].
    pub const AUTO: &'static str = "auto";

    /// Everything is written by this codec.
    #[must_use]
    pub fn all(codec: Arc<dyn Codec>) -> Self {
        let written = codec.id();
        Self { written, ..Self::default() }.knows(codec)
    }

    /// Everything is written as it is until a disk has shown how fast it reads; and then by `lossless`, if this machine
    /// decodes at least twice as fast as the disk reads. What other tiers than the disk keep is written by `lossless`.
    #[must_use]
    pub fn if_it_pays() -> Self {
        Self { if_it_pays: true, ..Self::all(Arc::new(Lossless::new())) }
    }

    /// Everything is written by the codec of this name, one of [`Codecs::names`]; `auto` is [`Codecs::if_it_pays`].
    ///
    /// # Errors
    /// [`Error::Config`] for any other name.
    pub fn named(name: &str) -> Result<Self> {
        if name == Self::AUTO { Ok(Self::if_it_pays()) } else { Self::known_as(name).map(Self::all) }
    }

    /// The codec of this name, one of [`Codecs::names`].
    ///
    /// # Errors
    /// [`Error::Config`] for any other name.
    pub fn known_as(name: &str) -> Result<Arc<dyn Codec>> {
        let found = built_in().into_iter().find(|codec| codec.name() == name);
        let unknown =
            || Error::Config(format!("no codec is called {name:?}: give one of {}", Self::names().join(", ")));
        found.ok_or_else(unknown)
    }

    /// The names of the codecs of this library.
    #[must_use]
    pub fn names() -> Vec<&'static str> {
        built_in().iter().map(|codec| codec.name()).collect()
    }

    /// Blocks of this namespace are written by this codec instead.
    #[must_use]
    pub fn namespace(self, namespace: NamespaceId, codec: Arc<dyn Codec>) -> Self {
        // A lossy one's blocks are kept under a name of their own.
        let names = [Some(namespace), (!codec.is_exact()).then(|| namespace.through(codec.name()))];
        let id = codec.id();
        let mut codecs = self.knows(codec);
        for namespace in names.into_iter().flatten() {
            codecs.by_namespace.retain(|(other, _)| *other != namespace);
            codecs.by_namespace.push((namespace, id));
        }
        codecs
    }

    /// Blocks of this codec can be read, too. Of two codecs with one number the later one counts.
    #[must_use]
    pub fn knows(mut self, codec: Arc<dyn Codec>) -> Self {
        self.known.retain(|other| other.id() != codec.id());
        self.known.push(codec);
        self
    }

    /// The codec of this number.
    #[must_use]
    pub fn get(&self, id: CodecId) -> Option<&Arc<dyn Codec>> {
        self.known.iter().find(|codec| codec.id() == id)
    }

    /// The codec that writes blocks of this namespace; `None` for [`Raw`], which changes nothing.
    #[must_use]
    pub fn writing(&self, namespace: NamespaceId) -> Option<&Arc<dyn Codec>> {
        let of = self.by_namespace.iter().find(|(other, _)| *other == namespace);
        let id = of.map_or(self.written, |(_, id)| *id);
        self.get(id).filter(|codec| codec.id() != CodecId::RAW)
    }

    /// As [`Codecs::writing`]; what is not for a lossy codec goes through `lossless` where one is asked for.
    pub(crate) fn writing_what(&self, namespace: NamespaceId, may_be_lossy: bool) -> Option<&Arc<dyn Codec>> {
        let codec = self.writing(namespace)?;
        if codec.is_exact() || may_be_lossy { Some(codec) } else { self.get(CodecId::LOSSLESS) }
    }

    /// The codec of this number, if blocks of this namespace may be read with it: it is exact, or asked for.
    #[must_use]
    pub fn reading(&self, namespace: NamespaceId, id: CodecId) -> Option<&Arc<dyn Codec>> {
        let is_asked_for = || self.writing(namespace).is_some_and(|codec| codec.id() == id);
        self.get(id).filter(|codec| codec.is_exact() || is_asked_for())
    }

    /// The codec that writes blocks of this namespace, if it changes them. They are then kept under the name of
    /// [`Namespace::with_codec`](crate::Namespace::with_codec).
    #[must_use]
    pub fn lossy(&self, namespace: NamespaceId) -> Option<&'static str> {
        self.writing(namespace).filter(|codec| !codec.is_exact()).map(|codec| codec.name())
    }

    /// The name of the codec that writes what no namespace says otherwise.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.get(self.written).map_or("raw", |codec| codec.name())
    }

    /// Is it for the tier's measured rates to say whether blocks of this namespace go through the codec of [`Codecs::writing`]?
    /// Without one: those of all that have no codec of their own.
    #[must_use]
    pub fn depends(&self, namespace: Option<NamespaceId>) -> bool {
        self.if_it_pays && self.by_namespace.iter().all(|(other, _)| Some(*other) != namespace)
    }

    /// Does every block pass as it is?
    #[cfg(feature = "disk")]
    pub(crate) fn are_raw(&self) -> bool {
        self.written == CodecId::RAW && self.by_namespace.iter().all(|(_, id)| *id == CodecId::RAW)
    }
}

impl Codec for Raw {
    fn id(&self) -> CodecId {
        CodecId::RAW
    }

    fn name(&self) -> &'static str {
        "raw"
    }

    fn is_exact(&self) -> bool {
        true
    }

    fn encode(&self, _frame: &Frame, raw: &[u8], into: &mut [u8]) -> Option<usize> {
        into.get_mut(..raw.len())?.copy_from_slice(raw);
        Some(raw.len())
    }

    fn decode(&self, _frame: &Frame, stored: &[u8], raw: &mut [u8]) -> bool {
        let fits = stored.len() == raw.len();
        if fits {
            raw.copy_from_slice(stored);
        }
        fits
    }
}

/// Feeds bytes from anywhere to every codec: as what is stored, and as a block. What fuzzing calls. The first four say
/// what elements they are, how long the block is, and how it is laid out.
///
/// # Panics
/// If a block does not come back, or not exactly from a codec that is exact.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn code_anything(bytes: &[u8]) {
    use crate::layout::{Side, TokenOrder};
    use crate::tensor::{DType, Shape};
    let Some(([dtype, size, kind, exact], bytes)) = bytes.split_first_chunk() else { return };
    let Some(dtype) = DType::ALL.get(usize::from(*dtype) % DType::ALL.len()).copied() else { return };
    let order = if kind & 1 == 0 { TokenOrder::TokenHeadDim } else { TokenOrder::HeadTokenDim };
    let side = [None, Some(Side::K), Some(Side::V)].into_iter().cycle().nth(usize::from(kind >> 1 & 3)).flatten();
    let (inner, dim) = (1 + usize::from(kind >> 3 & 3), 2 + usize::from(kind >> 5) * 2);
    let exact_tokens = [exact & 3, exact >> 4 & 3].map(u32::from);
    let Ok(empty) = Shape::new(&[]) else { return };
    let frame = |bytes: usize| {
        let row = inner * dim * dtype.size_bytes();
        // What is no whole row is bytes without a layout.
        let dims = if bytes.is_multiple_of(row) { vec![bytes / row, inner, dim] } else { vec![bytes] };
        let shape = Shape::new(&dims).unwrap_or(empty);
        Frame { range: 0..bytes, layer: 0, side, dtype, shape, order: Some(order), exact_tokens }
    };
    for codec in built_in() {
        let mut raw = vec![0; usize::from(*size) * 36];
        let _ = codec.decode(&frame(raw.len()), bytes, &mut raw);
        let (mut stored, mut again) = (vec![0; bytes.len() + 64], vec![0; bytes.len()]);
        let stored = codec.encode(&frame(bytes.len()), bytes, &mut stored).and_then(|length| stored.get(..length));
        if let Some(stored) = stored {
            assert!(codec.decode(&frame(bytes.len()), stored, &mut again), "{} cannot read itself", codec.name());
            assert!(again == bytes || !codec.is_exact(), "{} is not exact", codec.name());
        }
    }
}
