"""The state that `generate` starts from, and what is stored of the state in which it ends.

Rows of a batch share one state: as many tokens behind each row as are still to be read, so that the rows end together
on the right. `gather` decides how many that is. Either all rows read as much as the one that has most to read, where
that costs little; or each row first reads alone what it has more to read than the others, so that no row reads again
what another one lacks.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from kvkeep._tokens import KVCache, Match, Namespace
from kvkeep.transformers._model import Layout, new_cache, read, record_windows
from kvkeep.transformers._worth import Worth

if TYPE_CHECKING:
    from kvkeep import StoreReport

_BEGINS_WITH_BOTH = "value_states" in inspect.signature(DynamicLayer.lazy_initialization).parameters

_TOGETHER = 2
"""Rows read together while that reads at most this many times the tokens that each row needs."""


@dataclass
class Row:
    """One prompt of a call, with what was found of it."""

    tokens: list[int]
    cached_tokens: int = 0
    known: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """K and V of its first tokens, one pair a layer, [kv_heads, tokens, head_dim]; a layer with a window may have the
    last of them only."""
    known_tokens: int = 0
    first_unstored: int = 0
    """The first token whose KV is not in the cache, a multiple of the block."""
    not_worth_tokens: int = 0
    """Found, and not loaded: reading them again is faster."""


class Past:
    """The model's state in one call, and how much of it was there before."""

    def __init__(self, state: DynamicCache, start: int, offsets: Sequence[int]) -> None:
        self.state, self.start, self.offsets = state, start, offsets
        # A layer with a window has fewer entries than it has read.
        self._kept = [layer.keys.shape[-2] if layer.is_initialized else 0 for layer in state.layers]

    def lengths(self) -> set[int]:
        """How many tokens the layers have read: one number, if all is well; -1 stands for a layer whose own
        count and entries do not agree."""
        return {-1 if length is None else length for length in map(self._length, range(len(self._kept)))}

    def slice(self, number: int, first: int, end: int) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        """K and V of a row's tokens in every layer; None if a layer has not, or no longer, all of them."""
        layers = []
        for index, layer in enumerate(self.state.layers):
            length = self._length(index)
            if length is None:
                return None
            shift = layer.keys.shape[-2] - length + self.offsets[number]
            if first + shift < 0 or end + shift > layer.keys.shape[-2]:
                return None
            layers.append(tuple(t[number, :, first + shift : end + shift] for t in (layer.keys, layer.values)))
        return layers

    def _length(self, index: int) -> int | None:
        layer = self.state.layers[index]
        if not layer.is_initialized or layer.keys is None or layer.keys.shape[-2] != layer.values.shape[-2]:
            return None
        shown = self.start + layer.keys.shape[-2] - self._kept[index]
        return shown if shown == layer.get_seq_length() else None


@dataclass(frozen=True)
class Served:
    """A model as it is now: its namespace and its layout."""

    digest: str
    namespace: Namespace
    layout: Layout


def look_up(cache: KVCache, served: Served, prompts: Sequence[list[int]], worth: Worth) -> list[Row]:
    """What is stored of each prompt. The last token is left for the model, which must make the first logits."""
    rows = [Row(tokens) for tokens in prompts]
    gpu = one_gpu(served.layout)
    with ExitStack() as matches:
        found = [
            (row, matches.enter_context(cache.lookup(served.namespace, row.tokens[:-1])))
            for row in rows
            if len(row.tokens) > 1
        ]
        tokens = sum(match.cached_tokens for _, match in found)
        size = sum(match.blocks for _, match in found) * served.namespace.block_bytes
        if gpu is not None and not worth.pays(tokens, size, cache.gpu_bytes_per_s):
            for row, match in found:
                row.not_worth_tokens = match.cached_tokens
            return rows
        begin = time.perf_counter()
        for row, match in found:
            if match:
                row.known = _loaded(match, served.layout, gpu)
                row.cached_tokens = row.known_tokens = row.first_unstored = match.cached_tokens
        if size:
            worth.began(time.perf_counter() - begin)
    return rows


def one_gpu(layout: Layout) -> torch.device | None:
    """The GPU that all layers are on."""
    device = layout.devices[0]
    return device if device.type == "cuda" and len(set(layout.devices)) == 1 else None


def _loaded(match: Match, layout: Layout, gpu: torch.device | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    if gpu is not None:
        return match.to_torch(device=gpu)
    # Pinned memory goes to a GPU at the bus's speed, and torch keeps it for the next time.
    return match.to_torch(pin_memory=layout.devices[0].type == "cuda")


def gather(model: Any, cache: KVCache, served: Served, rows: Sequence[Row], width: int) -> Past:
    """The state to start from: behind it every row has the same number of tokens to read."""
    unread = [len(row.tokens) - row.known_tokens for row in rows]
    reading = max(unread) if any(row.known_tokens for row in rows) else width
    if reading < width and len(rows) * reading > _TOGETHER * sum(unread):
        reading = min(unread)
        for row in rows:
            if len(row.tokens) - row.known_tokens > reading:
                _read_alone(model, cache, served, row, len(row.tokens) - reading)
    offsets = [width - len(row.tokens) for row in rows]
    state = _started(model, served.layout, rows, width, reading)
    for row in rows:
        row.known = []  # it is in the state: twice is too much of a GPU's memory
    return Past(state, width - reading, offsets)


def store_row(
    cache: KVCache, served: Served, past: Past, number: int, row: Row, tokens: list[int], seconds: float
) -> StoreReport | None:
    """Stores the full blocks of `tokens` as far as they are new: the row's prompt, or more that the state has read."""
    blocks_end = len(tokens) // served.namespace.block_tokens * served.namespace.block_tokens
    if blocks_end <= row.first_unstored:
        return None
    layers = past.slice(number, row.first_unstored, blocks_end)
    if layers is None:
        return None  # a window has forgotten the beginning of a block that could not be stored when it was read
    report = cache.store(served.namespace, tokens, layers, first_token=row.first_unstored, compute_seconds=seconds)
    if report.rejection is None:
        row.first_unstored = blocks_end
    return report


def _read_alone(model: Any, cache: KVCache, served: Served, row: Row, upto: int) -> None:
    """Lets the model read a row without the others, up to a token, and stores what is new."""
    begin = time.perf_counter()
    state = _started(model, served.layout, [row], len(row.tokens), len(row.tokens) - row.known_tokens)
    past = Past(state, row.known_tokens, [0])
    read(model, [row.tokens[row.known_tokens : upto]], state)
    row.known, row.known_tokens = [(layer.keys[0], layer.values[0]) for layer in state.layers], upto
    store_row(cache, served, past, 0, row, row.tokens[:upto], time.perf_counter() - begin)


def _started(model: Any, layout: Layout, rows: Sequence[Row], width: int, reading: int) -> DynamicCache:
    """The state of all rows up to the tokens that are read next."""
    state = new_cache(model)
    if width > reading:
        for index, layer in enumerate(state.layers):
            _begin(layer, *_joined(layout, rows, index, width - reading, reading))
    record_windows(state)
    return state


def _begin(layer: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Gives an empty layer its first tokens. One that only grows keeps them without a copy: it never writes into them."""
    if type(layer) is DynamicLayer and _BEGINS_WITH_BOTH:
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
    else:
        layer.update(keys, values)


def _joined(
    layout: Layout, rows: Sequence[Row], index: int, known: int, reading: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer's K and V of all rows, each with its end on the right. What is on the left of a row is hidden by the
    mask, and zero."""
    device = layout.devices[index]
    if len(rows) == 1 and len(rows[0].tokens) == known + reading:
        keys, values = rows[0].known[index]
        return keys[None].to(device, non_blocking=True), values[None].to(device, non_blocking=True)
    joined = []
    for part, head_dim in enumerate((layout.head_dim, layout.v_head_dim)):
        tensor = torch.zeros((len(rows), layout.kv_heads, known, head_dim), dtype=layout.dtype, device=device)
        for number, row in enumerate(rows):
            count = len(row.tokens) - reading
            if count > 0 and row.known:
                kept = row.known[index][part]
                kept = kept[:, : kept.shape[1] - (row.known_tokens - count)]
                tensor[number, :, known - kept.shape[1] :] = kept.to(device, non_blocking=True)
        joined.append(tensor)
    return joined[0], joined[1]
