"""Tensors to digests: BLAKE3 over every byte of every weight, in several threads.

Invariant: two tensors have one digest only if dtype, shape and all bytes are the same. Nothing of where a tensor lies (address,
strides, device) enters.

A weight that is still what its file holds has the hash that is kept for it (`kvkeep._files`). What was hashed once in this process is recognised
by a checksum of all its bytes, several times as fast, and not hashed again. Remembering which tensors were seen costs nothing, and
was the alternative that lost: an edit through `.data` moves no counter.

A tensor is cut into pieces, and the digest of a tensor is that of its pieces' digests: so one large embedding keeps all cores busy, as
many small tensors do. A sample of each tensor was the alternative that lost: it is free, and blind to other added tokens, to one edited
row and to packed weights.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from kvkeep._files import WeightHashes
from kvkeep._kvkeep import blake3, checksum

if TYPE_CHECKING:
    import torch

__all__ = ["digests", "memory", "refusal_of", "sample_places", "weights_digest"]

_PIECE_BYTES = 8 << 20
"""What one thread hashes at a time: long enough to hide the hand-over (20 µs), short enough to share out evenly."""

_LINE_BYTES = 64

_SEED = int.from_bytes(os.urandom(8), "little")
"""Of the checksums: drawn at random, so that nobody can make other weights with a known one."""

_PIECES_KNOWN = 1 << 17
"""How many pieces are remembered: a terabyte of weights in whole pieces, for 20 MB."""

_digest_of: dict[tuple[bytes, int], bytes] = {}
"""(checksum, bytes) of a piece → its digest."""

_BATCH_BYTES = 1 << 30
"""What `weights_digest` holds of a stream of tensors before it hashes them."""


def weights_digest(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A digest, in hex, of weights given as (name, tensor) pairs, for engines that are no module tree.

    The order of the pairs does not matter. A stream is read once, and at most a gigabyte of it is held at a time.
    Raises `UnsupportedTensorError` for a tensor whose bytes cannot be read.
    """
    from kvkeep._errors import UnsupportedTensorError

    lines: list[str] = []
    batch: list[tuple[str, Any]] = []

    def hash_batch() -> None:
        lines.extend(f"{name!r} {digest.hex()}" for (name, _), digest in zip(batch, digests([t for _, t in batch])))
        batch.clear()

    held = 0
    for name, tensor in named:
        why = refusal_of(tensor)
        if why is not None:
            raise UnsupportedTensorError(f"{name}: {why}")
        batch.append((name, tensor))
        held += tensor.numel() * tensor.element_size()
        if held >= _BATCH_BYTES:
            hash_batch()
            held = 0
    hash_batch()
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def refusal_of(tensor: Any) -> str | None:
    """Why the bytes of a tensor cannot be read; None if they can."""
    import torch

    if tensor.is_meta:
        return "its bytes are not in memory (device meta): load the weights, or turn offloading off"
    if tensor.layout != torch.strided or tensor.is_nested:
        return f"a tensor of layout {tensor.layout} cannot be read as bytes: make it dense"
    if torch.nn.parameter.is_lazy(tensor):
        return "it has no shape yet: run the model once"
    return None


def digests(tensors: Sequence[torch.Tensor]) -> list[bytes]:
    """A digest of each tensor's dtype, shape and bytes: SHA-256 over what its pieces hash to. None of them may be one that `refusal_of` refuses."""
    kept = WeightHashes(tensors)
    digests = {number: digest for number in range(len(tensors)) if (digest := kept.get(number))}
    fresh = [number for number in range(len(tensors)) if number not in digests]
    hashed = dict(zip(fresh, _hash([tensors[number] for number in fresh])))
    kept.keep(hashed)
    digests |= hashed
    return [digests[number] for number in range(len(tensors))]


def _hash(tensors: Sequence[torch.Tensor]) -> list[bytes]:
    flats = [_flat(tensor) for tensor in tensors]
    places = [
        (number, start)
        for number, flat in enumerate(flats)
        for start in range(0, flat.numel(), _PIECE_BYTES)
    ]  # fmt: skip

    def piece(place: tuple[int, int]) -> bytes:
        number, start = place
        # Of a GPU's tensor a piece at a time is copied: no second copy of a model is ever held.
        part = flats[number][start : start + _PIECE_BYTES].cpu()
        return _piece_digest(part.data_ptr(), part.numel())

    hashed = _in_threads(piece, places)
    wholes = [hashlib.sha256(f"{t.dtype} {tuple(t.shape)}".encode()) for t in tensors]
    for (number, _), part in zip(places, hashed):
        wholes[number].update(part)
    return [whole.digest() for whole in wholes]


def _piece_digest(address: int, size: int) -> bytes:
    """BLAKE3 of a piece of memory, computed once for each content."""
    if size < _PIECE_BYTES // 1024:  # hashed before it is recognised
        return blake3(address, size)
    key = (checksum(address, size, _SEED), size)
    digest = _digest_of.get(key)
    if digest is None:
        digest = blake3(address, size)
        if checksum(address, size, _SEED) != key[0]:
            return digest  # somebody wrote meanwhile: the two are not of one content
        if len(_digest_of) >= _PIECES_KNOWN:
            _digest_of.clear()
        _digest_of[key] = digest
    return digest


def memory(address: int, size: int) -> Any:
    """Memory that somebody else keeps alive, to be read. Not by numpy: what numpy has seen of a tensor torch never resizes again."""
    return (ctypes.c_char * size).from_address(address) if size else b""


def sample_places(tensor: torch.Tensor) -> list[tuple[int, int]]:
    """Where two cache lines of a tensor lie (all of a small one): (address, bytes). None of one that is elsewhere or in pieces."""
    size = tensor.numel() * tensor.element_size()
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or not size:
        return []
    start = tensor.data_ptr()
    if size <= 4 * _LINE_BYTES:
        return [(start, size)]
    return [((start + size * part // 3) // _LINE_BYTES * _LINE_BYTES, _LINE_BYTES) for part in (1, 2)]


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes in the order of its elements, without a copy where they lie so already."""
    import torch

    with torch.no_grad():
        plain = tensor.detach()
        if plain.is_conj():
            plain = plain.resolve_conj()
        if plain.is_neg():
            plain = plain.resolve_neg()
        return plain.contiguous().reshape(-1).view(torch.uint8)


def _in_threads(function: Any, places: list[tuple[int, int]]) -> list[bytes]:
    threads = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 32)
    if threads == 1 or len(places) < 2:
        return [function(place) for place in places]
    with ThreadPoolExecutor(threads, thread_name_prefix="kvkeep-hash") as pool:
        # The interpreter's lock is let go of while a piece is hashed.
        return list(pool.map(function, places))
