//! Prompts to answers, with the cache in between.
//!
//! The longest cached prefix is copied in, the rest computed, the full blocks of the
//! prompt stored before the first token comes out (so that others who wait for the same
//! prefix get it), those of the answer at its end: KV made while decoding has the same
//! bits as KV made by a prefill. Whoever is cancelled while its prompt is read leaves what was
//! computed up to there.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kvkeep::{Chain, KvCache, Match, Missing, Namespace, StoreOptions};

use crate::engine::{Engine, Logits};
use crate::error::{EngineError, Result};
use crate::kv::KvBuffer;
use crate::rate::share;
use crate::sample::Sampler;

/// Answers prompts one after the other; each thread has its own. Keeps its KV buffer, so
/// that a request touches no fresh memory.
#[derive(Debug)]
pub struct Generator {
    engine: Engine,
    namespace: Namespace,
    kv: KvBuffer,
}

/// How to answer.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct GenerateOptions {
    /// The most tokens to answer with; at least 1 is computed.
    pub max_tokens: usize,
    /// How tokens are picked.
    pub sampler: Sampler,
    /// Does a token that ends an answer end it?
    pub stop_on_eos: bool,
    /// Ends it from another thread.
    pub cancel: Cancel,
}

/// Ends an answer from another thread: before its next token, or while the prompt is read, before
/// the next batch. Clones are one and the same.
#[derive(Debug, Clone, Default)]
pub struct Cancel(Arc<AtomicBool>);

/// A token of an answer, as it comes.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Step<'a> {
    /// The token.
    pub token: u32,
    /// The text that it completes: empty in the middle of a character.
    pub text: &'a str,
    /// What it was picked from.
    pub logits: &'a Logits,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FinishReason {
    /// The model ended it.
    Stop,
    /// `max_tokens` were answered.
    Length,
    /// The KV buffer is full.
    Context,
    /// The callback or [`Cancel`] said so.
    Cancelled,
}

/// An answer, and what it took.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Generation {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of these, tokens whose KV came from the cache.
    pub cached_tokens: usize,
    /// Those by the tier that gave them: its name, `ram` first, and its tokens.
    pub tiers: Vec<(String, usize)>,
    /// The answer, without a token that ends it.
    pub tokens: Vec<u32>,
    /// The answer as text.
    pub text: String,
    /// From the call to the first token, or to the end if there is none.
    pub ttft: Duration,
    /// Of this, computing the part of the prompt that was not cached.
    pub prefill: Duration,
    /// What `ttft` would have been without the cache: by what computing took, when it was stored, of all
    /// that was found.
    pub cold_ttft: Duration,
    /// From the call to the end, storing included.
    pub total: Duration,
    /// Why it ended.
    pub finish: FinishReason,
    /// The blocks of the prompt that the cache can hold, if it was asked: hashed once for whoever wants their names.
    pub chain: Option<Chain>,
}

/// A prompt in the KV buffer.
struct Computed {
    /// `None` if it was cancelled.
    logits: Option<Logits>,
    cached_tokens: usize,
    tiers: Vec<(String, usize)>,
    /// Computing what was not cached.
    prefill: Duration,
    /// Copying what was.
    load: Duration,
    /// What computing that took.
    spared: Duration,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self { max_tokens: 256, sampler: Sampler::greedy(), stop_on_eos: true, cancel: Cancel::default() }
    }
}

impl GenerateOptions {
    /// Greedy, up to this many tokens, ended by the model.
    #[must_use]
    pub fn greedy(max_tokens: usize) -> Self {
        Self { max_tokens, ..Self::default() }
    }

    /// With another sampler.
    #[must_use]
    pub fn sampler(mut self, sampler: Sampler) -> Self {
        self.sampler = sampler;
        self
    }

    /// Whether a token that ends an answer ends it.
    #[must_use]
    pub fn stop_on_eos(mut self, stop: bool) -> Self {
        self.stop_on_eos = stop;
        self
    }

    /// Ended by this.
    #[must_use]
    pub fn cancel(mut self, cancel: Cancel) -> Self {
        self.cancel = cancel;
        self
    }
}

impl Cancel {
    /// Ends the answer.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Was it ended?
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl Generator {
    /// With room for `capacity_tokens` tokens of prompt and answer together. `namespace` is
    /// [`Engine::namespace`], perhaps with a tenant's salt.
    ///
    /// # Errors
    /// [`EngineError::BadCapacity`], or [`EngineError::ForeignKv`] if the namespace has
    /// another layout than the engine.
    pub fn new(engine: &Engine, capacity_tokens: usize, namespace: Namespace) -> Result<Self> {
        check_namespace(engine, &namespace)?;
        Ok(Self { engine: engine.clone(), namespace, kv: engine.kv(capacity_tokens)? })
    }

    /// The engine that answers.
    #[must_use]
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The namespace under which KV is cached.
    #[must_use]
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Answers under another namespace from now on, such as another tenant's.
    ///
    /// # Errors
    /// [`EngineError::ForeignKv`] if it has another layout than the engine.
    pub fn set_namespace(&mut self, namespace: Namespace) -> Result<()> {
        check_namespace(&self.engine, &namespace)?;
        self.namespace = namespace;
        Ok(())
    }

    /// Answers a prompt. `on_step` gets each token, and may end the answer.
    ///
    /// # Errors
    /// [`EngineError::EmptyTokens`], [`EngineError::UnknownToken`],
    /// [`EngineError::ContextOverflow`] if the prompt does not fit, [`EngineError::Cache`].
    pub fn generate(
        &mut self,
        prompt: &[u32],
        cache: Option<&KvCache>,
        options: &GenerateOptions,
        on_step: &mut dyn FnMut(Step<'_>) -> ControlFlow<()>,
    ) -> Result<Generation> {
        let begin = Instant::now();
        self.engine.check_tokens(prompt)?;
        self.kv.check_room(prompt.len())?;
        let (computed, pin) = self.prefill(prompt, cache, &options.cancel)?;
        let mut sampler = options.sampler.clone();
        let first = computed.logits.map(|logits| (sampler.pick(&logits), logits));
        let mut generation = Generation {
            prompt_tokens: prompt.len(),
            cached_tokens: computed.cached_tokens,
            tiers: computed.tiers,
            tokens: Vec::new(),
            text: String::new(),
            ttft: begin.elapsed(),
            prefill: computed.prefill,
            cold_ttft: (begin.elapsed() + computed.spared).saturating_sub(computed.load),
            total: Duration::ZERO,
            finish: FinishReason::Cancelled,
            chain: None,
        };
        let decode = Instant::now();
        if let Some(first) = first {
            generation.finish = self.answer(first, &mut sampler, options, on_step, &mut generation)?;
        }
        if let (Some(cache), Some((pin, chain))) = (cache, &pin) {
            self.store_answer(prompt, &generation.tokens, cache, (pin, chain), decode.elapsed())?;
        }
        generation.chain = pin.map(|(_, chain)| chain);
        generation.total = begin.elapsed();
        Ok(generation)
    }

    /// The match pins the prompt's blocks, so that the answer's can be stored behind them.
    fn prefill(
        &mut self,
        prompt: &[u32],
        cache: Option<&KvCache>,
        cancel: &Cancel,
    ) -> Result<(Computed, Option<(Match, Chain)>)> {
        self.kv.truncate(0);
        // The last token is always computed: its logits are not in the cache.
        let reusable = prompt.get(..prompt.len() - 1).unwrap_or_default();
        let (engine, namespace, kv) = (&self.engine, &self.namespace, &mut self.kv);
        let block_tokens = namespace.layout().block_tokens();
        let (Some(cache), false) = (cache, reusable.is_empty()) else {
            return Ok((compute(engine, prompt, None, cancel, kv)?, None));
        };
        let mut computed = None;
        let chain = Chain::of(namespace, reusable)?.with_token_ids(reusable);
        let pin = cache.get_or_prefill_chain(&chain, |missing: &Missing<'_>| {
            let now = compute(engine, prompt, Some(missing.cached()), cancel, kv)?;
            // Cut short, so that others who wait for the rest compute it.
            let read = chain.continued(reusable.get(..kv.len()).unwrap_or(reusable));
            if read.tokens() > now.cached_tokens {
                // What is behind the last full block was computed too, and is not kept.
                let kept = (read.tokens() / block_tokens * block_tokens).saturating_sub(now.cached_tokens);
                let time = share(now.prefill, kept, kv.len().saturating_sub(now.cached_tokens));
                let options = StoreOptions::default().compute_time(time);
                cache.store_chain(&read, now.cached_tokens, &kv.views_from(now.cached_tokens)?, &options)?;
            }
            computed = Some(now);
            Ok::<(), EngineError>(())
        })?;
        let computed = match computed {
            Some(computed) => computed,
            None => compute(engine, prompt, Some(&pin), cancel, kv)?,
        };
        Ok((computed, Some((pin, chain))))
    }

    fn answer(
        &mut self,
        first: (u32, Logits),
        sampler: &mut Sampler,
        options: &GenerateOptions,
        on_step: &mut dyn FnMut(Step<'_>) -> ControlFlow<()>,
        generation: &mut Generation,
    ) -> Result<FinishReason> {
        let tokenizer = self.engine.tokenizer();
        let mut stream = tokenizer.stream();
        let (mut token, mut logits) = first;
        let finish = loop {
            if options.stop_on_eos && tokenizer.is_end(token) {
                break FinishReason::Stop;
            }
            generation.tokens.push(token);
            let text = stream.push(token);
            generation.text.push_str(text);
            if on_step(Step { token, text, logits: &logits }).is_break() || options.cancel.is_cancelled() {
                break FinishReason::Cancelled;
            }
            if generation.tokens.len() >= options.max_tokens {
                break FinishReason::Length;
            }
            if self.kv.len() == self.kv.capacity() {
                break FinishReason::Context;
            }
            logits = self.engine.decode(token, &mut self.kv)?;
            token = sampler.pick(&logits);
        };
        generation.text.push_str(stream.finish());
        Ok(finish)
    }

    /// Stores the full blocks behind the prompt's own. They are worth what a prefill of them would
    /// take, which is much less than decoding them did.
    fn store_answer(
        &self,
        prompt: &[u32],
        answer: &[u32],
        cache: &KvCache,
        (pin, chain): (&Match, &Chain),
        decode: Duration,
    ) -> Result<()> {
        // The last token of an answer has no KV: nothing was computed from it.
        let tokens: Vec<u32> = prompt.iter().chain(answer).copied().take(self.kv.len()).collect();
        let block_tokens = self.namespace.layout().block_tokens();
        let first = pin.cached_tokens();
        let stored = (tokens.len() / block_tokens * block_tokens).saturating_sub(first);
        if stored > 0 {
            let compute_time = self.engine.prefill_rate().time(stored).map_or(decode, |prefill| prefill.min(decode));
            let options = StoreOptions::default().compute_time(compute_time);
            cache.store_chain(&chain.continued(&tokens), first, &self.kv.views_from(first)?, &options)?;
        }
        Ok(())
    }
}

/// Loads what is cached of a prompt and computes the rest, or as much of it as comes before it
/// is cancelled.
fn compute(
    engine: &Engine,
    prompt: &[u32],
    found: Option<&Match>,
    cancel: &Cancel,
    kv: &mut KvBuffer,
) -> Result<Computed> {
    let begin = Instant::now();
    let cached_tokens = found.map_or(0, Match::cached_tokens);
    let (logits, load) = engine.read(found, prompt.get(cached_tokens..).unwrap_or_default(), cancel, kv)?;
    let prefill = begin.elapsed().saturating_sub(load);
    engine.prefill_rate().measured(kv.len().saturating_sub(cached_tokens), prefill);
    let (tiers, spared) = found.map(|found| (found.tiers(), found.compute_time())).unwrap_or_default();
    Ok(Computed { logits, cached_tokens, tiers, prefill, load, spared })
}

fn check_namespace(engine: &Engine, namespace: &Namespace) -> Result<()> {
    let layout = namespace.layout();
    let own = engine.namespace(u32::try_from(layout.block_tokens()).unwrap_or(u32::MAX))?;
    if own.layout() == layout { Ok(()) } else { Err(EngineError::ForeignKv) }
}
