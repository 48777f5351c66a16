"""Torch tensors that are lent to a call, and those that cannot be."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from kvkeep import KVCache, Namespace, SimpleKVCache, UnsupportedTensorError  # noqa: E402

TOKENS = 4096
SHAPE = (TOKENS, 2, 64)


@pytest.fixture
def large() -> Namespace:
    return Namespace("m", layers=2, kv_heads=2, head_dim=64, dtype="float32", block_tokens=64)


def pairs() -> list[tuple[Any, Any]]:
    return [(torch.full(SHAPE, 2.0 * layer), torch.full(SHAPE, 2.0 * layer + 1)) for layer in range(2)]


HARM: dict[str, Callable[[Any], Any]] = {
    "resize_": lambda tensor: tensor.resize_(1 << 21),
    "resize_ of its storage": lambda tensor: tensor.untyped_storage().resize_(0),
    "set_": lambda tensor: tensor.set_(torch.empty(4)),
    "data": lambda tensor: setattr(tensor, "data", torch.empty(4)),
}


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("write", [False, True])
def test_a_tensors_memory_stays_while_it_is_lent(large: Namespace, harm: str, write: bool) -> None:
    """Another thread gave a tensor other memory, and the old one was read or written after it was freed."""
    cache = KVCache(max_size_gb=0.1)
    cache.store(large, range(TOKENS), pairs())
    match = cache.lookup(large, range(TOKENS))
    simple = SimpleKVCache(max_size_gb=0.1)
    cell = [torch.zeros(SHAPE)]
    over = time.monotonic() + 0.7
    rest = torch.zeros(SHAPE)

    def harming() -> None:
        while time.monotonic() < over:
            try:
                HARM[harm](cell[0])
            except RuntimeError as error:
                assert "resiz" in str(error), error
            time.sleep(0.0003)

    thread = threading.Thread(target=harming)
    thread.start()
    try:
        while time.monotonic() < over:
            cell[0] = torch.full(SHAPE, 7.0)
            try:
                if write:
                    match.load([(cell[0], torch.empty(SHAPE)), (torch.empty(SHAPE), torch.empty(SHAPE))])
                else:
                    simple.cache_kv("p", 0, cell[0], rest)
            except Exception as error:
                # It was harmed before it was lent.
                names = ("ShapeMismatchError", "UnsupportedTensorError", "EmptyTensorError")
                assert type(error).__name__ in names, error
    finally:
        thread.join()
        match.close()


def test_a_tensor_that_was_lent_is_as_resizable_as_after_numpy(large: Namespace) -> None:
    cache = SimpleKVCache(max_size_gb=0.1)
    k, v = torch.ones(4, 8), torch.ones(4, 8)
    cache.cache_kv("p", 0, k, v)
    with pytest.raises(RuntimeError, match="resiz"):
        k.resize_(1 << 20)
    # All else goes on. (Torch itself leaves a tensor broken that it could not resize: not that one.)
    v.add_(1), v.resize_(2, 2), v.set_(torch.zeros(3))
    assert v.tolist() == [0, 0, 0]
    tokens = KVCache(max_size_gb=0.1)
    tokens.store(large, range(TOKENS), pairs())
    with tokens.lookup(large, range(TOKENS)) as match:
        fresh = match.to_torch()[0][0]
    assert fresh.resize_(1 << 21).numel() == 1 << 21, "what the cache made itself is its holder's alone"


def test_what_needs_a_copy_to_be_written_is_refused(large: Namespace) -> None:
    """A negated or a distant tensor was copied, the copy written and thrown away."""
    cache = KVCache(max_size_gb=0.1)
    cache.store(large, range(TOKENS), pairs())
    wrong = {
        "contiguous": torch.zeros(TOKENS, 2, 128)[..., ::2],
        "contiguous: load": torch._neg_view(torch.zeros(SHAPE)),
        "gradients": torch.zeros(SHAPE, requires_grad=True),
        "meta": torch.zeros(SHAPE, device="meta"),
        "dense": torch.zeros(SHAPE).to_sparse(),
        "no tensor": "abc",
    }
    with cache.lookup(large, range(TOKENS)) as match:
        for message, tensor in wrong.items():
            fine = [torch.full(SHAPE, 9.0) for _ in range(3)]
            with pytest.raises(UnsupportedTensorError, match=message):
                match.load([(fine[0], fine[1]), (fine[2], tensor)])
            assert all(float(tensor.min()) == 9 for tensor in fine), "nothing was written"
        detached = torch.zeros(SHAPE, requires_grad=True).detach()
        match.load([(detached, torch.empty(SHAPE)), (torch.empty(SHAPE), torch.empty(SHAPE))])


def test_tensors_without_data_or_with_a_dtype_of_their_own_are_refused_by_what_to_do() -> None:
    """Offloaded, quantised and meta tensors ended with torch's own errors, or a crash."""
    cache = SimpleKVCache(max_size_gb=0.01)
    tokens = KVCache(max_size_gb=0.01)
    namespace = Namespace("m", layers=1, kv_heads=1, head_dim=4, dtype="float32", block_tokens=4)
    taken = torch.ones(8, 1, 4)
    taken.untyped_storage().resize_(0)
    with torch.device("meta"):
        meta = torch.nn.Linear(4, 8).weight
    refused: dict[str, tuple[Any, str]] = {
        "meta": (torch.ones(8, 1, 4, device="meta"), "offloaded"),
        "a weight on meta": (meta, "offloaded"),
        "quantised": (torch.quantize_per_tensor(torch.ones(8, 1, 4), 0.1, 0, torch.quint8), "dequantize"),
        "taken": (taken, "taken away"),
        "sparse": (torch.ones(8, 1, 4).to_sparse(), "to_dense"),
        "complex": (torch.ones(8, 1, 4, dtype=torch.complex64), "convert it"),
        "bool": (torch.ones(8, 1, 4, dtype=torch.bool), "convert it"),
        "list": ([1.0], "numpy array"),
        "none": (None, "numpy array"),
    }
    right = torch.ones(8, 1, 4)
    for tensor, what in refused.values():
        for call in (
            lambda tensor=tensor: cache.cache_kv("p", 0, right, tensor),
            lambda tensor=tensor: cache.cache_all_layers("p", {0: (tensor, right)}),
            lambda tensor=tensor: tokens.store(namespace, range(8), [(right, tensor)]),
        ):
            with pytest.raises(UnsupportedTensorError, match=what):
                call()
    assert cache.get_stats()["entries"] == tokens.stats()["entries"] == 0
