"""The extension module: raw calls, for the classes of the package. Use those."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypedDict

import numpy as np
from typing_extensions import Self

from kvkeep._stats import Stats
from kvkeep._tensors import Tensor

__version__: str
DTYPES: list[str]

_Tokens: TypeAlias = np.ndarray[Any, np.dtype[np.uint32]]
_RawDisk: TypeAlias = tuple[str, float, str, str, str | None, float, str]

class RawRemote(TypedDict):
    url: str
    prefix: str
    size_gb: float
    deadline_seconds: float
    ttl_seconds: float | None
    key_file: str | None
    codec: str
    variables: dict[str, str]

class Behind(TypedDict):
    """What is behind an engine's RAM."""

    disk: tuple[str, int, str | None, str] | None
    """Folder, bytes, key file, codec."""
    daemon: tuple[str, str | None] | None
    """Socket, and a file with a tenant's token."""
    remote: RawRemote | None
    queue_bytes: int
    """What may wait to be written to all of them."""

class Settings(TypedDict):
    max_size_gb: float
    default_ttl_seconds: float | None
    policy: str
    quotas: list[tuple[Namespace, float]]
    disk: _RawDisk | None
    remote: RawRemote | None
    daemon: tuple[str, str | None] | None

def checksum(address: int, bytes: int, seed: int) -> bytes: ...
def blake3(address: int, bytes: int) -> bytes: ...
def files_behind(places: list[tuple[int, int]], page_bytes: int) -> list[tuple[str, str, int, int] | None]: ...
def before_fork() -> None: ...

class Memory:
    @property
    def __array_interface__(self) -> dict[str, Any]: ...

class Rejection:
    """Why something was not admitted. A stated result, not an exception: the cache works on."""
    def __new__(cls, reason: str, first: int, second: int) -> Self: ...
    def __hash__(self) -> int: ...
    @property
    def reason(self) -> str:
        """`larger_than_capacity`, `all_pinned`, `over_quota` or `prefix_gone`."""

class Outcome:
    """What became of a store: true if it was admitted."""
    def __new__(cls, rejection: Rejection | None) -> Self: ...
    def __hash__(self) -> int: ...
    @property
    def stored(self) -> bool: ...
    @property
    def rejection(self) -> Rejection | None: ...
    def __bool__(self) -> bool: ...

class Ram:
    """The memory that a cache keeps blocks in."""
    @property
    def address(self) -> int: ...
    @property
    def capacity_bytes(self) -> int: ...
    def keep_until(self, bytes: int) -> None:
        """Brings memory behind the first `bytes` bytes, and keeps it there."""

class Held:
    """Pages that stay readable, and are not evicted, while this lives."""

_RawSpec: TypeAlias = tuple[int, Sequence[int]]
_Write: TypeAlias = tuple[Callable[[Any], None], Callable[[], None]]

def prefix_of_tokens(tokens: _Tokens) -> str: ...
def prefix_of_text(prefix: str) -> str: ...

class Quantizer:
    def __new__(cls, codec: str, head_first: bool, exact_tokens: tuple[int, int]) -> Self: ...
    def cache_name(self) -> str: ...
    def encode(self, tensor: Any, is_value: bool) -> bytes: ...
    @staticmethod
    def spec(stored: Any) -> tuple[int, tuple[int, ...], bool]: ...
    def decode(self, stored: Any, into: Any) -> None: ...
    def measure(
        self, k: Any, v: Any
    ) -> tuple[float, tuple[float, float, float], tuple[float, float, float]]: ...

class NamedCache:
    def __new__(cls, settings: Settings, name: str = "default") -> Self: ...
    def _hand_out(self, hand_out: Callable[[Any, Any], list[Any]]) -> None: ...
    def _ram(self) -> Ram: ...
    def _store_written(
        self,
        prefix: str,
        layers: Sequence[tuple[int, _RawSpec, _RawSpec]],
        write: _Write,
        ttl_seconds: float | None,
        compute_seconds: float | None,
    ) -> Outcome: ...
    def _store(
        self,
        prefix: str,
        layers: Sequence[tuple[int, Any, Any]],
        ttl_seconds: float | None,
        compute_seconds: float | None,
    ) -> Outcome: ...
    def _stats_text(self) -> str: ...
    def flush(self) -> None:
        """Makes everything stored so far durable: after a crash it is there, unless it was evicted,
        removed, or expired meanwhile.

        Raises `NoDiskError` without a disk tier, `DiskError` if it fails.
        """
    def close(self) -> None:
        """Ends the cache. A disk tier gets what is in RAM and is let go of, for this or another process
        to open again. Calls that follow raise `ClosedError`; tensors stay valid.
        """
    def get_cached_kv(self, prefix: str, layer: int) -> tuple[Tensor, Tensor] | None:
        """K and V of one layer as they were stored, or None if they are not there (any more).

        Tensors of the kind that was stored (torch or numpy), writable: writing into them changes neither
        the cache nor what the next reader gets. Costs the same for every size. Their pages cannot be
        evicted while they live.

        Raises `EmptyPrefixError`, `LayerOutOfRangeError`.
        """
    def get_all_layers(self, prefix: str, num_layers: int) -> dict[int, tuple[Tensor, Tensor]] | None:
        """K and V of the layers 0 to `num_layers`, or None if any is missing. One request.

        Raises `EmptyPrefixError`, `ZeroLayersError`, `LayerOutOfRangeError`.
        """
    def longest_prefix(self, text: str) -> str | None:
        """The longest prefix of `text` under which at least one layer is stored, or None."""
    def evict(self, prefix: str, layer: int | None = None) -> list[int]:
        """Removes one layer of a prefix, or all of them; returns the layers that were there.

        Raises `EmptyPrefixError`, `LayerOutOfRangeError`.
        """
    def clear(self) -> int:
        """Removes everything; returns how many entries that were. Counters are kept."""
    def get_stats(self) -> Stats:
        """Counters and sizes as of now."""

class Namespace:
    def __new__(
        cls,
        model: str,
        dims: tuple[int, int, int, int, int],
        dtype_code: int,
        head_first: bool,
        parts: tuple[str, str, str, str],
    ) -> Self: ...
    @property
    def id(self) -> str: ...
    @property
    def block_bytes(self) -> int: ...
    def check(self, first_layer: int, pairs: Sequence[tuple[_RawSpec, _RawSpec]], min_tokens: int) -> None: ...

class StoreReport:
    """What became of the blocks of one store."""
    def __new__(
        cls, stored_blocks: int, present_blocks: int, rejected_blocks: int, rejection: Rejection | None
    ) -> Self: ...
    def __hash__(self) -> int: ...
    @property
    def stored_blocks(self) -> int: ...
    @property
    def present_blocks(self) -> int: ...
    @property
    def rejected_blocks(self) -> int: ...
    @property
    def rejection(self) -> Rejection | None: ...

class Match:
    @property
    def cached_tokens(self) -> int: ...
    @property
    def blocks(self) -> int: ...
    @property
    def closed(self) -> bool: ...
    def load(self, first_layer: int, into: Sequence[tuple[Any, Any]], new: bool) -> None: ...
    def hold(self) -> tuple[Held, list[tuple[int, int, int]]]: ...
    def close(self) -> None: ...

class TokenCache:
    def __new__(cls, settings: Settings) -> Self: ...
    def flush(self) -> None: ...
    def prefetch(self, namespace: Namespace, tokens: _Tokens) -> int: ...
    def close(self) -> None: ...
    def lookup(self, namespace: Namespace, tokens: _Tokens) -> Match: ...
    def pin(self, namespace: Namespace, tokens: _Tokens) -> Match: ...
    def store(
        self,
        namespace: Namespace,
        tokens: _Tokens,
        first_token: int,
        layers: Sequence[tuple[Any, Any]],
        ttl_seconds: float | None,
        compute_seconds: float | None,
        priority: str,
    ) -> StoreReport: ...
    def store_written(
        self,
        namespace: Namespace,
        tokens: _Tokens,
        first_token: int,
        write: _Write,
        ttl_seconds: float | None,
        compute_seconds: float | None,
        priority: str,
    ) -> StoreReport: ...
    def ram(self) -> Ram: ...
    def look(self, namespace: Namespace, tokens: _Tokens) -> tuple[int, int, int, float, list[tuple[str, int]]]: ...
    def load_layers(
        self, namespace: Namespace, tokens: _Tokens, first_layer: int, into: Sequence[tuple[Any, Any]]
    ) -> int: ...
    def get_or_prefill(
        self, namespace: Namespace, tokens: _Tokens, prefill: Callable[[int, Match | None], None]
    ) -> Match: ...
    def remove(self, namespace: Namespace, tokens: _Tokens) -> int: ...
    def clear(self, namespace: Namespace | None) -> int: ...
    def stats(self) -> Stats: ...
    def stats_text(self) -> str: ...

class EngineHeld:
    """Blocks in RAM that stay there while this lives."""
    @property
    def rows(self) -> list[int]: ...

class EngineBegun:
    """Rows that are to be written. Dropped without `end`, nothing was stored."""
    @property
    def positions(self) -> list[int]:
        """Which of the keys."""
    @property
    def rows(self) -> list[int]: ...
    @property
    def refused(self) -> int:
        """So many had no room."""
    def end(self) -> None:
        """All of them are written."""
    def abandon(self) -> None:
        """They will not be written, and nothing writes them any more."""

class EngineRam:
    """RAM and tiers behind it, for an engine whose workers copy between a device and this memory. `ram`: bytes and the policy's name;
    `times`: seconds of a load and a flush. Keys are the engine's."""
    def __new__(
        cls,
        namespace: Namespace,
        ram: tuple[int, str],
        behind: Behind,
        times: tuple[float, float],
        events: bool,
    ) -> Self: ...
    def memory(self) -> tuple[int, int]:
        """The descriptor of the memory, for `/proc/<pid>/fd`, and how many rows it has."""
    def hold(self, keys: Sequence[bytes]) -> EngineHeld | None:
        """All of these, if they are all in RAM."""
    def places(self, keys: Sequence[bytes]) -> list[str | None]:
        """Where each of these would be brought up from, `daemon`, `disk` or `remote`; None of what is in none of them."""
    def is_asking(self) -> bool:
        """May more be there than was said, since a store over a network is being asked?"""
    def begin(self, keys: Sequence[bytes], first: int, ttl: float | None, is_kept: bool) -> EngineBegun:
        """Begins to store what is not in RAM of these, from `first` on. What comes before them is only known."""
    def note(self, keys: Sequence[bytes]) -> None:
        """A request for these, as far as they are in RAM."""
    def retain(self, keys: Sequence[bytes], time: float | None) -> int: ...
    def release(self, keys: Sequence[bytes]) -> None: ...
    def fetch(self, id: int, keys: Sequence[bytes]) -> None:
        """Begins to bring these up."""
    def fetched(self) -> list[tuple[int, float, EngineHeld]]:
        """What has come up since: number, seconds, and the blocks, held: the first ones of those that were wanted."""
    def probe(self, tier: str, keys: Sequence[bytes]) -> None:
        """Begins to read these from this tier into nowhere, to see how fast it is."""
    def probed(self) -> list[tuple[str, int, int, float]]:
        """What was read so since: the tier, blocks that came, blocks that were wanted, seconds."""
    def evict_all(self, time: float) -> int:
        """Empties RAM of what is not held, and waits for its writes so long at most."""
    def take_events(self) -> list[tuple[str, bool, list[bytes]]]:
        """What came and what went since, in order: tier, is removed, keys."""
    def flush(self) -> None: ...
    def stats(self) -> dict[str, Any]: ...
    def close(self) -> None: ...

class EngineTier:
    """Tiers behind an engine that keeps KV in RAM of its own. `rows`: a writeable array of bytes, [rows, bytes]; `times`: seconds of a
    load, a store, a flush. Jobs are begun and later asked for; keys are the engine's."""
    def __new__(
        cls,
        rows: np.ndarray[Any, np.dtype[np.uint8]],
        namespace: Namespace,
        behind: Behind,
        times: tuple[float, float, float],
        events: bool,
    ) -> Self: ...
    def places(self, keys: Sequence[bytes]) -> list[str | None]: ...
    def is_asking(self) -> bool: ...
    def store(self, id: int, keys: Sequence[bytes], rows: Sequence[int], ttl: float | None) -> None: ...
    def load(self, id: int, keys: Sequence[bytes], rows: Sequence[int]) -> None: ...
    def probe(self, id: int, keys: Sequence[bytes]) -> None:
        """Begins to load into nowhere, to see how fast that is."""
    def ended(self) -> list[tuple[int, str, list[int], int, float]]:
        """Number, `store`, `load` or `probe`, positions that are done, blocks, seconds."""
    def drain(self) -> None: ...
    def touch(self, keys: Sequence[bytes]) -> None: ...
    def retain(self, keys: Sequence[bytes], time: float | None) -> int: ...
    def release(self, keys: Sequence[bytes]) -> None: ...
    def remove(self, keys: Sequence[bytes]) -> int: ...
    def clear(self) -> None:
        """Removes all that the namespace has, everywhere."""
    def take_events(self) -> list[tuple[str, bool, list[bytes]]]:
        """What came and what went since, in order: tier, is removed, keys."""
    def flush(self) -> None: ...
    def stats(self) -> dict[str, Any]: ...
    def close(self) -> None: ...
