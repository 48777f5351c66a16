"""Blocks of 2 MiB in RAM: kvkeep beside a dict of arrays and redis on the same machine, in turns. Prints medians.

    memory.py

A store copies a prompt's K and V in, a load copies them out into arrays of the caller's. Redis is asked through a Unix socket, all blocks in one
pipeline. Bytes a second of KV, beside memcpy.
"""

from __future__ import annotations

import hashlib
import pathlib
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable

import numpy as np
import redis

from kvkeep import KVCache, Namespace

LAYERS, KV_HEADS, HEAD_DIM, BLOCK_TOKENS, BLOCKS, ROUNDS = 8, 8, 128, 64, 16, 9
TOKENS = BLOCK_TOKENS * BLOCKS
namespace = Namespace("peers", layers=LAYERS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype="float16", block_tokens=BLOCK_TOKENS)
prompt = list(range(TOKENS))


def arrays(value: float) -> list[tuple[np.ndarray, np.ndarray]]:
    shape = (TOKENS, KV_HEADS, HEAD_DIM)
    return [(np.full(shape, value, np.float16), np.full(shape, value, np.float16)) for _ in range(LAYERS)]


source, target = arrays(1.5), arrays(0)
BYTES = sum(k.nbytes + v.nbytes for k, v in source)


def part(array: np.ndarray, block: int) -> np.ndarray:
    return array[block * BLOCK_TOKENS : (block + 1) * BLOCK_TOKENS]


def keys() -> list[str]:
    """One for each block, over all tokens before it: what a cache of prefixes needs, whoever makes it."""
    hasher, names = hashlib.sha256(), []
    for block in range(BLOCKS):
        hasher.update(np.array(prompt[block * BLOCK_TOKENS : (block + 1) * BLOCK_TOKENS], np.uint32).tobytes())
        names.append(hasher.copy().hexdigest())
    return names


class Kvkeep:
    def __init__(self) -> None:
        self.cache = KVCache(max_size_gb=3 * BYTES / 2**30)

    def forget(self) -> None:
        self.cache.remove(namespace, prompt)

    def store(self) -> None:
        self.cache.store(namespace, prompt, source)

    def load(self) -> None:
        with self.cache.lookup(namespace, prompt) as hit:
            assert hit.cached_tokens == TOKENS
            hit.load(target)


class Dict:
    def __init__(self) -> None:
        self.blocks: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}

    def forget(self) -> None:
        self.blocks.clear()

    def store(self) -> None:
        for block, key in enumerate(keys()):
            self.blocks[key] = [(part(k, block).copy(), part(v, block).copy()) for k, v in source]

    def load(self) -> None:
        for block, key in enumerate(keys()):
            for (k, v), (to_k, to_v) in zip(self.blocks[key], target):
                part(to_k, block)[:], part(to_v, block)[:] = k, v


class Redis:
    def __init__(self, path: pathlib.Path) -> None:
        self.client = redis.Redis(unix_socket_path=str(path))

    def forget(self) -> None:
        self.client.flushall()

    def store(self) -> None:
        pipe = self.client.pipeline(transaction=False)
        for block, key in enumerate(keys()):
            pipe.set(key, b"".join(part(side, block).tobytes() for pair in source for side in pair))
        pipe.execute()

    def load(self) -> None:
        for block, value in enumerate(self.client.mget(keys())):
            flat = np.frombuffer(value, np.float16).reshape(LAYERS, 2, BLOCK_TOKENS, KV_HEADS, HEAD_DIM)
            for layer, (to_k, to_v) in enumerate(target):
                part(to_k, block)[:], part(to_v, block)[:] = flat[layer]


def seconds(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def copy() -> None:
    for (k, v), (to_k, to_v) in zip(source, target):
        np.copyto(to_k, k), np.copyto(to_v, v)


def main() -> None:
    with tempfile.TemporaryDirectory() as home:
        path = pathlib.Path(home) / "redis.sock"
        server = subprocess.Popen(["redis-server", "--port", "0", "--unixsocket", str(path), "--save", "", "--appendonly", "no"], stdout=subprocess.DEVNULL)
        try:
            while not path.exists():
                time.sleep(0.05)
            peers = {"kvkeep": Kvkeep(), "a dict of arrays": Dict(), "redis, Unix socket": Redis(path)}
            times: dict[str, dict[str, list[float]]] = {name: {"store": [], "load": []} for name in peers}
            memcpy = []
            for number in range(ROUNDS + 1):
                memcpy.append(seconds(copy))
                for name, peer in peers.items():
                    peer.forget()
                    took = {"store": seconds(peer.store)}
                    for _, array in ((0, t) for pair in target for t in pair):
                        array.fill(0)
                    took["load"] = seconds(peer.load)
                    assert all(np.array_equal(a, b) for pair, made in zip(source, target) for a, b in zip(pair, made)), name
                    if number:
                        for kind, value in took.items():
                            times[name][kind].append(value)
        finally:
            server.terminate()
            server.wait(30)
    rate = lambda values: BYTES / statistics.median(values) / 1e9  # noqa: E731
    print(f"\nGB/s, {BLOCKS} blocks of 2 MiB in RAM, medians of {ROUNDS}, in turns; memcpy {rate(memcpy[1:]):.1f}")
    print("| | store | load |\n|---|---|---|")
    for name, took in times.items():
        print(f"| {name} | {rate(took['store']):.1f} | {rate(took['load']):.1f} |")


if __name__ == "__main__":
    main()
