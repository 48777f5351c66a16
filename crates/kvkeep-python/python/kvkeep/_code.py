"""What computes: the code that a model's forward pass can reach, by name, so that a patched function is another identity.

A model is more than its weights: `LlamaAttention.forward = mine` and `modeling_llama.apply_rotary_pos_emb = mine` change KV and touch no
attribute of any module. So the bytecode of every function is read that the forward passes of the tree's classes can reach: a name that a
function uses is looked up in its globals, in modules it names, in its closure, and in all classes that were reached.
Names decide, not types: a method counts if any reached function uses its name. That reads too much rather than too little.

Code of torch, numpy and the standard library is known by name and version and not read; it is looked up all the same, so one of
their functions that was replaced by somebody else's is seen. Bytecode, not source text: source may be missing or out of date. The price
is that another version of Python is another identity.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any

__all__ = ["Code", "getter"]

_IMPLICIT = frozenset(["forward", "__call__", "__getattr__", "__getitem__", "__iter__", "__len__"])
"""Methods of the tree's classes that are called without being named."""

_NOT_FOLLOWED = frozenset(["_CAN_RECORD_REGISTRY", "loss_function", "logger", "warnings", "__init__", "__doc__", "__module__", "__name__"])
"""Names that lead to nothing that computes KV: losses, what is printed, how a module was made, and the table of what models may record, which grows with
every model that the process makes."""

_KNOWN_BY_VERSION = (
    "torch", "numpy", "triton", "transformers/utils", "huggingface_hub", "psutil", "tqdm", "packaging", "yaml", "tokenizers", "safetensors",
)  # fmt: skip
"""Packages whose code is not read: they are in the engine's versions, or compute nothing. transformers' own helpers (what is installed,
how outputs are captured) keep registers of every model that the process ever made."""


class Code:
    """The functions that were reached, each read once. `token` makes text of any other value."""

    def __init__(self, token: Callable[[Any, str], str]) -> None:
        self._token = token
        self._names = set(_IMPLICIT)
        self._tree_classes: dict[type, None] = {}
        self._classes: dict[type, None] = {}
        self._functions: dict[int, types.FunctionType] = {}
        self._queue: list[types.FunctionType] = []
        self._lines: dict[tuple[str, str], None] = {}
        self._looked_up: dict[int, tuple[Any, set[str]]] = {}
        self._trusted = _trusted_folders()

    def reach_class(self, cls: type, *, in_tree: bool = False) -> str:
        """Notes a class. In those of the module tree names are followed, torch's included; of others every method is read, and no further."""
        if in_tree:
            self._tree_classes[cls] = None
        elif cls not in self._classes and not self.is_trusted_class(cls):
            self._classes[cls] = None
        return f"{cls.__module__}.{cls.__qualname__}"

    def reach(self, function: Any, where: str) -> str:
        """The text of anything that can be called."""
        if isinstance(function, types.FunctionType):
            return self._reach_function(function)
        if isinstance(function, (staticmethod, classmethod)):
            return self.reach(function.__func__, where)
        if isinstance(function, property):
            return " ".join(self.reach(part, where) for part in (function.fget, function.fset) if part is not None)
        if isinstance(function, functools.cached_property):
            return self.reach(function.func, where)
        if isinstance(function, functools.partial):
            parts = (function.func, function.args, function.keywords)
            return "partial " + " ".join(self._token(part, where) for part in parts)
        if isinstance(function, types.MethodType):
            return f"method {self.reach(function.__func__, where)} of {self._token(function.__self__, where)}"
        inner = getattr(function, "__wrapped__", None)
        if inner is not None:
            return f"{type(function).__qualname__} {self.reach(inner, where)}"
        return f"{getattr(function, '__module__', None)}.{getattr(function, '__qualname__', type(function).__qualname__)}"

    def is_callable(self, value: Any) -> bool:
        """Whether `value` is for `reach`."""
        kinds = (
            types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType,
            types.MethodWrapperType, types.ClassMethodDescriptorType, types.GetSetDescriptorType, types.MemberDescriptorType,
            staticmethod, classmethod, property, functools.partial, functools.cached_property, functools._lru_cache_wrapper,
        )  # fmt: skip
        return isinstance(value, kinds)

    def is_trusted(self, function: Any) -> bool:
        """Whether a function is torch's, numpy's or the standard library's own."""
        code = getattr(function, "__code__", None)
        return code is None or code.co_filename.startswith(self._trusted)

    def digest(self) -> str:
        """Follows every name to its end; the digest of all code that was reached."""
        done: set[Any] = set()
        while True:
            while self._queue:
                self._read(self._queue.pop())
            fresh = self._unread_methods(done)
            classes = [cls for cls in self._classes if cls not in done]
            if not fresh and not classes:
                break
            for base, name in fresh:
                self._attribute(base, name)
            for cls in classes:
                self._read_class(cls)
            done |= {*fresh, *classes}
        return hashlib.sha256("\n".join(sorted(f"{a} {b}" for a, b in self._lines)).encode()).hexdigest()

    def _unread_methods(self, done: set[Any]) -> list[tuple[type, str]]:
        """What the tree's classes have under the names that were used."""
        bases = {base for cls in self._tree_classes for base in cls.__mro__ if base is not object}
        fresh = {(base, name) for base in bases for name in (self._names & base.__dict__.keys()) - _NOT_FOLLOWED}
        return sorted(fresh - done, key=lambda pair: (pair[0].__module__, pair[0].__qualname__, pair[1]))

    def _read_class(self, cls: type) -> None:
        """A class outside the tree, as a cache or a registry of attention functions: the code of all its methods, whose names are not
        followed, and its data, which is."""
        for base in cls.__mro__:
            if self.is_trusted_class(base) or base in self._tree_classes:
                continue
            where = f"{base.__module__}.{base.__qualname__}"
            for name, value in list(base.__dict__.items()):
                if name.startswith("__") and not self.is_callable(value) or name in _NOT_FOLLOWED:
                    continue
                self._watch(base.__dict__, name, base)
                codes = [code_digest(code) for code in codes_of(value)] if self.is_callable(value) else self._token(value, f"{where}.{name}")
                self._lines[f"{where}.{name}", str(codes)] = None

    def mentions(self, cls: type, name: str) -> bool:
        """Whether a method of `cls` that was reached uses `name`."""
        import torch

        for base in cls.__mro__:
            if base in (torch.nn.Module, object):
                continue
            for method in self._names & base.__dict__.keys():
                if any(name in names_of(code) for code in codes_of(base.__dict__[method])):
                    return True
        return False

    def packages(self) -> set[str]:
        """The packages that the tree's classes come from."""
        return {cls.__module__.partition(".")[0] for cls in self._tree_classes}

    def looked_up(self) -> Iterator[tuple[Any, Any, tuple[Any, ...]]]:
        """(where names were looked up, a getter of them, what they were)."""
        for mapping, names in self._looked_up.values():
            get = getter(sorted(names))
            yield mapping, get, get(mapping)

    def sizes(self) -> tuple[list[Any], list[int]]:
        """Where a name could be put in front of another, and how many names there are: classes of the tree, and files of functions."""
        bases = {base: None for cls in self._tree_classes for base in cls.__mro__ if base is not object}
        files = {id(f.__globals__): f.__globals__ for f in self._functions.values() if not self.is_trusted(f)}
        places = [*(base.__dict__ for base in bases), *files.values()]
        return places, list(map(len, places))

    def functions(self) -> list[types.FunctionType]:
        """All functions that were reached and are not trusted."""
        return list(self._functions.values())

    def _attribute(self, base: type, name: str) -> None:
        value = base.__dict__[name]
        if self.is_trusted_class(base) and (not self.is_callable(value) or self.is_trusted(_function_of(value))):
            self._watch(base.__dict__, name, base)
            function = _function_of(value)
            if isinstance(function, types.FunctionType) and base.__module__.startswith("torch.nn.modules") and name == "forward":
                # Not read, but what it calls may be replaced.
                calls = self._resolve(function.__globals__, names_of(function.__code__), name, set())
                self._lines[f"{base.__module__}.{base.__qualname__}.{name}", repr(calls)] = None
            return
        where = f"{base.__module__}.{base.__qualname__}.{name}"
        self._watch(base.__dict__, name, base)
        text = self.reach(value, where) if self.is_callable(value) else self._token(value, where)
        self._lines[where, text] = None

    def _reach_function(self, function: types.FunctionType) -> str:
        name = f"{function.__module__}.{function.__qualname__}"
        if id(function) not in self._functions:
            self._functions[id(function)] = function
            self._queue.append(function)
        return name if self.is_trusted(function) else f"{name} {code_digest(function.__code__)[:16]}"

    def _read(self, function: types.FunctionType) -> None:
        name = f"{function.__module__}.{function.__qualname__}"
        cells = [_cell(cell) for cell in function.__closure__ or ()]
        if self.is_trusted(function):
            # A decorator of torch's around somebody's function: only what it wraps is of interest.
            for value in cells:
                if isinstance(value, types.FunctionType):
                    self._lines[name, f"wraps {self.reach(value, name)}"] = None
            return
        used = names_of(function.__code__) - _NOT_FOLLOWED
        self._names |= used
        parts = [code_digest(function.__code__)]
        parts += [self._token(value, f"{name} default") for value in function.__defaults__ or ()]
        parts += [f"{key} {self._token(value, f'{name} default')}" for key, value in sorted((function.__kwdefaults__ or {}).items())]
        parts += [f"cell {key} {self._token(value, f'{name} closure')}" for key, value in zip(function.__code__.co_freevars, cells)]
        parts += self._resolve(function.__globals__, used, name, set())
        self._lines[name, hashlib.sha256("\n".join(parts).encode()).hexdigest()] = None

    def _resolve(self, mapping: dict[str, Any], used: frozenset[str], where: str, seen: set[int]) -> list[str]:
        """What the names that a function uses mean in `mapping`, and in the modules that they name."""
        parts = []
        seen.add(id(mapping))
        for key in sorted(used & mapping.keys()):
            if key.startswith("__"):
                continue
            value = mapping[key]
            self._watch(mapping, key, mapping)
            if isinstance(value, types.ModuleType):
                parts.append(f"{key} module {value.__name__}")
                if id(vars(value)) not in seen:
                    parts += self._resolve(vars(value), used, where, seen)
            else:
                parts.append(f"{key} {self._token(value, f'{where} uses {key}')}")
        return parts

    def _watch(self, mapping: Any, name: str, owner: Any) -> None:
        self._looked_up.setdefault(id(owner), (mapping, set()))[1].add(name)

    def is_trusted_class(self, cls: type) -> bool:
        module = sys.modules.get(cls.__module__)
        file = getattr(module, "__file__", None)
        return file is None and cls.__module__ != "__main__" or file is not None and file.startswith(self._trusted)


@functools.lru_cache(maxsize=None)
def names_of(code: types.CodeType) -> frozenset[str]:
    """Every global and attribute that a function and the functions inside it use."""
    inner = [names_of(const) for const in code.co_consts if isinstance(const, types.CodeType)]
    return frozenset(code.co_names).union(*inner)


@functools.lru_cache(maxsize=None)
def code_digest(code: types.CodeType) -> str:
    """SHA-256 of what a function does, without where it stands."""
    consts = [_const(const) for const in code.co_consts]
    parts = (code.co_code.hex(), repr(consts), repr(code.co_names), repr(code.co_varnames), repr(code.co_freevars), repr(code.co_cellvars))
    flags = (code.co_argcount, code.co_kwonlyargcount, code.co_posonlyargcount, code.co_flags, getattr(code, "co_exceptiontable", b""))
    return hashlib.sha256(repr((parts, flags)).encode()).hexdigest()


def codes_of(value: Any, depth: int = 4) -> Iterator[types.CodeType]:
    """The code of a method, and of what decorators wrapped."""
    function = _function_of(value)
    code = getattr(function, "__code__", None)
    if isinstance(code, types.CodeType):
        yield code
    if depth:
        for cell in getattr(function, "__closure__", None) or ():
            yield from codes_of(_cell(cell), depth - 1)


def _const(const: Any) -> str:
    if isinstance(const, types.CodeType):
        return code_digest(const)
    if isinstance(const, frozenset):
        return f"frozenset {sorted(map(repr, const))}"
    return f"{type(const).__name__} {const!r}"


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _function_of(value: Any) -> Any:
    value = getattr(value, "fget", value) if isinstance(value, property) else value
    return getattr(value, "__func__", value)


def getter(keys: Sequence[Any]) -> Callable[[Any], Any]:
    """Takes the entries of these keys out of a dict, as a tuple."""
    if len(keys) == 1:
        return itemgetter(keys[0], keys[0])
    return itemgetter(*keys)


@functools.lru_cache(maxsize=None)
def _trusted_folders() -> tuple[str, ...]:
    site = {os.path.dirname(os.path.dirname(sys.modules[name].__file__ or "")) for name in ("torch", "numpy")}
    packages = [os.path.join(folder, *name.split("/"), "") for folder in sorted(site) for name in _KNOWN_BY_VERSION]
    standard = {sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib")}
    # The standard library's folder may hold site-packages: those are nobody we know.
    parts = [f"{folder}{os.sep}{part}" for folder in sorted(standard) for part in _standard_parts(folder)]
    return (*packages, *parts, "<frozen ")


@functools.lru_cache(maxsize=None)
def _standard_parts(folder: str) -> tuple[str, ...]:
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return tuple(f"{n}" if n.endswith(".py") else f"{n}{os.sep}" for n in sorted(names) if n not in ("site-packages", "dist-packages"))
