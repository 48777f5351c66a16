"""Copies between tensors on a GPU and the cache's pages, which the GPU reads and writes itself.

Invariant: pages that a copy reads are held until it has ended; pages that one writes are sealed after it has ended; what is
stored is read behind the stream that made it, and what is loaded is waited for by the stream that asked. Pages that are not
registered with the driver go through pinned buffers (`_pinned`).

Two streams take turns, so that the bus does not wait between two copies. Blocks are put together and taken apart on the GPU,
whose memory is forty times faster than the bus: what crosses it are whole runs of blocks. One copy for each layer of each
block was the alternative: at 16 tokens a block that is a few KiB each.
"""

from __future__ import annotations

import math
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from typing import TYPE_CHECKING, Any, Protocol

from kvkeep._cuda import Cuda
from kvkeep._errors import ClosedError
from kvkeep._kvkeep import DTYPES
from kvkeep._pinned import Pinned, Ring, Runtime
from kvkeep._tensors import dtype_code, torch_dtype

if TYPE_CHECKING:
    import torch

    from kvkeep._kvkeep import Ram

    Pair = tuple[Any, Any]
    """K and V of a layer: tensors of torch."""
    Run = tuple[int, int, int]
    """First block, blocks, address of the first one: their pages lie behind each other."""
    Place = tuple[int, int, Sequence[int]]
    """Address, dtype code, shape."""
    Into = tuple[torch.device, Callable[[], Sequence[Pair]]]
    """A GPU, and what gives K and V of each layer there, or of all layers in one pair: the same ones each time."""
    Store = Callable[[tuple[Callable[[Any], None], Callable[[], None]]], Any]
    """Reserves pages, has them written by the first function, waits by the second, and seals them."""

SLOT_BYTES = 32 << 20
"""Blocks put together at once on the GPU, twice as much of its memory for each of two streams."""

_TOGETHER_BYTES, _WORTH_A_SLOT = 16 << 20, 4
"""Named tensors that cross the bus in one piece; fewer than so many are stored one by one."""

_PAGE_BYTES = 4096

_FIRST_GUESS, _RATE_FROM_BYTES = 20e9, 64 << 20
"""Bytes a second until something was measured; shorter copies say nothing of the bus."""


class Blocks(Protocol):
    """A namespace, as far as it says how a block is made up."""

    layers: int
    kv_heads: int
    k_head_dim: int
    v_head_dim: int
    block_tokens: int

    @property
    def order(self) -> str: ...
    @property
    def dtype(self) -> str: ...


class Gpu:
    """One cache and the GPUs that its tensors are on. Safe from many threads."""

    def __init__(self, ram: Ram, runtime: Runtime | None = None) -> None:
        self._runtime = Cuda() if runtime is None else runtime
        self.pinned = Pinned(ram, self._runtime)
        self._ring, self._copies = Ring(self._runtime), _Copies()
        self._end = weakref.finalize(self, _end, self.pinned, self._copies)
        self.pinned.begin()

    @property
    def bytes_per_s(self) -> float:
        """Of loads: as measured of late, or a first guess."""
        return self._copies.bytes_per_s

    def owns(self, tensors: Sequence[Any]) -> bool:
        """Are these all on one GPU?"""
        owns = self._runtime.owns
        return bool(tensors) and all(owns(tensor) and tensor.device == tensors[0].device for tensor in tensors)

    def close(self) -> None:
        """Waits for what is under way and forgets the memory. What comes later goes through buffers."""
        self._end()

    def store_named(self, store: Store, tensors: Sequence[Any]) -> Any:
        """Lets `store` store these tensors: it is given what writes them to their addresses, and what waits until they
        are there."""
        device = tensors[0].device
        lanes = self._runtime.lanes(device)[:1]

        def write(addresses: Sequence[tuple[int, int]]) -> None:
            import torch

            self._follow(lanes, device)
            flat = [address for pair in addresses for address in pair]
            places = ((address, tensor.dtype, tensor.shape) for address, tensor in zip(flat, tensors, strict=True))
            with torch.no_grad(), self._runtime.on(lanes[0]):
                for group in _groups(places):
                    of = [tensor.resolve_neg() for tensor in tensors[group.of]]
                    if group.count >= _WORTH_A_SLOT and group.is_dense:
                        slot = torch.empty(group.size, dtype=torch.uint8, device=device)
                        torch._foreach_copy_(group.tensors(slot), of)
                        self._from_gpu(group.address, slot)
                        continue
                    for number, tensor in enumerate(of):
                        self._from_gpu(group.address + number * group.stride, _flat(tensor.contiguous()))

        return self._stored(store, write, lanes)

    def store_blocks(self, store: Store, blocks: Blocks, layers: Sequence[Pair], first_token: int) -> Any:
        """As `store_named`, of blocks of layers that begin at `first_token`."""
        import torch

        shape, device = _Shape(blocks), layers[0][0].device
        lanes = self._runtime.lanes(device)

        @torch.no_grad()
        def write(runs: Sequence[Run]) -> None:
            self._follow(lanes, device)
            for chunk, lane in zip(shape.chunks(runs), cycle(lanes)):
                with self._runtime.on(lane):
                    made = shape.gathered(layers, chunk.first * blocks.block_tokens - first_token, chunk.count)
                    for at, size, address in chunk.pages:
                        self._from_gpu(address, made[at : at + size])

        return self._stored(store, write, lanes)

    def load_named(self, device: Any, held: Any, places: Sequence[Place]) -> list[torch.Tensor]:
        """New tensors on the device, with what lies at these places. Does not wait for the GPU."""
        import torch

        made: list[torch.Tensor] = []
        with self._loading(device, held, len(places)) as (lanes, lease):
            specs = ((address, _dtype(code), tuple(shape)) for address, code, shape in places)
            for group, lane in zip(_groups(specs), cycle(lanes)):
                with self._runtime.on(lane):
                    slot = torch.empty(group.size, dtype=torch.uint8, device=device) if group.count > 1 else None
                    if slot is not None:
                        self._to_gpu(slot, group.address)
                # In the caller's memory, not in the lane's: torch keeps a store of its own for each stream.
                new = [torch.empty(group.shape, dtype=group.dtype, device=device) for _ in range(group.count)]
                made.extend(new)
                with self._runtime.on(lane):
                    if slot is None:
                        self._to_gpu(_flat(new[0]), group.address)
                    else:
                        torch._foreach_copy_(new, group.tensors(slot))
                    del slot  # its memory is the lane's again
                lease.size += group.size
        return made

    def load_blocks(self, blocks: Blocks, held: Any, runs: Sequence[Run], first_layer: int, into: Into) -> None:
        """Brings blocks to tensors on one GPU, each at its tokens' place. `into` makes them, while the first blocks are on
        their way. Does not wait for the GPU."""
        import torch

        shape, (device, make) = _Shape(blocks), into
        chunks = shape.chunks(runs)
        with self._loading(device, held, len(chunks)) as (lanes, lease):
            lease.size = sum(count for _, count, _ in runs) * shape.stride
            under_way: deque[tuple[Any, _Chunk, torch.Tensor]] = deque()

            def take_apart() -> None:
                targets = make()
                lane, chunk, slot = under_way.popleft()
                with self._runtime.on(lane):
                    shape.scatter(slot, chunk.first * blocks.block_tokens, chunk.count, first_layer, targets)

            for chunk, lane in zip(chunks, cycle(lanes)):
                with self._runtime.on(lane):
                    slot = torch.empty(chunk.count * shape.stride, dtype=torch.uint8, device=device)
                    for at, size, address in chunk.pages:
                        self._to_gpu(slot[at : at + size], address)
                under_way.append((lane, chunk, slot))
                del slot  # its memory is the lane's again as soon as it is taken apart
                if len(under_way) == len(lanes):
                    take_apart()
            while under_way:
                take_apart()

    def _stored(self, store: Store, write: Callable[[Any], None], lanes: Sequence[Any]) -> Any:
        def wait() -> None:
            for lane in lanes:
                lane.synchronize()

        self._copies.reap()
        with self._copies:
            return store((write, wait))

    def _follow(self, lanes: Sequence[Any], device: Any) -> None:
        """These streams go on behind what the caller's stream is to do."""
        current = self._runtime.current(device)
        for lane in lanes:
            lane.wait_stream(current)

    @contextmanager
    def _loading(self, device: Any, held: Any, copies: int) -> Iterator[tuple[tuple[Any, ...], _Lease]]:
        """Streams for so many copies, behind what the caller's stream is to do. Afterwards that goes on behind the copies, and
        `held` is kept until they have ended."""
        self._copies.reap()
        with self._copies:
            lanes, current = self._runtime.lanes(device)[: max(1, copies)], self._runtime.current(device)
            self._follow(lanes, device)
            lease = self._copies.lease(held, lanes)
            begin = self._recorded(lanes[0])
            try:
                yield lanes, lease
            finally:
                for lane in lanes:
                    current.wait_stream(lane)
                lease.ends_with(begin, [self._recorded(lane) for lane in lanes])

    def _recorded(self, stream: Any) -> Any:
        event = self._runtime.event()
        event.record(stream)
        return event

    def _to_gpu(self, target: torch.Tensor, address: int) -> None:
        """Copies bytes from an address of the cache, on the current stream."""
        offset, size = address - self.pinned.address, target.numel()
        if not 0 <= offset <= self.pinned.capacity - size:
            target.copy_(_bytes_at(address, size))  # a view of a holder's own
            return
        if offset + size > self.pinned.until:
            self._ring.to_gpu(target, self.pinned.tensor[offset : offset + size])
            return
        for at, start, step in self.pinned.parts(offset, size):
            part = target if step == size else target[at : at + step]
            part.copy_(self.pinned.tensor[start : start + step], non_blocking=True)

    def _from_gpu(self, address: int, source: torch.Tensor) -> None:
        """Copies bytes to an address of the cache, on the current stream."""
        offset, size = address - self.pinned.address, source.numel()
        if offset + size > self.pinned.until:
            self._ring.from_gpu(self.pinned.tensor[offset : offset + size], source)
            return
        for at, start, step in self.pinned.parts(offset, size):
            part = source if step == size else source[at : at + step]
            self.pinned.tensor[start : start + step].copy_(part, non_blocking=True)


class _Copies:
    """What is under way."""

    def __init__(self) -> None:
        self.bytes_per_s = _FIRST_GUESS
        self._changed = threading.Condition()
        self._callers = 0
        self._leases: deque[_Lease] = deque()

    def __enter__(self) -> None:
        """A call begins that may begin copies."""
        with self._changed:
            self._callers += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._callers -= 1
            self._changed.notify_all()

    def lease(self, held: Any, lanes: Sequence[Any]) -> _Lease:
        """Holds pages until the copies on these streams have ended."""
        lease = _Lease(held, lanes)
        with self._changed:
            self._leases.append(lease)
        return lease

    def reap(self) -> None:
        """Lets go of the pages of copies that have ended."""
        while True:
            with self._changed:
                if not self._leases or not self._leases[0].has_ended():
                    return
                lease = self._leases.popleft()
            rate = lease.bytes_per_s()
            if lease.size >= _RATE_FROM_BYTES and rate is not None:
                self.bytes_per_s += 0.3 * (rate - self.bytes_per_s)

    def wait(self) -> None:
        """Until nothing is under way."""
        with self._changed:
            self._changed.wait_for(lambda: self._callers == 0)
            while self._leases:
                self._leases.popleft().wait()


@dataclass
class _Group:
    """Tensors of one shape that lie one `stride` behind the other, and cross the bus together."""

    of: slice
    address: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    each: int
    stride: int

    @property
    def count(self) -> int:
        return int(self.of.stop - self.of.start)

    @property
    def size(self) -> int:
        return (self.count - 1) * self.stride + self.each

    @property
    def is_dense(self) -> bool:
        """Is there nothing between them?"""
        return self.stride == self.each

    def takes(self, address: int, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
        """Is this the next one?"""
        if (dtype, shape) != (self.dtype, self.shape):
            return False
        stride = self.stride if self.count > 1 else address - self.address
        is_next = address == self.address + self.count * stride and self.each <= stride < self.each + _PAGE_BYTES
        return is_next and stride % dtype.itemsize == 0 and self.count * stride + self.each <= _TOGETHER_BYTES

    def tensors(self, slot: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Them, in these bytes."""
        strides: list[int] = []
        step = 1
        for dim in reversed(self.shape):
            strides.insert(0, step)
            step *= dim
        shape = (self.count, *self.shape)
        return slot.view(self.dtype).as_strided(shape, (self.stride // self.dtype.itemsize, *strides)).unbind()


def _groups(places: Iterable[tuple[int, torch.dtype, tuple[int, ...]]]) -> Iterator[_Group]:
    """Small tensors go together: between two copies the bus waits for some microseconds."""
    group: _Group | None = None
    for number, (address, dtype, shape) in enumerate(places):
        if group is not None and group.takes(address, dtype, shape):
            group.stride = address - group.address if group.count == 1 else group.stride
            group.of = slice(group.of.start, number + 1)
            continue
        if group is not None:
            yield group
        each = math.prod(shape) * dtype.itemsize
        group = _Group(slice(number, number + 1), address, dtype, shape, each, each)
    if group is not None:
        yield group


class _Lease:
    """Pages that are held until the copies from them have ended."""

    def __init__(self, held: Any, lanes: Sequence[Any]) -> None:
        self.held, self.size = held, 0
        self._lanes, self._begin = lanes, None
        self._ends: Sequence[Any] = ()

    def ends_with(self, begin: Any, ends: Sequence[Any]) -> None:
        self._begin, self._ends = begin, ends

    def has_ended(self) -> bool:
        # Without events the call was interrupted: then whatever is on the streams counts.
        return all(on.query() for on in self._ends or self._lanes)

    def wait(self) -> None:
        for on in self._ends or self._lanes:
            on.synchronize()

    def bytes_per_s(self) -> float | None:
        if self._begin is None:
            return None
        milliseconds = max(self._begin.elapsed_time(end) for end in self._ends)
        return 1000 * self.size / milliseconds if milliseconds > 0 else None


@dataclass
class _Chunk:
    """Blocks in a row, wherever their pages are."""

    first: int
    count: int
    pages: list[tuple[int, int, int]]
    """Where a part is in the chunk, its size in bytes, its address."""


class _Shape:
    """Where the layers of a block lie: `[layer][k|v][tokens, heads, dim]`, or heads before tokens; then up to the page's end.

    Elements are moved as wide as they lie: a copy of 8 bytes takes the GPU no longer than one of 2."""

    def __init__(self, blocks: Blocks) -> None:
        import torch

        self.blocks, self.dtype = blocks, torch_dtype(blocks.dtype)
        rows = [dim * self.dtype.itemsize for dim in (blocks.k_head_dim, blocks.v_head_dim)]
        wide = (torch.int64, torch.int32, torch.int16, torch.uint8)
        self.wide = next(dtype for dtype in wide if all(row % dtype.itemsize == 0 for row in rows))
        self.dims = [row // self.wide.itemsize for row in rows]
        self.sizes = [blocks.block_tokens * blocks.kv_heads * dim for dim in self.dims]
        size = blocks.layers * sum(self.sizes) * self.wide.itemsize
        self.stride = math.ceil(size / _PAGE_BYTES) * _PAGE_BYTES

    def chunks(self, runs: Sequence[Run]) -> list[_Chunk]:
        """The runs, as what is put together at once."""
        most = max(1, SLOT_BYTES // self.stride)
        chunks: list[_Chunk] = []
        for first, left, address in runs:
            while left:
                chunk = chunks[-1] if chunks else None
                if chunk is None or chunk.first + chunk.count != first or chunk.count == most:
                    chunk = _Chunk(first, 0, [])
                    chunks.append(chunk)
                count = min(left, most - chunk.count)
                chunk.pages.append((chunk.count * self.stride, count * self.stride, address))
                chunk.count += count
                first, left, address = first + count, left - count, address + count * self.stride
        return chunks

    def gathered(self, layers: Sequence[Pair], token: int, count: int) -> Any:
        """Blocks, as bytes, of tokens from `token` on in each tensor."""
        import torch

        made = torch.empty(count * self.stride, dtype=torch.uint8, device=layers[0][0].device)
        for side, part in self._sides(made, count):
            tokens = torch.stack([self._tokens(pair[side], token, count, 0) for pair in layers])
            part.copy_(self._by_block(tokens.view(self.wide), count))
        return made

    def scatter(self, slot: Any, token: int, count: int, first_layer: int, into: Sequence[Pair]) -> None:
        """Takes blocks apart, to tokens from `token` on in each tensor. One of all layers takes one copy."""
        import torch

        for side, part in self._sides(slot, count):
            tensors = [pair[side] for pair in into]
            if tensors[0].dim() == 4:
                tokens = self._tokens(tensors[0].view(self.wide), token, count, 1)
                self._by_block(tokens, count).copy_(part)
            else:
                targets = [self._by_block(self._tokens(tensor, token, count, 0)[None], count)[:, 0] for tensor in tensors]
                parts = part.view(self.dtype).unbind(1)[first_layer : first_layer + len(tensors)]
                torch._foreach_copy_(targets, parts)

    def _sides(self, slot: Any, count: int) -> Iterator[tuple[int, Any]]:
        """0 and all that is K, `[block, layer, ...]`; 1 and all that is V."""
        layers, both = self.blocks.layers, sum(self.sizes)
        elements = slot.view(self.wide).view(count, -1)[:, : layers * both].unflatten(1, (layers, both))
        tokens, heads = self.blocks.block_tokens, self.blocks.kv_heads
        for side, start in ((0, 0), (1, self.sizes[0])):
            dims = (heads, tokens, self.dims[side]) if self.blocks.order == "head_token" else (tokens, heads, self.dims[side])
            if self.sizes[side]:
                yield side, elements[:, :, start : start + self.sizes[side]].unflatten(2, dims)

    def _tokens(self, tensor: Any, token: int, count: int, before: int) -> Any:
        at, tokens = before + (1 if self.blocks.order == "head_token" else 0), count * self.blocks.block_tokens
        return tensor if tensor.shape[at] == tokens else tensor.narrow(at, token, tokens)

    def _by_block(self, layers: Any, count: int) -> Any:
        """Tokens of layers, `[layer, ...]`, as `[block, layer, ...]`."""
        tokens = self.blocks.block_tokens
        if self.blocks.order == "head_token":
            return layers.unflatten(2, (count, tokens)).permute(2, 0, 1, 3, 4)
        return layers.unflatten(1, (count, tokens)).permute(1, 0, 2, 3, 4)


class Home:
    """Where a cache's `Gpu` is made when it is first needed. It keeps the cache's memory, not the cache."""

    def __init__(self, ram: Ram) -> None:
        self._ram: Ram | None = ram
        self._gpu: Gpu | None = None
        self._lock = threading.Lock()

    def gpu(self) -> Gpu:
        """Raises `ClosedError` if it is too late to make one."""
        with self._lock:
            if self._gpu is None:
                if self._ram is None:
                    raise ClosedError("this cache is closed: make a new one")
                self._gpu = Gpu(self._ram)
            return self._gpu

    def of(self, tensors: Sequence[Any]) -> Gpu | None:
        """What copies these tensors; None if they are not all on one GPU."""
        if self._gpu is None and not _on_gpu(tensors):
            return None
        gpu = self.gpu()
        return gpu if gpu.owns(tensors) else None

    def on(self, device: torch.device) -> Gpu | None:
        """What copies to this device; None for the CPU."""
        return self.gpu() if device.type == "cuda" else None

    def close(self) -> None:
        with self._lock:
            self._ram = None
            if self._gpu is not None:
                self._gpu.close()


def _on_gpu(tensors: Sequence[Any]) -> bool:
    """Is any of these a tensor of torch on a GPU? Does not import torch."""
    return "torch" in sys.modules and any(getattr(tensor, "is_cuda", False) for tensor in tensors)


def spec(tensor: Any) -> tuple[int, tuple[int, ...]]:
    """Dtype code and shape."""
    return _code(tensor.dtype), tuple(tensor.shape)


_code = cache(dtype_code)


def _end(pinned: Pinned, copies: _Copies) -> None:
    if pinned.stop():
        copies.wait()
        pinned.release()


@cache
def _dtype(code: int) -> torch.dtype:
    return torch_dtype(DTYPES[code])


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.view(-1).view(torch.uint8)


def _bytes_at(address: int, size: int) -> torch.Tensor:
    import ctypes

    import torch

    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)
