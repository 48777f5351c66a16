"""Is it worth it to load a prefix from the tiers behind RAM? Pure arithmetic over measured times.

Invariant: a load is worth it only if it is expected to take clearly less time than computing the same tokens. What was not measured
yet is a first guess that somebody can state. A table of rates by device was the alternative: it knows neither the model nor the disk.
Each tier has a rate of its own: a daemon's RAM is ten times as fast as a disk. What came from several tiers measures none of them.

All rates are kept in a file beside the cache, so that an engine that was just started knows what the last one measured.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvkeep._worth import MARGIN, Prefill

STEP_SECONDS = 0.020
"""What a load costs beside the tier: the scheduler looks at it once more, a copy to the device begins, and a step follows it. 15 to 19 ms in vLLM on an H100."""

DEVICE_BYTES_PER_SECOND = 20e9
"""From RAM to the device: PCIe 4, or a slow core's memcpy."""

GUESSES = {"daemon": 8e9, "disk": 1e9, "remote": 1e9}
"""Bytes a second of each kind of tier, until they are measured."""


@dataclass
class Rates(Prefill):
    """What is known of one model on one machine, and of the tiers that there are."""

    guesses: dict[str, float] = field(default_factory=lambda: {"disk": GUESSES["disk"]})
    """Each tier, and how fast it is taken to be read."""
    measured: dict[str, float] = field(default_factory=dict)
    """How fast tiers are read: bytes a second."""

    def loaded(self, tier: str, size: int, seconds: float) -> None:
        """A load of so many bytes from this tier took so long."""
        if size <= 0 or not seconds > 0:
            return
        rate = size / seconds
        known = self.measured.get(tier)
        self.measured[tier] = rate if known is None else 0.7 * known + 0.3 * rate

    def bytes_per_s(self, tier: str) -> float:
        return self.measured.get(tier) or self.guesses.get(tier, GUESSES[tier])

    def load_seconds(self, sizes: Mapping[str, int]) -> float:
        """A load of so many bytes from each tier, one after the other."""
        return STEP_SECONDS + sum(size / self.bytes_per_s(tier) + size / DEVICE_BYTES_PER_SECOND for tier, size in sizes.items())

    def pays(self, first: int, end: int, sizes: Mapping[str, int]) -> bool:
        """Is loading so many bytes from each tier better than computing tokens `first` to `end`?"""
        return self.load_seconds(sizes) <= MARGIN * self.compute_seconds(first, end)

    def could_pay(self, chunk_tokens: int, chunk_bytes: int, longest: int) -> bool:
        """Is there any prefix for which it pays? The longer, the likelier: attention costs more than tokens in proportion."""
        tier = max(self.guesses, key=self.bytes_per_s)
        chunks = max(1, longest // max(1, chunk_tokens))
        return self.pays(0, chunks * chunk_tokens, {tier: chunks * chunk_bytes}) or self.pays(0, chunk_tokens, {tier: chunk_bytes})


class RatesFile:
    """Rates of several models in one file, kept by the identity of model and machine."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name

    def read(self, guess: Rates) -> Rates:
        """What was measured before; the guess if nothing was, or the file cannot be read."""
        try:
            known = json.loads(self._path.read_text())[self._name]
            by_length = {int(length): float(seconds) for length, seconds in known["seconds_by_length"].items()}
            step, measured = known["step_seconds"], {str(tier): float(rate) for tier, rate in known["bytes_per_s"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return guess
        numbers = [*by_length.values(), *measured.values(), *([] if step is None else [step])]
        if not all(isinstance(number, (int, float)) and 0 < number < math.inf for number in numbers):
            return guess
        return Rates(guess.prefill_tokens_per_s, by_length, step, guess.guesses, measured)

    def write(self, rates: Rates) -> None:
        """Takes the old file's place at once. Raises OSError."""
        try:
            all_rates: dict[str, Any] = json.loads(self._path.read_text())
        except (OSError, ValueError):
            all_rates = {}
        if not isinstance(all_rates, dict) or len(all_rates) > 256:
            all_rates = {}
        all_rates[self._name] = {
            "seconds_by_length": rates.seconds_by_length,
            "step_seconds": rates.step_seconds,
            "bytes_per_s": rates.measured,
        }
        new = self._path.with_suffix(f".{os.getpid()}.new")
        new.write_text(json.dumps(all_rates))
        os.replace(new, self._path)
