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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from kvkeep._errors import ClosedError
from kvkeep._kvkeep import DTYPES
from kvkeep._pinned import Pinned, Ring, Runtime
from kvkeep._tensors import dtype_code, torch_dtype

if TYPE_CHECKING:
    import torch

    from kvkeep._kvkeep import Ram

    Pair = tuple[torch.Tensor, torch.Tensor]
    Run = tuple[int, int, int]
    """First block, blocks, address of the first one: their pages lie behind each other."""
    Store = Callable[[tuple[Callable[[Any], None], Callable[[], None]]], Any]
    """Reserves pages, has them written by the first function, waits by the second, and seals them."""

SLOT_BYTES = 64 << 20
"""Blocks put together at once on the GPU, twice as much of its memory for each of two streams."""

_PAGE_BYTES = 4096

_FIRST_GUESS, _RATE_FROM_BYTES = 20e9, 8 << 20
"""Bytes a second until something was measured; shorter copies say nothing of the bus."""


class Blocks(Protocol):
    """A namespace, as far as it says how a block is made up."""

    layers: int
    kv_heads: int
    k_head_dim: int
    v_head_dim: int
    block_tokens: int
    order: str

    @property
    def dtype(self) -> str: ...


class Gpu:
    """One cache and the GPUs that its tensors are on. Safe from many threads."""

    def __init__(self, ram: Ram, runtime: Runtime | None = None) -> None:
        self._runtime = Cuda() if runtime is None else runtime
        self.pinned = Pinned(ram, self._runtime)
        self._ring, self._copies = Ring(self._runtime), _Copies()
        self._end = weakref.finalize(self, _end, self.pinned, self._copies)
        self.pinned.want(0)

    @property
    def bytes_per_s(self) -> float:
        """Of loads: as measured of late, or a first guess."""
        return self._copies.bytes_per_s

    def owns(self, tensors: Sequence[Any]) -> bool:
        """Are these all on one GPU?"""
        devices = {tensor.device if self._runtime.owns(tensor) else None for tensor in tensors}
        return len(devices) == 1 and None not in devices

    def close(self) -> None:
        """Waits for what is under way and forgets the memory. What comes later goes through buffers."""
        self._end()

    def store_named(self, store: Store, tensors: Sequence[torch.Tensor]) -> Any:
        """Lets `store` store these tensors: it is given what writes them to their addresses, and what waits until they
        are there."""
        device = tensors[0].device

        def write(addresses: Sequence[tuple[int, int]]) -> None:
            sources = [_flat(tensor.detach().resolve_neg().contiguous()) for tensor in tensors]
            places = [address for pair in addresses for address in pair]
            for lane, turn in self._behind(device):
                with self._runtime.on(lane):
                    for source, address in zip(sources[turn], places[turn]):
                        self._from_gpu(address, source)

        return self._stored(store, device, write)

    def store_blocks(self, store: Store, blocks: Blocks, layers: Sequence[Pair], first_token: int) -> Any:
        """As `store_named`, of blocks of layers that begin at `first_token`."""
        shape, device = _Shape(blocks), layers[0][0].device
        layers = [(k.detach(), v.detach()) for k, v in layers]

        def write(runs: Sequence[Run]) -> None:
            chunks = list(shape.chunks(runs))
            for lane, turn in self._behind(device):
                with self._runtime.on(lane):
                    for first, count, address in chunks[turn]:
                        made = shape.gathered(layers, first * blocks.block_tokens - first_token, count)
                        self._from_gpu(address, made)

        return self._stored(store, device, write)

    def load_named(self, device: Any, held: Any, places: Sequence[tuple[int, int, Sequence[int]]]) -> list[torch.Tensor]:
        """New tensors on the device, with what lies at these places. Does not wait for the GPU."""
        import torch

        made = [torch.empty(tuple(shape), dtype=_dtype(code), device=device) for _, code, shape in places]
        targets = [_flat(tensor) for tensor in made]
        with self._loading(device, held, sum(target.numel() for target in targets)) as lanes:
            for lane, turn in lanes:
                with self._runtime.on(lane):
                    for target, (address, _, _) in zip(targets[turn], places[turn]):
                        self._to_gpu(target, address)
        return made

    def load_blocks(self, blocks: Blocks, held: Any, runs: Sequence[Run], first_layer: int, into: Sequence[Pair]) -> None:
        """Brings blocks to tensors on one GPU, each at its tokens' place. Does not wait for the GPU."""
        import torch

        shape, device = _Shape(blocks), into[0][0].device
        chunks = list(shape.chunks(runs))
        with self._loading(device, held, sum(count for _, count, _ in runs) * shape.stride) as lanes:
            for lane, turn in lanes:
                with self._runtime.on(lane):
                    for first, count, address in chunks[turn]:
                        slot = torch.empty(count * shape.stride, dtype=torch.uint8, device=device)
                        self._to_gpu(slot, address)
                        shape.scatter(slot, first * blocks.block_tokens, count, first_layer, into)

    def _stored(self, store: Store, device: Any, write: Callable[[Any], None]) -> Any:
        lanes = self._runtime.lanes(device)

        def wait() -> None:
            for lane in lanes:
                lane.synchronize()

        self._copies.reap()
        with self._copies.under_way():
            return store((write, wait))

    def _behind(self, device: Any) -> list[tuple[Any, slice]]:
        """The streams to copy on, behind what the caller's stream is to do, and whose turn what is."""
        lanes, current = self._runtime.lanes(device), self._runtime.current(device)
        for lane in lanes:
            lane.wait_stream(current)
        return [(lane, slice(number, None, len(lanes))) for number, lane in enumerate(lanes)]

    @contextmanager
    def _loading(self, device: Any, held: Any, size: int) -> Iterator[list[tuple[Any, slice]]]:
        """As `_behind`; afterwards the caller's stream goes on behind the copies, and `held` is kept until they have ended."""
        self._copies.reap()
        with self._copies.under_way():
            lanes, current = self._behind(device), self._runtime.current(device)
            lease = self._copies.lease(held, size, [lane for lane, _ in lanes])
            begin = self._recorded(lanes[0][0])
            try:
                yield lanes
            finally:
                for lane, _ in lanes:
                    current.wait_stream(lane)
                lease.ends_with(begin, [self._recorded(lane) for lane, _ in lanes])

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
        else:
            for at, start, step in self.pinned.parts(offset, size):
                target[at : at + step].copy_(self.pinned.tensor[start : start + step], non_blocking=True)
        self.pinned.want(offset + size)

    def _from_gpu(self, address: int, source: torch.Tensor) -> None:
        """Copies bytes to an address of the cache, on the current stream."""
        offset, size = address - self.pinned.address, source.numel()
        if offset + size > self.pinned.until:
            self._ring.from_gpu(self.pinned.tensor[offset : offset + size], source)
        else:
            for at, start, step in self.pinned.parts(offset, size):
                self.pinned.tensor[start : start + step].copy_(source[at : at + step], non_blocking=True)
        self.pinned.want(offset + size)


class _Copies:
    """What is under way."""

    def __init__(self) -> None:
        self.bytes_per_s = _FIRST_GUESS
        self._changed = threading.Condition()
        self._callers = 0
        self._leases: deque[_Lease] = deque()

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """A call that may begin copies."""
        with self._changed:
            self._callers += 1
        try:
            yield
        finally:
            with self._changed:
                self._callers -= 1
                self._changed.notify_all()

    def lease(self, held: Any, size: int, lanes: Sequence[Any]) -> _Lease:
        """Holds pages until the copies on these streams have ended."""
        lease = _Lease(held, size, lanes)
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


class _Lease:
    """Pages that are held until the copies from them have ended."""

    def __init__(self, held: Any, size: int, lanes: Sequence[Any]) -> None:
        self.held, self.size = held, size
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


class _Shape:
    """Where the layers of a block lie: `[layer][k|v][tokens, heads, dim]`, or heads before tokens; then up to the page's end."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks, self.dtype = blocks, torch_dtype(blocks.dtype)
        self.k_size = blocks.block_tokens * blocks.kv_heads * blocks.k_head_dim
        self.v_size = blocks.block_tokens * blocks.kv_heads * blocks.v_head_dim
        size = blocks.layers * (self.k_size + self.v_size) * self.dtype.itemsize
        self.stride = math.ceil(size / _PAGE_BYTES) * _PAGE_BYTES

    def chunks(self, runs: Sequence[Run]) -> Iterator[Run]:
        """The runs, in pieces of what is put together at once."""
        most = max(1, SLOT_BYTES // self.stride)
        for first, count, address in runs:
            for at in range(0, count, most):
                yield first + at, min(most, count - at), address + at * self.stride

    def gathered(self, layers: Sequence[Pair], token: int, count: int) -> torch.Tensor:
        """Blocks, as bytes, of tokens from `token` on in each tensor."""
        import torch

        made = torch.empty((count, self.stride // self.dtype.itemsize), dtype=self.dtype, device=layers[0][0].device)
        for side, dim, part in self._sides(made, count, len(layers)):
            tokens = [self._tokens(pair[side], token, count) for pair in layers]
            part.copy_(self._by_block(torch.stack(tokens), count, dim))
        return made.view(torch.uint8).view(-1)

    def scatter(self, slot: torch.Tensor, token: int, count: int, first_layer: int, into: Sequence[Pair]) -> None:
        """Takes blocks apart, to tokens from `token` on in each tensor."""
        import torch

        blocks = slot.view(self.dtype).view(count, -1)
        targets, parts = [], []
        for side, dim, part in self._sides(blocks, count, self.blocks.layers):
            for layer, pair in enumerate(into, first_layer):
                tokens = self._tokens(pair[side], token, count)
                targets.append(self._by_block(tokens[None], count, dim)[:, 0])
                parts.append(part[:, layer])
        torch._foreach_copy_(targets, parts)

    def _sides(self, blocks: torch.Tensor, count: int, layers: int) -> Iterator[tuple[int, int, torch.Tensor]]:
        """0 and K's head_dim, 1 and V's: with what is K, or V, in each block and layer."""
        both = blocks[:, : self.blocks.layers * (self.k_size + self.v_size)].unflatten(1, (self.blocks.layers, -1))
        for side, dim, start, size in (
            (0, self.blocks.k_head_dim, 0, self.k_size),
            (1, self.blocks.v_head_dim, self.k_size, self.v_size),
        ):
            if size:
                yield side, dim, both[:, :, start : start + size].unflatten(2, self._dims(dim))

    def _dims(self, dim: int) -> tuple[int, int, int]:
        tokens, heads = self.blocks.block_tokens, self.blocks.kv_heads
        return (heads, tokens, dim) if self.blocks.order == "head_token" else (tokens, heads, dim)

    def _tokens(self, tensor: torch.Tensor, token: int, count: int) -> torch.Tensor:
        at = 1 if self.blocks.order == "head_token" else 0
        return tensor.narrow(at, token, count * self.blocks.block_tokens)

    def _by_block(self, layers: torch.Tensor, count: int, dim: int) -> torch.Tensor:
        """Tokens of layers, `[layer, ...]`, as `[block, layer, ...]`."""
        tokens = self.blocks.block_tokens
        if self.blocks.order == "head_token":
            return layers.unflatten(2, (count, tokens)).permute(2, 0, 1, 3, 4)
        return layers.unflatten(1, (count, tokens)).permute(1, 0, 2, 3, 4)


class Cuda:
    """CUDA, through torch."""

    def __init__(self) -> None:
        import torch

        self._device = torch.cuda.current_device()
        self._streams: dict[int, tuple[Any, ...]] = {}
        self._lock = threading.Lock()

    def owns(self, tensor: Any) -> bool:
        import torch

        return getattr(tensor, "is_cuda", False) and tensor.layout is torch.strided

    def lanes(self, device: Any) -> tuple[Any, ...]:
        import torch

        index = torch.cuda.current_device() if device.index is None else device.index
        with self._lock:
            if index not in self._streams:
                self._streams[index] = tuple(torch.cuda.Stream(index) for _ in range(2))
            return self._streams[index]

    def current(self, device: Any) -> Any:
        import torch

        return torch.cuda.current_stream(device)

    def on(self, stream: Any) -> Any:
        import torch

        return torch.cuda.stream(stream)

    def event(self) -> Any:
        import torch

        return torch.cuda.Event(enable_timing=True)

    def register(self, address: int, size: int) -> None:
        import torch

        portable = 1
        with torch.cuda.device(self._device):  # a thread of its own begins on the first one
            _checked(torch.cuda.cudart().cudaHostRegister(address, size, portable))

    def unregister(self, address: int) -> None:
        import torch

        _checked(torch.cuda.cudart().cudaHostUnregister(address))

    def buffer(self, size: int) -> torch.Tensor:
        import torch

        return torch.empty(size, dtype=torch.uint8, pin_memory=True)


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

    def close(self) -> None:
        with self._lock:
            self._ram = None
            if self._gpu is not None:
                self._gpu.close()


def _on_gpu(tensors: Sequence[Any]) -> bool:
    """Is any of these a tensor of torch on a GPU? Does not import torch."""
    return "torch" in sys.modules and any(getattr(tensor, "is_cuda", False) for tensor in tensors)


def spec(tensor: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    """Dtype code and shape."""
    return dtype_code(tensor.dtype), tuple(tensor.shape)


def _end(pinned: Pinned, copies: _Copies) -> None:
    if pinned.stop():
        copies.wait()
        pinned.release()


def _checked(code: Any) -> None:
    """Raises `RuntimeError` for an error of CUDA's."""
    import torch

    if int(code) != 0:
        raise RuntimeError(str(torch.cuda.CudaError(int(code))))


def _dtype(code: int) -> torch.dtype:
    return torch_dtype(DTYPES[code])


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.view(-1).view(torch.uint8)


def _bytes_at(address: int, size: int) -> torch.Tensor:
    import ctypes

    import torch

    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)
