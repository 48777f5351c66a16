"""Tensors of numpy and torch as the extension takes them. Arrays of numpy it asks itself.

Torch is never imported from here unless a tensor of it was given.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from kvkeep._errors import UnsupportedTensorError
from kvkeep._kvkeep import DTYPES

if TYPE_CHECKING:
    import torch

    Tensor: TypeAlias = np.ndarray[Any, Any] | torch.Tensor

_CODES: Mapping[str, int] = {name: code for code, name in enumerate(DTYPES)}
"""kvkeep's dtype names to their codes."""

_NAMES: Mapping[str, str] = {
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "float8_e4m3fn": "f8e4m3",
    "float8_e5m2": "f8e5m2",
    "int8": "i8",
    "uint8": "u8",
    "float64": "f64",
    "int16": "i16",
    "int32": "i32",
    "int64": "i64",
}
"""What numpy (with ml_dtypes) and torch call them."""

_FULL_NAMES: Mapping[str, str] = {short: name for name, short in _NAMES.items()}

# Filled as dtypes are met: a look-up by dtype object is all that a call pays.
_torch_codes: dict[Any, int] = {}


def is_torch(tensor: object) -> bool:
    """Is it a torch tensor? Does not import torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(tensor, torch.Tensor)


def dtype_code(dtype: object) -> int:
    """The code of a dtype: kvkeep's, numpy's or torch's name for it, or numpy's or torch's object.

    Raises `UnsupportedTensorError`.
    """
    name = dtype if isinstance(dtype, str) else getattr(dtype, "name", None) or str(dtype)
    name = name.removeprefix("torch.")
    if name not in _NAMES and name not in _CODES:
        try:
            name = np.dtype(dtype).name  # type: ignore[call-overload]
        except TypeError:
            pass
    code = _CODES.get(_NAMES.get(name, name))
    if code is None:
        known = ", ".join(_NAMES)
        raise UnsupportedTensorError(f"dtype {name} is not kept: convert it to one of {known}")
    return code


def needed(module: str, what: str) -> Any:
    """A module that only some of the package needs.

    Raises `ImportError` that says how to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{what} needs {module}, which is not installed: pip install {module}", name=module) from error


def torch_dtype(name: str) -> torch.dtype:
    """Torch's dtype for kvkeep's name."""
    import torch

    dtype: torch.dtype = getattr(torch, _FULL_NAMES[name])
    return dtype


def numpy_dtype(code: int) -> np.dtype[Any]:
    """numpy's dtype for a code; bfloat16 and float8 need `ml_dtypes`."""
    name = _FULL_NAMES[DTYPES[code]]
    if name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        dtype: np.dtype[Any] = np.dtype(getattr(needed("ml_dtypes", f"{name} in numpy"), name))
        return dtype
    return np.dtype(name)


def lend_torch(tensor: Any, write: bool, new: bool) -> tuple[int, int, tuple[int, ...], object]:
    """Address, dtype code, shape, and the storage that owns the memory: of the tensor itself or, to be read, of a
    contiguous copy on the CPU. While the storage is held the memory stays where it is, whatever becomes of the tensor:
    it is no longer resizable, as after `Tensor.numpy`, unless nobody else has it (`new`, or a copy).

    Raises `UnsupportedTensorError` for anything else, and for what cannot be read, or written in place.
    """
    if not is_torch(tensor):
        raise UnsupportedTensorError(f"a {type(tensor).__name__} is no tensor: give a torch tensor or a numpy array")
    code = _torch_codes.get(tensor.dtype)
    if code is None:
        code = _torch_code(tensor)
    if tensor.layout is not _torch().strided:
        raise UnsupportedTensorError(f"a tensor of layout {tensor.layout} is not kept: make it dense with to_dense()")
    if tensor.device.type == "meta":
        raise UnsupportedTensorError(
            "a tensor on the device meta has no data: it is offloaded or was never loaded; give one that is on the "
            "CPU or a GPU"
        )
    if write:
        _check_writable(tensor)
    elif tensor.device.type != "cpu" or tensor.is_neg() or tensor.is_conj() or not tensor.is_contiguous():
        tensor, new = tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous(), True
    try:
        storage = tensor.untyped_storage()
        if not new and storage.resizable():
            # The way to say so that torch has: a numpy array over the storage, here of no elements.
            _torch().empty(0, dtype=_torch().uint8).set_(storage, 0, (0,)).numpy()
        offset, shape = tensor.storage_offset() * tensor.itemsize, tuple(tensor.shape)
        address, elements = storage.data_ptr() + offset, math.prod(shape)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        raise UnsupportedTensorError(
            f"a {type(tensor).__name__} without plain memory is not kept: give a plain tensor ({error})"
        ) from error
    # A part without elements may begin anywhere.
    if elements and offset + elements * tensor.itemsize > storage.nbytes():
        raise UnsupportedTensorError("the tensor's memory was taken away: its storage is smaller than its shape says")
    return address, code, shape, storage


def _check_writable(tensor: Any) -> None:
    """Raises `UnsupportedTensorError` for a tensor that cannot be written in place."""
    if tensor.device.type != "cpu":
        problem = f"on the CPU, and this one is on {tensor.device}: load into one there and copy it over"
    elif not tensor.is_contiguous() or tensor.is_neg() or tensor.is_conj():
        problem = "contiguous: load into one of its own and copy from there"
    elif tensor.requires_grad:
        problem = "free of gradients, which writing would make wrong: give tensor.detach()"
    else:
        return
    raise UnsupportedTensorError(f"a tensor to be written must be {problem}")


def _torch_code(tensor: Any) -> int:
    if tensor.is_quantized:
        raise UnsupportedTensorError(f"a quantised tensor ({tensor.dtype}) is not kept: give tensor.dequantize()")
    code = _torch_codes[tensor.dtype] = dtype_code(tensor.dtype)
    return code


def _torch() -> Any:
    return sys.modules["torch"]
