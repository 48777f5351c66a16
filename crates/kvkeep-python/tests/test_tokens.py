"""KVCache with numpy, by promise."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from conftest import layers_of

import kvkeep
from kvkeep import KVCache, Missing, Namespace


def test_a_hit_returns_exactly_the_bytes_stored(tokens_cache: KVCache, namespace: Namespace) -> None:
    tokens = list(range(11))
    layers = layers_of(11, namespace)
    report = tokens_cache.store(namespace, tokens, layers)
    assert (report.stored_blocks, report.present_blocks, report.rejected_blocks, report.rejection) == (2, 0, 0, None)
    with tokens_cache.lookup(namespace, [*tokens, 99]) as found:
        assert found and found.cached_tokens == 8 and found.blocks == 2
        for (k, v), (want_k, want_v) in zip(found.to_numpy(), layers, strict=True):
            assert np.array_equal(k, want_k[:8]) and np.array_equal(v, want_v[:8])
        roomy = found.to_numpy(room_tokens=20)
        assert roomy[0][0].shape == (20, 2, 8) and np.array_equal(roomy[1][1][:8], layers[1][1][:8])
    assert found.closed
    with pytest.raises(kvkeep.ClosedError):
        found.to_numpy()


@pytest.mark.parametrize("order", ["token_head", "head_token"])
def test_some_layers_are_loaded_into_arrays_of_the_caller(tokens_cache: KVCache, order: str) -> None:
    namespace = Namespace(
        "m", layers=4, kv_heads=2, head_dim=8, v_head_dim=6, dtype="f16", block_tokens=4, order=order  # type: ignore[arg-type]
    )
    random = np.random.default_rng(0)
    layers = [
        tuple(random.standard_normal(namespace.shape(10, dim)).astype(np.float16) for dim in (8, 6)) for _ in range(4)
    ]
    tokens_cache.store(namespace, range(10), layers)  # type: ignore[arg-type]
    found = tokens_cache.lookup(namespace, np.arange(10))
    into = [tuple(np.zeros(namespace.shape(12, dim), np.float16) for dim in (8, 6)) for _ in range(2)]
    found.load(into, first_layer=1)  # type: ignore[arg-type]
    axis = 0 if order == "token_head" else 1
    for target, source in zip(into, layers[1:3], strict=True):
        for got, want in zip(target, source, strict=True):
            assert np.array_equal(got.take(range(8), axis), want.take(range(8), axis))
            assert not got.take(range(8, 12), axis).any(), "what was not matched is left alone"


def test_tokens_are_taken_as_lists_arrays_of_any_integer_and_ranges(tokens_cache: KVCache, namespace: Namespace) -> None:
    tokens_cache.store(namespace, [1, 2, 3, 4], layers_of(4, namespace))
    for tokens in ([1, 2, 3, 4], (1, 2, 3, 4), range(1, 5), np.array([1, 2, 3, 4], np.int64), np.arange(1, 9)[:4],
                   np.arange(2, 10, 2, dtype=np.uint16) // 2, np.arange(1, 5, dtype=np.uint32)):  # fmt: skip
        assert tokens_cache.lookup(namespace, tokens).cached_tokens == 4
    for wrong in ([-1], [2**32], [1.5], [[1, 2]], ["a"], 5, None):
        with pytest.raises(kvkeep.TokenIdError):
            tokens_cache.lookup(namespace, wrong)  # type: ignore[arg-type]
    with pytest.raises(kvkeep.EmptyTokensError):
        tokens_cache.lookup(namespace, [])


def test_namespaces_see_nothing_of_each_other(tokens_cache: KVCache) -> None:
    base = dict(layers=3, kv_heads=2, head_dim=8, dtype="float32", block_tokens=4)
    one = Namespace("m", **base)  # type: ignore[arg-type]
    tokens_cache.store(one, range(8), layers_of(8, one))
    for other in (
        Namespace("n", **base),  # type: ignore[arg-type]
        Namespace("m", **base, salt="secret"),  # type: ignore[arg-type]
        Namespace("m", **base, lora="x"),  # type: ignore[arg-type]
        Namespace("m", **base, revision="2"),  # type: ignore[arg-type]
        Namespace("m", **base, engine="e"),  # type: ignore[arg-type]
    ):
        assert other.id != one.id
        assert not tokens_cache.lookup(other, range(8))
        assert "secret" not in repr(other)
    assert tokens_cache.clear(Namespace("n", **base)) == 0  # type: ignore[arg-type]
    assert tokens_cache.clear(one) == 2


def test_what_is_pinned_is_not_evicted(namespace: Namespace) -> None:
    cache = KVCache(max_size_gb=4 * 4096 / 2**30)
    cache.store(namespace, range(4), layers_of(4, namespace))
    with cache.pin(namespace, range(4)) as pinned:
        assert pinned.cached_tokens == 4
        for start in range(100, 200, 4):
            cache.store(namespace, range(start, start + 4), layers_of(4, namespace))
        assert cache.lookup(namespace, range(4)).cached_tokens == 4
    stats = cache.stats()
    assert stats["evictions"] > 0 and stats["used_bytes"] <= stats["capacity_bytes"]


def test_storing_behind_a_gap_is_a_stated_rejection(tokens_cache: KVCache, namespace: Namespace) -> None:
    report = tokens_cache.store(namespace, range(12), layers_of(8, namespace), first_token=4)
    assert report.stored_blocks == 0 and report.rejection is not None and report.rejection.reason == "prefix_gone"
    assert tokens_cache.store(namespace, range(4), layers_of(4, namespace)).stored_blocks == 1
    assert tokens_cache.store(namespace, range(12), layers_of(8, namespace), first_token=4).stored_blocks == 2
    assert tokens_cache.remove(namespace, range(12)) == 3


def test_get_or_prefill_computes_only_what_is_missing(tokens_cache: KVCache, namespace: Namespace) -> None:
    layers = layers_of(12, namespace)
    tokens_cache.store(namespace, range(4), [(k[:4], v[:4]) for k, v in layers])
    seen: list[int] = []

    def prefill(missing: Missing) -> list[tuple[np.ndarray, np.ndarray]]:
        seen.append(missing.first_token)
        assert list(missing.tokens) == list(range(4, 12))
        assert missing.cached is not None and np.array_equal(missing.cached.to_numpy()[0][0], layers[0][0][:4])
        return [(k[4:], v[4:]) for k, v in layers]

    for _ in range(2):
        with tokens_cache.get_or_prefill(namespace, range(12), prefill) as found:
            assert found.cached_tokens == 12
            assert all(np.array_equal(a[0], b[0]) for a, b in zip(found.to_numpy(), layers, strict=True))
    assert seen == [4], "the second call finds all"


def test_of_threads_that_miss_the_same_prompt_one_computes(tokens_cache: KVCache, namespace: Namespace) -> None:
    layers = layers_of(8, namespace)
    computed: list[int] = []
    found: list[int] = []

    def prefill(missing: Missing) -> list[tuple[np.ndarray, np.ndarray]]:
        computed.append(missing.first_token)
        time.sleep(0.2)  # long enough for every other thread to come and wait
        return layers

    def work() -> None:
        found.append(tokens_cache.get_or_prefill(namespace, range(8), prefill).cached_tokens)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert computed == [0] and found == [8] * 8


def test_a_prefill_that_raises_leaves_the_flight_to_the_next(tokens_cache: KVCache, namespace: Namespace) -> None:
    def fails(missing: Missing) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        tokens_cache.get_or_prefill(namespace, range(8), fails)
    found = tokens_cache.get_or_prefill(namespace, range(8), lambda missing: layers_of(8, namespace))
    assert found.cached_tokens == 8


@pytest.mark.parametrize(
    ("error", "builtin", "change"),
    [
        (kvkeep.LayerCountError, ValueError, lambda layers: layers[:2]),
        (kvkeep.ZeroLayersError, ValueError, lambda layers: []),
        (kvkeep.DTypeMismatchError, TypeError, lambda layers: [(k.astype("float16"), v) for k, v in layers]),
        (kvkeep.ShapeMismatchError, ValueError, lambda layers: [(k[:2], v) for k, v in layers]),
        (kvkeep.UnsupportedTensorError, TypeError, lambda layers: [("k", "v") for _ in layers]),
    ],
)
def test_tensors_that_do_not_fit_are_refused_and_nothing_is_stored(  # type: ignore[no-untyped-def]
    tokens_cache: KVCache, namespace: Namespace, error, builtin, change
) -> None:
    with pytest.raises(error) as raised:
        tokens_cache.store(namespace, range(8), change(layers_of(8, namespace)))
    assert isinstance(raised.value, builtin) and isinstance(raised.value, kvkeep.KvkeepError)
    assert tokens_cache.stats()["entries"] == 0


def test_targets_that_cannot_be_written_are_refused(tokens_cache: KVCache, namespace: Namespace) -> None:
    tokens_cache.store(namespace, range(8), layers_of(8, namespace))
    found = tokens_cache.lookup(namespace, range(8))
    good = found.to_numpy()
    read_only = good[0][0].copy()
    read_only.flags.writeable = False
    shared = np.zeros((8, 2, 8), np.float32)
    for error, into in [
        (kvkeep.UnsupportedTensorError, [(read_only, good[0][1])]),
        (kvkeep.UnsupportedTensorError, [(np.zeros((2, 8, 8), np.float32).transpose(1, 0, 2), good[0][1])]),
        (kvkeep.OverlapError, [(shared, shared)]),
        (kvkeep.ShapeMismatchError, [(np.zeros((4, 2, 8), np.float32), good[0][1])]),
        (kvkeep.DTypeMismatchError, [(np.zeros((8, 2, 8)), good[0][1])]),
    ]:
        with pytest.raises(error):
            found.load(into)
    with pytest.raises(kvkeep.LayerOutOfRangeError):
        found.load(good, first_layer=1)
    with pytest.raises(kvkeep.ZeroLayersError):
        found.load([])


def test_layouts_that_make_no_block_are_refused() -> None:
    for wrong in (dict(layers=0), dict(head_dim=0), dict(block_tokens=0), dict(order="sideways"), dict(layers=-1)):
        with pytest.raises(kvkeep.LayoutError):
            Namespace("m", **{**dict(layers=1, kv_heads=1, head_dim=1, dtype="f32"), **wrong})  # type: ignore[arg-type]
    with pytest.raises(kvkeep.UnsupportedTensorError):
        Namespace("m", layers=1, kv_heads=1, head_dim=1, dtype="complex64")


def test_every_error_of_the_library_has_its_class() -> None:
    names = {name for name in dir(kvkeep) if name.endswith("Error") and name != "KvkeepError"}
    assert len(names) >= 20
    for name in names:
        error = getattr(kvkeep, name)
        assert issubclass(error, kvkeep.KvkeepError) and error.__doc__ and error.__mro__[2] is not Exception
