"""Reads and writes pages, in records of one size, through memory of its own, and is done by a deadline.

Invariant: the engine's memory is touched only by the thread that calls, while its call lasts. A read that the kernel has begun cannot be called
back; one that ends late ends in memory of ours, and its engine has its pages back. To read straight into the engine's pages was the alternative:
it saves a copy, which takes a tenth of the time that a disk takes, and goes on beside it.

A page of more than one record is there if all of its records are. One file of records for each pool was the alternative: then each had to have a
part of the cap of its own, and no pool could use what another leaves.
"""

from __future__ import annotations

import ctypes
import operator
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvkeep import _kvkeep
from kvkeep.sglang._pages import Page, Piece
from kvkeep.sglang._settings import Settings

_PAGE_BYTES = 4096
_RECORD_AT_MOST = 4 << 20
_PARTS_AT_MOST = 16
_POLL_SECONDS, _POLL_SECONDS_AT_MOST = 0.0002, 0.002


def record_bytes(page_bytes: Sequence[int]) -> int:
    """For pools with pages of these sizes: the largest record of those that waste little."""
    sizes: set[int] = set()
    for size in page_bytes:
        least = _up(size, _RECORD_AT_MOST)
        sizes.update(_PAGE_BYTES * _up(_up(size, parts), _PAGE_BYTES) for parts in range(least, least + _PARTS_AT_MOST))
    taken = {size: sum(size * _up(page, size) for page in page_bytes) for size in sizes}
    return max(size for size in sizes if taken[size] <= 1.125 * min(taken.values()))


def _up(whole: int, part: int) -> int:
    """How many parts it takes."""
    return -(-whole // part)


@dataclass
class _Job:
    page: int
    row: int
    pieces: list[Piece]


@dataclass
class _Call:
    """What one caller has asked for."""

    waiting: deque[tuple[int, bytes, list[Piece]]]
    left: list[int]
    """Of each page: records that have not come."""
    begin_until: float
    missed: bool = False
    pause: float = _POLL_SECONDS
    active: dict[int, _Job] = field(default_factory=dict)


class Pager:
    """Records of one process. Callers may be several threads."""

    def __init__(self, folder: str, record: int, namespace: Any, settings: Settings, measured: Callable[[str, int, float], None]) -> None:
        self.record_bytes, self._measured = record, measured
        each = max(2, min(1024, settings.buffer_bytes // record))
        self._rows = np.zeros((2 * each, record), np.uint8)
        # A job is begun in the first half of a call's time, and has the other half to end in.
        times = (settings.load_timeout_s / 2, settings.store_timeout_s / 2, settings.flush_timeout_s)
        behind = settings.behind(folder, settings.queue_bytes)
        self._engine = _kvkeep.EngineTier(self._rows, namespace, behind, times, False)
        self._ask_seconds = settings.ask_seconds
        self._times = {"load": times[0], "store": times[1]}
        self._ttl_s = settings.ttl_s
        self._lock = threading.Lock()
        # Apart: a disk that writes nothing holds up no read.
        self._free = {"load": list(range(each)), "store": list(range(each, 2 * each))}
        self._ended: dict[int, bool] = {}
        self._probes: dict[int, str] = {}
        self._numbers = 0

    def has(self, pages: Sequence[tuple[bytes, int]]) -> list[bool]:
        """Of pages by name and size: which are there? Asks memory alone, and the daemon. A store over a network that has to be asked is
        waited for."""
        names, until = self._names(pages), time.monotonic() + self._ask_seconds
        while None in (places := self._engine.places(names)) and self._engine.is_asking() and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)
        there = iter(places)
        # Not `all` of a generator: it would leave the rest of a page's answers to the next one.
        return [all([next(there) is not None for _ in range(self._count(size))]) for _, size in pages]

    def sizes(self, pages: Sequence[tuple[bytes, int]]) -> dict[str, int]:
        """How many bytes of these pages each tier would be read for."""
        sizes: dict[str, int] = {}
        parts = (min(self.record_bytes, size - at * self.record_bytes) for _, size in pages for at in range(self._count(size)))
        for place, part in zip(self._engine.places(self._names(pages)), parts):
            if place is not None:
                sizes[place] = sizes.get(place, 0) + part
        return sizes

    def touch(self, pages: Sequence[tuple[bytes, int]]) -> None:
        """These are in use."""
        self._engine.touch(self._names(pages))

    def read(self, pages: Sequence[Page]) -> list[bool]:
        """Reads pages in order until one is missing. What did not come whole has not been asked for, or holds nonsense."""
        return self._run("load", pages, [True] * len(pages))

    def write(self, pages: Sequence[Page]) -> list[bool]:
        """Writes pages, in order until one is not taken: which can be read now? What is there already is not written again."""
        until = time.monotonic() + 2 * self._times["store"]
        names = [(page.name, sum(size for _, size in page.pieces)) for page in pages]
        there = self.has(names)
        taken = self._run("store", pages, [not is_there for is_there in there])
        # They are written behind. What is said to be stored is found from then on, so that is waited for.
        while not all(there := self.has(names)) and any(map(operator.gt, taken, there)) and time.monotonic() < until:
            if not any(tier["queued_bytes"] for tier in self._engine.stats()["tiers"].values()):
                return self.has(names)  # dropped, or evicted already
            time.sleep(_POLL_SECONDS_AT_MOST)
        return there

    def _run(self, kind: str, pages: Sequence[Page], wanted: list[bool]) -> list[bool]:
        records = [self._records(page) if is_wanted else [] for page, is_wanted in zip(pages, wanted)]
        waiting = deque((at, name, pieces) for at, of_page in enumerate(records) for name, pieces in of_page)
        call = _Call(waiting, [len(of_page) for of_page in records], time.monotonic() + self._times[kind])
        try:
            while self._begin_some(kind, call) or call.active:
                self._wait(kind, call)
        finally:
            # One that was broken off leaves no job behind: each ends by its deadline.
            while call.active:
                self._wait(kind, call)
        return [not left for left in call.left]

    def _wait(self, kind: str, call: _Call) -> None:
        if self._take_ended(kind, call):
            call.pause = _POLL_SECONDS
            return
        time.sleep(call.pause)
        call.pause = min(1.5 * call.pause, _POLL_SECONDS_AT_MOST)

    def _begin_some(self, kind: str, call: _Call) -> bool:
        """Begins what there are rows for; says whether there is more to begin."""
        while call.waiting and not call.missed and time.monotonic() < call.begin_until:
            with self._lock:
                if not self._free[kind]:
                    return True
                row = self._free[kind].pop()
                self._numbers += 1
                number = self._numbers
            page, name, pieces = call.waiting.popleft()
            self._begin(kind, number, row, name, pieces)
            call.active[number] = _Job(page, row, pieces)
        return False

    def _begin(self, kind: str, number: int, row: int, name: bytes, pieces: list[Piece]) -> None:
        try:
            if kind == "load":
                self._engine.load(number, [name], [row])
            else:
                self._copy(row, pieces, out=False)
                self._engine.store(number, [name], [row], self._ttl_s)
        except BaseException:
            with self._lock:
                self._free[kind].append(row)
            raise

    def _take_ended(self, kind: str, call: _Call) -> bool:
        """Puts what has come where it belongs; says whether anything has ended."""
        with self._lock:
            self._collect()
            mine = [(number, self._ended.pop(number)) for number in list(call.active) if number in self._ended]
        for number, came in mine:
            job = call.active.pop(number)
            if came and kind == "load":
                self._copy(job.row, job.pieces, out=True)
            call.left[job.page] -= came
            call.missed = call.missed or not came
            with self._lock:
                self._free[kind].append(job.row)
        return bool(mine)

    def _collect(self) -> None:
        for number, kind, done, blocks, seconds in self._engine.ended():
            if kind == "probe":
                tier = self._probes.pop(number, None)
                if tier is not None and len(done) == blocks:
                    self._measured(tier, blocks * self.record_bytes, seconds)
            else:
                self._ended[number] = bool(done)

    def probe(self, pages: Sequence[tuple[bytes, int]]) -> None:
        """Begins to read what of these is where the first one is into nowhere, to see how fast that is."""
        names = self._names(pages)
        places = self._engine.places(names)
        if place := next(filter(None, places), None):
            with self._lock:
                self._numbers += 1
                self._probes[self._numbers] = place
                self._engine.probe(self._numbers, [name for name, other in zip(names, places) if other == place])

    def take_probes(self) -> None:
        """Looks at what probes have measured."""
        with self._lock:
            self._collect()

    def _names(self, pages: Sequence[tuple[bytes, int]]) -> list[bytes]:
        return [_record_name(name, at) for name, size in pages for at in range(self._count(size))]

    def _count(self, size: int) -> int:
        return _up(size, self.record_bytes)

    def _records(self, page: Page) -> list[tuple[bytes, list[Piece]]]:
        """A page's memory, cut into records."""
        records: list[list[Piece]] = [[]]
        room = self.record_bytes
        for address, size in page.pieces:
            while size:
                if not room:
                    records.append([])
                    room = self.record_bytes
                part = min(size, room)
                records[-1].append((address, part))
                address, size, room = address + part, size - part, room - part
        return [(_record_name(page.name, at), pieces) for at, pieces in enumerate(records)]

    def _copy(self, row: int, pieces: Sequence[Piece], out: bool) -> None:
        """Between a row and the engine's memory. The interpreter's lock is not held meanwhile."""
        at = start = self._rows.ctypes.data + row * self.record_bytes
        for address, size in pieces:
            if out:
                ctypes.memmove(address, at, size)
            else:
                ctypes.memmove(at, address, size)
            at += size
        if not out:
            # Nothing of the page that was here before.
            self._rows[row, at - start :] = 0

    def clear(self) -> None:
        """All that this namespace has is gone, for everybody who shares it."""
        self._engine.clear()

    def flush(self) -> None:
        self._engine.flush()

    def stats(self) -> dict[str, Any]:
        return self._engine.stats()

    def close(self) -> None:
        self._engine.close()


def _record_name(page: bytes, at: int) -> bytes:
    return page + at.to_bytes(4, "little")
