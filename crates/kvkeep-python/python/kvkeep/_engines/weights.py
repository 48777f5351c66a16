"""Which weights a model's folder holds: SHA-256 over every file that can change KV, read once.

Invariant: two folders have one fingerprint only if these files have the same names and bytes. What was hashed is kept in a file beside
the cache, by the file's device, number, size and times, so that no gigabyte is read twice; a file that was written since is hashed again.
The name and a revision alone were the alternative: other weights under the same name would then be served their predecessors' KV.
"""

from __future__ import annotations

import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kvkeep._files import Hashes, identity_of

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
    kept = Hashes(known)
    identities = {name: identity_of(path) for name, path in files.items()}
    hashes = {name: hash for name, path in files.items() if (hash := _named_by_content(path) or kept.get(identities[name]))}
    fresh = [name for name in files if name not in hashes]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="kvkeep-hash") as pool:
        for name, hash in zip(fresh, pool.map(_sha256, [files[name] for name in fresh])):
            kept.put(identities[name], hash)
            hashes[name] = hash
    kept.save()
    return hashes


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
