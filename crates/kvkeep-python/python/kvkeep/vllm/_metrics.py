"""The tier's figures as vLLM publishes them: under `/metrics`, beside vLLM's own of the tiers (bytes, times and failures of jobs).

Invariant: counters only grow, and what vLLM is given is by how much since it last asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_GAUGES = {
    "used_bytes": "Bytes of the disk that kvkeep takes now, as du counts them.",
    "capacity_bytes": "The cap of kvkeep's directory.",
    "entries": "Blocks that can be found on the disk.",
    "queued_bytes": "Bytes that wait to be written, in memory.",
    "failing": "1 while the disk fails or does not answer: then everything is a miss.",
    "disk_bytes_per_s": "How fast the disk is read, as measured.",
}

_COUNTERS = {
    "hits": "Blocks that were loaded from the disk.",
    "not_worth": "Blocks that were on the disk and not loaded, since computing them is faster.",
    "damaged": "Records or segments that were not what they should be: each a miss.",
    "read_errors": "Reads that the disk failed.",
    "write_errors": "Writes that the disk failed.",
    "timeouts": "Reads and writes that took longer than anybody waits.",
    "dropped": "Blocks that were not written: the queue was full, or the disk failed.",
    "evictions": "Blocks that went to make room.",
    "written": "Blocks that were written.",
    "late_jobs": "Jobs that were ended by their deadline.",
    "refused_jobs": "Jobs that were refused, since too many waited.",
}

_OF_DISK = {
    "damaged": "damaged_total",
    "read_errors": "read_errors_total",
    "write_errors": "write_errors_total",
    "timeouts": "timeouts_total",
    "dropped": "dropped_total",
    "evictions": "evictions",
    "written": "stored_total",
}


def name_of(figure: str) -> str:
    return f"vllm:kvkeep_{figure}"


def definitions() -> dict[str, Any]:
    """What vLLM needs to know to publish them."""
    from vllm.v1.kv_offload.base import OffloadingCounterMetadata, OffloadingGaugeMetadata

    gauges = {name_of(name): OffloadingGaugeMetadata(documentation=text) for name, text in _GAUGES.items()}
    return gauges | {name_of(name): OffloadingCounterMetadata(documentation=text) for name, text in _COUNTERS.items()}


class Figures:
    """All figures as of now, and what was last told of them."""

    def __init__(self) -> None:
        self._told: dict[str, int] = {}

    def tell(self, engine: Mapping[str, Any], own: Mapping[str, int], disk_bytes_per_s: float) -> Any:
        """vLLM's form of them."""
        from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats

        told, disk = OffloadingConnectorStats(), engine["disk"]
        for name in _GAUGES:
            value = disk_bytes_per_s if name == "disk_bytes_per_s" else float(disk[name])
            told.set_gauge(name_of(name), value)
        now = counters(engine, own)
        for name, value in now.items():
            if value > self._told.get(name, 0):
                told.increase_counter(name_of(name), value - self._told.get(name, 0))
        self._told = now
        return told


def counters(engine: Mapping[str, Any], own: Mapping[str, int]) -> dict[str, int]:
    """All counters as of now."""
    disk = {name: int(engine["disk"][theirs]) for name, theirs in _OF_DISK.items()}
    jobs = {"late_jobs": int(engine["jobs_late_total"]), "refused_jobs": int(engine["jobs_refused_total"])}
    return disk | jobs | {name: own.get(name, 0) for name in ("hits", "not_worth")}
