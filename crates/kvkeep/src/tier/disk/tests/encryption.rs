//! Encryption at rest: what a directory shows without its key, and what opens with it.

use super::super::format::CipherKind;
use super::super::format::RecordHeader;
use super::recovery::segments;
use super::*;
use crate::error::Error;

#[test]
fn a_wrong_missing_or_needless_key_is_a_clear_error() {
    let (sim, plain) = (Sim::default(), Sim::default());
    let open = |sim: &Sim, key: Option<u8>| open_with(sim, 4 * MIB, key.map(|key| Cipher::new(&[key; 32])), clock());
    block(1, 3).store(&open(&sim, Some(1)).unwrap());
    block(1, 3).store(&open(&plain, None).unwrap());
    assert!(block(1, 3).is_there(&open(&sim, Some(1)).unwrap()));
    for (sim, key, says) in
        [(&sim, Some(2), "another key"), (&sim, None, "give the key"), (&plain, Some(1), "not encrypted")]
    {
        let error = open(sim, key).unwrap_err();
        assert!(matches!(error, Error::DiskRefused { .. }) && error.to_string().contains(says), "{error}");
    }
    assert!(block(1, 3).is_there(&open(&sim, Some(1)).unwrap()), "and nothing is lost by trying");
}

#[test]
fn encrypted_payloads_cannot_be_read_or_swapped_on_the_disk() {
    let sim = Sim::default();
    let open = || open_with(&sim, 4 * MIB, Some(Cipher::new(&[7; 32])), clock()).unwrap();
    let (one, two) = (block(1, 2), block(2, 2));
    let disk = open();
    one.store(&disk);
    two.store(&disk);
    drop(disk);
    let name = segments(&sim)[0].clone();
    let mut bytes = sim.get(&name).unwrap();
    let plain = &one.bytes()[..64];
    assert!(!bytes.windows(64).any(|window| window == plain));
    // Payloads change places; the headers, with all their checksums, stay.
    let (a, b) = (bytes[2 * 4096..4 * 4096].to_vec(), bytes[5 * 4096..7 * 4096].to_vec());
    bytes[2 * 4096..4 * 4096].copy_from_slice(&b);
    bytes[5 * 4096..7 * 4096].copy_from_slice(&a);
    sim.put(&name, bytes);
    let disk = open();
    assert!(!one.is_there(&disk) && !two.is_there(&disk));
    assert_eq!(disk.stats().damaged_total, 2);
}

/// Where the first of two records of two pages stands, and the second.
const PLACES: [usize; 2] = [1, 4];

/// Whoever has no key can still write headers, with checksums that are right: nothing of that opens.
#[test]
fn a_record_that_is_given_another_key_namespace_place_or_length_does_not_open() {
    let (one, two) = (block(1, 2), block(4, 2));
    assert_eq!(one.meta().namespace, two.meta().namespace);
    type Change = fn(&mut RecordHeader, &RecordHeader);
    let changes: [(&str, Change); 6] = [
        ("nothing", |_, _| ()),
        ("another key", |header, _| header.meta.facts.key = BlockKey(block(7, 2).key())),
        ("another namespace", |header, _| header.meta.facts.namespace = namespace(7)),
        ("the other's place", |header, other| header.place = other.place),
        ("another length", |header, _| header.meta.facts.stored_bytes -= 2),
        ("another time", |header, _| header.meta.facts.expires_at_ms -= 1),
    ];
    for (what, change) in changes {
        let sim = Sim::default();
        let disk = open_with(&sim, 4 * MIB, Some(Cipher::new(&[7; 32])), clock()).unwrap();
        assert!(one.store(&disk) && two.store(&disk));
        drop(disk);
        let name = segments(&sim)[0].clone();
        let mut bytes = sim.get(&name).unwrap();
        let [first, second] = PLACES.map(|page| RecordHeader::decode(&bytes[page * 4096..][..4096]).unwrap());
        let mut header = first.clone();
        change(&mut header, &second);
        let to = header.place.page as usize * 4096;
        let payload = bytes[2 * 4096..4 * 4096].to_vec();
        header.encode(&mut bytes[to..to + 4096]);
        bytes[to + 4096..to + 3 * 4096].copy_from_slice(&payload);
        // Without its index, so that the header alone says what it is.
        bytes.truncate(bytes.len() - 4096);
        sim.put(&name, bytes);
        let disk = open_with(&sim, 4 * MIB, Some(Cipher::new(&[7; 32])), clock()).unwrap();
        let key = header.meta.key.0;
        let opens = disk.find(&key).is_some_and(|found| {
            let mut pages = Pages::new(found.slot.payload_pages as usize);
            disk.read(&key, &found, pages.bytes_mut()).is_some()
        });
        assert_eq!(opens, what == "nothing", "{what}");
        assert_eq!(disk.stats().damaged_total > 0, what != "nothing", "{what}");
    }
}

/// A record without encryption in a directory with it was served: its checksum is right, and takes no key to make.
#[test]
fn a_record_that_is_not_encrypted_is_a_miss_in_a_directory_that_is() {
    let (sim, thing) = (Sim::default(), block(1, 2));
    let disk = open_with(&sim, 4 * MIB, Some(Cipher::new(&[7; 32])), clock()).unwrap();
    thing.store(&disk);
    drop(disk);
    let name = segments(&sim)[0].clone();
    let mut bytes = sim.get(&name).unwrap();
    let mut header = RecordHeader::decode(&bytes[4096..2 * 4096]).unwrap();
    let forged = vec![0x66; 2 * 4096];
    (header.cipher, header.nonce, header.list) = (CipherKind::None, [0; 24], header.meta.sums(&forged));
    header.encode(&mut bytes[4096..2 * 4096]);
    bytes[2 * 4096..4 * 4096].copy_from_slice(&forged);
    sim.put(&name, bytes);
    let disk = open_with(&sim, 4 * MIB, Some(Cipher::new(&[7; 32])), clock()).unwrap();
    assert!(thing.load(&disk).is_none());
    assert_eq!(disk.stats().damaged_total, 1);
}

#[test]
fn a_key_file_is_read_as_bytes_or_digits_and_must_be_private() {
    use std::os::unix::fs::PermissionsExt;
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("key");
    let write = |bytes: &[u8], mode: u32| {
        std::fs::write(&file, bytes).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    let id = [3; 16];
    let right = Cipher::new(&[0xab; 32]).check(&id);
    write(&[0xab; 32], 0o600);
    assert_eq!(Cipher::from_file(&file).unwrap().check(&id), right);
    write(format!("{}\n", "ab".repeat(32)).as_bytes(), 0o400);
    assert_eq!(Cipher::from_file(&file).unwrap().check(&id), right);
    for (bytes, mode, says) in [(&b"short"[..], 0o600, "32 bytes"), (&[7; 32][..], 0o644, "chmod 600")] {
        std::fs::remove_file(&file).unwrap();
        write(bytes, mode);
        let error = Cipher::from_file(&file).unwrap_err();
        assert!(error.to_string().contains(says), "{error}");
    }
}
