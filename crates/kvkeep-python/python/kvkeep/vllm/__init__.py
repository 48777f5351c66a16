"""kvkeep as a tier of vLLM's KV offloading: a bounded, checked disk behind vLLM's RAM, warm after a restart.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config":
      {"spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": 34359738368, "block_size": 256,
       "secondary_tiers": [{"type": "kvkeep", "root_dir": "/var/lib/kvkeep", "capacity_gb": 500}]}}'

vLLM moves KV between the GPU and RAM; kvkeep moves it between RAM and the disk. `KvkeepOffloadingSpec` is the other way: RAM is kvkeep's too. See `docs/vllm.md`.

Invariant: importing this imports nothing of vLLM's. vLLM imports it in every process, as a plugin, also where nobody uses it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvkeep.vllm._connector import KvkeepConnector
    from kvkeep.vllm._spec import KvkeepOffloadingSpec
    from kvkeep.vllm._tier import KvkeepTier

__all__ = ["TIER_TYPE", "KvkeepConnector", "KvkeepOffloadingSpec", "KvkeepTier", "register"]

TIER_TYPE = "kvkeep"
"""What `secondary_tiers` calls it."""


def register() -> None:
    """Tells vLLM of the tier. vLLM calls it as a plugin, in each of its processes; a second time does nothing."""
    try:
        from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory
    except ImportError:  # a vLLM without tiers behind RAM
        return
    if TIER_TYPE not in SecondaryTierFactory._registry:
        SecondaryTierFactory.register_tier(TIER_TYPE, "kvkeep.vllm", "KvkeepTier")


_PLACES = {"KvkeepTier": "_tier", "KvkeepOffloadingSpec": "_spec", "KvkeepConnector": "_connector"}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
