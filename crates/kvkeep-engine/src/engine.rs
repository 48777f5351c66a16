//! The engine: a loaded model, its tokenizer and its threads.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::config::Config;
use crate::error::{EngineError, Result};
use crate::forward::{Model, Scratch, Want};
use crate::gguf::Gguf;
use crate::kv::KvBuffer;
use crate::simd::Kernels;
use crate::weights::Weights;

/// What computes KV here, as far as its bits depend on it. Change it with the arithmetic.
const ARITHMETIC: &str = "kvkeep-engine 1: f16 weights and KV, batch-invariant f32 chains";

/// A loaded model. Cheap to clone: clones share weights and threads.
#[derive(Debug, Clone)]
pub struct Engine {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    model: Model,
    pool: ThreadPool,
    revision: String,
    /// Held only to take one out or put it back.
    scratches: Mutex<Vec<Scratch>>,
}

/// How to run a model.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct EngineOptions {
    /// Compute threads; `None` takes one for each available core.
    pub threads: Option<usize>,
    /// Use the portable kernels: same bits, many times slower. For tests.
    pub portable: bool,
    /// Tokens that a prefill computes at once; `None` takes the fastest. Changes no bit.
    pub batch_tokens: Option<usize>,
}

/// The scores of every token of the vocabulary to come next.
#[derive(Debug, Clone, PartialEq)]
pub struct Logits(pub(crate) Vec<f32>);

impl EngineOptions {
    /// With this many compute threads.
    #[must_use]
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads);
        self
    }
}

impl Logits {
    /// One score for each token, by token id.
    #[must_use]
    pub fn as_slice(&self) -> &[f32] {
        &self.0
    }

    /// The token with the highest score; the lowest id of several.
    #[must_use]
    pub fn argmax(&self) -> u32 {
        let mut best = (0u32, f32::NEG_INFINITY);
        for (token, score) in (0u32..).zip(&self.0) {
            if *score > best.1 {
                best = (token, *score);
            }
        }
        best.0
    }
}

impl Engine {
    /// Loads a GGUF file.
    ///
    /// # Errors
    /// [`EngineError::ReadModel`], [`EngineError::BadModel`], [`EngineError::Unsupported`],
    /// [`EngineError::Missing`], [`EngineError::Tokenizer`], or [`EngineError::Threads`].
    pub fn load(path: impl AsRef<Path>, options: &EngineOptions) -> Result<Self> {
        let threads = match options.threads {
            Some(threads) => threads.max(1),
            None => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        };
        let pool = ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("kvkeep-{i}")).build()?;
        let kernels = if options.portable { Kernels::scalar() } else { Kernels::detect() };
        let gguf = Gguf::open(path.as_ref())?;
        let vocabulary = gguf.texts("tokenizer.ggml.tokens").map_or(0, |tokens| tokens.len());
        let config = Config::read(&gguf, vocabulary)?;
        let (weights, revision) =
            pool.install(|| rayon::join(|| Weights::load(&gguf, &config, kernels), || gguf.sha256()));
        let mut model = Model::new(config, weights?, kernels, threads);
        if let Some(batch_tokens) = options.batch_tokens {
            model.batch_tokens = batch_tokens.max(1);
        }
        let shared = Shared { model, pool, revision: revision?, scratches: Mutex::default() };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// An empty KV buffer for up to `capacity_tokens` tokens.
    ///
    /// # Errors
    /// [`EngineError::BadCapacity`] for 0 or more than the model's context.
    pub fn kv(&self, capacity_tokens: usize) -> Result<KvBuffer> {
        KvBuffer::new(&self.shared.model.config, capacity_tokens)
    }

    /// Appends the KV of `tokens` to the buffer; returns the logits of the last one.
    ///
    /// # Errors
    /// [`EngineError::EmptyTokens`], [`EngineError::UnknownToken`],
    /// [`EngineError::ContextOverflow`], [`EngineError::ForeignKv`]; then the buffer is as before.
    pub fn prefill(&self, tokens: &[u32], kv: &mut KvBuffer) -> Result<Logits> {
        self.forward(tokens, kv, Want::Last).map(Logits)
    }

    /// As [`Engine::prefill`] of one token.
    ///
    /// # Errors
    /// As [`Engine::prefill`].
    pub fn decode(&self, token: u32, kv: &mut KvBuffer) -> Result<Logits> {
        self.prefill(&[token], kv)
    }

    fn forward(&self, tokens: &[u32], kv: &mut KvBuffer, want: Want) -> Result<Vec<f32>> {
        let Shared { model, pool, .. } = &*self.shared;
        if tokens.is_empty() {
            return Err(EngineError::EmptyTokens);
        }
        let vocabulary = model.config.vocabulary;
        if let Some(token) = tokens.iter().find(|token| **token as usize >= vocabulary) {
            return Err(EngineError::UnknownToken { token: *token, vocabulary });
        }
        if !kv.fits(&model.config) {
            return Err(EngineError::ForeignKv);
        }
        kv.check_room(kv.len() + tokens.len())?;
        let mut scratch = self.scratches().pop().unwrap_or_else(|| model.scratch());
        let logits = pool.install(|| model.forward(tokens, kv, &mut scratch, want));
        self.scratches().push(scratch);
        Ok(logits)
    }

    fn scratches(&self) -> std::sync::MutexGuard<'_, Vec<Scratch>> {
        self.shared.scratches.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
