"""The tier's figures as vLLM publishes them: under `/metrics`, beside vLLM's own of the tiers (bytes, times and failures of jobs).

Invariant: what vLLM is given of a counter is by how much it grew since it last asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvkeep._engines import figures
from kvkeep._engines.worth import Rates


def name_of(figure: str) -> str:
    return f"vllm:kvkeep_{figure}"


OF_RAM = {
    "ram_used_bytes": "Bytes of RAM that blocks take now.",
    "ram_held_bytes": "Of these, what is being copied or promised: it cannot be evicted now.",
    "ram_capacity_bytes": "The cap of RAM.",
}


def definitions(ram: bool = False) -> dict[str, Any]:
    """What vLLM needs to know to publish them; those of RAM where that is kvkeep's too."""
    from vllm.v1.kv_offload.base import OffloadingCounterMetadata, OffloadingGaugeMetadata

    texts = figures.GAUGES | (OF_RAM if ram else {})
    gauges = {name_of(name): OffloadingGaugeMetadata(documentation=text) for name, text in texts.items()}
    return gauges | {name_of(name): OffloadingCounterMetadata(documentation=text) for name, text in figures.COUNTERS.items()}


class Figures:
    """All figures as of now, and what was last told of them."""

    def __init__(self) -> None:
        self._told: dict[str, int] = {}

    def tell(self, engine: Mapping[str, Any], own: Mapping[str, int], rates: Rates, ram: bool = False) -> Any:
        """vLLM's form of them."""
        from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats

        told = OffloadingConnectorStats()
        for name, value in figures.gauges(engine, rates).items():
            told.set_gauge(name_of(name), value)
        for name in OF_RAM if ram else ():
            told.set_gauge(name_of(name), float(engine[name.removeprefix("ram_")]))
        now = figures.counters(engine, own)
        for name, count in now.items():
            if count > self._told.get(name, 0):
                told.increase_counter(name_of(name), count - self._told.get(name, 0))
        self._told = now
        return told
