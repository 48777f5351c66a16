"""Is it worth it to load a prefix from the disk? Pure arithmetic over measured times.

Invariant: a load is worth it only if it is expected to take clearly less time than computing the same tokens. What was not measured
yet is a first guess that somebody can state. A table of rates by device was the alternative: it knows neither the model nor the disk.

Both rates are kept in a file beside the cache, so that an engine that was just started knows what the last one measured.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MARGIN = 0.85
"""A load may take this part of the time that computing takes: what is measured is never quite what comes."""

STEP_SECONDS = 0.010
"""What a load costs beside the disk: the scheduler looks at it once more, and a copy to the device begins."""

DEVICE_BYTES_PER_SECOND = 20e9
"""From RAM to the device: PCIe 4, or a slow core's memcpy."""

_SHORT_TOKENS, _STEP_AT_MOST = 256, 0.05
"""What takes longer than this is computing, also in a step that is full of others' tokens."""

_FASTER, _SLOWER = 0.5, 1.03
"""A faster time counts at once by half, a slower one moves what is believed up by so much at most."""


@dataclass
class Rates:
    """What is known of one model on one machine."""

    prefill_tokens_per_s: float = 20_000.0
    disk_bytes_per_s: float = 1e9
    seconds_by_length: dict[int, float] = field(default_factory=dict)
    """Seconds a token takes in a prefill of 2^n tokens from the beginning."""
    step_seconds: float | None = None
    """A prefill of a few tokens: what a step takes anyway."""
    disk_is_measured: bool = False

    def computed(self, tokens: int, seconds: float) -> None:
        """A prefill of so many tokens took so long."""
        if tokens <= 0 or not seconds > 0:
            return
        bucket, each = tokens.bit_length() - 1, seconds / tokens
        self.seconds_by_length[bucket] = _believe(self.seconds_by_length.get(bucket), each)
        if tokens <= _SHORT_TOKENS:
            self.step_seconds = _believe(self.step_seconds, min(seconds, _STEP_AT_MOST))

    def loaded(self, size: int, seconds: float) -> None:
        """A load of so many bytes took so long."""
        if size <= 0 or not seconds > 0:
            return
        rate = size / seconds
        self.disk_bytes_per_s = rate if not self.disk_is_measured else 0.7 * self.disk_bytes_per_s + 0.3 * rate
        self.disk_is_measured = True

    def compute_seconds(self, first: int, end: int) -> float:
        """Computing tokens `first` to `end` of a prompt, beside what a step takes anyway."""
        step = min(self.step_seconds or 0.0, self._from_start(end)) if first == 0 else 0.0
        return max(0.0, self._from_start(end) - self._from_start(first) - step)

    def load_seconds(self, size: int) -> float:
        return STEP_SECONDS + size / self.disk_bytes_per_s + size / DEVICE_BYTES_PER_SECOND

    def pays(self, first: int, end: int, size: int) -> bool:
        """Is loading `size` bytes better than computing tokens `first` to `end`?"""
        return self.load_seconds(size) <= MARGIN * self.compute_seconds(first, end)

    def could_pay(self, chunk_tokens: int, chunk_bytes: int, longest: int) -> bool:
        """Is there any prefix for which it pays? The longer, the likelier: attention costs more than tokens in proportion."""
        chunks = max(1, longest // max(1, chunk_tokens))
        return self.pays(0, chunks * chunk_tokens, chunks * chunk_bytes) or self.pays(0, chunk_tokens, chunk_bytes)

    def _from_start(self, tokens: int) -> float:
        """A prefill of so many tokens. Beyond the longest that was seen, the guess: a short one says nothing of long ones."""
        if tokens <= 0:
            return 0.0
        known = self.seconds_by_length
        longest = 1 << max(known) if known else 0
        if tokens > 2 * longest:
            return (longest * known[max(known)] if known else 0.0) + (tokens - longest) / self.prefill_tokens_per_s
        # Between two lengths that were seen, along the line: what a step takes anyway is in both.
        times = {1 << bucket: (1 << bucket) * each for bucket, each in known.items()}
        below = max((length for length in times if length <= tokens), default=None)
        above = min((length for length in times if length >= tokens), default=None)
        if below is None or above is None:
            nearest = above or below or tokens
            return times[nearest] * tokens / nearest
        if below == above:
            return times[below]
        return times[below] + (times[above] - times[below]) * (tokens - below) / (above - below)


def _believe(known: float | None, seen: float) -> float:
    """The fastest time of late: others in the batch make a prefill slower, and nothing makes it faster."""
    if known is None:
        return seen
    return known + (seen - known) * _FASTER if seen < known else min(seen, known * _SLOWER)


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
        return Rates(guess.prefill_tokens_per_s, disk, by_length, step, disk_is_measured=bool(known.get("disk_is_measured")))

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
