"""Fork and spawn."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import layers_of, pair

import kvkeep
from kvkeep import KVCache, Namespace, SimpleKVCache

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


def in_a_child(work) -> str:  # type: ignore[no-untyped-def]
    """Runs `work` in a forked child; what went wrong there, or nothing."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        message = ""
        try:
            work()
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
        os.write(writer, message.encode()[:4000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        message = pipe.read()
    assert os.waitpid(child, 0)[1] == 0, "the child died"
    return message


def test_a_forked_child_gets_a_clear_error_and_the_parent_goes_on(
    cache: SimpleKVCache, tokens_cache: KVCache, namespace: Namespace
) -> None:
    k, v = pair(1)
    cache.cache_kv("p", 0, k, v)
    tokens_cache.store(namespace, range(8), layers_of(8, namespace))
    found = tokens_cache.lookup(namespace, range(8))
    calls = [
        lambda: cache.get_cached_kv("p", 0),
        lambda: cache.cache_kv("p", 0, k, v),
        lambda: cache.get_all_layers("p", 1),
        lambda: cache.clear(),
        lambda: cache.get_stats(),
        lambda: cache.evict("p"),
        lambda: tokens_cache.lookup(namespace, range(8)),
        lambda: tokens_cache.stats(),
        lambda: found.to_numpy(),
    ]

    def work() -> None:
        for number, call in enumerate(calls):
            try:
                call()
            except kvkeep.ForkError as error:
                assert "spawn" in str(error)
            else:
                raise AssertionError(f"call {number} worked after a fork")
        found.close()
        fresh = SimpleKVCache(max_size_gb=0.01)
        fresh.cache_kv("child", 0, k, v)
        assert np.array_equal(fresh.get_cached_kv("child", 0)[0], k)

    assert in_a_child(work) == ""
    assert np.array_equal(cache.get_cached_kv("p", 0)[0], k)
    assert found.to_numpy()
    found.close()


def test_a_childs_inherited_arrays_keep_their_bytes_whatever_the_parent_does() -> None:
    """The parent let go of its array and filled the cache again while the child still read its own: pages that
    a child can see must not change hands."""
    cache = SimpleKVCache(max_size_gb=0.001)
    k, v = pair(1, (1, 8, 64, 16))
    cache.cache_kv("p", 0, k, v)
    held = cache.get_cached_kv("p", 0)
    go, came = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.read(go[0], 1)
        os.write(came[1], b"1" if np.array_equal(held[0], k) and np.array_equal(held[1], v) else b"0")
        os._exit(0)
    del held
    cache.clear()
    for number in range(100):
        cache.cache_kv(str(number), 0, *pair(number + 2, (1, 8, 64, 16)))
    os.write(go[1], b"x")
    assert os.read(came[0], 1) == b"1"
    os.waitpid(child, 0)
    assert cache.get_stats()["held_bytes"] > 0, "the pages that the child saw stay"


def test_spawned_processes_have_caches_of_their_own(tmp_path: Path) -> None:
    script = tmp_path / "work.py"
    script.write_text(
        "import multiprocessing, numpy as np, kvkeep\n"
        "def work(number):\n"
        "    cache = kvkeep.SimpleKVCache(max_size_gb=0.01)\n"
        "    k = np.full((2, 2), number)\n"
        "    cache.cache_kv('p', 0, k, k)\n"
        "    return int(cache.get_cached_kv('p', 0)[0].sum())\n"
        "if __name__ == '__main__':\n"
        "    cache = kvkeep.SimpleKVCache(max_size_gb=0.01)\n"
        "    with multiprocessing.get_context('spawn').Pool(2) as pool:\n"
        "        assert pool.map(work, [1, 2, 3]) == [4, 8, 12]\n"
    )
    import subprocess

    subprocess.run([sys.executable, str(script)], check=True, timeout=100)
    assert "spawn" in multiprocessing.get_all_start_methods()


def test_a_parent_closes_and_opens_its_disk_again_while_a_child_lives(tmp_path: Path) -> None:
    """The child had inherited the open file that the directory is locked by: the parent was refused by itself, with
    its own process id in the error."""
    k, v = pair(1)
    cache = SimpleKVCache(max_size_gb=0.01, disk_path=tmp_path / "kv", disk_size_gb=0.01)
    cache.cache_kv("p", 0, k, v)
    go, came = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.read(go[0], 1)
        try:
            own = SimpleKVCache(max_size_gb=0.01, disk_path=tmp_path / "kv", disk_size_gb=0.01)
            found = own.get_cached_kv("p", 0)
            own.close()
            os.write(came[1], b"1" if found is not None and np.array_equal(found[0], k) else b"0")
        except BaseException:
            os.write(came[1], b"2")
        os._exit(0)
    cache.close()
    for _ in range(3):
        with SimpleKVCache(max_size_gb=0.01, disk_path=tmp_path / "kv", disk_size_gb=0.01) as again:
            assert np.array_equal(again.get_cached_kv("p", 0)[0], k)
    os.write(go[1], b"x")
    assert os.read(came[0], 1) == b"1"
    os.waitpid(child, 0)


def test_clear_close_and_stats_end_in_a_child_born_under_load(tmp_path: Path) -> None:
    """A child could be born while another thread held a lock that nobody there would let go of."""
    import signal
    import threading
    import time

    caches = [SimpleKVCache(max_size_gb=0.01), SimpleKVCache(0.01, disk_path=tmp_path / "kv", disk_size_gb=0.01)]
    k, v = pair(1)
    stop = threading.Event()

    def load(cache: SimpleKVCache) -> None:
        number = 0
        while not stop.is_set():
            cache.cache_kv(str(number % 50), 0, k, v)
            cache.get_cached_kv(str(number % 50), 0)
            cache.get_stats()
            number += 1

    threads = [threading.Thread(target=load, args=(cache,)) for cache in caches for _ in range(2)]
    [thread.start() for thread in threads]
    try:
        for _ in range(15):
            child = os.fork()
            if child == 0:
                signal.alarm(30)
                for cache in caches:
                    for call in (cache.clear, cache.get_stats, cache.flush, cache.close, lambda: cache.evict("1")):
                        try:
                            call()
                        except kvkeep.ForkError:
                            continue
                        os._exit(1)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            time.sleep(0.01)
    finally:
        stop.set()
        [thread.join() for thread in threads]
    caches[1].close()
