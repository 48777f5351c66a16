"""The front door by prefix, in fewer bytes: `QuantizedKVCache`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from kvkeep import _kvkeep
from kvkeep._errors import ConfigError, EmptyTensorError, KvkeepError
from kvkeep._kvkeep import DTYPES, Outcome
from kvkeep._settings import Codec, Policy, TierOptions, settings
from kvkeep._simple import SimpleKVCache, checked_device
from kvkeep._tensors import numpy_dtype, torch_dtype
from kvkeep._tokens import token_ids

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from kvkeep._tensors import Tensor

    Prefix: TypeAlias = str | Sequence[int] | Tensor

EXACT_TOKENS = (4, 32)
"""Tokens that are kept as they are: the first, which all others attend to, and the most recent."""


@dataclass(frozen=True)
class SideLoss:
    """How far the elements of K, or of V, are from what they were."""

    mean: float
    """Mean of the absolute differences."""
    max: float
    """The largest of them."""
    relative: float
    """Root of the mean square of the differences over that of the elements."""


@dataclass(frozen=True)
class QuantizationLoss:
    """What a codec makes of K and V of one layer."""

    ratio: float
    """Bytes as they were over bytes that are kept."""
    k: SideLoss
    v: SideLoss


class QuantizedKVCache(SimpleKVCache):
    """`SimpleKVCache` with a codec in RAM, too: K and V come back within the codec's error, and take fewer bytes.

    A prefix is a text, or token ids. What is kept here no `SimpleKVCache` and no other codec finds, also not in the same directory or daemon.

    - `codec`: `"int4"`, `"int8"`, `"k8v4"`, `"fp8"`, `"nf4"`, or exact ones, `"lossless"` and `"raw"` (docs/codecs.md).
    - `token_axis`: which dimension of K and V is the token's: -2 of `[.., heads, tokens, dim]`, as transformers has them,
      or -3 of `[.., tokens, heads, dim]`.
    - `exact_tokens`: how many of the first and of the last tokens are kept as they are.

    All else is as in `SimpleKVCache`. A hit is decoded into tensors of its own each time, on the CPU.
    """

    def __new__(
        cls,
        max_size_gb: float = 10.0,
        device: str = "cpu",
        default_ttl_seconds: float | None = 3600.0,
        *,
        codec: Codec = "int4",
        token_axis: int = -2,
        exact_tokens: tuple[int, int] = EXACT_TOKENS,
        policy: Policy = "adaptive",
        **tiers: Unpack[TierOptions],
    ) -> QuantizedKVCache:
        chosen = settings(max_size_gb, default_ttl_seconds, policy, tiers)
        checked_device(device)
        quantizer = _quantizer(codec, token_axis, exact_tokens)
        return _kvkeep.NamedCache.__new__(cls, chosen, quantizer.cache_name())

    def __init__(
        self,
        max_size_gb: float = 10.0,
        device: str = "cpu",
        default_ttl_seconds: float | None = 3600.0,
        *,
        codec: Codec = "int4",
        token_axis: int = -2,
        exact_tokens: tuple[int, int] = EXACT_TOKENS,
        policy: Policy = "adaptive",
        **tiers: Unpack[TierOptions],
    ) -> None:
        # Tensors go through the CPU: its parent hands out from there.
        super().__init__()
        self.device = str(device)
        self.codec = codec
        self._quantizer = _quantizer(codec, token_axis, exact_tokens)

    def __enter__(self) -> QuantizedKVCache:
        return self

    def cache_kv(
        self,
        prefix: Prefix,
        layer: int,
        k_tensor: Tensor,
        v_tensor: Tensor,
        ttl_seconds: float | None = None,
        *,
        compute_seconds: float | None = None,
    ) -> Outcome:
        """Stores K and V of one layer, in place of what was there. As `SimpleKVCache.cache_kv`."""
        return self.cache_all_layers(
            prefix, {layer: (k_tensor, v_tensor)}, ttl_seconds, compute_seconds=compute_seconds
        )

    def cache_all_layers(
        self,
        prefix: Prefix,
        kv_dict: Mapping[int, tuple[Tensor, Tensor]],
        ttl_seconds: float | None = None,
        *,
        compute_seconds: float | None = None,
    ) -> Outcome:
        """Stores K and V of several layers, all or nothing. As `SimpleKVCache.cache_all_layers`."""
        text = _text(prefix)
        for layer, pair in kv_dict.items():
            for name, tensor in zip("kv", pair):
                if 0 in getattr(tensor, "shape", ()):
                    raise EmptyTensorError(f"{name} of layer {layer} has no elements: cache something, or nothing at all")
        encode = self._quantizer.encode
        kept: dict[int, tuple[Tensor, Tensor]] = {
            layer: (np.frombuffer(encode(k, False), np.uint8), np.frombuffer(encode(v, True), np.uint8))
            for layer, (k, v) in kv_dict.items()
        }
        return super().cache_all_layers(text, kept, ttl_seconds, compute_seconds=compute_seconds)

    def get_cached_kv(self, prefix: Prefix, layer: int) -> tuple[Tensor, Tensor] | None:
        """K and V of one layer within the codec's error, or None if they are not there (any more).

        Tensors of the kind that was stored (torch or numpy), of the same dtype and shape, and the caller's own.
        """
        found = super().get_cached_kv(_text(prefix), layer)
        return None if found is None else (self._decoded(found[0]), self._decoded(found[1]))

    def get_all_layers(self, prefix: Prefix, num_layers: int) -> dict[int, tuple[Tensor, Tensor]] | None:
        """K and V of the layers 0 to `num_layers`, or None if any is missing. One request."""
        found = super().get_all_layers(_text(prefix), num_layers)
        if found is None:
            return None
        return {layer: (self._decoded(k), self._decoded(v)) for layer, (k, v) in found.items()}

    def evict(self, prefix: Prefix, layer: int | None = None) -> list[int]:
        """Removes one layer of a prefix, or all of them; returns the layers that were there."""
        return super().evict(_text(prefix), layer)

    def measure_quantization_error(self, k_tensor: Tensor, v_tensor: Tensor) -> QuantizationLoss:
        """How far K and V of one layer are from what a hit would give, and how much smaller they are kept."""
        return _measured(self._quantizer, k_tensor, v_tensor)

    def _decoded(self, stored: Tensor) -> Tensor:
        code, shape, is_torch = _kvkeep.Quantizer.spec(stored)
        into: Any
        if is_torch:
            import torch

            into = torch.empty(shape, dtype=torch_dtype(DTYPES[code]))
        else:
            into = np.empty(shape, numpy_dtype(code))
        self._quantizer.decode(stored, into)
        decoded: Tensor = into.to(self.device) if is_torch and self.device != "cpu" else into
        return decoded


def measure_quantization_error(
    k_tensor: Tensor,
    v_tensor: Tensor,
    codec: Codec = "int4",
    *,
    token_axis: int = -2,
    exact_tokens: tuple[int, int] = EXACT_TOKENS,
) -> QuantizationLoss:
    """How far K and V of one layer are from what a codec makes of them, and how much smaller it makes them.

    Arguments as of `QuantizedKVCache`.
    """
    return _measured(_quantizer(codec, token_axis, exact_tokens), k_tensor, v_tensor)


def _measured(quantizer: _kvkeep.Quantizer, k: Tensor, v: Tensor) -> QuantizationLoss:
    ratio, of_k, of_v = quantizer.measure(k, v)
    return QuantizationLoss(ratio, SideLoss(*of_k), SideLoss(*of_v))


def _quantizer(codec: str, token_axis: int, exact_tokens: tuple[int, int]) -> _kvkeep.Quantizer:
    if token_axis not in (-2, -3):
        raise ConfigError(f"token_axis is {token_axis}: give -2 for [.., heads, tokens, dim] or -3 for [.., tokens, heads, dim]")
    first, last = exact_tokens
    if first < 0 or last < 0:
        raise ConfigError(f"exact_tokens is {exact_tokens}: give how many of the first and of the last tokens, from 0 on")
    return _kvkeep.Quantizer(codec, token_axis == -2, (min(first, 255), min(last, 255)))


def _text(prefix: Prefix) -> str:
    if isinstance(prefix, str):
        return _kvkeep.prefix_of_text(prefix) if prefix else prefix
    if isinstance(prefix, bytes):
        raise KvkeepError("a prefix is a text or token ids, not bytes: decode them")
    return _kvkeep.prefix_of_tokens(token_ids(prefix))
