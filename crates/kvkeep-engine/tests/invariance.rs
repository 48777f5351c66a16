//! Reused KV changes nothing: equal bits for any cut of a prompt, any number of threads, and
//! between prefill and decode.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use common::{PROMPTS, engine, model_path};
use kvkeep_engine::{Engine, EngineOptions, KvBuffer, Logits};

fn bits(logits: &Logits) -> Vec<u32> {
    logits.as_slice().iter().map(|logit| logit.to_bits()).collect()
}

fn prefilled(engine: &Engine, tokens: &[u32]) -> (KvBuffer, Logits) {
    let mut kv = engine.kv(512).unwrap();
    let logits = engine.prefill(tokens, &mut kv).unwrap();
    (kv, logits)
}

/// Every bit of the KV.
fn kv_bytes(kv: &KvBuffer) -> Vec<&[u8]> {
    kv.views().unwrap().iter().flat_map(|layer| [layer.k.bytes(), layer.v.bytes()]).collect()
}

/// A text long enough to cross the key tiles and the prefill batches.
fn long_text(engine: &Engine) -> Vec<u32> {
    let mut tokens = engine.tokenizer().encode(&PROMPTS.join("\n\n"), false).unwrap();
    tokens.truncate(330);
    assert!(tokens.len() > 300);
    tokens
}

#[test]
fn any_split_of_a_prompt_gives_the_same_bits() {
    let Some(engine) = engine() else { return };
    for prompt in PROMPTS {
        let tokens = engine.tokenizer().encode(prompt, false).unwrap();
        let (whole, logits) = prefilled(engine, &tokens);
        for split in [1, tokens.len() / 3, tokens.len() / 2, tokens.len() - 1] {
            if split == 0 || split >= tokens.len() {
                continue;
            }
            let (mut kv, _) = prefilled(engine, &tokens[..split]);
            let resumed = engine.prefill(&tokens[split..], &mut kv).unwrap();
            assert_eq!(bits(&resumed), bits(&logits), "{prompt:?} split at {split}");
            assert_eq!(kv_bytes(&kv), kv_bytes(&whole), "{prompt:?} split at {split}");
        }
    }
}

#[test]
fn decoding_token_by_token_equals_one_prefill() {
    let Some(engine) = engine() else { return };
    let tokens = &long_text(engine)[..140];
    let (whole, logits) = prefilled(engine, tokens);
    let mut kv = engine.kv(512).unwrap();
    let mut last = None;
    for token in tokens {
        last = Some(engine.decode(*token, &mut kv).unwrap());
    }
    assert_eq!(bits(&last.unwrap()), bits(&logits));
    assert_eq!(kv_bytes(&kv), kv_bytes(&whole));
}

#[test]
fn long_prompts_give_the_same_bits_for_any_batch_and_split() {
    let (Some(engine), Some(path)) = (engine(), model_path()) else { return };
    let tokens = long_text(engine);
    let (whole, logits) = prefilled(engine, &tokens);
    for split in [63, 64, 65, 128, 255, 256, 257, 300] {
        let (mut kv, _) = prefilled(engine, &tokens[..split]);
        let resumed = engine.prefill(&tokens[split..], &mut kv).unwrap();
        assert_eq!(bits(&resumed), bits(&logits), "split at {split}");
        assert_eq!(kv_bytes(&kv), kv_bytes(&whole), "split at {split}");
    }
    let mut options = EngineOptions::default().threads(1);
    options.batch_tokens = Some(37);
    let one_thread = Engine::load(&path, &options).unwrap();
    let (kv, got) = prefilled(&one_thread, &tokens);
    assert_eq!(bits(&got), bits(&logits), "one thread, batches of 37");
    assert_eq!(kv_bytes(&kv), kv_bytes(&whole), "one thread, batches of 37");
    let five_threads = Engine::load(&path, &EngineOptions::default().threads(5)).unwrap();
    assert_eq!(bits(&prefilled(&five_threads, &tokens).1), bits(&logits), "five threads");
}

#[test]
fn portable_kernels_give_the_same_bits() {
    let (Some(engine), Some(path)) = (engine(), model_path()) else { return };
    let mut options = EngineOptions::default().threads(2);
    options.portable = true;
    let portable = Engine::load(path, &options).unwrap();
    let tokens = engine.tokenizer().encode(PROMPTS[0], false).unwrap();
    let ((kv, logits), (fast_kv, fast)) = (prefilled(&portable, &tokens), prefilled(engine, &tokens));
    assert_eq!(bits(&logits), bits(&fast));
    assert_eq!(kv_bytes(&kv), kv_bytes(&fast_kv));
}

#[test]
fn logits_of_all_tokens_are_those_of_each_prefix() {
    let Some(engine) = engine() else { return };
    let tokens = engine.tokenizer().encode(PROMPTS[1], false).unwrap();
    let all = engine.prefill_all_logits(&tokens, &mut engine.kv(64).unwrap()).unwrap();
    assert_eq!(all.len(), tokens.len());
    for end in [1, 2, 7, tokens.len()] {
        assert_eq!(bits(&all[end - 1]), bits(&prefilled(engine, &tokens[..end]).1), "prefix of {end}");
    }
}

#[test]
fn prompts_and_answers_that_share_passes_get_the_bits_they_get_alone() {
    let Some(engine) = engine() else { return };
    let text = long_text(engine);
    let request = |n: usize| {
        let mut kv = engine.kv(512).unwrap();
        let mut logits = engine.prefill(&text[n..n + 40 + n * 70], &mut kv).unwrap();
        let mut answer = Vec::new();
        for _ in 0..12 {
            answer.push(logits.argmax());
            logits = engine.decode(logits.argmax(), &mut kv).unwrap();
        }
        (answer, bits(&logits), kv_bytes(&kv).concat())
    };
    let alone: Vec<_> = (0..4).map(request).collect();
    let together: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|n| scope.spawn(move || request(n))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(alone, together);
}
