"""What a tier's entry in `secondary_tiers` may say."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

_GIB, _MIB = 1 << 30, 1 << 20

_BESIDE_BYTES = 2 * _MIB
"""Of the cap, for the files beside the cache: hashes of weights, measured rates."""


@dataclass(frozen=True)
class Settings:
    """Every setting with its default."""

    root_dir: str
    """A folder of kvkeep's own, on a local disk."""
    capacity_gb: float
    """GiB that the folder may take, as `du` counts them. For each data-parallel replica."""
    queue_mb: float = 1024
    """MiB of memory that may wait to be written; what comes then keeps its place in vLLM's RAM until `store_timeout_s`."""
    load_timeout_s: float = 10
    """A load that takes longer has failed: what came of it is kept, the rest is computed."""
    store_timeout_s: float = 30
    """A store that takes longer has failed: its place in RAM is free again."""
    flush_timeout_s: float = 5
    """How long an engine that ends waits for a disk that gets nothing done."""
    ttl_s: float | None = None
    """What is written is gone after so long."""
    key_file: str | None = None
    """Encrypts what is written: 32 bytes or 64 hexadecimal digits, readable by its owner alone."""
    codec: str = "raw"
    """How blocks are written: `raw` as they are, `lossless` the same bits in fewer bytes, two thirds of bfloat16."""
    weights: str | None = None
    """A revision that you vouch for, in place of hashing the weights' files."""
    salt: str = ""
    """Keeps apart what nothing else does."""
    worth: str = "measured"
    """`measured`: a load that takes longer than computing is not made. `always`: every load is."""
    prefill_tokens_per_s: float = 20_000
    """How fast the engine computes, until it is measured."""
    disk_gb_per_s: float = 1
    """How fast the disk is read, in GiB/s, until it is measured."""
    enable_kv_events: bool = False
    """Tells vLLM's event publisher what comes to the disk and goes from it."""
    locality: str | None = None
    """`LOCAL` or `REMOTE`, for those events."""

    def __post_init__(self) -> None:
        if self.worth not in ("measured", "always"):
            raise ValueError(f"kvkeep: worth is {self.worth!r}: give 'measured' or 'always'")
        for name in ("capacity_gb", "queue_mb", "load_timeout_s", "store_timeout_s", "flush_timeout_s", "prefill_tokens_per_s", "disk_gb_per_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"kvkeep: {name} is {getattr(self, name)!r}: give a number above 0")

    @staticmethod
    def read(given: dict[str, Any]) -> Settings:
        """Raises ValueError for what is missing or not known."""
        known = {field.name for field in fields(Settings)}
        unknown = sorted(set(given) - known)
        missing = sorted({"root_dir", "capacity_gb"} - set(given))
        if unknown or missing:
            what = f"unknown settings {unknown}" if unknown else f"missing settings {missing}"
            raise ValueError(f"kvkeep: {what}; there are {sorted(known)}")
        return Settings(**given)

    @property
    def root(self) -> Path:
        return Path(self.root_dir).expanduser()

    @property
    def capacity_bytes(self) -> int:
        return max(int(self.capacity_gb * _GIB) - _BESIDE_BYTES, 0)

    @property
    def queue_bytes(self) -> int:
        return int(self.queue_mb * _MIB)
