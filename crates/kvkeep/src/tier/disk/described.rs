//! What a block is, as bytes for another process: a record's header (docs/format.md) of no place, without what is zero
//! behind it, and whether the block begins its prompt.
//!
//! Invariant: what is read back is a block that a record could describe, or nothing. A form of its own was the
//! alternative: each one more is one more that has to be right.

use super::format::{CipherKind, Content, PAGE_BYTES, Place, RecordHeader};
use super::tier::{block_meta, record_meta};
use crate::block::BlockMeta;

/// The sum of a header page, at its end.
const SUM_BYTES: usize = size_of::<u64>();

impl BlockMeta {
    /// All that is known of a block besides its bytes. `None` for one that no record can describe.
    #[must_use]
    pub fn to_bytes(&self) -> Option<Vec<u8>> {
        let record = record_meta(self, 0);
        if matches!(self.content, Content::Nothing) {
            return None;
        }
        // The sums of the bytes are for whoever sends those.
        let padded = u64::from(record.payload_pages()?) * PAGE_BYTES as u64;
        let pieces = padded.div_ceil(1 << record.piece_shift(CipherKind::None));
        let list = vec![0; usize::try_from(pieces).ok()?.checked_mul(size_of::<u64>())?];
        let place = Place { store_id: [0; 16], segment: 0, page: 0 };
        let (cipher, nonce, content) = (CipherKind::None, [0; 24], self.content.clone());
        let header = RecordHeader { meta: record, place, durable_pages: 0, cipher, nonce, content, list };
        let mut page = vec![0; PAGE_BYTES];
        header.encode(&mut page);
        let is_itself = RecordHeader::decode(&page).is_some_and(|again| again == header);
        let sum = page.split_off(PAGE_BYTES - SUM_BYTES);
        let used = page.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        page.truncate(used);
        is_itself.then(|| [&[u8::from(self.begins)], sum.as_slice(), &page].concat())
    }

    /// What [`BlockMeta::to_bytes`] wrote.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (begins, rest) = bytes.split_first()?;
        let (sum, described) = rest.split_at_checked(SUM_BYTES)?;
        if described.len() > PAGE_BYTES - SUM_BYTES || *begins > 1 {
            return None;
        }
        let mut page = described.to_vec();
        page.resize(PAGE_BYTES - SUM_BYTES, 0);
        page.extend_from_slice(sum);
        let header = RecordHeader::decode(&page).filter(|header| header.meta.kind.is_stored())?;
        Some(Self { begins: *begins == 1, ..block_meta(header) })
    }
}

#[cfg(test)]
mod tests {
    use crate::block::{BlockMeta, Content, Facts};
    use crate::key::{NamespaceId, ObjectKey};
    use crate::layout::KvLayout;
    use crate::tensor::{DType, PairSpec, Shape};

    fn metas() -> Vec<BlockMeta> {
        let layout = KvLayout::new(30, 8, 128, DType::BF16).unwrap().with_block_tokens(64).unwrap();
        let bytes = layout.block_bytes() as u64;
        let facts = Facts {
            expires_at_ms: 5,
            compute_us: 9,
            ..Facts::raw(ObjectKey::numbered(7), NamespaceId::named("n"), bytes)
        };
        let block = |begins| BlockMeta { facts, begins, content: Content::Block { layout, model: "m".into() } };
        let half = (DType::F32, Shape::new(&[3, 5]).unwrap());
        let named = PairSpec { k: half, v: half, prefix_bytes: 5, tag: 3 };
        let facts = Facts::raw(ObjectKey::numbered(8), NamespaceId::named("n"), named.payload_bytes().unwrap() as u64);
        vec![block(true), block(false), BlockMeta { facts, begins: false, content: Content::Named(named) }]
    }

    #[test]
    fn what_a_block_is_survives_the_way_to_another_process() {
        for meta in metas() {
            let bytes = meta.to_bytes().unwrap();
            assert_eq!(BlockMeta::from_bytes(&bytes), Some(meta));
            assert!(bytes.len() < 400, "{}", bytes.len());
        }
    }

    #[test]
    fn what_is_damaged_describes_no_block() {
        for meta in metas() {
            let bytes = meta.to_bytes().unwrap();
            for at in 0..bytes.len() {
                let mut flipped = bytes.clone();
                flipped[at] ^= 2;
                assert_eq!(BlockMeta::from_bytes(&flipped), None, "{at}");
                assert_eq!(BlockMeta::from_bytes(&bytes[..at]), None, "{at}");
            }
            assert_eq!(BlockMeta::from_bytes(&[bytes, vec![0; 5000]].concat()), None);
        }
    }
}
