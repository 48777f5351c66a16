"""Ctrl-C ends long calls, and leaves the cache as it was or whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from kvkeep import SimpleKVCache

pytestmark = pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no such signals here")

STORE = """
import numpy as np, os, signal, sys, threading, time
from kvkeep import KVCache, Namespace, SimpleKVCache

signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
layer = np.zeros((1 << 27,), np.float32)  # 512 MiB that take no memory: all of it is one page
kind = sys.argv[1]
if kind == "named":
    cache = SimpleKVCache(max_size_gb=4.5)
    store = lambda: cache.cache_all_layers("big", {n: (layer, layer) for n in range(4)})
    stats, again = cache.get_stats, lambda: bool(cache.cache_kv("small", 0, layer[:9], layer[:9]))
else:
    cache = KVCache(max_size_gb=4.5)
    space = Namespace("m", layers=4, kv_heads=1, head_dim=1 << 12, dtype="float32", block_tokens=64)
    kv = layer.reshape(-1, 1, 1 << 12)
    store = lambda: cache.store(space, range(len(kv)), [(kv, kv)] * 4)
    stats, again = cache.stats, lambda: cache.store(space, range(64), [(kv, kv)] * 4).stored_blocks == 1
began = time.monotonic()
ctrl_c = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
ctrl_c.start()
try:
    store()
except KeyboardInterrupt:
    took = time.monotonic() - began
else:
    raise SystemExit("it was not interrupted")
now = stats()
assert now["entries"] == now["used_bytes"] == now["held_bytes"] == 0, now
assert again() and stats()["entries"] > 0
print(took)
"""


@pytest.mark.parametrize("kind", ["named", "tokens"])
def test_a_long_store_is_interrupted_and_nothing_of_it_is_stored(kind: str) -> None:
    """Storing 4 GiB took 19 seconds, and Ctrl-C waited for all of them."""
    run = subprocess.run([sys.executable, "-c", STORE, kind], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    assert float(run.stdout) < 10, "a store of 4 GiB takes longer than to look at signals each 64 MiB"


def test_a_flush_that_waits_is_interrupted_and_what_it_flushes_is_whole(tmp_path: Path) -> None:
    """`flush` waited for the disk, up to `disk_flush_timeout_seconds`, whatever was pressed."""
    script = (
        "import numpy as np, os, signal, sys, threading, time\n"
        "from kvkeep import SimpleKVCache\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "k = np.random.default_rng(1).standard_normal((1 << 22,))\n"
        "cache = SimpleKVCache(2.0, disk_path=sys.argv[1], disk_size_gb=2, disk_write='back')\n"
        "for n in range(8): cache.cache_kv(str(n), 0, k, k + n)\n"
        "threading.Timer(0.03, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "try:\n"
        "    for _ in range(1000): cache.flush(); time.sleep(0.001)\n"
        "except KeyboardInterrupt: pass\n"
        "else: raise SystemExit('it was not interrupted')\n"
        "assert np.array_equal(cache.get_cached_kv('3', 0)[1], k + 3)\n"
        "cache.flush(); cache.close()\n"
    )
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    k = np.random.default_rng(1).standard_normal((1 << 22,))
    with SimpleKVCache(2.0, disk_path=tmp_path, disk_size_gb=2) as cache:
        for number in range(8):
            assert np.array_equal(cache.get_cached_kv(str(number), 0)[1], k + number)


def test_calls_in_other_threads_go_on_when_the_main_one_is_interrupted() -> None:
    cache, done = SimpleKVCache(0.5), threading.Event()
    large = np.zeros((1 << 24,), np.float32)

    def store() -> None:
        for number in range(4):
            assert cache.cache_kv(str(number), 0, large, large)
        done.set()

    thread = threading.Thread(target=store)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            thread.start()
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    assert done.is_set() and cache.get_cached_kv("3", 0) is not None
