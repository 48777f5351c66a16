"""A store that several nodes share, from Python, by promise. `KVKEEP_TEST_REMOTE` names one that needs a server, for builds that
have it; a directory needs none."""

from __future__ import annotations

import itertools
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import layers_of, pair

from kvkeep import ConfigError, DiskError, KVCache, Namespace, RemoteConfig, SimpleKVCache

TOKENS = list(range(40))
NUMBERS = itertools.count()


@pytest.fixture
def remote(tmp_path: Path) -> RemoteConfig:
    url = os.environ.get("KVKEEP_TEST_REMOTE") or f"file://{tmp_path}/store"
    # Short: the S3 server of these tests makes a file's name of it, and of a block's two hashes.
    return RemoteConfig(url, prefix=f"py-{os.getpid()}-{next(NUMBERS)}", size_gb=0.1, deadline_seconds=5)


def name_of(remote: RemoteConfig) -> str:
    return remote.url.split(":")[0]


def test_what_one_cache_has_stored_another_finds_bit_for_bit(remote: RemoteConfig, namespace: Namespace) -> None:
    kv = layers_of(len(TOKENS), namespace)
    with KVCache(0.05, remote=remote) as one:
        assert one.store(namespace, TOKENS, kv).stored_blocks == 10
        one.flush()
        with KVCache(0.05, remote=remote) as two, two.lookup(namespace, TOKENS) as found:
            assert found.cached_tokens == 40
            for (k, v), (right_k, right_v) in zip(found.to_numpy(), kv, strict=True):
                assert np.array_equal(k, right_k) and np.array_equal(v, right_v)
            tier = two.get_stats()["tiers"][name_of(remote)]
            assert tier["hits"] == 10 and not tier["failing"]


def test_another_prefix_and_another_namespace_see_nothing_of_it(remote: RemoteConfig, namespace: Namespace) -> None:
    other = Namespace("other", layers=3, kv_heads=2, head_dim=8, dtype="float32", block_tokens=4)
    elsewhere = RemoteConfig(remote.url, prefix=remote.prefix + "-2", deadline_seconds=5)
    with KVCache(0.05, remote=remote) as one:
        one.store(namespace, TOKENS, layers_of(len(TOKENS), namespace))
        one.flush()
        with KVCache(0.05, remote=remote) as two, two.lookup(other, TOKENS) as found:
            assert found.cached_tokens == 0
        with KVCache(0.05, remote=elsewhere) as two, two.lookup(namespace, TOKENS) as found:
            assert found.cached_tokens == 0


def test_layers_under_a_prefix_text_are_shared_and_a_disk_goes_before(remote: RemoteConfig, tmp_path: Path) -> None:
    with SimpleKVCache(0.05, disk=tmp_path / "one", remote=remote) as one:
        assert one.cache_all_layers("p", {0: pair(0), 1: pair(1)})
        one.flush()
        with SimpleKVCache(0.05, disk=tmp_path / "two", remote=remote) as two:
            found = two.get_all_layers("p", 2)
            assert found is not None
            assert all(np.array_equal(a, b) for layer in range(2) for a, b in zip(found[layer], pair(layer), strict=True))
            assert list(two.get_stats()["tiers"]) == ["disk", name_of(remote)]


def test_what_is_cleared_is_gone_for_those_that_come_later(remote: RemoteConfig, namespace: Namespace) -> None:
    with KVCache(0.05, remote=remote) as one:
        one.store(namespace, TOKENS, layers_of(len(TOKENS), namespace))
        one.flush()
        one.clear()
        one.flush()
    with KVCache(0.05, remote=remote) as two, two.lookup(namespace, TOKENS) as found:
        assert found.cached_tokens == 0


def test_a_build_without_the_store_says_which_have_it() -> None:
    if os.environ.get("KVKEEP_TEST_REMOTE"):
        pytest.skip("this build has it")
    with pytest.raises(ConfigError, match="released wheels.*feature `remote`"):
        KVCache(0.05, remote="redis://127.0.0.1:1")


def test_settings_that_make_no_store_are_refused_by_name(tmp_path: Path) -> None:
    url = f"file://{tmp_path}"
    for wrong, why in [
        (RemoteConfig(url, prefix=""), "prefix"),
        (RemoteConfig(url, size_gb=-1), "size_gb"),
        (RemoteConfig(url, deadline_seconds=-1), "deadline_seconds"),
        (RemoteConfig(url, codec="zip"), "zip"),  # type: ignore[arg-type]
        (RemoteConfig("file://here"), "from the root"),
        (7, "RemoteConfig"),
    ]:
        with pytest.raises(ConfigError, match=why):
            KVCache(0.05, remote=wrong)  # type: ignore[arg-type]


def test_a_password_in_a_url_is_not_shown() -> None:
    assert "secret" not in repr(RemoteConfig("redis://:secret@host", variables={"AWS_SECRET_ACCESS_KEY": "secret"}))


def test_a_store_that_goes_away_is_a_miss_and_an_error_of_who_flushes_alone(tmp_path: Path, namespace: Namespace) -> None:
    store = tmp_path / "store"
    cache = KVCache(0.05, remote=RemoteConfig(f"file://{store}", deadline_seconds=0.5))
    shutil.rmtree(store)
    store.write_text("no directory any more")
    cache.store(namespace, TOKENS, layers_of(len(TOKENS), namespace))
    began = time.monotonic()
    with cache.lookup(namespace, list(range(100, 140))) as found:
        assert found.cached_tokens == 0
    assert time.monotonic() - began < 2
    with cache.lookup(namespace, TOKENS) as found:
        assert found.cached_tokens == 40, "RAM has it"
    # As with a disk that fails: what is closed now is lost to the others, so it is said.
    with pytest.raises(DiskError, match="10 blocks were not flushed"):
        cache.close()
