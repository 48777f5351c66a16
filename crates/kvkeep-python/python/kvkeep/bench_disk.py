"""The disk tier from Python beside LMCache's local disk, in one directory: a part of `kvkeep.bench`.

Both store rounds of new blocks of 2 MiB and load them cold, 32 at a time, with direct I/O. Ours counts a store until
it is durable; LMCache syncs nothing, so its files are synced in the time that is counted, and once without.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvkeep import KVCache, Namespace

if TYPE_CHECKING:
    from kvkeep.bench import Report

LAYERS, KV_HEADS, HEAD_DIM, BLOCK_TOKENS = 32, 4, 64, 64
BLOCK_BYTES = 2 << 20
PROMPT_BLOCKS = 32
PROMPTS = 4
ROUND_BYTES = PROMPTS * PROMPT_BLOCKS * BLOCK_BYTES
# RAM for one round: storing the next one evicts it.
RAM_GB = ROUND_BYTES / (1 << 30) * 1.1


class Ours:
    """A cache with a disk tier."""

    def __init__(self, folder: Path) -> None:
        self._cache = KVCache(RAM_GB, disk_path=folder, disk_size_gb=8)
        self._namespace = Namespace(
            "bench", layers=LAYERS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype="f16", block_tokens=BLOCK_TOKENS
        )
        shape = self._namespace.shape(PROMPT_BLOCKS * BLOCK_TOKENS, HEAD_DIM)
        self._kv = [tuple(torch.randn(shape).to(torch.float16) for _ in range(2)) for _ in range(LAYERS)]

    def _prompt(self, round_number: int, prompt: int) -> Any:
        ids = np.arange(PROMPT_BLOCKS * BLOCK_TOKENS, dtype=np.uint32)
        return ids + (round_number * PROMPTS + prompt) * len(ids)

    def store(self, round_number: int) -> None:
        for prompt in range(PROMPTS):
            self._cache.store(self._namespace, self._prompt(round_number, prompt), self._kv)  # type: ignore[arg-type]
        self._cache.flush()

    def load(self, round_number: int) -> None:
        for prompt in range(PROMPTS):
            with self._cache.lookup(self._namespace, self._prompt(round_number, prompt)) as found:
                assert found.blocks == PROMPT_BLOCKS, found

    def read_bytes(self) -> int:
        disk = self._cache.stats()["disk"]
        assert disk is not None
        return disk["read_bytes_total"]

    def close(self) -> None:
        self._cache.close()


class LMCache:
    """LMCache's backends for the local disk and for the CPU's memory, as its engine puts them together."""

    def __init__(self, folder: Path) -> None:
        from lmcache.utils import CacheEngineKey  # type: ignore[import-not-found]
        from lmcache.v1.config import LMCacheEngineConfig  # type: ignore[import-not-found]
        from lmcache.v1.memory_management import MemoryFormat  # type: ignore[import-not-found]
        from lmcache.v1.metadata import LMCacheMetadata  # type: ignore[import-not-found]
        from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend  # type: ignore[import-not-found]
        from lmcache.v1.storage_backend.local_disk_backend import LocalDiskBackend  # type: ignore[import-not-found]

        self._folder, self._format = folder, MemoryFormat.KV_2LTD
        self._key: Callable[[int], Any] = lambda number: CacheEngineKey("bench", 1, 0, number, torch.float16)
        config = LMCacheEngineConfig.from_defaults(
            chunk_size=BLOCK_TOKENS,
            local_cpu=False,
            max_local_cpu_size=RAM_GB,
            local_disk=str(folder),
            max_local_disk_size=8,
            extra_config={"use_odirect": True},
        )
        metadata = LMCacheMetadata(
            model_name="bench",
            world_size=1,
            local_world_size=1,
            worker_id=0,
            local_worker_id=0,
            kv_dtype=torch.float16,
            kv_shape=(LAYERS, 2, BLOCK_TOKENS, KV_HEADS, HEAD_DIM),
            chunk_size=BLOCK_TOKENS,
        )
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._memory = LocalCPUBackend(config, metadata=metadata, dst_device="cpu")
        self._disk = LocalDiskBackend(config, self._loop, self._memory, dst_device="cpu", metadata=metadata)
        self._shape = torch.Size((2, LAYERS, BLOCK_TOKENS, KV_HEADS * HEAD_DIM))
        self._kv = torch.randn(self._shape).to(torch.float16)

    def _keys(self, round_number: int) -> list[Any]:
        blocks = PROMPTS * PROMPT_BLOCKS
        return [self._key(round_number * blocks + number) for number in range(blocks)]

    def store(self, round_number: int) -> None:
        """As it comes: nothing is durable."""
        keys = self._keys(round_number)
        for key in keys:
            memory = self._memory.allocate(self._shape, torch.float16, self._format)
            assert memory is not None
            memory.tensor.copy_(self._kv.view(memory.tensor.shape))
            self._disk.submit_put_task(key, memory)
            memory.ref_count_down()
        for key in keys:
            while not self._disk.contains(key):
                time.sleep(0.0005)

    def store_durable(self, round_number: int) -> None:
        before = set(self._folder.iterdir())
        self.store(round_number)
        for file in set(self._folder.iterdir()) - before:
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)

    def load(self, round_number: int) -> None:
        keys = self._keys(round_number)
        for first in range(0, len(keys), PROMPT_BLOCKS):
            for memory in self._disk.batched_get_blocking(keys[first : first + PROMPT_BLOCKS]):
                assert memory is not None
                memory.ref_count_down()

    def close(self) -> None:
        self._disk.close()
        self._loop.call_soon_threadsafe(self._loop.stop)


def figures(report: Report, folder: str, rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="kvkeep-bench-", dir=folder) as home:
        theirs = None
        if importlib.util.find_spec("lmcache") is not None:
            (Path(home) / "lmcache").mkdir()
            theirs = LMCache(Path(home) / "lmcache")
        stores(report, Path(home) / "kvkeep", theirs, rounds)
        loads(report, Path(home) / "kvkeep", theirs, rounds)
        if theirs is not None:
            theirs.close()


def stores(report: Report, folder: Path, theirs: LMCache | None, rounds: int) -> None:
    ours, name = Ours(folder), "disk: store of 2 MiB blocks, durable"
    if theirs is None:
        add(report, name, turns([ours.store], rounds)[0])
    else:
        synced, plain = (lambda number: theirs.store_durable(2 * number), lambda number: theirs.store(2 * number + 1))
        mine, durable, unsafe = turns([ours.store, synced, plain], rounds)
        add(report, name, mine, "LMCache, synced", durable)
        add(report, name, mine, "LMCache, not durable", unsafe)
    ours.close()


def loads(report: Report, folder: Path, theirs: LMCache | None, rounds: int) -> None:
    # Opened again: nothing is in RAM.
    ours, name = Ours(folder), "disk: cold load of 2 MiB blocks"
    if theirs is None:
        add(report, name, turns([ours.load], rounds)[0])
    else:
        mine, other = turns([ours.load, lambda number: theirs.load(2 * number)], rounds)
        add(report, name, mine, "LMCache", other)
    read = ours.read_bytes()
    assert read == (rounds + 1) * ROUND_BYTES, f"{read} bytes came from the disk: the rest was in RAM"
    ours.close()


def add(report: Report, name: str, mine: float, other: str = "LMCache is not installed", seconds: float = 0.0) -> None:
    reference = f"{other} {ROUND_BYTES / seconds / 1e9:.2f} GB/s" if seconds else other
    report.add(name, ROUND_BYTES / mine / 1e9, "GB/s", reference, seconds / mine, "–")


def turns(calls: list[Callable[[int], None]], rounds: int) -> list[float]:
    """Median seconds of a round of each; the first round is not counted."""
    seconds: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 1):
        for call, into in zip(calls, seconds, strict=True):
            begin = time.perf_counter()
            call(number)
            into.append(time.perf_counter() - begin)
    return [statistics.median(each[1:]) for each in seconds]
