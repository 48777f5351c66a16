//! One segment file: its records read and checked, written and read again.
//!
//! Nothing that is read here is handed on before it has been checked: place, key,
//! namespace, lengths, and every piece of the payload.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::crypt::Cipher;
use super::format::{CipherKind, PAGE_BYTES, Place, RecordHeader, RecordMeta, StoreId, checksum};
use super::io::DiskFile;
use super::pages::Pages;
use crate::codec::CodecId;
use crate::key::{NamespaceId, ObjectKey};

/// No process lives to write so many.
const MAX_SEGMENT: u64 = u64::MAX >> 1;

/// An open segment. Readers keep it alive while they read, also when it was evicted.
#[derive(Debug)]
pub(crate) struct Segment {
    pub(crate) id: u64,
    pub(crate) store_id: StoreId,
    pub(crate) file: Arc<dyn DiskFile>,
}

/// Why a record could not be read.
#[derive(Debug)]
pub(crate) enum ReadError {
    /// The disk failed.
    Io(io::Error),
    /// A byte is not what it was, or the record is not the one that was asked for.
    Damaged,
    /// The memory that was lent for it is too small.
    NoRoom,
    /// It is whole, and nobody here knows its codec.
    UnknownCodec(CodecId),
}

/// The record that must stand at a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Expected {
    pub(crate) key: ObjectKey,
    pub(crate) namespace: NamespaceId,
    /// Bytes of another codec would be taken for the block's.
    pub(crate) codec: CodecId,
}

impl From<&RecordMeta> for Expected {
    fn from(meta: &RecordMeta) -> Self {
        Self { key: meta.key.0, namespace: meta.namespace, codec: meta.codec }
    }
}

impl Segment {
    /// Reads a record: its payload, padded to whole pages, into exactly as many.
    pub(crate) fn read(
        &self,
        page: u32,
        expected: &Expected,
        cipher: Option<&Cipher>,
        into: &mut [u8],
    ) -> Result<RecordHeader, ReadError> {
        let mut head = Pages::new(1);
        self.file.read(&mut [head.bytes_mut(), into], offset(page)).map_err(ReadError::Io)?;
        let header = self.checked(head.bytes(), page, expected)?;
        let pages = header.meta.payload_pages().ok_or(ReadError::Damaged)?;
        if into.len() != pages as usize * PAGE_BYTES {
            return Err(ReadError::Damaged);
        }
        check_pieces(&header, 0, cipher, into)?;
        Ok(header)
    }

    /// Reads the pieces of a record that hold these bytes of its payload; says where in the
    /// pages the first of the bytes is.
    pub(crate) fn read_range(
        &self,
        page: u32,
        expected: &Expected,
        cipher: Option<&Cipher>,
        range: &Range<usize>,
    ) -> Result<(RecordHeader, Pages, usize), ReadError> {
        let header = self.read_header(page, expected)?;
        let (pages, at) = self.read_pieces(&header, cipher, range)?;
        Ok((header, pages, at))
    }

    /// As [`Segment::read_range`], of a record whose header has been read.
    pub(crate) fn read_pieces(
        &self,
        header: &RecordHeader,
        cipher: Option<&Cipher>,
        range: &Range<usize>,
    ) -> Result<(Pages, usize), ReadError> {
        let shift = header.meta.piece_shift(header.cipher);
        let padded = header.meta.payload_pages().ok_or(ReadError::Damaged)? as usize * PAGE_BYTES;
        if range.start > range.end || range.end > padded {
            return Err(ReadError::Damaged);
        }
        let first = range.start >> shift << shift;
        let end = range.end.next_multiple_of(1 << shift).min(padded);
        let mut pages = Pages::new(end.saturating_sub(first) / PAGE_BYTES);
        self.file
            .read(&mut [pages.bytes_mut()], offset(header.place.page + 1) + first as u64)
            .map_err(ReadError::Io)?;
        check_pieces(header, first >> shift, cipher, pages.bytes_mut())?;
        Ok((pages, range.start - first))
    }

    /// Reads a header alone.
    pub(crate) fn read_header(&self, page: u32, expected: &Expected) -> Result<RecordHeader, ReadError> {
        let mut head = Pages::new(1);
        self.file.read(&mut [head.bytes_mut()], offset(page)).map_err(ReadError::Io)?;
        self.checked(head.bytes(), page, expected)
    }

    /// The header in a page, if it belongs there.
    pub(crate) fn header_at(&self, bytes: &[u8], page: u32) -> Option<RecordHeader> {
        let place = Place { store_id: self.store_id, segment: self.id, page };
        RecordHeader::decode(bytes).filter(|header| header.place == place)
    }

    fn checked(&self, bytes: &[u8], page: u32, expected: &Expected) -> Result<RecordHeader, ReadError> {
        let header = self.header_at(bytes, page).ok_or(ReadError::Damaged)?;
        if Expected::from(&header.meta) == *expected { Ok(header) } else { Err(ReadError::Damaged) }
    }
}

/// The name of a segment's file.
pub(crate) fn segment_name(id: u64) -> String {
    format!("segment-{id:016x}")
}

/// The number in a segment's name. One above all that are ever used is not ours, so that numbers behind it are not
/// used up.
pub(crate) fn segment_id(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("segment-")?;
    let id = u64::from_str_radix(digits, 16).ok()?;
    (segment_name(id) == name && id <= MAX_SEGMENT).then_some(id)
}

/// Where a page begins.
pub(crate) fn offset(page: u32) -> u64 {
    u64::from(page) * PAGE_BYTES as u64
}

/// Says whether the file is as long as that; an error is one of the disk.
pub(crate) fn read_if_there(file: &dyn DiskFile, into: &mut [u8], at: u64) -> io::Result<bool> {
    match file.read(&mut [into], at) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

/// Checks pieces from number `first` on, and decrypts them in place.
pub(crate) fn check_pieces(
    header: &RecordHeader,
    first: usize,
    cipher: Option<&Cipher>,
    bytes: &mut [u8],
) -> Result<(), ReadError> {
    let piece_bytes = 1usize << header.meta.piece_shift(header.cipher);
    let bound = if header.cipher == CipherKind::None { Vec::new() } else { header.bound() };
    for (number, piece) in bytes.chunks_mut(piece_bytes).enumerate() {
        let number = first + number;
        let sum = header.sum(number).ok_or(ReadError::Damaged)?;
        let right = match (header.cipher, cipher) {
            (CipherKind::None, None) => sum == checksum(piece).to_le_bytes(),
            (CipherKind::XChaCha20Poly1305, Some(cipher)) => {
                let number = u32::try_from(number).map_err(|_| ReadError::Damaged)?;
                cipher.open(&header.nonce, number, &bound, piece, sum)
            }
            // Whoever has no key can write one that is not encrypted.
            (CipherKind::XChaCha20Poly1305, None) | (CipherKind::None, Some(_)) => false,
        };
        if !right {
            return Err(ReadError::Damaged);
        }
    }
    Ok(())
}
