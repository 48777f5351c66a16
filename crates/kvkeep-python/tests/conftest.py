"""What the tests share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import pytest

from kvkeep import KVCache, Namespace, SimpleKVCache


@pytest.fixture
def cache() -> SimpleKVCache:
    return SimpleKVCache(max_size_gb=0.05)


@pytest.fixture
def tokens_cache() -> KVCache:
    return KVCache(max_size_gb=0.05)


@pytest.fixture
def namespace() -> Namespace:
    return Namespace("m", layers=3, kv_heads=2, head_dim=8, dtype="float32", block_tokens=4)


@pytest.fixture(autouse=True)
def nothing_is_left_over() -> Iterator[None]:
    """A tensor that a failed test still holds must not pin pages in the next one."""
    yield
    gc.collect()


def pair(seed: int, shape: tuple[int, ...] = (1, 2, 16, 8), dtype: object = np.float32) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return tuple((random.standard_normal(shape) * 10).astype(dtype) for _ in range(2))  # type: ignore[return-value]


def layers_of(tokens: int, namespace: Namespace, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    shape = namespace.shape(tokens, namespace.k_head_dim)
    return [pair(seed + layer, shape) for layer in range(namespace.layers)]
