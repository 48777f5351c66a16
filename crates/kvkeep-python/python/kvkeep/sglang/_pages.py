"""Pages of SGLang's host pools: what they are called on the disk, and which pieces of memory hold them.

Invariant: a page's name says everything that its bytes depend on besides the model: pool, layout, precision, sizes, and SGLang's own hash
of all tokens before it. So two pools that are not alike never have a page in common, also where their pages have one size.

SGLang says itself where a page lies (`get_page_buffer_meta`), for every pool and layout: one piece for each layer, or one for all. Where it
does not, a page is copied flat. To know each pool's layout here was the alternative: there are a dozen, and each release has another one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

Piece = tuple[int, int]
"""Address and bytes of memory."""


@dataclass(frozen=True)
class Page:
    """A page to be read or written."""

    name: bytes
    pieces: list[Piece]


class Pool:
    """One of SGLang's host pools. `flat`: its pages are asked for one by one, as tensors of their own."""

    def __init__(self, name: str, host_pool: Any, flat: bool) -> None:
        self.host_pool = host_pool
        self.page_tokens = int(getattr(host_pool, "page_size", 1) or 1)
        sizes = None if flat else _sizes_of_a_page(host_pool, self.page_tokens)
        self.is_flat = sizes is None
        if sizes is None:
            page = host_pool.get_dummy_flat_data_page()
            sizes = [page.numel() * page.element_size()]
        self.page_bytes = sum(sizes)
        self._prefix = _prefix(name, host_pool, self.is_flat, sizes)

    def name(self, key: str) -> bytes:
        return hashlib.sha256(self._prefix + key.encode()).digest()

    def pages(self, keys: Sequence[str], indices: torch.Tensor) -> list[Page]:
        """Where these pages lie. Raises ValueError if there are not as many indices as pages want."""
        pointers, sizes = self.host_pool.get_page_buffer_meta(self._checked(keys, indices))
        pieces, each = list(zip(pointers, sizes)), len(pointers) // max(1, len(keys))
        return [Page(self.name(key), pieces[at * each : (at + 1) * each]) for at, key in enumerate(keys)]

    def starts(self, keys: Sequence[str], indices: torch.Tensor) -> list[int]:
        """Where these pages begin, in the pool's own count."""
        starts: list[int] = self._checked(keys, indices)[:: self.page_tokens].tolist()
        return starts

    def flat_page(self, key: str, tensor: torch.Tensor) -> Page:
        """A page as a contiguous tensor, which must stay. Raises ValueError if it has not the size of a page."""
        size = tensor.numel() * tensor.element_size()
        if not tensor.is_contiguous() or tensor.device.type != "cpu" or size != self.page_bytes:
            raise ValueError(f"kvkeep: a page is a contiguous tensor of {self.page_bytes} bytes in RAM, not {tensor.shape} of {tensor.dtype}")
        return Page(self.name(key), [(tensor.data_ptr(), size)])

    def _checked(self, keys: Sequence[str], indices: torch.Tensor | None) -> torch.Tensor:
        if indices is None or indices.numel() != len(keys) * self.page_tokens:
            found = 0 if indices is None else indices.numel()
            raise ValueError(f"kvkeep: {len(keys)} pages of {self.page_tokens} tokens want as many indices, not {found}")
        return indices


def is_logical(host_pool: Any) -> bool:
    """Does it hold nothing itself? SGLang then asks for the pools beside it."""
    return getattr(host_pool, "size_per_token", None) == 0


def _sizes_of_a_page(host_pool: Any, page_tokens: int) -> list[int] | None:
    """Sizes of a page's pieces; None if SGLang does not say where they lie."""
    try:
        _, sizes = host_pool.get_page_buffer_meta(torch.arange(page_tokens))
    except (AttributeError, NotImplementedError, ValueError, TypeError):
        return None
    return [int(size) for size in sizes] or None


def _prefix(name: str, host_pool: Any, is_flat: bool, sizes: Sequence[int]) -> bytes:
    facts = ("layout", "dtype", "page_size", "storage_format_tag", "head_num", "head_dim", "v_head_dim", "layer_num", "start_layer", "end_layer")
    said = {fact: str(getattr(host_pool, fact, None)) for fact in facts}
    parts = [name, type(host_pool).__name__, is_flat, list(sizes), said]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()
