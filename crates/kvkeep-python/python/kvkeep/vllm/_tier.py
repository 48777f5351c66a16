"""The tier itself: what vLLM's tiering asks, answered from kvkeep's index, and its jobs, done by kvkeep's threads.

Invariant: nothing here waits. A look-up reads an index in memory. A job is begun and later asked for. Each job ends once, by its deadline
at the latest, and one that failed is a miss for its request from then on, so that no request asks again for ever.

A load is one decision for all of a request's blocks. vLLM asks for one block after the other, so on the first question the whole run is
looked up, and judged: see `kvkeep._engines.worth`. Where vLLM does not say which blocks a request has (0.26), the load itself is judged, and refused.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from vllm.v1.kv_offload.base import LookupResult
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager

from kvkeep import _kvkeep
from kvkeep._engines.worth import RatesFile
from kvkeep.vllm import _compat, _identity, _metrics
from kvkeep.vllm._half import OneRequest, SchedulerHalf
from kvkeep.vllm._settings import Settings

_log = logging.getLogger(__name__)

_PROBE_FIRST = 1 << 62
"""Numbers of our own jobs: vLLM counts its from 0."""

_PROBE_BLOCKS = 16
_PROBE_EVERY = 16
"""Of the loads that are not worth it, each so many-th has a few blocks read into nowhere: the disk may be faster by now."""

_PLAN_SECONDS = 1.0
"""For so long a request that waits is not looked up again."""


@dataclass
class _Request(OneRequest):
    failed: set[bytes] = field(default_factory=set)
    """Blocks whose load failed: not asked for again."""
    run: dict[bytes, str] | None = None
    """Blocks that are there and worth it, and where, once that is known."""
    planned_at: float = 0.0
    could_pay: bool | None = None
    """Where its blocks are not known: is there any load that is worth it?"""
    declined: bool = False
    """Its load was judged, and is not worth it."""
    counted: bool = False
    touched: int = 0


@dataclass
class _Job:
    keys: list[bytes]
    req_id: str
    places: set[str] | None = None
    """Where a load reads; None of a store."""


class KvkeepTier(SchedulerHalf[_Request], SecondaryTierManager):
    """kvkeep's tiers under vLLM's `TieringOffloadingSpec`. Settings: `kvkeep.vllm._settings.Settings`."""

    _request_kind = _Request
    _engine: _kvkeep.EngineTier
    medium: ClassVar[Any] = _compat.MEDIUM

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        **settings: Any,
    ) -> None:
        self.settings = Settings.read(settings)
        _compat.begin(self, offloading_spec, primary_kv_view, tier_type, backpressure_detector, self.settings.locality)
        rows = np.asarray(primary_kv_view).view(np.uint8)
        if rows.ndim != 2 or not rows.size:
            raise ValueError("kvkeep: vLLM's RAM has no room for a single block: raise cpu_bytes_to_use")
        row_bytes = int(rows.shape[1])
        config = _compat.vllm_config()
        self._longest = int(config.model_config.max_model_len)
        namespace, identity = _identity.namespace(self.settings, config, offloading_spec, row_bytes)
        self._open(rows, namespace, config, offloading_spec)
        tokens = [tokens * offloading_spec.blocks_per_chunk for tokens in offloading_spec.tokens_per_block]
        self._begin(self.settings, config, row_bytes, tokens, RatesFile(self.settings.root / "rates.json", identity), identity)
        self._jobs: dict[int, _Job] = {}
        self._refused: list[JobResult] = []
        self._probes: dict[int, str] = {}
        self._probe_number, self._skipped = _PROBE_FIRST, 0

    def _open(self, rows: Any, namespace: _kvkeep.Namespace, config: Any, spec: Any) -> None:
        settings = self.settings
        behind = settings.tiers(config)
        times = (settings.load_timeout_s, settings.store_timeout_s, settings.flush_timeout_s)
        self._engine = _kvkeep.EngineTier(rows, namespace, behind, times, settings.tells(spec))
        _log.info(
            "kvkeep: %s; %d rows of %d bytes in RAM",
            ", ".join(f"{tier['entries']} blocks in {name}" for name, tier in self._engine.stats()["tiers"].items()),
            rows.shape[0],
            rows.shape[1],
        )

    # What vLLM asks.

    def lookup(self, key: Any, req_context: Any) -> LookupResult:
        request = self._request(req_context)
        if request.declined or key in request.failed:
            return LookupResult.MISS
        if request.run is None or time.monotonic() - request.planned_at > _PLAN_SECONDS:
            self._plan(request, key, req_context)
        if request.run is not None:
            return LookupResult.HIT if key in request.run else self._missing(request)
        name = self._name(key)
        if self._engine.places([name])[0] is None:
            return self._missing(request)
        if not self._could_pay(request):
            self._decline(request, [name])
            return LookupResult.MISS
        return LookupResult.HIT

    def _missing(self, request: _Request) -> LookupResult:
        """A miss, unless a store may still say that it is there: then all is looked up again."""
        if not self._waits_for_answer(request):
            return LookupResult.MISS
        request.run = None
        return LookupResult.RETRY

    def _plan(self, request: _Request, key: bytes, context: Any) -> None:
        """Looks up all that this request may ask for from this block on, and judges it."""
        positions = _compat.positions_of(context)
        if positions is None or key not in positions:
            return
        group, first = key[-4:], positions[key]
        tokens = self._tokens_of(key)
        keys = [other for other, end in positions.items() if other[-4:] == group and end >= first]
        places = self._engine.places([self._name(other) for other in keys])
        run = places.index(None) if None in places else len(places)
        # A window is asked for from its end: then one block stands for all before it.
        is_window = len(keys) == 1 and first > tokens
        begin = 0 if is_window else first - tokens
        request.planned_at = time.monotonic()
        request.run = self._there(positions, dict(zip(keys, places)))
        if run and not self._pays(request, begin, first + (run - 1) * tokens, (place for place in places[:run] if place)):
            request.run = {}
            self._decline(request, [self._name(other) for other in keys[:run]])

    def _there(self, positions: Any, known: dict[bytes, str | None]) -> dict[bytes, str]:
        """Of all blocks of a request, also those of other groups of layers."""
        rest = [other for other in positions if other not in known]
        known.update(zip(rest, self._engine.places([self._name(other) for other in rest]) if rest else []))
        return {key: place for key, place in known.items() if place is not None}

    def _could_pay(self, request: _Request) -> bool:
        if request.could_pay is None:
            always = self.settings.worth == "always" or request.hints.always_load
            request.could_pay = always or self.rates.could_pay(self._chunk_tokens[0], self._row_bytes, self._longest)
        return request.could_pay

    def _decline(self, request: _Request, names: list[bytes]) -> None:
        """These are there, and computing them is faster."""
        if not request.counted:
            request.counted = True
            self._own["not_worth"] += len(names)
            self._skipped += 1
            if self._skipped % _PROBE_EVERY == 0:
                self._probe(names)

    def _probe(self, names: list[bytes]) -> None:
        """Reads a few of these into nowhere, as many from the first on as are in one place."""
        names = names[:_PROBE_BLOCKS]
        places = self._engine.places(names)
        place = places[0]
        if place is not None:
            self._probe_number += 1
            self._probes[self._probe_number] = place
            self._engine.probe(self._probe_number, [name for name, other in zip(names, places) if other == place])

    def submit_store(self, job_metadata: Any) -> None:
        keys, rows = list(job_metadata.keys), _compat.rows_of(job_metadata)
        request = self._request(job_metadata.req_context)
        self._prefills.stored(job_metadata.req_context, keys)
        if not request.hints.store:
            self._refused.append(_compat.result(job_metadata.job_id, keys, keys, False, 0.0, self._row_bytes))
            return
        names = [self._name(key) for key in keys]
        self._keep(request, names)
        self._jobs[job_metadata.job_id] = _Job(keys, job_metadata.req_context.req_id)
        self._engine.store(job_metadata.job_id, names, rows, request.hints.ttl_s)

    def submit_load(self, job_metadata: Any) -> None:
        keys, rows = list(job_metadata.keys), _compat.rows_of(job_metadata)
        request = self._request(job_metadata.req_context)
        names = [self._name(key) for key in keys]
        known = request.run if request.run is not None else self._there(keys, {})
        places = [place for key in keys if (place := known.get(key)) is not None]
        if request.run is None and not self._pays(request, 0, len(keys) * self._chunk_tokens[0], places):
            request.declined = True
            self._decline(request, names)
            self._refused.append(_compat.result(job_metadata.job_id, (), keys, True, 0.0, self._row_bytes))
            return
        self._prefills.loaded(job_metadata.req_context.req_id)
        self._jobs[job_metadata.job_id] = _Job(keys, job_metadata.req_context.req_id, set(places))
        self._engine.load(job_metadata.job_id, names, rows)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        finished, self._refused = self._refused, []
        for job_id, kind, done, blocks, seconds in self._engine.ended():
            if kind == "probe":
                self._loaded({self._probes.pop(job_id)}, len(done), blocks, seconds)
            elif (job := self._jobs.pop(job_id, None)) is not None:
                finished.append(self._ended(job_id, job, done, seconds))
        return finished

    def _ended(self, job_id: int, job: _Job, done: list[int], seconds: float) -> JobResult:
        came = [job.keys[position] for position in done]
        if job.places is not None:
            self._own["hits"] += len(came)
            self._loaded(job.places, len(came), len(job.keys), seconds)
            request = self._requests.get(job.req_id)
            if request is not None:
                request.failed.update(set(job.keys).difference(came))
        elif came and not self.rates.measured:
            self._probe([self._name(key) for key in came])
        return _compat.result(job_id, came, job.keys, job.places is not None, seconds, self._row_bytes)

    def _loaded(self, places: set[str], came: int, blocks: int, seconds: float) -> None:
        """A measure of a tier, if all of it came from there."""
        if came == blocks and len(places) == 1:
            self.rates.loaded(*places, came * self._row_bytes, seconds)

    def touch(self, keys: Collection[Any], req_context: Any) -> None:
        """These are used, wherever they are. Asked at each step for as long as a request waits: once is enough."""
        request = self._request(req_context)
        if len(keys) > request.touched:
            request.touched = len(keys)
            names = [self._name(key) for key in keys]
            self._keep(request, names)
            if not request.hints.is_demoted:
                self._engine.touch(names)

    def _keep(self, request: _Request, names: list[bytes]) -> None:
        if request.hints.is_demoted:
            self._engine.release(names)
        elif request.hints.is_retained:
            self._engine.retain(names, request.hints.retain_s)

    def on_request_finished(self, req_context: Any) -> None:
        self._requests.pop(req_context.req_id, None)
        self._prefills.finish(req_context.req_id)

    def on_schedule_end(self, context: Any) -> None:
        self._prefills.step(context)

    def has_pending_work(self) -> bool:
        return bool(self._jobs or self._refused)

    def drain_jobs(self) -> None:
        """vLLM drops what it has in RAM: it sleeps, or has other weights. Then what is on the disk may be of the old ones."""
        self._engine.drain()
        if self._may_change:
            self._generation = np.random.default_rng().bytes(16)

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, Any]:
        return _metrics.definitions()

    def get_stats(self) -> Any:
        return self._figures.tell(self._stats(), self._own, self.rates)

    def shutdown(self) -> None:
        """Gives vLLM its memory back, and writes what was taken."""
        self._close()
