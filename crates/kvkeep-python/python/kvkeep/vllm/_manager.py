"""vLLM's RAM tier and the disk below it as one cache of kvkeep's: what vLLM's scheduler asks, and is told.

Invariant: nothing here waits, and a hit is said only of bytes that are in RAM, were written or checked, and stay there until vLLM has taken them:
a transfer that fails ends vLLM's engine. So each hit holds its block for the step, what comes up from the disk is asked for again until it is there,
and rows under a copy are given back only when that copy has ended, also where vLLM has forgotten it.

vLLM's own manager over a policy of ours was the alternative: then RAM and disk are two caches, each block is copied once more on its way down, and
what is evicted knows nothing of what is below.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.kv_offload.base import LookupResult, OffloadingManager, PrepareStoreOutput

from kvkeep import _kvkeep
from kvkeep._engines.worth import RatesFile
from kvkeep.vllm import _compat
from kvkeep.vllm._half import OneRequest, SchedulerHalf
from kvkeep.vllm._settings import Settings

_PROBE_BLOCKS = 16
_PROBE_EVERY = 16
"""Of the loads that are not worth it, the first and each so many-th has a few blocks read into nowhere."""

_PROBE_SECONDS = 0.5
"""As long as no tier is measured, it is tried so often."""

_KEPT_SECONDS = 1.0
"""For so long what came up for a request stays in RAM whatever happens. Then it is like everything else there."""


@dataclass
class _Request(OneRequest):
    known: dict[bytes, None] = field(default_factory=dict)
    """Its blocks as far as vLLM has named them, in order."""
    is_noted: bool = False
    """Has the policy heard of it?"""
    hits: dict[bytes, _kvkeep.EngineHeld] = field(default_factory=dict)
    """What was said to be there in this step."""
    places: dict[bytes, str | None] = field(default_factory=dict)
    """Where its blocks are behind RAM, as of this step."""
    wanted: dict[bytes, str] = field(default_factory=dict)
    """What is behind RAM, in order, and was asked for in this step."""
    coming: tuple[int, list[bytes]] | None = None
    """What is on its way up: number and blocks."""
    came: tuple[_kvkeep.EngineHeld, float] | None = None
    fetched: set[bytes] = field(default_factory=set)
    """What was on its way once: a second time it is computed."""
    declined: bool = False
    """What is behind RAM is not worth it."""


@dataclass
class _Fetch:
    """Blocks on their way up."""

    req_id: str
    since: float
    places: set[str]


@dataclass
class _Store:
    """Blocks that the workers write."""

    begun: list[_kvkeep.EngineBegun]
    keys: list[bytes]


class KvkeepManager(SchedulerHalf[_Request], OffloadingManager):
    """The scheduler's half of `KvkeepOffloadingSpec`."""

    _request_kind = _Request
    _engine: _kvkeep.EngineRam

    def __init__(
        self,
        engine: _kvkeep.EngineRam,
        settings: Settings,
        config: Any,
        row_bytes: int,
        chunk_tokens: list[int],
        file: RatesFile,
        identity: str,
        closed: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine, self._closed = engine, closed
        self._begin(settings, config, row_bytes, chunk_tokens, file, identity)
        self._asked: dict[str, _Request] = {}
        """Those that were asked for in this step."""
        self._fetches: dict[int, _Fetch] = {}
        self._fetch = 0
        self._loads: dict[str, list[tuple[frozenset[bytes], list[Any]]]] = {}
        self._stores: dict[bytes, _Store] = {}
        self._forgotten: list[tuple[int, list[Any]]] = []
        self._steps, self._steps_in_flight = 0, _compat.steps_in_flight(config)
        self._late = self._declined = 0
        self._probed_at = 0.0
        self._written: list[bytes] = []
        """Some of what was stored last."""

    # What is there.

    def lookup(self, key: Any, req_context: Any) -> LookupResult:
        request = self._request(req_context)
        self._asked[req_context.req_id] = request
        self._collect()
        if request.coming is not None:
            return LookupResult.RETRY
        name, positions = self._name(key), _compat.positions_of(req_context)
        if positions and not request.is_noted:
            self._note(request, list(positions))
        request.known[key] = None
        if name in self._stores:
            return LookupResult.HIT_PENDING
        held = self._engine.hold([name])
        if held is not None:
            request.hits[key] = held
            return LookupResult.HIT
        if req_context.req_id not in self._requests or request.declined or key in request.fetched:
            return LookupResult.MISS
        place = self._place(request, key, positions or ())
        if place is not None:
            request.wanted[key] = place
        elif not self._waits_for_answer(request):
            return LookupResult.MISS
        return LookupResult.RETRY

    def _place(self, request: _Request, key: bytes, positions: Collection[bytes]) -> str | None:
        """Where a block is behind RAM. The first question is one for all of its request: a daemon is asked once a step."""
        if key not in request.places:
            keys = list(dict.fromkeys([key, *positions]))
            request.places = dict(zip(keys, self._engine.places([self._name(other) for other in keys])))
        return request.places[key]

    def get_load_source(self, key: Any, req_context: Any) -> Any:
        return _compat.source(from_disk=key in self._request(req_context).fetched)

    def _decide(self, request: _Request, context_id: str) -> None:
        """Begins to bring up what is on the disk, if that is faster than computing it."""
        wanted, request.wanted = request.wanted, {}
        keys, places = list(wanted), list(wanted.values())
        first, end = self._span(request, keys)
        if not self._pays(request, first, end, places):
            request.declined = True
            self._own["not_worth"] += len(keys)
            if self._declined % _PROBE_EVERY == 0:
                self._probe([self._name(key) for key in keys])
            self._declined += 1
            return
        self._fetch += 1
        self._engine.fetch(self._fetch, [self._name(key) for key in keys])
        self._fetches[self._fetch] = _Fetch(context_id, time.monotonic(), set(places))
        request.coming, request.fetched = (self._fetch, keys), request.fetched | set(keys)

    def _probe(self, names: list[bytes]) -> bool:
        """How fast is the tier where the first of these is? It may be faster by now, or nobody has measured it yet. False if none is anywhere."""
        names = names[:_PROBE_BLOCKS]
        places = self._engine.places(names)
        place = next(filter(None, places), None)
        if place is not None:
            self._engine.probe(place, [name for name, other in zip(names, places) if other == place])
        return place is not None

    def _span(self, request: _Request, keys: list[bytes]) -> tuple[int, int]:
        """The tokens that are computed if these are not loaded."""
        group = keys[0][-4:]
        tokens = self._tokens_of(keys[0])
        ours = [key for key in request.known if key[-4:] == group]
        first = ours.index(keys[0]) if keys[0] in ours else 0
        return first * tokens, (first + sum(key[-4:] == group for key in keys)) * tokens

    def _collect(self) -> None:
        """What has come up, for whoever waits for it; and who waits no longer."""
        if not self._fetches:
            return
        now = time.monotonic()
        for number, seconds, held in self._engine.fetched():
            fetch, blocks = self._fetches.pop(number, None), len(held.rows)
            request = self._requests.get(fetch.req_id) if fetch is not None else None
            if fetch is None or request is None or request.coming is None or request.coming[0] != number:
                continue
            self._own["hits"] += blocks
            if blocks == len(request.coming[1]) and len(fetch.places) == 1:
                self.rates.loaded(*fetch.places, blocks * self._row_bytes, seconds)
            request.coming, request.came = None, (held, now)
        for number, fetch in list(self._fetches.items()):
            if now - fetch.since > self.settings.load_timeout_s:
                self._late += 1
                del self._fetches[number]
                request = self._requests.get(fetch.req_id)
                if request is not None and request.coming is not None and request.coming[0] == number:
                    request.coming = None

    # From RAM to the device.

    def prepare_load(self, keys: Collection[Any], req_context: Any) -> Any:
        request = self._request(req_context)
        # What is held already: it may have expired since.
        held = [request.hits.get(key) or self._engine.hold([self._name(key)]) for key in keys]
        rows = [one.rows[0] for one in held if one is not None]
        if len(rows) < len(held):
            raise RuntimeError("kvkeep: vLLM loads blocks that it was not told to be there in this step")
        if not request.is_noted:
            self._note(request, list(request.known))
        self._prefills.loaded(req_context.req_id)
        self._loads.setdefault(req_context.req_id, []).append((frozenset(keys), held))
        request.hits, request.came = {}, None
        return _compat.rows_spec(rows)

    def complete_load(self, keys: Collection[Any], req_context: Any) -> None:
        loads = self._loads.get(req_context.req_id, [])
        keys = frozenset(keys)
        for position, (loaded, _) in enumerate(loads):
            if loaded == keys:
                del loads[position]
                break
        if not loads:
            self._loads.pop(req_context.req_id, None)

    def touch(self, keys: Collection[Any], req_context: Any) -> None:
        """These are used, wherever they are. Some releases say so at each step for as long as a request waits."""
        request = self._request(req_context)
        request.known.update(dict.fromkeys(keys))
        if not request.is_noted:
            self._note(request, list(request.known))

    def _note(self, request: _Request, keys: list[bytes]) -> None:
        """The policy hears of each request once, with all of its blocks."""
        request.is_noted = True
        request.known.update(dict.fromkeys(keys))
        tell = self._engine.release if request.hints.is_demoted else self._engine.note
        for group in dict.fromkeys(key[-4:] for key in keys):
            tell([self._name(key) for key in keys if key[-4:] == group])

    # From the device to RAM, and on to the disk.

    def prepare_store(self, keys: Collection[Any], req_context: Any) -> PrepareStoreOutput | None:
        request, keys = self._request(req_context), list(keys)
        if not request.hints.store:
            return _output([], [])
        new = [key for key in keys if self._name(key) not in self._stores]
        begun, rows, refused = [], {}, 0
        for group in dict.fromkeys(key[-4:] for key in new):
            ours = [key for key in new if key[-4:] == group]
            before = self._before(request, ours[0])
            names = [self._name(key) for key in (*before, *ours)]
            one = self._engine.begin(names, len(before), request.hints.ttl_s, request.hints.is_retained)
            begun.append(one)
            refused += one.refused
            rows.update((ours[position - len(before)], row) for position, row in zip(one.positions, one.rows))
        request.known.update(dict.fromkeys(keys))
        if not rows:
            return None if refused else _output([], [])
        stored = [key for key in keys if key in rows]
        store = _Store(begun, stored)
        self._stores.update((self._name(key), store) for key in stored)
        return _output(stored, [rows[key] for key in stored])

    def _before(self, request: _Request, key: bytes) -> list[bytes]:
        """The blocks of a request before this one, as far as they are known."""
        before: list[bytes] = []
        for other in request.known:
            if other == key:
                break
            if other[-4:] == key[-4:]:
                before.append(other)
        return before

    def complete_store(self, keys: Collection[Any], req_context: Any, success: bool = True) -> None:
        stores = {id(store): store for key in keys if (store := self._stores.get(self._name(key))) is not None}
        for store in stores.values():
            for one in store.begun:
                one.end() if success else one.abandon()
            for key in store.keys:
                self._stores.pop(self._name(key), None)
        if success:
            stored = [key for store in stores.values() for key in store.keys]
            request = self._requests.get(req_context.req_id)
            if request is not None and request.hints.is_retained:
                self._engine.retain([self._name(key) for key in stored], request.hints.retain_s)
            self._prefills.stored(req_context, stored)
            self._written = [self._name(key) for key in stored[:_PROBE_BLOCKS]] or self._written

    # Requests and steps.

    def on_request_finished(self, req_context: Any) -> None:
        request = self._requests.pop(req_context.req_id, None)
        self._asked.pop(req_context.req_id, None)
        self._prefills.finish(req_context.req_id)
        if request is not None and not request.is_noted:
            self._note(request, list(_compat.positions_of(req_context) or request.known))

    def on_schedule_end(self, context: Any) -> None:
        self._steps += 1
        for tier, came, wanted, seconds in self._engine.probed():
            if came == wanted:
                self.rates.loaded(tier, came * self._row_bytes, seconds)
        now = time.monotonic()
        if self._written and not self.rates.measured and now - self._probed_at > _PROBE_SECONDS:
            # It is on its way down, or there.
            self._probed_at = now if self._probe(self._written) else self._probed_at
        self._prefills.step(context)
        self._collect()
        asked, self._asked = self._asked, {}
        for req_id, request in asked.items():
            request.hits, request.places = {}, {}
            if request.wanted and req_id in self._requests:
                self._decide(request, req_id)
        for request in self._requests.values():
            if request.came is not None and now - request.came[1] > _KEPT_SECONDS:
                request.came = None
        while self._forgotten and self._forgotten[0][0] <= self._steps:
            for handle in self._forgotten.pop(0)[1]:
                if isinstance(handle, _kvkeep.EngineBegun):
                    handle.abandon()

    def has_pending_work(self) -> bool:
        self._collect()
        return bool(self._fetches)

    def reset_cache(self) -> None:
        """vLLM forgets every block, and the copies that are under way, but not the workers: their rows are kept until those steps have ended.

        What is on the disk stays true, unless the engine's weights may have changed.
        """
        handles: list[Any] = [held for loads in self._loads.values() for _, held in loads]
        handles += [one for store in {id(store): store for store in self._stores.values()}.values() for one in store.begun]
        self._forgotten.append((self._steps + self._steps_in_flight, handles))
        self._loads, self._stores, self._fetches, self._asked = {}, {}, {}, {}
        for request in self._requests.values():
            request.hits, request.places, request.wanted, request.coming, request.came = {}, {}, {}, None, None
        self._engine.evict_all(self.settings.flush_timeout_s)
        if self._may_change:
            self._generation = secrets.token_bytes(16)

    def get_stats(self) -> Any:
        return self._figures.tell(self._stats(), self._own, self.rates, ram=True)

    def _stats(self) -> dict[str, Any]:
        stats = self._engine.stats()
        return stats | {"jobs_late_total": stats["jobs_late_total"] + self._late}

    def shutdown(self) -> None:
        """Writes what is in RAM and not on the disk. Rows under a copy are not used again: they go when this process does."""
        self._close()
        for store in self._stores.values():
            for one in store.begun:
                one.abandon()
        self._requests, self._stores, self._loads, self._forgotten = {}, {}, {}, []
        self._closed()


def _output(keys: list[Any], rows: list[int]) -> PrepareStoreOutput:
    return PrepareStoreOutput(keys_to_store=keys, store_spec=_compat.rows_spec(rows), evicted_keys=[])
