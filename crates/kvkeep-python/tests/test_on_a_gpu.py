"""Copies between a real GPU and the cache's pages. Skipped where there is none; `test_gpu.py` has the rest."""

from __future__ import annotations

import threading
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from kvkeep import KVCache, Namespace, SimpleKVCache, _gpu

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch finds none here")


def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


@pytest.mark.parametrize("registers", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_named_layers_come_back_as_they_were(registers: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if not registers:
        monkeypatch.setattr(_gpu.Cuda, "register", refused)
    with SimpleKVCache(0.5, device="cuda") as cache:
        cache._home.gpu().pinned.wait()
        assert (cache._home.gpu().pinned.until == 0) is not registers
        layers = {n: (new(1, 8, 1000, 64, dtype=dtype), new(1, 8, 1000 + n % 2, 64, dtype=dtype)) for n in range(20)}
        assert cache.cache_all_layers("a prefix", layers)
        found = cache.get_all_layers("a prefix", 20) or {}
        for n, pair in layers.items():
            for stored, given in zip(found[n], pair, strict=True):
                assert stored.is_cuda and torch.equal(stored.view(torch.uint8), given.view(torch.uint8))


@pytest.mark.parametrize("registers", [True, False])
@pytest.mark.parametrize("order", ["head_token", "token_head"])
def test_blocks_come_back_as_the_cpu_has_them(registers: bool, order: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if not registers:
        monkeypatch.setattr(_gpu.Cuda, "register", refused)
    namespace = Namespace("m", layers=6, kv_heads=4, head_dim=64, v_head_dim=32, dtype="bfloat16", order=order, block_tokens=16)
    tokens = list(range(3000))
    given = [(new(*namespace.shape(3000, 64)), new(*namespace.shape(3000, 32))) for _ in range(6)]
    with KVCache(0.5) as cache:
        cache.pin_memory()
        cache._home.gpu().pinned.wait()
        assert cache.store(namespace, tokens, given).stored_blocks == 187
        with cache.lookup(namespace, tokens) as match:
            on_gpu, on_cpu = match.to_torch(device="cuda"), match.to_torch()
            into = [(new(*namespace.shape(3100, 64)), new(*namespace.shape(3100, 32))) for _ in range(6)]
            match.load(into)
        at = 1 if order == "head_token" else 0
        for layer, pair in enumerate(given):
            for side, tensor in enumerate(pair):
                whole = tensor.narrow(at, 0, 2992)
                assert torch.equal(on_gpu[layer][side], whole) and torch.equal(on_cpu[layer][side], whole.cpu())
                assert torch.equal(into[layer][side].narrow(at, 0, 2992), whole)


def test_a_store_has_what_the_stream_had_made_when_it_was_called() -> None:
    with SimpleKVCache(0.5, device="cuda") as cache:
        cache._home.gpu().pinned.wait()
        for turn in range(30):
            big = torch.full((2000, 2000), 1.0, device="cuda")
            for _ in range(30):
                big = (big @ big).clamp(max=2.0)  # keeps the stream busy
            made = torch.full((500_000,), float(turn), device="cuda") + big[0, 0] * 0
            cache.cache_kv("a prefix", 0, made, made)
            made.fill_(-1)
            found = cache.get_cached_kv("a prefix", 0) or ()
            assert bool((found[0] == turn).all()) and bool((found[1] == turn).all())


def test_pages_are_not_stored_over_while_they_are_loaded() -> None:
    """Each store evicts what was loaded just before, from pages that the GPU may still read."""
    with SimpleKVCache(0.06, device="cuda") as cache:
        cache._home.gpu().pinned.wait()
        loaded = []
        for turn in range(40):
            given = torch.full((5_000_000,), float(turn), device="cuda")
            while not cache.cache_kv(f"prefix {turn}", 0, given, given):
                pass  # all of it is being read
            found = cache.get_cached_kv(f"prefix {turn}", 0)
            if found is not None:
                loaded.append((turn, found[0].clone(), found[1]))
        assert len(loaded) > 30 and all(bool((k == turn).all()) and bool((v == turn).all()) for turn, k, v in loaded)


def test_many_threads_with_streams_of_their_own() -> None:
    wrong: list[Any] = []
    with SimpleKVCache(0.5, device="cuda") as cache:

        def work(number: int) -> None:
            with torch.cuda.stream(torch.cuda.Stream()):
                for turn in range(20):
                    given = torch.full((100_000 + number,), float(100 * number + turn), device="cuda")
                    cache.cache_kv(f"prefix {number}", 0, given, given)
                    found = cache.get_cached_kv(f"prefix {number}", 0) or ()
                    if not (torch.equal(found[0], given) and torch.equal(found[1], given)):
                        wrong.append((number, turn))

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_clearing_gives_no_memory_back_that_the_gpu_was_told_of() -> None:
    with SimpleKVCache(0.2, device="cuda") as cache:
        cache._home.gpu().pinned.wait()
        for turn in range(5):
            given = torch.full((10_000_000,), float(turn), device="cuda")
            cache.cache_kv("a prefix", 0, given, given)
            found = cache.get_cached_kv("a prefix", 0) or ()
            assert bool((found[0] == turn).all()) and bool((found[1] == turn).all())
            cache.clear()


def refused(self: Any, address: int, size: int) -> None:
    raise RuntimeError("operation not permitted")
