"""Copies between a GPU and the cache's pages, on the CPU: torch's own copies between tensors in memory, with streams and a driver
that only say what was asked of them. What only a GPU can show is in `test_on_a_gpu.py`."""

from __future__ import annotations

import gc
import threading
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import kvkeep
from kvkeep import KVCache, Namespace, SimpleKVCache, _gpu, _pinned
from kvkeep._gpu import Gpu


class Stream:
    """Does at once what is put on it; says whom it waits for."""

    def __init__(self, name: str, log: list[Any]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append((self.name, "behind", other.name))

    def synchronize(self) -> None:
        self.log.append((self.name, "synchronized"))

    def query(self) -> bool:
        return True


class Event:
    ended = True

    def record(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return type(self).ended

    def synchronize(self) -> None:
        type(self).ended = True

    def elapsed_time(self, end: Any) -> float:
        return 2.0


class OnTheCpu:
    """A driver for tensors in memory. `registered`: address to size."""

    def __init__(self, *, refuses_after: int | None = None, buffers: bool = True) -> None:
        self.log: list[Any] = []
        self.registered: dict[int, int] = {}
        self.refuses_after, self.buffers, self.made = refuses_after, buffers, 0
        self.event_class = type("Event", (Event,), {"ended": True})
        self._lanes = (Stream("one", self.log), Stream("two", self.log))

    def owns(self, tensor: Any) -> bool:
        return isinstance(tensor, torch.Tensor)

    def lanes(self, device: Any) -> tuple[Stream, ...]:
        return self._lanes

    def current(self, device: Any) -> Stream:
        return Stream("caller", self.log)

    def on(self, stream: Any) -> Any:
        return nullcontext()

    def event(self) -> Any:
        return self.event_class()

    def register(self, address: int, size: int) -> None:
        if self.refuses_after is not None and len(self.registered) >= self.refuses_after:
            raise RuntimeError("operation not permitted")
        self.registered[address] = size

    def unregister(self, address: int) -> None:
        del self.registered[address]

    def buffer(self, size: int) -> torch.Tensor:
        if not self.buffers:
            raise RuntimeError("out of memory")
        self.made += 1
        return torch.empty(size, dtype=torch.uint8)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that every copy is cut, and the ring goes round."""
    monkeypatch.setattr(_pinned, "PIECE_BYTES", 2 << 20)
    monkeypatch.setattr(_pinned, "SLOT_BYTES", 12_345)
    monkeypatch.setattr(_gpu, "SLOT_BYTES", 40_000)
    monkeypatch.setattr(_gpu, "_TOGETHER_BYTES", 500_000)


def on(cache: Any, runtime: OnTheCpu) -> Gpu:
    """From now on the cache takes every tensor of torch for one on a GPU."""
    home = cache._home
    home._gpu = Gpu(home._ram, runtime)
    home._gpu.pinned.wait()
    return home._gpu


def named(size_gb: float, runtime: OnTheCpu) -> SimpleKVCache:
    cache = SimpleKVCache(size_gb)
    gpu = on(cache, runtime)
    cache._hand_out(lambda held, places: gpu.load_named(torch.device("cpu"), held, places))
    return cache


WAYS = {
    "registered": lambda: OnTheCpu(),
    "registered in part": lambda: OnTheCpu(refuses_after=1),
    "through buffers": lambda: OnTheCpu(refuses_after=0),
    "neither": lambda: OnTheCpu(refuses_after=0, buffers=False),
}


@pytest.fixture(params=WAYS)
def runtime(request: pytest.FixtureRequest) -> OnTheCpu:
    return WAYS[request.param]()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn, torch.float64])
def test_named_layers_come_back_as_they_were(runtime: OnTheCpu, dtype: torch.dtype) -> None:
    cache = named(0.01, runtime)
    shapes = [(1, 4, 77, 24), (3,), (5, 1), (1, 2, 300, 64)]
    layers = {n: tuple((torch.randn(s) * 9).to(dtype) for s in (shapes[n], shapes[-n])) for n in range(4)}
    assert cache.cache_all_layers("a prefix", layers)
    found = cache.get_all_layers("a prefix", 4)
    assert found is not None
    for layer, pair in layers.items():
        for stored, given in zip(found[layer], pair, strict=True):
            assert stored.dtype == given.dtype and stored.shape == given.shape
            assert torch.equal(stored.view(torch.uint8), given.view(torch.uint8))
    k, v = cache.get_cached_kv("a prefix", 2) or ()
    assert torch.equal(k.view(torch.uint8), layers[2][0].view(torch.uint8)) and v.shape == layers[2][1].shape


@pytest.mark.parametrize("numbers", [1024, 1030, 1008, 1, 60_000])
def test_many_layers_of_one_shape_come_back_as_they_were(runtime: OnTheCpu, numbers: int) -> None:
    cache = named(0.02, runtime)
    layers = {n: (torch.randn(2, numbers), torch.randn(2, numbers)[:, :]) for n in range(12)}
    layers[7] = (torch.randn(numbers, 2).T, torch.randn(2, numbers).half())
    assert cache.cache_all_layers("a prefix", layers)
    found = cache.get_all_layers("a prefix", 12) or {}
    assert all(torch.equal(a, b) for n, pair in layers.items() for a, b in zip(found[n], pair, strict=True))


def test_tensors_that_cross_the_bus_together_are_those_that_lie_together() -> None:
    f32, f16 = torch.float32, torch.float16
    places = [(0, f32, (8,)), (32, f32, (8,)), (64, f32, (8,)), (96, f32, (4, 2)), (128, f16, (16,)), (9000, f16, (16,)), (9100, f16, (16,))]
    groups = [(g.of, g.size, g.is_dense) for g in _gpu._groups(places)]
    assert groups == [(slice(0, 3), 96, True), (slice(3, 4), 32, True), (slice(4, 5), 32, True), (slice(5, 7), 132, False)]
    assert [g.of for g in _gpu._groups([(n * 250_000, f32, (62_500,)) for n in range(5)])] == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert [g.of for g in _gpu._groups([(64, f32, (8,)), (32, f32, (8,)), (32, f32, (8,))])] == [slice(0, 1), slice(1, 2), slice(2, 3)]


def test_what_is_handed_out_is_the_callers_own(runtime: OnTheCpu) -> None:
    cache = named(0.01, runtime)
    given = torch.randn(2, 500)
    cache.cache_kv("a prefix", 0, given, given)
    k, _ = cache.get_cached_kv("a prefix", 0) or ()
    k.zero_()
    again, _ = cache.get_cached_kv("a prefix", 0) or ()
    assert torch.equal(again, given)


def test_tensors_that_are_not_contiguous_or_need_gradients_are_stored(runtime: OnTheCpu) -> None:
    cache = named(0.01, runtime)
    k, v = torch.randn(30, 20, 10).permute(2, 0, 1), torch.randn(1, 40, requires_grad=True)[:, ::3]
    assert cache.cache_kv("a prefix", 0, k, v)
    found = cache.get_cached_kv("a prefix", 0) or ()
    assert torch.equal(found[0], k) and torch.equal(found[1], v) and not found[1].requires_grad


@pytest.mark.parametrize("order", ["head_token", "token_head"])
@pytest.mark.parametrize("v_head_dim", [24, 40, 0])
@pytest.mark.parametrize("first_token", [0, 16, 19])
def test_blocks_have_the_bytes_that_the_cpu_would_have_stored(runtime: OnTheCpu, order: Any, v_head_dim: int, first_token: int) -> None:
    namespace = Namespace("m", layers=3, kv_heads=2, head_dim=24, v_head_dim=v_head_dim, dtype="bfloat16", block_tokens=16, order=order)
    tokens, by_cpu, by_gpu = list(range(150)), KVCache(0.01), KVCache(0.01)
    on(by_gpu, runtime)
    whole = _layers(namespace, 150)
    for cache in (by_cpu, by_gpu):
        cache.store(namespace, tokens[:32], _part(namespace, whole, 0, 32))
        report = cache.store(namespace, tokens, _part(namespace, whole, first_token, 150), first_token=first_token)
        assert report.stored_blocks == 7 and report.present_blocks == 2
    with by_cpu.lookup(namespace, tokens) as one, by_gpu.lookup(namespace, tokens) as other:
        assert one.cached_tokens == other.cached_tokens == 144
        ways = (one.to_torch(), other.to_torch(), _loaded(other, 144), _new_on_gpu(other))
        for layers in ways:
            for pair, given in zip(layers, _part(namespace, whole, 0, 144), strict=True):
                assert torch.equal(pair[0], given[0]) and torch.equal(pair[1], given[1])


@pytest.mark.parametrize("order", ["head_token", "token_head"])
@pytest.mark.parametrize("v_head_dim", [24, 40, 0])
def test_blocks_are_loaded_to_their_tokens_and_the_rest_is_left_alone(runtime: OnTheCpu, order: Any, v_head_dim: int) -> None:
    namespace = Namespace("m", layers=3, kv_heads=2, head_dim=24, v_head_dim=v_head_dim, dtype="float32", block_tokens=16, order=order)
    cache, tokens = KVCache(0.01), list(range(150))
    whole = _layers(namespace, 150)
    cache.store(namespace, tokens, whole)
    on(cache, runtime)
    with cache.lookup(namespace, tokens) as match:
        into = [tuple(torch.full(namespace.shape(200, dim), 7.0) for dim in (24, v_head_dim)) for _ in range(2)]
        match.load(into, first_layer=1)
    at = 1 if order == "head_token" else 0
    for pair, given in zip(into, whole[1:], strict=True):
        for target, source in zip(pair, given, strict=True):
            assert torch.equal(target.narrow(at, 0, 144), source.narrow(at, 0, 144))
            assert bool((target.narrow(at, 144, 56) == 7).all())


def test_blocks_that_lie_apart_and_around_others_are_stored_and_loaded(runtime: OnTheCpu) -> None:
    namespace = Namespace("m", layers=2, kv_heads=2, head_dim=8, dtype="float32", block_tokens=16, order="head_token")
    cache = KVCache(0.01)
    on(cache, runtime)
    for salt in range(40):  # leaves holes of one block in the memory
        cache.store(namespace, [salt] * 16, _layers(namespace, 16))
    for salt in range(0, 40, 2):
        cache.remove(namespace, [salt] * 16)
    tokens, whole = list(range(1000, 1400)), _layers(namespace, 400)
    cache.store(namespace, tokens, whole)
    with cache.lookup(namespace, tokens) as match:
        assert match.cached_tokens == 400
        held, runs = match._raw.hold()
        assert len(runs) > 5 and sum(count for _, count, _ in runs) == 25
        for (k, v), (wk, wv) in zip(match.to_torch(), whole, strict=True):
            assert torch.equal(k, wk) and torch.equal(v, wv)
        for layers in (_loaded(match, 400), _new_on_gpu(match)):
            for (k, v), (wk, wv) in zip(layers, whole, strict=True):
                assert torch.equal(k, wk) and torch.equal(v, wv)
        assert len(_gpu._Shape(namespace).chunks(runs)) < len(runs), "blocks that lie apart cross the bus together"


def test_a_store_is_read_behind_the_stream_that_made_it_and_waited_for() -> None:
    runtime = OnTheCpu()
    cache = named(0.01, runtime)
    cache.cache_kv("a prefix", 0, torch.ones(9), torch.ones(9))
    assert runtime.log == [("one", "behind", "caller"), ("one", "synchronized")]


def test_a_load_is_waited_for_by_the_stream_that_asked_and_not_by_the_caller() -> None:
    runtime = OnTheCpu()
    cache = named(0.01, runtime)
    cache.cache_kv("a prefix", 0, torch.ones(9), torch.ones(9))
    runtime.log.clear()
    cache.get_cached_kv("a prefix", 0)
    assert runtime.log == [("one", "behind", "caller"), ("two", "behind", "caller"), ("caller", "behind", "one"), ("caller", "behind", "two")]


def test_pages_are_held_until_the_copy_from_them_has_ended() -> None:
    runtime = OnTheCpu()
    cache = named(0.01, runtime)
    cache.cache_kv("a prefix", 0, torch.ones(900_000), torch.ones(900_000))
    runtime.event_class.ended = False
    cache.get_cached_kv("a prefix", 0)
    gc.collect()
    assert cache.get_stats()["held_bytes"] > 0
    assert not cache.cache_kv("another", 0, torch.ones(1_500_000), torch.ones(900_000)), "its pages are being read"
    runtime.event_class.ended = True
    assert cache.cache_kv("another", 0, torch.ones(1_500_000), torch.ones(900_000))
    assert cache.get_stats()["held_bytes"] == 0


def test_closing_waits_for_copies_and_forgets_the_memory() -> None:
    runtime = OnTheCpu()
    cache = named(0.01, runtime)
    cache.cache_kv("a prefix", 0, torch.ones(9), torch.ones(9))
    runtime.event_class.ended = False
    k, _ = cache.get_cached_kv("a prefix", 0) or ()
    assert runtime.registered
    cache.close()
    assert not runtime.registered and runtime.event_class.ended and bool((k == 1).all())
    with pytest.raises(kvkeep.ClosedError):
        cache.cache_kv("a prefix", 0, torch.ones(9), torch.ones(9))


def test_a_cache_that_is_dropped_forgets_the_memory() -> None:
    runtime = OnTheCpu()
    cache = named(0.01, runtime)
    assert runtime.registered
    del cache
    gc.collect()
    assert not runtime.registered


def test_a_write_that_fails_stores_nothing_and_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = OnTheCpu()
    cache = named(0.01, runtime)
    monkeypatch.setattr(Gpu, "_from_gpu", lambda *_: (_ for _ in ()).throw(RuntimeError("the GPU is lost")))
    with pytest.raises(RuntimeError, match="the GPU is lost"):
        cache.cache_kv("a prefix", 0, torch.ones(9), torch.ones(9))
    assert runtime.log[-1] == ("one", "synchronized")
    monkeypatch.undo()
    assert cache.get_cached_kv("a prefix", 0) is None
    assert cache.get_stats()["used_bytes"] == 0 and cache.cache_kv("a prefix", 0, torch.ones(9), torch.ones(9))


def test_ctrl_c_while_a_store_is_waited_for_frees_no_page_that_the_gpu_still_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    # Interrupted in the first wait, the call ended, its pages were free, and the GPU wrote into the next one's.
    runtime, waits = OnTheCpu(), []

    def synchronize(self: Stream) -> None:
        waits.append(self.name)
        if len(waits) == 1:
            raise KeyboardInterrupt

    cache = named(0.01, runtime)
    monkeypatch.setattr(Stream, "synchronize", synchronize)
    with pytest.raises(KeyboardInterrupt):
        cache.cache_kv("a prefix", 0, torch.ones(9), torch.ones(9))
    assert waits == ["one", "one"]


def test_memory_is_registered_in_the_background_and_opening_does_not_wait() -> None:
    may_go_on = threading.Event()

    class Slow(OnTheCpu):
        def register(self, address: int, size: int) -> None:
            may_go_on.wait(10)
            super().register(address, size)

    runtime, cache = Slow(), SimpleKVCache(0.01)
    gpu = cache._home._gpu = Gpu(cache._home._ram, runtime)
    assert gpu.pinned.until == 0
    assert cache.cache_kv("a prefix", 0, torch.ones(99), torch.ones(99)) and runtime.made == _pinned.SLOTS
    may_go_on.set()
    gpu.pinned.wait()
    assert gpu.pinned.until == gpu.pinned.capacity == sum(runtime.registered.values())


def test_registering_leaves_the_machine_its_memory(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    says = "MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 300 kB\n"
    assert _pinned._has_room(200 << 10, lambda: says) and not _pinned._has_room(201 << 10, lambda: says)
    assert _pinned._has_room(1 << 60, lambda: "nothing that is known")
    monkeypatch.setattr(_pinned, "_has_room", lambda size: False)
    runtime = OnTheCpu()
    cache = named(0.01, runtime)
    assert not runtime.registered and "too little memory" in caplog.text
    assert cache.cache_kv("a prefix", 0, torch.ones(99), torch.ones(99)) and runtime.made == _pinned.SLOTS


def test_a_small_cache_is_registered_to_its_end() -> None:
    runtime = OnTheCpu()
    cache = named(0.003, runtime)
    gpu = cache._home.gpu()
    assert gpu.pinned.until == gpu.pinned.capacity == sum(runtime.registered.values())


def test_tensors_that_do_not_fit_are_refused_as_on_the_cpu() -> None:
    namespace = Namespace("m", layers=2, kv_heads=2, head_dim=8, dtype="float32", block_tokens=16)
    tokens, said = list(range(32)), {}
    good = _layers(namespace, 32)
    wrong: dict[str, Any] = {
        "count": good[:1],
        "none": [],
        "dtype": [(k.half(), v.half()) for k, v in good],
        "shape": [(k[:, :1], v) for k, v in good],
        "short": [(k[:31], v) for k, v in good],
    }
    for gpu in (False, True):
        cache = KVCache(0.01)
        if gpu:
            on(cache, OnTheCpu())
        for name, layers in wrong.items():
            with pytest.raises(kvkeep.KvkeepError) as error:
                cache.store(namespace, tokens, layers)
            assert said.setdefault(name, (type(error.value), str(error.value))) == (type(error.value), str(error.value))
        with pytest.raises(kvkeep.EmptyTokensError):
            cache.store(namespace, [], good)
        assert cache.store(namespace, tokens, good).stored_blocks == 2
        with cache.lookup(namespace, tokens) as match, pytest.raises(kvkeep.KvkeepError) as error:
            match.load([(k[:16], v) for k, v in good])
        assert said.setdefault("load", str(error.value)) == str(error.value)


def test_many_threads_store_and_load_at_once(runtime: OnTheCpu) -> None:
    cache, wrong = named(0.02, runtime), []

    def work(number: int) -> None:
        for turn in range(20):
            given = torch.full((1000 + 77 * number,), float(100 * number + turn))
            cache.cache_kv(f"prefix {number}", 0, given, given)
            k, v = cache.get_cached_kv(f"prefix {number}", 0) or ()
            if not (torch.equal(k, given) and torch.equal(v, given)):
                wrong.append((number, turn))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_arrays_of_numpy_stay_on_the_cpu(runtime: OnTheCpu) -> None:
    cache = named(0.01, runtime)
    given = np.arange(99, dtype=np.float32)
    cache.cache_kv("a prefix", 0, given, given)
    cache.cache_kv("a prefix", 1, torch.ones(9), torch.ones(9))
    found = cache.get_all_layers("a prefix", 2) or {}
    assert isinstance(found[0][0], np.ndarray) and np.array_equal(found[0][1], given)
    assert isinstance(found[1][0], torch.Tensor) and bool((found[1][1] == 1).all())


def test_the_rate_of_loads_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gpu, "_RATE_FROM_BYTES", 1000)
    cache = named(0.01, OnTheCpu())
    gpu = cache._home.gpu()
    cache.cache_kv("a prefix", 0, torch.ones(500_000), torch.ones(500_000))
    guess = gpu.bytes_per_s
    for _ in range(40):
        cache.get_cached_kv("a prefix", 0)
    assert gpu.bytes_per_s != guess and abs(gpu.bytes_per_s / (4_000_000 / 0.002) - 1) < 0.01


def _layers(namespace: Namespace, tokens: int) -> list[Any]:
    dtype = torch.bfloat16 if namespace.dtype == "bf16" else torch.float32
    dims = (namespace.k_head_dim, namespace.v_head_dim)
    return [tuple(torch.randn(namespace.shape(tokens, dim)).to(dtype) for dim in dims) for _ in range(namespace.layers)]


def _part(namespace: Namespace, layers: list[Any], first: int, end: int) -> list[Any]:
    at = 1 if namespace.order == "head_token" else 0
    return [tuple(tensor.narrow(at, first, end - first) for tensor in pair) for pair in layers]


def _new_on_gpu(match: Any) -> list[Any]:
    """As `to_torch` makes them on a GPU, here for tensors in memory."""
    dtype = torch.bfloat16 if match.namespace.dtype == "bf16" else torch.float32
    make = lambda shape: torch.zeros(shape, dtype=dtype)  # noqa: E731
    return match._new_on(match._home.gpu(), torch.device("cpu"), make, match.cached_tokens)


def _loaded(match: Any, tokens: int) -> list[Any]:
    """As the GPU loads it, whichever device torch takes the tensors for."""
    namespace = match.namespace
    dtype = torch.bfloat16 if namespace.dtype == "bf16" else torch.float32
    dims = (namespace.k_head_dim, namespace.v_head_dim)
    into = [tuple(torch.zeros(namespace.shape(tokens, dim), dtype=dtype) for dim in dims) for _ in range(namespace.layers)]
    match.load(into)
    return into
