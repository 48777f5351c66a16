"""Which weights a model's folder holds: SHA-256 over every file that can change KV, read once.

Invariant: two folders have one fingerprint only if these files have the same names and bytes. What was hashed is kept in a file beside
the cache, by the file's device, number, size and times, so that no gigabyte is read twice; a file that was written since is hashed again.
The name and a revision alone were the alternative: other weights under the same name would then be served their predecessors' KV.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_PIECE_BYTES = 16 << 20

_NO_MATTER = re.compile(r"(^|/)(\.|tokenizer|vocab\.|merges\.|generation_config|special_tokens|added_tokens|chat_template|README|LICENSE)|\.(md|txt|png|lock)$")
"""Files that decide no KV: it is a function of token ids."""


class WeightsError(ValueError):
    """What the weights are cannot be found out. The message says what to do."""


def fingerprint(name: str, revision: str | None, known: Path) -> str:
    """Of a local folder or file, or of a hub's model that was downloaded. `known` is the file of hashes."""
    path = Path(name)
    if not path.exists():
        path = _downloaded(name, revision)
    files = {path.name: path} if path.is_file() else _files(path)
    if not files:
        raise WeightsError(f"{path} has no files that say what the model is: give kvkeep `weights`, a revision that you vouch for")
    hashes = _hashes(files, known)
    lines = [f"{len(name)}:{name} {hashes[name]}" for name in sorted(files)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _files(folder: Path) -> dict[str, Path]:
    every = (Path(root, name) for root, _, names in os.walk(folder) for name in names)
    named = {path.relative_to(folder).as_posix(): path for path in every}
    return {name: path for name, path in named.items() if not _NO_MATTER.search(name) and path.is_file()}


def _downloaded(name: str, revision: str | None) -> Path:
    """Where the hub's client has put a model."""
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except Exception as error:
        raise WeightsError(
            f"kvkeep cannot read the weights of {name!r}, and the name alone does not say which they are: "
            "give the tier `weights`, a revision that you vouch for"
        ) from error


def _hashes(files: dict[str, Path], known: Path) -> dict[str, str]:
    before = _read(known)
    named: dict[str, tuple[str, str]] = {name: (_identity(path), "") for name, path in files.items()}
    fresh = [name for name, (identity, _) in named.items() if identity not in before and not _named_by_content(files[name])]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="kvkeep-hash") as pool:
        hashed = dict(zip(fresh, pool.map(_sha256, [files[name] for name in fresh])))
    hashes = {name: _named_by_content(files[name]) or hashed.get(name) or before[identity] for name, (identity, _) in named.items()}
    if fresh:
        _write(known, before | {named[name][0]: hashed[name] for name in fresh})
    return hashes


def _identity(path: Path) -> str:
    seen = path.stat()
    return f"{seen.st_dev} {seen.st_ino} {seen.st_size} {seen.st_mtime_ns} {seen.st_ctime_ns}"


def _named_by_content(path: Path) -> str | None:
    """The hub's client names large files by their SHA-256."""
    real = path.resolve()
    return real.name if real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name) else None


def _sha256(path: Path) -> str:
    digest, piece = hashlib.sha256(), memoryview(bytearray(_PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(piece):
            digest.update(piece[:size])
    return digest.hexdigest()


def _read(known: Path) -> dict[str, str]:
    try:
        read = json.loads(known.read_text())
    except (OSError, ValueError):
        return {}
    right = isinstance(read, dict) and all(isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) for value in read.values())
    return read if right else {}


def _write(known: Path, hashes: dict[str, str]) -> None:
    """Without it the files are read again next time."""
    kept = dict(list(hashes.items())[-4096:])
    try:
        new = known.with_suffix(f".{os.getpid()}.new")
        new.write_text(json.dumps(kept))
        os.replace(new, known)
    except OSError:
        pass
