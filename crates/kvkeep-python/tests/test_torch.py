"""Both front doors with torch, by promise."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import kvkeep  # noqa: E402
from kvkeep import KVCache, Namespace, SimpleKVCache  # noqa: E402

DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64, torch.int8,
    torch.uint8, torch.int16, torch.int32, torch.int64,
]  # fmt: skip


def pair(seed: int, shape: tuple[int, ...] = (1, 2, 16, 8), dtype: Any = torch.float32) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    return tuple((torch.randn(shape, generator=generator) * 10).to(dtype) for _ in range(2))


def same(one: Any, other: Any) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.contiguous().view(torch.uint8), other.detach().contiguous().view(torch.uint8))
    )


@pytest.mark.parametrize("module", ["simple_kv_cache", "kvkeep"])
def test_the_snippet_runs_with_torch(module: str) -> None:
    cache = __import__(module).SimpleKVCache(max_size_gb=10, device="cpu", default_ttl_seconds=3600)
    k, v = pair(1)
    cache.cache_kv(prefix="user query", layer=0, k_tensor=k, v_tensor=v, ttl_seconds=60)
    k_cached, v_cached = cache.get_cached_kv(prefix="user query", layer=0)
    assert same(k_cached, k) and same(v_cached, v)
    kv_dict = {layer: pair(layer) for layer in range(32)}
    cache.cache_all_layers("p", kv_dict)
    found = cache.get_all_layers("p", num_layers=32)
    assert all(same(a, b) for layer in range(32) for a, b in zip(found[layer], kv_dict[layer], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (3, 5), (1, 2, 7, 8), (1, 1, 1, 1, 1, 2, 3, 4)], ids=str)
def test_what_comes_back_is_what_came_in(cache: SimpleKVCache, dtype: Any, shape: tuple[int, ...]) -> None:
    k, v = pair(2, shape, dtype)
    assert cache.cache_kv("p", 0, k, v)
    got = cache.get_cached_kv("p", 0)
    assert same(got[0].reshape(-1), k.reshape(-1)) and same(got[1].reshape(-1), v.reshape(-1))
    assert got[0].shape == k.shape and got[0].is_contiguous() and not got[0].requires_grad


def test_writing_into_what_came_back_never_changes_what_the_next_reader_gets(cache: SimpleKVCache) -> None:
    kv = {layer: pair(layer, (1, 4, 300, 16)) for layer in range(4)}
    cache.cache_all_layers("p", kv)
    for _ in range(3):
        one, other = cache.get_all_layers("p", 4), cache.get_all_layers("p", 4)
        for layer in range(4):
            one[layer][0].zero_()
            one[layer][1].numpy()[:] = 7
        single = cache.get_cached_kv("p", 2)
        assert same(single[0], kv[2][0]) and same(single[1], kv[2][1])
        single[0].fill_(9)
        assert all(same(a, b) for layer in range(4) for a, b in zip(other[layer], kv[layer], strict=True))
        assert all((one[layer][0] == 0).all() for layer in range(4))
        del one, single


def test_tensors_of_a_hit_are_tensors_like_others(cache: SimpleKVCache, tmp_path: Any) -> None:
    cache.cache_all_layers("p", {layer: pair(layer) for layer in range(8)})
    found = cache.get_all_layers("p", 8)
    k, v = found[3]
    path = tmp_path / "k.pt"
    torch.save(k, path)
    assert path.stat().st_size < 2 * k.nbytes + 4096, "saving one tensor saves no others"
    assert k.untyped_storage().nbytes() == k.nbytes and k.storage_offset() == 0
    weight = torch.randn(8, 8, requires_grad=True)
    out = (k @ weight).sum() + (v * k).sum()
    found[4][0].add_(1)  # another layer: must not upset autograd for this one
    out.backward()
    assert weight.grad is not None
    k.requires_grad_()
    (k * 2).sum().backward()
    assert torch.equal(k.grad, torch.full_like(k, 2))


def test_non_contiguous_and_requires_grad_and_negated_inputs_work(cache: SimpleKVCache) -> None:
    k, v = pair(5, (4, 6, 8))
    cases = [
        (k.transpose(0, 2), v[:, ::2]),
        (k.clone().requires_grad_(), (v.clone().requires_grad_() * 2)),
        (k.expand(4, 6, 8)[:1].expand(5, 6, 8), v[1:, 1:, 1:]),
        (torch._neg_view(k), v),
        (torch.nn.Parameter(k), v),
    ]
    for number, (a, b) in enumerate(cases):
        cache.cache_kv(str(number), 0, a, b)
        got = cache.get_cached_kv(str(number), 0)
        assert torch.equal(got[0], a.detach()) and torch.equal(got[1], b.detach())
        assert not got[0].requires_grad


def test_memory_of_a_result_stays_valid_after_eviction_and_after_the_cache_is_gone() -> None:
    cache = SimpleKVCache(max_size_gb=0.001)
    k, v = pair(4, (1, 8, 64, 16))
    cache.cache_kv("old", 0, k, v)
    held = cache.get_cached_kv("old", 0)
    view = held[1][0, 3]
    cache.evict("old")
    for number in range(100):
        cache.cache_kv(f"new {number}", 0, *pair(number, (1, 8, 64, 16)))
    del cache
    assert same(held[0], k) and same(held[1], v)
    del held
    assert torch.equal(view, v[0, 3]), "a view keeps the memory too"


def test_numpy_and_torch_live_in_one_cache_and_come_back_as_what_they_were(cache: SimpleKVCache) -> None:
    cache.cache_kv("t", 0, *pair(1))
    cache.cache_kv("n", 0, *(t.numpy() for t in pair(1)))
    assert isinstance(cache.get_cached_kv("t", 0)[0], torch.Tensor)
    assert isinstance(cache.get_cached_kv("n", 0)[0], np.ndarray)
    cache.cache_kv("t", 1, *(t.numpy() for t in pair(2)))
    both = cache.get_all_layers("t", 2)
    assert isinstance(both[0][0], torch.Tensor) and isinstance(both[1][0], np.ndarray)
    with pytest.raises(kvkeep.UnsupportedTensorError):
        cache.cache_kv("t", 0, pair(1)[0], pair(1)[1].numpy())
    for wrong in (torch.ones(2, 2, dtype=torch.complex64), torch.ones(2, 2).to_sparse(), torch.ones(3) > 0):
        with pytest.raises(kvkeep.UnsupportedTensorError):
            cache.cache_kv("t", 0, wrong, wrong)


def test_a_cuda_cache_without_cuda_is_a_clear_error_and_with_it_hands_out_cuda_tensors() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(kvkeep.DeviceError, match="no CUDA device"):
            SimpleKVCache(max_size_gb=0.01, device="cuda")
        return
    cache = SimpleKVCache(max_size_gb=0.05, device="cuda")
    kv = {layer: tuple(t.cuda() for t in pair(layer)) for layer in range(4)}
    cache.cache_all_layers("p", kv)
    found = cache.get_all_layers("p", 4)
    assert all(t.is_cuda for layer in range(4) for t in found[layer])
    assert all(torch.equal(a, b) for layer in range(4) for a, b in zip(found[layer], kv[layer], strict=True))
    found[0][0].zero_()
    assert torch.equal(cache.get_cached_kv("p", 0)[0], kv[0][0])


def test_a_torch_without_the_dlpack_table_gets_the_same_tensors() -> None:
    """In a process of its own: the table is looked up once."""
    import subprocess
    import sys

    code = """
import torch, kvkeep
del torch.Tensor.__dlpack_c_exchange_api__
cache = kvkeep.SimpleKVCache(max_size_gb=0.05)
for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64):
    k = (torch.randn(2, 3, 5) * 10).to(dtype)
    cache.cache_kv("p", 0, k, k)
    got = cache.get_cached_kv("p", 0)[0]
    assert got.dtype == dtype and torch.equal(got.view(torch.uint8), k.view(torch.uint8))
    got.zero_()
    assert torch.equal(cache.get_cached_kv("p", 0)[0].view(torch.uint8), k.view(torch.uint8))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_blocks_come_back_as_contiguous_tensors(tokens_cache: KVCache) -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float8_e4m3fn):
        namespace = Namespace(
            "m", layers=3, kv_heads=2, head_dim=8, dtype=dtype, block_tokens=4, order="head_token", salt=str(dtype)
        )
        layers = [pair(layer, (2, 10, 8), dtype) for layer in range(3)]
        tokens = torch.arange(10)
        tokens_cache.store(namespace, tokens, layers)
        with tokens_cache.lookup(namespace, tokens) as found:
            assert found.cached_tokens == 8
            for (k, v), (want_k, want_v) in zip(found.to_torch(), layers, strict=True):
                assert same(k, want_k[:, :8]) and same(v, want_v[:, :8]) and k.is_contiguous()
            into = [tuple(torch.zeros(2, 16, 8, dtype=dtype) for _ in range(2))]
            found.load(into, first_layer=2)
            assert same(into[0][0][:, :8], layers[2][0][:, :8])
            with pytest.raises(kvkeep.UnsupportedTensorError):
                found.load([(torch.zeros(8, 2, 8, dtype=dtype).transpose(0, 1), into[0][1])])


def test_of_8_threads_none_reads_another_ones_bytes() -> None:
    cache = SimpleKVCache(max_size_gb=0.2)  # room for all of it
    errors: list[BaseException] = []

    def work(me: int) -> None:
        try:
            for turn in range(60):
                value = me * 1000 + turn
                k = torch.full((2, 64, 64), value, dtype=torch.int32)
                assert cache.cache_all_layers(f"{me} {turn}", {layer: (k, k) for layer in range(3)})
                found = cache.get_all_layers(f"{me} {turn}", 3)
                assert all((t == value).all() for pair in found.values() for t in pair)
                found[1][0].fill_(-1)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(me,)) for me in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads) and not errors, errors
    assert cache.get_stats()["held_bytes"] == 0


def test_torch_tensors_are_torch_tensors_after_a_restart(tmp_path) -> None:  # type: ignore[no-untyped-def]
    k = torch.randn(1, 2, 16, 8).to(torch.bfloat16)
    with SimpleKVCache(0.01, disk_path=tmp_path / "kv", disk_size_gb=0.1) as cache:
        cache.cache_kv("p", 0, k, k)
    with SimpleKVCache(0.01, disk_path=tmp_path / "kv", disk_size_gb=0.1) as cache:
        hit = cache.get_cached_kv("p", 0)
        assert hit is not None and hit[0].dtype == torch.bfloat16 and torch.equal(hit[0], k)


def test_a_part_without_elements_is_a_tensor_like_any_other():
    # K and V of a layer with latent attention: V has no elements, and a part of it begins behind the end of its storage.
    namespace = kvkeep.Namespace("m", layers=1, kv_heads=1, head_dim=4, v_head_dim=0, dtype="float32", block_tokens=2)
    k, v = torch.randn(6, 1, 4), torch.empty(6, 1, 0)
    assert v[2:].storage_offset() > 0
    cache = kvkeep.KVCache(0.01)
    assert cache.store(namespace, [1, 2], [(k[:2], v[:2])]).stored_blocks == 1
    assert cache.store(namespace, [1, 2, 3, 4, 5, 6], [(k[2:], v[2:])], first_token=2).stored_blocks == 2
