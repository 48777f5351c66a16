//! A real Llama-family model on the CPU whose KV goes in and out: the engine behind
//! `kvkeep`'s demos and server.
//!
//! Its arithmetic is batch-invariant: every value is computed by one fixed order of
//! operations, whatever the batch, the cut of the prompt, the number of threads or the
//! instruction set. So KV from a cache, from another request, or made while decoding is the
//! KV that a prefill of the whole prompt would have made, to the last bit, and reuse
//! can begin at any block. Engines whose sums depend on the shapes of a batch can only
//! promise "nearly the same answer".
//!
//! ```no_run
//! use std::ops::ControlFlow;
//!
//! use kvkeep::{CacheConfig, KvCache};
//! use kvkeep_engine::{ChatMessage, Engine, EngineOptions, GenerateOptions, Generator};
//!
//! let engine = Engine::load("model.gguf", &EngineOptions::default())?;
//! let cache = KvCache::new(CacheConfig::new(1 << 30))?;
//! let mut generator = Generator::new(&engine, 4096, engine.namespace(64)?)?;
//!
//! let prompt = engine.chat_tokens(&[ChatMessage::new("user", "Why is the sky blue?")], true)?;
//! let answer = generator.generate(&prompt, Some(&cache), &GenerateOptions::greedy(100), &mut |step| {
//!     print!("{}", step.text);
//!     ControlFlow::Continue(())
//! })?;
//! println!("{} of {} tokens cached", answer.cached_tokens, answer.prompt_tokens);
//! # Ok::<(), kvkeep_engine::EngineError>(())
//! ```

mod acts;
mod attention;
mod chat;
mod config;
mod device;
mod engine;
mod error;
mod forward;
mod generate;
mod gguf;
mod kv;
mod model_file;
mod passes;
mod rate;
mod sample;
mod simd;
mod tokenizer;
mod weights;

pub use candle_core::Device;
pub use chat::ChatMessage;
pub use device::{DeviceKv, DeviceModel};
pub use engine::{Engine, EngineOptions, Logits};
pub use error::{EngineError, Result};
pub use generate::{Cancel, FinishReason, GenerateOptions, Generation, Generator, Step};
pub use kv::KvBuffer;
pub use model_file::{DEFAULT_MODEL, DEFAULT_MODEL_BYTES, ModelFileError, default_model_path, user_cache_dir};
pub use sample::Sampler;
pub use tokenizer::{TextStream, Tokenizer};
