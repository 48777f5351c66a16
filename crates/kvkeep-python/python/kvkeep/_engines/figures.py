"""The figures that every engine publishes of its tier, and what they say.

Invariant: counters only grow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvkeep._engines.worth import GUESSES, Rates

GAUGES = {
    "used_bytes": "Bytes that blocks take now behind RAM: on the disk, as du counts them, in the daemon and in the remote store.",
    "capacity_bytes": "The caps of these, together.",
    "entries": "Blocks that can be found there.",
    "queued_bytes": "Bytes that wait to be written, in memory.",
    "failing": "1 while one of these fails or does not answer: then everything there is a miss.",
    "daemon_bytes_per_s": "How fast the daemon is read, as measured.",
    "disk_bytes_per_s": "How fast the disk is read, as measured.",
    "remote_bytes_per_s": "How fast the remote store is read, as measured.",
}

COUNTERS = {
    "hits": "Blocks that were loaded from behind RAM.",
    "not_worth": "Blocks that were there and not loaded, since computing them is faster.",
    "damaged": "Records or segments that were not what they should be: each a miss.",
    "read_errors": "Reads that a tier failed.",
    "write_errors": "Writes that a tier failed.",
    "timeouts": "Reads and writes that took longer than anybody waits.",
    "dropped": "Blocks that a tier did not write: its queue was full, or it failed.",
    "evictions": "Blocks that went to make room.",
    "written": "Blocks that were written.",
    "late_jobs": "Jobs that were ended by their deadline.",
    "refused_jobs": "Jobs that were refused, since too many waited.",
}

_OF_TIERS = {
    "damaged": "damaged_total",
    "read_errors": "read_errors_total",
    "write_errors": "write_errors_total",
    "timeouts": "timeouts_total",
    "dropped": "dropped_total",
    "evictions": "evictions",
    "written": "stored_total",
}


def gauges(engine: Mapping[str, Any], rates: Rates) -> dict[str, float]:
    """All gauges as of now."""
    tiers = engine["tiers"].values()
    read = {f"{tier}_bytes_per_s": rates.bytes_per_s(tier) if tier in rates.guesses else 0.0 for tier in GUESSES}
    of_all = {name: sum(float(tier[name]) for tier in tiers) for name in GAUGES if name not in read}
    return of_all | read | {"failing": min(1.0, of_all["failing"])}


def counters(engine: Mapping[str, Any], own: Mapping[str, int]) -> dict[str, int]:
    """All counters as of now."""
    behind = {name: sum(int(tier[theirs]) for tier in engine["tiers"].values()) for name, theirs in _OF_TIERS.items()}
    jobs = {"late_jobs": int(engine["jobs_late_total"]), "refused_jobs": int(engine["jobs_refused_total"])}
    return behind | jobs | {name: own.get(name, 0) for name in ("hits", "not_worth")}
