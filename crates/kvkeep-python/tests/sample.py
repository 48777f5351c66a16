"""What a typed program writes: checked with mypy --strict and pyright, and run."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

import kvkeep
from kvkeep import KVCache, Match, Missing, Namespace, Outcome, Rejection, SimpleKVCache, Stats, StoreReport

Array = npt.NDArray[np.float32]


def simple() -> float:
    cache = SimpleKVCache(max_size_gb=0.01, device="cpu", default_ttl_seconds=None)
    k: Array = np.ones((2, 3), np.float32)
    outcome: Outcome = cache.cache_kv("p", 0, k, k, ttl_seconds=5.0)
    why: Rejection | None = outcome.rejection
    assert why is None and outcome
    hit = cache.get_cached_kv("p", 0)
    assert hit is not None
    found = cache.get_all_layers("p", num_layers=1)
    assert found is not None and found[0][0].shape == (2, 3)
    layers: list[int] = cache.evict("p")
    text: str | None = cache.longest_prefix("p")
    assert layers == [0] and text is None
    stats: Stats = cache.get_stats()
    return stats["hit_rate_percent"]


def tokens() -> int:
    cache = KVCache(max_size_gb=0.01, default_ttl_seconds=60)
    namespace = Namespace("m", layers=1, kv_heads=1, head_dim=4, dtype=np.float32, block_tokens=2)

    def prefill(missing: Missing) -> list[tuple[Array, Array]]:
        count = len(missing.tokens)
        return [(np.ones((count, 1, 4), np.float32), np.ones((count, 1, 4), np.float32))]

    match: Match = cache.get_or_prefill(namespace, [1, 2, 3, 4], prefill)
    with match:
        loaded = match.to_numpy()
    assert loaded[0][0].shape == (4, 1, 4)
    report: StoreReport = cache.store(namespace, [1, 2], loaded)
    try:
        cache.lookup(namespace, [])
    except kvkeep.EmptyTokensError as error:
        problem: ValueError = error
        assert str(problem)
    return report.present_blocks


if __name__ == "__main__":
    assert simple() == 100.0
    assert tokens() == 1
