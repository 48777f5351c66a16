"""The tier's figures as vLLM publishes them: under `/metrics`, beside vLLM's own of the tiers (bytes, times and failures of jobs).

Invariant: what vLLM is given of a counter is by how much it grew since it last asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvkeep._engines import figures


def name_of(figure: str) -> str:
    return f"vllm:kvkeep_{figure}"


def definitions() -> dict[str, Any]:
    """What vLLM needs to know to publish them."""
    from vllm.v1.kv_offload.base import OffloadingCounterMetadata, OffloadingGaugeMetadata

    gauges = {name_of(name): OffloadingGaugeMetadata(documentation=text) for name, text in figures.GAUGES.items()}
    return gauges | {name_of(name): OffloadingCounterMetadata(documentation=text) for name, text in figures.COUNTERS.items()}


class Figures:
    """All figures as of now, and what was last told of them."""

    def __init__(self) -> None:
        self._told: dict[str, int] = {}

    def tell(self, engine: Mapping[str, Any], own: Mapping[str, int], disk_bytes_per_s: float) -> Any:
        """vLLM's form of them."""
        from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats

        told = OffloadingConnectorStats()
        for name, value in figures.gauges(engine, disk_bytes_per_s).items():
            told.set_gauge(name_of(name), value)
        now = figures.counters(engine, own)
        for name, count in now.items():
            if count > self._told.get(name, 0):
                told.increase_counter(name_of(name), count - self._told.get(name, 0))
        self._told = now
        return told
