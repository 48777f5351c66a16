"""The rows of kvkeep's memory as vLLM's workers copy from and to them: mapped, and registered with the driver, piece by piece.

The scheduler's process owns the memory; its workers, in the same process or in others of the same user, map the file that it is. It is made after the
workers, so they look for it when they are first given something to copy, or a thread of theirs does that has begun to wait for it.

Invariant: a row is copied only once its piece is registered, or registering is refused for good: then all rows are copied as pageable memory. A piece
is whole rows, so no copy crosses from one into the next. To register everything before vLLM starts was the alternative: 24 GiB take seconds.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from vllm.v1.kv_offload.base import OffloadingWorker

_log = logging.getLogger(__name__)

PIECE_BYTES = 16 << 20
"""Registered at once: some 1.3 ms, in which the driver begins nothing else. A row may be longer."""

_POPULATE_WRITE = 23
"""Brings memory behind pages as if they were written, and changes no byte. Without it the driver does that while it registers, ten times as long."""

_WAIT_SECONDS = 60.0


def _place(root: Path, engine_id: str) -> Path:
    return root / ("memory-" + "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in engine_id))


def publish(root: Path, engine_id: str, descriptor: int, rows: int) -> Path:
    """Says where the memory is, in the engine's folder, which is this user's alone. Removes what engines left there that were killed."""
    for left in root.glob("memory-*"):
        if not _lives(left):
            left.unlink(missing_ok=True)
    place = _place(root, engine_id)
    new = place.with_suffix(f".{os.getpid()}")
    new.write_text(f"{os.getpid()} {descriptor} {rows}")
    os.replace(new, place)
    return place


def _lives(place: Path) -> bool:
    try:
        return Path("/proc", place.read_text().split()[0]).exists()
    except (OSError, IndexError):
        return False


def find(root: Path, engine_id: str, rows: int, is_over: Callable[[], bool]) -> int:
    """A descriptor of the memory. Raises RuntimeError if it does not come, or is another engine's."""
    place, end = _place(root, engine_id), time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            process, descriptor, theirs = (int(word) for word in place.read_text().split())
            if theirs == rows:
                return os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
            problem: Exception | None = RuntimeError(f"it has {theirs} rows, and {rows} are wanted")
        except (OSError, ValueError) as error:
            problem = error
        if is_over() or time.monotonic() > end:
            raise RuntimeError(f"kvkeep: the scheduler's memory was not found at {place}: {problem}")
        time.sleep(0.02)


class Rows:
    """All rows, with the part that one worker's KV has in each. Has what vLLM's worker asks of its own shared region."""

    def __init__(self, descriptor: int, rows: int, row_bytes: int, rank: int, worker_bytes: int) -> None:
        self.num_chunks = self.num_blocks = rows
        self.page_size, self._row_stride, self.cpu_page_size, self.rank = mmap.PAGESIZE, row_bytes, worker_bytes, rank
        try:  # the descriptor is ours from here on
            self._memory = mmap.mmap(descriptor, rows * row_bytes)
        finally:
            os.close(descriptor)
        self._base: torch.Tensor | None = torch.frombuffer(memoryview(self._memory), dtype=torch.int8)
        self.address = self._base.data_ptr()
        self._next, self._end = rank * worker_bytes, (rank + 1) * worker_bytes
        self._is_canonical = False
        self.total_size_bytes, self.is_pinned, self.pinned_addresses = rows * row_bytes, False, list[int]()

    @property
    def row_bytes(self) -> int:
        return self._row_stride

    def create_next_worker_view(self, tensor_page_size: int) -> torch.Tensor:
        """This worker's part of the next tensor of KV: [rows, bytes]."""
        assert self._base is not None
        if self._next + tensor_page_size > self._end:
            raise RuntimeError("kvkeep: this worker's KV is larger than its part of a row")
        size, stride = (self.num_chunks, tensor_page_size), (self._row_stride, 1)
        view = torch.as_strided(self._base, size, stride, self._next)
        self._next += tensor_page_size
        return view

    create_next_view = create_next_worker_view

    def create_next_canonical_view(self, tensor_page_size: int) -> torch.Tensor:
        """The next tensor's part of a row, which all workers share."""
        self._next, self._end = (0, self._row_stride) if not self._is_canonical else (self._next, self._end)
        self._is_canonical = True
        return self.create_next_worker_view(tensor_page_size)

    def cleanup(self) -> None:
        # The mapping goes with this, and with the last view of it: closing it under one would end the process at the next look.
        self._base = None


class Registered:
    """Which pieces of the rows the driver knows."""

    def __init__(self, rows: Rows, register: Callable[[int, int], None], unregister: Callable[[int], None]) -> None:
        self._rows, self._register, self._unregister = rows, register, unregister
        self._per_piece = max(1, PIECE_BYTES // rows.row_bytes)
        self._pieces = -(-rows.num_chunks // self._per_piece)
        self._done: set[int] = set()
        self._refused = False
        self._lock = threading.Lock()
        self._ended = False
        self._thread = threading.Thread(target=self._all, name="kvkeep-pin", daemon=True)
        self._thread.start()

    def need(self, rows: Iterable[int]) -> None:
        """These rows are about to be copied."""
        for piece in sorted({int(row) // self._per_piece for row in rows} - self._done):
            _populate(*self._at(piece))
            self._piece(piece)

    def release(self) -> None:
        """Nothing is copied any more."""
        self._ended = True
        self._thread.join()
        with self._lock:
            for piece in self._done:
                self._unregister(self._at(piece)[0])
            self._done = set()

    def _all(self) -> None:
        for piece in range(self._pieces):
            if self._ended or self._refused:
                return
            _populate(*self._at(piece))
            began = time.monotonic()
            self._piece(piece)
            # As long again for whoever else wants something of the driver.
            time.sleep(time.monotonic() - began)

    def _piece(self, piece: int) -> None:
        with self._lock:
            if piece in self._done or self._refused or self._ended:
                return
            address, size = self._at(piece)
            try:
                self._register(address, size)
            except RuntimeError as error:
                self._refused = True
                _log.warning("kvkeep: %d MiB of RAM are pinned, and no more (%s): the rest is copied slower", len(self._done) * size >> 20, error)
                return
            self._done.add(piece)

    def _at(self, piece: int) -> tuple[int, int]:
        first = piece * self._per_piece
        rows = min(self._per_piece, self._rows.num_chunks - first)
        return self._rows.address + first * self._rows.row_bytes, rows * self._rows.row_bytes


def _populate(address: int, size: int) -> None:
    """Where it is not possible, whoever touches a page first brings it. By `ctypes`, which lets other threads run meanwhile."""
    ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), _POPULATE_WRITE)


class RowsWorker(OffloadingWorker):
    """A worker that is made once the rows are there. `make` gives it, and what is to be told of rows; it is given a function that says whether it is too late."""

    def __init__(self, make: Callable[[Callable[[], bool]], tuple[OffloadingWorker, Registered | None]]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._made: tuple[OffloadingWorker, Registered | None] | None = None
        self._ended = False
        # Registering begins before there is anything to copy.
        threading.Thread(target=self._ahead, name="kvkeep-rows", daemon=True).start()

    def _ahead(self) -> None:
        try:
            self._worker()
        except Exception as error:  # whoever copies first says so
            _log.warning("%s", error)

    def _worker(self) -> tuple[OffloadingWorker, Registered | None]:
        with self._lock:
            if self._made is None:
                if self._ended:
                    raise RuntimeError("kvkeep: this worker has ended")
                self._made = self._make(lambda: self._ended)
            return self._made

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        worker, registered = self._worker()
        if registered is not None:
            registered.need(dst_spec.block_ids)
        return bool(worker.submit_store(job_id, src_spec, dst_spec))

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any, **more: Any) -> bool:
        worker, registered = self._worker()
        if registered is not None:
            registered.need(src_spec.block_ids)
        return bool(worker.submit_load(job_id, src_spec, dst_spec, **more))

    def wait_layer(self, layer: int) -> None:
        """For a worker whose loads can be waited for by layer."""
        if self._made is not None:
            self._made[0].wait_layer(layer)

    def wait_all(self) -> None:
        if self._made is not None:
            self._made[0].wait_all()

    def get_finished(self) -> list[Any]:
        return self._made[0].get_finished() if self._made is not None else []

    def wait(self, job_ids: set[int]) -> None:
        if self._made is not None:
            self._made[0].wait(job_ids)

    def shutdown(self) -> None:
        self._ended = True
        with self._lock:
            made, self._made = self._made, None
        if made is None:
            return
        worker, registered = made
        worker.shutdown()
        if registered is not None:
            registered.release()
