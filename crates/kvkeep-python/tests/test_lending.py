"""Memory that is lent to a call stays where it is until the call is done, whatever other code does meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from kvkeep import KVCache, Namespace, SimpleKVCache, TokenIdError, UnsupportedTensorError, _kvkeep

TOKENS = 4096
SHAPE = (TOKENS, 2, 64)


@pytest.fixture
def large() -> Namespace:
    """2 MiB a tensor: the GIL is released while it is copied, for long enough to do harm."""
    return Namespace("m", layers=4, kv_heads=2, head_dim=64, dtype="float32", block_tokens=64)


def filled(number: int) -> np.ndarray:
    return np.full(SHAPE, number, np.float32)


def stored(cache: KVCache, namespace: Namespace) -> list[tuple[np.ndarray, np.ndarray]]:
    layers = [(filled(2 * layer), filled(2 * layer + 1)) for layer in range(namespace.layers)]
    assert cache.store(namespace, range(TOKENS), layers).stored_blocks == TOKENS // 64
    return layers


def while_it_runs(call: Callable[[], Any], harm: Callable[[], Any], seconds: float = 0.5) -> int:
    """Calls `call` again and again while another thread does harm; how often."""
    over, calls = time.monotonic() + seconds, 0
    stop = threading.Event()

    def harming() -> None:
        while not stop.is_set():
            harm()

    thread = threading.Thread(target=harming)
    thread.start()
    try:
        while time.monotonic() < over or calls < 3:
            call()
            calls += 1
    finally:
        stop.set()
        thread.join()
    return calls


def test_load_into_a_generator_of_fresh_arrays(large: Namespace) -> None:
    """The arrays of a generator were freed before they were written: SIGSEGV, or another's memory overwritten."""
    cache = KVCache(max_size_gb=0.1)
    stored(cache, large)
    kept: list[np.ndarray] = []

    def fresh() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for _ in range(large.layers):
            pair = np.zeros(SHAPE, np.float32), np.zeros(SHAPE, np.float32)
            kept.extend(array for array in pair if len(kept) < 8)
            yield pair
            del pair

    with cache.lookup(large, range(TOKENS)) as match:
        match.load(fresh())
        assert [array[0, 0, 0] for array in kept] == list(range(8))
        kept.extend([kept[0]] * 8)
        for _ in range(20):
            match.load(fresh())


def test_load_into_a_list_that_another_thread_clears(large: Namespace) -> None:
    """Clearing the list freed its arrays while they were written."""
    cache = KVCache(max_size_gb=0.1)
    stored(cache, large)
    into: list[tuple[np.ndarray, np.ndarray]] = []

    def load() -> None:
        into[:] = [(np.empty(SHAPE, np.float32), np.empty(SHAPE, np.float32)) for _ in range(4)]
        try:
            match.load(into)
        except Exception as error:
            # It was cleared before the call had looked at it: fewer layers, or none.
            assert type(error).__name__ in ("LayerCountError", "ZeroLayersError"), error

    with cache.lookup(large, range(TOKENS)) as match:
        while_it_runs(load, lambda: (into.clear(), np.ones(SHAPE, np.float32), time.sleep(0.0005)))


def test_store_from_a_generator_and_from_a_dict_that_another_thread_clears(large: Namespace) -> None:
    cache = KVCache(max_size_gb=0.1)
    fresh = ((filled(2 * layer), filled(2 * layer + 1)) for layer in range(large.layers))
    assert cache.store(large, range(TOKENS), fresh).stored_blocks == TOKENS // 64
    with cache.lookup(large, range(TOKENS)) as match:
        assert [[float(tensor.min()) for tensor in pair] for pair in match.to_numpy()] == [
            [0, 1], [2, 3], [4, 5], [6, 7],
        ]  # fmt: skip
    simple = SimpleKVCache(max_size_gb=0.1)
    layers: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def store() -> None:
        layers.update({layer: (filled(layer), filled(layer)) for layer in range(4)})
        try:
            simple.cache_all_layers("p", layers)
        except Exception as error:
            assert type(error).__name__ in ("RuntimeError", "ZeroLayersError"), error
        found = simple.get_all_layers("p", 1)
        assert found is None or float(found[0][0].min()) == float(found[0][0].max()) == 0

    while_it_runs(store, lambda: (layers.clear(), np.ones(SHAPE, np.float32), time.sleep(0.0005)))


def test_an_array_cannot_be_resized_while_it_is_lent(large: Namespace) -> None:
    """numpy frees the old memory when it resizes an array that nobody else holds."""
    cache = KVCache(max_size_gb=0.1)
    stored(cache, large)
    rest = [(filled(0), filled(0)) for _ in range(3)]
    cell: list[np.ndarray] = [filled(0)]

    def resize() -> None:
        try:
            cell[0].resize((1, 1, 1))
        except ValueError:
            pass
        time.sleep(0.0002)

    def load() -> None:
        cell[0] = np.empty(SHAPE, np.float32)
        try:
            match.load([(cell[0], filled(0)), *rest])
        except Exception as error:
            assert type(error).__name__ == "ShapeMismatchError", error

    with cache.lookup(large, range(TOKENS)) as match:
        while_it_runs(load, resize)


def test_token_ids_stay_while_they_are_hashed(large: Namespace) -> None:
    cache = KVCache(max_size_gb=0.1)
    cell = [np.arange(1 << 18, dtype=np.uint32)]

    def resize() -> None:
        try:
            cell[0].resize(1)
        except ValueError:
            pass
        time.sleep(0.0002)

    def look() -> None:
        cell[0] = np.arange(1 << 18, dtype=np.uint32)
        assert cache.lookup(large, cell[0]).blocks == 0

    while_it_runs(look, resize)
    raw = cache._raw
    for wrong in [(1 << 40, 8), np.arange(8), np.arange(8, dtype=np.uint32)[::2], [1, 2], None, "ids"]:
        with pytest.raises((TokenIdError, TypeError)):
            raw.lookup(large.raw, wrong)  # type: ignore[arg-type]


def test_token_ids_may_lie_anywhere(large: Namespace) -> None:
    """Ids at an odd address were read as if they lay on a whole one."""
    namespace = Namespace("m", layers=1, kv_heads=1, head_dim=4, dtype="float32", block_tokens=4)
    cache = KVCache(max_size_gb=0.01)
    ids = np.arange(8, dtype=np.uint32)
    odd = np.zeros(33, np.uint8)[1:].view(np.uint32)
    odd[:] = ids
    assert not odd.flags.aligned
    layer = np.ones((8, 1, 4), np.float32)
    assert cache.store(namespace, odd, [(layer, layer)]).stored_blocks == 2
    for tokens in [ids, ids.astype(">u4"), np.repeat(ids, 2)[::2], odd, list(range(8))]:
        assert cache.lookup(namespace, tokens).blocks == 2


def test_what_needs_a_copy_to_be_written_is_refused(large: Namespace) -> None:
    """A temporary copy was written and thrown away, or freed before it was written."""
    cache = KVCache(max_size_gb=0.1)
    stored(cache, large)
    fine = [(filled(9), filled(9)) for _ in range(3)]
    read_only = filled(9)
    read_only.setflags(write=False)
    wrong = {
        "contiguous": np.zeros((TOKENS, 2, 128), np.float32)[..., ::2],
        "byte order": np.zeros(SHAPE, ">f4"),
        "read-only": read_only,
        "no tensor": [[1.0]],
    }
    with cache.lookup(large, range(TOKENS)) as match:
        for message, array in wrong.items():
            with pytest.raises(UnsupportedTensorError, match=message):
                match.load([*fine, (filled(0), array)])
            assert all(float(array.min()) == 9 for pair in fine for array in pair), "nothing was written"
        with pytest.raises(UnsupportedTensorError, match="no tensor"):
            match.load([*fine, (filled(0), memoryview(b"x"))])


def test_raw_calls_take_objects_and_no_addresses(large: Namespace) -> None:
    cache = KVCache(max_size_gb=0.1)
    stored(cache, large)
    address = (1 << 40, 1, SHAPE)
    with cache.lookup(large, range(TOKENS)) as match:
        for new in (False, True):
            with pytest.raises(UnsupportedTensorError, match="tuple is no tensor"):
                match._raw.load(0, [(address, address)] * 4, new)
    simple = SimpleKVCache(max_size_gb=0.01)
    with pytest.raises(UnsupportedTensorError, match="tuple is no tensor"):
        simple._store("p", [(0, address, address)], None, None)
    with pytest.raises(TypeError):
        _kvkeep.Memory()


STRESS = """
import faulthandler, gc, os, random, signal, sys, threading, time
import numpy as np
from kvkeep import KVCache, Namespace, SimpleKVCache
faulthandler.enable()
faulthandler.dump_traceback_later(100, exit=True)
tokens = 512
namespace = Namespace("m", layers=2, kv_heads=2, head_dim=32, dtype="float32", block_tokens=64)
cache, simple = KVCache(max_size_gb=0.004), SimpleKVCache(max_size_gb=0.004)
shape = namespace.shape(tokens, 32)
over = time.monotonic() + float(sys.argv[1])
problems = []


def layers(number):
    return [(np.full(shape, number + layer, np.float32), np.full(shape, -number - layer, np.float32)) for layer in range(2)]


def check(number, found):
    for layer, (k, v) in enumerate(found):
        assert (k == number + layer).all() and (v == -number - layer).all(), (number, layer, k.flat[0], v.flat[0])


def work(seed):
    choose = random.Random(seed)
    held = []
    try:
        while time.monotonic() < over:
            number = choose.randrange(40)
            ids = range(number * 1000, number * 1000 + tokens)
            what = choose.randrange(10)
            if what == 0:
                cache.store(namespace, ids, iter(layers(number)))
            elif what == 1:
                simple.cache_all_layers(f"p{number}", dict(enumerate(layers(number))))
            elif what == 2:
                match = cache.lookup(namespace, ids)
                if match.cached_tokens == tokens:
                    into = [(np.empty(shape, np.float32), np.empty(shape, np.float32)) for _ in range(2)]
                    match.load(pair for pair in into)
                    check(number, into)
                    held.append(match)
            elif what == 3:
                with cache.lookup(namespace, ids) as match:
                    if match.cached_tokens == tokens:
                        check(number, match.to_numpy())
            elif what == 4:
                found = simple.get_all_layers(f"p{number}", 2)
                if found is not None:
                    check(number, [found[layer] for layer in range(2)])
                    views = [(k[1:], v.reshape(-1)[5:]) for k, v in found.values()]
                    del found
                    held.append((number, views))
            elif what == 5 and held:
                kept = held.pop(choose.randrange(len(held)))
                if isinstance(kept, tuple):
                    number, views = kept
                    check(number, views)
                    views[0][0][:] = 77
                else:
                    kept.close()
            elif what == 6:
                choose.choice([cache, simple]).clear()
            elif what == 7:
                gc.collect()
            elif what == 8 and choose.random() < 0.2:
                child = os.fork()
                if child == 0:
                    signal.alarm(30)
                    try:
                        try:
                            cache.store(namespace, ids, layers(99))
                            os._exit(3)
                        except Exception as error:
                            if type(error).__name__ != "ForkError":
                                os._exit(4)
                        for kept in held:
                            if isinstance(kept, tuple):
                                assert kept[1][1][0].flat[0] == kept[0] + 1
                        held.clear(), gc.collect()
                        fresh = SimpleKVCache(max_size_gb=0.01)
                        fresh.cache_all_layers("own", dict(enumerate(layers(1))))
                        check(1, fresh.get_all_layers("own", 2).values())
                        os._exit(0)
                    except BaseException:
                        os._exit(5)
                assert os.waitpid(child, 0)[1] == 0
            elif what == 9:
                cache.stats(), simple.get_stats(), cache.remove(namespace, ids), simple.evict(f"p{number}")
            del held[6:]
    except BaseException as error:
        import traceback
        problems.append(traceback.format_exc())


threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print("\\n".join(problems) or "well")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_threads_generators_views_forks_and_collections_at_once() -> None:
    """In a process of its own: what goes wrong here ends a process."""
    seconds = os.environ.get("KVKEEP_STRESS_SECONDS", "3")
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", STRESS, seconds], capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip()) == (0, "well"), run.stdout + run.stderr
