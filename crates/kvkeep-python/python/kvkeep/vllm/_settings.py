"""What a tier's entry in `secondary_tiers` may say, and `kvkeep` beside `cpu_bytes_to_use`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvkeep._engines import settings

if TYPE_CHECKING:
    from kvkeep._kvkeep import Behind


@dataclass(frozen=True)
class Settings(settings.Settings):
    """Every setting with its default: those of every engine, and these."""

    prefill_tokens_per_s: float = 20_000
    """How fast the engine computes, until it is measured."""
    enable_kv_events: bool = False
    """Tells vLLM's event publisher what comes to kvkeep and goes from it."""
    locality: str | None = None
    """`LOCAL` or `REMOTE`, for those events."""

    def tells(self, spec: Any) -> bool:
        """Are events wanted, here and in vLLM?"""
        return bool(self.enable_kv_events and spec.kv_events_config.enable_kv_cache_events)

    def tiers(self, config: Any, ram_bytes: int | None = None) -> Behind:
        """What is behind RAM. A folder is this replica's own; a daemon and a remote store are everybody's."""
        replica = int(getattr(config.parallel_config, "data_parallel_index", 0) or 0)
        # What waits to be written is a copy beside the engine's RAM, or stays where it is in ours.
        return self.behind(f"kv-{replica}", self.queue_bytes if ram_bytes is None else ram_bytes // 2)


@dataclass(frozen=True)
class RamSettings(Settings):
    """What `kvkeep` may say in the configuration of `KvkeepOffloadingSpec`: those of the tier, and these."""

    eviction_policy: str = "adaptive"
    """What goes from RAM first: `adaptive`, `lru`, `s3fifo`, `arc` or `lru2`."""
