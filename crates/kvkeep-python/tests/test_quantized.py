"""`QuantizedKVCache`: the calls of `SimpleKVCache`, in fewer bytes and within the codec's error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvkeep
from kvkeep import DiskConfig, KVCache, Namespace, QuantizedKVCache, SimpleKVCache, measure_quantization_error

LOSSY = ["int8", "int4", "k8v4", "fp8", "nf4"]
SHAPE = (1, 3, 128, 32)


def values(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def found_k(cache: Any, prefix: Any, layer: int = 0) -> np.ndarray[Any, Any]:
    found = cache.get_cached_kv(prefix, layer)
    assert found is not None
    return np.asarray(found[0])


@pytest.mark.parametrize("codec", ["raw", "lossless", *LOSSY])
def test_what_was_stored_comes_back_within_the_error_that_is_measured(codec: Any) -> None:
    k, v = values(1), values(2)
    with QuantizedKVCache(0.01, codec=codec) as cache:
        assert cache.cache_kv("a prefix", 3, k, v)
        found = cache.get_cached_kv("a prefix", 3)
        assert found is not None
        error = cache.measure_quantization_error(k, v)
        assert error == measure_quantization_error(k, v, codec)
        for side, was, came in [(error.k, k, found[0]), (error.v, v, found[1])]:
            came = np.asarray(came)
            assert came.dtype == was.dtype
            assert came.shape == was.shape
            assert abs(np.abs(came - was).max() - side.max) < 1e-6
            assert abs(np.abs(came - was).mean() - side.mean) < 1e-6
            assert side.relative < 0.15
            assert (side.max == 0) == (codec in ("raw", "lossless"))
            # The first and the most recent tokens.
            assert (came[:, :, :4] == was[:, :, :4]).all()
            assert (came[:, :, -32:] == was[:, :, -32:]).all()
        if codec in LOSSY:
            assert error.ratio > 2
            assert cache.stats()["used_bytes"] <= 2 * k.nbytes / 2
        assert cache.get_cached_kv("a prefix", 2) is None
        assert cache.evict("a prefix") == [3]


def test_tokens_are_prefixes_in_every_form_and_no_text_stands_for_them() -> None:
    one, other = values(1), values(2)
    with QuantizedKVCache(0.01, codec="int8") as cache:
        cache.cache_kv([1, 22, 333], 0, one, one)
        cache.cache_kv("1 22 333", 0, other, other)
        for tokens in ([1, 22, 333], (1, 22, 333), np.array([1, 22, 333]), np.array([[1, 22, 333]])):
            assert np.abs(found_k(cache, tokens) - one).max() < 0.05
        assert cache.get_cached_kv([1, 22], 0) is None
        assert cache.get_cached_kv([12, 2333], 0) is None
        assert cache.longest_prefix("1 22 333 and more") == "1 22 333"
        assert cache.evict([1, 22, 333]) == [0]
        assert cache.get_cached_kv([1, 22, 333], 0) is None
        with pytest.raises(kvkeep.EmptyTokensError):
            cache.get_cached_kv([], 0)
        with pytest.raises(kvkeep.EmptyPrefixError):
            cache.get_cached_kv("", 0)


def test_all_layers_of_tokens_are_first_that_dimension() -> None:
    kv = {layer: (values(layer, (64, 2, 16)), values(9 - layer, (64, 2, 16))) for layer in range(3)}
    with QuantizedKVCache(0.01, codec="k8v4", token_axis=-3, exact_tokens=(1, 2)) as cache:
        assert cache.cache_all_layers("p", kv)
        found = cache.get_all_layers("p", 3)
        assert found is not None
        for layer, (k, v) in kv.items():
            for was, came in zip((k, v), map(np.asarray, found[layer])):
                assert (came[:1] == was[:1]).all()
                assert (came[-2:] == was[-2:]).all()
                assert 0 < np.abs(came - was).max() < 0.3
        assert cache.get_all_layers("p", 4) is None
        assert cache.clear() == 3


def test_tensors_of_torch_come_back_as_such() -> None:
    torch = pytest.importorskip("torch")
    k = torch.randn(1, 3, 128, 32).to(torch.bfloat16)
    # Not contiguous, as transposed ones are.
    v = torch.randn(1, 128, 3, 32).to(torch.float16).transpose(1, 2)
    with QuantizedKVCache(0.01, codec="fp8") as cache:
        cache.cache_kv("p", 0, k, v)
        found = cache.get_cached_kv("p", 0)
        assert found is not None
        for was, came in zip((k, v), found):
            assert (came.dtype, came.shape) == (was.dtype, was.shape)
            assert (came - was).abs().max() < 0.3
        assert cache.measure_quantization_error(k, v).ratio > 1.4


def test_nobody_else_finds_what_is_quantized_also_not_in_its_directory(tmp_path: Path) -> None:
    k, other = values(1), values(2)
    disk = DiskConfig(tmp_path / "kv", size_gb=0.1)
    with QuantizedKVCache(0.1, codec="int4", disk=disk) as cache:
        cache.cache_kv("p", 0, k, k)
    with QuantizedKVCache(0.1, codec="nf4", disk=disk) as cache:
        assert cache.get_cached_kv("p", 0) is None
    with SimpleKVCache(0.1, disk=disk) as simple:
        assert simple.get_cached_kv("p", 0) is None
        simple.cache_kv("p", 0, other, other)
    with QuantizedKVCache(0.1, codec="int4", disk=disk) as cache:
        assert np.abs(found_k(cache, "p") - k).max() < 0.5, "warm after a restart"


def test_what_makes_no_cache_is_refused_with_what_to_do() -> None:
    with pytest.raises(kvkeep.ConfigError, match='no codec is called "zip": give one of raw'):
        QuantizedKVCache(0.01, codec="zip")  # type: ignore[arg-type]
    with pytest.raises(kvkeep.ConfigError, match="token_axis is 1: give -2"):
        QuantizedKVCache(0.01, token_axis=1)
    with pytest.raises(kvkeep.ConfigError, match="exact_tokens"):
        QuantizedKVCache(0.01, exact_tokens=(-1, 0))
    with QuantizedKVCache(0.01) as cache:
        with pytest.raises(kvkeep.EmptyTensorError):
            cache.cache_kv("p", 0, np.zeros((1, 0, 4), np.float32), np.zeros((1, 0, 4), np.float32))
    with pytest.raises(kvkeep.ClosedError):
        cache.get_cached_kv("p", 0)


@pytest.mark.parametrize("codec", LOSSY)
def test_a_lossy_disk_of_the_token_door_is_a_miss_to_whoever_did_not_ask(tmp_path: Path, codec: Any) -> None:
    """Blocks that a lossy codec may have changed were found under the name of exact ones once they were in RAM."""
    namespace = Namespace("m", layers=2, kv_heads=2, head_dim=32, dtype="float32", block_tokens=32)
    tokens = list(range(96))
    kv = [(values(layer, (96, 2, 32)), values(7 + layer, (96, 2, 32))) for layer in range(2)]

    def cached_tokens(codec: Any) -> int:
        with KVCache(0.1, disk=DiskConfig(tmp_path / "kv", size_gb=0.1, codec=codec)) as cache:
            return int(cache.lookup(namespace, tokens).cached_tokens)

    with KVCache(0.1, disk=DiskConfig(tmp_path / "kv", size_gb=0.1, codec=codec)) as cache:
        cache.store(namespace, tokens, kv)
    assert cached_tokens("raw") == 0
    assert cached_tokens("lossless") == 0
    assert cached_tokens(codec) == 96
