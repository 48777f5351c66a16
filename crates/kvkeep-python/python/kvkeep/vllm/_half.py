"""What both ways into vLLM share on the scheduler's side: the requests that live, the names of blocks, figures, and the end.

Invariant: a request that vLLM has not announced is known only while it is asked about: it may be another tier's question.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from vllm.v1.kv_offload.base import RequestOffloadingContext

from kvkeep import KvkeepError, _kvkeep
from kvkeep._engines import figures
from kvkeep._engines.worth import RatesFile
from kvkeep.vllm import _compat, _hints, _metrics
from kvkeep.vllm._prefill import Prefills
from kvkeep.vllm._settings import Settings

_log = logging.getLogger(__name__)

Request = TypeVar("Request", bound="OneRequest")
"""What is known of a request while it lives; made with its hints."""


@dataclass
class OneRequest:
    """What is known of a request while it lives."""

    hints: _hints.Hints
    asked_at: float | None = None
    """When it first waited for a store over a network to say what it has."""


class SchedulerHalf(Generic[Request]):
    """`KvkeepTier` and `KvkeepManager`, as far as they are alike."""

    _request_kind: ClassVar[Any]
    _engine: _kvkeep.EngineTier | _kvkeep.EngineRam

    def _begin(self, settings: Settings, config: Any, row_bytes: int, chunk_tokens: list[int], file: RatesFile, identity: str) -> None:
        self.settings, self.identity = settings, identity
        self._row_bytes, self._chunk_tokens = row_bytes, chunk_tokens
        self.rates = file.read(settings.guess)
        self._ask_seconds = settings.ask_seconds
        self._prefills = Prefills(config, self.rates, file, self._tokens_of)
        self._requests: dict[str, Request] = {}
        self._own = {"hits": 0, "not_worth": 0}
        self._figures = _metrics.Figures()
        self._generation = b""
        self._may_change = _compat.may_change(config)

    def on_new_request(self, req_context: Any) -> RequestOffloadingContext:
        self._requests[req_context.req_id] = self._new_request(req_context)
        self._prefills.begin(req_context.req_id)
        return RequestOffloadingContext()

    def take_events(self) -> Iterable[Any]:
        """What came and went. Of blocks of weights that are no longer these, nothing is said."""
        for tier, is_removed, names in self._engine.take_events():
            keys = [name[len(self._generation) :] for name in names if name.startswith(self._generation)]
            if keys and tier == "ram":
                yield _compat.event(keys, _compat.MEDIUM_OF_RAM, is_removed, None, None)
            elif keys:
                yield _compat.event(keys, _compat.MEDIUM, is_removed, self.settings.locality, "kvkeep")

    def counters(self) -> dict[str, int]:
        """All counters as of now, for tests and logs."""
        return figures.counters(self._stats(), self._own)

    def _stats(self) -> dict[str, Any]:
        return self._engine.stats()

    def _request(self, context: Any) -> Request:
        request = self._requests.get(context.req_id)
        return request if request is not None else self._new_request(context)

    def _new_request(self, context: Any) -> Request:
        made: Request = self._request_kind(_hints.read(_compat.actions_of(context), self.settings.ttl_s))
        return made

    def _waits_for_answer(self, request: Request) -> bool:
        """Is a store over a network being asked what it has? A request waits for that once, and no longer than a load of it may take."""
        if not self._engine.is_asking():
            return False
        now = time.monotonic()
        if request.asked_at is None:
            request.asked_at = now
        return now - request.asked_at < self._ask_seconds

    def _pays(self, request: Request, first: int, end: int, places: Iterable[str]) -> bool:
        """Is it worth it to load one block from each of these places?"""
        if self.settings.worth == "always" or request.hints.always_load:
            return True
        return self.rates.pays(first, end, {tier: count * self._row_bytes for tier, count in Counter(places).items()})

    def _name(self, key: bytes) -> bytes:
        return self._generation + key

    def _tokens_of(self, key: bytes) -> int:
        group = int.from_bytes(key[-4:], "big")
        return self._chunk_tokens[group if group < len(self._chunk_tokens) else 0]

    def _close(self) -> None:
        """Writes what is to be written, and the rates."""
        self._prefills.save(wait=True)
        try:
            self._engine.close()
        except KvkeepError as error:
            _log.warning("kvkeep: a tier was not closed cleanly: %s", error)
