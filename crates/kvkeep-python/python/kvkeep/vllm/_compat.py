"""What differs between the releases of vLLM that the tier works with (0.26 to 0.33), in one place.

Invariant: nothing here asks for a version. It is asked what is there: a field, a parameter, a class. A table of versions was the
alternative: it is wrong for the release after the last one in it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from typing import Any

from vllm.v1.kv_offload import base
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager

MEDIUM: Any = getattr(getattr(base, "Medium", None), "STORAGE", "FS")
"""What events call a disk: a string at first, then a member of an enum."""


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


def event(keys: list[Any], removed: bool, tier: SecondaryTierManager) -> Any:
    """Blocks that came to the disk or went from it."""
    more = {"locality": getattr(tier, "locality", None), "ownership": tier.tier_type}
    known = _names(base.OffloadingEvent)
    return base.OffloadingEvent(
        keys=keys, medium=MEDIUM, removed=removed, **{name: value for name, value in more.items() if name in known}
    )


def positions_of(context: Any) -> Mapping[bytes, int] | None:
    """Where each block of a request ends, in tokens, in order; None where vLLM does not say."""
    return getattr(context, "_offload_key_positions", None) or None


def steps_of(config: Any) -> tuple[int, int]:
    """How many tokens one step computes at most, and how many steps are scheduled before one has ended."""
    scheduler = config.scheduler_config
    return max(1, int(scheduler.max_num_batched_tokens)), int(bool(getattr(scheduler, "async_scheduling", False)))


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
