"""What `stats` returns, and how a cache shows it."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, TypedDict

from kvkeep._errors import ClosedError, ForkError

if TYPE_CHECKING:
    from kvkeep import KVCache, SimpleKVCache


class TierStats(TypedDict):
    """Counters and sizes of a tier behind RAM."""

    entries: int
    used_bytes: int
    """Bytes on the disk now, as `du` counts them, and a margin for the directory itself."""
    capacity_bytes: int
    index_bytes: int
    queued_bytes: int
    """Bytes that wait to be written; they are held in RAM."""
    hits: int
    """Records read back into RAM."""
    stored_total: int
    written_bytes_total: int
    written_raw_bytes_total: int
    """What was written, before its codec."""
    read_bytes_total: int
    dropped_total: int
    """Records that were not written: the queue was full, or the disk failed."""
    not_admitted_total: int
    """Entries that `disk_admission` kept off the disk, at first or for good."""
    evictions: int
    reinserted_total: int
    damaged_total: int
    """Records or files that were not what they should be: each a miss."""
    read_errors_total: int
    write_errors_total: int
    timeouts_total: int
    not_worth_tokens_total: int
    """Tokens that were not loaded because computing them again is faster."""
    foreign_files: int
    load_bytes_per_s: int
    codec: str
    """Which one writes what goes there."""
    codec_ratio: float
    """How many times as long what was written was before its codec."""
    failing: bool
    """Is the disk failing right now? Then it is tried again, ever more seldom."""


class Stats(TypedDict):
    """Counters and sizes of a cache. Counters only grow; `clear` does not reset them."""

    total_requests: int
    """Hits and misses."""
    hits: int
    """Requests that found all (`SimpleKVCache`) or at least one block (`KVCache`)."""
    misses: int
    evictions: int
    """Entries that made room for others."""
    expirations: int
    rejections: int
    """Stores that were refused: larger than the cache, or all of it held."""
    removals: int
    stored_total: int
    requested_tokens_total: int
    cached_tokens_total: int
    entries: int
    used_bytes: int
    """Bytes in use, in whole pages of 4 KiB: stored, being written, or shown by a tensor."""
    held_bytes: int
    """Bytes of those that cannot be evicted now."""
    capacity_bytes: int
    index_bytes: int
    """Memory of the index, besides the payload."""
    hit_rate_percent: float
    token_hit_rate_percent: float
    size_mb: float
    """`used_bytes` in MiB."""
    max_size_mb: float
    size_percent: float
    time_saved_seconds: float
    """Compute time, as callers reported it, that hits made unnecessary."""
    tiers: dict[str, TierStats]
    """The tiers behind RAM by their names, in the order in which they are asked."""
    disk: TierStats | None
    """`tiers["disk"]`; None without a disk tier."""


def text_of(cache: SimpleKVCache | KVCache) -> str:
    """A cache in one line."""
    name, stats = type(cache).__name__, _stats_of(cache)
    if stats is None:
        return f"<{name}, closed>"
    return (
        f"<{name} {stats['entries']} entries, {stats['size_mb']:.1f} of {stats['max_size_mb']:.1f} MiB, "
        f"{stats['hit_rate_percent']:.1f}% hits>"
    )


def html_of(cache: SimpleKVCache | KVCache) -> str:
    """A cache as a table, for notebooks."""
    stats = _stats_of(cache)
    if stats is None:
        return f"<p>{html.escape(text_of(cache))}</p>"
    rows = [
        ("RAM", f"{_size(stats['used_bytes'])} of {_size(stats['capacity_bytes'])} ({stats['size_percent']:.1f}%)"),
        ("Entries", f"{stats['entries']:,}"),
        ("Requests", f"{stats['total_requests']:,}, {stats['hit_rate_percent']:.1f}% hits"),
        ("Tokens asked for", f"{stats['requested_tokens_total']:,}, {stats['token_hit_rate_percent']:.1f}% cached"),
        ("Compute time saved", f"{stats['time_saved_seconds']:.1f} s"),
        ("Evicted, expired, refused", f"{stats['evictions']:,}, {stats['expirations']:,}, {stats['rejections']:,}"),
    ]
    for tier, of in stats["tiers"].items():
        state = ", failing" if of["failing"] else ""
        rows.append((f"Tier {tier}", f"{_size(of['used_bytes'])} of {_size(of['capacity_bytes'])}, {of['entries']:,} entries{state}"))
    cells = "".join(f"<tr><th style='text-align:left'>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return f"<table><caption>{type(cache).__name__}</caption>{cells}</table>"


def _stats_of(cache: SimpleKVCache | KVCache) -> Stats | None:
    """None if it is closed, or another process's."""
    try:
        return cache.stats()
    except (ClosedError, ForkError):
        return None


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
