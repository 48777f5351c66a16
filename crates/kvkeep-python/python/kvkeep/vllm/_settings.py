"""What a tier's entry in `secondary_tiers` may say."""

from __future__ import annotations

from dataclasses import dataclass

from kvkeep._engines import settings


@dataclass(frozen=True)
class Settings(settings.Settings):
    """Every setting with its default: those of every engine, and these."""

    prefill_tokens_per_s: float = 20_000
    """How fast the engine computes, until it is measured."""
    enable_kv_events: bool = False
    """Tells vLLM's event publisher what comes to the disk and goes from it."""
    locality: str | None = None
    """`LOCAL` or `REMOTE`, for those events."""
