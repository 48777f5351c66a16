//! A real model with KV in and out.

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
mod sample;
mod simd;
mod tokenizer;
mod weights;

pub use candle_core::Device;
pub use chat::ChatMessage;
pub use device::{DeviceKv, DeviceModel};
pub use engine::{Engine, EngineOptions, Logits};
pub use error::{EngineError, Result};
pub use generate::{FinishReason, GenerateOptions, Generation, Generator};
pub use kv::KvBuffer;
pub use model_file::{DEFAULT_MODEL, DEFAULT_MODEL_BYTES, ModelFileError, default_model_path, user_cache_dir};
pub use sample::Sampler;
pub use tokenizer::{TextStream, Tokenizer};
