"""The front door by prefix text and layer: `SimpleKVCache`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvkeep._errors import DeviceError
from kvkeep._gpu import Home, spec
from kvkeep._kvkeep import NamedCache, Outcome
from kvkeep._settings import Policy, TierOptions, settings
from kvkeep._stats import Stats, html_of, text_of

if TYPE_CHECKING:
    import torch
    from typing_extensions import Unpack

    from kvkeep._tensors import Tensor


class SimpleKVCache(NamedCache):
    """K and V by prefix text and layer: any shape, torch or numpy, handed back as they came in.

    The prefix text is the whole identity: it must be all that the KV depends on.

    - `max_size_gb`: the cap in GiB. Memory is taken as it is used, never more than this.
    - `device`: where torch tensors are handed back, `"cpu"` or a CUDA device. The cache itself
      is in the CPU's memory either way.
    - `default_ttl_seconds`: how long entries live; None keeps them until they are evicted.
    - `policy`: what goes first when room is needed: `"adaptive"` learns it; or `"lru"`, `"s3fifo"`, `"arc"`, `"lru2"`.
    - `disk`: a disk tier: a `DiskConfig`, or a directory. Or its parts by name: `disk_path`, `disk_size_gb`, `disk_write`,
      `disk_admission`, `disk_key_file`, `disk_flush_timeout_seconds`.
    - `daemon`: the socket of a `kvkeep daemon`: RAM that the processes of this host share. One that is away costs misses, and is
      used again when it is back. `daemon_token_file`: a file with a line `NAME TOKEN` that says which tenant this is.
    - `remote`: a store that several nodes share: a `RemoteConfig`, or its URL.

    Use it in a `with` statement, or call `close`, so that the disk tier is complete. Safe from many threads.
    Raises `ConfigError`, `DeviceError`, `OutOfMemoryError`, `DiskError`, `DiskLockedError`, `DiskRefusedError`.
    """

    def __new__(
        cls,
        max_size_gb: float = 10.0,
        device: str = "cpu",
        default_ttl_seconds: float | None = 3600.0,
        *,
        policy: Policy = "adaptive",
        **tiers: Unpack[TierOptions],
    ) -> SimpleKVCache:
        chosen = settings(max_size_gb, default_ttl_seconds, policy, tiers)
        checked_device(device)
        return super().__new__(cls, chosen)

    def __init__(
        self,
        max_size_gb: float = 10.0,
        device: str = "cpu",
        default_ttl_seconds: float | None = 3600.0,
        *,
        policy: Policy = "adaptive",
        **tiers: Unpack[TierOptions],
    ) -> None:
        self.device = str(device)
        self._home = Home(self._ram())
        target = checked_device(device)
        if target is not None:
            self._hand_out(functools.partial(self._home.gpu().load_named, target))

    def __enter__(self) -> SimpleKVCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the cache. A disk tier gets what is in RAM and is let go of, for this or another process
        to open again. Calls that follow raise `ClosedError`; tensors stay valid.
        """
        self._home.close()
        super().close()

    def cache_kv(
        self,
        prefix: str,
        layer: int,
        k_tensor: Tensor,
        v_tensor: Tensor,
        ttl_seconds: float | None = None,
        *,
        compute_seconds: float | None = None,
    ) -> Outcome:
        """Stores K and V of one layer, in place of what was there. They are copied once.

        `ttl_seconds` is the cache's default if None. `compute_seconds`, how long the KV took to
        compute, is what a later hit counts as time saved.

        Returns an `Outcome`: true if it was stored, else it says why not (larger than the cache, or
        all of it held). Raises `EmptyPrefixError`, `LayerOutOfRangeError`, `EmptyTensorError`,
        `RankError`, `UnsupportedTensorError`.
        """
        return self.cache_all_layers(
            prefix, {layer: (k_tensor, v_tensor)}, ttl_seconds, compute_seconds=compute_seconds
        )

    def cache_all_layers(
        self,
        prefix: str,
        kv_dict: Mapping[int, tuple[Tensor, Tensor]],
        ttl_seconds: float | None = None,
        *,
        compute_seconds: float | None = None,
    ) -> Outcome:
        """Stores K and V of several layers, all or nothing: `kv_dict` maps layer to (k, v).

        Otherwise as `cache_kv`. Raises `ZeroLayersError` too.
        """
        layers = [(layer, k, v) for layer, (k, v) in kv_dict.items()]
        tensors = [tensor for _, k, v in layers for tensor in (k, v)]
        gpu = self._home.of(tensors)
        if gpu is None:
            return self._store(prefix, layers, ttl_seconds, compute_seconds)
        specs = [(layer, spec(k), spec(v)) for layer, k, v in layers]
        outcome: Outcome = gpu.store_named(
            lambda write: self._store_written(prefix, specs, write, ttl_seconds, compute_seconds), tensors
        )
        return outcome

    def stats(self) -> Stats:
        """Counters and sizes as of now; `get_stats` by another name."""
        return self.get_stats()

    def print_stats(self) -> None:
        """Prints counters and sizes."""
        print(self._stats_text(), end="")

    def __repr__(self) -> str:
        return text_of(self)

    def _repr_html_(self) -> str:
        return html_of(self)


def checked_device(device: object) -> torch.device | None:
    """Where tensors are handed back; None for the CPU. Raises `DeviceError`."""
    if str(device) == "cpu":
        return None
    try:
        import torch
    except ImportError as error:
        raise DeviceError(f"device {device} needs torch, which is not installed") from error
    try:
        target = torch.device(str(device))
    except RuntimeError as error:
        raise DeviceError(f"{device} is no device: give 'cpu' or 'cuda'") from error
    if target.type != "cuda":
        raise DeviceError(f"device {device} is not supported: give 'cpu' or 'cuda'")
    if not torch.cuda.is_available():
        raise DeviceError("device cuda: torch finds no CUDA device here; use device='cpu'")
    return target
