//! The device-generic forward pass on the CPU: an oracle that shares no arithmetic with the kernels.

mod common;

use common::{PROMPTS, engine, model_path};
use kvkeep_engine::{Device, DeviceModel, EngineError};

#[test]
fn kernels_agree_with_an_independent_forward_pass() {
    let (Some(engine), Some(path)) = (engine(), model_path()) else { return };
    let oracle = DeviceModel::load(path, &Device::Cpu, 16).unwrap();
    for prompt in &PROMPTS[..8] {
        let tokens = engine.tokenizer().encode(prompt, false).unwrap();
        let exact = oracle.prefill(&tokens, &mut oracle.kv()).unwrap();
        let got = engine.prefill(&tokens, &mut engine.kv(256).unwrap()).unwrap();
        assert_eq!(got.argmax(), exact.argmax(), "{prompt:?}");
        for (got, exact) in got.as_slice().iter().zip(exact.as_slice()) {
            assert!((got - exact).abs() < 1e-2 + 1e-2 * exact.abs(), "{prompt:?}: {got} {exact}");
        }
    }
    assert!(matches!(oracle.prefill(&[], &mut oracle.kv()), Err(EngineError::EmptyTokens)));
    assert!(matches!(oracle.prefill(&[1 << 30], &mut oracle.kv()), Err(EngineError::UnknownToken { .. })));
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
