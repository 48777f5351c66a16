"""What an engine's configuration may say of kvkeep."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

_GIB, _MIB = 1 << 30, 1 << 20

_BESIDE_BYTES = 2 * _MIB
"""Of the cap, for the files beside the cache: hashes of weights, measured rates."""

_NUMBERS = (
    "capacity_gb", "queue_mb", "load_timeout_s", "store_timeout_s", "flush_timeout_s", "ttl_s", "prefill_tokens_per_s", "disk_gb_per_s",
)  # fmt: skip

_Kind = TypeVar("_Kind", bound="Settings")


@dataclass(frozen=True)
class Settings:
    """Every setting with its default."""

    root_dir: str
    """A folder of kvkeep's own, on a local disk."""
    capacity_gb: float
    """GiB that the folder may take, as `du` counts them. For each process that keeps KV."""
    queue_mb: float = 1024
    """MiB of memory that may wait to be written; what comes then keeps its place in the engine's RAM until `store_timeout_s`."""
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
    codec: str = "auto"
    """How blocks are written: `raw` as they are, `lossless` the same bits in fewer bytes, two thirds of bfloat16; `auto` the one that
    loads faster here, `raw` until that is measured."""
    weights: str | None = None
    """A revision that you vouch for, in place of hashing the weights' files."""
    salt: str = ""
    """Keeps apart what nothing else does."""
    worth: str = "measured"
    """`measured`: a load that takes longer than computing is not made. `always`: every load is."""
    prefill_tokens_per_s: float | None = None
    """How fast the engine computes."""
    disk_gb_per_s: float = 1
    """How fast the disk is read, in GiB/s, until it is measured."""

    def __post_init__(self) -> None:
        if self.worth not in ("measured", "always"):
            raise ValueError(f"kvkeep: worth is {self.worth!r}: give 'measured' or 'always'")
        for field in fields(self):
            value = getattr(self, field.name)
            may_be_left_out = field.default is None and value is None
            if field.name in _NUMBERS and not may_be_left_out and not is_above_0(value):
                raise ValueError(f"kvkeep: {field.name} is {value!r}: give a number above 0")

    @classmethod
    def read(cls: type[_Kind], given: dict[str, Any]) -> _Kind:
        """Raises ValueError for what is missing or not known."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(given) - known)
        missing = sorted({"root_dir", "capacity_gb"} - set(given))
        if unknown or missing:
            what = f"unknown settings {unknown}" if unknown else f"missing settings {missing}"
            raise ValueError(f"kvkeep: {what}; there are {sorted(known)}")
        return cls(**given)

    @property
    def root(self) -> Path:
        return Path(self.root_dir).expanduser()

    @property
    def capacity_bytes(self) -> int:
        return max(int(self.capacity_gb * _GIB) - _BESIDE_BYTES, 0)

    @property
    def queue_bytes(self) -> int:
        return int(self.queue_mb * _MIB)


def is_above_0(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")
