"""The settings of a disk tier, as both doors take them."""

from __future__ import annotations

import os
from typing import Literal, TypeAlias

from kvkeep._errors import ConfigError

DiskWrite: TypeAlias = Literal["through", "back"]


def raw_disk(
    path: str | os.PathLike[str] | None,
    size_gb: float,
    write: DiskWrite,
    admission: str,
    key_file: str | os.PathLike[str] | None,
    flush_timeout_seconds: float,
) -> tuple[str, float, str, str, str | None, float] | None:
    """What the extension takes; None without a path."""
    if path is None:
        if key_file is not None:
            raise ConfigError("disk_key_file without disk_path: there is nothing to encrypt")
        return None
    key = None if key_file is None else os.fspath(key_file)
    return os.fspath(path), size_gb, write, admission, key, flush_timeout_seconds
