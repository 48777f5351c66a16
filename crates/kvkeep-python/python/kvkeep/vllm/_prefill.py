"""How long vLLM takes to compute a prompt: what a load has to be faster than. And the tiers' rates beside it, kept over a restart.

Invariant: only a prefill that began at its prompt's first token and was not interrupted is a measure. A step's end is seen when the next one is
scheduled, or when a request ends with it. To time what comes back from the GPU was the alternative: blocks of a request come to be stored behind
a copy to RAM, or when the next request comes, and the pause between counted as computing.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kvkeep._engines.worth import Rates, RatesFile
from kvkeep.vllm import _compat

_log = logging.getLogger(__name__)

_SAVE_SECONDS = 30.0
_STEPS_KEPT = 64
"""Steps of a request whose ends are known: more than a prompt is cut into."""
_ENDED_KEPT = 64
"""Requests that have ended, and whose blocks may still come to be stored."""


@dataclass
class _Prefill:
    scheduled_at: float | None = None
    """When its first step began; None again once it is no longer a measure."""
    step_ends: list[float] = field(default_factory=list)
    """When that step and those after it had ended."""
    computed_tokens: int = 0


class Prefills:
    """Requests under way, and those that have just ended, as far as they say how fast the engine computes."""

    def __init__(self, config: Any, rates: Rates, file: RatesFile, tokens_of: Callable[[bytes], int]) -> None:
        self.rates, self._file, self._tokens_of = rates, file, tokens_of
        self._step_tokens, self._steps_ahead = _compat.steps_of(config)
        self._live: dict[str, _Prefill] = {}
        self._ended: dict[str, _Prefill] = {}
        self._saved, self._saved_at = _copy(rates), time.monotonic()

    def begin(self, req_id: str) -> None:
        self._live[req_id] = _Prefill()

    def finish(self, req_id: str) -> None:
        prefill = self._live.pop(req_id, None)
        if prefill is None or prefill.scheduled_at is None:
            return
        # It ended with a step, and no other one was scheduled ahead of that end.
        prefill.step_ends += [time.monotonic()] * (1 + self._steps_ahead)
        self._ended[req_id] = prefill
        if len(self._ended) > _ENDED_KEPT:
            del self._ended[next(iter(self._ended))]

    def loaded(self, req_id: str) -> None:
        """Some of its KV is loaded: what it computes behind that is no measure."""
        self._live.pop(req_id, None)

    def step(self, context: Any) -> None:
        """A step is scheduled."""
        now = time.monotonic()
        for prefill in self._live.values():
            if prefill.scheduled_at is not None and len(prefill.step_ends) < _STEPS_KEPT:
                prefill.step_ends.append(now)
        for req_id in context.new_req_ids:
            if (prefill := self._live.get(req_id)) is not None:
                prefill.scheduled_at, prefill.step_ends = now, []
        for req_id in context.preempted_req_ids or ():
            if (prefill := self._live.get(req_id)) is not None:
                prefill.scheduled_at = None
        if now - self._saved_at > _SAVE_SECONDS:
            self.save()

    def stored(self, context: Any, keys: Sequence[bytes]) -> None:
        """Blocks come to be stored some time after the step that computed them: vLLM's own timing of a prefill."""
        prefill = self._ended.get(context.req_id) or self._live.get(context.req_id)
        if prefill is None or prefill.scheduled_at is None:
            return
        group = keys[0][-4:] if keys else b""
        tokens = sum(self._tokens_of(key) for key in keys if key[-4:] == group)
        positions = _compat.positions_of(context)
        if positions is not None and prefill.computed_tokens == 0:
            ends = [positions[key] for key in keys if key in positions and key[-4:] == group]
            if not ends or min(ends) > self._tokens_of(keys[0]):
                # It began behind what was there already.
                prefill.scheduled_at = None
                return
        prefill.computed_tokens += tokens
        steps = math.ceil(prefill.computed_tokens / self._step_tokens) + self._steps_ahead
        if steps <= len(prefill.step_ends):
            self.rates.computed(prefill.computed_tokens, prefill.step_ends[steps - 1] - prefill.scheduled_at)

    def save(self, wait: bool = False) -> None:
        """Writes the rates, in a thread: the disk may not answer."""
        self._saved_at = time.monotonic()
        if self.rates == self._saved:
            return
        self._saved = _copy(self.rates)
        thread = threading.Thread(target=_write, args=(self._file, self._saved), name="kvkeep-rates", daemon=True)
        thread.start()
        if wait:
            thread.join(1.0)


def _copy(rates: Rates) -> Rates:
    return replace(rates, seconds_by_length=dict(rates.seconds_by_length), measured=dict(rates.measured))


def _write(file: RatesFile, rates: Rates) -> None:
    try:
        file.write(rates)
    except OSError as error:
        _log.info("kvkeep: the measured rates were not saved: %s", error)
