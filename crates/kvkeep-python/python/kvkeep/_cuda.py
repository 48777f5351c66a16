"""CUDA as the copies need it, through torch, which has its runtime: streams, events, and the registering of memory.

Calls of the driver by `ctypes` were the alternative: a second copy of the runtime, and of what its releases changed.
"""

from __future__ import annotations

import threading
from typing import Any


class Cuda:
    """CUDA, through torch."""

    def __init__(self) -> None:
        torch = _torch()
        self._device = torch.cuda.current_device()
        self._streams: dict[int, tuple[Any, ...]] = {}
        self._lock = threading.Lock()

    def owns(self, tensor: Any) -> bool:
        torch = _torch()
        return getattr(tensor, "is_cuda", False) and tensor.layout is torch.strided

    def lanes(self, device: Any) -> tuple[Any, ...]:
        torch = _torch()
        index = torch.cuda.current_device() if device.index is None else device.index
        with self._lock:
            if index not in self._streams:
                self._streams[index] = tuple(torch.cuda.Stream(index) for _ in range(2))
            return self._streams[index]

    def current(self, device: Any) -> Any:
        torch = _torch()
        return torch.cuda.current_stream(device)

    def on(self, stream: Any) -> Any:
        torch = _torch()
        return torch.cuda.stream(stream)

    def event(self) -> Any:
        torch = _torch()
        return torch.cuda.Event(enable_timing=True)

    def mark(self) -> Any:
        """A point in the stream that is current here."""
        torch = _torch()
        event = torch.cuda.Event()
        event.record()
        return event

    def wait(self, mark: Any) -> None:
        """What comes next in the stream that is current here comes after that point."""
        torch = _torch()
        torch.cuda.current_stream().wait_event(mark)

    def register(self, address: int, size: int) -> None:
        torch = _torch()
        portable = 1
        with torch.cuda.device(self._device):  # a thread of its own begins on the first one
            _checked(torch.cuda.cudart().cudaHostRegister(address, size, portable))

    def unregister(self, address: int) -> None:
        torch = _torch()
        _checked(torch.cuda.cudart().cudaHostUnregister(address))

    def buffer(self, size: int) -> Any:
        torch = _torch()
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def _torch() -> Any:
    """Without types: not all of `torch.cuda` has them."""
    import torch

    return torch


def _checked(code: Any) -> None:
    """Raises `RuntimeError` for an error of CUDA's."""
    import torch

    if int(code) != 0:
        raise RuntimeError(str(torch.cuda.CudaError(int(code))))
