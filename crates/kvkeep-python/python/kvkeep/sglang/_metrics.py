"""What SGLang's `get_stats` is told, and the backend's own figures under SGLang's `/metrics`.

Invariant: a figure of a transfer is told once. SGLang asks at every step of its scheduler, so that costs next to nothing; the own figures are
looked at once a second.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from kvkeep._engines import figures

_EVERY_SECONDS = 1.0
_KEPT = 4096
"""Transfers that nobody asked for: more are not kept."""


class Metrics:
    """Transfers since SGLang last asked."""

    def __init__(self, storage: Any) -> None:
        self._lock = threading.Lock()
        self._transfers: dict[str, list[tuple[int, float]]] = {"prefetch": [], "backup": []}
        self._published: _Published | None = _Published(storage) if storage.enable_storage_metrics else None
        self._looked_at = -_EVERY_SECONDS

    def transferred(self, kind: str, pages: int, size: int, seconds: float) -> None:
        """`prefetch` or `backup` of so many pages."""
        with self._lock:
            if len(self._transfers[kind]) < _KEPT:
                self._transfers[kind].append((pages, size / seconds / 1e9 if seconds > 0 else 0.0))

    def tell(self, figures_now: Callable[[], tuple[Mapping[str, float], Mapping[str, int]]]) -> Any:
        """SGLang's form of them."""
        from sglang.srt.observability.metrics_collector import StorageMetrics

        with self._lock:
            took, self._transfers = self._transfers, {"prefetch": [], "backup": []}
        if self._published is not None and time.monotonic() - self._looked_at >= _EVERY_SECONDS:
            self._looked_at = time.monotonic()
            self._published.publish(*figures_now())
        pages = {f"{kind}_pgs": [count for count, _ in transfers] for kind, transfers in took.items()}
        return StorageMetrics(**pages, **{f"{kind}_bandwidth": [rate for _, rate in transfers] for kind, transfers in took.items()})


class _Published:
    """The own figures, as prometheus_client has them: SGLang collects what all of its processes say there."""

    _known: dict[str, Any] = {}  # noqa: RUF012  A backend that is attached again finds what the first one made.

    def __init__(self, storage: Any) -> None:
        from prometheus_client import Counter, Gauge

        self._labels = {"storage_backend": "kvkeep", "tp_rank": storage.tp_rank, "pp_rank": storage.pp_rank, "dp_rank": storage.dp_rank}
        for name, text in figures.GAUGES.items():
            if name not in self._known:
                self._known[name] = Gauge(f"sglang:kvkeep_{name}", text, list(self._labels), multiprocess_mode="mostrecent")
        for name, text in figures.COUNTERS.items():
            if name not in self._known:
                self._known[name] = Counter(f"sglang:kvkeep_{name}", text, list(self._labels))
        self._told: dict[str, int] = {}

    def publish(self, gauges: Mapping[str, float], counters: Mapping[str, int]) -> None:
        for name, value in gauges.items():
            self._known[name].labels(**self._labels).set(value)
        for name, count in counters.items():
            self._known[name].labels(**self._labels).inc(max(0, count - self._told.get(name, 0)))
        self._told = dict(counters)
