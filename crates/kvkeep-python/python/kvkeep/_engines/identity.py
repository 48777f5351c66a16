"""What KV depends on besides tokens, in any engine: the parts that each engine's own description ends in.

Invariant: two engines share blocks only if their digests are equal, and a part that cannot be read is one that nobody else has.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvkeep._engines.weights import WeightsError, fingerprint


def digest(parts: Mapping[str, Any]) -> str:
    """SHA-256 of all parts, in hex."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def machine() -> list[str]:
    """torch and the device: both decide the last bits of what is computed."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    capability = "" if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    return [f"torch {torch.__version__}", device, capability]


def adapter(path: str, known: Path) -> str:
    """What an adapter is; of one that cannot be read, something that no other process says."""
    try:
        return fingerprint(path, None, known)
    except (OSError, WeightsError):
        return f"unknown {os.urandom(16).hex()}"


class OneAtATime:
    """Processes of one engine start together, and each wants the same files hashed: the first does it, the others find it done."""

    def __init__(self, known: Path) -> None:
        self._path = known.with_suffix(".lock")

    def __enter__(self) -> None:
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        os.close(self._file)
