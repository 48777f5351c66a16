//! Answers with a cache are the answers without, token for token, and say truly what was reused.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use std::ops::ControlFlow;
use std::time::Duration;

use common::{PROMPTS, engine};
use kvkeep::{CacheConfig, KvCache};
use kvkeep_engine::{
    Cancel, ChatMessage, Engine, EngineError, EngineOptions, FinishReason, GenerateOptions, Generation, Generator,
    Sampler,
};

fn generator(engine: &Engine, block_tokens: u32) -> Generator {
    Generator::new(engine, 512, engine.namespace(block_tokens).unwrap()).unwrap()
}

fn cache() -> KvCache {
    KvCache::new(CacheConfig::new(64 << 20)).unwrap()
}

fn answer(generator: &mut Generator, prompt: &[u32], cache: Option<&KvCache>, max_tokens: usize) -> Generation {
    let options = GenerateOptions::greedy(max_tokens);
    generator.generate(prompt, cache, &options, &mut |_| ControlFlow::Continue(())).unwrap()
}

#[test]
fn greedy_answers_are_the_same_with_and_without_reuse() {
    let Some(engine) = engine() else { return };
    for (block_tokens, prompts) in [(4, &PROMPTS[..]), (7, &PROMPTS[..6])] {
        let (cache, mut generator) = (cache(), generator(engine, block_tokens));
        for prompt in prompts {
            let tokens = engine.tokenizer().encode(prompt, false).unwrap();
            let plain = answer(&mut generator, &tokens, None, 8);
            // What each of these leaves in the cache, the next one finds.
            for prefix in [tokens.len() / 2, tokens.len()] {
                let prompt = &tokens[..prefix.max(1)];
                let reused = answer(&mut generator, prompt, Some(&cache), if prefix == tokens.len() { 8 } else { 1 });
                if prefix == tokens.len() {
                    assert_eq!(reused.tokens, plain.tokens);
                    assert_eq!(reused.text, plain.text);
                }
            }
            let again = answer(&mut generator, &tokens, Some(&cache), 8);
            assert_eq!(again.tokens, plain.tokens);
            let whole_blocks = (tokens.len() - 1) / block_tokens as usize * block_tokens as usize;
            assert_eq!(again.cached_tokens, whole_blocks, "{prompt:?}");
        }
    }
}

#[test]
fn what_was_read_of_a_prompt_before_it_was_cancelled_is_found_again() {
    let Some(path) = common::model_path() else { return };
    let mut slow = EngineOptions::default().threads(2);
    // Many small passes: there is always one to be cancelled before.
    slow.batch_tokens = Some(4);
    let engine = Engine::load(path, &slow).unwrap();
    let mut generator = generator(&engine, 4);
    let prompt = engine.tokenizer().encode(&PROMPTS.join("\n"), false).unwrap();
    let plain = answer(&mut generator, &prompt, None, 4);
    for delay_ms in [5, 10, 20, 40, 80, 160, 320, 640] {
        let (cache, cancel) = (cache(), Cancel::default());
        let options = GenerateOptions::greedy(4).cancel(cancel.clone());
        let cut = std::thread::scope(|scope| {
            let begun = scope.spawn(|| {
                generator.generate(&prompt, Some(&cache), &options, &mut |_| ControlFlow::Continue(())).unwrap()
            });
            std::thread::sleep(Duration::from_millis(delay_ms));
            cancel.cancel();
            begun.join().unwrap()
        });
        if !cut.tokens.is_empty() {
            continue;
        }
        assert_eq!((cut.finish, cut.cached_tokens), (FinishReason::Cancelled, 0));
        let again = answer(&mut generator, &prompt, Some(&cache), 4);
        assert_eq!(again.tokens, plain.tokens);
        assert!(again.cached_tokens < (prompt.len() - 1) / 4 * 4 && again.cached_tokens.is_multiple_of(4));
        if again.cached_tokens > 0 {
            return;
        }
    }
    panic!("it was never cancelled in the middle");
}

#[test]
fn a_second_turn_reuses_the_answer_too() {
    let Some(engine) = engine() else { return };
    let (cache, mut generator) = (cache(), generator(engine, 8));
    let mut chat = vec![ChatMessage::new("user", "Name three colours.")];
    let prompt = engine.chat_tokens(&chat, true).unwrap();
    let first = answer(&mut generator, &prompt, Some(&cache), 24);
    assert_eq!(first.cached_tokens, 0);
    let mut next: Vec<u32> = prompt.iter().chain(&first.tokens).copied().collect();
    next.extend(engine.tokenizer().encode("<|im_end|>\n<|im_start|>user\nAnd more?<|im_end|>\n", true).unwrap());
    let plain = answer(&mut generator, &next, None, 8);
    let second = answer(&mut generator, &next, Some(&cache), 8);
    assert_eq!(second.tokens, plain.tokens);
    let known = prompt.len() + first.tokens.len() - 1;
    assert_eq!(second.cached_tokens, known / 8 * 8);
    assert!(cache.stats().cached_tokens_total > 0);
    assert!(cache.stats().time_saved > Duration::ZERO);
    chat.push(ChatMessage::new("assistant", first.text));
    assert!(engine.chat_tokens(&chat, true).unwrap().len() > prompt.len());
}

/// An answer's blocks were said to have taken as long as decoding them, so that prefill time saved was 4.5 times
/// what was spared in chats: whoever finds them is spared a prefill.
#[test]
fn what_an_answers_blocks_save_is_what_a_prefill_of_them_takes() {
    let Some(engine) = engine() else { return };
    let cache = cache();
    let mut generator = generator(engine, 16);
    let prompt = engine.tokenizer().encode(&PROMPTS[..12].join("\n"), false).unwrap();
    let options = GenerateOptions::greedy(129).stop_on_eos(false);
    let answered = generator.generate(&prompt, Some(&cache), &options, &mut |_| ControlFlow::Continue(())).unwrap();
    let decode = answered.total - answered.ttft;
    let next: Vec<u32> = prompt.iter().chain(&answered.tokens).copied().collect();
    let cold = answer(&mut generator, &next, None, 1).prefill;
    let warm = answer(&mut generator, &next, Some(&cache), 1);
    assert!(warm.cached_tokens >= next.len() - 17);
    let saved = cache.stats().time_saved;
    let (would_be, took) = (warm.cold_ttft, warm.ttft);
    assert!(would_be > saved && would_be < saved + took, "{would_be:?} cold, {took:?} warm, {saved:?} saved");
    assert!(decode > cold, "decoding {decode:?} takes longer than reading {cold:?}");
    assert!(saved > cold / 3 && saved < cold * 2, "{saved:?} saved, cold it takes {cold:?}");
}

#[test]
fn the_stream_is_the_text_and_can_be_ended() {
    let Some(engine) = engine() else { return };
    let mut generator = generator(engine, 16);
    let prompt = engine.tokenizer().encode(PROMPTS[1], false).unwrap();
    let mut streamed = String::new();
    let options = GenerateOptions::greedy(20);
    let mut count = 0;
    let cut = generator
        .generate(&prompt, None, &options, &mut |step| {
            streamed.push_str(step.text);
            count += 1;
            if count == 5 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .unwrap();
    assert_eq!((cut.finish, cut.tokens.len()), (FinishReason::Cancelled, 5));
    assert_eq!(cut.text, streamed);
    let whole = answer(&mut generator, &prompt, None, 20);
    assert_eq!(whole.tokens[..5], cut.tokens[..]);
    assert_eq!(whole.text, engine.tokenizer().decode(&whole.tokens));
    assert!(whole.ttft <= whole.total && whole.prefill <= whole.ttft);
}

#[test]
fn answers_end_by_themselves_at_the_limit_or_where_the_buffer_is_full() {
    let Some(engine) = engine() else { return };
    let namespace = engine.namespace(16).unwrap();
    let prompt = engine.chat_tokens(&[ChatMessage::new("user", "What is the capital of France?")], true).unwrap();
    let mut generator = Generator::new(engine, prompt.len() + 20, namespace.clone()).unwrap();
    let stopped = answer(&mut generator, &prompt, None, 100);
    assert_eq!(stopped.finish, FinishReason::Stop);
    assert_eq!(stopped.text, "The capital of France is Paris.");
    assert_eq!(answer(&mut generator, &prompt, None, 2).finish, FinishReason::Length);
    let options = GenerateOptions::greedy(100).stop_on_eos(false);
    let full = generator.generate(&prompt, None, &options, &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(full.finish, FinishReason::Context);
    assert_eq!(full.tokens.len(), 21);
    let mut small = Generator::new(engine, 4, namespace).unwrap();
    let error = small.generate(&prompt, None, &options, &mut |_| ControlFlow::Continue(())).unwrap_err();
    assert!(matches!(error, EngineError::ContextOverflow { capacity: 4, .. }), "{error}");
}

#[test]
fn threads_that_ask_at_once_get_the_same_answer() {
    let Some(engine) = engine() else { return };
    let cache = cache();
    let prompt = engine.tokenizer().encode(&PROMPTS[..6].join("\n"), false).unwrap();
    let plain = answer(&mut generator(engine, 16), &prompt, None, 4);
    std::thread::scope(|scope| {
        let ask = || answer(&mut generator(engine, 16), &prompt, Some(&cache), 4);
        let asked: Vec<_> = (0..4).map(|_| scope.spawn(ask)).collect();
        let answers: Vec<Generation> = asked.into_iter().map(|thread| thread.join().unwrap()).collect();
        assert!(answers.iter().all(|answer| answer.tokens == plain.tokens));
        assert_eq!(answers.iter().filter(|answer| answer.cached_tokens == 0).count(), 1);
    });
}

#[test]
fn seeds_repeat_and_differ() {
    let Some(engine) = engine() else { return };
    let mut generator = generator(engine, 16);
    let prompt = engine.tokenizer().encode(PROMPTS[1], false).unwrap();
    let mut sample = |seed| {
        let options = GenerateOptions::greedy(12).sampler(Sampler::new(1.0, 0.95, seed).unwrap());
        generator.generate(&prompt, None, &options, &mut |_| ControlFlow::Continue(())).unwrap().tokens
    };
    assert_eq!(sample(1), sample(1));
    assert_ne!(sample(1), sample(2));
}
