"""Is it worth it to load a prefix from the disk? Pure arithmetic over measured times.

Invariant: a load is worth it only if it is expected to take clearly less time than computing the same tokens. What was not measured
yet is a first guess that somebody can state. A table of rates by device was the alternative: it knows neither the model nor the disk.

Both rates are kept in a file beside the cache, so that an engine that was just started knows what the last one measured.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvkeep._worth import MARGIN, Prefill

STEP_SECONDS = 0.010
"""What a load costs beside the disk: the scheduler looks at it once more, and a copy to the device begins."""

DEVICE_BYTES_PER_SECOND = 20e9
"""From RAM to the device: PCIe 4, or a slow core's memcpy."""

@dataclass
class Rates(Prefill):
    """What is known of one model on one machine, and of the disk."""

    disk_bytes_per_s: float = 1e9
    disk_is_measured: bool = False

    def loaded(self, size: int, seconds: float) -> None:
        """A load of so many bytes took so long."""
        if size <= 0 or not seconds > 0:
            return
        rate = size / seconds
        self.disk_bytes_per_s = rate if not self.disk_is_measured else 0.7 * self.disk_bytes_per_s + 0.3 * rate
        self.disk_is_measured = True

    def load_seconds(self, size: int) -> float:
        return STEP_SECONDS + size / self.disk_bytes_per_s + size / DEVICE_BYTES_PER_SECOND

    def pays(self, first: int, end: int, size: int) -> bool:
        """Is loading `size` bytes better than computing tokens `first` to `end`?"""
        return self.load_seconds(size) <= MARGIN * self.compute_seconds(first, end)

    def could_pay(self, chunk_tokens: int, chunk_bytes: int, longest: int) -> bool:
        """Is there any prefix for which it pays? The longer, the likelier: attention costs more than tokens in proportion."""
        chunks = max(1, longest // max(1, chunk_tokens))
        return self.pays(0, chunks * chunk_tokens, chunks * chunk_bytes) or self.pays(0, chunk_tokens, chunk_bytes)


class RatesFile:
    """Rates of several models in one file, kept by the identity of model and machine."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name

    def read(self, guess: Rates) -> Rates:
        """What was measured before; the guess if nothing was, or the file cannot be read."""
        try:
            known = json.loads(self._path.read_text())[self._name]
            by_length = {int(length): float(seconds) for length, seconds in known["seconds_by_length"].items()}
            step, disk = known["step_seconds"], float(known["disk_bytes_per_s"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return guess
        numbers = [*by_length.values(), disk, *([] if step is None else [step])]
        if not all(isinstance(number, (int, float)) and 0 < number < math.inf for number in numbers):
            return guess
        measured = bool(known.get("disk_is_measured"))
        return Rates(guess.prefill_tokens_per_s, by_length, step, disk_bytes_per_s=disk, disk_is_measured=measured)

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
            "disk_bytes_per_s": rates.disk_bytes_per_s,
            "disk_is_measured": rates.disk_is_measured,
        }
        new = self._path.with_suffix(f".{os.getpid()}.new")
        new.write_text(json.dumps(all_rates))
        os.replace(new, self._path)
