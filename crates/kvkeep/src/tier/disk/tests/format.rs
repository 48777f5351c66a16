//! The bytes themselves.

use super::super::format::{
    CipherKind, Identity, Manifest, Place, RecordHeader, SegmentHeader, SegmentLine, Trailer, decode_index,
    encode_index,
};
use super::*;
use proptest::prelude::*;

fn header(thing: Thing) -> RecordHeader {
    RecordHeader {
        meta: thing.meta(),
        place: Place { store_id: [1; 16], segment: 5, page: 9 },
        durable_pages: 3,
        cipher: CipherKind::None,
        nonce: [0; 24],
        content: thing.content(),
        list: vec![7; 8 * (thing.pages as usize).div_ceil(16)],
    }
}

fn identity() -> Identity {
    Identity { store_id: [4; 16], cipher: CipherKind::XChaCha20Poly1305, key_check: [5; 16] }
}

#[test]
fn what_is_encoded_is_decoded() {
    let mut page = vec![0; 4096];
    for thing in [block(1, 1), block(2, 40), named(3, 0, 3)] {
        header(thing).encode(&mut page);
        assert_eq!(RecordHeader::decode(&page), Some(header(thing)));
    }
    let segment = SegmentHeader { identity: identity(), segment: 77 };
    segment.encode(&mut page);
    assert_eq!(SegmentHeader::decode(&page), Some(segment));
    let entries: Vec<_> = (0..70).map(|number| (number * 3, named(number, 1, 2).meta())).collect();
    let mut index = vec![0; 3 * 4096];
    let index_sum = encode_index(&entries, &mut index);
    let trailer = Trailer { store_id: [1; 16], segment: 2, index_page: 3, entries: 70, index_sum };
    trailer.encode(&mut page);
    assert_eq!(Trailer::decode(&page), Some(trailer));
    assert_eq!(decode_index(&trailer, &index), Some(entries));
    let line = |segment| SegmentLine { segment, sealed: segment % 2 == 0, entries: 8, pages: 9, durable_pages: 7 };
    let manifest =
        Manifest { identity: identity(), next_segment: 500, segments: (0..300).map(line).collect(), has_marks: true };
    let mut bytes = vec![0; manifest.encoded_bytes()];
    manifest.encode(&mut bytes);
    assert_eq!(Manifest::decode(&bytes), Some(manifest));
}

#[test]
fn a_removal_lists_its_keys() {
    let keys: Vec<_> = (0..5).map(|number| named(number, 0, 1).key()).collect();
    let of = block(1, 1).meta();
    let facts = Facts { raw_bytes: 0, stored_bytes: 0, ..of.facts };
    let meta = RecordMeta { kind: Kind::Removal, facts, prefix_bytes: 0, ..of };
    let list = RecordHeader::key_list(&keys);
    let removal = RecordHeader { meta, content: Content::Nothing, list, ..header(block(1, 1)) };
    let mut page = vec![0; 4096];
    removal.encode(&mut page);
    let decoded = RecordHeader::decode(&page).unwrap();
    assert_eq!(decoded.keys().collect::<Vec<_>>(), keys);
}

#[test]
fn every_flipped_bit_of_a_page_is_seen() {
    let mut page = vec![0; 4096];
    header(named(3, 0, 3)).encode(&mut page);
    for bit in 0..page.len() * 8 {
        page[bit / 8] ^= 1 << (bit % 8);
        assert!(RecordHeader::decode(&page).is_none(), "bit {bit}");
        page[bit / 8] ^= 1 << (bit % 8);
    }
}

/// A page with a right checksum whose fields are anything: also that may come from outside.
fn sealed(mut page: Vec<u8>, magic: &[u8; 8]) -> Vec<u8> {
    page.resize(4096, 0);
    page[..8].copy_from_slice(magic);
    page[8..12].copy_from_slice(&1u32.to_le_bytes());
    let sum = super::super::format::checksum(&page[..4088]);
    page[4088..].copy_from_slice(&sum.to_le_bytes());
    page
}

/// Found by fuzzing: a header with a right checksum and a payload of nearly 2^64 bytes overflowed.
#[test]
fn a_header_of_an_absurd_length_is_refused() {
    let mut page = vec![0; 4096];
    header(named(3, 0, 3)).encode(&mut page);
    for length in [u64::MAX, u64::MAX - 4095, 1 << 63, 0] {
        page[120..128].copy_from_slice(&length.to_le_bytes());
        assert_eq!(RecordHeader::decode(&sealed(page.clone(), b"KVKRECRD")), None);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// The twin of fuzz/fuzz_targets/format.rs.
    #[test]
    fn anything_is_decoded_or_refused_and_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..9_000)) {
        super::super::format::decode_anything(&bytes);
        for magic in [b"KVKRECRD", b"KVKSEGMT", b"KVKTRAIL"] {
            super::super::format::decode_anything(&sealed(bytes.clone(), magic));
        }
    }

    /// Few bytes of a right header are changed and its checksum is made right again.
    #[test]
    fn a_header_that_lies_is_decoded_or_refused(changes in prop::collection::vec((12usize..400, any::<u8>()), 1..6)) {
        let mut page = vec![0; 4096];
        header(named(3, 0, 3)).encode(&mut page);
        for (at, byte) in changes {
            page[at] = byte;
        }
        let page = sealed(page, b"KVKRECRD");
        if let Some(header) = RecordHeader::decode(&page) {
            let pages = header.meta.payload_pages().unwrap() as usize;
            prop_assert!(pages * 4096 >= header.meta.stored_bytes as usize);
        }
    }
}

#[test]
fn a_dtype_is_its_position_in_the_list_of_all() {
    for (code, dtype) in (0u8..).zip(DType::ALL) {
        assert_eq!((dtype.code(), DType::from_code(code)), (code, Some(dtype)));
    }
    assert_eq!(DType::from_code(DType::ALL.len() as u8), None);
}
