//! What every tier promises, as one suite: each tier and each tier around another runs it. Crates with tiers of
//! their own run it too, with the feature `contract`.
//!
//! A test for each tier was the alternative: then each promises what its author thought of.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::{Epoch, Forget, Offer, Payload, Read, ReadTarget, Tier};
use crate::block::{BlockKey, BlockMeta, Content, Facts};
use crate::clock::Deadline;
use crate::event::{Announcer, Event, EventSink};
use crate::key::{BlockHash, NamespaceId, ObjectKey};
use crate::layout::KvLayout;
use crate::tensor::{DType, PairSpec, Shape};

const PAGE: usize = 4096;
const PATIENCE: Duration = Duration::from_secs(30);
/// Room that the tier under test must have at least.
pub const CAPACITY_BYTES: u64 = 4 << 20;

/// Checks everything; `make` makes a new, empty tier of [`CAPACITY_BYTES`] each time.
///
/// # Panics
/// Where the tier does not keep a promise, with its name.
pub fn check(make: &dyn Fn() -> Arc<dyn Tier>) {
    what_is_offered_is_located_and_read_back_whole_and_in_parts(&*make());
    what_is_not_there_is_a_miss_that_completes_once(&*make());
    memory_that_is_too_small_is_a_miss(&*make());
    a_block_of_another_namespace_is_a_miss(&*make());
    what_is_forgotten_is_gone_and_says_so(&*make());
    an_offer_older_than_the_last_forget_is_dropped(&*make());
    a_newer_value_replaces_an_older_one_and_not_the_other_way_round(&*make());
    what_is_there_is_not_taken_twice(&*make());
    more_than_fits_goes_back_or_drives_out_and_never_over_the_cap(&*make());
    every_payload_is_let_go_of(&*make());
    the_name_is_that_of_the_statistics(&*make());
    what_comes_and_goes_is_reported(&*make());
}

/// A payload that says what became of it.
#[derive(Debug)]
struct Sample {
    bytes: Vec<u8>,
    written: Arc<AtomicUsize>,
    dropped: Arc<AtomicUsize>,
}

impl Payload for Sample {
    fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn written(&self, is_new: bool) {
        self.written.fetch_add(usize::from(is_new), Ordering::SeqCst);
    }
}

impl Drop for Sample {
    fn drop(&mut self) {
        self.dropped.fetch_add(1, Ordering::SeqCst);
    }
}

/// What a read came to.
type Came = Option<(BlockMeta, Vec<u8>)>;

/// Lent memory, and how often it was completed. As an engine's: it has a row of its own for whoever fills it by one copy,
/// and a page for the others; what is in one of them is not in the other.
struct Lent {
    page: Vec<u8>,
    row: Vec<u8>,
    is_filled: bool,
    answer: Arc<Answers>,
}

/// What reads came to, and who waits for it.
type Answers = (Mutex<Vec<Came>>, Condvar);

impl Lent {
    fn new(bytes: usize, answer: &Arc<Answers>) -> Self {
        Self { page: vec![0xaa; bytes], row: vec![0xbb; bytes], is_filled: false, answer: Arc::clone(answer) }
    }
}

impl ReadTarget for Lent {
    fn bytes_mut(&mut self) -> &mut [u8] {
        if self.is_filled { &mut [] } else { &mut self.page }
    }

    fn fill(&mut self, copy: &mut dyn FnMut(&mut [u8]) -> bool) -> bool {
        self.is_filled = copy(&mut self.row);
        self.is_filled
    }

    fn complete(mut self: Box<Self>, read: Option<BlockMeta>) {
        let bytes = std::mem::take(if self.is_filled { &mut self.row } else { &mut self.page });
        let read = read.map(|meta| (meta, bytes));
        self.answer.0.lock().unwrap_or_else(PoisonError::into_inner).push(read);
        self.answer.1.notify_all();
    }
}

fn namespace(number: u8) -> NamespaceId {
    NamespaceId::from_bytes([number; 32])
}

fn key(number: u64) -> BlockKey {
    BlockKey(ObjectKey::numbered(number))
}

fn content(number: u64, version: u8) -> Vec<u8> {
    let byte = |at: usize| (at as u64).wrapping_mul(number | 1).to_le_bytes()[1] ^ version;
    (0..2 * PAGE).map(byte).collect()
}

fn block(number: u64) -> BlockMeta {
    let layout = KvLayout::new(1, 1, 4096, DType::U8).and_then(|layout| layout.with_block_tokens(1));
    let layout = layout.unwrap_or_else(|error| panic!("{error}"));
    BlockMeta {
        facts: Facts { compute_us: 7, ..Facts::raw(key(number).0, namespace(1), 2 * PAGE as u64) },
        begins: false,
        content: Content::Block { layout, model: "contract".to_owned() },
    }
}

fn named(number: u64) -> BlockMeta {
    let half = (DType::U8, Shape::new(&[PAGE]).unwrap_or_else(|error| panic!("{error}")));
    BlockMeta { content: Content::Named(PairSpec { k: half, v: half, prefix_bytes: 5, tag: 0 }), ..block(number) }
}

/// What became of a batch of offers.
struct Offered {
    back: usize,
    written: Arc<AtomicUsize>,
    dropped: Arc<AtomicUsize>,
}

fn offer(tier: &dyn Tier, metas: &[BlockMeta], version: u8, epoch: Epoch) -> Offered {
    let (written, dropped) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
    let offers = metas.iter().map(|meta| {
        let number = u64::from_le_bytes(std::array::from_fn(|at| meta.key.hash().get(at).copied().unwrap_or(0)));
        let sample =
            Sample { bytes: content(number, version), written: Arc::clone(&written), dropped: Arc::clone(&dropped) };
        Offer { meta: meta.clone(), epoch, mark: 3, payload: Arc::new(sample) }
    });
    let back = tier.offer(offers.collect(), Deadline::after(PATIENCE)).len();
    Offered { back, written, dropped }
}

fn read(tier: &dyn Tier, key: BlockKey, of: NamespaceId, range: Option<std::ops::Range<usize>>) -> Came {
    let bytes = range.as_ref().map_or(2 * PAGE, ExactSizeIterator::len);
    read_into(tier, key, of, range, bytes)
}

fn read_into(
    tier: &dyn Tier,
    key: BlockKey,
    of: NamespaceId,
    range: Option<std::ops::Range<usize>>,
    bytes: usize,
) -> Came {
    let answer = Arc::new((Mutex::new(Vec::new()), Condvar::new()));
    let target = Box::new(Lent::new(bytes, &answer));
    tier.read(vec![Read { key, namespace: of, range, waited: Duration::ZERO, target }]);
    let waits = answer.0.lock().unwrap_or_else(PoisonError::into_inner);
    let (mut answers, _) = answer
        .1
        .wait_timeout_while(waits, PATIENCE, |answers| answers.is_empty())
        .unwrap_or_else(PoisonError::into_inner);
    assert_eq!(answers.len(), 1, "{}: a read completes exactly once", tier.name());
    answers.pop().flatten()
}

fn is_located(tier: &dyn Tier, key: BlockKey) -> bool {
    (1..3).any(|number| tier.locate(namespace(number), &[key], Deadline::after(PATIENCE)) != [None])
}

fn flush(tier: &dyn Tier) {
    tier.flush(PATIENCE).unwrap_or_else(|error| panic!("{}: {error}", tier.name()));
}

fn number_of(meta: &BlockMeta) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|at| meta.key.hash().get(at).copied().unwrap_or(0)))
}

fn what_is_offered_is_located_and_read_back_whole_and_in_parts(tier: &dyn Tier) {
    let metas: Vec<BlockMeta> = (0..20).map(block).collect();
    assert_eq!(offer(tier, &metas, 0, 1).back, 0, "{}", tier.name());
    flush(tier);
    let keys: Vec<BlockKey> = metas.iter().map(|meta| meta.key).chain([key(999)]).collect();
    let located = tier.locate(namespace(1), &keys, Deadline::after(PATIENCE));
    assert_eq!(located.len(), 21, "{}: one answer a key", tier.name());
    for (meta, located) in metas.iter().zip(&located) {
        let right = content(number_of(meta), 0);
        assert!(
            located.is_some_and(|located| {
                let sizes = (located.raw_bytes, located.stored_bytes);
                (located.namespace, located.compute_us, located.mark) == (namespace(1), 7, 3)
                    && sizes.0 >= meta.raw_bytes
            }),
            "{}: {located:?}",
            tier.name()
        );
        let (read_meta, bytes) = read(tier, meta.key, namespace(1), None).unwrap_or_else(|| panic!("{}", tier.name()));
        assert!(bytes == right && read_meta == *meta, "{}: {read_meta:?}", tier.name());
        let part = read(tier, meta.key, namespace(1), Some(100..5000)).map(|(_, bytes)| bytes);
        assert!(part.as_deref() == right.get(100..5000), "{}: a part", tier.name());
    }
    assert_eq!(located.last(), Some(&None), "{}: what is not there is not located", tier.name());
}

fn what_is_not_there_is_a_miss_that_completes_once(tier: &dyn Tier) {
    assert!(read(tier, key(1), namespace(1), None).is_none(), "{}", tier.name());
    assert!(read(tier, key(1), namespace(1), Some(0..10)).is_none(), "{}", tier.name());
}

/// As memory whose owner has taken it back.
fn memory_that_is_too_small_is_a_miss(tier: &dyn Tier) {
    offer(tier, &[block(1)], 0, 1);
    flush(tier);
    for bytes in [0, 1, PAGE, 2 * PAGE - 1] {
        assert!(read_into(tier, key(1), namespace(1), None, bytes).is_none(), "{}: {bytes} bytes", tier.name());
    }
    assert!(read_into(tier, key(1), namespace(1), Some(100..5000), 4899).is_none(), "{}: a part", tier.name());
    let (_, bytes) = read_into(tier, key(1), namespace(1), None, 3 * PAGE).unwrap_or_else(|| panic!("{}", tier.name()));
    let (payload, behind) = bytes.split_at(2 * PAGE);
    assert!(
        payload == content(number_of(&block(1)), 0) && behind == [0; PAGE],
        "{}: what is behind the block is zero",
        tier.name()
    );
}

fn a_block_of_another_namespace_is_a_miss(tier: &dyn Tier) {
    offer(tier, &[block(1)], 0, 1);
    flush(tier);
    assert!(read(tier, key(1), namespace(2), None).is_none(), "{}", tier.name());
    assert!(read(tier, key(1), namespace(1), None).is_some(), "{}", tier.name());
}

fn what_is_forgotten_is_gone_and_says_so(tier: &dyn Tier) {
    let other = |number| BlockMeta { facts: Facts { namespace: namespace(2), ..block(number).facts }, ..block(number) };
    offer(tier, &[block(1), block(2), other(3), other(4), block(5)], 0, 1);
    flush(tier);
    let gone = tier.forget(&Forget::Keys(namespace(1), &[key(1), key(77)]), 2);
    assert_eq!((gone.found, gone.entries), (vec![true, false], 1), "{}", tier.name());
    assert!(!is_located(tier, key(1)) && is_located(tier, key(2)), "{}", tier.name());
    assert_eq!(tier.forget(&Forget::Namespace(namespace(2)), 3).entries, 2, "{}", tier.name());
    assert!(!is_located(tier, key(3)) && is_located(tier, key(2)), "{}", tier.name());
    assert_eq!(tier.forget(&Forget::All, 4).entries, 2, "{}", tier.name());
    flush(tier);
    assert!((0..6).all(|number| !is_located(tier, key(number))), "{}", tier.name());
    assert!(read(tier, key(2), namespace(1), None).is_none(), "{}", tier.name());
}

fn an_offer_older_than_the_last_forget_is_dropped(tier: &dyn Tier) {
    for (what, number) in [
        (Forget::Keys(namespace(1), &[key(1)]), 1),
        (Forget::Replaced(namespace(1), &[key(2)]), 2),
        (Forget::Namespace(namespace(1)), 3),
        (Forget::All, 4),
    ] {
        let epoch = 10 * number;
        tier.forget(&what, epoch);
        let old = offer(tier, &[block(number)], 0, epoch - 1);
        assert_eq!(old.back, 0, "{}: it is not to be offered again", tier.name());
        flush(tier);
        assert!(!is_located(tier, key(number)), "{}: {what:?} does not come back", tier.name());
        offer(tier, &[block(number)], 0, epoch);
        flush(tier);
        assert!(is_located(tier, key(number)), "{}: what is newer than {what:?} is taken", tier.name());
    }
}

fn a_newer_value_replaces_an_older_one_and_not_the_other_way_round(tier: &dyn Tier) {
    offer(tier, &[named(1)], 1, 1);
    tier.forget(&Forget::Replaced(namespace(1), &[key(1)]), 2);
    offer(tier, &[named(1)], 2, 2);
    // On their way since before.
    offer(tier, &[named(1)], 1, 1);
    tier.forget(&Forget::Replaced(namespace(1), &[key(1)]), 1);
    flush(tier);
    let found = read(tier, key(1), namespace(1), None).map(|(_, bytes)| bytes);
    assert!(found == Some(content(number_of(&named(1)), 2)), "{}", tier.name());
}

fn what_is_there_is_not_taken_twice(tier: &dyn Tier) {
    let first = offer(tier, &[block(1)], 0, 1);
    flush(tier);
    let second = offer(tier, &[block(1)], 0, 1);
    flush(tier);
    let written = [&first, &second].map(|offered| offered.written.load(Ordering::SeqCst));
    assert_eq!((second.back, written), (0, [1, 0]), "{}", tier.name());
    assert_eq!(tier.stats().entries, 1, "{}", tier.name());
}

fn more_than_fits_goes_back_or_drives_out_and_never_over_the_cap(tier: &dyn Tier) {
    let blocks = 2 * CAPACITY_BYTES / (2 * PAGE as u64);
    for number in 0..blocks {
        offer(tier, &[block(number)], 0, 1);
        let stats = tier.stats();
        assert!(stats.used_bytes <= stats.capacity_bytes, "{}: {stats:?}", tier.name());
    }
    flush(tier);
    let there = (0..blocks).filter(|number| read(tier, key(*number), namespace(1), None).is_some()).count();
    assert!(there > 0 && (there as u64) < blocks, "{}: {there} of {blocks}", tier.name());
}

fn every_payload_is_let_go_of(tier: &dyn Tier) {
    let metas: Vec<BlockMeta> = (0..10).map(block).collect();
    let (taken, again) = (offer(tier, &metas, 0, 1), offer(tier, &metas, 0, 0));
    flush(tier);
    tier.close().unwrap_or_else(|error| panic!("{}: {error}", tier.name()));
    for offered in [taken, again] {
        assert_eq!(offered.dropped.load(Ordering::SeqCst), 10, "{}: pages are given back", tier.name());
    }
    let late = offer(tier, &[block(50)], 0, 1);
    assert_eq!((late.back, late.dropped.load(Ordering::SeqCst)), (1, 1), "{}: closed is closed", tier.name());
}

fn the_name_is_that_of_the_statistics(tier: &dyn Tier) {
    assert!(!tier.name().is_empty() && tier.stats().name == tier.name());
}

/// Knows what was reported last of each block.
#[derive(Debug, Default)]
struct Heard(Mutex<BTreeSet<BlockHash>>);

impl EventSink for Heard {
    fn publish(&self, events: Vec<Event>) {
        let mut heard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for event in events {
            match event {
                Event::Stored { blocks, .. } => heard.extend(blocks),
                Event::Removed { blocks, .. } => heard.retain(|block| !blocks.contains(block)),
                Event::Cleared { .. } => heard.clear(),
            }
        }
    }
}

fn what_comes_and_goes_is_reported(tier: &dyn Tier) {
    let heard = Arc::new(Heard::default());
    let announcer = Announcer::new(Arc::clone(&heard) as Arc<dyn EventSink>);
    tier.report_to(announcer.reports(tier.name()));
    announcer.start();
    let blocks = 2 * CAPACITY_BYTES / (2 * PAGE as u64);
    let check = |what: &str| {
        flush(tier);
        announcer.settle();
        let located = (0..=blocks).filter(|number| is_located(tier, key(*number)));
        let located: BTreeSet<BlockHash> = located.map(|number| key(number).0.block_hash()).collect();
        let heard = heard.0.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(*heard == located, "{}: {what}: {} told, {} there", tier.name(), heard.len(), located.len());
        located.len()
    };
    offer(tier, &[block(1), block(2), block(3), named(blocks)], 0, 1);
    flush(tier);
    tier.forget(&Forget::Keys(namespace(1), &[key(blocks)]), 2);
    assert_eq!(check("offered"), 3);
    tier.forget(&Forget::Keys(namespace(1), &[key(2)]), 3);
    assert_eq!(check("removed"), 2);
    (4..blocks).for_each(|number| _ = offer(tier, &[block(number)], 0, 4));
    assert!(check("evicted") > 2);
    tier.forget(&Forget::Namespace(namespace(1)), 5);
    assert_eq!(check("a namespace"), 0);
    offer(tier, &[block(1)], 0, 6);
    assert_eq!(check("offered again"), 1);
    tier.forget(&Forget::All, 7);
    assert_eq!(check("everything"), 0);
    announcer.close();
}

#[cfg(test)]
#[cfg(feature = "encryption")]
mod tests {
    use super::super::around::{Fault, Limit, Meter};
    #[cfg(feature = "disk")]
    use super::super::disk::{Cipher, DiskTier, sim};
    use super::super::memory::MemoryTier;
    use super::*;
    use crate::clock::ManualClock;
    #[cfg(feature = "disk")]
    use crate::config::DiskConfig;

    use crate::codec::tests::planes::planes;
    use crate::codec::{CodecId, Codecs};

    fn coded_memory() -> Arc<dyn Tier> {
        let clock = Arc::new(ManualClock::at(1000));
        Arc::new(MemoryTier::new("memory", CAPACITY_BYTES, clock).codecs(planes()))
    }

    fn coded_disk() -> Arc<dyn Tier> {
        simulated(planes(), None)
    }

    fn coded_and_encrypted_disk() -> Arc<dyn Tier> {
        simulated(planes(), Some(Cipher::new(&[7; 32])))
    }

    fn memory() -> Arc<dyn Tier> {
        Arc::new(MemoryTier::new("memory", CAPACITY_BYTES, Arc::new(ManualClock::at(1000))))
    }

    #[cfg(feature = "disk")]
    fn disk() -> Arc<dyn Tier> {
        simulated(Codecs::default(), None)
    }

    fn simulated(codecs: Codecs, cipher: Option<Cipher>) -> Arc<dyn Tier> {
        let config = DiskConfig::new("sim", CAPACITY_BYTES).codecs(codecs);
        let options = DiskTier::options(&config, 8 << 20);
        let disk = sim::open(&sim::Sim::default(), &options, cipher, Arc::new(ManualClock::at(1000))).unwrap();
        Arc::new(DiskTier::over(disk, config.read_timeout))
    }

    #[test]
    fn tiers_with_a_codec_keep_what_a_tier_promises() {
        for make in [coded_memory, coded_disk, coded_and_encrypted_disk] {
            check(&make);
        }
        check(&|| Arc::new(Meter::new(coded_disk())));
    }

    /// Else the suite above would show nothing.
    #[test]
    fn the_blocks_of_the_suite_become_shorter() {
        for make in [coded_memory, coded_disk, coded_and_encrypted_disk] {
            let tier = make();
            offer(&*tier, &[block(0), block(2)], 0, 1);
            flush(&*tier);
            let located = tier.locate(namespace(1), &[key(0), key(2)], Deadline::never());
            assert!(located.iter().flatten().any(|located| located.codec == CodecId(200)), "{located:?}");
        }
    }

    #[test]
    fn memory_keeps_what_a_tier_promises() {
        check(&memory);
    }

    #[cfg(feature = "disk")]
    #[test]
    fn the_disk_keeps_what_a_tier_promises() {
        check(&disk);
    }

    #[test]
    fn tiers_around_others_keep_what_a_tier_promises() {
        #[cfg(feature = "disk")]
        let makes = [memory, disk];
        #[cfg(not(feature = "disk"))]
        let makes = [memory];
        for make in makes {
            check(&|| Arc::new(Meter::new(make())));
            check(&|| Arc::new(Limit::new(make(), 1)));
            check(&|| Arc::new(Fault::new(make())));
        }
    }

    #[test]
    fn a_meter_counts_and_a_fault_fails() {
        let fault = Arc::new(Fault::new(memory()));
        let meter = Meter::new(Arc::clone(&fault) as Arc<dyn Tier>);
        assert_eq!(offer(&meter, &[block(1)], 0, 1).back, 0);
        assert!(read(&meter, key(1), namespace(1), None).is_some());
        fault.fail_reads(true);
        assert!(read(&meter, key(1), namespace(1), None).is_none());
        fault.fail_offers(true);
        assert_eq!(offer(&meter, &[block(2)], 0, 1).back, 1);
        fault.go_away(true);
        assert_eq!(meter.locate(namespace(1), &[key(1)], Deadline::after(PATIENCE)), [None]);
        let counts = meter.counts();
        assert_eq!((counts.reads, counts.misses, counts.read_bytes), (2, 1, 2 * PAGE as u64));
        assert_eq!((counts.offers, counts.refused, counts.located_keys), (2, 1, 1));
    }

    /// Completes one read at a time, and looks how many are under way.
    #[cfg(feature = "disk")]
    #[test]
    fn a_limit_is_never_exceeded_and_every_read_comes() {
        let meter = Arc::new(Meter::new(disk()));
        let limit = Limit::new(Arc::clone(&meter) as Arc<dyn Tier>, 2);
        let metas: Vec<BlockMeta> = (0..50).map(block).collect();
        offer(&limit, &metas, 0, 1);
        flush(&limit);
        let answer = Arc::new((Mutex::new(Vec::new()), Condvar::new()));
        let target = || Box::new(Lent::new(2 * PAGE, &answer));
        let wanted = |meta: &BlockMeta| Read {
            key: meta.key,
            namespace: namespace(1),
            range: None,
            waited: Duration::ZERO,
            target: target(),
        };
        limit.read(metas.iter().map(wanted).collect());
        let answers = answer.0.lock().unwrap();
        let (answers, _) = answer.1.wait_timeout_while(answers, PATIENCE, |answers| answers.len() < 50).unwrap();
        assert_eq!((answers.len(), meter.counts().misses), (50, 0));
    }
}
