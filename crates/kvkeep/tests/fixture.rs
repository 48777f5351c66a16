//! A directory that the first release with this format wrote opens for ever, or is refused
//! by its version. Never write the fixture again for a version that was released: add one.

#![expect(clippy::unwrap_used, reason = "a test that panics fails")]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use common::{assert_right, namespace, store};
use kvkeep::{Archive, CacheConfig, DType, DiskConfig, KvCache, Outcome, SimpleKvCache, TensorView};

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

#[test]
fn a_directory_of_format_1_opens_for_ever() {
    let home = tempfile::tempdir().unwrap();
    let key = key(home.path());
    for (name, key) in [("disk-v1", None), ("disk-v1-encrypted", Some(key.as_path()))] {
        let dir = home.path().join(name);
        fs::create_dir(&dir).unwrap();
        for entry in fs::read_dir(fixtures().join(name)).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), dir.join(entry.file_name())).unwrap();
        }
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
