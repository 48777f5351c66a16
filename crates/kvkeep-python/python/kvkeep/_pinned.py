"""The cache's memory as a GPU copies from and to it: registered with the driver, piece by piece, by a thread of its own.

Invariant: `until` grows only when the bytes before it are registered, and what is registered stays the same memory until
`release` (`Ram.keep_until`). All of it is registered in the first seconds, as far as the machine has the memory. As much as is in use, and
a little more, was the alternative: then there was always a piece to register after a store, and the next request's kernels waited for
the driver.

What is not registered yet, or may not be, goes through a ring of pinned buffers; where there are none either, past them.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from kvkeep._kvkeep import Ram

_log = logging.getLogger("kvkeep.gpu")

PIECE_BYTES = 16 << 20
"""Registered at once: some 1.3 ms, in which the driver begins nothing else."""

PAUSE = 1
"""Between two pieces, so many times what one took."""

LEFT_FREE = 0.1
"""Of the machine's memory, what registering leaves free: what is registered cannot be swapped out."""

SLOT_BYTES, SLOTS = 16 << 20, 4
"""The ring: copies of this size are as fast as longer ones, and 4 keep both sides busy."""


class Runtime(Protocol):
    """What is needed of CUDA, through torch; the tests have another one."""

    def owns(self, tensor: Any) -> bool: ...
    def lanes(self, device: Any) -> tuple[Any, ...]: ...
    def current(self, device: Any) -> Any: ...
    def on(self, stream: Any) -> AbstractContextManager[Any]: ...
    def event(self) -> Any: ...
    def register(self, address: int, size: int) -> None: ...
    def unregister(self, address: int) -> None: ...
    def buffer(self, size: int) -> torch.Tensor: ...


class Pinned:
    """The memory of one cache. `tensor` shows all of it as bytes."""

    def __init__(self, ram: Ram, runtime: Runtime) -> None:
        import torch

        self.address, self.capacity = ram.address, ram.capacity_bytes
        memory = (ctypes.c_uint8 * self.capacity).from_address(self.address)
        self.tensor = torch.frombuffer(memory, dtype=torch.uint8)
        self.until = 0
        """So many bytes are registered, from the beginning on."""
        self.refused: str | None = None
        """Why no more are registered."""
        self._ram, self._runtime, self._pid = ram, runtime, os.getpid()
        self._registered, self._ended, self._hurry = 0, False, threading.Event()
        self._thread = threading.Thread(target=self._register, name="kvkeep-pin", daemon=True)

    def begin(self) -> None:
        """Begins to register, in the background."""
        self._thread.start()

    def wait(self) -> None:
        """Until all is registered or refused, without pauses."""
        self._hurry.set()
        self._thread.join()

    def parts(self, offset: int, size: int) -> Iterator[tuple[int, int, int]]:
        """A range in the parts that one copy may take: what is registered apart must be copied apart. Where each is in the
        range, where it is in the memory, its size."""
        at, end = offset, offset + size
        while at < end:
            step = min(end, at - at % PIECE_BYTES + PIECE_BYTES)
            yield at - offset, at, step - at
            at = step

    def stop(self) -> bool:
        """From now on nothing counts as registered. False in a child, which has neither the thread nor the driver."""
        if os.getpid() != self._pid:
            return False
        self._ended = True
        self.wait()
        self._registered, self.until = self.until, 0
        return True

    def release(self) -> None:
        """Forgets all, after `stop`. Nothing may be copying from or to this memory any more."""
        for start in range(0, self._registered, PIECE_BYTES):
            self._runtime.unregister(self.address + start)
        self._registered = 0
        self._ram.keep_until(0)

    def _register(self) -> None:
        while not self._ended and self.until < self.capacity:
            size, begin = min(PIECE_BYTES, self.capacity - self.until), time.monotonic()
            try:
                if not _has_room(size):
                    raise RuntimeError("the machine has too little memory left")
                self._ram.keep_until(self.until + size)
                self._runtime.register(self.address + self.until, size)
            except Exception as error:
                self._ram.keep_until(self.until)
                self.refused = str(error)
                _log.warning(
                    "%d MiB of the cache's memory are pinned, and no more: %s. The rest is copied through buffers, slower.",
                    self.until >> 20, error,
                )  # fmt: skip
                return
            self.until += size
            self._hurry.wait(PAUSE * (time.monotonic() - begin))


class Ring:
    """Pinned buffers on the way between a GPU and memory that is not registered. One thread at a time."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime, self._lock = runtime, threading.Lock()
        self._slots: deque[tuple[Any, torch.Tensor]] | None = None

    def to_gpu(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copies bytes to the GPU, on the stream that is current. When this returns, `source` has been read."""
        with self._lock:
            slots = self._made()
            if not slots:
                target.copy_(source)
                return
            for start in range(0, source.numel(), SLOT_BYTES):
                with self._free(slots) as slot:
                    part = source[start : start + SLOT_BYTES]
                    slot[: part.numel()].copy_(part)
                    target[start : start + SLOT_BYTES].copy_(slot[: part.numel()], non_blocking=True)

    def from_gpu(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copies bytes from the GPU, on the stream that is current. When this returns, they are there."""
        busy: deque[tuple[Any, torch.Tensor, torch.Tensor]] = deque()
        with self._lock:
            slots = self._made()
            if not slots:
                target.copy_(source)
                return
            for start in range(0, source.numel(), SLOT_BYTES):
                if len(busy) == SLOTS:
                    _arrived(*busy.popleft())
                with self._free(slots) as slot:
                    part = source[start : start + SLOT_BYTES]
                    slot[: part.numel()].copy_(part, non_blocking=True)
                busy.append((slots[-1][0], slot, target[start : start + SLOT_BYTES]))
            while busy:
                _arrived(*busy.popleft())

    def _made(self) -> deque[tuple[Any, torch.Tensor]]:
        """The slots, the one that was used longest ago first, each with the end of its use; none where pinned memory is
        refused."""
        if self._slots is None:
            try:
                self._slots = deque((None, self._runtime.buffer(SLOT_BYTES)) for _ in range(SLOTS))
            except RuntimeError as error:
                self._slots = deque()
                _log.warning("no pinned memory (%s): copies from and to the GPU are slow", error)
        return self._slots

    @contextmanager
    def _free(self, slots: deque[tuple[Any, torch.Tensor]]) -> Iterator[torch.Tensor]:
        """The slot that was used longest ago, once that use has ended. What is queued meanwhile is its next use."""
        event, slot = slots.popleft()
        try:
            if event is not None:
                event.synchronize()
            yield slot
        finally:
            slots.append((self._recorded(), slot))

    def _recorded(self) -> Any:
        event = self._runtime.event()
        event.record()
        return event


def _arrived(event: Any, slot: torch.Tensor, target: torch.Tensor) -> None:
    event.synchronize()
    target.copy_(slot[: target.numel()])


def _has_room(size: int, read: Callable[[], str] = lambda: Path("/proc/meminfo").read_text()) -> bool:
    """Would registering so much leave the machine enough? Yes where it does not say."""
    try:
        known = dict(line.split(":", 1) for line in read().splitlines() if ":" in line)
        total, available = (int(known[name].split()[0]) << 10 for name in ("MemTotal", "MemAvailable"))
    except (OSError, ValueError, KeyError, IndexError):
        return True
    return available - size >= LEFT_FREE * total
