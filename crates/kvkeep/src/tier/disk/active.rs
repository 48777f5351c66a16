//! The segment that is being written: records appended to it, made durable, and closed with an index.
//!
//! Invariant: what lies behind its last record is zero, and nothing that stands in it is changed.

use std::io;
use std::sync::Arc;

use super::crypt::{self, Cipher};
use super::format::{
    CipherKind, Content, Identity, Kind, PAGE_BYTES, Place, RecordHeader, RecordMeta, SegmentHeader, Trailer,
    encode_index,
};
use super::io::{Backend, FileSize};
use super::pages::Pages;
use super::segment::{Segment, offset, segment_name};
use crate::block::Facts;
use crate::key::{NamespaceId, ObjectKey};

/// Encrypted and copied this many pages at a time.
const BOUNCE_PAGES: usize = 256;

/// The segment that is being written.
#[derive(Debug)]
pub(crate) struct Active {
    pub(crate) segment: Arc<Segment>,
    pub(crate) end_page: u32,
    pub(crate) durable_pages: u32,
    pub(crate) capacity_pages: u32,
    /// Is the file itself there to stay?
    durable_name: bool,
    entries: Vec<(u32, RecordMeta)>,
}

/// A segment that was closed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sealed {
    pub(crate) size: FileSize,
    pub(crate) pages: u32,
    pub(crate) entries: u32,
}

/// What headers of records say of the directory, and what encrypts payloads.
#[derive(Debug)]
pub(crate) struct Encoder {
    identity: Identity,
    cipher: Option<Arc<Cipher>>,
    bounce: Pages,
}

/// A record to be appended.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Record<'a> {
    pub(crate) meta: &'a RecordMeta,
    pub(crate) content: &'a Content,
    /// What a removal lists.
    pub(crate) keys: &'a [ObjectKey],
    /// Whole pages.
    pub(crate) payload: &'a [u8],
    /// Its checksums, if they have been made already.
    pub(crate) sums: Option<&'a [u8]>,
}

impl<'a> Record<'a> {
    /// One without a payload.
    pub(crate) fn marker(meta: &'a RecordMeta, keys: &'a [ObjectKey]) -> Self {
        Record { meta, content: &Content::Nothing, keys, payload: &[], sums: None }
    }

    /// Adds its lines to an index.
    fn list(&self, page: u32, entries: &mut Vec<(u32, RecordMeta)>) {
        if self.keys.is_empty() {
            entries.push((page, *self.meta));
        }
        entries.extend(self.keys.iter().map(|key| (page, self.meta.of_key(*key))));
    }
}

impl Active {
    /// Makes a segment's file, which has its space already, and a header. The first sync makes both durable. Says what
    /// it takes on the disk.
    pub(crate) fn create(backend: &dyn Backend, identity: Identity, id: u64, bytes: u64) -> io::Result<(Self, u64)> {
        let file = backend.create(&segment_name(id))?;
        file.allocate(bytes)?;
        let mut head = Pages::new(1);
        SegmentHeader { identity, segment: id }.encode(head.bytes_mut());
        file.write(&[head.bytes()], 0)?;
        let allocated_bytes = file.size()?.allocated_bytes.max(bytes);
        let active = Self {
            segment: Arc::new(Segment { id, store_id: identity.store_id, file }),
            end_page: 1,
            durable_pages: 1,
            capacity_pages: u32::try_from(bytes / PAGE_BYTES as u64).unwrap_or(u32::MAX),
            durable_name: false,
            entries: Vec::new(),
        };
        Ok((active, allocated_bytes))
    }

    /// Is there room for so many pages, and lines of the index?
    pub(crate) fn fits(&self, pages: u32, lines: usize) -> bool {
        let tail = Trailer::tail_pages(self.entries.len() + lines);
        u64::from(self.end_page) + u64::from(pages) + u64::from(tail) <= u64::from(self.capacity_pages)
    }

    /// Bytes that a power cut would take.
    pub(crate) fn unsynced_bytes(&self) -> u64 {
        offset(self.end_page - self.durable_pages)
    }

    /// Appends records, for which there is room, with one write; gives the page of each.
    pub(crate) fn append(&mut self, records: &[Record<'_>], encoder: &mut Encoder) -> io::Result<Vec<u32>> {
        let mut written = Vec::with_capacity(records.len());
        let mut heads = Pages::new(records.len());
        let mut page = self.end_page;
        for (record, head) in records.iter().zip(heads.bytes_mut().chunks_exact_mut(PAGE_BYTES)) {
            encoder.header(&self.segment, record, page, self.durable_pages)?.encode(head);
            written.push(page);
            page += record.meta.pages().unwrap_or(1);
        }
        let mut parts = Vec::with_capacity(2 * records.len());
        for (record, head) in records.iter().zip(heads.bytes().chunks_exact(PAGE_BYTES)) {
            parts.push(head);
            if !encoder.encrypts(record) {
                parts.push(record.payload);
            }
        }
        self.segment.file.write(&parts, offset(self.end_page))?;
        self.end_page = page;
        for (record, page) in records.iter().zip(&written) {
            record.list(*page, &mut self.entries);
        }
        Ok(written)
    }

    /// Makes everything that was appended durable; says whether there was anything.
    pub(crate) fn sync(&mut self, backend: &dyn Backend) -> io::Result<bool> {
        if self.durable_pages >= self.end_page {
            return Ok(false);
        }
        self.segment.file.sync()?;
        self.name_is_durable(backend)?;
        self.durable_pages = self.end_page;
        Ok(true)
    }

    /// Writes the index and the trailer and cuts off what is left.
    pub(crate) fn seal(&mut self, backend: &dyn Backend) -> io::Result<Sealed> {
        let sealed = seal_segment(&self.segment, self.end_page, &self.entries)?;
        self.name_is_durable(backend)?;
        Ok(sealed)
    }

    fn name_is_durable(&mut self, backend: &dyn Backend) -> io::Result<()> {
        if !self.durable_name {
            backend.sync_dir()?;
            self.durable_name = true;
        }
        Ok(())
    }
}

impl Encoder {
    pub(crate) fn new(identity: Identity, cipher: Option<Arc<Cipher>>) -> Self {
        let bounce = Pages::new(if cipher.is_some() { BOUNCE_PAGES } else { 0 });
        Self { identity, cipher, bounce }
    }

    fn encrypts(&self, record: &Record<'_>) -> bool {
        self.cipher.is_some() && record.meta.kind.is_stored()
    }

    /// The header of a record; what is encrypted is written on the way.
    fn header(
        &mut self,
        segment: &Segment,
        record: &Record<'_>,
        page: u32,
        durable_pages: u32,
    ) -> io::Result<RecordHeader> {
        let place = Place { store_id: self.identity.store_id, segment: segment.id, page };
        let Record { meta, content, keys, payload, sums } = *record;
        let encrypted = self.encrypts(record);
        let mut header = RecordHeader {
            meta: *meta,
            place,
            durable_pages,
            cipher: if encrypted { self.identity.cipher } else { CipherKind::None },
            nonce: if encrypted { crypt::random_nonce()? } else { [0; 24] },
            content: content.clone(),
            list: RecordHeader::key_list(keys),
        };
        if encrypted {
            self.write_encrypted(segment, &mut header, payload)?;
        } else if meta.kind.is_stored() {
            header.list = sums.map_or_else(|| meta.sums(payload), <[u8]>::to_vec);
        }
        Ok(header)
    }

    /// Encrypts piece by piece through a buffer of its own: the payload is somebody's to read.
    fn write_encrypted(&mut self, segment: &Segment, header: &mut RecordHeader, payload: &[u8]) -> io::Result<()> {
        let piece_bytes = 1usize << header.meta.piece_shift(header.cipher);
        let cipher = self.cipher.as_ref().ok_or_else(|| io::Error::other("no key"))?;
        let pieces = payload.len().div_ceil(piece_bytes);
        header.list = vec![0; pieces * 16];
        let bound = header.bound();
        if piece_bytes > self.bounce.bytes().len() {
            self.bounce = Pages::new(piece_bytes / PAGE_BYTES);
        }
        let mut at = offset(header.place.page + 1);
        let mut tags = Vec::with_capacity(pieces * 16);
        for (number, piece) in (0u32..).zip(payload.chunks(piece_bytes)) {
            let Some(buffer) = self.bounce.bytes_mut().get_mut(..piece.len()) else { continue };
            buffer.copy_from_slice(piece);
            let tag =
                cipher.seal(&header.nonce, number, &bound, buffer).ok_or_else(|| io::Error::other("encryption"))?;
            segment.file.write(&[buffer], at)?;
            at += piece.len() as u64;
            tags.extend_from_slice(&tag);
        }
        header.list = tags;
        Ok(())
    }
}

/// Closes a segment's file with an index of its records.
pub(crate) fn seal_segment(segment: &Segment, end_page: u32, entries: &[(u32, RecordMeta)]) -> io::Result<Sealed> {
    let tail = Trailer::tail_pages(entries.len());
    let mut pages = Pages::new(tail as usize);
    let (index, trailer) = pages.bytes_mut().split_at_mut((tail as usize - 1) * PAGE_BYTES);
    let index_sum = encode_index(entries, index);
    let lines = u32::try_from(entries.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
    Trailer { store_id: segment.store_id, segment: segment.id, index_page: end_page, entries: lines, index_sum }
        .encode(trailer);
    segment.file.write(&[pages.bytes()], offset(end_page))?;
    let pages = end_page + tail;
    segment.file.truncate(offset(pages))?;
    segment.file.sync()?;
    Ok(Sealed { size: segment.file.size()?, pages, entries: lines })
}

/// A record without a payload.
pub(crate) fn marker(kind: Kind, namespace: NamespaceId, now_ms: u64) -> RecordMeta {
    let facts = Facts::raw(ObjectKey::new([0; 32], 0), namespace, 0);
    RecordMeta { kind, facts, stored_at_ms: now_ms, prefix_bytes: 0 }
}
