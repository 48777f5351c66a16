"""Hashes of files that are kept, so that no gigabyte is read twice.

Invariant: a kept hash is used only for a file of the same device, number, size and times, and a weight has its file's hash only if every
page of it is that file's own: mapped from it, and never written to. The kernel says so (`files_behind`). So a weight that was trained,
merged, converted or edited since it was loaded is hashed again.

A file's name and times alone were the alternative: they say what was loaded, and not what is in memory.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvkeep._kvkeep import files_behind

if TYPE_CHECKING:
    import torch

__all__ = ["Hashes", "WeightHashes", "identity_of"]

_MOST = 1 << 14
"""Hashes that a file of them keeps: 3 MB."""

_LEAST_BYTES = 1 << 20
"""Of a weight that is worth a look: smaller ones are hashed as fast."""

_SCHEME = "blake3"
"""How weights are hashed: what was hashed another way has another key."""

_SETTLED_NS = 2_000_000_000
"""A file that was written so lately may be written again without another time: clocks of file systems tick."""


def identity_of(path: str | Path) -> str:
    """What tells a file from every other, and from itself before it was written to."""
    seen = os.stat(path)
    return f"{seen.st_dev} {seen.st_ino} {seen.st_size} {seen.st_mtime_ns} {seen.st_ctime_ns}"


class Hashes:
    """Hashes by what they are of, in a file of their own. One that cannot be read or written keeps nothing, and is no error."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept = self._read()
        self._new: dict[str, str] = {}

    def get(self, key: str) -> str | None:
        return self._new.get(key) or self._kept.get(key)

    def put(self, key: str, hash_in_hex: str) -> None:
        self._new[key] = hash_in_hex

    def save(self) -> None:
        """Keeps what is new, beside what others have written meanwhile. The oldest go first."""
        if not self._new:
            return
        every = self._read() | self._new
        text = json.dumps(dict(list(every.items())[-_MOST:]))
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # For its owner alone, and of another name for each thread that saves at the same time.
            descriptor, new = tempfile.mkstemp(prefix=f".{self._path.name}-", dir=self._path.parent)
        except OSError:
            return  # without it they are hashed again next time
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
            os.replace(new, self._path)
        except OSError:
            os.unlink(new)

    def _read(self) -> dict[str, str]:
        try:
            read = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        right = isinstance(read, dict) and all(isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) for value in read.values())
        return read if right else {}


class WeightHashes:
    """Of those of some weights that are what a file holds, the hashes that are kept. `$XDG_CACHE_HOME/kvkeep/weights.json` has them."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors
        self._keys = self._look()
        self._hashes = Hashes(_home() / "weights.json") if any(self._keys) else None

    def get(self, number: int) -> bytes | None:
        key = self._keys[number]
        kept = self._hashes.get(key) if self._hashes and key else None
        return bytes.fromhex(kept) if kept else None

    def keep(self, hashed: dict[int, bytes]) -> None:
        """What was hashed is kept, if it is still what the file holds, and the file the same."""
        if self._hashes and hashed:
            after = self._look()
            for number, digest in hashed.items():
                key = after[number]
                if key and key == self._keys[number]:
                    self._hashes.put(key, digest.hex())
            self._hashes.save()

    def _look(self) -> list[str | None]:
        """What each weight is known by; None where its memory is not a file's."""
        places = [(_place(tensor) or (0, 0)) for tensor in self._tensors]
        if not any(size for _, size in places):
            return [None] * len(places)
        files: dict[tuple[str, str, int], str | None] = {}
        keys: list[str | None] = []
        for tensor, origin in zip(self._tensors, files_behind(places, mmap.PAGESIZE)):
            if origin is None:
                keys.append(None)
                continue
            path, device, inode, offset = origin
            if (path, device, inode) not in files:
                files[path, device, inode] = _settled(path, device, inode)
            identity = files[path, device, inode]
            keys.append(f"{_SCHEME} {identity} {offset} {tensor.dtype} {tuple(tensor.shape)}" if identity else None)
        return keys


def _place(tensor: torch.Tensor) -> tuple[int, int] | None:
    size = tensor.numel() * tensor.element_size()
    plain = tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
    return (tensor.data_ptr(), size) if plain and size >= _LEAST_BYTES else None


def _settled(path: str, device: str, inode: int) -> str | None:
    """A file's identity, if it is the one that is mapped, and has not been written to just now."""
    try:
        seen = os.stat(path)
    except OSError:
        return None
    same = f"{os.major(seen.st_dev):02x}:{os.minor(seen.st_dev):02x}" == device and seen.st_ino == inode
    old = time.time_ns() - max(seen.st_mtime_ns, seen.st_ctime_ns) >= _SETTLED_NS
    return identity_of(path) if same and old else None


def _home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvkeep"
