"""Figures of the Python front door, each beside its reference in the same run: `python -m kvkeep.bench`.

Ours and the reference take turns, round by round, and the median round counts. One thread of torch.
With `--disk DIR`, storing and loading cold in that directory too, beside LMCache's local disk where that is installed.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import statistics
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from kvkeep import KVCache, Namespace, SimpleKVCache

LAYERS, KV_HEADS, HEAD_DIM = 32, 8, 64
CHARS_A_TOKEN = 4


class PlainDictCache:
    """What one would write first: tensors in a dict under SHA-256 of the prefix and the layer, with a
    TTL, least recently used order, counters and a lock."""

    def __init__(self, ttl_seconds: float = 3600.0) -> None:
        self._entries: OrderedDict[str, tuple[Any, Any, float]] = OrderedDict()
        self._lock = threading.Lock()
        self._ttl_seconds = ttl_seconds
        self.hits = self.misses = 0

    def cache_kv(self, prefix: str, layer: int, k: Any, v: Any) -> None:
        with self._lock:
            self._entries[self._key(prefix, layer)] = (k, v, time.time())

    def get_cached_kv(self, prefix: str, layer: int) -> tuple[Any, Any] | None:
        key = self._key(prefix, layer)
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                self.misses += 1
                return None
            k, v, stored_at = entry
            if time.time() - stored_at > self._ttl_seconds:
                del self._entries[key]
                self.misses += 1
                return None
            self._entries.move_to_end(key)
            self.hits += 1
            return k, v

    def get_all_layers(self, prefix: str, num_layers: int) -> dict[int, tuple[Any, Any]] | None:
        found = {}
        for layer in range(num_layers):
            pair = self.get_cached_kv(prefix, layer)
            if pair is None:
                return None
            found[layer] = pair
        return found

    @staticmethod
    def _key(prefix: str, layer: int) -> str:
        return f"{hashlib.sha256(prefix.encode()).hexdigest()}:{layer}"


class Report:
    """Results, printed as they come."""

    def __init__(self, quiet: bool) -> None:
        self.results: list[dict[str, Any]] = []
        self._quiet = quiet

    def add(self, name: str, value: float, unit: str, reference: str, ratio: float, bar: str) -> None:
        self.results.append(
            {"name": name, "value": value, "unit": unit, "reference": reference, "ratio": ratio, "bar": bar}
        )
        if not self._quiet:
            print(f"{name:<58} {value:9.2f} {unit:<9} {reference:<28} {ratio:6.2f}x  {bar}", flush=True)


def turns(ours: Callable[[], object], theirs: Callable[[], object], times: int, rounds: int) -> tuple[float, float]:
    """Median seconds of one call of each."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for call in (ours, theirs):
        call()
    gc.collect()
    for _ in range(rounds):
        for call, into in zip((ours, theirs), seconds, strict=True):
            begin = time.perf_counter()
            for _ in range(times):
                call()
            into.append((time.perf_counter() - begin) / times)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def prefix_of(tokens: int) -> str:
    return "".join(chr(97 + number % 26) for number in range(tokens * CHARS_A_TOKEN))


def layer_tensors(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (1, KV_HEADS, tokens, HEAD_DIM)
    return torch.randn(shape).to(torch.float16), torch.randn(shape).to(torch.float16)


def hits(report: Report, sizes: list[int], rounds: int) -> None:
    for tokens in sizes:
        ours, theirs, prefix = SimpleKVCache(max_size_gb=1.5), PlainDictCache(), prefix_of(tokens)
        pair = layer_tensors(tokens)
        assert ours.cache_all_layers(prefix, {layer: pair for layer in range(LAYERS)})
        for layer in range(LAYERS):
            theirs.cache_kv(prefix, layer, *pair)

        def all_layers(cache: Any) -> None:
            found = cache.get_all_layers(prefix, LAYERS)
            for k, v in found.values():
                assert k is not v

        def one_by_one(cache: Any) -> None:
            for layer in range(LAYERS):
                k, v = cache.get_cached_kv(prefix, layer)
                assert k is not v

        def new_text(cache: Any) -> None:
            # A string object of its own each time, as a server has that takes its prompts off a socket.
            found = cache.get_all_layers(encoded.decode(), LAYERS)
            assert len(found) == LAYERS

        encoded = prefix.encode()
        for name, work, per, bar in (
            ("get_all_layers, 32 layers", all_layers, 1, "3x"),
            ("get_all_layers, 32 layers, a new string each time", new_text, 1, "3x"),
            ("get_cached_kv, layer after layer", one_by_one, LAYERS, "1x"),
        ):
            mine, dicts = turns(lambda w=work: w(ours), lambda w=work: w(theirs), 40, rounds)  # type: ignore[misc]
            report.add(
                f"{name}, {tokens} tokens", mine / per * 1e6, "µs", f"dict {dicts / per * 1e6:.2f} µs", dicts / mine, bar
            )
        del theirs, ours, pair


def reading(report: Report, rounds: int) -> None:
    """The first reading of a hit's memory, page faults included."""
    for tokens in (256, 2048):
        cache, prefix, pair = SimpleKVCache(max_size_gb=1), prefix_of(tokens), layer_tensors(tokens)
        cache.cache_kv(prefix, 0, *pair)
        into = torch.empty_like(pair[0])

        def ours() -> None:
            for tensor in cache.get_cached_kv(prefix, 0):  # type: ignore[union-attr]
                into.copy_(tensor)  # type: ignore[arg-type]

        def theirs() -> None:
            for tensor in pair:
                into.copy_(tensor)

        mine, plain = turns(ours, theirs, 30, rounds)
        size = 2 * pair[0].nbytes
        report.add(
            f"hit and copy out all of it, {size >> 10} KiB", size / mine / 1e9, "GB/s",
            f"memcpy {size / plain / 1e9:.1f} GB/s", plain / mine, "–",
        )  # fmt: skip


def storing(report: Report, rounds: int) -> None:
    for mib in (2, 8, 32):
        cache = SimpleKVCache(max_size_gb=1)
        k = torch.randn(mib << 18).reshape(1, 8, -1, 64)[:, :, : (mib << 18) // 1024]
        k = k.contiguous()
        v = k.clone()
        # In turn, as a store must that replaces what may still be read.
        targets = [[np.zeros(k.shape, np.float32) for _ in "kv"] for _ in range(2)]
        sources = k.numpy(), v.numpy()

        def copy() -> None:
            targets.reverse()
            for target, source in zip(targets[0], sources, strict=True):
                np.copyto(target, source)

        size = 2 * k.nbytes
        mine, memcpy = turns(
            lambda: cache.cache_kv("p", 0, k, v), copy, max(1, 128 // mib), rounds
        )
        report.add(
            f"cache_kv, K and V of {size >> 20} MiB together", size / mine / 1e9, "GB/s",
            f"memcpy {size / memcpy / 1e9:.1f} GB/s", memcpy / mine, "0.8x",
        )  # fmt: skip


def loading(report: Report, rounds: int) -> None:
    for order in ("token_head", "head_token"):
        tokens, layers = 2048, 8
        namespace = Namespace(
            "m", layers=layers, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype="f16", order=order
        )
        cache = KVCache(max_size_gb=1)
        shape = namespace.shape(tokens, HEAD_DIM)
        kv = [tuple(torch.randn(shape).to(torch.float16) for _ in range(2)) for _ in range(layers)]
        ids = np.arange(tokens, dtype=np.uint32)
        cache.store(namespace, ids, kv)  # type: ignore[arg-type]
        found = cache.lookup(namespace, ids)
        into = [tuple(torch.empty(shape, dtype=torch.float16) for _ in range(2)) for _ in range(layers)]
        plain = [tuple(tensor.numpy().copy() for tensor in pair) for pair in into]
        sources = [tuple(tensor.numpy() for tensor in pair) for pair in kv]

        def copy() -> None:
            for targets, pair in zip(plain, sources, strict=True):
                for target, source in zip(targets, pair, strict=True):
                    np.copyto(target, source)

        size = sum(tensor.nbytes for pair in into for tensor in pair)
        mine, memcpy = turns(lambda: found.load(into), copy, 5, rounds)  # type: ignore[arg-type]
        report.add(
            f"load {found.blocks} blocks into one tensor a layer, {order}", size / mine / 1e9, "GB/s",
            f"memcpy {size / memcpy / 1e9:.1f} GB/s", memcpy / mine, "0.8x",
        )  # fmt: skip


def threads(report: Report, seconds: float) -> None:
    tokens = 1024
    cache, prefix, pair = SimpleKVCache(max_size_gb=1.5), prefix_of(tokens), layer_tensors(tokens)
    cache.cache_all_layers(prefix, {layer: pair for layer in range(LAYERS)})

    def rate(count: int, work: Callable[[int], object]) -> float:
        """Calls a second of all threads together."""
        counts, stop, start = [0] * count, threading.Event(), threading.Barrier(count + 1)

        def run(me: int) -> None:
            start.wait()
            while not stop.is_set():
                work(me)
                counts[me] += 1

        running = [threading.Thread(target=run, args=(me,)) for me in range(count)]
        for thread in running:
            thread.start()
        start.wait()
        begin = time.perf_counter()
        time.sleep(seconds)
        stop.set()
        for thread in running:
            thread.join()
        return sum(counts) / (time.perf_counter() - begin)

    big = torch.randn(8, 256, 256)
    numbers = SimpleKVCache(max_size_gb=0.1)
    numbers.cache_kv(prefix, 0, pair[0].numpy(), pair[1].numpy())
    into = [torch.empty_like(pair[0]) for _ in range(8)]

    def hit_and_copy(me: int) -> None:
        for tensor in cache.get_cached_kv(prefix, 3):  # type: ignore[union-attr]
            into[me].copy_(tensor)  # type: ignore[arg-type]

    for name, work, unit in (
        ("cache_kv, K and V of 4 MiB", lambda me: cache.cache_kv(f"t{me}", 0, big, big), "calls/s"),
        ("get_cached_kv, and copy out K and V of 2 MiB", hit_and_copy, "calls/s"),
        ("get_cached_kv, numpy", lambda me: numbers.get_cached_kv(prefix, 0), "calls/s"),
        ("get_cached_kv", lambda me: cache.get_cached_kv(prefix, 3), "calls/s"),
        ("get_all_layers, 32 layers", lambda me: cache.get_all_layers(prefix, LAYERS), "calls/s"),
        ("(torch alone: 64 tensors made and dropped)", lambda me: [pair[0].detach() for _ in range(64)], "calls/s"),
    ):
        work(0)
        rounds = [(rate(1, work), rate(8, work)) for _ in range(3)]
        one, eight = (statistics.median(figures) for figures in zip(*rounds, strict=True))
        report.add(f"8 threads: {name}", eight, unit, f"1 thread {one:.0f}", eight / one, "1x")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kvkeep.bench", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds")
    parser.add_argument("--disk", metavar="DIR", help="store and load cold in DIR too; takes 3 GiB there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    report, rounds = Report(quiet=options.json), 5 if options.quick else 25
    hits(report, [256, 2048] if options.quick else [256, 512, 1024, 2048, 4096, 8192], rounds)
    reading(report, rounds)
    storing(report, rounds)
    loading(report, rounds)
    threads(report, 0.3 if options.quick else 1.0)
    if options.disk is not None:
        from kvkeep import bench_disk

        bench_disk.figures(report, options.disk, 3 if options.quick else 7)
    if options.json:
        print(json.dumps({"torch": torch.__version__, "numpy": np.__version__, "results": report.results}, indent=2))


if __name__ == "__main__":
    main()
