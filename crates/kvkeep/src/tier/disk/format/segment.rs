//! A segment: a header page, records, and, once it is sealed, an index of its records
//! and a trailer page that leads to it.
//!
//! The index is what makes opening fast, and it cannot be stale: it is part of the file
//! that it describes and is written once. One table for all segments was the alternative:
//! it has to be kept in step with every file, and to be distrusted after every crash.

use super::page::{Identity, PAGE_BYTES, Put, StoreId, Take, begin_page, checksum, finish_page, open_page};
use super::record::{Kind, RecordMeta};
use crate::block::{BlockKey, Facts};
use crate::codec::CodecId;
use crate::key::{NamespaceId, ObjectKey};

const HEADER_MAGIC: &[u8; 8] = b"KVKSEGMT";
const TRAILER_MAGIC: &[u8; 8] = b"KVKTRAIL";
/// One line of the index.
pub(super) const INDEX_ENTRY_BYTES: usize = 128;

/// The first page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SegmentHeader {
    pub(crate) identity: Identity,
    pub(crate) segment: u64,
}

/// The last page of a sealed segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Trailer {
    pub(crate) store_id: StoreId,
    pub(crate) segment: u64,
    /// Where the index begins: right behind the last record.
    pub(crate) index_page: u32,
    pub(crate) entries: u32,
    pub(crate) index_sum: u64,
}

impl SegmentHeader {
    pub(crate) fn encode(&self, page: &mut [u8]) {
        let mut put = begin_page(page, HEADER_MAGIC);
        put.skip(4);
        self.identity.put(&mut put);
        put.u64(self.segment);
        finish_page(page);
    }

    pub(crate) fn decode(page: &[u8]) -> Option<Self> {
        let mut take = open_page(page, HEADER_MAGIC)?;
        take.skip(4)?;
        Some(Self { identity: Identity::take(&mut take)?, segment: take.u64()? })
    }
}

impl Trailer {
    /// Pages of an index with so many lines, and of the trailer.
    pub(crate) fn tail_pages(entries: usize) -> u32 {
        let index = (entries as u64 * INDEX_ENTRY_BYTES as u64).div_ceil(PAGE_BYTES as u64);
        u32::try_from(index + 1).unwrap_or(u32::MAX)
    }

    /// Pages of the index.
    pub(crate) fn index_pages(&self) -> u32 {
        let bytes = u64::from(self.entries) * INDEX_ENTRY_BYTES as u64;
        u32::try_from(bytes.div_ceil(PAGE_BYTES as u64)).unwrap_or(u32::MAX)
    }

    pub(crate) fn encode(&self, page: &mut [u8]) {
        let mut put = begin_page(page, TRAILER_MAGIC);
        put.skip(4);
        put.bytes(&self.store_id);
        put.u64(self.segment);
        put.u32(self.index_page);
        put.u32(self.entries);
        put.u64(self.index_sum);
        finish_page(page);
    }

    pub(crate) fn decode(page: &[u8]) -> Option<Self> {
        let mut take = open_page(page, TRAILER_MAGIC)?;
        take.skip(4)?;
        Some(Self {
            store_id: take.array()?,
            segment: take.u64()?,
            index_page: take.u32()?,
            entries: take.u32()?,
            index_sum: take.u64()?,
        })
    }
}

/// Writes the index into `bytes`, which has room for it, and gives its checksum.
pub(crate) fn encode_index(entries: &[(u32, RecordMeta)], bytes: &mut [u8]) -> u64 {
    bytes.fill(0);
    for ((page, meta), line) in entries.iter().zip(bytes.chunks_exact_mut(INDEX_ENTRY_BYTES)) {
        let mut put = Put::new(line);
        put.u8(meta.kind.code());
        put.u8(meta.codec.0);
        put.skip(2);
        put.u32(meta.key.layer());
        put.u32(*page);
        put.u32(meta.compute_us);
        put.bytes(meta.key.hash());
        put.bytes(meta.namespace.as_bytes());
        put.u64(meta.stored_bytes);
        put.u64(meta.stored_at_ms);
        put.u64(meta.expires_at_ms);
        put.u32(meta.prefix_bytes);
        put.u64(if meta.codec == CodecId::RAW { 0 } else { meta.raw_bytes });
    }
    checksum(bytes)
}

/// The page and description of every record, in order; `None` if a byte is wrong.
pub(crate) fn decode_index(trailer: &Trailer, bytes: &[u8]) -> Option<Vec<(u32, RecordMeta)>> {
    let bytes = bytes.get(..trailer.index_pages() as usize * PAGE_BYTES)?;
    if checksum(bytes) != trailer.index_sum {
        return None;
    }
    let lines = bytes.chunks_exact(INDEX_ENTRY_BYTES).take(trailer.entries as usize);
    lines.map(decode_line).collect()
}

fn decode_line(line: &[u8]) -> Option<(u32, RecordMeta)> {
    let mut take = Take::new(line);
    let kind = Kind::from_code(take.u8()?)?;
    let codec = CodecId(take.u8()?);
    take.skip(2)?;
    let [layer, page, compute_us] = [take.u32()?, take.u32()?, take.u32()?];
    let key = BlockKey(ObjectKey::new(take.array()?, layer));
    let namespace = NamespaceId::from_bytes(take.array()?);
    let [stored_bytes, stored_at_ms, expires_at_ms] = [take.u64()?, take.u64()?, take.u64()?];
    let prefix_bytes = take.u32()?;
    let raw_bytes = match codec {
        CodecId::RAW => stored_bytes,
        // No codec takes more.
        _ => take.u64().filter(|bytes| u32::try_from(*bytes).is_ok())?,
    };
    let facts = Facts { key, namespace, raw_bytes, stored_bytes, codec, expires_at_ms, compute_us };
    Some((page, RecordMeta { kind, facts, stored_at_ms, prefix_bytes }))
}
