"""The front door by tokens: `KVCache`, `Namespace`, `Match`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from kvkeep import _kvkeep
from kvkeep._errors import LayerCountError, LayoutError, ShapeMismatchError, TokenIdError, UnsupportedTensorError
from kvkeep._gpu import Gpu, Home, spec
from kvkeep._kvkeep import DTYPES
from kvkeep._settings import Policy, Priority, TierOptions, settings
from kvkeep._stats import Stats, html_of, text_of
from kvkeep._tensors import dtype_code, is_torch, needed, numpy_dtype, torch_dtype

if TYPE_CHECKING:
    import torch
    from typing_extensions import Unpack

    from kvkeep._tensors import Tensor

    Tokens: TypeAlias = Sequence[int] | np.ndarray[Any, Any] | torch.Tensor
    Layers: TypeAlias = Sequence[tuple[Tensor, Tensor]]

Order: TypeAlias = Literal["token_head", "head_token"]


class Namespace:
    """All that KV depends on besides its tokens. Different namespaces see nothing of each other.

    - `model`, `revision`, `engine`, `lora`: what computed the KV, as far as its bits depend on it.
    - `salt`: a tenant's secret: who does not know it finds none of the tenant's blocks.
    - `layers`, `kv_heads`, `head_dim` (`v_head_dim` if V has another), `dtype`: one token's KV.
    - `block_tokens`: tokens in a block, the unit that is stored and found.
    - `order`: a layer's K and V are `[tokens, kv_heads, head_dim]` (`"token_head"`) or
      `[kv_heads, tokens, head_dim]` (`"head_token"`, as transformers has them).

    Two with equal parts are equal. It can be copied and pickled.

    Raises `LayoutError`, `SizeOverflowError`, `UnsupportedTensorError`.
    """

    def __init__(
        self,
        model: str,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: object,
        v_head_dim: int | None = None,
        block_tokens: int = 64,
        order: Order = "token_head",
        revision: str = "",
        engine: str = "",
        lora: str = "",
        salt: str = "",
    ) -> None:
        if order not in ("token_head", "head_token"):
            raise LayoutError(f"order is {order!r}: give 'token_head' or 'head_token'")
        dims = (layers, kv_heads, head_dim, head_dim if v_head_dim is None else v_head_dim, block_tokens)
        if not all(0 <= dim < 2**32 for dim in dims):
            raise LayoutError(f"the dimensions {dims} are out of range")
        self.model, self.layers, self.kv_heads, self.block_tokens, self.order = (
            model, layers, kv_heads, block_tokens, order,
        )  # fmt: skip
        self.k_head_dim, self.v_head_dim = dims[2], dims[3]
        self.dtype_code = dtype_code(dtype)
        self._parts = (revision, engine, lora, salt)
        self.raw = _kvkeep.Namespace(model, dims, self.dtype_code, order == "head_token", self._parts)

    @property
    def id(self) -> str:
        """SHA-256 of everything in it, in hex."""
        return self.raw.id

    @property
    def dtype(self) -> str:
        """kvkeep's name of the element type."""
        return DTYPES[self.dtype_code]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: all layers, K and V."""
        return self.raw.block_bytes

    def shape(self, tokens: int, head_dim: int) -> tuple[int, int, int]:
        """The shape of one layer's K or V of so many tokens."""
        if self.order == "head_token":
            return (self.kv_heads, tokens, head_dim)
        return (tokens, self.kv_heads, head_dim)

    def __eq__(self, other: object) -> bool:
        return self.id == other.id if isinstance(other, Namespace) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.id)

    def __reduce__(self) -> tuple[Any, ...]:
        """For `copy` and `pickle`. The salt goes along: who has the bytes has the tenant's secret."""
        revision, engine, lora, salt = self._parts
        rest: dict[str, Any] = {
            "layers": self.layers, "kv_heads": self.kv_heads, "head_dim": self.k_head_dim, "dtype": self.dtype,
            "v_head_dim": self.v_head_dim, "block_tokens": self.block_tokens, "order": self.order,
            "revision": revision, "engine": engine, "lora": lora, "salt": salt,
        }  # fmt: skip
        return functools.partial(type(self), self.model, **rest), ()

    def __repr__(self) -> str:
        return (
            f"<Namespace {self.model}: {self.layers} layers, {self.kv_heads} kv_heads, head_dim {self.k_head_dim}, "
            f"{self.dtype}, {self.block_tokens} tokens a block, {self.id[:12]}>"
        )


class Match:
    """The longest resident prefix of a prompt. Its blocks stay readable, and are not evicted, until
    it is closed: use it in a `with` statement, or call `close`.
    """

    def __init__(self, raw: _kvkeep.Match, namespace: Namespace, home: Home) -> None:
        self._raw, self._home = raw, home
        self.namespace = namespace

    @property
    def cached_tokens(self) -> int:
        """Tokens matched: a multiple of the block's tokens, at most the prompt's."""
        return self._raw.cached_tokens

    @property
    def blocks(self) -> int:
        """Blocks matched."""
        return self._raw.blocks

    def load(self, into: Layers, first_layer: int = 0) -> None:
        """Copies K and V into tensors of yours, one (k, v) for each layer from `first_layer` on.

        Each has room for at least `cached_tokens` tokens in the namespace's order; on the CPU it is contiguous. The
        matched tokens are written at its beginning, the rest is left alone. Tensors on a GPU are written by it: the
        current stream waits for that, and this call does not.

        Raises `ZeroLayersError`, `LayerOutOfRangeError`, `DTypeMismatchError`, `ShapeMismatchError`,
        `UnsupportedTensorError`, `OverlapError`, `ClosedError`; then nothing was written.
        """
        pairs = [(k, v) for k, v in into]
        tensors = [tensor for pair in pairs for tensor in pair]
        gpu = self._home.of(tensors)
        if gpu is None:
            self._raw.load(first_layer, pairs, False)
        else:
            self._load_on(gpu, first_layer, pairs)

    def to_numpy(self, room_tokens: int | None = None) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
        """New arrays with the matched K and V of every layer, contiguous, with room for `room_tokens`
        tokens (as many as matched if None; what is not matched is not set)."""
        dtype = numpy_dtype(self.namespace.dtype_code)
        layers = self._new(lambda shape: np.empty(shape, dtype), room_tokens)
        self._raw.load(0, layers, True)
        return layers

    def to_torch(
        self,
        room_tokens: int | None = None,
        *,
        pin_memory: bool = False,
        device: torch.device | str = "cpu",
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """As `to_numpy`, but torch tensors, on the CPU (`pin_memory` as in torch) or on a GPU, as `load` brings them there. On a
        GPU all K are parts of one tensor, and all V of another."""
        torch = needed("torch", "Match.to_torch")
        dtype, target = torch_dtype(self.namespace.dtype), torch.device(device)
        make = functools.partial(torch.empty, dtype=dtype, device=target, pin_memory=pin_memory)
        gpu = self._home.on(target)
        if gpu is None:
            layers = self._new(make, room_tokens)
            self._raw.load(0, layers, True)
            return layers
        return self._new_on(gpu, target, make, self.cached_tokens if room_tokens is None else room_tokens)

    def close(self) -> None:
        """Lets go of the blocks. May be called more than once."""
        self._raw.close()

    @property
    def closed(self) -> bool:
        """Was it closed?"""
        return self._raw.closed

    def __bool__(self) -> bool:
        return self.blocks > 0

    def __enter__(self) -> Match:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Match of {self.cached_tokens} tokens in {self.blocks} blocks{', closed' if self.closed else ''}>"

    def _load_on(self, gpu: Gpu, first_layer: int, pairs: list[tuple[Any, Any]]) -> None:
        self.namespace.raw.check(first_layer, [(spec(k), spec(v)) for k, v in pairs], self.cached_tokens)
        if any(tensor.requires_grad for pair in pairs for tensor in pair):
            raise UnsupportedTensorError(
                "a tensor to be written must be free of gradients, which writing would make wrong: give tensor.detach()"
            )
        held, runs = self._raw.hold()
        gpu.load_blocks(self.namespace, held, runs, first_layer, (pairs[0][0].device, lambda: pairs))

    def _new_on(self, gpu: Gpu, target: torch.device, make: Callable[..., Any], room_tokens: int) -> list[Any]:
        """All layers of K in one tensor and all of V in another: one copy takes a block apart."""
        namespace = self.namespace
        if room_tokens < self.cached_tokens:
            raise ShapeMismatchError(f"room for {room_tokens} tokens: {self.cached_tokens} are cached")
        shapes = [namespace.shape(room_tokens, dim) for dim in (namespace.k_head_dim, namespace.v_head_dim)]
        whole = functools.cache(lambda: tuple(make((namespace.layers, *shape)) for shape in shapes))
        held, runs = self._raw.hold()
        gpu.load_blocks(namespace, held, runs, 0, (target, lambda: [whole()]))
        k, v = whole()
        return list(zip(k.unbind(), v.unbind(), strict=True))

    def _new(self, make: Callable[[tuple[int, int, int]], Any], room_tokens: int | None) -> list[tuple[Any, Any]]:
        tokens = self.cached_tokens if room_tokens is None else room_tokens
        shapes = [self.namespace.shape(tokens, dim) for dim in (self.namespace.k_head_dim, self.namespace.v_head_dim)]
        return [(make(shapes[0]), make(shapes[1])) for _ in range(self.namespace.layers)]


@dataclass(frozen=True)
class Look:
    """Where the tokens of a prompt are, from the first one on."""

    ram_tokens: int
    """In RAM."""
    load_tokens: int
    """Behind those, worth loading: on the disk, or in RAM behind such."""
    not_worth_tokens: int
    """Behind those: there, but computing them again is faster than loading them."""
    load_seconds: float
    """How long loading takes, as measured so far; 0 before the first load."""
    tiers: Mapping[str, int]
    """All of these by where they lie: the name of each tier, and its tokens."""

    @property
    def worth_tokens(self) -> int:
        """Tokens that a lookup gives."""
        return self.ram_tokens + self.load_tokens


class Missing:
    """The part of a prompt that `KVCache.get_or_prefill` asks its function to compute."""

    def __init__(self, cache: KVCache, namespace: Namespace, tokens: Tokens, first: int, cached: Match | None) -> None:
        self._cache, self._namespace, self._tokens = cache, namespace, tokens
        self.first_token: int = first
        """The first token to compute."""
        self.cached: Match | None = cached
        """What is in the cache of this prompt, or None: load it before computing the rest."""

    @property
    def tokens(self) -> Tokens:
        """The tokens to compute, up to the end of the prompt."""
        return self._tokens[self.first_token :]

    def store(
        self, layers: Layers, *, ttl_seconds: float | None = None, compute_seconds: float | None = None
    ) -> _kvkeep.StoreReport:
        """Stores what was computed: K and V of every layer, from `first_token` on."""
        return self._cache.store(
            self._namespace,
            self._tokens,
            layers,
            first_token=self.first_token,
            ttl_seconds=ttl_seconds,
            compute_seconds=compute_seconds,
        )


class KVCache:
    """KV of prompts, by tokens: blocks under a chain of hashes.

    - `max_size_gb`: the cap in GiB. Memory is taken as it is used, never more than this.
    - `default_ttl_seconds`: how long blocks live; None keeps them until they are evicted.
    - `policy`: what goes first when room is needed: `"adaptive"` learns it; or `"lru"`, `"s3fifo"`, `"arc"`, `"lru2"`.
    - `quotas`: namespaces to the weights of their shares, for tenants that must not evict each other. All without one
      count as 1 together. What nobody else needs may be used by all.
    - `disk`: a disk tier: a `DiskConfig`, or a directory. Or its parts by name: `disk_path`, `disk_size_gb`, `disk_write`,
      `disk_admission`, `disk_key_file`, `disk_flush_timeout_seconds`.
    - `daemon`: the socket of a `kvkeep daemon`: RAM that the processes of this host share. One that is away costs misses, and is
      used again when it is back. `daemon_token_file`: a file with a line `NAME TOKEN` that says which tenant this is.
    - `remote`: a store that several nodes share: a `RemoteConfig`, or its URL.

    Token ids are a list of ints, or a numpy array or torch tensor of shape `(n,)` or `(1, n)`. Safe from many
    threads; the GIL is released while it hashes, copies and waits. Use it in a `with` statement, or call `close`,
    so that a disk tier is complete. Raises `ConfigError`, `OutOfMemoryError`, `DiskError`, `DiskLockedError`,
    `DiskRefusedError`.
    """

    def __init__(
        self,
        max_size_gb: float = 10.0,
        *,
        default_ttl_seconds: float | None = None,
        policy: Policy = "adaptive",
        quotas: Mapping[Namespace, float] | None = None,
        **tiers: Unpack[TierOptions],
    ) -> None:
        chosen = settings(max_size_gb, default_ttl_seconds, policy, tiers, quotas)
        self._raw = _kvkeep.TokenCache(chosen)
        self._home = Home(self._raw.ram())

    def __enter__(self) -> KVCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def lookup(self, namespace: Namespace, tokens: Tokens) -> Match:
        """The longest run of resident blocks from the first token on, pinned. Counts as a request.

        Raises `EmptyTokensError`, `TokenIdError`.
        """
        ids = token_ids(tokens)
        return Match(self._raw.lookup(namespace.raw, ids), namespace, self._home)

    def pin(self, namespace: Namespace, tokens: Tokens) -> Match:
        """As `lookup`, but not a request: keeps a prefix, such as a system prompt, until it is closed."""
        ids = token_ids(tokens)
        return Match(self._raw.pin(namespace.raw, ids), namespace, self._home)

    def look(self, namespace: Namespace, tokens: Tokens) -> Look:
        """Where a prompt's KV is now. Not a request: nothing is loaded, touched or counted.

        Raises `EmptyTokensError`, `TokenIdError`.
        """
        ids = token_ids(tokens)
        ram, load, not_worth, seconds, tiers = self._raw.look(namespace.raw, ids)
        return Look(ram, load, not_worth, seconds, dict(tiers))

    def load_layers(self, namespace: Namespace, tokens: Tokens, into: Layers, first_layer: int = 0) -> int:
        """Copies some layers of the longest run of blocks into tensors of yours: from RAM, behind that straight from the
        disk, of which only these layers are read and nothing is kept in RAM. For loading layer by layer.

        `into` has one (k, v) for each layer from `first_layer` on, as in `Match.load`, with room for all full blocks of the
        prompt. Counts as a request. Returns how many tokens were written, at the tensors' beginning.

        Raises `EmptyTokensError`, and as `Match.load`.
        """
        ids = token_ids(tokens)
        return self._raw.load_layers(namespace.raw, ids, first_layer, [(k, v) for k, v in into])

    def store(
        self,
        namespace: Namespace,
        tokens: Tokens,
        layers: Layers,
        *,
        first_token: int = 0,
        ttl_seconds: float | None = None,
        compute_seconds: float | None = None,
        priority: Priority = "normal",
    ) -> _kvkeep.StoreReport:
        """Stores the full blocks of `tokens`; those already there are skipped.

        `layers` holds (k, v) of every layer, in the namespace's order, from `first_token` on: of at
        least as many tokens as the full blocks behind it. What comes before must be in the cache,
        or the report says `prefix_gone`. `priority`: of what is evicted, `"drop-first"` goes before everything else and
        `"keep-longer"` last.

        Returns a `StoreReport`. Raises `EmptyTokensError`, `LayerCountError`, `DTypeMismatchError`,
        `ShapeMismatchError`, `UnsupportedTensorError`; then nothing was stored.
        """
        if first_token < 0:
            raise TokenIdError(f"first_token is {first_token}: give the position of a token, from 0 on")
        ids = token_ids(tokens)
        pairs = [(k, v) for k, v in layers]
        tensors = [tensor for pair in pairs for tensor in pair]
        gpu = self._home.of(tensors) if len(ids) else None
        if gpu is None:
            return self._raw.store(namespace.raw, ids, first_token, pairs, ttl_seconds, compute_seconds, priority)
        self._check(namespace, ids, pairs, first_token)
        store = functools.partial(self._raw.store_written, namespace.raw, ids, first_token)
        report: _kvkeep.StoreReport = gpu.store_blocks(
            lambda write: store(write, ttl_seconds, compute_seconds, priority), namespace, pairs, first_token
        )
        return report

    def get_or_prefill(
        self, namespace: Namespace, tokens: Tokens, prefill: Callable[[Missing], Layers | None]
    ) -> Match:
        """The prompt's blocks: those in the cache as they are, the rest computed by `prefill`.

        `prefill` gets a `Missing` and returns the layers from `missing.first_token` on, or stores them
        itself with `missing.store` and returns None. Of the threads that miss the same block one
        computes; the others wait, without the GIL, and get its blocks. If it raises, another one computes.

        Counts as one request. Raises `EmptyTokensError`, and what `prefill` raises.
        """
        ids = token_ids(tokens)

        def run(first_token: int, cached: _kvkeep.Match | None) -> None:
            match = Match(cached, namespace, self._home) if cached else None
            missing = Missing(self, namespace, ids, first_token, match)
            try:
                layers = prefill(missing)
                if layers is not None:
                    missing.store(layers)
            finally:
                if missing.cached is not None:
                    missing.cached.close()

        return Match(self._raw.get_or_prefill(namespace.raw, ids, run), namespace, self._home)

    def remove(self, namespace: Namespace, tokens: Tokens) -> int:
        """Removes the blocks of this prompt; returns how many. Blocks of longer prompts that begin with
        it can then no longer be found either, and age out."""
        ids = token_ids(tokens)
        return self._raw.remove(namespace.raw, ids)

    def clear(self, namespace: Namespace | None = None) -> int:
        """Removes everything in a namespace, or everything; returns how many blocks."""
        return self._raw.clear(None if namespace is None else namespace.raw)

    def prefetch(self, namespace: Namespace, tokens: Tokens) -> int:
        """Begins to bring a prompt's blocks from the disk into RAM, as far as that is worth it, and does
        not wait: for a request that is known to come. Returns of how many tokens; 0 without a disk tier."""
        ids = token_ids(tokens)
        return self._raw.prefetch(namespace.raw, ids)

    def flush(self) -> None:
        """Makes everything stored so far durable: after a crash it is there, unless it was evicted,
        removed, or expired meanwhile.

        Raises `NoDiskError` without a disk tier, `DiskError` if it fails.
        """
        self._raw.flush()

    def close(self) -> None:
        """Ends the cache. A disk tier gets what is in RAM and is let go of, for this or another process to
        open again. Calls that follow raise `ClosedError`; what was loaded stays valid.
        """
        self._home.close()
        self._raw.close()

    def stats(self) -> Stats:
        """Counters and sizes as of now."""
        return self._raw.stats()

    def get_stats(self) -> Stats:
        """`stats` by the name that `SimpleKVCache` has for it, too."""
        return self.stats()

    def print_stats(self) -> None:
        """Prints counters and sizes."""
        print(self._raw.stats_text(), end="")

    def pin_memory(self) -> None:
        """Begins to register the cache's memory with the GPU's driver, in the background. The first tensor on a GPU
        does so, too; until it is done copies take several times as long."""
        self._home.gpu()

    @property
    def gpu_bytes_per_s(self) -> float:
        """How fast blocks go to a GPU: as measured of late, or a first guess."""
        return self._home.gpu().bytes_per_s

    @staticmethod
    def _check(namespace: Namespace, ids: np.ndarray[Any, Any], pairs: list[tuple[Any, Any]], first_token: int) -> None:
        """Raises what the library raises for tensors that do not fit."""
        if len(pairs) != namespace.layers:
            raise LayerCountError(f"{len(pairs)} layers given, {namespace.layers} expected: pass one entry for each layer")
        blocks_end = len(ids) // namespace.block_tokens * namespace.block_tokens
        namespace.raw.check(0, [(spec(k), spec(v)) for k, v in pairs], max(0, blocks_end - first_token))

    def __repr__(self) -> str:
        return text_of(self)

    def _repr_html_(self) -> str:
        return html_of(self)


def token_ids(tokens: Any) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Token ids as one contiguous array of `uint32`. An array or tensor of one prompt as a batch, as tokenizers give it, is that prompt.

    Raises `TokenIdError` for anything else than integers from 0 to 2**32 - 1, in one dimension or, as an array or a tensor, in a batch of one.
    """
    if is_torch(tokens):
        tokens = tokens.detach().to("cpu").numpy()
    try:
        ids = np.asarray(tokens if isinstance(tokens, (np.ndarray, list, tuple)) else list(tokens))
    except (TypeError, ValueError, OverflowError) as error:
        raise TokenIdError(f"token ids must be integers in one dimension: {error}") from error
    if ids.ndim == 2 and ids.shape[0] == 1 and isinstance(tokens, np.ndarray):
        ids = ids[0]
    if ids.size == 0 and ids.ndim == 1:
        return np.empty(0, np.uint32)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise TokenIdError(
            f"token ids must be integers in one dimension, not {ids.dtype} of shape {ids.shape}: pass one prompt"
        )
    if ids.dtype != np.uint32:
        if int(ids.min()) < 0 or int(ids.max()) >= 2**32:
            raise TokenIdError("token ids must be from 0 to 2**32 - 1")
        ids = ids.astype(np.uint32)
    return np.require(ids, requirements=("C", "A"))
