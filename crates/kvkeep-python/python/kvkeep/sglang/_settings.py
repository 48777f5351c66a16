"""What `--hicache-storage-backend-extra-config` may say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvkeep._engines import settings

_OF_SGLANG = ("backend_name", "module_path", "class_name", "interface_v1", "file_storage_path")
"""What SGLang itself reads, and leaves in."""


@dataclass(frozen=True)
class Settings(settings.Settings):
    """Every setting with its default: those of every engine, and this."""

    buffer_mb: float = 256
    """MiB of memory through which pages are read, and as much through which they are written."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not settings.is_above_0(self.buffer_mb):
            raise ValueError(f"kvkeep: buffer_mb is {self.buffer_mb!r}: give a number above 0")

    @property
    def buffer_bytes(self) -> int:
        return int(self.buffer_mb * (1 << 20))


def read(extra_config: Mapping[str, Any]) -> Settings:
    """Raises ValueError for what is missing or not known."""
    return Settings.read({name: value for name, value in extra_config.items() if name not in _OF_SGLANG})
