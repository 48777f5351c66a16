"""What a request may ask of the tier: how long its blocks stay, and whether it is worth waiting for them.

They come as vLLM's KV hints (an envelope of actions, from 0.32 on) or, with every release, as
`kv_transfer_params={"kvkeep": {"retain": {"ttl_s": 600}}}`. An action that is not known here is left to others.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_log = logging.getLogger(__name__)


@dataclass
class Hints:
    """What one request asks for."""

    is_retained: bool = False
    """`pin` and `retain`: kept before others, as long as `retain_s` says or the process lives."""
    retain_s: float | None = None
    is_demoted: bool = False
    """`demote`: no longer retained, and this use does not keep it any longer."""
    always_load: bool = False
    """`prefetch`: load it into RAM even if this request would be faster without: others are to come."""
    store: bool = True
    """`store: false`, or `priority: low`: nothing of this request is written."""
    ttl_s: float | None = None
    """`ttl`: what this request writes is gone after so many seconds."""


def read(actions: Iterable[tuple[str, Mapping[str, Any]]], ttl_s: float | None) -> Hints:
    """The hints of one request. What makes no sense is said once in the log and left out: a hint never fails a request."""
    hints = Hints(ttl_s=ttl_s)
    for name, payload in actions:
        try:
            _apply(hints, name.lower(), payload)
        except (TypeError, ValueError) as error:
            _log.warning("kvkeep leaves the hint %r out: %s", name, error)
    return hints


def _apply(hints: Hints, name: str, payload: Mapping[str, Any]) -> None:
    value = payload.get("value")
    if value is False and name != "store":
        return
    if name == "pin":
        hints.is_retained, hints.retain_s = True, None
    elif name == "retain":
        hints.is_retained, hints.retain_s = True, _seconds(payload)
    elif name == "demote":
        hints.is_demoted = True
    elif name == "prefetch":
        hints.always_load = True
    elif name in ("ttl", "ttl_s"):
        hints.ttl_s = _seconds(payload)
    elif name == "store":
        hints.store = value is not False
    elif name == "priority":
        _priority(hints, value if value is not None else payload.get("priority"))


def _priority(hints: Hints, value: Any) -> None:
    if value == "high":
        hints.is_retained = True
    elif value == "low":
        hints.store = False
    elif value not in (None, "normal"):
        raise ValueError(f"a priority is 'low', 'normal' or 'high', not {value!r}")


def _seconds(payload: Mapping[str, Any]) -> float:
    for name in ("ttl_s", "ttl_seconds", "ttl", "duration_s", "value"):
        if isinstance(payload.get(name), (int, float)) and not isinstance(payload[name], bool):
            seconds = float(payload[name])
            if seconds < 0 or seconds != seconds:
                raise ValueError(f"give seconds from 0 on, not {seconds}")
            return seconds
    raise ValueError("give seconds, as in {'ttl_s': 600}")
