//! What cannot work says so, by type and with what to do; nothing panics.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{engine, model_path};
use kvkeep_engine::{Engine, EngineError, EngineOptions, Generator, Sampler};

fn load(path: &Path) -> Result<Engine, EngineError> {
    Engine::load(path, &EngineOptions::default().threads(1))
}

fn file(dir: &tempfile::TempDir, bytes: &[u8]) -> PathBuf {
    let path = dir.path().join("model.gguf");
    fs::write(&path, bytes).unwrap();
    path
}

fn text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

/// A GGUF header with string metadata and no tensors.
fn header(entries: &[(&str, &str)]) -> Vec<u8> {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(3u32.to_le_bytes());
    bytes.extend(0u64.to_le_bytes());
    bytes.extend((entries.len() as u64).to_le_bytes());
    for (key, value) in entries {
        text(&mut bytes, key);
        bytes.extend(8u32.to_le_bytes());
        text(&mut bytes, value);
    }
    bytes
}

#[test]
fn foreign_and_empty_files_are_told_apart_from_missing_ones() {
    let dir = tempfile::tempdir().unwrap();
    for bytes in [&b""[..], b"GG", b"PK\x03\x04 a zip", b"GGUF", b"GGUF\x03\0\0\0", &[b'G'; 4096]] {
        let error = load(&file(&dir, bytes)).unwrap_err();
        assert!(matches!(error, EngineError::BadModel { .. }), "{error}");
        assert!(error.to_string().contains("fetch it again"), "{error}");
    }
    let error = load(&dir.path().join("nowhere.gguf")).unwrap_err();
    assert!(matches!(error, EngineError::ReadModel { .. }), "{error}");
    let error = load(dir.path()).unwrap_err();
    assert!(matches!(error, EngineError::ReadModel { .. } | EngineError::BadModel { .. }), "{error}");
}

#[test]
fn a_truncated_model_is_refused_wherever_it_is_cut() {
    let Some(path) = model_path() else { return };
    let dir = tempfile::tempdir().unwrap();
    let whole = fs::read(path).unwrap();
    for keep in [30, 1000, 500_000, 1_700_000, whole.len() / 2, whole.len() - 1] {
        let error = load(&file(&dir, &whole[..keep])).unwrap_err();
        assert!(matches!(error, EngineError::BadModel { .. }), "{keep} bytes: {error}");
    }
}

#[test]
fn damaged_headers_never_panic() {
    let Some(path) = model_path() else { return };
    let dir = tempfile::tempdir().unwrap();
    let whole = fs::read(path).unwrap();
    for at in (4..400).step_by(13) {
        let mut damaged = whole[..3_000_000].to_vec();
        damaged[at] ^= 0xA5;
        assert!(load(&file(&dir, &damaged)).is_err(), "byte {at}");
    }
}

#[test]
fn another_architecture_or_tokenizer_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let error = load(&file(&dir, &header(&[("general.architecture", "gpt2")]))).unwrap_err();
    assert!(matches!(error, EngineError::Unsupported(_)) && error.to_string().contains("gpt2"), "{error}");
    let error = load(&file(&dir, &header(&[("general.architecture", "llama")]))).unwrap_err();
    assert!(matches!(error, EngineError::Missing(_)), "{error}");
}

#[test]
fn calls_that_cannot_be_carried_out_leave_the_kv_as_it_was() {
    let Some(engine) = engine() else { return };
    let mut kv = engine.kv(4).unwrap();
    engine.prefill(&[1, 2], &mut kv).unwrap();
    assert!(matches!(engine.prefill(&[], &mut kv), Err(EngineError::EmptyTokens)));
    assert!(matches!(engine.prefill(&[1, 49152], &mut kv), Err(EngineError::UnknownToken { token: 49152, .. })));
    let error = engine.prefill(&[1, 2, 3], &mut kv).unwrap_err();
    assert!(matches!(error, EngineError::ContextOverflow { tokens: 5, capacity: 4 }), "{error}");
    assert_eq!(kv.len(), 2);
    engine.prefill(&[1, 2], &mut kv).unwrap();
    assert!(matches!(engine.decode(1, &mut kv), Err(EngineError::ContextOverflow { .. })));
    assert!(matches!(kv.import(5), Err(EngineError::ContextOverflow { .. })));
    assert_eq!(kv.len(), 4);
    for capacity in [0, 8193] {
        assert!(matches!(engine.kv(capacity), Err(EngineError::BadCapacity { .. })));
    }
    let foreign = kvkeep::KvLayout::new(1, 1, 64, kvkeep::DType::F16).unwrap();
    let foreign = kvkeep::Namespace::new("other", foreign);
    assert!(matches!(Generator::new(engine, 16, foreign), Err(EngineError::ForeignKv)));
}

/// KV that another model left in a cache is refused, and nothing of it stays in the buffer.
#[test]
fn a_match_of_another_layout_is_refused_and_leaves_the_buffer_empty() {
    let Some(engine) = engine() else { return };
    let layout = kvkeep::KvLayout::new(1, 1, 64, kvkeep::DType::F16).unwrap().with_block_tokens(2).unwrap();
    let foreign = kvkeep::Namespace::new("other", layout);
    let cache = kvkeep::KvCache::new(kvkeep::CacheConfig::new(1 << 20)).unwrap();
    let bytes = vec![0u8; 2 * 64 * 2];
    let view = kvkeep::TensorView::new(kvkeep::DType::F16, &[2, 1, 64], &bytes).unwrap();
    let _ = cache.store(&foreign, &[1, 2], &[kvkeep::LayerView { k: view, v: view }]).unwrap();
    let found = cache.lookup(&foreign, &[1, 2]).unwrap();
    assert_eq!(found.cached_tokens(), 2);
    let mut kv = engine.kv(8).unwrap();
    engine.prefill(&[1, 2, 3], &mut kv).unwrap();
    assert!(matches!(engine.resume(&found, &[4], &mut kv), Err(EngineError::Cache(_))));
    assert!(kv.is_empty());
    assert!(engine.prefill(&[1, 2, 3], &mut kv).is_ok());
}

#[test]
fn samplers_refuse_settings_out_of_range() {
    for (temperature, top_p) in
        [(-1.0, 0.5), (f64::NAN, 0.5), (f64::INFINITY, 0.5), (1.0, 0.0), (1.0, 1.1), (1.0, f64::NAN)]
    {
        assert!(matches!(Sampler::new(temperature, top_p, 1), Err(EngineError::Sampling(_))), "{temperature} {top_p}");
    }
}
