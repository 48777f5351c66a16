"""The model, and the measuring.

Invariant: both runs send the same requests in the same order through the same code; the only
difference is the cache. Every answer is compared token by token.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
import transformers
from tqdm import tqdm

from kvkeep import KVCache, Stats
from kvkeep.demo.workloads import Agent, Comparison
from kvkeep.transformers import CachedGenerator, FirstToken

VOCABULARY = 8192


@dataclass
class Answer:
    """One request and what came of it."""

    ttft_seconds: float
    prompt_tokens: int
    cached_tokens: int
    tokens: list[int]


@dataclass
class Run:
    """All requests of a demo, without or with the cache."""

    answers: list[Answer] = field(default_factory=list)
    total_seconds: float = 0.0


@dataclass
class Outcome:
    """Both runs of a demo."""

    workload: Comparison | Agent
    model: str
    block_tokens: int
    without: Run
    with_cache: Run
    cache: Stats


def build_model(layers: int = 12) -> transformers.LlamaForCausalLM:
    """A Llama of 88 million parameters (with 12 layers) and random weights: what it says means nothing, what
    it costs is real."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        initializer_range=0.06,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def measure(
    model: transformers.LlamaForCausalLM, workload: Comparison | Agent, max_tokens: int, block_tokens: int, size_gb: float
) -> Outcome:
    """Runs the workload without, then with a fresh cache."""
    cache = KVCache(max_size_gb=size_gb)
    generator = CachedGenerator(model, cache, block_tokens=block_tokens)
    _send(model, None, list(range(3, 131)), 4)  # so that no run pays for the process's first touch of memory

    def run(generator: CachedGenerator | None) -> Run:
        result = Run()
        label = "without" if generator is None else "with kvkeep"
        with tqdm(total=workload.requests, desc=f"{workload.title}, {label}", unit="request") as bar:

            def send(prompt: list[int]) -> list[int]:
                answer = _send(model, generator, prompt, max_tokens)
                result.answers.append(answer)
                bar.update()
                return answer.tokens

            begin = time.perf_counter()
            workload.run(send)
            result.total_seconds = time.perf_counter() - begin
        return result

    without, with_cache = run(None), run(generator)
    name = f"random Llama, {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters, float32"
    return Outcome(workload, name, block_tokens, without, with_cache, cache.stats())


def _send(
    model: transformers.LlamaForCausalLM, generator: CachedGenerator | None, prompt: list[int], max_tokens: int
) -> Answer:
    ids = torch.tensor([prompt])
    # With a mask: without one `generate` hides tokens that look like padding, also in answers that became prompts.
    call = dict(attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False)
    if generator is None:
        first_token = FirstToken()
        output = model.generate(ids, stopping_criteria=[first_token], **call)
        ttft_seconds, cached_tokens = first_token.seconds or 0.0, 0
    else:
        output = generator.generate(ids, **call)
        assert generator.last is not None and generator.last.ttft_seconds is not None
        ttft_seconds, cached_tokens = generator.last.ttft_seconds, generator.last.cached_tokens
    return Answer(ttft_seconds, len(prompt), cached_tokens, output[0, len(prompt) :].tolist())
