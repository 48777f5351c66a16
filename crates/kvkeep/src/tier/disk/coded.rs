//! Records and codecs: what is made of a block before it is written, and the block of what is read.
//!
//! A queued block gets its stored form once, by whoever needs it or has time for it first: the writer, or the thread
//! that works ahead of it. So nobody who stores waits for a codec.
//!
//! Invariant: a block of the codec `raw` is neither copied nor allocated for, here or on its way up. Encoding when a
//! block is offered was the alternative: then the request that stores pays for it.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use super::crypt::Cipher;
use super::format::{Content, PAGE_BYTES, RecordHeader, RecordMeta};
use super::pages::{Lent, Pages};
use super::segment::{Expected, ReadError, Segment};
use crate::block::Facts;
use crate::codec::{self, Codec, CodecId, Codecs, Ends};

/// A block that is to be written.
#[derive(Debug)]
pub(crate) struct Draft {
    /// Of the block as it is.
    pub(crate) meta: RecordMeta,
    pub(crate) content: Content,
    codec: Option<Arc<dyn Codec>>,
    /// Is it the first of a prompt?
    begins: bool,
    /// Does a record of it have checksums? One that is encrypted has tags.
    has_sums: bool,
    form: OnceLock<Form>,
}

/// What is written of it.
#[derive(Debug)]
pub(crate) struct Form {
    pub(crate) meta: RecordMeta,
    /// `None` if that is the block as it is.
    encoded: Option<Pages>,
    /// The checksums, if it has such.
    pub(crate) sums: Option<Vec<u8>>,
}

impl Draft {
    pub(crate) fn new(meta: RecordMeta, content: Content, codec: Option<Arc<dyn Codec>>, has_sums: bool) -> Self {
        // What comes encoded stays so.
        let codec = codec.filter(|_| meta.codec == CodecId::RAW);
        Self { meta, content, codec, begins: false, has_sums, form: OnceLock::new() }
    }

    /// The same, the first of a prompt or not.
    pub(crate) fn begins(self, begins: bool) -> Self {
        Self { begins, ..self }
    }

    /// What is written of a block with these bytes, in whole pages.
    pub(crate) fn form(&self, payload: &[u8]) -> &Form {
        self.form.get_or_init(|| self.make(payload))
    }

    /// Is there anything to be made of it?
    pub(crate) fn is_work(&self) -> bool {
        (self.has_sums || self.codec.is_some()) && self.form.get().is_none()
    }

    /// Bytes of memory that its form takes.
    pub(crate) fn form_bytes(&self) -> usize {
        self.form.get().and_then(|form| form.encoded.as_ref()).map_or(0, |pages| pages.bytes().len())
    }

    fn make(&self, payload: &[u8]) -> Form {
        let (meta, encoded) = match self.encoded(payload) {
            Some((meta, pages)) => (meta, Some(pages)),
            None => (self.meta, None),
        };
        let mut form = Form { meta, encoded, sums: None };
        form.sums = self.has_sums.then(|| form.meta.sums(form.bytes(payload)));
        form
    }

    /// `None` if that saves no page.
    fn encoded(&self, payload: &[u8]) -> Option<(RecordMeta, Pages)> {
        let codec = self.codec.as_ref()?;
        let raw = payload.get(..usize::try_from(self.meta.raw_bytes).ok()?)?;
        let room = |bytes: usize| Pages::new(bytes.div_ceil(PAGE_BYTES));
        let (pages, bytes) = codec::encode(codec.as_ref(), &self.content.frames_to_code(self.begins), raw, room)?;
        let meta = RecordMeta {
            facts: Facts { codec: codec.id(), stored_bytes: bytes as u64, ..self.meta.facts },
            ..self.meta
        };
        (meta.payload_pages() < self.meta.payload_pages()).then_some((meta, pages))
    }
}

impl Form {
    /// Its bytes, in whole pages; `payload` has those of the block.
    pub(crate) fn bytes<'a>(&'a self, payload: &'a [u8]) -> &'a [u8] {
        let Some(pages) = &self.encoded else { return payload };
        let bytes = self.meta.payload_pages().map_or(0, |pages| pages as usize * PAGE_BYTES);
        pages.bytes().get(..bytes).unwrap_or_default()
    }
}

/// Where a record stands, and what it must be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct At<'a> {
    pub(crate) segment: &'a Segment,
    pub(crate) page: u32,
    pub(crate) payload_pages: u32,
    pub(crate) expected: Expected,
}

/// Reads and checks records, and decodes them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Decoder<'a> {
    pub(crate) codecs: &'a Codecs,
    pub(crate) cipher: Option<&'a Cipher>,
}

impl Decoder<'_> {
    /// Reads a block, and zeros behind it. Straight into place if that is exactly its pages.
    pub(crate) fn read(&self, at: At<'_>, into: &mut [u8]) -> Result<RecordHeader, ReadError> {
        let At { segment, page, payload_pages, expected } = at;
        let is_in_pages =
            into.as_ptr().align_offset(PAGE_BYTES) == 0 && into.len() == payload_pages as usize * PAGE_BYTES;
        if expected.codec == CodecId::RAW && is_in_pages {
            return segment.read(page, &expected, self.cipher, into);
        }
        let codec = self.codec(expected.codec)?;
        let mut pages = Lent::new(payload_pages as usize);
        let header = segment.read(page, &expected, self.cipher, pages.bytes_mut())?;
        if into.len() < to_usize(header.meta.raw_bytes) {
            return Err(ReadError::NoRoom);
        }
        if header.meta.codec == CodecId::RAW {
            // With what is behind it in its last page.
            let (whole, rest) = into.split_at_mut(into.len().min(pages.bytes().len()));
            whole.copy_from_slice(pages.bytes().get(..whole.len()).unwrap_or_default());
            rest.fill(0);
            return Ok(header);
        }
        let stored = pages.bytes().get(..to_usize(header.meta.stored_bytes)).ok_or(ReadError::Damaged)?;
        let is_right = codec::decode(codec, &header.content.frames(), stored, into);
        if is_right { Ok(header) } else { Err(ReadError::Damaged) }
    }

    /// Reads these bytes of a block into as many, and of the disk no more than the frames that they lie in.
    pub(crate) fn read_part(
        &self,
        at: At<'_>,
        range: &Range<usize>,
        into: &mut [u8],
    ) -> Result<RecordHeader, ReadError> {
        let At { segment, page, expected, .. } = at;
        let into = into.get_mut(..range.len()).ok_or(ReadError::NoRoom)?;
        if expected.codec == CodecId::RAW {
            let (header, pages, begin) = segment.read_range(page, &expected, self.cipher, range)?;
            into.copy_from_slice(pages.bytes().get(begin..begin + range.len()).ok_or(ReadError::Damaged)?);
            return Ok(header);
        }
        let codec = self.codec(expected.codec)?;
        let header = segment.read_header(page, &expected)?;
        let frames = header.content.frames();
        let pieces = |of: &Range<usize>| segment.read_pieces(&header, self.cipher, of);
        let (table, begin) = pieces(&(0..Ends::table_bytes(frames.len())))?;
        let ends =
            Ends::read(frames.len(), table.bytes().get(begin..).unwrap_or_default()).ok_or(ReadError::Damaged)?;
        let kept = ends.extent(codec::frames_in(&frames, range)).ok_or(ReadError::Damaged)?;
        let (pages, begin) = pieces(&kept)?;
        let stored = pages.bytes().get(begin..begin + kept.len()).ok_or(ReadError::Damaged)?;
        let is_inside = range.end <= to_usize(header.meta.raw_bytes).next_multiple_of(PAGE_BYTES);
        if is_inside && codec::decode_range(codec, &frames, &ends, (stored, kept.start), range, into) {
            return Ok(header);
        }
        Err(ReadError::Damaged)
    }

    fn codec(&self, id: CodecId) -> Result<&dyn Codec, ReadError> {
        self.codecs.get(id).map(AsRef::as_ref).ok_or(ReadError::UnknownCodec(id))
    }
}

fn to_usize(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}
