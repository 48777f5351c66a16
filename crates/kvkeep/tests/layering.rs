//! The arrows of ARCHITECTURE.md, file by file: a module uses only modules of lower rank, and no files use each other
//! in a circle.

#![expect(clippy::unwrap_used, reason = "a test that panics fails")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Lower ranks first; modules of one rank do not use each other.
const RANKS: &[&[&str]] = &[
    &["sync", "clock", "tensor", "process", "table", "slots"],
    &["error", "record"],
    &["stats", "layout", "eviction"],
    &["key"],
    &["codec"],
    &["namespaces", "chain", "block"],
    &["event"],
    &["tier", "flight"],
    &["config", "index"],
    &["store"],
    &["cache", "named", "simulation"],
    &["lend", "quantized"],
];

/// Pairs that know each other, each for a reason.
const EXCEPTIONS: &[(&str, &str)] = &[
    // An error names the dtype and shape it is about.
    ("tensor", "error"),
    // A disk is opened as its settings say.
    ("tier", "config"),
];

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

/// `tier::disk::log` of `tier/disk/log.rs`; unit tests look at a module from above, and have no name.
fn module_of(src: &Path, path: &Path) -> Option<Vec<String>> {
    let inner = path.strip_prefix(src).unwrap();
    let mut module: Vec<String> =
        inner.iter().map(|part| part.to_str().unwrap().trim_end_matches(".rs").to_owned()).collect();
    let above = module.iter().any(|part| matches!(part.as_str(), "tests" | "sim" | "contract" | "oracle"));
    if above || module == ["lib"] {
        return None;
    }
    if module.last().is_some_and(|last| last == "mod") {
        module.pop();
    }
    Some(module)
}

/// The code of a file without comments and without its unit tests.
fn code_of(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
    code.lines().map(|line| line.split("//").next().unwrap()).collect::<Vec<_>>().join("\n")
}

/// Every path in the code that begins with `crate::`, `super::` or `self::`, as absolute as it can be made.
fn uses(module: &[String], code: &str) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    for start in ["crate::", "super::", "self::"] {
        for (at, _) in code.match_indices(start) {
            let begins = code[..at].chars().next_back().is_none_or(|c| !c.is_alphanumeric() && c != '_' && c != ':');
            if begins {
                found.extend(expand(module, &code[at..]));
            }
        }
    }
    found
}

/// The paths that a `use` or an expression names: those in braces one by one.
fn expand(module: &[String], text: &str) -> Vec<Vec<String>> {
    let mut base = module.to_vec();
    let mut rest = text;
    loop {
        let name: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        match name.as_str() {
            "crate" => base.clear(),
            "super" => drop(base.pop()),
            "self" => {}
            "" => break,
            _ => base.push(name.clone()),
        }
        rest = &rest[name.len()..];
        match rest.strip_prefix("::") {
            Some(next) => rest = next,
            None => return vec![base],
        }
    }
    let Some(inner) = rest.strip_prefix('{') else { return vec![base] };
    let inner = inner.split('}').next().unwrap();
    let names = inner.split(',').map(|name| name.trim().split("::").next().unwrap().to_owned());
    names.filter(|name| !name.is_empty()).map(|name| [base.clone(), vec![name]].concat()).collect()
}

/// Which file each file uses: the longest name of a module that a path begins with.
fn arrows() -> BTreeMap<String, BTreeSet<String>> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let files: Vec<(Vec<String>, PathBuf)> =
        sources(&src).into_iter().filter_map(|path| Some((module_of(&src, &path)?, path))).collect();
    let names: BTreeSet<String> = files.iter().map(|(module, _)| module.join("::")).collect();
    let mut arrows = BTreeMap::new();
    for (module, path) in &files {
        let mut used = BTreeSet::new();
        for mut target in uses(module, &code_of(path)) {
            while !target.is_empty() && !names.contains(&target.join("::")) {
                target.pop();
            }
            if !target.is_empty() && target != *module {
                used.insert(target.join("::"));
            }
        }
        arrows.insert(module.join("::"), used);
    }
    arrows
}

fn top(module: &str) -> &str {
    module.split("::").next().unwrap()
}

#[test]
fn no_arrow_points_the_wrong_way() {
    let mut seen = 0;
    for (module, used) in arrows() {
        for used in used {
            let (from, to) = (top(&module), top(&used));
            if from == to || EXCEPTIONS.contains(&(from, to)) {
                continue;
            }
            assert!(rank(to) < rank(from), "{module} uses {used}");
            seen += 1;
        }
    }
    assert!(seen > 100, "the test no longer finds the arrows it checks: {seen}");
}

/// A parent that lists its children, and a child that uses what its parent has, are one thing: circles between
/// others are what nobody can read from one end.
#[test]
fn no_files_use_each_other_in_a_circle() {
    let arrows = arrows();
    let is_family = |one: &str, other: &str| {
        other.strip_prefix(one).is_some_and(|rest| rest.starts_with("::"))
            || one.strip_prefix(other).is_some_and(|rest| rest.starts_with("::"))
    };
    let direct = |from: &str| -> Vec<String> {
        let used = arrows.get(from).into_iter().flatten();
        let used = used.filter(|to| !is_family(from, to) && !EXCEPTIONS.contains(&(top(from), top(to))));
        // A file's children are parts of it.
        let parts = |to: &String| {
            arrows
                .keys()
                .filter(|part| *part == to || part.starts_with(&format!("{to}::")))
                .cloned()
                .collect::<Vec<_>>()
        };
        used.flat_map(parts).filter(|to| !is_family(from, to)).collect()
    };
    let mut circles = Vec::new();
    for start in arrows.keys() {
        let (mut reached, mut next) = (BTreeSet::new(), direct(start));
        while let Some(module) = next.pop() {
            if reached.insert(module.clone()) {
                next.extend(direct(&module));
            }
        }
        if reached.contains(start) {
            circles.push(start.clone());
        }
    }
    assert!(circles.is_empty(), "these are in circles: {circles:?}");
}

#[test]
fn the_library_reads_no_environment_and_no_hidden_clock() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for path in sources(&src) {
        let text = fs::read_to_string(&path).unwrap();
        // A test may be told to do more.
        let test = path.components().any(|part| part.as_os_str() == "tests");
        assert!(test || !text.contains("env::var"), "{}", path.display());
        if !path.ends_with("clock.rs") && !test {
            assert!(!text.contains("SystemTime::now") && !text.contains("Instant::now"), "{}", path.display());
        }
    }
}
