"""Values that users keep in sets, send to other processes, and compare."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from kvkeep import KVCache, Namespace, Outcome, Rejection, SimpleKVCache, StoreReport

PARTS = dict(
    layers=3, kv_heads=2, head_dim=8, v_head_dim=4, dtype="float16", block_tokens=4, order="head_token",
    revision="r", engine="e", lora="l", salt="s",
)  # fmt: skip


def same(value: object) -> list[object]:
    """The same again, by every way that there is."""
    pickled = [pickle.loads(pickle.dumps(value, protocol)) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)]
    return [copy.copy(value), copy.deepcopy(value), *pickled]


def test_equal_namespaces_are_equal_and_can_be_copied_and_pickled() -> None:
    """Two of the same parts were unequal, and neither `copy` nor `pickle` could make a second one."""
    namespace = Namespace("m", **PARTS)  # type: ignore[arg-type]
    for other in [Namespace("m", **PARTS), *same(namespace)]:  # type: ignore[arg-type]
        assert isinstance(other, Namespace)
        assert other == namespace and hash(other) == hash(namespace) and other.id == namespace.id
        for name in ("model", "layers", "kv_heads", "k_head_dim", "v_head_dim", "dtype", "block_tokens", "order"):
            assert getattr(other, name) == getattr(namespace, name)
    assert len({namespace, *same(namespace)}) == 1 and namespace != "m" and namespace is not None


@pytest.mark.parametrize("part", PARTS)
def test_namespaces_that_differ_in_any_part_are_unequal(part: str) -> None:
    other = {"dtype": "bfloat16", "order": "token_head"}.get(part, "x" if isinstance(PARTS[part], str) else 16)
    one, two = Namespace("m", **PARTS), Namespace("m", **{**PARTS, part: other})  # type: ignore[arg-type]
    assert one != two and one != Namespace("n", **PARTS)  # type: ignore[arg-type]
    assert pickle.loads(pickle.dumps(two)) == two


def test_a_copied_namespace_finds_what_the_first_one_stored() -> None:
    cache = KVCache(max_size_gb=0.01)
    namespace = Namespace("m", layers=1, kv_heads=1, head_dim=4, dtype="float32", block_tokens=4)
    layer = np.ones((8, 1, 4), np.float32)
    cache.store(namespace, range(8), [(layer, layer)])
    for other in same(namespace):
        assert cache.lookup(other, range(8)).cached_tokens == 8  # type: ignore[arg-type]


def test_reports_outcomes_and_rejections_are_values() -> None:
    cache = KVCache(max_size_gb=0.001)
    namespace = Namespace("m", layers=1, kv_heads=1, head_dim=4, dtype="float32", block_tokens=4)
    layer = np.ones((8, 1, 4), np.float32)
    stored = cache.store(namespace, range(8), [(layer, layer)])
    gone = cache.store(namespace, range(100, 108), [(layer[4:], layer[4:])], first_token=4)
    simple = SimpleKVCache(max_size_gb=0.001)
    kept = simple.cache_kv("p", 0, layer, layer)
    big = np.ones((1 << 20,), np.float32)
    refused = simple.cache_kv("q", 0, big, big)
    assert gone.rejection and refused.rejection and stored.rejection is None
    values: list[StoreReport | Outcome | Rejection] = [
        stored, gone, kept, refused, gone.rejection, refused.rejection,
    ]  # fmt: skip
    for value in values:
        for other in same(value):
            assert other == value and hash(other) == hash(value) and repr(other) == repr(value)
    assert len(set(values)) == len(values)
    stats = simple.get_stats()
    assert all(other == stats for other in same(stats))
