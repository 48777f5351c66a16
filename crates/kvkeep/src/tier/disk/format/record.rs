//! One record: a header page, then the payload in whole pages.
//!
//! The header says what the payload is (key, namespace, lengths, expiry, tensors) and
//! where it stands (directory, segment, page), so that a record that was moved or swapped
//! is not taken for another. Payloads are checked in pieces, so that a range of layers
//! can be read without the rest. A footer behind the payload was the alternative: then
//! finding the next record means reading the payload.

use std::ops::Deref;

use super::page::{
    CipherKind, PAGE_BYTES, PAGE_SUM_AT, Put, StoreId, Take, begin_page, checksum, finish_page, open_page,
};
pub(crate) use crate::block::Content;
use crate::block::{BlockKey, Facts};
use crate::codec::CodecId;
use crate::key::{NamespaceId, ObjectKey};
use crate::layout::{Kinds, KvLayout, LayerShape, TokenOrder};
use crate::tensor::{DType, MAX_RANK, PairSpec, Shape};

const MAGIC: &[u8; 8] = b"KVKRECRD";
const CONTENT_AT: usize = 176;
/// Of a block: shapes of layers that differ, and which layers those are.
const OTHERS_AT: usize = 328;
/// As the order of a block's payload: it has none.
const OPAQUE: u8 = 2;
/// Checksums, tags or removed keys begin here.
const LIST_AT: usize = 384;
const LIST_BYTES: usize = PAGE_SUM_AT - LIST_AT;
const KEY_BYTES: usize = 36;
/// Keys that one removal record names at most.
pub(crate) const HEADER_KEYS: usize = LIST_BYTES / KEY_BYTES;
/// Longest model name that is written out.
const LABEL_BYTES: usize = 128;
/// Pieces are at least this long.
const MIN_PIECE_SHIFT: u8 = 16;
const SUM_BYTES: usize = 8;
const TAG_BYTES: usize = 16;

/// What a record does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    /// KV of a block of tokens: under its key for ever the same bytes.
    Block,
    /// K and V of one layer under a prefix text: a later one replaces it.
    Named,
    /// The keys it lists are gone.
    Removal,
    /// All before it in its namespace is gone.
    NamespaceCleared,
    /// All before it is gone.
    Cleared,
}

/// What the index of a segment keeps of a record, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RecordMeta {
    pub(crate) kind: Kind,
    /// They read as fields of this. Of what has no payload, they name its key or its namespace.
    pub(crate) facts: Facts,
    pub(crate) stored_at_ms: u64,
    /// Length of the prefix text of a named record.
    pub(crate) prefix_bytes: u32,
}

/// Where a record stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) store_id: StoreId,
    pub(crate) segment: u64,
    pub(crate) page: u32,
}

/// All of a header page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RecordHeader {
    pub(crate) meta: RecordMeta,
    pub(crate) place: Place,
    /// Pages of this segment that were durable when this was written.
    pub(crate) durable_pages: u32,
    pub(crate) cipher: CipherKind,
    pub(crate) nonce: [u8; 24],
    pub(crate) content: Content,
    /// Checksums (8 bytes) or tags (16 bytes) of the pieces, or keys that are gone.
    pub(crate) list: Vec<u8>,
}

impl Kind {
    pub(super) fn code(self) -> u8 {
        match self {
            Self::Block => 1,
            Self::Named => 2,
            Self::Removal => 3,
            Self::NamespaceCleared => 4,
            Self::Cleared => 5,
        }
    }

    pub(super) fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            1 => Self::Block,
            2 => Self::Named,
            3 => Self::Removal,
            4 => Self::NamespaceCleared,
            5 => Self::Cleared,
            _ => return None,
        })
    }

    /// Does it have a payload?
    pub(crate) fn is_stored(self) -> bool {
        matches!(self, Self::Block | Self::Named)
    }
}

impl Deref for RecordMeta {
    type Target = Facts;

    fn deref(&self) -> &Facts {
        &self.facts
    }
}

impl RecordMeta {
    /// The same of another key.
    pub(crate) fn of_key(&self, key: ObjectKey) -> Self {
        Self { facts: Facts { key: BlockKey(key), ..self.facts }, ..*self }
    }

    /// The same, which expires at another time.
    pub(crate) fn expiring(&self, expires_at_ms: u64) -> Self {
        Self { facts: Facts { expires_at_ms, ..self.facts }, ..*self }
    }

    /// When it expires, as seen at this time. Times of day are trusted no further than this: nothing lives longer
    /// from now on than it had left when it was written. A record out of the future was written under a clock
    /// that was wrong, and its expiry is as wrong.
    pub(crate) fn expires_at_ms(&self, now_ms: u64) -> u64 {
        if self.expires_at_ms == u64::MAX {
            return u64::MAX;
        }
        let left_ms = self.expires_at_ms.saturating_sub(self.stored_at_ms);
        self.expires_at_ms.min(now_ms.saturating_add(left_ms))
    }

    /// Pages of the payload; `None` if no segment could hold it.
    pub(crate) fn payload_pages(&self) -> Option<u32> {
        u32::try_from(self.stored_bytes.div_ceil(PAGE_BYTES as u64)).ok()
    }

    /// Pages of the header and the payload.
    pub(crate) fn pages(&self) -> Option<u32> {
        self.payload_pages()?.checked_add(1)
    }

    /// The checksums of a payload without a cipher.
    pub(crate) fn sums(&self, payload: &[u8]) -> Vec<u8> {
        let piece_bytes = 1usize << self.piece_shift(CipherKind::None);
        payload.chunks(piece_bytes).flat_map(|piece| checksum(piece).to_le_bytes()).collect()
    }

    /// Bytes of one piece as a power of two: the smallest with which the sums fit the page.
    pub(crate) fn piece_shift(&self, cipher: CipherKind) -> u8 {
        let most = (LIST_BYTES / sum_bytes(cipher)) as u64;
        let padded = self.stored_bytes.div_ceil(PAGE_BYTES as u64).saturating_mul(PAGE_BYTES as u64);
        (MIN_PIECE_SHIFT..63).find(|shift| padded.div_ceil(1 << shift) <= most).unwrap_or(63)
    }
}

fn sum_bytes(cipher: CipherKind) -> usize {
    match cipher {
        CipherKind::None => SUM_BYTES,
        CipherKind::XChaCha20Poly1305 => TAG_BYTES,
    }
}

impl RecordHeader {
    /// The sum or tag of a piece.
    pub(crate) fn sum(&self, piece: usize) -> Option<&[u8]> {
        let bytes = sum_bytes(self.cipher);
        self.list.get(piece * bytes..(piece + 1) * bytes)
    }

    /// The keys of a removal.
    pub(crate) fn keys(&self) -> impl Iterator<Item = ObjectKey> {
        let listed = if self.meta.kind == Kind::Removal { self.list.as_slice() } else { &[] };
        listed.chunks_exact(KEY_BYTES).filter_map(|bytes| {
            let mut take = Take::new(bytes);
            Some(ObjectKey::new(take.array()?, take.u32()?))
        })
    }

    /// The list of a removal.
    pub(crate) fn key_list(keys: &[ObjectKey]) -> Vec<u8> {
        let mut list = Vec::with_capacity(keys.len() * KEY_BYTES);
        for key in keys {
            list.extend_from_slice(key.hash());
            list.extend_from_slice(&key.layer().to_le_bytes());
        }
        list
    }

    /// What a cipher binds the payload to: all of the header but the tags themselves.
    pub(crate) fn bound(&self) -> Vec<u8> {
        let mut page = vec![0; PAGE_BYTES];
        self.put(&mut page);
        page.truncate(LIST_AT);
        page
    }

    /// Writes the header page.
    pub(crate) fn encode(&self, page: &mut [u8]) {
        self.put(page);
        finish_page(page);
    }

    fn put(&self, page: &mut [u8]) {
        let meta = &self.meta;
        let mut put = begin_page(page, MAGIC);
        put.u8(meta.kind.code());
        put.u8(meta.codec.0);
        put.u8(self.cipher.code());
        put.u8(meta.piece_shift(self.cipher));
        put.bytes(&self.place.store_id);
        put.u64(self.place.segment);
        put.u32(self.place.page);
        put.u32(self.durable_pages);
        put.bytes(meta.key.hash());
        put.u32(meta.key.layer());
        put.u32(meta.compute_us);
        put.bytes(meta.namespace.as_bytes());
        put.u64(meta.stored_bytes);
        put.u64(meta.stored_at_ms);
        put.u64(meta.expires_at_ms);
        put.bytes(&self.nonce);
        put.u32(u32::try_from(self.list.len()).unwrap_or(u32::MAX));
        put.seek(CONTENT_AT);
        match &self.content {
            Content::Block { layout, model } => put_block(&mut put, layout, model),
            Content::Named(spec) => put_named(&mut put, spec),
            Content::Nothing => {}
        }
        put.seek(LIST_AT);
        put.bytes(self.list.get(..LIST_BYTES.min(self.list.len())).unwrap_or_default());
    }

    /// A header page that is whole and means something.
    pub(crate) fn decode(page: &[u8]) -> Option<Self> {
        let mut take = open_page(page, MAGIC)?;
        let kind = Kind::from_code(take.u8()?)?;
        let codec = CodecId(take.u8()?);
        let cipher = CipherKind::from_code(take.u8()?)?;
        let piece_shift = take.u8()?;
        let place = Place { store_id: take.array()?, segment: take.u64()?, page: take.u32()? };
        let durable_pages = take.u32()?;
        let hash = take.array()?;
        let key = BlockKey(ObjectKey::new(hash, take.u32()?));
        let compute_us = take.u32()?;
        let namespace = NamespaceId::from_bytes(take.array()?);
        let [stored_bytes, stored_at_ms, expires_at_ms] = [take.u64()?, take.u64()?, take.u64()?];
        let nonce = take.array()?;
        let list_bytes = take.u32()? as usize;
        take.seek(CONTENT_AT);
        let content = match kind {
            Kind::Block => take_block(&mut take)?,
            Kind::Named => Content::Named(take_named(&mut take)?),
            _ => Content::Nothing,
        };
        let prefix_bytes = match &content {
            Content::Named(spec) => u32::try_from(spec.prefix_bytes).ok()?,
            _ => 0,
        };
        take.seek(LIST_AT);
        let list = take.bytes(list_bytes.min(LIST_BYTES))?.to_vec();
        let raw_bytes = content.raw_bytes()?;
        let facts = Facts { key, namespace, raw_bytes, stored_bytes, codec, expires_at_ms, compute_us };
        let meta = RecordMeta { kind, facts, stored_at_ms, prefix_bytes };
        let header = Self { meta, place, durable_pages, cipher, nonce, content, list };
        let right = list_bytes <= LIST_BYTES && piece_shift == meta.piece_shift(cipher);
        (right && header.is_consistent()).then_some(header)
    }

    /// Do the lengths fit each other?
    fn is_consistent(&self) -> bool {
        let meta = &self.meta;
        if !meta.kind.is_stored() {
            let is_bare = meta.stored_bytes == 0 && meta.codec == CodecId::RAW;
            return is_bare && self.list.len().is_multiple_of(KEY_BYTES);
        }
        let Some(pages) = meta.payload_pages() else { return false };
        let padded = u64::from(pages) * PAGE_BYTES as u64;
        let pieces = padded.div_ceil(1 << meta.piece_shift(self.cipher));
        // What a codec makes is shorter.
        let fits = match meta.codec {
            CodecId::RAW => meta.stored_bytes == meta.raw_bytes,
            _ => meta.stored_bytes < meta.raw_bytes && u32::try_from(meta.raw_bytes).is_ok(),
        };
        pages > 0 && fits && pieces * sum_bytes(self.cipher) as u64 == self.list.len() as u64
    }
}

fn put_block(put: &mut Put<'_>, layout: &KvLayout, model: &str) {
    // An opaque block is one layer of one tensor.
    for number in
        [layout.layers().max(1), layout.kv_heads(), layout.k_head_dim(), layout.v_head_dim(), layout.block_tokens()]
    {
        put.u32(u32::try_from(number).unwrap_or(u32::MAX));
    }
    put.u8(layout.dtype().code());
    put.u8(match layout.order() {
        _ if layout.is_opaque() => OPAQUE,
        TokenOrder::TokenHeadDim => 0,
        TokenOrder::HeadTokenDim => 1,
    });
    let mut length = model.len().min(LABEL_BYTES);
    while !model.is_char_boundary(length) {
        length -= 1;
    }
    put.u16(u16::try_from(length).unwrap_or(0));
    put.bytes(model.as_bytes().get(..length).unwrap_or_default());
    put.seek(OTHERS_AT);
    let (shapes, kinds) = layout.others();
    for shape in shapes {
        [shape.kv_heads, shape.k_head_dim, shape.v_head_dim].into_iter().for_each(|number| put.u32(number));
    }
    kinds.0.into_iter().for_each(|word| put.u64(word));
}

fn take_block(take: &mut Take<'_>) -> Option<Content> {
    let [layers, kv_heads, k_head_dim, v_head_dim, block_tokens] =
        [take.u32()?, take.u32()?, take.u32()?, take.u32()?, take.u32()?];
    let dtype = DType::from_code(take.u8()?)?;
    let order = match take.u8()? {
        0 => Some(TokenOrder::TokenHeadDim),
        1 => Some(TokenOrder::HeadTokenDim),
        OPAQUE => None,
        _ => return None,
    };
    let length = usize::from(take.u16()?);
    if length > LABEL_BYTES {
        return None;
    }
    let model = std::str::from_utf8(take.bytes(length)?).ok()?.to_owned();
    take.seek(OTHERS_AT);
    let mut shape = || Some(LayerShape { kv_heads: take.u32()?, k_head_dim: take.u32()?, v_head_dim: take.u32()? });
    let shapes = [LayerShape { kv_heads, k_head_dim, v_head_dim }, shape()?, shape()?];
    let kinds = Kinds([take.u64()?, take.u64()?, take.u64()?, take.u64()?]);
    let layout = match order {
        Some(order) => KvLayout::of_shapes(layers, shapes, kinds, dtype, block_tokens, order),
        None => KvLayout::opaque(k_head_dim, block_tokens),
    };
    let layout = layout.ok()?;
    Some(Content::Block { layout, model })
}

fn put_named(put: &mut Put<'_>, spec: &PairSpec) {
    put.u64(spec.prefix_bytes as u64);
    for (dtype, shape) in [&spec.k, &spec.v] {
        put.u8(dtype.code());
        put.u8(u8::try_from(shape.dims().len()).unwrap_or(u8::MAX));
    }
    put.u8(spec.tag);
    put.skip(3);
    for (_, shape) in [&spec.k, &spec.v] {
        for position in 0..MAX_RANK {
            put.u64(shape.dims().get(position).map_or(0, |dim| *dim as u64));
        }
    }
}

fn take_named(take: &mut Take<'_>) -> Option<PairSpec> {
    let prefix_bytes = usize::try_from(take.u64()?).ok()?;
    let codes = [(take.u8()?, take.u8()?), (take.u8()?, take.u8()?)];
    let tag = take.u8()?;
    take.skip(3)?;
    let mut tensors = Vec::with_capacity(2);
    for (code, rank) in codes {
        let mut dims = [0usize; MAX_RANK];
        for dim in &mut dims {
            *dim = usize::try_from(take.u64()?).ok()?;
        }
        tensors.push((DType::from_code(code)?, Shape::new(dims.get(..usize::from(rank))?).ok()?));
    }
    let [k, v] = tensors.try_into().ok()?;
    Some(PairSpec { k, v, prefix_bytes, tag })
}
