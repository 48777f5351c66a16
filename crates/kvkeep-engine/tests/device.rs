//! The device-generic forward pass on the CPU: an oracle that shares no arithmetic with the kernels.
//!
//! The two round differently, and the oracle's own rounding depends on the processor: its matrix products add up in an
//! order that follows the width of its vectors and the size of its caches. What that comes to is a part of the logits'
//! scale, the same for a logit near zero as for a large one. So a difference is judged by that scale.

mod common;

use common::{PROMPTS, engine, model_path};
use kvkeep_engine::{Device, DeviceModel, EngineError};

/// Of the logits' scale. Over the eight prompts rounding came to 0.0005 on an AMD processor, and on an Intel one to
/// 0.0148 at most where logits reach 15 to 34; a logit that is off by a hundredth of the scale is a fault.
const TOLERANCE: f32 = 0.004;

/// The largest difference of two results as a part of their scale, the same whichever is given first: the scale is
/// the smaller one of both, so that one that is all too small, or zero, does not pass for the other.
fn difference(one: &[f32], other: &[f32]) -> f32 {
    assert_eq!(one.len(), other.len());
    let largest = |values: &[f32]| values.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    let scale = largest(one).min(largest(other));
    let off = |(one, other): (&f32, &f32)| {
        let off = (one - other).abs() / scale;
        // Neither a NaN nor a scale of zero is like anything.
        if off.is_nan() { f32::INFINITY } else { off }
    };
    one.iter().zip(other).map(off).fold(0.0, f32::max)
}

#[test]
fn kernels_agree_with_an_independent_forward_pass() {
    let (Some(engine), Some(path)) = (engine(), model_path()) else { return };
    let oracle = DeviceModel::load(path, &Device::Cpu, 16).unwrap();
    for prompt in &PROMPTS[..8] {
        let tokens = engine.tokenizer().encode(prompt, false).unwrap();
        let exact = oracle.prefill(&tokens, &mut oracle.kv()).unwrap();
        let got = engine.prefill(&tokens, &mut engine.kv(256).unwrap()).unwrap();
        let off = difference(got.as_slice(), exact.as_slice());
        eprintln!("{prompt:?}: off by {off:.5} of the scale");
        assert!(off < TOLERANCE, "{prompt:?}: off by {off} of the scale");
    }
    assert!(matches!(oracle.prefill(&[], &mut oracle.kv()), Err(EngineError::EmptyTokens)));
    assert!(matches!(oracle.prefill(&[1 << 30], &mut oracle.kv()), Err(EngineError::UnknownToken { .. })));
}

/// What was allowed before grew with each logit: on some processors a right logit near zero failed, while a wrong
/// large one would have passed.
#[test]
fn the_comparison_finds_faults_and_lets_rounding_pass() {
    let Some(engine) = engine() else { return };
    let tokens = engine.tokenizer().encode(PROMPTS[0], false).unwrap();
    let logits_of = |tokens: &[u32]| engine.prefill(tokens, &mut engine.kv(64).unwrap()).unwrap().as_slice().to_vec();
    let right = logits_of(&tokens);
    let scale = right.iter().fold(0f32, |largest, logit| largest.max(logit.abs()));
    let found = |wrong: &[f32]| difference(wrong, &right) >= TOLERANCE && difference(&right, wrong) >= TOLERANCE;
    let changed = |change: &dyn Fn(usize, f32) -> f32| -> Vec<f32> {
        right.iter().enumerate().map(|(at, logit)| change(at, *logit)).collect()
    };
    let last = right.len() - 1;
    assert!(found(&changed(&|at, logit| if at == last { logit + 0.01 * scale } else { logit })), "one logit");
    assert!(found(&changed(&|_, logit| logit * 1.01)) && found(&changed(&|_, logit| logit * 0.99)), "the scale");
    assert!(found(&changed(&|at, logit| if at == 7 { f32::NAN } else { logit })), "no number");
    assert!(found(&changed(&|_, _| 0.0)) && found(&changed(&|_, logit| 1e6 * logit)), "nothing, and too much");
    let mut other = tokens.clone();
    other[1] ^= 1;
    assert!(found(&logits_of(&other)), "another token");
    assert!(found(&logits_of(&tokens[1..])), "a token less before it");
    assert!(!found(&changed(&|at, logit| logit + if at % 2 == 0 { 0.001 } else { -0.001 } * scale)), "rounding");
}

#[test]
fn device_kv_travels_through_the_host_and_keeps_its_bits() {
    let (Some(engine), Some(path)) = (engine(), model_path()) else { return };
    let model = DeviceModel::load(path, &Device::Cpu, 8).unwrap();
    let tokens = engine.tokenizer().encode(PROMPTS[1], false).unwrap();
    let mut whole = model.kv();
    let logits = model.prefill(&tokens, &mut whole).unwrap();
    let mut part = model.kv();
    model.prefill(&tokens[..8], &mut part).unwrap();
    let mut host = engine.kv(64).unwrap();
    model.export(&part, &mut host).unwrap();
    assert_eq!(host.len(), 8);
    let mut back = model.import(&host).unwrap();
    assert_eq!(model.prefill(&tokens[8..], &mut back).unwrap(), logits);
    assert_ne!(model.namespace().unwrap().id(), engine.namespace(8).unwrap().id());
}
