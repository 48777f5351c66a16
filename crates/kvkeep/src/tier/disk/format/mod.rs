//! Every byte of the disk tier, as docs/format.md describes it: pure, without I/O, and
//! safe to feed with anything.
//!
//! Whatever is read is checked before it means something: magic, version, checksum,
//! then every field. Numbers are little-endian; `usize` is never written. A serialisation
//! crate was the alternative: its format would be the crate's, not ours to document.

mod manifest;
mod record;
mod segment;

use xxhash_rust::xxh3::xxh3_64;

pub(crate) use manifest::{MARK_PAGES, Manifest, Mark, SegmentLine};
pub(crate) use record::{Content, HEADER_KEYS, Kind, Place, RecordHeader, RecordMeta};
pub(crate) use segment::{SegmentHeader, Trailer, decode_index, encode_index};

/// The unit of everything: what `O_DIRECT` and the arena agree on.
pub(crate) const PAGE_BYTES: usize = 4096;
/// Version of all formats below. A file of another one is not touched.
pub(crate) const VERSION: u32 = 1;
/// Where a page keeps the xxh3 of all before it.
const PAGE_SUM_AT: usize = PAGE_BYTES - 8;

/// Names one cache directory: segments of another one are foreign.
pub(crate) type StoreId = [u8; 16];

/// How payloads are protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CipherKind {
    None,
    XChaCha20Poly1305,
}

/// What a directory is: in its manifest and in every segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) store_id: StoreId,
    pub(crate) cipher: CipherKind,
    /// What the right key makes of `store_id`; zero without a cipher.
    pub(crate) key_check: [u8; 16],
}

impl CipherKind {
    fn code(self) -> u8 {
        match self {
            Self::None => 0,
            Self::XChaCha20Poly1305 => 1,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::None),
            1 => Some(Self::XChaCha20Poly1305),
            _ => None,
        }
    }
}

impl Identity {
    fn put(&self, put: &mut Put<'_>) {
        put.bytes(&self.store_id);
        put.u8(self.cipher.code());
        // Once more, so that another version and a flipped bit can be told apart.
        put.u32(VERSION);
        put.skip(3);
        put.bytes(&self.key_check);
    }

    fn take(take: &mut Take<'_>) -> Option<Self> {
        let store_id = take.array()?;
        let cipher = CipherKind::from_code(take.u8()?)?;
        take.skip(4 + 3)?;
        Some(Self { store_id, cipher, key_check: take.array()? })
    }
}

/// The checksum of payloads, indexes and pages: xxh3, 64 bits, seed 0.
pub(crate) fn checksum(bytes: &[u8]) -> u64 {
    xxh3_64(bytes)
}

/// Writes fields one after the other. What does not fit is dropped: sizes are constants.
struct Put<'a> {
    bytes: &'a mut [u8],
    at: usize,
}

impl<'a> Put<'a> {
    fn new(bytes: &'a mut [u8]) -> Self {
        bytes.fill(0);
        Self { bytes, at: 0 }
    }

    fn bytes(&mut self, from: &[u8]) {
        if let Some(to) = self.bytes.get_mut(self.at..self.at + from.len()) {
            to.copy_from_slice(from);
        }
        self.at += from.len();
    }

    fn u8(&mut self, value: u8) {
        self.bytes(&[value]);
    }

    fn u16(&mut self, value: u16) {
        self.bytes(&value.to_le_bytes());
    }

    fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }

    fn skip(&mut self, bytes: usize) {
        self.at += bytes;
    }

    fn seek(&mut self, at: usize) {
        self.at = at;
    }
}

/// Reads fields one after the other; `None` at the end of the bytes.
struct Take<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Take<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let bytes = self.bytes.get(self.at..self.at.checked_add(count)?)?;
        self.at += count;
        Some(bytes)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }

    fn u8(&mut self) -> Option<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn skip(&mut self, bytes: usize) -> Option<()> {
        self.bytes(bytes).map(drop)
    }

    fn seek(&mut self, at: usize) {
        self.at = at;
    }
}

/// Starts a page that [`finish_page`] will close.
fn begin_page<'a>(page: &'a mut [u8], magic: &[u8; 8]) -> Put<'a> {
    let mut put = Put::new(page);
    put.bytes(magic);
    put.u32(VERSION);
    put
}

/// Adds the checksum over all of the page before it.
fn finish_page(page: &mut [u8]) {
    if let Some((body, sum)) = page.get_mut(..PAGE_BYTES).and_then(|page| page.split_at_mut_checked(PAGE_SUM_AT)) {
        sum.copy_from_slice(&checksum(body).to_le_bytes());
    }
}

/// The fields of a page whose magic, version and checksum are right.
fn open_page<'a>(page: &'a [u8], magic: &[u8; 8]) -> Option<Take<'a>> {
    let page = page.get(..PAGE_BYTES)?;
    let mut take = Take::new(page);
    if take.bytes(8)? != magic || take.u32()? != VERSION {
        return None;
    }
    let (body, sum) = page.split_at_checked(PAGE_SUM_AT)?;
    (sum == checksum(body).to_le_bytes()).then_some(take)
}

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
