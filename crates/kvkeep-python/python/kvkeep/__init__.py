"""Prefill once: keep the attention keys and values (KV) of prompts and hand them back.

`SimpleKVCache` keeps K and V by prefix text and layer, `QuantizedKVCache` in fewer bytes; `KVCache` keeps the blocks of prompts by
their tokens; `kvkeep.transformers` lets `generate` reuse what a model has read.
"""

import os as _os

from kvkeep import _kvkeep
from kvkeep._errors import (
    BlockOutOfRangeError,
    BufferLengthError,
    CastError,
    ClosedError,
    ConfigError,
    DeviceError,
    DiskError,
    DiskLockedError,
    DiskRefusedError,
    DTypeMismatchError,
    DuplicateLayerError,
    EmptyPrefixError,
    EmptyTensorError,
    EmptyTokensError,
    ForkError,
    KvkeepError,
    LayerCountError,
    LayerOutOfRangeError,
    LayoutError,
    NoDiskError,
    OutOfMemoryError,
    OverlapError,
    RankError,
    ShapeMismatchError,
    SizeOverflowError,
    TokenIdError,
    UnsupportedModelError,
    UnsupportedTensorError,
    ZeroLayersError,
)
from kvkeep._kvkeep import Outcome, Rejection, StoreReport, __version__
from kvkeep._quantized import QuantizationLoss, QuantizedKVCache, SideLoss, measure_quantization_error
from kvkeep._settings import DiskConfig, RemoteConfig
from kvkeep._simple import SimpleKVCache
from kvkeep._stats import Stats, TierStats
from kvkeep._tokens import KVCache, Look, Match, Missing, Namespace

# So that what a child sees of a result keeps its bytes.
_os.register_at_fork(before=_kvkeep.before_fork)

__all__ = [
    "BlockOutOfRangeError",
    "BufferLengthError",
    "CastError",
    "ClosedError",
    "ConfigError",
    "DTypeMismatchError",
    "DeviceError",
    "DiskConfig",
    "DiskError",
    "DiskLockedError",
    "DiskRefusedError",
    "DuplicateLayerError",
    "EmptyPrefixError",
    "EmptyTensorError",
    "EmptyTokensError",
    "ForkError",
    "KVCache",
    "KvkeepError",
    "LayerCountError",
    "LayerOutOfRangeError",
    "LayoutError",
    "Look",
    "Match",
    "Missing",
    "Namespace",
    "NoDiskError",
    "OutOfMemoryError",
    "Outcome",
    "OverlapError",
    "RankError",
    "QuantizationLoss",
    "QuantizedKVCache",
    "Rejection",
    "RemoteConfig",
    "ShapeMismatchError",
    "SideLoss",
    "SimpleKVCache",
    "SizeOverflowError",
    "Stats",
    "StoreReport",
    "TierStats",
    "TokenIdError",
    "UnsupportedModelError",
    "UnsupportedTensorError",
    "ZeroLayersError",
    "__version__",
    "measure_quantization_error",
]
