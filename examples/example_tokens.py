"""Reuse by tokens, with numpy alone: many prompts that begin alike, and only what is new is computed.

    python examples/example_tokens.py

The model here is arithmetic that is easy to check: the KV of a token depends on all tokens before it, as in a real model.
"""

from __future__ import annotations

import numpy as np

from kvkeep import KVCache, Namespace

LAYERS, KV_HEADS, HEAD_DIM, BLOCK_TOKENS = 2, 2, 8, 16
namespace = Namespace("example", layers=LAYERS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype="float32", block_tokens=BLOCK_TOKENS)
computed_tokens = 0


def prefill(tokens: list[int], first: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """K and V of the tokens from `first` on, for each layer: [tokens, kv_heads, head_dim]."""
    global computed_tokens
    computed_tokens += len(tokens) - first
    sums = np.cumsum(tokens, dtype=np.float32)[first:]
    shape = (len(tokens) - first, KV_HEADS, HEAD_DIM)
    return [tuple(np.broadcast_to((sums + layer + side)[:, None, None], shape).copy() for side in (0, 1)) for layer in range(LAYERS)]


def read_prompt(cache: KVCache, tokens: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The KV of a whole prompt: what is cached is loaded, what is not is computed and stored."""
    with cache.lookup(namespace, tokens) as hit:
        cached = hit.cached_tokens
        before = hit.to_numpy() if cached else None
    new = prefill(tokens, cached)
    kv = [(np.concatenate([b[0], n[0]]), np.concatenate([b[1], n[1]])) for b, n in zip(before, new)] if before else new
    cache.store(namespace, tokens, kv)
    return kv


with KVCache(max_size_gb=0.1) as cache:
    document = list(range(1, 1001))
    for question in range(10):
        prompt = document + [2000 + question] * 8
        kv = read_prompt(cache, prompt)
        for (k, v), (exact_k, exact_v) in zip(kv, prefill(prompt, 0)):
            assert np.array_equal(k, exact_k) and np.array_equal(v, exact_v)
        computed_tokens -= len(prompt)                        # the check's own
    print(f"10 prompts of {len(prompt)} tokens: {computed_tokens} of {10 * len(prompt)} tokens were computed")
    cache.print_stats()
