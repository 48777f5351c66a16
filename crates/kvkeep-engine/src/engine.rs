//! The engine: a loaded model, its tokenizer and its threads.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvkeep::{DType, KvLayout, Match, Namespace};
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::chat::{ChatMessage, ChatTemplate};
use crate::config::Config;
use crate::error::{EngineError, Result};
use crate::forward::{Model, Scratch, Segment, Want};
use crate::generate::Cancel;
use crate::gguf::Gguf;
use crate::kv::KvBuffer;
use crate::passes::{Passes, Share, Work};
use crate::rate::PrefillRate;
use crate::simd::Kernels;
use crate::tokenizer::Tokenizer;
use crate::weights::Weights;

/// A tenth of the weight of a thread of usual priority.
#[cfg(target_os = "linux")]
const BACKGROUND_NICE: i32 = 10;

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
    tokenizer: Tokenizer,
    chat: Option<ChatTemplate>,
    pool: ThreadPool,
    passes: Passes,
    prefill_rate: PrefillRate,
    revision: String,
    /// Of the pass that is running.
    scratch: Mutex<Scratch>,
}

/// How to run a model.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct EngineOptions {
    /// Compute threads; `None` takes one for each available core.
    pub threads: Option<usize>,
    /// Use the portable kernels: same bits, many times slower. For tests.
    pub portable: bool,
    /// Compute threads give way to the machine's other threads (nice 10): for a server, whose
    /// other threads have little to do and should do it at once.
    pub background: bool,
    /// Tokens that a prefill computes at once; `None` takes the fastest. Changes no bit.
    pub batch_tokens: Option<usize>,
}

/// The scores of every token of the vocabulary to come next.
#[derive(Debug, Clone, PartialEq)]
pub struct Logits(pub(crate) Vec<f32>);

impl EngineOptions {
    /// With compute threads that give way to others, or not.
    #[must_use]
    pub fn background(mut self, background: bool) -> Self {
        self.background = background;
        self
    }

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
        let background = options.background;
        let pool = ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("kvkeep-{i}"));
        let pool = pool
            .start_handler(move |_| {
                if background {
                    give_way();
                }
            })
            .build()?;
        let kernels = if options.portable { Kernels::scalar() } else { Kernels::detect() };
        let gguf = Gguf::open(path.as_ref())?;
        let config = Config::read(&gguf)?;
        let tokenizer = Tokenizer::read(&gguf)?;
        let chat = gguf.text("tokenizer.chat_template").map(ChatTemplate::new).transpose()?;
        let (weights, revision) =
            pool.install(|| rayon::join(|| Weights::load(&gguf, &config, kernels), || gguf.sha256()));
        let model = Model::new(config, weights?, kernels, threads);
        let scratch = Mutex::new(model.scratch());
        let shared = Shared {
            model,
            tokenizer,
            chat,
            pool,
            passes: Passes::new(options.batch_tokens),
            prefill_rate: PrefillRate::default(),
            revision: revision?,
            scratch,
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// The model's tokenizer.
    #[must_use]
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.shared.tokenizer
    }

    /// The model's name, as its file states it.
    #[must_use]
    pub fn model_name(&self) -> &str {
        &self.shared.model.config.name
    }

    /// SHA-256 of the model file, in lower-case hexadecimal.
    #[must_use]
    pub fn revision(&self) -> &str {
        &self.shared.revision
    }

    /// The most tokens that the model can attend to.
    #[must_use]
    pub fn context_tokens(&self) -> usize {
        self.shared.model.config.context
    }

    /// Memory that the model's weights take.
    #[must_use]
    pub fn weights_bytes(&self) -> usize {
        self.shared.model.weights.bytes()
    }

    /// Compute threads.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.shared.model.threads
    }

    /// A chat as the text that the model reads, for people to look at. Do not encode it: what
    /// somebody wrote could then become a control token. [`Engine::chat_tokens`] prevents that.
    ///
    /// # Errors
    /// [`EngineError::NoChatTemplate`], [`EngineError::ChatTemplate`].
    pub fn chat_prompt(&self, messages: &[ChatMessage], add_generation_prompt: bool) -> Result<String> {
        self.chat()?.text(messages, add_generation_prompt, &self.shared.tokenizer)
    }

    /// A chat as tokens. Control tokens come only from the template, never from what a message
    /// says. With `add_generation_prompt` it ends where the assistant's answer begins.
    ///
    /// # Errors
    /// As [`Engine::chat_prompt`].
    pub fn chat_tokens(&self, messages: &[ChatMessage], add_generation_prompt: bool) -> Result<Vec<u32>> {
        self.chat()?.tokens(messages, add_generation_prompt, &self.shared.tokenizer)
    }

    /// What this engine's KV is cached under: `f16`, `[token][kv_head][head_dim]`, in blocks of
    /// `block_tokens`.
    ///
    /// # Errors
    /// [`EngineError::Cache`] if a block of that size makes no layout.
    pub fn namespace(&self, block_tokens: u32) -> Result<Namespace> {
        let config = &self.shared.model.config;
        let dim = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
        let layout = KvLayout::new(dim(config.layers), dim(config.kv_heads), dim(config.head_dim), DType::F16)?;
        let layout = layout.with_block_tokens(block_tokens)?;
        Ok(Namespace::new(&config.name, layout).with_revision(self.revision()).with_engine(ARITHMETIC))
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
        self.forward(None, tokens, kv, Want::Last, None).map(|(logits, _)| Logits(logits))
    }

    /// Replaces what is in the buffer by the KV of `found`, then as [`Engine::prefill`]: one turn
    /// on the compute threads for the copy and the first batch. Also says how long the copy took.
    ///
    /// # Errors
    /// As [`Engine::prefill`], and [`EngineError::Cache`] for KV of another layout; then the
    /// buffer is empty.
    pub fn resume(&self, found: &Match, tokens: &[u32], kv: &mut KvBuffer) -> Result<(Logits, Duration)> {
        let (logits, load) = self.forward(Some(found), tokens, kv, Want::Last, None)?;
        Ok((Logits(logits), load))
    }

    /// As [`Engine::resume`]. No logits if it is cancelled before the last batch: then the buffer
    /// holds what was computed.
    pub(crate) fn read(
        &self,
        found: Option<&Match>,
        tokens: &[u32],
        cancel: &Cancel,
        kv: &mut KvBuffer,
    ) -> Result<(Option<Logits>, Duration)> {
        let (logits, load) = self.forward(found, tokens, kv, Want::Last, Some(cancel))?;
        Ok((Some(Logits(logits)).filter(|logits| !logits.0.is_empty()), load))
    }

    /// As [`Engine::prefill`] of one token.
    ///
    /// # Errors
    /// As [`Engine::prefill`].
    pub fn decode(&self, token: u32, kv: &mut KvBuffer) -> Result<Logits> {
        self.prefill(&[token], kv)
    }

    /// As [`Engine::prefill`], with the logits of every token. Each takes as much memory as the
    /// vocabulary has tokens, so this is for short texts.
    ///
    /// # Errors
    /// As [`Engine::prefill`].
    pub fn prefill_all_logits(&self, tokens: &[u32], kv: &mut KvBuffer) -> Result<Vec<Logits>> {
        let (all, _) = self.forward(None, tokens, kv, Want::All, None)?;
        Ok(all.chunks_exact(self.shared.model.config.vocabulary).map(|row| Logits(row.to_vec())).collect())
    }

    pub(crate) fn prefill_rate(&self) -> &PrefillRate {
        &self.shared.prefill_rate
    }

    pub(crate) fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        if tokens.is_empty() {
            return Err(EngineError::EmptyTokens);
        }
        let vocabulary = self.shared.model.config.vocabulary;
        match tokens.iter().find(|token| **token as usize >= vocabulary) {
            Some(token) => Err(EngineError::UnknownToken { token: *token, vocabulary }),
            None => Ok(()),
        }
    }

    fn chat(&self) -> Result<&ChatTemplate> {
        self.shared.chat.as_ref().ok_or(EngineError::NoChatTemplate)
    }

    fn forward(
        &self,
        found: Option<&Match>,
        tokens: &[u32],
        kv: &mut KvBuffer,
        want: Want,
        cancel: Option<&Cancel>,
    ) -> Result<(Vec<f32>, Duration)> {
        let Shared { model, pool, passes, .. } = &*self.shared;
        self.check_tokens(tokens)?;
        if !kv.fits(&model.config) {
            return Err(EngineError::ForeignKv);
        }
        kv.check_room(found.map_or(kv.len(), Match::cached_tokens) + tokens.len())?;
        let mut load = Duration::ZERO;
        let lead = match found {
            None => None,
            Some(found) => {
                let (lead, begin) = (passes.turn(), Instant::now());
                pool.install(|| kv.load(found, model.kernels))?;
                load = begin.elapsed();
                Some(lead)
            }
        };
        let mut work = Work { tokens: tokens.to_vec(), done: 0, kv: std::mem::take(kv), want, logits: Vec::new() };
        let pass = |shares: &mut [Share]| self.pass(shares);
        if let Some(lead) = lead {
            work = lead.run(work, pass);
        }
        while work.left() > 0 && !cancel.is_some_and(Cancel::is_cancelled) {
            work = passes.share(work, pass);
        }
        *kv = work.kv;
        Ok((work.logits, load))
    }

    /// One pass over the model with these shares of work, whoever they belong to.
    fn pass(&self, shares: &mut [Share]) {
        let Shared { model, pool, scratch, .. } = &*self.shared;
        let scratch = &mut *scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let mut logits = Vec::new();
        let mut segments: Vec<Segment<'_>> = shares.iter_mut().map(segment).collect();
        let wanted: Vec<usize> = segments.iter().map(|segment| segment.want.rows(segment.tokens.len())).collect();
        pool.install(|| model.pass(&mut segments, scratch, &mut logits));
        let mut rows = logits.chunks_exact(model.config.vocabulary);
        for (Share { work, rows: computed, .. }, wanted) in shares.iter_mut().zip(wanted) {
            work.done += *computed;
            rows.by_ref().take(wanted).for_each(|row| work.logits.extend_from_slice(row));
        }
    }
}

/// Lowers the priority of this thread. Where that is refused it stays as it is: nothing depends on it.
fn give_way() {
    // On Linux a nice value belongs to a thread; elsewhere this would be the whole process.
    #[cfg(target_os = "linux")]
    let _ = rustix::process::setpriority_process(None, BACKGROUND_NICE);
}

fn segment(share: &mut Share) -> Segment<'_> {
    let Share { work, rows, .. } = share;
    let more = work.want == Want::Last && *rows < work.left();
    let want = if more { Want::Nothing } else { work.want };
    let tokens = work.tokens.get(work.done..work.done + *rows).unwrap_or_default();
    Segment { tokens, kv: &mut work.kv, want }
}
