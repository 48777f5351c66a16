"""What an engine's configuration may say of kvkeep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kvkeep._engines.worth import GUESSES, Rates
from kvkeep._settings import RemoteConfig, raw_remote

if TYPE_CHECKING:
    from kvkeep._kvkeep import Behind

_GIB, _MIB = 1 << 30, 1 << 20

_BESIDE_BYTES = 2 * _MIB
"""Of the cap, for the files beside the cache: hashes of weights, measured rates."""

_NUMBERS = (
    "capacity_gb", "queue_mb", "load_timeout_s", "store_timeout_s", "flush_timeout_s", "ttl_s", "prefill_tokens_per_s", "disk_gb_per_s",
)  # fmt: skip

_REMOTE_SECONDS = 1.0
"""How long a load waits for a store's next block, unless `remote` says so itself: an engine's blocks are megabytes."""

_Kind = TypeVar("_Kind", bound="Settings")


@dataclass(frozen=True)
class Settings:
    """Every setting with its default."""

    root_dir: str
    """A folder of kvkeep's own, on a local disk."""
    capacity_gb: float | None = None
    """GiB that the folder may take, as `du` counts them. For each process that keeps KV. Without it nothing of KV is written there: then
    there must be a daemon or a remote store."""
    daemon: str | None = None
    """The socket of `kvkeep daemon`: RAM that the engines of this machine share, and that outlives them."""
    daemon_token_file: str | None = None
    """Says which tenant of the daemon this is: a file with `NAME TOKEN`, readable by its owner alone."""
    remote: str | Mapping[str, Any] | None = None
    """A store that nodes share: a URL, or the settings of `kvkeep.RemoteConfig` by their names."""
    queue_mb: float = 1024
    """MiB of memory that may wait to be written; what comes then keeps its place in the engine's RAM until `store_timeout_s`."""
    load_timeout_s: float = 10
    """A load that takes longer has failed: what came of it is kept, the rest is computed."""
    store_timeout_s: float = 30
    """A store that takes longer has failed: its place in RAM is free again."""
    flush_timeout_s: float = 5
    """How long an engine that ends waits for a tier that gets nothing done."""
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
        if self.capacity_gb is None and self.daemon is None and self.remote is None:
            raise ValueError("kvkeep: there is no place for KV: give capacity_gb for a disk, a daemon's socket, or a remote store's URL")
        if self.daemon is None and self.daemon_token_file is not None:
            raise ValueError("kvkeep: daemon_token_file without daemon: give the daemon's socket, or leave it out")
        self._remote()
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
        missing = ["root_dir"] if "root_dir" not in given else []
        if unknown or missing:
            what = f"unknown settings {unknown}" if unknown else f"missing settings {missing}"
            raise ValueError(f"kvkeep: {what}; there are {sorted(known)}")
        return cls(**given)

    @property
    def root(self) -> Path:
        return Path(self.root_dir).expanduser()

    @property
    def queue_bytes(self) -> int:
        return int(self.queue_mb * _MIB)

    def behind(self, folder: str, queue_bytes: int) -> Behind:
        """What is behind the engine's RAM, with this folder of the disk."""
        disk = None
        if self.capacity_gb is not None:
            disk = str(self.root / folder), max(int(self.capacity_gb * _GIB) - _BESIDE_BYTES, 0), self.key_file, self.codec
        daemon = None if self.daemon is None else (str(Path(self.daemon).expanduser()), self.daemon_token_file)
        remote = self._remote()
        return {"disk": disk, "daemon": daemon, "remote": None if remote is None else raw_remote(remote), "queue_bytes": queue_bytes}

    def _remote(self) -> RemoteConfig | None:
        if self.remote is None:
            return None
        given = {"url": self.remote} if isinstance(self.remote, str) else dict(self.remote)
        unknown = sorted(set(given) - {field.name for field in fields(RemoteConfig)})
        if unknown or "url" not in given:
            raise ValueError(f"kvkeep: remote has {unknown or 'no url'}: give a URL, or the settings of kvkeep.RemoteConfig")
        return RemoteConfig(**{"deadline_seconds": _REMOTE_SECONDS, "key_file": self.key_file, **given})

    @property
    def ask_seconds(self) -> float:
        """For so long a request waits for a store to say what it has."""
        remote = self._remote()
        return 0.0 if remote is None else remote.deadline_seconds

    @property
    def guess(self) -> Rates:
        """What is taken for true until it is measured."""
        there = {"daemon": self.daemon is not None, "disk": self.capacity_gb is not None, "remote": self.remote is not None}
        guesses = {**GUESSES, "disk": self.disk_gb_per_s * _GIB}
        return Rates(self.prefill_tokens_per_s or 0.0, guesses={tier: rate for tier, rate in guesses.items() if there[tier]})


def is_above_0(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")
