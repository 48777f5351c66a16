"""The storage backend itself: what SGLang's HiCache asks, answered from kvkeep's index, read and written by kvkeep's threads.

Invariant: every call is done by its deadline, and what it could not do is a miss. A page is said to be there only if it can be read now, and to have
come only if its checksum was right. Runs of pages end at the first one that is missing.

SGLang calls from threads of its own (one that looks up and reads, one that writes), so a call may wait for the disk; its scheduler never does.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolHitPolicy, PoolName, PoolTransfer, PoolTransferResult

from kvkeep import KvkeepError, _kvkeep
from kvkeep._engines import figures
from kvkeep._engines.identity import digest
from kvkeep._engines.worth import RatesFile
from kvkeep.sglang import _engine, _identity, _settings
from kvkeep.sglang._metrics import Metrics
from kvkeep.sglang._pager import Pager, record_bytes
from kvkeep.sglang._pages import Page, Pool, is_logical

_log = logging.getLogger(__name__)

_PROBE_EVERY, _PROBE_PAGES = 16, 16
"""Of the loads that are not worth it, each so many-th has a few pages read into nowhere: the disk may be faster by now."""


class KvkeepStorage(HiCacheStorage):  # type: ignore[misc]
    """kvkeep's tiers under SGLang's HiCache. Settings: `kvkeep.sglang._settings.Settings`."""

    def __init__(self, storage_config: Any, kwargs: Any = None) -> None:
        extra = dict(storage_config.extra_config or {})
        self.settings = _settings.read(extra)
        if storage_config.should_split_heads:
            raise ValueError("kvkeep: tp_lcm_size is for a store that other ranks read: leave it out")
        self._is_flat = not extra.get("interface_v1")
        self._place = _engine.place(storage_config)
        self.settings.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.identity = self._identify(storage_config)
        if not _engine.watch_weights():
            _log.warning("kvkeep: this SGLang does not say when its weights change: clear the backend after you changed them")
        if storage_config.is_mla_model:
            # All ranks have the same KV, and SGLang has the first one alone write it. Here each rank reads a folder of its own.
            storage_config.is_mla_model = False
        self._file = RatesFile(self.settings.root / "rates.json", f"{self.identity} {self._place}")
        self.rates = self._file.read(self.settings.guess)
        self._metrics = Metrics(storage_config)
        self._own = {"hits": 0, "not_worth": 0}
        self._skipped = 0
        self._pools: dict[str, Pool] = {}
        self._pager: Pager | None = None
        self._is_closed = False
        self._opening = threading.Lock()

    def _identify(self, storage_config: Any) -> str:
        began = time.monotonic()
        arguments = _engine.arguments(storage_config.model_name)
        parts = _identity.describe(arguments, storage_config, self.settings.weights, self.settings.root / "weights.json")
        self._model = str(arguments.get("model_path"))
        identity = digest(parts)
        _log.info("kvkeep: identity %s in %.1f s", identity[:16], time.monotonic() - began)
        return identity

    # The pools, and the folder.

    def on_host_pools_registered(self) -> None:
        """All pools are known: now it is clear how large a record is to be. What is wrong with the folder is said here."""
        self._opened()

    def _opened(self) -> Pager:
        with self._opening:
            if self._is_closed:
                raise RuntimeError("kvkeep: this backend is closed: attach it again")
            if self._pager is None:
                self._pager = self._open()
            return self._pager

    def _open(self) -> Pager:
        record = record_bytes([pool.page_bytes for pool in self._known_pools()])
        dims = (1, 1, record // 2, record // 2, 1)
        code = _kvkeep.DTYPES.index("u8")
        namespace = _kvkeep.Namespace(self._model, dims, code, False, (self.identity, "sglang", "", self.settings.salt))
        pager = Pager(f"kv-{self._place}", record, namespace, self.settings, self.rates.loaded)
        there = ", ".join(f"{tier['entries']} records in {name}" for name, tier in pager.stats()["tiers"].items())
        _log.info("kvkeep: %s; records have %d bytes", there, record)
        return pager

    def _known_pools(self) -> list[Pool]:
        anchor = getattr(self, "mem_pool_host", None)
        names = [str(name) for name in getattr(self, "registered_pools", ())]
        if anchor is not None and not is_logical(anchor):
            names = list(dict.fromkeys([str(PoolName.KV), *names]))
        pools = [pool for name in names if (pool := self._pool(name)) is not None]
        if not pools:
            raise RuntimeError("kvkeep: there is no host pool yet: SGLang registers it before it stores anything (register_mem_pool_host)")
        return pools

    def _pool(self, name: str) -> Pool | None:
        """None of one that holds nothing itself."""
        if name not in self._pools:
            host_pool = self.mem_pool_host if name == PoolName.KV else self.registered_pools[name]
            if is_logical(host_pool):
                return None
            self._pools[name] = Pool(name, host_pool, self._is_flat and name == PoolName.KV)
        return self._pools[name]

    # What is there.

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        return int(self.batch_exists_v2(keys, None, extra_info).kv_hit_pages)

    def batch_exists_v2(self, keys: list[str], pool_transfers: list[PoolTransfer] | None = None, extra_info: Any = None) -> PoolTransferResult:
        pager, transfers = self._opened(), pool_transfers or []
        kv = self._pool(PoolName.KV)
        there = self._there(pager, kv, keys)
        pages = _run(there)
        found: dict[str, int] = {PoolName.KV: pages} if pages else {}
        restorable = list(range(1, pages + 1))
        for transfer in transfers:
            hits, allowed = self._of_pool(pager, keys[:pages], transfer)
            if hits:
                found[transfer.name] = hits
            restorable = [length for length in restorable if length in allowed]
        if not restorable:
            return PoolTransferResult(0, found, [])
        return self._judged(pager, keys[: restorable[-1]], transfers, extra_info, PoolTransferResult(restorable[-1], found, restorable))

    def _there(self, pager: Pager, pool: Pool | None, keys: Sequence[str]) -> list[bool]:
        return [True] * len(keys) if pool is None else pager.has(self._named(pool, keys))

    def _of_pool(self, pager: Pager, keys: Sequence[str], transfer: PoolTransfer) -> tuple[int, Sequence[int]]:
        """Of a pool beside the KV: how far it reaches, and the lengths of a prefix that it allows."""
        pool = self._pool(transfer.name)
        if transfer.hit_policy == PoolHitPolicy.BLOCK_GROUPS:
            # Its keys are those of whole groups, each of which stands for a block of pages. It forbids nothing.
            group = max(1, transfer.group_pages)
            return min(len(keys), _run(self._there(pager, pool, transfer.keys or [])) // group * transfer.block_pages), range(len(keys) + 1)
        there = self._there(pager, pool, keys)
        if transfer.hit_policy == PoolHitPolicy.ALL_PAGES:
            return _run(there), range(1, _run(there) + 1)
        window = max(1, len(transfer.keys or ()))
        allowed = [length for length in range(1, len(keys) + 1) if all(there[max(0, length - window) : length])]
        return max(allowed, default=0), allowed

    def _judged(self, pager: Pager, keys: Sequence[str], transfers: Sequence[PoolTransfer], extra_info: Any, found: PoolTransferResult) -> PoolTransferResult:
        """What is there, unless computing it is faster."""
        loads = [(self._pool(PoolName.KV), keys), *((self._pool(transfer.name), _loaded(keys, transfer)) for transfer in transfers)]
        pages = [page for pool, loaded in loads if pool is not None for page in self._named(pool, loaded)]
        page_tokens = self.mem_pool_host.page_size
        before = len(getattr(extra_info, "prefix_keys", None) or ()) * page_tokens
        pager.take_probes()
        if self._pays(pager, before, before + len(keys) * page_tokens, pages):
            pager.touch(pages)
            return found
        self._own["not_worth"] += len(keys)
        self._skipped += 1
        if self._skipped % _PROBE_EVERY == 1:
            pager.probe(pages[:_PROBE_PAGES])
        return PoolTransferResult(0, found.extra_pool_hit_pages, [])

    def _pays(self, pager: Pager, first: int, end: int, pages: Sequence[tuple[bytes, int]]) -> bool:
        """Where nobody has said how fast the engine computes, every load is made: SGLang's own policy says how long it waits."""
        return not self._is_judging or self.rates.pays(first, end, pager.sizes(pages))

    @property
    def _is_judging(self) -> bool:
        return self.settings.worth != "always" and self.settings.prefill_tokens_per_s is not None

    # What is read and written: pages where SGLang has them.

    def batch_get_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        return self._move("prefetch", PoolName.KV, keys, host_indices)

    def batch_set_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        return self._move("backup", PoolName.KV, keys, host_indices)

    def batch_get_v2(self, transfers: list[PoolTransfer], extra_info: Any = None) -> dict[str, list[bool]]:
        return {transfer.name: self._move("prefetch", transfer.name, transfer.keys or [], transfer.host_indices) for transfer in transfers}

    def batch_set_v2(self, transfers: list[PoolTransfer], extra_info: Any = None) -> dict[str, list[bool]]:
        return {transfer.name: self._move("backup", transfer.name, transfer.keys or [], transfer.host_indices) for transfer in transfers}

    def _move(self, kind: str, name: str, keys: Sequence[str], indices: Any) -> list[bool]:
        pager, pool = self._opened(), self._pool(name)
        if pool is None or not keys:
            return [True] * len(keys)
        if not pool.is_flat:
            return self._transfer(pager, kind, pool, pool.pages(self._keys(keys), indices))
        starts = pool.starts(keys, indices)
        if kind == "backup":
            tensors = [pool.host_pool.get_data_page(start, flat=True).contiguous() for start in starts]
            return self._transfer_flat(kind, pool, keys, tensors)
        tensors = [pool.host_pool.get_dummy_flat_data_page() for _ in keys]
        came = self._transfer_flat(kind, pool, keys, tensors)
        for start, tensor, has_come in zip(starts, tensors, came):
            if has_come:
                pool.host_pool.set_from_flat_data_page(start, tensor)
        return came

    # What is read and written: pages as tensors.

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> torch.Tensor | None:
        return self.batch_get([key], [target_location])[0]

    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> list[torch.Tensor | None]:
        pool = self._flat_pool()
        given = list(target_locations) if target_locations is not None else [None] * len(keys)
        tensors = [pool.host_pool.get_dummy_flat_data_page() if tensor is None else tensor for tensor in given]
        came = self._transfer_flat("prefetch", pool, keys, tensors)
        return [tensor if has_come else None for tensor, has_come in zip(tensors, came)]

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        return self.batch_set([key], [value])

    def batch_set(self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None) -> bool:
        return all(self._transfer_flat("backup", self._flat_pool(), keys, [value.contiguous() for value in values]))

    def _flat_pool(self) -> Pool:
        self._opened()
        pool = self._pool(PoolName.KV)
        if pool is None or not pool.is_flat:
            raise ValueError("kvkeep: with interface_v1 pages are read and written where SGLang has them, not as tensors: leave interface_v1 out for those")
        return pool

    def _transfer_flat(self, kind: str, pool: Pool, keys: Sequence[str], tensors: Sequence[torch.Tensor]) -> list[bool]:
        pages = [pool.flat_page(key, tensor) for key, tensor in zip(self._keys(keys), tensors)]
        return self._transfer(self._opened(), kind, pool, pages)

    def _transfer(self, pager: Pager, kind: str, pool: Pool, pages: Sequence[Page]) -> list[bool]:
        move: Callable[[Sequence[Page]], list[bool]] = pager.read if kind == "prefetch" else pager.write
        sizes = pager.sizes([(page.name, pool.page_bytes) for page in pages]) if kind == "prefetch" and self._is_judging else {}
        began = time.monotonic()
        moved = move(pages)
        seconds, count = time.monotonic() - began, sum(moved)
        self._metrics.transferred(kind, count, count * pool.page_bytes, seconds)
        if kind == "prefetch":
            self._own["hits"] += count
            if count == len(pages) and len(sizes) == 1:
                self.rates.loaded(*sizes, count * pool.page_bytes, seconds)
        return moved

    # Figures, and the end.

    def get_stats(self) -> Any:
        return self._metrics.tell(self._figures)

    def _figures(self) -> tuple[dict[str, float], dict[str, int]]:
        engine = self._opened().stats()
        return figures.gauges(engine, self.rates), figures.counters(engine, self._own)

    def counters(self) -> dict[str, int]:
        """All counters as of now, for tests and logs."""
        return self._figures()[1]

    def clear(self) -> None:
        """All pages of this process are gone, also for the next one, and for those that share them."""
        with self._opening:
            if self._pager is not None:
                self._pager.clear()
            self._let_go()
            shutil.rmtree(self.settings.root / f"kv-{self._place}", ignore_errors=True)
            self._pager = self._open()

    def close(self) -> None:
        """Writes what was taken, and lets go of the folder."""
        with self._opening:
            self._is_closed = True
            self._let_go()
        try:
            self._file.write(replace(self.rates))
        except OSError as error:
            _log.info("kvkeep: the measured rates were not saved: %s", error)

    def _let_go(self) -> None:
        pager, self._pager = self._pager, None
        if pager is not None:
            try:
                pager.close()
            except KvkeepError as error:
                _log.warning("kvkeep: a tier was not closed cleanly: %s", error)

    # Names.

    def _keys(self, keys: Sequence[str]) -> list[str]:
        """SGLang's, of the weights as they are now."""
        generation = _engine.generation()
        return [f"{generation} {key}" for key in keys] if generation else list(keys)

    def _named(self, pool: Pool, keys: Sequence[str]) -> list[tuple[bytes, int]]:
        return [(pool.name(key), pool.page_bytes) for key in self._keys(keys)]


def _loaded(keys: Sequence[str], transfer: PoolTransfer) -> Sequence[str]:
    """Which pages of a pool are loaded with a prefix: all, or the last ones of it."""
    return keys[-max(1, len(transfer.keys or ())) :] if transfer.hit_policy == PoolHitPolicy.TRAILING_PAGES else keys


def _run(there: Sequence[bool]) -> int:
    """How many are there from the first one on, without a gap."""
    return there.index(False) if False in there else len(there)
