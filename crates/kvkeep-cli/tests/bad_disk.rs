//! `kvkeep verify`, `inspect`, `export` and a cache on a real file system whose disk fails to read a part of it: ext4
//! on a loop device whose file was cut off. It takes root; without that the test says so and passes.

#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, reason = "a test that panics fails")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use kvkeep::{CacheConfig, DType, DiskConfig, KvCache, KvLayout, LayerView, Namespace, TensorView};
use serde_json::Value;

const MIB: u64 = 1 << 20;
const IMAGE_BYTES: u64 = 256 * MIB;
const ENTRIES: u32 = 40;

/// A file system in a file; gone when dropped.
struct Image {
    home: tempfile::TempDir,
    device: String,
}

impl Image {
    fn new() -> Option<Self> {
        let home = tempfile::tempdir().unwrap();
        let image = home.path().join("image");
        std::fs::File::create(&image).unwrap().set_len(IMAGE_BYTES).unwrap();
        std::fs::create_dir(home.path().join("mnt")).unwrap();
        done("mkfs.ext4", &["-q", "-b", "4096", "-O", "^has_journal", text(&image)])?;
        let device = done("losetup", &["--find", "--show", "--direct-io=on", text(&image)])?;
        let image = Self { device: device.trim().to_owned(), home };
        done("mount", &[&image.device, text(&image.mount())])?;
        Some(image)
    }

    fn mount(&self) -> PathBuf {
        self.home.path().join("mnt")
    }

    /// From here on the disk fails.
    fn cut(&self, bytes: u64) {
        done("sync", &["--file-system", text(&self.mount())]).unwrap();
        let image = std::fs::File::options().write(true).open(self.home.path().join("image")).unwrap();
        image.set_len(bytes).unwrap();
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = done("umount", &["-l", text(&self.mount())]);
        let _ = done("losetup", &["--detach", &self.device]);
    }
}

/// What a program says, if it is there and it works.
fn done(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn kvkeep(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kvkeep")).args(arguments).output().unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

/// Verifying ended with the first error, and said nothing of what could be read.
#[test]
fn verify_inspect_and_export_go_on_behind_what_a_disk_fails_to_read() {
    let Some(image) = Image::new() else {
        eprintln!("SKIPPED: ext4 on a loop device cannot be mounted here (it takes root)");
        return;
    };
    let dir = image.mount().join("kv");
    let open = || KvCache::new(CacheConfig::new(4 * MIB).disk(DiskConfig::new(&dir, 1024 * MIB)));
    let cache = open().unwrap();
    // Blocks of 1 MiB.
    let layout = KvLayout::new(1, 8, 1024, DType::U8).unwrap().with_block_tokens(64).unwrap();
    let bytes = vec![7; 512 << 10];
    let half = TensorView::new(DType::U8, &[64, 8, 1024], &bytes).unwrap();
    for number in 0..ENTRIES {
        let layer = LayerView { k: half, v: half };
        let report = cache.store(&Namespace::new("m", layout), &[number; 64], &[layer]).unwrap();
        assert_eq!(report.stored_blocks, 1);
        cache.flush().unwrap();
    }
    drop(cache);

    // Where the segments lie is the file system's business: more of the disk fails until it shows.
    let verify = |mib| {
        image.cut(mib * MIB);
        Some(kvkeep(&["verify", text(&dir), "--json"])).filter(|output| !output.status.success())
    };
    let output = (0..IMAGE_BYTES / MIB).rev().step_by(4).find_map(verify).unwrap();
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    let report = json(&output);
    let count = |name: &str| report.pointer(name).and_then(Value::as_u64).unwrap();
    assert!(count("/records/good") > 5 && count("/segments/unreadable") > 0, "{report}");
    assert_eq!((count("/records/damaged"), count("/segments/missing")), (0, 0), "{report}");
    assert_eq!(report["unreadable"].as_array().unwrap().len() as u64, count("/records/unreadable"));
    let output = kvkeep(&["verify", text(&dir)]);
    assert!(String::from_utf8_lossy(&output.stdout).contains("not to be read"), "{output:?}");

    let output = kvkeep(&["inspect", text(&dir), "--json"]);
    assert!(output.status.success(), "{output:?}");
    let out = image.home.path().join("out.safetensors");
    let output = kvkeep(&["export", text(&dir), "--out", text(&out), "--json"]);
    assert!(output.status.code() == Some(4) || output.status.success(), "{output:?}");
    assert!(json(&output)["entries"].as_u64().unwrap() > 5, "{output:?}");

    // A cache goes on without what it cannot read, and keeps it.
    let before = segments(&dir);
    match open() {
        Ok(cache) => assert!(cache.stats().tier("disk").unwrap().read_errors_total > 0),
        Err(error) => assert!(kvkeep::OneLine(&error).to_string().contains("remove the file MANIFEST"), "{error}"),
    }
    assert_eq!(segments(&dir), before);
}

fn segments(dir: &Path) -> BTreeSet<String> {
    let names = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with("segment")).collect()
}
