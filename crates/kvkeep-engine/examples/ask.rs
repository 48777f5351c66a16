//! Asks the default model one question: `cargo run --release -p kvkeep-engine --example ask -- "Why is the sky blue?"`

use std::io::Write;
use std::ops::ControlFlow;

use kvkeep_engine::{
    ChatMessage, Engine, EngineOptions, GenerateOptions, Generator, default_model_path, user_cache_dir,
};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let question = std::env::args().nth(1).unwrap_or_else(|| "What is the capital of France?".to_owned());
    let path = default_model_path(&user_cache_dir()?, &mut |done, total| eprint!("\r{done} / {total} bytes"))?;
    let engine = Engine::load(path, &EngineOptions::default())?;
    let prompt = engine.chat_tokens(&[ChatMessage::new("user", question)], true)?;
    let mut generator = Generator::new(&engine, 1024, engine.namespace(64)?)?;
    let answer = generator.generate(&prompt, None, &GenerateOptions::greedy(128), &mut |step| {
        print!("{}", step.text);
        match std::io::stdout().flush() {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }
    })?;
    println!("\n[{} + {} tokens, first after {:.1?}]", answer.prompt_tokens, answer.tokens.len(), answer.ttft);
    Ok(())
}
