"""The tier itself: what vLLM's tiering asks, answered from kvkeep's index, and its jobs, done by kvkeep's threads.

Invariant: nothing here waits. A look-up reads an index in memory. A job is begun and later asked for. Each job ends once, by its deadline
at the latest, and one that failed is a miss for its request from then on, so that no request asks again for ever.

A load is one decision for all of a request's blocks. vLLM asks for one block after the other, so on the first question the whole run is
looked up, and judged: see `kvkeep._engines.worth`. Where vLLM does not say which blocks a request has (0.26), the load itself is judged, and refused.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from vllm.v1.kv_offload.base import LookupResult, RequestOffloadingContext
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager

from kvkeep import KvkeepError, _kvkeep
from kvkeep._engines import figures
from kvkeep._engines.identity import digest
from kvkeep._engines.worth import Rates, RatesFile
from kvkeep.vllm import _compat, _hints, _identity, _metrics
from kvkeep.vllm._settings import Settings

_log = logging.getLogger(__name__)

_PROBE_FIRST = 1 << 62
"""Numbers of our own jobs: vLLM counts its from 0."""

_PROBE_BLOCKS = 16
_PROBE_EVERY = 16
"""Of the loads that are not worth it, each so many-th has a few blocks read into nowhere: the disk may be faster by now."""

_PLAN_SECONDS = 1.0
"""For so long a request that waits is not looked up again."""

_SAVE_SECONDS = 30.0
_STEPS_KEPT = 64
"""Steps of a request whose ends are known: more than a prompt is cut into."""
_ENDED_KEPT = 64
"""Requests that have ended, and whose blocks may still come to be stored."""


@dataclass
class _Request:
    """What is known of a request while it lives."""

    hints: _hints.Hints
    failed: set[bytes] = field(default_factory=set)
    """Blocks whose load failed: not asked for again."""
    run: set[bytes] | None = None
    """Blocks that are there and worth it, once that is known."""
    planned_at: float = 0.0
    could_pay: bool | None = None
    """Where its blocks are not known: is there any load that is worth it?"""
    declined: bool = False
    """Its load was judged, and is not worth it."""
    counted: bool = False
    touched: int = 0
    scheduled_at: float | None = None
    """When its first step began; None again once it is no longer a measure."""
    step_ends: list[float] = field(default_factory=list)
    """When that step and those after it had ended. Blocks come to be stored later: behind a copy to RAM, or when the
    next request comes."""
    computed_tokens: int = 0


@dataclass
class _Job:
    keys: list[bytes]
    is_load: bool
    req_id: str


class KvkeepTier(SecondaryTierManager):
    """kvkeep's disk under vLLM's `TieringOffloadingSpec`. Settings: `kvkeep.vllm._settings.Settings`."""

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
        self._row_bytes = int(rows.shape[1])
        self._chunk_tokens = [tokens * offloading_spec.blocks_per_chunk for tokens in offloading_spec.tokens_per_block]
        config = _compat.vllm_config()
        self._longest = int(config.model_config.max_model_len)
        namespace = self._namespace(config, offloading_spec)
        self._open(rows, namespace, config, offloading_spec)
        self._requests: dict[str, _Request] = {}
        self._ended_requests: dict[str, _Request] = {}
        self._step_tokens, self._steps_ahead = _compat.steps_of(config)
        self._jobs: dict[int, _Job] = {}
        self._refused: list[JobResult] = []
        self._own = {"hits": 0, "not_worth": 0}
        self._figures = _metrics.Figures()
        self._probes, self._skipped = _PROBE_FIRST, 0
        self._generation = b""
        self._may_change = bool(getattr(config.model_config, "enable_sleep_mode", False) or getattr(config, "weight_transfer_config", None))

    def _namespace(self, config: Any, spec: Any) -> _kvkeep.Namespace:
        root = self.settings.root
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        if "xxhash" in str(config.cache_config.prefix_caching_hash_algo):
            raise ValueError("kvkeep: xxhash has collisions, and one would be another prompt's KV: set --prefix-caching-hash-algo sha256")
        _identity.fix_seed()
        known = root / "weights.json"
        if config.lora_config is not None and not _identity.cover_adapters(known):
            raise ValueError("kvkeep: this vLLM does not say which adapter a request uses: serve it without --enable-lora, or without kvkeep")
        began = time.monotonic()
        parts = _identity.describe(config, spec, self._row_bytes, self.settings.weights, known)
        self.identity = digest(parts)
        _log.info("kvkeep: identity %s in %.1f s", self.identity[:16], time.monotonic() - began)
        dims = (1, 1, self._row_bytes // 2, self._row_bytes // 2, 1)
        salt = self.settings.salt
        code = _kvkeep.DTYPES.index("u8")
        return _kvkeep.Namespace(config.model_config.model, dims, code, False, (self.identity, "vllm", "", salt))

    def _open(self, rows: Any, namespace: _kvkeep.Namespace, config: Any, spec: Any) -> None:
        settings = self.settings
        replica = int(getattr(config.parallel_config, "data_parallel_index", 0) or 0)
        root = str(settings.root / f"kv-{replica}")
        disk = (root, settings.capacity_bytes, settings.queue_bytes, settings.key_file, settings.codec)
        times = (settings.load_timeout_s, settings.store_timeout_s, settings.flush_timeout_s)
        self._events = settings.enable_kv_events and spec.kv_events_config.enable_kv_cache_events
        self._engine = _kvkeep.EngineTier(rows, namespace, disk, times, self._events)
        guess = Rates(settings.prefill_tokens_per_s, disk_bytes_per_s=settings.disk_gb_per_s * (1 << 30))
        self._file = RatesFile(settings.root / "rates.json", self.identity)
        self.rates = self._file.read(guess)
        self._saved, self._saved_at = replace(self.rates), time.monotonic()
        _log.info(
            "kvkeep: %s, %d blocks on the disk, %d rows of %d bytes in RAM",
            disk[0],
            self._engine.stats()["disk"]["entries"],
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
            return LookupResult.HIT if key in request.run else LookupResult.MISS
        return LookupResult.HIT if self._could_pay(request) and self._engine.has([self._name(key)])[0] else LookupResult.MISS

    def _plan(self, request: _Request, key: bytes, context: Any) -> None:
        """Looks up all that this request may ask for from this block on, and judges it."""
        positions = _compat.positions_of(context)
        if positions is None or key not in positions:
            return
        group, first = key[-4:], positions[key]
        tokens = self._tokens_of(key)
        keys = [other for other, end in positions.items() if other[-4:] == group and end >= first]
        there = self._engine.has([self._name(other) for other in keys])
        run = there.index(False) if False in there else len(there)
        # A window is asked for from its end: then one block stands for all before it.
        is_window = len(keys) == 1 and first > tokens
        begin = 0 if is_window else first - tokens
        request.planned_at = time.monotonic()
        request.run = {other for other, is_there in zip(positions, self._all_there(positions, keys, there)) if is_there}
        if run and not self._pays(request, begin, first + (run - 1) * tokens, run):
            request.run = set()
            self._decline(request, [self._name(other) for other in keys[:run]])

    def _all_there(self, positions: Any, keys: list[bytes], there: list[bool]) -> list[bool]:
        """Of all blocks of a request, also those of other groups of layers."""
        known = dict(zip(keys, there))
        rest = [other for other in positions if other not in known]
        known.update(zip(rest, self._engine.has([self._name(other) for other in rest]) if rest else []))
        return [known[other] for other in positions]

    def _pays(self, request: _Request, first: int, end: int, blocks: int) -> bool:
        if self.settings.worth == "always" or request.hints.always_load:
            return True
        return self.rates.pays(first, end, blocks * self._row_bytes)

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
        self._probes += 1
        self._engine.probe(self._probes, names[:_PROBE_BLOCKS])

    def submit_store(self, job_metadata: Any) -> None:
        keys, rows = list(job_metadata.keys), _compat.rows_of(job_metadata)
        request = self._request(job_metadata.req_context)
        self._measure(request, keys, job_metadata.req_context)
        if not request.hints.store:
            self._refused.append(_compat.result(job_metadata.job_id, keys, keys, False, 0.0, self._row_bytes))
            return
        names = [self._name(key) for key in keys]
        self._keep(request, names)
        self._jobs[job_metadata.job_id] = _Job(keys, False, job_metadata.req_context.req_id)
        self._engine.store(job_metadata.job_id, names, rows, request.hints.ttl_s)

    def submit_load(self, job_metadata: Any) -> None:
        keys, rows = list(job_metadata.keys), _compat.rows_of(job_metadata)
        request = self._request(job_metadata.req_context)
        names = [self._name(key) for key in keys]
        if request.run is None and not self._pays(request, 0, len(keys) * self._chunk_tokens[0], len(keys)):
            request.declined = True
            self._decline(request, names)
            self._refused.append(_compat.result(job_metadata.job_id, (), keys, True, 0.0, self._row_bytes))
            return
        self._jobs[job_metadata.job_id] = _Job(keys, True, job_metadata.req_context.req_id)
        self._engine.load(job_metadata.job_id, names, rows)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        finished, self._refused = self._refused, []
        for job_id, kind, done, blocks, seconds in self._engine.ended():
            if kind == "probe":
                self._loaded(len(done), blocks, seconds)
            elif (job := self._jobs.pop(job_id, None)) is not None:
                finished.append(self._ended(job_id, job, done, seconds))
        return finished

    def _ended(self, job_id: int, job: _Job, done: list[int], seconds: float) -> JobResult:
        came = [job.keys[position] for position in done]
        if job.is_load:
            self._own["hits"] += len(came)
            self._loaded(len(came), len(job.keys), seconds)
            request = self._requests.get(job.req_id)
            if request is not None:
                request.failed.update(set(job.keys).difference(came))
        elif came and not self.rates.disk_is_measured:
            self._probe([self._name(key) for key in came])
        return _compat.result(job_id, came, job.keys, job.is_load, seconds, self._row_bytes)

    def _loaded(self, came: int, blocks: int, seconds: float) -> None:
        """A measure of the disk, if all of it came."""
        if came == blocks:
            self.rates.loaded(came * self._row_bytes, seconds)

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

    def on_new_request(self, req_context: Any) -> RequestOffloadingContext:
        self._requests[req_context.req_id] = self._new_request(req_context)
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: Any) -> None:
        request = self._requests.pop(req_context.req_id, None)
        if request is None or request.scheduled_at is None:
            return
        # It ended with a step, and no other one was scheduled ahead of that end.
        request.step_ends += [time.monotonic()] * (1 + self._steps_ahead)
        self._ended_requests[req_context.req_id] = request
        if len(self._ended_requests) > _ENDED_KEPT:
            del self._ended_requests[next(iter(self._ended_requests))]

    def on_schedule_end(self, context: Any) -> None:
        now = time.monotonic()
        for request in self._requests.values():
            if request.scheduled_at is not None and len(request.step_ends) < _STEPS_KEPT:
                request.step_ends.append(now)
        for req_id in context.new_req_ids:
            if (request := self._requests.get(req_id)) is not None:
                request.scheduled_at, request.step_ends = now, []
        for req_id in context.preempted_req_ids or ():
            if (request := self._requests.get(req_id)) is not None:
                request.scheduled_at = None
        if now - self._saved_at > _SAVE_SECONDS:
            self._save()

    def has_pending_work(self) -> bool:
        return bool(self._jobs or self._refused)

    def take_events(self) -> Iterable[Any]:
        if not self._events:
            return
        for keys, removed in zip(self._engine.take_events(), (False, True)):
            own = [key[len(self._generation) :] for key in keys if key.startswith(self._generation)]
            if own:
                yield _compat.event(own, removed, self)

    def drain_jobs(self) -> None:
        """vLLM drops what it has in RAM: it sleeps, or has other weights. Then what is on the disk may be of the old ones."""
        self._engine.drain()
        if self._may_change:
            self._generation = np.random.default_rng().bytes(16)

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, Any]:
        return _metrics.definitions()

    def get_stats(self) -> Any:
        return self._figures.tell(self._engine.stats(), self._own, self.rates.disk_bytes_per_s)

    def counters(self) -> dict[str, int]:
        """All counters as of now, for tests and logs."""
        return figures.counters(self._engine.stats(), self._own)

    def shutdown(self) -> None:
        """Gives vLLM its memory back, and writes what was taken."""
        self._save(wait=True)
        try:
            self._engine.close()
        except KvkeepError as error:
            _log.warning("kvkeep: the disk was not closed cleanly: %s", error)

    # What is measured.

    def _measure(self, request: _Request, keys: list[bytes], context: Any) -> None:
        """Blocks come to be stored some time after the step that computed them: vLLM's own timing of a prefill."""
        request = self._ended_requests.get(context.req_id, request)
        if request.scheduled_at is None:
            return
        group = keys[0][-4:] if keys else b""
        tokens = sum(self._tokens_of(key) for key in keys if key[-4:] == group)
        positions = _compat.positions_of(context)
        if positions is not None and request.computed_tokens == 0:
            ends = [positions[key] for key in keys if key in positions and key[-4:] == group]
            if not ends or min(ends) > self._tokens_of(keys[0]):
                # It began behind what was there already.
                request.scheduled_at = None
                return
        request.computed_tokens += tokens
        steps = math.ceil(request.computed_tokens / self._step_tokens) + self._steps_ahead
        if steps <= len(request.step_ends):
            self.rates.computed(request.computed_tokens, request.step_ends[steps - 1] - request.scheduled_at)

    def _save(self, wait: bool = False) -> None:
        """Writes the rates, in a thread: the disk may not answer."""
        self._saved_at = time.monotonic()
        if self.rates == self._saved:
            return
        self._saved = replace(self.rates, seconds_by_length=dict(self.rates.seconds_by_length))
        thread = threading.Thread(target=_write, args=(self._file, self._saved), name="kvkeep-rates", daemon=True)
        thread.start()
        if wait:
            thread.join(1.0)

    # Small things.

    def _request(self, context: Any) -> _Request:
        request = self._requests.get(context.req_id)
        # One that vLLM has not announced is known until it is: it may be a question of another tier's.
        return request if request is not None else self._new_request(context)

    def _new_request(self, context: Any) -> _Request:
        return _Request(_hints.read(_compat.actions_of(context), self.settings.ttl_s))

    def _name(self, key: bytes) -> bytes:
        return self._generation + key

    def _tokens_of(self, key: bytes) -> int:
        group = int.from_bytes(key[-4:], "big")
        return self._chunk_tokens[group if group < len(self._chunk_tokens) else 0]


def _write(file: RatesFile, rates: Rates) -> None:
    try:
        file.write(rates)
    except OSError as error:
        _log.info("kvkeep: the measured rates were not saved: %s", error)

