//! A directory that the first release with this format wrote opens for ever, or is refused
//! by its version. Never write the fixture again for a version that was released: add one.

#![expect(clippy::unwrap_used, reason = "a test that panics fails")]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use common::{assert_right, namespace, store};
use kvkeep::tiers::{CodecId, Codecs};
use kvkeep::{
    Archive, CacheConfig, DType, DiskConfig, KvCache, KvLayout, LayerView, Namespace, Outcome, SimpleKvCache,
    TensorView,
};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn tokens() -> Vec<u32> {
    (0..20).collect()
}

fn open(dir: &Path, key: Option<&Path>) -> (KvCache, SimpleKvCache) {
    let mut disk = DiskConfig::new(dir, 4 << 20);
    if let Some(key) = key {
        disk = disk.key_file(key);
    }
    let cache = KvCache::new(CacheConfig::new(1 << 20).disk(disk)).unwrap();
    let simple = SimpleKvCache::over(cache.store_handle().clone(), "s");
    (cache, simple)
}

/// A key file as git cannot keep it: readable by its owner alone.
fn key(home: &Path) -> PathBuf {
    let key = home.join("key");
    fs::write(&key, "0f".repeat(32)).unwrap();
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    key
}

#[test]
#[ignore = "writes the fixture of a new version"]
fn write_fixtures() {
    let home = tempfile::tempdir().unwrap();
    let key = key(home.path());
    for (name, key) in [("disk-v1", None), ("disk-v1-encrypted", Some(key.as_path()))] {
        let dir = fixtures().join(name);
        let (cache, simple) = open(&dir, key);
        store(&cache, &namespace("fixture"), &tokens());
        for (layer, value) in [(0, 1.5f32), (1, -2.0), (0, 3.25)] {
            let (k, v) = ([value; 6], [7u8, 8, 9]);
            let (k, v) = (TensorView::of(&k, &[1, 2, 3]).unwrap(), TensorView::of(&v, &[3]).unwrap());
            assert_eq!(simple.cache_kv("a prefix", layer, k, v).unwrap(), Outcome::Stored);
            simple.flush().unwrap();
        }
        simple.evict("a prefix", Some(1)).unwrap();
        drop((cache, simple));
        fs::remove_file(dir.join("LOCK")).unwrap();
    }
}

/// Blocks that each built-in codec has written, by its name.
const CODECS: [&str; 6] = ["lossless", "int8", "int4", "k8v4", "fp8", "nf4"];

/// A block of each kind of float, with bytes that become shorter: namespace, and K as well as V of each layer.
fn coded() -> [(Namespace, Vec<u8>); 3] {
    let of = |dtype, name: &str| {
        let layout = KvLayout::new(2, 2, 32, dtype).unwrap().with_block_tokens(64).unwrap();
        let state = |at: u32| at.wrapping_mul(0x9e37_79b9).rotate_left(11).wrapping_mul(0x85eb_ca6b);
        // Of few digits: what rounds in two steps rounds otherwise on another processor.
        let exact = |at: u32| (f64::from(state(at)) / f64::from(u32::MAX) - 0.5) * f64::from(1 + at % 7);
        let element = |at: u32| half::bf16::from_f64(exact(at)).to_f32();
        let bytes = |at| match dtype {
            DType::BF16 => half::bf16::from_f32(element(at)).to_le_bytes().to_vec(),
            DType::F16 => half::f16::from_f32(element(at)).to_le_bytes().to_vec(),
            _ => element(at).to_le_bytes().to_vec(),
        };
        (Namespace::new(name, layout), (0..64 * 2 * 32).flat_map(bytes).collect())
    };
    [of(DType::BF16, "bf16"), of(DType::F16, "f16"), of(DType::F32, "f32")]
}

fn open_coded(dir: &Path, codec: &str) -> KvCache {
    let codecs = Codecs::named(codec).unwrap();
    KvCache::new(CacheConfig::new(1 << 20).disk(DiskConfig::new(dir, 4 << 20).codecs(codecs))).unwrap()
}

/// Of what comes back of a fixture: FNV-1a, over all namespaces and layers.
fn sum_of(cache: &KvCache, codec: &str) -> u64 {
    let mut sum = 0xcbf2_9ce4_8422_2325u64;
    for (namespace, _) in coded() {
        let found = cache.lookup(&namespace, &(0..64).collect::<Vec<u32>>()).unwrap();
        assert_eq!(found.cached_tokens(), 64, "{codec}");
        for view in (0..2).map(|layer| found.layer(0, layer).unwrap()) {
            for byte in view.k.bytes().iter().chain(view.v.bytes()) {
                sum = (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
            }
        }
    }
    sum
}

/// What came back of the fixtures when they were written: `codec sum`, a line each.
fn sums() -> PathBuf {
    fixtures().join("codec-sums.txt")
}

/// Of a directory that is left as it is.
fn copied(codec: &str) -> tempfile::TempDir {
    let home = tempfile::tempdir().unwrap();
    copy(&fixtures().join(format!("codec-{codec}")), home.path());
    home
}

#[test]
#[ignore = "writes the fixture of a new codec"]
fn write_coded_fixtures() {
    for codec in CODECS {
        let dir = fixtures().join(format!("codec-{codec}"));
        if dir.exists() {
            continue;
        }
        let cache = open_coded(&dir, codec);
        for (namespace, side) in coded() {
            let view = TensorView::new(namespace.layout().dtype(), &[64, 2, 32], &side).unwrap();
            let tokens: Vec<u32> = (0..64).collect();
            cache.store(&namespace, &tokens, &[LayerView { k: view, v: view }; 2]).unwrap();
        }
        cache.flush().unwrap();
        drop(cache);
        fs::remove_file(dir.join("LOCK")).unwrap();
        let line = format!("{codec} {:016x}\n", sum_of(&open_coded(copied(codec).path(), codec), codec));
        let mut file = fs::OpenOptions::new().create(true).append(true).open(sums()).unwrap();
        std::io::Write::write_all(&mut file, line.as_bytes()).unwrap();
    }
}

/// Not only within its error: whoever has read it before has computed behind it.
#[test]
fn what_a_lossy_codec_wrote_comes_back_the_same_for_ever() {
    let sums = fs::read_to_string(sums()).unwrap();
    assert_eq!(sums.lines().count(), CODECS.len() - 1);
    for (codec, sum) in sums.lines().map(|line| line.split_once(' ').unwrap()) {
        let home = copied(codec);
        let records = Archive::open(home.path(), None, 0).unwrap().records().to_vec();
        assert!(records.len() == 3 && records.iter().all(|record| record.codec.0 > 1), "{codec}");
        assert_eq!(format!("{:016x}", sum_of(&open_coded(home.path(), codec), codec)), sum, "{codec}");
    }
}

#[test]
fn what_a_codec_wrote_is_read_for_ever_whatever_is_written_now() {
    for (codec, now) in [("lossless", "lossless"), ("lossless", "raw")] {
        let home = copied(codec);
        let archive = Archive::open(home.path(), None, 0).unwrap();
        assert!(
            archive.records().len() == 3 && archive.records().iter().all(|record| record.codec != CodecId::RAW),
            "{codec}"
        );
        let cache = open_coded(home.path(), now);
        for (namespace, side) in coded() {
            let found = cache.lookup(&namespace, &(0..64).collect::<Vec<u32>>()).unwrap();
            assert_eq!(found.cached_tokens(), 64, "{codec}");
            for layer in 0..2 {
                let view = found.layer(0, layer).unwrap();
                assert!(view.k.bytes() == side && view.v.bytes() == side, "{codec}, {}", namespace.layout().dtype());
            }
        }
    }
}

fn copy(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

#[test]
fn a_directory_of_format_1_opens_for_ever() {
    let home = tempfile::tempdir().unwrap();
    let key = key(home.path());
    for (name, key) in [("disk-v1", None), ("disk-v1-encrypted", Some(key.as_path()))] {
        let dir = home.path().join(name);
        fs::create_dir(&dir).unwrap();
        copy(&fixtures().join(name), &dir);
        let verified = Archive::open(&dir, key, 0).unwrap().verify(|_| {});
        assert!(verified.is_whole() && verified.records >= 8, "{name}: {verified:?}");
        let (cache, simple) = open(&dir, key);
        let found = cache.lookup(&namespace("fixture"), &tokens()).unwrap();
        assert_eq!(found.cached_tokens(), 20, "{name}");
        assert_right(&found, &tokens());
        let hit = simple.get_cached_kv("a prefix", 0).unwrap().unwrap();
        assert_eq!((hit.k().dtype(), hit.k().shape().dims()), (DType::F32, &[1usize, 2, 3][..]));
        assert_eq!((hit.k().elements::<f32>().unwrap(), hit.v().bytes()), (&[3.25f32; 6][..], &[7u8, 8, 9][..]));
        assert!(simple.get_cached_kv("a prefix", 1).unwrap().is_none());
        assert_eq!(simple.longest_prefix("a prefix of more"), Some("a prefix"));
    }
}
