//! The default model for tests: downloaded once, shared by all.

#![allow(
    dead_code,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::allow_attributes,
    reason = "each test file uses its own part of it"
)]

use std::path::PathBuf;
use std::sync::OnceLock;

use kvkeep_engine::{Engine, EngineOptions, default_model_path, user_cache_dir};

/// The model's path. `None`, after saying so, if it cannot be had; on CI that is a failure.
pub(crate) fn model_path() -> Option<PathBuf> {
    static PATH: OnceLock<Option<PathBuf>> = OnceLock::new();
    let find = || match user_cache_dir().and_then(|dir| default_model_path(&dir, &mut |_, _| ())) {
        Ok(path) => Some(path),
        Err(error) => {
            assert!(std::env::var_os("CI").is_none(), "the default model cannot be had: {error}");
            eprintln!("SKIPPED: the default model cannot be had: {error}");
            None
        }
    };
    PATH.get_or_init(find).clone()
}

/// The default model on two threads.
pub(crate) fn engine() -> Option<&'static Engine> {
    static ENGINE: OnceLock<Option<Engine>> = OnceLock::new();
    let load = || model_path().map(|path| Engine::load(path, &EngineOptions::default().threads(2)).unwrap());
    ENGINE.get_or_init(load).as_ref()
}

/// The default model from a file that names another token as its end.
pub(crate) fn engine_with_end(token: u32) -> Option<Engine> {
    let mut file = std::fs::read(model_path()?).unwrap();
    let key = b"tokenizer.ggml.eos_token_id";
    // Behind a key stand its type, 4 for a u32, and its value.
    let at = file.windows(key.len()).position(|bytes| bytes == key).unwrap() + key.len();
    assert_eq!(file[at..at + 4], 4u32.to_le_bytes());
    file[at + 4..at + 8].copy_from_slice(&token.to_le_bytes());
    let copy = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(copy.path(), file).unwrap();
    Some(Engine::load(copy.path(), &EngineOptions::default().threads(2)).unwrap())
}

/// Real prompts of several kinds and lengths.
pub(crate) const PROMPTS: [&str; 20] = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who",
    "def fibonacci(n):\n    \"\"\"Returns the n-th Fibonacci number.\"\"\"\n",
    "Water boils at 100 degrees Celsius at sea level because",
    "SELECT name, COUNT(*) FROM orders WHERE year = 2024 GROUP BY",
    "Dear Sir or Madam,\n\nI am writing to complain about",
    "Q: What is 17 + 25?\nA:",
    "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer",
    "Die Würde des Menschen ist unantastbar. Sie zu achten und zu",
    "In 1969, Neil Armstrong became the first person to",
    "fn main() {\n    let numbers = vec![3, 1, 4, 1, 5];\n    println!(\"{:?}\",",
    "The three laws of thermodynamics state that energy cannot be created or destroyed, that entropy",
    "Ingredients:\n- 2 eggs\n- 200 g flour\n- 1 cup of milk\n\nInstructions:\n1.",
    "Photosynthesis is the process by which plants",
    "{\"name\": \"Alice\", \"age\": 30, \"city\": \"",
    "It's a truth universally acknowledged, that a single man in possession of a good fortune,",
    "<html>\n<head>\n  <title>Hello</title>\n</head>\n<body>",
    "The mitochondria is the powerhouse of the cell. It produces",
    "1, 1, 2, 3, 5, 8, 13, 21,",
    "Breaking news: scientists have discovered a new species of deep-sea fish that glows in the dark and",
];
