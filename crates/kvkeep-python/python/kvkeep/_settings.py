"""The settings of a cache, as its doors take them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

from kvkeep._errors import ConfigError

if TYPE_CHECKING:
    from kvkeep._kvkeep import RawRemote, Settings

DiskWrite: TypeAlias = Literal["through", "back"]
Codec: TypeAlias = Literal["raw", "lossless", "int8", "int4", "k8v4", "fp8", "nf4"]
DiskCodec: TypeAlias = Literal["auto", "raw", "lossless", "int8", "int4", "k8v4", "fp8", "nf4"]
Policy: TypeAlias = Literal["adaptive", "lru", "s3fifo", "arc", "lru2"]
Priority: TypeAlias = Literal["drop-first", "normal", "keep-longer"]


@dataclass(frozen=True)
class DiskConfig:
    """A disk tier: a directory of its own, and a cap. What RAM has no room for goes there, and what is there is found
    again after a restart.

    The doors take it as `disk=DiskConfig(...)`, as `disk="directory"`, or in parts as `disk_path=...`, `disk_size_gb=...` and so on.
    """

    path: str | os.PathLike[str]
    """The directory. One process at a time has it open."""
    size_gb: float = 10.0
    """The cap in GiB, as `du` counts."""
    write: DiskWrite = "through"
    """`"through"` writes what is stored at once, in the background; `"back"` when RAM evicts it."""
    admission: str = "all"
    """What is written at all: `"all"`, `"second-use"` (what was used again), or `"worth:R"` (kinds of entries that are
    read from the disk at least R times for each write). The rest stays in RAM only."""
    key_file: str | os.PathLike[str] | None = None
    """Encrypts the directory under the key in this file (32 bytes, or 64 hexadecimal digits)."""
    flush_timeout_seconds: float = 30.0
    """How long `flush` and `close` wait for a disk that gets nothing done, before they raise `DiskError`. A slow disk
    that gets on is waited for."""
    codec: DiskCodec = "auto"
    """How blocks are written: `"raw"` as they are; `"lossless"` the same bits in fewer bytes, two thirds of bfloat16; `"auto"`
    the one that this disk and this processor load faster, `"raw"` until that is measured.
    `"int8"`, `"int4"`, `"k8v4"`, `"fp8"` and `"nf4"` change blocks of `KVCache` within a stated bound, and keep them under names of
    their own; what they cannot take they write as `"lossless"` does. What another exact codec wrote is read as well."""


@dataclass(frozen=True)
class RemoteConfig:
    """A store that several nodes share: what one has stored, the others find. Behind RAM, and behind the disk if there is one.

    The doors take it as `remote=RemoteConfig(...)`, or as `remote="file:///srv/kvkeep"`. A store that does not answer is no
    error: it is a miss.
    """

    url: str
    """`redis://`, `rediss://`, `redis-cluster://`, `redis-sentinel://`, `s3://bucket/path`, or `file:///directory`."""
    prefix: str = "kvkeep"
    """What every name in the store begins with. Caches with the same one share what they have."""
    size_gb: float = 10.0
    """What all of them may use there, in GiB."""
    deadline_seconds: float = 0.05
    """How long a lookup waits for the store, and for the next block while blocks come. What is late is a miss."""
    ttl_seconds: float | None = None
    """What was written there is gone after so long; None keeps it until it is evicted."""
    key_file: str | os.PathLike[str] | None = None
    """Encrypts what is written there, as on a disk. All nodes need the same key."""
    codec: Codec = "raw"
    """How blocks are written there."""
    variables: Mapping[str, str] | None = field(default=None, repr=False)
    """What the store is told: of S3 `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT`. None takes them
    from the environment."""

    def __repr__(self) -> str:
        # A URL may have a password in it.
        return f"RemoteConfig(prefix={self.prefix!r}, size_gb={self.size_gb}, deadline_seconds={self.deadline_seconds})"


class TierOptions(TypedDict, total=False):
    """What lies behind RAM, as keyword arguments of every door: a disk whole or in the parts of a `DiskConfig`, a daemon, a store."""

    disk: DiskConfig | str | os.PathLike[str] | None
    disk_path: str | os.PathLike[str] | None
    disk_size_gb: float
    disk_write: DiskWrite
    disk_admission: str
    disk_key_file: str | os.PathLike[str] | None
    disk_flush_timeout_seconds: float
    disk_codec: DiskCodec
    daemon: str | os.PathLike[str] | None
    daemon_token_file: str | os.PathLike[str] | None
    remote: RemoteConfig | str | None


_PREFIX = "disk_"


def settings(
    max_size_gb: float,
    default_ttl_seconds: float | None,
    policy: str,
    tiers: TierOptions,
    quotas: Mapping[Any, float] | None = None,
) -> Settings:
    """What the extension takes.

    Raises `ConfigError` for a disk that is given twice or in part, or a token for no daemon; `TypeError` for an option that
    there is not.
    """
    for name in tiers:
        if name not in TierOptions.__annotations__:
            raise TypeError(f"there is no option {name!r}: those of tiers are {', '.join(sorted(TierOptions.__annotations__))}")
    daemon, token_file, remote = tiers.get("daemon"), tiers.get("daemon_token_file"), tiers.get("remote")
    if daemon is None and token_file is not None:
        raise ConfigError("daemon_token_file without daemon: give the daemon's socket, or leave it out")
    disk = _disk(tiers)
    return {
        "max_size_gb": max_size_gb,
        "default_ttl_seconds": default_ttl_seconds,
        "policy": policy,
        "quotas": [(namespace.raw, weight) for namespace, weight in (quotas or {}).items()],
        "disk": None if disk is None else _raw_disk(disk),
        "remote": None if remote is None else raw_remote(remote),
        "daemon": None if daemon is None else (os.fspath(daemon), None if token_file is None else os.fspath(token_file)),
    }


def _disk(tiers: Mapping[str, Any]) -> DiskConfig | None:
    """The disk tier that is meant, or None."""
    disk, options = tiers.get("disk"), {name: value for name, value in tiers.items() if name.startswith(_PREFIX)}
    if disk is not None and options:
        raise ConfigError(f"disk and {', '.join(options)} are both given: give DiskConfig(...) alone, or its parts")
    if isinstance(disk, DiskConfig):
        return disk
    if disk is not None:
        return DiskConfig(disk)
    parts = {name.removeprefix(_PREFIX): value for name, value in options.items()}
    if parts.get("path") is None:
        given = [name for name in options if name != "disk_path"]
        if given:
            raise ConfigError(f"{', '.join(given)} without disk_path: give the directory, or leave it out")
        return None
    return DiskConfig(**parts)


def _raw_disk(disk: DiskConfig) -> tuple[str, float, str, str, str | None, float, str]:
    key_file = None if disk.key_file is None else os.fspath(disk.key_file)
    path, flush_timeout = os.fspath(disk.path), disk.flush_timeout_seconds
    return path, disk.size_gb, disk.write, disk.admission, key_file, flush_timeout, disk.codec


def raw_remote(remote: RemoteConfig | str) -> RawRemote:
    """As the extension takes it."""
    whole = RemoteConfig(remote) if isinstance(remote, str) else remote
    if not isinstance(whole, RemoteConfig):
        raise ConfigError(f"remote is {type(whole).__name__}: give RemoteConfig(...), or a URL such as 'file:///srv/kvkeep'")
    return {
        "url": whole.url,
        "prefix": whole.prefix,
        "size_gb": whole.size_gb,
        "deadline_seconds": whole.deadline_seconds,
        "ttl_seconds": whole.ttl_seconds,
        "key_file": None if whole.key_file is None else os.fspath(whole.key_file),
        "codec": whole.codec,
        "variables": dict(os.environ if whole.variables is None else whole.variables),
    }
