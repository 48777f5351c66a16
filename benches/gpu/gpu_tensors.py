"""Tensors on a GPU to and from kvkeep's memory, beside torch's own copies from and to pinned memory, and the first token of
a random Llama of 1.1 billion parameters with and without reuse. Prints a line of JSON for each figure.

    python gpu_tensors.py [copies] [refused] [generate] [--rounds N] [--lens 1024,32768] [--size-gb 12]

`copies` is 32 layers of 8 heads of 128 in bfloat16, as an 8B model has them. `refused` is the same where the driver registers
no memory. All rates are GB/s, medians; `ratio` is of torch's copy of as many bytes in the same run; `d2h_each` are torch's copies of
K and V of one layer, waited for, as `cache_kv` has to.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from kvkeep import KVCache, Namespace, SimpleKVCache, _gpu

LAYERS, HEADS, DIM = 32, 8, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["copies", "refused", "generate"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lens", default="1024,8192,32768")
    parser.add_argument("--size-gb", type=float, default=12)
    options = parser.parse_args()
    lens = [int(tokens) for tokens in options.lens.split(",")]
    say("machine", card=torch.cuda.get_device_name(), torch=torch.__version__)
    for what in options.what:
        if what == "copies":
            copies("registered", lens, options)
        elif what == "refused":
            refuse()
            copies("buffers", lens[:2], options)
        else:
            generate(lens, options)


def copies(way: str, lens: list[int], options: argparse.Namespace) -> None:
    for tokens in lens:
        layers = {n: (new(1, HEADS, tokens, DIM), new(1, HEADS, tokens, DIM)) for n in range(LAYERS)}
        torchs = pinned_rates(tokens, options.rounds)
        named(way, tokens, layers, torchs, options)
        for block_tokens in (16, 256):
            by_tokens(way, tokens, block_tokens, layers, torchs, options)


def named(way: str, tokens: int, layers: dict[int, Any], torchs: dict[str, float], options: argparse.Namespace) -> None:
    size = bytes_of(tokens)
    with SimpleKVCache(options.size_gb, device="cuda") as cache:
        first = seconds(lambda: cache.cache_all_layers("a", layers))
        done(way, "cache_all_layers, just opened", tokens, size / first, torchs["d2h"])
        begin = time.perf_counter()
        cache._home.gpu().pinned.wait()
        if tokens == 1024:
            say("pinned", way=way, gib=cache._home.gpu().pinned.until >> 30, seconds=round(time.perf_counter() - begin, 2))
        each = [seconds(lambda: cache.cache_all_layers("a", layers)) for _ in range(options.rounds)]
        done(way, "cache_all_layers", tokens, size / statistics.median(each), torchs["d2h"])
        each = [seconds(lambda: [cache.cache_kv("a", n, k, v) for n, (k, v) in layers.items()]) for _ in range(options.rounds)]
        rate = size / statistics.median(each)
        done(way, "cache_kv, layer by layer", tokens, rate, torchs["d2h"], ratio_of_as_small=rate / torchs["d2h_each"])
        cache.cache_all_layers("a", layers)
        found: Any = None
        each = []
        for _ in range(options.rounds + 1):
            found = None

            def get() -> None:
                nonlocal found
                found = cache.get_all_layers("a", LAYERS)

            each.append(seconds(get))
        done(way, "get_all_layers", tokens, size / statistics.median(each[1:]), torchs["h2d"], same=same(found, layers))


def by_tokens(
    way: str, tokens: int, block_tokens: int, layers: dict[int, Any], torchs: dict[str, float], options: argparse.Namespace
) -> None:
    size, ids = bytes_of(tokens), np.arange(tokens)
    namespace = Namespace(
        "m", layers=LAYERS, kv_heads=HEADS, head_dim=DIM, dtype="bfloat16", block_tokens=block_tokens, order="head_token"
    )
    given, found = [(k[0], v[0]) for k, v in layers.values()], None
    with KVCache(options.size_gb) as cache:
        cache.pin_memory()
        cache._home.gpu().pinned.wait()
        stores, loads = [], []
        for _ in range(options.rounds + 1):
            stores.append(seconds(lambda: cache.store(namespace, ids, given)))
            found = None

            def load() -> None:
                nonlocal found
                with cache.lookup(namespace, ids) as match:
                    found = match.to_torch(device="cuda")

            loads.append(seconds(load))
            is_same = all(torch.equal(one, other) for a, b in zip(found or [], given) for one, other in zip(a, b))
            cache.clear()
        what = f"of {block_tokens} tokens"
        done(way, f"store, blocks {what}", tokens, size / statistics.median(stores[1:]), torchs["d2h"])
        done(way, f"lookup and load, blocks {what}", tokens, size / statistics.median(loads[1:]), torchs["h2d"], same=is_same)


def generate(lens: list[int], options: argparse.Namespace) -> None:
    from kvkeep.transformers import CachedGenerator
    from kvkeep.transformers._generator import FirstToken
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, max_position_embeddings=40_000, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(1)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    cache = KVCache(options.size_gb)
    generator = CachedGenerator(model, cache, store_answers=False, weights="random, of seed 1")

    def ask(ids: torch.Tensor) -> tuple[float, float, Any]:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        output = generator.generate(ids, max_new_tokens=4, do_sample=False)
        torch.cuda.synchronize()
        return generator.last.ttft_seconds * 1e3, (time.perf_counter() - begin) * 1e3, output

    def plain(ids: torch.Tensor) -> tuple[float, Any]:
        torch.cuda.synchronize()
        first = FirstToken()
        output = model.generate(ids, max_new_tokens=4, do_sample=False, stopping_criteria=[first])
        return (first.seconds or 0) * 1e3, output

    def prompt(tokens: int) -> torch.Tensor:
        return torch.randint(1, 32000, (1, tokens + 32), device="cuda")

    for tokens in lens:  # kernels are chosen and compiled once
        for _ in range(2):
            ids = prompt(tokens)
            ask(ids), plain(ids), ask(ids)
    cache._home.gpu().pinned.wait()
    for tokens in lens:
        for _ in range(2):  # a state of the processor's that is this length's
            ids = prompt(tokens)
            plain(ids), ask(ids), ask(ids)
        rows: dict[str, list[float]] = {"plain": [], "cold": [], "warm": [], "cold_call": [], "warm_call": []}
        agree, cached, not_worth = 0, [], []
        for _ in range(options.rounds):
            ids = prompt(tokens)
            ms, expected = plain(ids)
            rows["plain"].append(ms)
            ms, call, _ = ask(torch.cat([ids[:, :tokens], prompt(0)], 1))  # its prefix is stored, its end is another one
            rows["cold"].append(ms), rows["cold_call"].append(call)
            ms, call, output = ask(ids)
            rows["warm"].append(ms), rows["warm_call"].append(call)
            agree += bool(torch.equal(output, expected))
            cached.append(generator.last.cached_tokens), not_worth.append(generator.last.not_worth_tokens)
        medians = {name: round(statistics.median(each), 2) for name, each in rows.items()}
        (worth,) = generator._worth.values()
        beside = {"begin_ms": worth._begin.seconds, "behind_ms": worth._behind.seconds}
        say(
            "first token, ms", tokens=tokens, **medians, warm_to_cold=round(medians["warm"] / medians["cold"], 3),
            same=agree, of=options.rounds, cached=cached, not_worth=not_worth, gb_per_s=round(cache.gpu_bytes_per_s / 1e9, 1),
            **{name: round(value * 1e3, 2) for name, value in beside.items()},
        )  # fmt: skip
    cache.close()


def pinned_rates(tokens: int, rounds: int) -> dict[str, float]:
    """torch's copies between pinned memory and the GPU, bytes a second."""
    host, device = torch.empty(bytes_of(tokens), dtype=torch.uint8, pin_memory=True), torch.empty(bytes_of(tokens), dtype=torch.uint8, device="cuda")
    d2h = [seconds(lambda: host.copy_(device, non_blocking=True)) for _ in range(rounds + 1)]
    h2d = [seconds(lambda: device.copy_(host, non_blocking=True)) for _ in range(rounds + 1)]
    pairs = list(zip(host.chunk(2 * LAYERS), device.chunk(2 * LAYERS)))

    def each() -> None:
        for number, (target, source) in enumerate(pairs):
            target.copy_(source, non_blocking=True)
            if number % 2:
                torch.cuda.current_stream().synchronize()

    d2h_each = [seconds(each) for _ in range(rounds + 1)]
    medians = {"d2h": d2h, "h2d": h2d, "d2h_each": d2h_each}
    rates = {name: host.numel() / statistics.median(each[1:]) for name, each in medians.items()}
    say("torch, pinned", tokens=tokens, **{name: round(rate / 1e9, 1) for name, rate in rates.items()})
    return rates


def refuse() -> None:
    """From now on the driver registers no memory."""

    def register(self: Any, address: int, size: int) -> None:
        raise RuntimeError("refused, for this measurement")

    _gpu.Cuda.register = register  # type: ignore[method-assign]


def new(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def bytes_of(tokens: int) -> int:
    return tokens * LAYERS * 2 * HEADS * DIM * 2


def seconds(work: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def same(found: dict[int, Any], layers: dict[int, Any]) -> bool:
    return all(torch.equal(a, b) for n, pair in layers.items() for a, b in zip(found[n], pair))


def done(way: str, what: str, tokens: int, rate: float, torchs: float, **more: Any) -> None:
    more = {name: round(value, 2) if isinstance(value, float) else value for name, value in more.items()}
    say(what, way=way, tokens=tokens, gb_per_s=round(rate / 1e9, 1), ratio=round(rate / torchs, 2), **more)


def say(what: str, **values: Any) -> None:
    print(json.dumps({"what": what, **values}), flush=True)


if __name__ == "__main__":
    main()
