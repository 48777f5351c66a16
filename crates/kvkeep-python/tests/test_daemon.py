"""RAM that processes share, from Python: what one stores another one finds, and a daemon that is away costs misses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import layers_of, pair
from daemons import start

from kvkeep import ConfigError, KVCache, Namespace, QuantizedKVCache, SimpleKVCache

STORE = """
import sys
from conftest import pair
from kvkeep import SimpleKVCache

cache = SimpleKVCache(0.01, daemon=sys.argv[1])
assert cache.cache_all_layers("p", {layer: pair(layer) for layer in range(4)})
cache.close()
"""

linux = pytest.mark.skipif(sys.platform != "linux", reason="a daemon needs Linux")
pytestmark = linux


@pytest.fixture
def socket(tmp_path: Path) -> Iterator[Path]:
    daemon = start(tmp_path / "s")
    yield tmp_path / "s"
    daemon.terminate()
    assert daemon.wait(30) == 0


def test_what_another_process_stored_is_found_and_outlives_it(socket: Path) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    subprocess.run([sys.executable, "-c", STORE, str(socket)], env=env, timeout=120, check=True)
    with SimpleKVCache(0.01, daemon=socket) as cache:
        for layer in range(4):
            found = cache.get_cached_kv("p", layer)
            assert found is not None
            for side, right in zip(found, pair(layer), strict=True):
                assert np.array_equal(np.asarray(side), right)
        assert cache.get_stats()["tiers"]["daemon"]["hits"] == 4


def test_blocks_of_tokens_are_shared_between_caches(socket: Path) -> None:
    namespace = Namespace("m", layers=2, kv_heads=1, head_dim=4, dtype="float32", block_tokens=4)
    tokens, layers = list(range(16)), layers_of(16, namespace)
    with KVCache(0.01, daemon=socket) as one, KVCache(0.01, daemon=socket) as other:
        one.store(namespace, tokens, layers)
        one.flush()
        assert other.lookup(namespace, tokens).cached_tokens == 16


def test_what_a_codec_made_smaller_is_shared_too_and_found_under_no_other_codec(socket: Path) -> None:
    k, v = pair(0)
    with QuantizedKVCache(0.01, codec="lossless", daemon=socket) as one:
        assert one.cache_kv("p", 0, k, v)
    with QuantizedKVCache(0.01, codec="lossless", daemon=socket) as other:
        found = other.get_cached_kv("p", 0)
        assert found is not None
        assert all(np.array_equal(np.asarray(side), right) for side, right in zip(found, (k, v), strict=True))
        assert other.get_stats()["tiers"]["daemon"]["hits"] == 1
    with QuantizedKVCache(0.01, codec="int4", daemon=socket) as foreign, SimpleKVCache(0.01, daemon=socket) as plain:
        assert foreign.get_cached_kv("p", 0) is None and plain.get_cached_kv("p", 0) is None


@pytest.mark.parametrize("door", [SimpleKVCache, KVCache, QuantizedKVCache])
def test_an_option_of_tiers_that_there_is_not_is_named_beside_those_that_there_are(door: type) -> None:
    with pytest.raises(TypeError, match="'demon'.*daemon, daemon_token_file, disk"):
        door(0.01, demon="s")


def test_a_daemon_that_dies_costs_misses_and_the_next_one_is_used(tmp_path: Path) -> None:
    first = start(tmp_path / "s")
    with SimpleKVCache(0.01, daemon=tmp_path / "s") as cache:
        assert cache.cache_all_layers("p", {0: pair(0)})
        cache.flush()
        first.send_signal(signal.SIGKILL)
        first.wait(30)
        assert cache.get_cached_kv("other", 0) is None
        assert cache.get_cached_kv("p", 0) is not None, "its own RAM has it"
        assert cache.get_stats()["tiers"]["daemon"]["failing"]
        second = start(tmp_path / "s")
        deadline = time.monotonic() + 30
        while cache.get_stats()["tiers"]["daemon"]["failing"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        second.terminate()


def test_no_daemon_is_no_error_and_a_token_without_one_is(tmp_path: Path) -> None:
    with KVCache(0.01, daemon=tmp_path / "none") as cache:
        assert cache.stats()["tiers"]["daemon"]["failing"]
    with pytest.raises(ConfigError, match="daemon_token_file without daemon"):
        KVCache(0.01, daemon_token_file=tmp_path / "token")
    (tmp_path / "token").write_text("a 0123456789abcdef\n")
    (tmp_path / "token").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        KVCache(0.01, daemon=tmp_path / "none", daemon_token_file=tmp_path / "token")


def test_a_wrong_token_is_refused(socket: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("a 0123456789abcdef\n")
    (tmp_path / "token").chmod(0o600)
    with pytest.raises(ConfigError, match="no tenant has this name"):
        KVCache(0.01, daemon=socket, daemon_token_file=tmp_path / "token")
