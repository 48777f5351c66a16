"""The disk tier from Python, by promise."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from conftest import layers_of, pair

import kvkeep
from kvkeep import KVCache, Namespace, SimpleKVCache

STORE = """
import os, signal, sys
from conftest import layers_of, pair
from kvkeep import KVCache, Namespace, SimpleKVCache

path, end = sys.argv[1], sys.argv[2]
cache = SimpleKVCache(0.01, disk_path=path, disk_size_gb=0.1)
assert cache.cache_all_layers("p", {layer: pair(layer) for layer in range(4)})
if end == "kill":
    cache.flush()
    os.kill(os.getpid(), signal.SIGKILL)
cache.close()
"""


def in_another_process(code: str, *args: object) -> int:
    folder = str(Path(__file__).parent)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, *sys.path])}
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], env=env, timeout=120).returncode


def found(cache: SimpleKVCache) -> bool:
    layers = cache.get_all_layers("p", 4)
    if layers is None:
        return False
    assert all(np.array_equal(a, b) for layer in layers for a, b in zip(layers[layer], pair(layer), strict=True))
    return True


@pytest.mark.parametrize(("end", "code"), [("close", 0), ("kill", -signal.SIGKILL)])
def test_what_was_stored_is_found_after_a_restart_and_after_a_kill(tmp_path: Path, end: str, code: int) -> None:
    assert in_another_process(STORE, tmp_path / "kv", end) == code
    with SimpleKVCache(0.01, disk_path=tmp_path / "kv", disk_size_gb=0.1) as cache:
        assert cache.longest_prefix("p and more") == "p"
        assert found(cache)
        disk = cache.get_stats()["disk"]
        assert disk is not None and disk["hits"] == 4 and disk["entries"] == 4 and not disk["failing"]
        assert disk["used_bytes"] <= disk["capacity_bytes"]


def test_blocks_are_found_after_a_restart_and_can_be_prefetched(tmp_path: Path, namespace: Namespace) -> None:
    tokens = range(12)
    with KVCache(0.01, disk_path=tmp_path / "kv", disk_size_gb=0.1) as cache:
        cache.store(namespace, tokens, layers_of(12, namespace), compute_seconds=10)
        whole = cache.lookup(namespace, tokens).to_numpy()
        cache.flush()
    with KVCache(0.01, disk_path=tmp_path / "kv", disk_size_gb=0.1) as cache:
        assert cache.prefetch(namespace, tokens) == len(whole[0][0])
        with cache.lookup(namespace, tokens) as match:
            assert match.cached_tokens == len(whole[0][0])
            for got, put in zip(match.to_numpy(), whole, strict=True):
                assert np.array_equal(got[0], put[0]) and np.array_equal(got[1], put[1])


def test_files_are_their_owners_alone(tmp_path: Path) -> None:
    with SimpleKVCache(0.01, disk_path=tmp_path / "kv", disk_size_gb=0.1) as cache:
        cache.cache_kv("p", 0, *pair(1))
        cache.flush()
        modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "kv").iterdir()}
        assert modes == {0o600}


def test_a_directory_that_is_in_use_is_named_with_its_process(tmp_path: Path) -> None:
    with SimpleKVCache(0.01, disk_path=tmp_path / "kv", disk_size_gb=0.1):
        with pytest.raises(kvkeep.DiskLockedError, match=str(os.getpid())) as error:
            SimpleKVCache(0.01, disk_path=tmp_path / "kv", disk_size_gb=0.1)
        assert isinstance(error.value, OSError)
    SimpleKVCache(0.01, disk_path=tmp_path / "kv", disk_size_gb=0.1).close()


def test_an_encrypted_directory_opens_with_its_key_alone_and_shows_no_payload(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(os.urandom(32))
        (tmp_path / name).chmod(0o600)
    k = np.frombuffer(b"a text that must not be readable" * 256, dtype=np.uint8)
    with SimpleKVCache(0.01, disk_path=tmp_path / "kv", disk_size_gb=0.1, disk_key_file=tmp_path / "one") as cache:
        cache.cache_kv("p", 0, k, k)
    assert all(b"must not be readable" not in file.read_bytes() for file in (tmp_path / "kv").iterdir())
    for key in (None, tmp_path / "two"):
        with pytest.raises(kvkeep.DiskRefusedError):
            SimpleKVCache(0.01, disk_path=tmp_path / "kv", disk_size_gb=0.1, disk_key_file=key)
    with SimpleKVCache(0.01, disk_path=tmp_path / "kv", disk_size_gb=0.1, disk_key_file=tmp_path / "one") as cache:
        hit = cache.get_cached_kv("p", 0)
        assert hit is not None and np.array_equal(hit[0], k)


def test_a_flipped_byte_is_a_counted_miss(tmp_path: Path) -> None:
    assert in_another_process(STORE, tmp_path / "kv", "close") == 0
    k = pair(0)[0].tobytes()
    for file in (tmp_path / "kv").iterdir():
        at = file.read_bytes().find(k[:64])
        if at >= 0:
            with file.open("r+b") as changed:
                changed.seek(at)
                changed.write(bytes([k[0] ^ 1]))
            break
    else:
        pytest.fail("the payload is in no file")
    with SimpleKVCache(0.01, disk_path=tmp_path / "kv", disk_size_gb=0.1) as cache:
        assert cache.get_cached_kv("p", 0) is None
        assert cache.get_cached_kv("p", 1) is not None
        disk = cache.get_stats()["disk"]
        assert disk is not None and disk["damaged_total"] == 1


def test_a_closed_cache_says_so_and_what_it_gave_stays_valid(tmp_path: Path) -> None:
    cache = SimpleKVCache(0.01, disk_path=tmp_path / "kv", disk_size_gb=0.1)
    k, v = pair(1)
    cache.cache_kv("p", 0, k, v)
    hit = cache.get_cached_kv("p", 0)
    assert hit is not None
    cache.close()
    cache.close()
    for call in (lambda: cache.get_cached_kv("p", 0), cache.get_stats, cache.flush):
        with pytest.raises(kvkeep.ClosedError):
            call()
    assert np.array_equal(hit[0], k) and np.array_equal(hit[1], v)


def test_settings_that_make_no_disk_tier_are_refused(tmp_path: Path) -> None:
    with pytest.raises(kvkeep.NoDiskError):
        SimpleKVCache(0.01).flush()
    for wrong in ({"disk_size_gb": float("nan")}, {"disk_size_gb": 0}, {"disk_write": "sometimes"}, {"disk_admission": "some"}):
        with pytest.raises(kvkeep.ConfigError):
            KVCache(0.01, disk_path=tmp_path / "kv", **wrong)
    with pytest.raises(kvkeep.ConfigError):
        KVCache(0.01, disk_key_file=tmp_path / "key")
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(kvkeep.DiskError):
        KVCache(0.01, disk_path=tmp_path / "file", disk_size_gb=0.1)


@pytest.mark.parametrize("seconds", [0, -1, -1e-300, float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("door", [SimpleKVCache, KVCache])
def test_a_flush_timeout_that_is_no_time_to_wait_is_refused(
    tmp_path: Path, door: type[SimpleKVCache | KVCache], seconds: float
) -> None:
    with pytest.raises(kvkeep.ConfigError, match="disk_flush_timeout_seconds is .*: give a finite number"):
        door(0.01, disk_path=tmp_path / "kv", disk_size_gb=0.1, disk_flush_timeout_seconds=seconds)
    assert not (tmp_path / "kv").exists()


def test_a_flush_waits_no_longer_than_it_was_told_to(tmp_path: Path) -> None:
    cache = SimpleKVCache(0.1, disk_path=tmp_path / "kv", disk_size_gb=0.1, disk_flush_timeout_seconds=1e-9)
    k = np.ones(1 << 20)
    cache.cache_kv("p", 0, k, k)
    # No disk gets anything done in a billionth of a second.
    with pytest.raises(kvkeep.DiskError, match="nothing done for 1ns.*flush_timeout"):
        cache.flush()
    with SimpleKVCache(0.1, disk_path=tmp_path / "patient", disk_size_gb=0.1, disk_flush_timeout_seconds=1e300) as cache:
        cache.cache_kv("p", 0, k, k)
        cache.flush()
        disk = cache.get_stats()["disk"]
        assert disk is not None and disk["entries"] == 1


@pytest.mark.parametrize("write", ["through", "back"])
def test_what_is_not_admitted_is_in_ram_and_not_on_the_disk(tmp_path: Path, write: Literal["through", "back"]) -> None:
    disk = {"disk_path": tmp_path / "kv", "disk_size_gb": 0.1, "disk_admission": "second-use"}
    with SimpleKVCache(0.01, disk_write=write, **disk) as cache:
        for prefix in ("once", "twice"):
            cache.cache_kv(prefix, 0, *pair(1))
        assert cache.get_cached_kv("twice", 0) is not None
        cache.flush()
        stats = cache.get_stats()["disk"]
        assert stats is not None and stats["entries"] == 1 and stats["not_admitted_total"] >= 1
    with SimpleKVCache(0.01, **disk) as cache:
        assert [cache.get_cached_kv(prefix, 0) is not None for prefix in ("once", "twice")] == [False, True]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_that_ends_leaves_the_parents_disk_alone(tmp_path: Path) -> None:
    """A child has the cache but not its threads: letting go of it there must neither wait for
    them nor write into the parent's directory."""
    cache = SimpleKVCache(0.01, disk_path=tmp_path / "kv", disk_size_gb=0.1, disk_write="back")
    cache.cache_all_layers("p", {layer: pair(layer) for layer in range(4)})
    before = sorted(file.name for file in (tmp_path / "kv").iterdir())
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        del cache
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert sorted(file.name for file in (tmp_path / "kv").iterdir()) == before
    cache.close()
    with SimpleKVCache(0.01, disk_path=tmp_path / "kv", disk_size_gb=0.1) as cache:
        assert found(cache)


def test_lossless_gives_back_every_bit_and_says_what_it_saved(tmp_path: Path) -> None:
    values = np.random.default_rng(1).standard_normal((256, 4, 64)).astype(np.float32)
    # What was bfloat16: the lower half of each number is zero.
    kv = (values.view(np.uint32) & np.uint32(0xFFFF_0000)).view(np.float32)
    disk = kvkeep.DiskConfig(tmp_path / "kv", size_gb=0.1, codec="lossless")
    with SimpleKVCache(0.1, disk=disk) as cache:
        cache.cache_kv("a prefix", 0, kv, -kv)
        cache.flush()
        stats = cache.get_stats()["disk"]
        assert stats is not None
        assert stats["codec"] == "lossless"
        assert stats["codec_ratio"] > 2
        assert stats["written_raw_bytes_total"] > 2 * stats["written_bytes_total"] > 0
    # Whatever is written now.
    with SimpleKVCache(0.1, disk=kvkeep.DiskConfig(tmp_path / "kv", size_gb=0.1)) as cache:
        found = cache.get_cached_kv("a prefix", 0)
        assert found is not None
        assert found[0].tobytes() == kv.tobytes()
        assert found[1].tobytes() == (-kv).tobytes()


def test_a_codec_that_there_is_not_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(kvkeep.ConfigError, match='no codec is called "zip": give one of raw, lossless, int8, int4, k8v4, fp8, nf4'):
        SimpleKVCache(0.1, disk_path=tmp_path / "kv", disk_size_gb=0.1, disk_codec="zip")  # type: ignore[arg-type]
