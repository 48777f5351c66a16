//! A real model with KV in and out.

mod acts;
mod attention;
mod config;
mod engine;
mod error;
mod forward;
mod gguf;
mod kv;
mod simd;
mod weights;

pub use engine::{Engine, EngineOptions, Logits};
pub use error::{EngineError, Result};
pub use kv::KvBuffer;
