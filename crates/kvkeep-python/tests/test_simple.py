"""SimpleKVCache with numpy, by promise."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from conftest import pair

import kvkeep
from kvkeep import SimpleKVCache

DTYPES = ["float32", "float16", "float64", "int8", "uint8", "int16", "int32", "int64"]


@pytest.mark.parametrize("module", ["simple_kv_cache", "kvkeep"])
def test_the_snippet_of_the_readme_runs(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    cache_class = __import__(module).SimpleKVCache
    k, v = pair(1)
    cache = cache_class(max_size_gb=10)
    cache.cache_kv(prefix="user query", layer=0, k_tensor=k, v_tensor=v)
    k_cached, v_cached = cache.get_cached_kv(prefix="user query", layer=0)
    assert np.array_equal(k_cached, k) and np.array_equal(v_cached, v)
    prefix, kv_dict = "another", {layer: pair(layer) for layer in range(32)}
    cache.cache_all_layers(prefix, kv_dict)
    found = cache.get_all_layers(prefix, num_layers=32)
    assert list(found) == list(range(32))
    assert all(np.array_equal(a, b) for layer in found for a, b in zip(found[layer], kv_dict[layer], strict=True))
    assert cache.evict(prefix, 3) == [3]
    assert cache.get_all_layers(prefix, num_layers=32) is None
    assert len(cache.evict(prefix)) == 31
    cache.clear()
    stats = cache.get_stats()
    assert 0 <= stats["hit_rate_percent"] <= 100 and stats["size_mb"] >= 0
    cache.print_stats()
    assert "hit rate" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4,), (3, 5), (1, 2, 7, 8), (1, 1, 1, 1, 1, 2, 3, 4)])
def test_what_comes_back_is_what_came_in(cache: SimpleKVCache, dtype: str, shape: tuple[int, ...]) -> None:
    k, v = pair(2, shape, dtype)
    assert cache.cache_kv("p", 0, k, v)
    for got, put in zip(cache.get_cached_kv("p", 0), (k, v), strict=True):
        assert isinstance(got, np.ndarray) and got.dtype == put.dtype and got.shape == put.shape
        assert np.array_equal(got, put)


def test_extended_dtypes_of_numpy_come_back(cache: SimpleKVCache) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        k, v = pair(2, dtype=getattr(ml_dtypes, name))
        cache.cache_kv("p", 0, k, v)
        got = cache.get_cached_kv("p", 0)[0]
        assert got.dtype == k.dtype and got.tobytes() == k.tobytes()


def test_writing_into_what_came_back_never_changes_what_the_next_reader_gets(cache: SimpleKVCache) -> None:
    kv = {layer: pair(layer, (1, 4, 300, 16)) for layer in range(4)}
    cache.cache_all_layers("p", kv)
    for _ in range(3):
        one, other = cache.get_all_layers("p", 4), cache.get_all_layers("p", 4)
        for layer in range(4):
            one[layer][0][:] = -1
            one[layer][1][0, 0, ::7] = 5
        single = cache.get_cached_kv("p", 2)
        assert np.array_equal(single[0], kv[2][0]) and np.array_equal(single[1], kv[2][1])
        single[0].fill(9)
        for layer in range(4):
            assert np.array_equal(other[layer][0], kv[layer][0])
            assert np.array_equal(other[layer][1], kv[layer][1])
            assert np.all(one[layer][0] == -1), "a reader keeps what it wrote"
        del one, single


def test_changing_what_was_stored_does_not_change_the_cache(cache: SimpleKVCache) -> None:
    k, v = pair(3)
    before = k.copy()
    cache.cache_kv("p", 0, k, v)
    k.fill(0)
    assert np.array_equal(cache.get_cached_kv("p", 0)[0], before)


def test_memory_of_a_result_stays_valid_after_eviction_and_after_the_cache_is_gone() -> None:
    cache = SimpleKVCache(max_size_gb=0.001)
    k, v = pair(4, (1, 8, 64, 16))
    cache.cache_kv("old", 0, k, v)
    held = cache.get_cached_kv("old", 0)
    cache.evict("old")
    for number in range(200):
        cache.cache_kv(f"new {number}", 0, *pair(number, (1, 8, 64, 16)))
    assert cache.get_stats()["evictions"] > 0
    assert np.array_equal(held[0], k) and np.array_equal(held[1], v)
    del cache
    churn = SimpleKVCache(max_size_gb=0.001)
    churn.cache_kv("x", 0, *pair(9, (1, 8, 64, 16)))
    held[0][0, 0, 0, 0] = 42
    assert np.array_equal(held[1], v) and held[0][0, 0, 0, 0] == 42


def test_a_full_cache_evicts_and_one_that_is_all_held_says_so() -> None:
    cache = SimpleKVCache(max_size_gb=0.001)
    big = pair(1, (1, 8, 640, 16))
    assert cache.cache_kv("a", 0, *big) and cache.cache_kv("b", 0, *big)
    assert cache.get_cached_kv("a", 0) is None, "the least recently used made room"
    held = cache.get_cached_kv("b", 0)
    outcome = cache.cache_kv("c", 0, *big)
    assert not outcome and not outcome.stored
    assert outcome.rejection is not None and outcome.rejection.reason == "all_pinned"
    assert cache.get_stats()["held_bytes"] > 0
    del held
    assert cache.get_stats()["held_bytes"] == 0
    assert cache.cache_kv("c", 0, *big)
    too_big = cache.cache_kv("d", 0, *pair(1, (1, 8, 4096, 16)))
    assert too_big.rejection is not None and too_big.rejection.reason == "larger_than_capacity"


def test_the_cap_holds_at_every_moment() -> None:
    cache = SimpleKVCache(max_size_gb=0.002)
    for number in range(100):
        cache.cache_all_layers(str(number), {layer: pair(number, (1, 2, 50 + number, 8)) for layer in range(3)})
        stats = cache.get_stats()
        assert stats["used_bytes"] <= stats["capacity_bytes"]


def test_non_contiguous_and_read_only_inputs_work(cache: SimpleKVCache) -> None:
    k, v = pair(5, (4, 6, 8))
    transposed, strided = k.transpose(2, 0, 1), v[:, ::2]
    transposed.flags.writeable = False
    cache.cache_kv("p", 0, transposed, strided)
    got = cache.get_cached_kv("p", 0)
    assert np.array_equal(got[0], transposed) and np.array_equal(got[1], strided)


def test_entries_expire_and_hits_and_misses_are_counted() -> None:
    cache = SimpleKVCache(max_size_gb=0.01, default_ttl_seconds=3600)
    cache.cache_kv("short", 0, *pair(1), ttl_seconds=0.05)
    cache.cache_kv("long", 0, *pair(2))
    assert cache.get_cached_kv("short", 0) is not None
    time.sleep(0.1)
    assert cache.get_cached_kv("short", 0) is None
    assert cache.get_cached_kv("long", 0) is not None
    assert cache.get_cached_kv("never", 0) is None
    stats = cache.get_stats()
    assert (stats["hits"], stats["misses"], stats["total_requests"]) == (2, 2, 4)
    assert stats["hit_rate_percent"] == 50.0 and stats["expirations"] == 1 and stats["entries"] == 1


def test_time_saved_is_what_callers_reported(cache: SimpleKVCache) -> None:
    cache.cache_kv("p", 0, *pair(1), compute_seconds=1.5)
    cache.get_cached_kv("p", 0)
    cache.get_cached_kv("p", 0)
    assert cache.get_stats()["time_saved_seconds"] == pytest.approx(3.0)


def test_layers_of_different_shapes_and_dtypes_come_back(cache: SimpleKVCache) -> None:
    kv = {0: pair(1, (2, 3), "float32"), 1: pair(2, (5,), "float16"), 2: (pair(3, (7,))[0], pair(4, (1, 9), "int8")[0])}
    cache.cache_all_layers("p", kv)
    found = cache.get_all_layers("p", 3)
    for layer, stored in kv.items():
        for got, put in zip(found[layer], stored, strict=True):
            assert got.dtype == put.dtype and np.array_equal(got, put)


def test_the_longest_stored_prefix_of_a_text_is_found(cache: SimpleKVCache) -> None:
    cache.cache_kv("You are", 0, *pair(1))
    cache.cache_kv("You are helpful.", 0, *pair(1))
    assert cache.longest_prefix("You are helpful. Hi!") == "You are helpful."
    assert cache.longest_prefix("Nobody") is None


def test_an_equal_text_in_another_string_is_the_same_prefix(cache: SimpleKVCache) -> None:
    """The last string's hash is kept by identity: equal and different texts in other objects must not meet it."""
    cache.cache_kv("x" * 1000, 0, *pair(1))
    for text in ("x" * 1000, "".join(["x"] * 1000)):
        assert cache.get_cached_kv(text, 0) is not None
    assert cache.get_cached_kv("x" * 999 + "y", 0) is None
    assert cache.get_cached_kv("x" * 1000, 0) is not None


@pytest.mark.parametrize(
    ("error", "builtin", "call"),
    [
        (kvkeep.EmptyPrefixError, ValueError, lambda c, k: c.cache_kv("", 0, k, k)),
        (kvkeep.EmptyPrefixError, ValueError, lambda c, k: c.get_cached_kv("", 0)),
        (kvkeep.LayerOutOfRangeError, IndexError, lambda c, k: c.cache_kv("p", 4096, k, k)),
        (kvkeep.ZeroLayersError, ValueError, lambda c, k: c.cache_all_layers("p", {})),
        (kvkeep.ZeroLayersError, ValueError, lambda c, k: c.get_all_layers("p", 0)),
        (kvkeep.EmptyTensorError, ValueError, lambda c, k: c.cache_kv("p", 0, k[:0], k)),
        (kvkeep.RankError, ValueError, lambda c, k: c.cache_kv("p", 0, k.reshape((1,) * 9 + (-1,)), k)),
        (kvkeep.UnsupportedTensorError, TypeError, lambda c, k: c.cache_kv("p", 0, [1.0], [2.0])),
        (kvkeep.UnsupportedTensorError, TypeError, lambda c, k: c.cache_kv("p", 0, k.astype("complex64"), k)),
        (kvkeep.UnsupportedTensorError, TypeError, lambda c, k: c.cache_kv("p", 0, k.astype(">f4"), k)),
        (kvkeep.ConfigError, ValueError, lambda c, k: SimpleKVCache(max_size_gb=-1)),
        (kvkeep.ConfigError, ValueError, lambda c, k: SimpleKVCache(max_size_gb=float("nan"))),
        (kvkeep.ConfigError, ValueError, lambda c, k: SimpleKVCache(max_size_gb=1, default_ttl_seconds=-1)),
        (kvkeep.DeviceError, RuntimeError, lambda c, k: SimpleKVCache(max_size_gb=1, device="tpu")),
    ],
)
def test_bad_input_gets_a_clear_error_and_changes_nothing(cache, error, builtin, call) -> None:  # type: ignore[no-untyped-def]
    k, _ = pair(1)
    with pytest.raises(error) as raised:
        call(cache, k)
    assert isinstance(raised.value, (kvkeep.KvkeepError, builtin)) and issubclass(error, builtin)
    assert len(str(raised.value)) > 10
    assert cache.get_stats()["entries"] == 0


def test_a_negative_layer_is_refused(cache: SimpleKVCache) -> None:
    with pytest.raises((OverflowError, IndexError)):
        cache.get_cached_kv("p", -1)


def test_torch_is_never_imported_for_numpy() -> None:
    import subprocess
    import sys

    code = (
        "import sys, numpy, kvkeep; c = kvkeep.SimpleKVCache(1); k = numpy.ones((2, 2));"
        "c.cache_kv('p', 0, k, k); c.get_cached_kv('p', 0); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("pressure", [False, True])
def test_of_8_threads_none_loses_an_update_or_reads_another_ones_bytes(pressure: bool) -> None:
    # All takes 120 MiB. Under pressure what was just stored may be gone, but is never wrong.
    cache = SimpleKVCache(max_size_gb=0.02 if pressure else 0.3)
    errors: list[BaseException] = []
    rounds = 150

    def work(me: int) -> None:
        try:
            for turn in range(rounds):
                prefix = f"thread {me} turn {turn}"
                value = me * 1000 + turn
                k = np.full((2, 3, 64, 16), value, np.int32)
                assert cache.cache_all_layers(prefix, {0: (k, k), 1: (k, k)})
                found = cache.get_all_layers(prefix, 2)
                if found is not None:
                    assert all((t == value).all() for pair in found.values() for t in pair)
                    found[0][0].fill(-1)
                else:
                    assert pressure, "a lost update"
                shared = cache.get_cached_kv(f"thread {(me + 1) % 8} turn {turn}", 1)
                if shared is not None:
                    assert (shared[0] == ((me + 1) % 8) * 1000 + turn).all()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(me,)) for me in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    assert not errors, errors[0]
    stats = cache.get_stats()
    assert stats["stored_total"] == 8 * rounds * 2
    assert (stats["evictions"] > 0) == pressure
    for me, turn in ((me, turn) for me in range(8) for turn in range(rounds)):
        found = cache.get_all_layers(f"thread {me} turn {turn}", 2)
        assert pressure or found is not None, "a lost update"
        if found is not None:
            assert all((t == me * 1000 + turn).all() for pair in found.values() for t in pair)
    del found
    stats = cache.get_stats()
    assert stats["used_bytes"] <= stats["capacity_bytes"]
    assert stats["held_bytes"] == 0


def test_more_readers_of_one_entry_than_there_are_lanes_all_get_their_own_memory(cache: SimpleKVCache) -> None:
    k, v = pair(1)
    cache.cache_kv("p", 0, k, v)
    held = [cache.get_cached_kv("p", 0) for _ in range(300)]
    for number, (a, _) in enumerate(held):
        assert np.array_equal(a, k)
        a.fill(number)
    assert all((a == number).all() for number, (a, _) in enumerate(held))
    assert np.array_equal(cache.get_cached_kv("p", 0)[0], k)
