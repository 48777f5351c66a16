//! The shape of a Llama-family model, read from GGUF metadata and checked once, so that
//! the kernels can rely on it.

use crate::error::{EngineError, Result};
use crate::gguf::Gguf;
use crate::simd::LANES;

/// Dimensions and constants of a model.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Config {
    pub(crate) name: String,
    pub(crate) layers: usize,
    pub(crate) hidden: usize,
    pub(crate) feed_forward: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) vocabulary: usize,
    pub(crate) context: usize,
    pub(crate) rms_eps: f32,
    pub(crate) rope_base: f64,
    /// Dimensions of a head that are rotated; the others pass through.
    pub(crate) rope_dims: usize,
}

impl Config {
    pub(crate) fn read(gguf: &Gguf) -> Result<Self> {
        let arch = gguf.text("general.architecture").unwrap_or("none");
        if arch != "llama" {
            return Err(EngineError::Unsupported(format!("its architecture is {arch:?}, this engine runs \"llama\"")));
        }
        let tokens = gguf.texts("tokenizer.ggml.tokens");
        let vocabulary = tokens.ok_or_else(|| EngineError::Missing("tokenizer.ggml.tokens".to_owned()))?.len();
        let number = |key: &str| gguf.require_number(&format!("llama.{key}"));
        let heads = number("attention.head_count")?;
        let hidden = number("embedding_length")?;
        let optional = |key: &str| gguf.number(&format!("llama.{key}"));
        let head_dim = optional("attention.key_length").unwrap_or(hidden / heads.max(1));
        #[expect(clippy::cast_possible_truncation, reason = "the file holds it as f32")]
        let rms_eps = gguf
            .real("llama.attention.layer_norm_rms_epsilon")
            .ok_or_else(|| EngineError::Missing("llama.attention.layer_norm_rms_epsilon".to_owned()))?
            as f32;
        let config = Self {
            name: gguf.text("general.name").unwrap_or("llama").to_owned(),
            layers: number("block_count")?,
            hidden,
            feed_forward: number("feed_forward_length")?,
            heads,
            kv_heads: optional("attention.head_count_kv").unwrap_or(heads),
            head_dim,
            vocabulary,
            context: number("context_length")?,
            rms_eps,
            rope_base: gguf.real("llama.rope.freq_base").unwrap_or(10_000.0),
            rope_dims: optional("rope.dimension_count").unwrap_or(head_dim),
        };
        config.checked(gguf)
    }

    fn checked(self, gguf: &Gguf) -> Result<Self> {
        let unsupported = |what: String| Err(EngineError::Unsupported(what));
        for (name, value) in [
            ("layers", self.layers),
            ("hidden", self.hidden),
            ("feed_forward", self.feed_forward),
            ("heads", self.heads),
            ("kv_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("vocabulary", self.vocabulary),
            ("context", self.context),
        ] {
            // Far above any model; keeps products of two from overflowing.
            if value == 0 || value > 1 << 24 {
                return unsupported(format!("{name} is {value}"));
            }
        }
        for (name, value) in
            [("hidden size", self.hidden), ("feed-forward size", self.feed_forward), ("head size", self.head_dim)]
        {
            if !value.is_multiple_of(LANES) {
                return unsupported(format!("its {name} {value} is not a multiple of {LANES}"));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return unsupported(format!("{} heads cannot share {} KV heads", self.heads, self.kv_heads));
        }
        if self.rope_dims > self.head_dim || !self.rope_dims.is_multiple_of(2) {
            return unsupported(format!("it rotates {} of {} dimensions", self.rope_dims, self.head_dim));
        }
        if gguf.number("llama.expert_count").is_some_and(|experts| experts > 0) {
            return unsupported("it is a mixture of experts".to_owned());
        }
        match gguf.text("llama.rope.scaling.type") {
            None | Some("none") => Ok(self),
            Some(scaling) => unsupported(format!("its RoPE scaling is {scaling:?}")),
        }
    }

    /// Query heads that share a KV head.
    pub(crate) fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Floats of all K (or V) heads of one token.
    pub(crate) fn kv_dim(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Floats of all query heads of one token.
    pub(crate) fn q_dim(&self) -> usize {
        self.heads * self.head_dim
    }
}
