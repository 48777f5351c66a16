"""How long a prefill takes on this machine, as measured. Pure arithmetic.

Invariant: what was not measured yet is a first guess that somebody can state. A table of rates by device was the alternative: it
does not know the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MARGIN = 0.85
"""A load may take this part of the time that computing takes: what is measured is never quite what comes."""

_SHORT_TOKENS, _STEP_AT_MOST = 256, 0.05
"""What takes longer than this is computing, also in a step that is full of others' tokens."""

_FASTER, _SLOWER = 0.5, 1.03
"""A faster time counts at once by half, a slower one moves what is believed up by so much at most."""


@dataclass
class Prefill:
    """One model on one machine."""

    prefill_tokens_per_s: float = 20_000.0
    seconds_by_length: dict[int, float] = field(default_factory=dict)
    """Seconds a token takes in a prefill of 2^n tokens from the beginning."""
    step_seconds: float | None = None
    """A prefill of a few tokens: what a step takes anyway."""

    def computed(self, tokens: int, seconds: float) -> None:
        """A prefill of so many tokens took so long."""
        if tokens <= 0 or not seconds > 0:
            return
        bucket, each = tokens.bit_length() - 1, seconds / tokens
        self.seconds_by_length[bucket] = believe(self.seconds_by_length.get(bucket), each)
        if tokens <= _SHORT_TOKENS:
            self.step_seconds = believe(self.step_seconds, min(seconds, _STEP_AT_MOST))

    def compute_seconds(self, first: int, end: int) -> float:
        """Computing tokens `first` to `end` of a prompt, beside what a step takes anyway."""
        step = min(self.step_seconds or 0.0, self._from_start(end)) if first == 0 else 0.0
        return max(0.0, self._from_start(end) - self._from_start(first) - step)

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


def believe(known: float | None, seen: float) -> float:
    """The fastest time of late: others in the batch make a prefill slower, and nothing makes it faster."""
    if known is None:
        return seen
    return known + (seen - known) * _FASTER if seen < known else min(seen, known * _SLOWER)
