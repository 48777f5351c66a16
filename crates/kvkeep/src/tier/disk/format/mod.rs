//! Every byte of the disk tier, as docs/format.md describes it: pure, without I/O, and
//! safe to feed with anything.
//!
//! Whatever is read is checked before it means something: magic, version, checksum,
//! then every field. Numbers are little-endian; `usize` is never written. A serialisation
//! crate was the alternative: its format would be the crate's, not ours to document.

mod manifest;
mod page;
mod record;
mod segment;

pub(crate) use manifest::{MARK_PAGES, Manifest, Mark, SegmentLine};
#[cfg(any(test, feature = "fuzzing"))]
use page::finish_page;
pub(crate) use page::{CipherKind, Identity, PAGE_BYTES, StoreId, VERSION, checksum};
pub(crate) use record::{Content, HEADER_KEYS, Kind, Place, RecordHeader, RecordMeta};
pub(crate) use segment::{SegmentHeader, Trailer, decode_index, encode_index};

/// Feeds bytes from anywhere to every decoder, as they are and with checksums made right: what fuzzing calls.
///
/// # Panics
/// If something that was decoded does not mean the same after it was written again.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn decode_anything(bytes: &[u8]) {
    let _ = (RecordHeader::decode(bytes), SegmentHeader::decode(bytes), Trailer::decode(bytes));
    let _ = (Mark::decode(bytes), Manifest::decode(bytes), Manifest::other_version(bytes));
    let mut whole = bytes.to_vec();
    whole.resize(bytes.len().next_multiple_of(PAGE_BYTES).max(PAGE_BYTES), 0);
    whole.chunks_exact_mut(PAGE_BYTES).for_each(finish_page);
    for page in whole.chunks_exact(PAGE_BYTES) {
        let mut again = vec![0; PAGE_BYTES];
        if let Some(header) = RecordHeader::decode(page) {
            let _ = (header.keys().count(), header.sum(0), header.bound());
            header.encode(&mut again);
            assert_eq!(RecordHeader::decode(&again), Some(header));
        }
        if let Some(header) = SegmentHeader::decode(page) {
            header.encode(&mut again);
            assert_eq!(SegmentHeader::decode(&again), Some(header));
        }
        if let Some(trailer) = Trailer::decode(page) {
            trailer.encode(&mut again);
            assert_eq!(Trailer::decode(&again), Some(trailer));
        }
        if let Some(mark) = Mark::decode(page) {
            mark.encode(&mut again);
            assert_eq!(Mark::decode(&again), Some(mark));
        }
    }
    decode_index_anyhow(bytes);
    decode_manifest_anyhow(bytes);
}

/// Takes the bytes for a trailer and the index that it leads to.
#[cfg(any(test, feature = "fuzzing"))]
fn decode_index_anyhow(bytes: &[u8]) {
    let Some((head, index)) = bytes.split_at_checked(64) else { return };
    let mut page = vec![0; PAGE_BYTES];
    head.iter().zip(&mut page).for_each(|(from, to)| *to = *from);
    finish_page(&mut page);
    let Some(trailer) = Trailer::decode(&page) else { return };
    let _ = decode_index(&trailer, index);
    // Not more lines than there are bytes for.
    let mut index = index.to_vec();
    index.resize(index.len().next_multiple_of(PAGE_BYTES), 0);
    let lines = u32::try_from(index.len() / segment::INDEX_ENTRY_BYTES).unwrap_or(u32::MAX);
    let honest = Trailer { entries: lines.min(trailer.entries), ..trailer };
    index.truncate(honest.index_pages() as usize * PAGE_BYTES);
    let honest = Trailer { index_sum: checksum(&index), ..honest };
    if let Some(entries) = decode_index(&honest, &index) {
        let mut again = vec![0; index.len()];
        let index_sum = encode_index(&entries, &mut again);
        assert_eq!(decode_index(&Trailer { index_sum, ..honest }, &again), Some(entries));
    }
}

#[cfg(any(test, feature = "fuzzing"))]
fn decode_manifest_anyhow(bytes: &[u8]) {
    let mut whole = bytes.to_vec();
    manifest::make_sum_right(&mut whole);
    if let Some(manifest) = Manifest::decode(&whole) {
        let mut again = vec![0; manifest.encoded_bytes()];
        manifest.encode(&mut again);
        assert_eq!(Manifest::decode(&again), Some(manifest));
    }
}
