"""What differs between the releases of vLLM that the tier works with (0.26 to 0.33), in one place.

Invariant: nothing here asks for a version. It is asked what is there: a field, a parameter, a class. A table of versions was the
alternative: it is wrong for the release after the last one in it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from typing import Any

from vllm.v1.kv_offload import base
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager

MEDIUM: Any = getattr(getattr(base, "Medium", None), "STORAGE", "FS")
"""What events call a disk: a string at first, then a member of an enum."""
MEDIUM_OF_RAM: Any = getattr(getattr(base, "Medium", None), "CPU", "CPU")


@cache
def _names(cls: type) -> frozenset[str]:
    return frozenset(field.name for field in fields(cls))


def begin(tier: SecondaryTierManager, spec: Any, view: memoryview, tier_type: str, detector: Any, locality: str | None) -> None:
    """The constructor of the base class, with what it knows."""
    known = inspect.signature(SecondaryTierManager.__init__).parameters
    more = {"backpressure_detector": detector} if "backpressure_detector" in known else {}
    SecondaryTierManager.__init__(tier, spec, view, tier_type, **more)
    if locality is not None and hasattr(base, "Locality"):
        tier.locality = base.Locality(locality)


def rows_of(job: Any) -> list[int]:
    """The rows of a job: blocks at first, then chunks."""
    rows = job.chunk_ids if hasattr(job, "chunk_ids") else job.block_ids
    return [int(row) for row in rows]


def result(job_id: int, done: Collection[bytes], keys: Sequence[bytes], is_load: bool, seconds: float, row_bytes: int) -> JobResult:
    """What became of a job. Before there was partial success, a load is all or nothing."""
    success = len(done) == len(keys)
    more: dict[str, Any] = {}
    if is_load and done and not success:
        more["successful_keys"] = tuple(done)
    more["transfer_time"], more["transfer_bytes"] = seconds, len(done) * row_bytes
    return JobResult(job_id=job_id, success=success, **{name: value for name, value in more.items() if name in _names(JobResult)})


def event(keys: list[Any], medium: Any, removed: bool, locality: str | None, ownership: str | None) -> Any:
    """Blocks that came to RAM or the disk, or went from there."""
    known = _names(base.OffloadingEvent)
    more: dict[str, Any] = {"ownership": ownership}
    if locality is not None and hasattr(base, "Locality"):
        more["locality"] = base.Locality(locality)
    return base.OffloadingEvent(keys=keys, medium=medium, removed=removed, **{name: value for name, value in more.items() if name in known})


def positions_of(context: Any) -> Mapping[bytes, int] | None:
    """Where each block of a request ends, in tokens, in order; None where vLLM does not say."""
    return getattr(context, "_offload_key_positions", None) or None


def steps_of(config: Any) -> tuple[int, int]:
    """How many tokens one step computes at most, and how many steps are scheduled before one has ended."""
    scheduler = config.scheduler_config
    return max(1, int(scheduler.max_num_batched_tokens)), int(bool(getattr(scheduler, "async_scheduling", False)))


def rows_spec(rows: Sequence[int]) -> Any:
    """Rows as vLLM's workers are told of them."""
    return CPULoadStoreSpec(list(rows))


class RowsNow(CPULoadStoreSpec):
    """Rows that are loaded in the step that reads them."""


def no_same_step(config: Any, kv_cache_config: Any) -> str | None:
    """Why no load may run in the step that reads it; None if it may."""
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import TransferJob
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    groups = kv_cache_config.kv_cache_groups
    if "sync" in _names(TransferJob):
        return "this vLLM has such loads of its own (sync_load_budget_bytes)"
    if len(groups) != 1 or not isinstance(groups[0].kv_cache_spec, FullAttentionSpec):
        return "the model's layers are of several kinds"
    if int(config.parallel_config.world_size) != 1:
        return "the model is on several devices"
    if config.speculative_config is not None:
        return "a second model drafts for this one"
    return None


def layers_apart(config: Any) -> str:
    """What is to be said of the layers' places in a row. Some releases lay them side by side, unless a connector wants each in one piece."""
    if getattr(getattr(config, "kv_transfer_config", None), "kv_connector", None) != "KvkeepConnector":
        return ""
    from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorBase_V1

    return ", a layer in one piece" if hasattr(KVConnectorBase_V1, "prefer_cross_layer_blocks") else ""


def hooked_mode(context: Any) -> str | None:
    """How a step runs, if vLLM can call a connector before each layer; None if not: as one graph, or in two halves."""
    mode = getattr(getattr(context, "cudagraph_runtime_mode", None), "name", "NONE")
    metadata = getattr(context, "attn_metadata", None)
    return mode if mode in ("NONE", "PIECEWISE") and isinstance(metadata, dict) and metadata else None


def beside_stores(status: Any, block_ids: list[int]) -> None:
    """Has the scheduler's half take a load for a store until it has ended: a request that runs may store, be preempted, and end meanwhile.

    Its blocks are then given to nobody else before it has ended, as those that a store reads.
    """
    status.is_store = True
    fence = "deferred_fence_block_ids" if hasattr(status, "deferred_fence_block_ids") else "non_sliding_window_block_ids"
    setattr(status, fence, block_ids)


def rows_of_spec(spec: Any) -> tuple[int, int]:
    """How many rows vLLM's RAM has, and the bytes of one: blocks at first, then chunks."""
    return int(spec.num_chunks if hasattr(spec, "num_chunks") else spec.num_blocks), int(spec.kv_bytes_per_chunk)


def gpu_worker(spec: Any, kv_caches: Any, rows: Any) -> tuple[Any, Callable[..., None]]:
    """vLLM's worker over our rows, and what it copies with. It would register all rows at once; that is ours to do.

    Copies are made by the driver in both directions, which takes memory that is not registered, too. vLLM's kernel for small pages does not.
    """
    from vllm import _custom_ops
    from vllm.v1.kv_offload.cpu import gpu_worker as theirs

    known = inspect.signature(theirs.CPUOffloadingWorker.__init__).parameters
    count = rows.num_chunks
    given = {
        "kv_caches": kv_caches, "mmap_region": rows, "blocks_per_chunk": spec.blocks_per_chunk, "num_cpu_chunks": count, "num_cpu_blocks": count,
        "canonical_layout": bool(getattr(spec.config, "canonical_layout", False)),
    }  # fmt: skip
    pin, theirs.pin_mmap_region = theirs.pin_mmap_region, lambda region: None
    try:
        worker = theirs.CPUOffloadingWorker(**{name: value for name, value in given.items() if name in known})
    finally:
        theirs.pin_mmap_region = pin
    worker._store_handler._swap_blocks_batch = worker._load_handler._swap_blocks_batch = _custom_ops.swap_blocks_batch
    return worker, _custom_ops.swap_blocks_batch


def source(from_disk: bool) -> Any:
    """Where a hit came from; asked by releases that have a name for it."""
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    return CacheHitSource.DISK if from_disk else CacheHitSource.HOST


def steps_in_flight(config: Any) -> int:
    """After so many more steps were scheduled, those of now have ended, whatever order stages and workers take them in."""
    stages = int(getattr(config.parallel_config, "pipeline_parallel_size", 1) or 1)
    return 2 * (stages + steps_of(config)[1]) + 2


def may_change(config: Any) -> bool:
    """May the weights of this engine become others while it lives?"""
    return bool(getattr(config.model_config, "enable_sleep_mode", False) or getattr(config, "weight_transfer_config", None))


def actions_of(context: Any) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """The hints that came with a request: names and what belongs to them."""
    for action in getattr(getattr(context, "kv_hints", None), "actions", None) or ():
        yield str(action.action_type), action.payload or {}
    own = (context.kv_transfer_params or {}).get("kvkeep")
    if isinstance(own, Mapping):
        yield from ((name, value if isinstance(value, Mapping) else {"value": value}) for name, value in own.items())


def vllm_config() -> Any:
    """The configuration of the engine whose connector is being built.

    vLLM gives a tier sizes and parallelism, but not the model. So it is taken from the frames below: the connector's constructor has it
    under this name in every release. To replace vLLM's functions that build what a tier is given was the alternative.
    """
    frame = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("vllm_config")
        if hasattr(found, "model_config"):
            return found
        frame = frame.f_back
    raise RuntimeError("kvkeep found no vllm_config: a tier is made by vLLM's OffloadingConnector, not by hand")
