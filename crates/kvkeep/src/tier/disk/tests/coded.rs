//! Records through a codec: what becomes shorter, what is read, and what nobody can decode.

use super::super::format::{PAGE_BYTES, RecordHeader};
use super::super::segment::segment_name;
use super::*;
use crate::codec::tests::planes::{Planes, planes};
use crate::tier::disk::archive::Archive;

/// A thing that becomes shorter.
fn smooth(thing: Thing) -> Thing {
    Thing { version: thing.version | SMOOTH, ..thing }
}

fn open_coded(sim: &Sim, codecs: Codecs, cipher: Option<Cipher>) -> Disk {
    let options = Options { codecs, ..options(Path::new("sim"), 4 * MIB) };
    super::super::sim::open(sim, &options, cipher, clock()).unwrap()
}

fn key() -> Option<Cipher> {
    Some(Cipher::new(&[7; 32]))
}

/// Smooth ones, noise, and named ones of both kinds.
fn mixed() -> Vec<Thing> {
    let blocks = (1..13).map(|number| if number % 3 == 0 { block(number, 9) } else { smooth(block(number, 9)) });
    blocks.chain([named(40, 1, 5), smooth(named(41, 1, 5))]).collect()
}

fn store_all(disk: &Disk, things: &[Thing]) {
    things.iter().for_each(|thing| assert!(thing.store(disk), "{thing:?}"));
    disk.flush().unwrap();
}

#[test]
fn what_a_codec_made_shorter_takes_less_of_the_disk_and_comes_back_exactly() {
    for cipher in [false, true] {
        let (coded, raw) = (Sim::default(), Sim::default());
        let things = mixed();
        let disk = open_coded(&coded, planes(), key().filter(|_| cipher));
        store_all(&disk, &things);
        let stats = disk.stats();
        let plain = open_coded(&raw, Codecs::default(), key().filter(|_| cipher));
        store_all(&plain, &things);
        assert_eq!((stats.codec, plain.stats().codec), ("planes", "raw"));
        assert_eq!(stats.written_raw_bytes_total, plain.stats().written_bytes_total);
        assert_eq!(plain.stats().written_raw_bytes_total, plain.stats().written_bytes_total);
        assert!(stats.written_bytes_total * 2 < stats.written_raw_bytes_total, "{stats:?}");
        for reopened in [false, true] {
            let disk = if reopened { open_coded(&coded.copy(), planes(), key().filter(|_| cipher)) } else { continue };
            assert!(things.iter().all(|thing| thing.is_there(&disk)), "encrypted: {cipher}");
        }
        assert!(things.iter().all(|thing| thing.is_there(&disk)), "encrypted: {cipher}");
        let found = disk.find(&things[1].key()).unwrap();
        assert_eq!((found.slot.codec(), found.slot.raw_pages()), (CodecId(200), 9));
        assert!(found.slot.payload_pages < 5);
        let noise = disk.find(&things[2].key()).unwrap();
        assert_eq!((noise.slot.codec(), noise.slot.raw_pages(), noise.slot.payload_pages), (CodecId::RAW, 9, 9));
    }
}

/// A disk with these things, as a clean end and as a kill leave it.
fn closed_and_killed(things: &[Thing]) -> (Sim, Sim) {
    let sim = Sim::default();
    let disk = open_coded(&sim, planes(), None);
    store_all(&disk, things);
    let killed = sim.copy();
    drop(disk);
    (sim, killed)
}

/// The index at a segment's end says so too, and without one the headers do.
#[test]
fn codecs_are_known_again_after_a_clean_end_and_after_a_kill() {
    let things = mixed();
    let (closed, killed) = closed_and_killed(&things);
    for (sim, what) in [(killed, "killed"), (closed, "closed")] {
        let disk = open_coded(&sim, planes(), None);
        assert!(things.iter().all(|thing| thing.is_there(&disk)), "{what}");
        assert_eq!(disk.stats().unknown_codec_records, 0);
    }
}

#[test]
fn one_directory_holds_what_several_codecs_wrote() {
    let sim = Sim::default();
    let things = mixed();
    let (first, second) = things.split_at(7);
    store_all(&open_coded(&sim, Codecs::default(), None), first);
    store_all(&open_coded(&sim, planes(), None), second);
    // The codec of old is enough to be known.
    let disk = open_coded(&sim, Codecs::default().knows(Arc::new(Planes)), None);
    assert!(things.iter().all(|thing| thing.is_there(&disk)));
    let third = smooth(block(77, 9));
    store_all(&disk, &[third]);
    assert_eq!(disk.find(&third.key()).unwrap().slot.codec(), CodecId::RAW);
}

#[test]
fn a_namespace_may_have_a_codec_of_its_own() {
    let disk = open_coded(&Sim::default(), planes().namespace(namespace(1), Arc::new(crate::codec::Raw)), None);
    let (raw, coded) = (smooth(block(1, 9)), smooth(block(2, 9)));
    store_all(&disk, &[raw, coded]);
    let codec = |thing: &Thing| disk.find(&thing.key()).unwrap().slot.codec();
    assert_eq!((codec(&raw), codec(&coded)), (CodecId::RAW, CodecId(200)));
}

/// `Planes` under another name: one that says it is not exact, or `lossless`, because the things here are no floats.
#[derive(Debug)]
struct Called {
    id: CodecId,
    name: &'static str,
    is_exact: bool,
}

const LOSSY: Called = Called { id: CodecId(202), name: "lossy", is_exact: false };
const SHORT: Called = Called { id: CodecId::LOSSLESS, name: "lossless", is_exact: true };

impl crate::codec::Codec for Called {
    fn id(&self) -> CodecId {
        self.id
    }

    fn name(&self) -> &'static str {
        self.name
    }

    fn is_exact(&self) -> bool {
        self.is_exact
    }

    fn encode(&self, frame: &crate::layout::Frame, raw: &[u8], into: &mut [u8]) -> Option<usize> {
        Planes.encode(frame, raw, into)
    }

    fn decode(&self, frame: &crate::layout::Frame, stored: &[u8], raw: &mut [u8]) -> bool {
        Planes.decode(frame, stored, raw)
    }
}

#[test]
fn what_a_lossy_codec_wrote_is_a_miss_to_whoever_did_not_ask_for_it() {
    let sim = Sim::default();
    let things = [smooth(block(1, 9)), smooth(block(2, 9))];
    store_all(&open_coded(&sim, Codecs::all(Arc::new(LOSSY)), None), &things);
    let are_there = |codecs: Codecs| {
        let disk = open_coded(&sim, codecs, None);
        things.map(|thing| thing.is_there(&disk))
    };
    let only_first = Codecs::default().namespace(namespace(1), Arc::new(LOSSY));
    assert_eq!(are_there(Codecs::all(Arc::new(LOSSY))), [true, true]);
    assert_eq!(are_there(only_first), [true, false], "the second one's namespace wants every bit");
    assert_eq!(are_there(Codecs::default().knows(Arc::new(LOSSY))), [false, false], "known, and not asked for");
}

/// A record of a codec that this release lacks must not be served as it lies there, keep its block from being stored
/// again, or count as lost: only its codec's release can say what it is.
#[test]
fn a_record_of_an_unknown_codec_is_a_counted_miss_and_can_be_stored_anew() {
    let things = mixed();
    let (closed, killed) = closed_and_killed(&things);
    for sim in [closed, killed] {
        let disk = open_coded(&sim, Codecs::default(), None);
        let stats = disk.stats();
        assert_eq!((stats.unknown_codec_records, stats.damaged_total, stats.failing), (9, 0, false));
        for thing in &things {
            assert_eq!(thing.is_there(&disk), thing.version & SMOOTH == 0, "{thing:?}");
        }
        let again = smooth(block(2, 9));
        store_all(&disk, &[again]);
        assert!(again.is_there(&disk));
        drop(disk);
        let disk = open_coded(&sim, planes(), None);
        assert!(things.iter().all(|thing| thing.is_there(&disk)), "whoever knows the codec finds them");
    }
}

#[test]
fn a_part_of_an_encoded_block_is_read_without_the_rest() {
    for cipher in [None, key()] {
        let disk = open_coded(&Sim::default(), planes(), cipher);
        for thing in [smooth(block(2, 200)), smooth(named(41, 1, 90)), block(3, 40)] {
            store_all(&disk, &[thing]);
            let found = disk.find(&thing.key()).unwrap();
            let whole = thing.bytes();
            let end = thing.payload_bytes();
            for range in [0..end, 0..1, end - 1..end, end / 3..end / 2, end / 2..end / 2, 100..5000] {
                let mut part = vec![0xaa; range.len() + 3];
                disk.read_part(&thing.key(), &found, &range, &mut part).unwrap();
                assert!(part[..range.len()] == whole[range.clone()], "{thing:?}, {range:?}");
                assert_eq!(&part[range.len()..], [0xaa; 3]);
            }
        }
    }
}

/// What is hot is written again in its stored form when its segment goes.
#[test]
fn encoded_records_are_kept_when_their_segment_goes() {
    let disk = open_coded(&Sim::default(), planes(), None);
    let hot: Vec<Thing> = (0..4).map(|number| smooth(block(number, 9))).collect();
    store_all(&disk, &hot);
    for number in 100..400 {
        assert!(block(number, 9).store(&disk));
        assert!(hot.iter().all(|thing| thing.is_there(&disk)), "{number}");
    }
    disk.flush().unwrap();
    let stats = disk.stats();
    assert!(stats.reinserted_total > 0 && stats.evictions > 0, "{stats:?}");
}

#[test]
fn an_archive_decodes_what_it_knows_and_checks_the_rest() {
    let sim = Sim::default();
    let things = mixed();
    drop_after_storing(&sim, &things);
    let archive = |codecs| Archive::over(Arc::new(sim.clone()), "sim".into(), None, NOW_MS).unwrap().codecs(codecs);
    let known = archive(planes());
    let verified = known.verify(|_| {});
    assert!(verified.is_whole() && verified.unknown_codec == 0, "{verified:?}");
    for (record, thing) in known.records().iter().zip(&things) {
        let (_, bytes) = known.load(record).unwrap().unwrap();
        assert!(bytes == thing.bytes()[..thing.payload_bytes()], "{thing:?}");
        assert_eq!(record.raw_bytes, thing.payload_bytes() as u64);
        assert_eq!(record.codec == CodecId::RAW, record.stored_bytes == record.raw_bytes);
    }
    let unknown = archive(Codecs::default());
    let verified = unknown.verify(|_| {});
    assert!(verified.is_whole() && verified.unknown_codec == 9, "{verified:?}");
    let error = unknown.load(&unknown.records()[1]).unwrap_err();
    assert!(format!("{error:?}").contains("codec 200"), "{error:?}");
    // A damaged one is told whether it can be decoded or not.
    let name = segment_name(1);
    let mut bytes = sim.get(&name).unwrap();
    let record = &unknown.records()[1];
    bytes[(record.page as usize + 1) * PAGE_BYTES + 3] ^= 1;
    sim.put(&name, bytes);
    assert_eq!(archive(Codecs::default()).verify(|_| {}).damaged.len(), 1);
    assert_eq!(archive(planes()).verify(|_| {}).damaged.len(), 1);
}

fn drop_after_storing(sim: &Sim, things: &[Thing]) {
    store_all(&open_coded(sim, planes(), None), things);
}

/// Raw bytes under the number of a codec, and the other way round, with every checksum right.
#[test]
fn a_record_whose_codec_is_another_than_its_index_says_is_a_miss() {
    let sim = Sim::default();
    let things = mixed();
    drop_after_storing(&sim, &things);
    let mut changed = 0;
    for name in super::recovery::segments(&sim) {
        let mut bytes = sim.get(&name).unwrap();
        for head in bytes.chunks_exact_mut(PAGE_BYTES) {
            if let Some(mut header) = RecordHeader::decode(head)
                && header.meta.codec == CodecId(200)
            {
                header.meta.facts.codec = CodecId(201);
                header.encode(head);
                changed += 1;
            }
        }
        sim.put(&name, bytes);
    }
    assert_eq!(changed, 9);
    let disk = open_coded(&sim, planes(), None);
    for thing in &things {
        assert_eq!(thing.is_there(&disk), thing.version & SMOOTH == 0);
    }
    assert_eq!(disk.stats().damaged_total, 9);
}

#[test]
fn where_it_has_to_pay_a_codec_waits_until_it_does_and_must_save_much() {
    let disk = open_coded(&Sim::default(), Codecs::if_it_pays().knows(Arc::new(SHORT)), None);
    let codec_of = |thing: Thing| {
        store_all(&disk, &[thing]);
        assert!(thing.is_there(&disk));
        disk.find(&thing.key()).unwrap().slot.codec()
    };
    assert_eq!((codec_of(smooth(block(1, 9))), disk.stats().codec), (CodecId::RAW, "raw"));
    disk.shared.pace.finds(CodecId::LOSSLESS);
    assert_eq!((codec_of(smooth(block(2, 9))), disk.stats().codec), (CodecId::LOSSLESS, "lossless"));
    assert_eq!(codec_of(block(3, 9)), CodecId::RAW, "noise saves nothing");
}
