"""The figures that every engine publishes of its tier, and what they say.

Invariant: counters only grow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GAUGES = {
    "used_bytes": "Bytes of the disk that kvkeep takes now, as du counts them.",
    "capacity_bytes": "The cap of kvkeep's directory.",
    "entries": "Blocks that can be found on the disk.",
    "queued_bytes": "Bytes that wait to be written, in memory.",
    "failing": "1 while the disk fails or does not answer: then everything is a miss.",
    "disk_bytes_per_s": "How fast the disk is read, as measured.",
}

COUNTERS = {
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


def gauges(engine: Mapping[str, Any], disk_bytes_per_s: float) -> dict[str, float]:
    """All gauges as of now."""
    return {name: disk_bytes_per_s if name == "disk_bytes_per_s" else float(engine["disk"][name]) for name in GAUGES}


def counters(engine: Mapping[str, Any], own: Mapping[str, int]) -> dict[str, int]:
    """All counters as of now."""
    disk = {name: int(engine["disk"][theirs]) for name, theirs in _OF_DISK.items()}
    jobs = {"late_jobs": int(engine["jobs_late_total"]), "refused_jobs": int(engine["jobs_refused_total"])}
    return disk | jobs | {name: own.get(name, 0) for name in ("hits", "not_worth")}
