//! The arrows of ARCHITECTURE.md: a module uses only modules of lower rank.

#![expect(clippy::unwrap_used, reason = "a test that panics fails")]

use std::fs;
use std::path::{Path, PathBuf};

/// Lower ranks first; modules of one rank do not use each other.
const RANKS: &[&[&str]] = &[
    &["sync", "clock", "tensor", "process"],
    &["error", "record"],
    &["stats", "layout", "eviction"],
    &["key"],
    &["namespaces", "chain"],
    &["config", "tier", "flight"],
    &["index"],
    &["store"],
    &["cache", "named", "simulation"],
];

/// The two that know each other: an error names the dtype and shape it is about.
const EXCEPTION: (&str, &str) = ("tensor", "error");

fn rank(module: &str) -> usize {
    RANKS
        .iter()
        .position(|modules| modules.contains(&module))
        .unwrap_or_else(|| panic!("module {module} has no rank: add it to tests/layering.rs and ARCHITECTURE.md"))
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { sources(&path) } else { vec![path] }).collect()
}

#[test]
fn no_arrow_points_the_wrong_way() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut arrows = 0;
    for path in sources(&src) {
        let inner = path.strip_prefix(&src).unwrap();
        let module = inner.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs").to_owned();
        // Unit tests look at a module from above.
        if module == "lib" || inner.iter().any(|part| part == "tests" || part == "tests.rs") {
            continue;
        }
        for line in fs::read_to_string(&path).unwrap().lines() {
            let code = line.split("//").next().unwrap();
            for used in code.split("crate::").skip(1) {
                let used: String = used.chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect();
                if used.is_empty() || used == module || (module.as_str(), used.as_str()) == EXCEPTION {
                    continue;
                }
                assert!(rank(&used) < rank(&module), "{} uses {used}: {line}", path.display());
                arrows += 1;
            }
        }
    }
    assert!(arrows > 20, "the test no longer finds the arrows it checks");
}

#[test]
fn the_library_reads_no_environment_and_no_hidden_clock() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for path in sources(&src) {
        let text = fs::read_to_string(&path).unwrap();
        // A test may be told to do more.
        let test = path.components().any(|part| part.as_os_str() == "tests");
        assert!(test || !text.contains("env::var"), "{}", path.display());
        if !path.ends_with("clock.rs") {
            assert!(!text.contains("SystemTime::now") && !text.contains("Instant::now"), "{}", path.display());
        }
    }
}
