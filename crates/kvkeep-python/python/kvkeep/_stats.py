"""What `get_stats` and `stats` return."""

from typing import TypedDict


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
