"""vLLM's tiers, and kvkeep's RAM, where vLLM itself runs on the CPU: its offloading knows GPUs alone.

    {"spec_name": "CpuTieringOffloadingSpec", "spec_module_path": "kvkeep.vllm.cpu", "cpu_bytes_to_use": ..., "secondary_tiers": [...]}
    {"spec_name": "CpuKvkeepOffloadingSpec", "spec_module_path": "kvkeep.vllm.cpu", "cpu_bytes_to_use": ..., "kvkeep": {...}}

The model's KV and the first tier are then both in RAM, and one is copied into the other at once, by memcpy. Invariant: a transfer is done
when it is submitted, or, with `KvkeepConnector`, when a layer waits for it. Everything else is vLLM's own: its manager, its tiers, its recovery.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from vllm.v1.kv_offload.base import CanonicalKVCaches, GPULoadStoreSpec, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from kvkeep.vllm import _compat
from kvkeep.vllm._rows import Registered, Rows
from kvkeep.vllm._spec import KvkeepOffloadingSpec

__all__ = ["CpuKvkeepOffloadingSpec", "CpuTieringOffloadingSpec"]


class CpuTieringOffloadingSpec(TieringOffloadingSpec):
    """`TieringOffloadingSpec` with a worker that copies between two places in RAM."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self._worker is None:
            region = SharedOffloadRegion(
                engine_id=self.config.engine_id,
                num_chunks=self.num_chunks,
                rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker = _MemcpyWorker(kv_caches, self.blocks_per_chunk, region)
        return self._worker


class CpuKvkeepOffloadingSpec(KvkeepOffloadingSpec):
    """`KvkeepOffloadingSpec` with a worker that copies between two places in RAM."""

    def _maker(self, kv_caches: CanonicalKVCaches) -> Callable[[Callable[[], bool]], tuple[OffloadingWorker, Registered | None]]:
        return lambda is_over: (_MemcpyWorker(kv_caches, self.blocks_per_chunk, self._map(is_over), self.layers), None)


class _MemcpyWorker(OffloadingWorker):
    def __init__(self, kv_caches: CanonicalKVCaches, blocks_per_chunk: int, region: SharedOffloadRegion | Rows, layers: int = 0) -> None:
        self._per_chunk, self._region, self._layers = blocks_per_chunk, region, layers
        self._engine = [cache.tensor.view(torch.int8).view(-1, cache.page_size_bytes) for cache in kv_caches.tensors]
        self._chunks = [region.create_next_worker_view(cache.page_size_bytes * blocks_per_chunk) for cache in kv_caches.tensors]
        self._groups = kv_caches.group_data_refs
        self._step: list[_Later] = []
        """Loads of this step: each layer of them is copied when it is waited for."""
        self.by_layer = {"loads": 0, "all_by_layer": 0}
        self._finished: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: Any) -> bool:
        return self._finish(job_id, self._parts(src_spec, dst_spec.block_ids, to_engine=False))

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: GPULoadStoreSpec, expedited: bool = False) -> bool:
        parts = self._parts(dst_spec, src_spec.block_ids, to_engine=True)
        if isinstance(src_spec, _compat.RowsNow) and len(parts) == self._layers:
            self._step.append(_Later(job_id, parts))
            return True
        return self._finish(job_id, parts)

    def wait_layer(self, layer: int) -> None:
        for later in self._step:
            later.copy(layer)

    def wait_all(self) -> None:
        step, self._step = self._step, []
        for later in step:
            self.by_layer["loads"] += 1
            self.by_layer["all_by_layer"] += later.is_done
            self._finish(later.job_id, [later.rest])

    def _finish(self, job_id: int, parts: list[Callable[[], int]]) -> bool:
        begun = time.perf_counter()
        size = sum(part() for part in parts)
        self._finished.append(TransferResult(job_id=job_id, success=True, transfer_size=size, transfer_time=time.perf_counter() - begun))
        return True

    def _parts(self, blocks: GPULoadStoreSpec, chunk_ids: Any, to_engine: bool) -> list[Callable[[], int]]:
        """The copies that there are to make, a layer each."""
        parts: list[Callable[[], int]] = []
        block, chunk = 0, 0
        for group, count, first in zip(self._groups, blocks.group_sizes, blocks.block_indices):
            if not count:
                continue
            # The first block may lie in the middle of its chunk.
            places = first % self._per_chunk + np.arange(count)
            numbers = torch.from_numpy(np.asarray(chunk_ids)[chunk + places // self._per_chunk].astype(np.int64))
            within = torch.from_numpy(places % self._per_chunk)
            ids = torch.from_numpy(blocks.block_ids[block : block + count].astype(np.int64))
            parts += [partial(self._copy_layer, ref, ids, numbers, within, to_engine) for ref in group]
            block, chunk = block + count, chunk + int(places[-1]) // self._per_chunk + 1
        return parts

    def _copy_layer(self, ref: Any, ids: torch.Tensor, numbers: torch.Tensor, within: torch.Tensor, to_engine: bool) -> int:
        engine, chunks, size = self._engine[ref.tensor_idx], self._chunks[ref.tensor_idx], ref.page_size_bytes
        page = engine.shape[1]
        parts = chunks.as_strided((chunks.shape[0], self._per_chunk, page), (chunks.stride(0), page, 1), chunks.storage_offset())
        if to_engine:
            engine[ids, :size] = parts[numbers, within, :size]
        else:
            parts[numbers, within, :size] = engine[ids, :size]
        return len(ids) * size

    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        pass

    def shutdown(self) -> None:
        self._engine.clear()
        self._chunks.clear()
        self._region.cleanup()


class _Later:
    """A load whose layers are copied one by one, each once."""

    def __init__(self, job_id: int, parts: list[Callable[[], int]]) -> None:
        self.job_id, self._parts = job_id, dict(enumerate(parts))
        self._size = 0

    @property
    def is_done(self) -> bool:
        return not self._parts

    def copy(self, layer: int) -> None:
        part = self._parts.pop(layer, None)
        if part is not None:
            self._size += part()

    def rest(self) -> int:
        for layer in list(self._parts):
            self.copy(layer)
        return self._size
