"""Tensors of numpy and torch as the extension takes them: address, dtype code, shape.

Torch is never imported from here unless a tensor of it was given.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from kvkeep._errors import UnsupportedTensorError
from kvkeep._kvkeep import DTYPES

if TYPE_CHECKING:
    import torch

    Tensor: TypeAlias = np.ndarray[Any, Any] | torch.Tensor

RawTensor: TypeAlias = tuple[int, int, tuple[int, ...]]

NUMPY, TORCH = 0, 1

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
_numpy_codes: dict[Any, int] = {}
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


def torch_dtype(name: str) -> torch.dtype:
    """Torch's dtype for kvkeep's name."""
    import torch

    dtype: torch.dtype = getattr(torch, _FULL_NAMES[name])
    return dtype


def numpy_dtype(code: int) -> np.dtype[Any]:
    """numpy's dtype for a code; bfloat16 and float8 need `ml_dtypes`."""
    name = _FULL_NAMES[DTYPES[code]]
    if name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        import ml_dtypes

        dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
        return dtype
    return np.dtype(name)


def lend(tensor: Tensor) -> tuple[int, RawTensor, object]:
    """Kind, raw form, and what must stay alive while the raw form is used: the tensor itself,
    or a contiguous copy on the CPU.

    Raises `UnsupportedTensorError`.
    """
    if is_torch(tensor):
        return TORCH, *_lend_torch(tensor)
    if isinstance(tensor, np.ndarray):
        array = np.ascontiguousarray(tensor) if tensor.ndim else tensor
        return NUMPY, (array.ctypes.data, _numpy_code(array), array.shape), array
    raise UnsupportedTensorError(f"a {type(tensor).__name__} is no tensor: give a torch tensor or a numpy array")


def lend_to_write(tensor: Tensor) -> RawTensor:
    """The raw form of a tensor that is to be written, in place.

    Raises `UnsupportedTensorError` if it is not contiguous, not on the CPU or read-only.
    """
    if is_torch(tensor):
        if tensor.device.type != "cpu" or not tensor.is_contiguous():  # type: ignore[union-attr]
            raise UnsupportedTensorError("a tensor to be written must be contiguous and on the CPU")
        return _lend_torch(tensor)[0]
    if not isinstance(tensor, np.ndarray):
        raise UnsupportedTensorError(f"a {type(tensor).__name__} is no tensor: give a torch tensor or a numpy array")
    if not tensor.flags.c_contiguous or not tensor.flags.writeable:
        raise UnsupportedTensorError("an array to be written must be contiguous and writeable")
    return tensor.ctypes.data, _numpy_code(tensor), tensor.shape


def _lend_torch(tensor: Any) -> tuple[RawTensor, object]:
    code = _torch_codes.get(tensor.dtype)
    if code is None:
        code = _torch_codes[tensor.dtype] = dtype_code(tensor.dtype)
    if tensor.layout is not sys.modules["torch"].strided:
        raise UnsupportedTensorError(f"a tensor of layout {tensor.layout} is not kept: make it dense")
    if tensor.device.type != "cpu" or tensor.is_neg() or tensor.is_conj() or not tensor.is_contiguous():
        tensor = tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
    return (tensor.data_ptr(), code, tuple(tensor.shape)), tensor


def _numpy_code(array: np.ndarray[Any, Any]) -> int:
    code = _numpy_codes.get(array.dtype)
    if code is None:
        if not array.dtype.isnative:
            raise UnsupportedTensorError("a byte-swapped array is not kept: convert it to native byte order")
        code = _numpy_codes[array.dtype] = dtype_code(array.dtype)
    return code
