"""What a model is, as far as its KV depends on it: one digest, and whether it still holds.

    identity = ModelIdentity(model)
    state = identity.now()          # cheap; reads again what has changed
    state.digest                    # equal digests: their KV may stand for each other, given tokens and positions
    state.refusal                   # why nothing may be reused or stored now, or None

Invariant: a digest covers everything that can be read of a model, and what cannot be read is a refusal. Nothing of the process enters
(addresses, order of sets, device numbers), so a model has the same digest in every process that runs the same versions.

The parts: the configuration, every attribute and every class of the module tree, all code the forward pass can reach, every byte of every
weight and buffer, the adapters in use, the mode (autocast, precision) and the engine's versions. `docs/identity.md` says what is left
out, and what the check at each call can miss.

A fingerprint taken once was the alternative that lost: models are trained, merged, switched and patched while a generator lives.
"""

from __future__ import annotations

import hashlib
import platform
import sys
import threading
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter, is_
from typing import Any

from kvkeep._code import getter
from kvkeep._walk import Seen, Walk
from kvkeep._weights import digests, memory, sample_places, weights_digest

__all__ = ["IdentityState", "ModelIdentity", "weights_digest"]

_FORMAT = "kvkeep identity 1"
"""Enters every digest: raise it when the way of reading changes."""

_REFUSALS_SHOWN = 3


@dataclass(frozen=True)
class IdentityState:
    """A model at one moment."""

    digest: str
    """SHA-256 in hex. Equal digests: KV of one is KV of the other, given tokens and positions."""
    refusal: str | None
    """Why nothing may be reused or stored in this state, and what to do; None if all is well."""
    parts: Mapping[str, str] = field(compare=False)
    """What the digest is made of, each with a short digest of its own: to see what differs."""


class ModelIdentity:
    """The identity of a live model.

    - `weights`: a revision or hash that you vouch for. It stands for the weights as they are now, which are then not hashed; adapters and
      what changes later are hashed all the same. Two models with equal `weights` and unequal weights are your mistake to make.

    Making one hashes every byte of the weights. Nothing is raised for a model that cannot be read: `now().refusal` says why.
    """

    def __init__(self, model: Any, *, weights: str | None = None) -> None:
        self._model, self._vouched = model, weights
        self._lock = threading.Lock()
        self._known: dict[int, _Known] = {}
        self._doubt: dict[str, str] = {}
        self._witness: _Witness | _NeverHolds
        self._state: IdentityState
        self._read_or_refuse()

    def now(self) -> IdentityState:
        """The state at this moment. A model that has not changed is told by its pointers and counters, in a fraction of a millisecond;
        of one that has changed, what changed is read again."""
        witness, state = self._witness, self._state
        if witness.holds():
            return state
        with self._lock:
            if not self._witness.holds():
                self._read_or_refuse()
            return self._state

    def _read_or_refuse(self) -> None:
        try:
            self._read()
        except Exception as error:  # whatever a foreign object raises when it is read: nothing is known, so nothing is reused
            self._witness = _NeverHolds()
            why = f"the model cannot be read ({type(error).__name__}: {error})"
            self._state = IdentityState(_digest([_FORMAT, why]), why, types.MappingProxyType({}))

    def _read(self) -> None:
        mode = _mode(self._model)
        walk = Walk(self._model)
        witness = _Witness(self._model, walk, mode)
        weights = self._weights(walk)
        parts = {
            "config": _digest([walk.token(getattr(self._model, "config", None), "config")]),
            "modules": _digest(f"{path} {text}" for path, text in walk.lines.items()),
            "code": walk.code_digest,
            "weights": _digest(text for seen, text in weights if not seen.in_adapter),
            "adapters": _digest(text for seen, text in weights if seen.in_adapter),
            "mode": _digest(map(repr, mode)),
            "engine": _digest(_engine(walk)),
        }
        digest = _digest([_FORMAT, *(f"{name} {part}" for name, part in parts.items())])
        refusals = walk.refusals + _refusals_of_mode()
        short = types.MappingProxyType({name: part[:16] for name, part in parts.items()})
        self._state = IdentityState(digest, _in_words(refusals), short)
        self._witness = witness

    def _weights(self, walk: Walk) -> list[tuple[Seen, str]]:
        """The text of each weight. Read are those that are new or that changed since they were read."""
        first = not self._doubt
        doubted = {path for path, text in walk.doubt.items() if self._doubt.get(path) != text}
        stale: dict[int, Any] = {}
        for seen in walk.tensors:
            before = self._known.get(id(seen.tensor))
            if before is None or not before.holds() or _in_doubt(seen.module, doubted):
                stale[id(seen.tensor)] = seen
        vouched = [seen for seen in stale.values() if first and self._vouched is not None and not seen.in_adapter]
        for seen in vouched:
            del stale[id(seen.tensor)]
        known = {id(seen.tensor): self._known[id(seen.tensor)] for seen in walk.tensors if id(seen.tensor) in self._known}
        known |= {id(seen.tensor): _Known(seen.tensor, f"vouched {self._vouched} {_header(seen.tensor)}") for seen in vouched}
        fresh = [_Known(seen.tensor, "") for seen in stale.values()]
        for entry, digest in zip(fresh, digests([entry.tensor for entry in fresh])):
            entry.text = digest.hex()
            known[id(entry.tensor)] = entry
        self._known, self._doubt = known, walk.doubt
        return [(seen, f"{seen.name} {known[id(seen.tensor)].text}") for seen in walk.tensors]


class _Known:
    """A weight whose digest is known, and how to tell that it has not changed."""

    __slots__ = ("lines", "pointer", "sample", "tensor", "text", "version")

    def __init__(self, tensor: Any, text: str) -> None:
        self.tensor, self.text = tensor, text
        self.version, self.pointer = _version(tensor), tensor.data_ptr()
        self.lines = [memory(address, size) for address, size in sample_places(tensor)]
        self.sample = b"".join(self.lines)

    def holds(self) -> bool:
        """Pointers first: the sample lies where they point."""
        same = self.version == _version(self.tensor) and self.pointer == self.tensor.data_ptr()
        return same and b"".join(self.lines) == self.sample


class _Witness:
    """All that a walk saw, kept so that one pass over pointers tells whether any of it has changed.

    Objects are compared by identity, never by `==`: an equal object in another's place is another object, whose later changes would
    not be seen.
    """

    def __init__(self, model: Any, walk: Walk, mode: tuple[Any, ...]) -> None:
        self._model, self._mode, self._walk = model, mode, walk
        mappings = [(mapping, keys) for mapping, keys in walk.read.values()]
        self._mappings = [mapping for mapping, _ in mappings]
        self._empty = walk.empty
        mappings = [(mapping, keys) for mapping, keys in mappings if not _makes_entries(mapping)]
        self._tables = [(m, list(dict.values(m))) for m in self._mappings if _makes_entries(m)]
        self._lengths = list(map(len, self._mappings))
        self._readers = [(getter(keys), mapping) for mapping, keys in mappings if keys]
        self._values = [get(mapping) for get, mapping in self._readers]
        self._objects = [(m, k, m[k]) for m, keys in mappings for k in keys if not _compares_safely(m[k])]
        self._modules = [module for module, _ in walk.classes]
        self._classes = [cls for _, cls in walk.classes]
        self._sequences = [(sequence, tuple(sequence)) for sequence in walk.sequences]
        weights = [_Known(tensor, "") for tensor in {id(s.tensor): s.tensor for s in walk.tensors}.values()]
        self._tensors = [weight.tensor for weight in weights]
        self._pointers = [weight.pointer for weight in weights]
        self._versions = [weight.version for weight in weights]
        self._lines = [line for weight in weights for line in weight.lines]
        self._sample = b"".join(weight.sample for weight in weights)
        self._looked_up = list(walk.code.looked_up())
        self._places, self._sizes = walk.code.sizes()
        functions = walk.code.functions()
        self._code = [(f, f.__code__, f.__defaults__, f.__kwdefaults__) for f in functions]
        self._cells = [(cell, _content(cell)) for f in functions for cell in f.__closure__ or ()]

    def holds(self) -> bool:
        try:
            return self._objects_hold() and self._tensors_hold() and self._code_holds() and _mode(self._model) == self._mode
        except (RuntimeError, KeyError, ValueError):  # a dict that another thread changes, a name that is gone, a tensor without memory
            return False

    def _objects_hold(self) -> bool:
        return (
            not any(self._empty)
            and list(map(len, self._mappings)) == self._lengths
            and list(map(type, self._modules)) == self._classes
            and [get(mapping) for get, mapping in self._readers] == self._values
            and all([all(map(is_, dict.values(table), values)) for table, values in self._tables])
            and all([mapping[key] is value for mapping, key, value in self._objects])
            and all(len(now) == len(then) and all(map(is_, now, then)) for now, then in self._sequences)
        )

    def _tensors_hold(self) -> bool:
        """Pointers first: the samples lie where they point."""
        pointers = [tensor.data_ptr() for tensor in self._tensors] == self._pointers
        return pointers and _versions(self._tensors) == self._versions and b"".join(self._lines) == self._sample

    def _code_holds(self) -> bool:
        return (
            all([all(map(is_, get(mapping), then)) for mapping, get, then in self._looked_up])
            and list(map(len, self._places)) == self._sizes
            and all([f.__code__ is c and f.__defaults__ is d and f.__kwdefaults__ is k for f, c, d, k in self._code])
            and all([_content(cell) is content for cell, content in self._cells])
        )


class _NeverHolds:
    """The witness of a model that could not be read: it is tried again at each call."""

    def holds(self) -> bool:
        return False


def _makes_entries(mapping: Any) -> bool:
    """Whether a dict's `[]` is not dict's own, and may make an object that no entry is."""
    return isinstance(mapping, dict) and type(mapping).__getitem__ is not dict.__getitem__


def _compares_safely(value: Any) -> bool:
    """Whether `==` to another object can only be true of the same one, or of one that is as good."""
    import torch

    return value is None or type(value) in (bool, int, float, str, bytes, torch.dtype) or isinstance(value, torch.nn.Module)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _in_doubt(path: str, doubted: set[str]) -> bool:
    """Whether a module or one around it changed in a way that may have edited weights."""
    if path in doubted or "" in doubted:
        return True
    return any(path[:end] in doubted for end, letter in enumerate(path) if letter == ".")


def _versions(tensors: list[Any]) -> list[int]:
    try:
        return list(map(attrgetter("_version"), tensors))
    except RuntimeError:  # made in inference mode: has no counter
        return list(map(_version, tensors))


def _version(tensor: Any) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _header(tensor: Any) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def _mode(model: Any) -> tuple[Any, ...]:
    """What changes a forward pass from outside the model."""
    import torch

    device = str(getattr(model, "device", "cpu")).split(":")[0]
    casts = tuple(
        (kind, torch.is_autocast_enabled(kind) and str(torch.get_autocast_dtype(kind))) for kind in dict.fromkeys(("cpu", device)) if kind != "meta"
    )
    matmul = torch.backends.cuda.matmul
    return (
        casts,
        torch.get_float32_matmul_precision(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        (matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction) if device == "cuda" else None,
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        len(torch.nn.modules.module._global_forward_hooks) + len(torch.nn.modules.module._global_forward_pre_hooks),
    )


def _refusals_of_mode() -> list[str]:
    import torch

    refusals = []
    if torch.nn.modules.module._global_forward_hooks or torch.nn.modules.module._global_forward_pre_hooks:
        refusals.append("a forward hook is registered for all modules, which may change anything: remove it")
    if torch._C._len_torch_dispatch_stack():
        refusals.append("a dispatch mode is on, which may change anything: leave it before you generate")
    return refusals


def _engine(walk: Walk) -> list[str]:
    """Versions of all that computes (not of what is merely imported), and the kinds of device that weights lie on."""
    names = sorted({"torch", *walk.code.packages()})
    versions = [f"{name} {sys.modules[name].__version__}" for name in names if hasattr(sys.modules.get(name), "__version__")]
    devices = sorted({seen.tensor.device.type for seen in walk.tensors})
    return [f"python {platform.python_version_tuple()[:2]}", *versions, *devices]


def _in_words(refusals: list[str]) -> str | None:
    """The first few refusals in one sentence: a model that cannot be read cannot be read in every layer."""
    if len(refusals) > _REFUSALS_SHOWN:
        refusals = [*refusals[:_REFUSALS_SHOWN], f"and {len(refusals) - _REFUSALS_SHOWN} more like these"]
    return "; ".join(refusals) or None


def _digest(texts: Any) -> str:
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()
