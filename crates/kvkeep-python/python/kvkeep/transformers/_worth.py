"""Is it worth it to load a prefix to a GPU? As measured, of one model.

Invariant: with reuse a first token comes no later than without. A GPU reads a short prefix of a small model in the time that it takes to
begin a load. Always loading was the alternative: 45 ms where reading took 25.
"""

from __future__ import annotations

from collections import deque

from kvkeep._worth import MARGIN, Prefill

_DOUBT = 0.998
"""What loading took beside the bus counts for a little less each time that nothing is loaded, so that it is tried again."""

_SHORT_TOKENS = 256


class _Lately:
    """What something took, the last two times. The shorter of both is believed: one that also made streams, found memory on the GPU or
    chose kernels for a new length says nothing, and one that was fast by chance is soon forgotten."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=2)

    def took(self, seconds: float) -> None:
        self._last.append(seconds)

    def doubt(self) -> None:
        self._last = deque((seconds * _DOUBT for seconds in self._last), maxlen=2)

    @property
    def seconds(self) -> float:
        """0 until it happened twice."""
        return min(self._last) if len(self._last) == 2 else 0.0


class Worth:
    """What reading and loading take."""

    def __init__(self) -> None:
        self._prefill = Prefill()
        self._begin, self._behind = _Lately(), _Lately()

    def read(self, tokens: int, behind: int, seconds: float) -> None:
        """The model read so many tokens behind so many that were loaded, and chose the next one, in so long."""
        if behind == 0:
            self._prefill.computed(tokens, seconds)
        elif tokens <= _SHORT_TOKENS:
            self._behind.took(seconds)

    def began(self, seconds: float) -> None:
        """Beginning a load took so long."""
        self._begin.took(seconds)

    def pays(self, tokens: int, size: int, bytes_per_s: float) -> bool:
        """Is loading the first tokens, of so many bytes, better than reading them?"""
        load = self._begin.seconds + size / bytes_per_s
        prefill = self._prefill
        if self._behind.seconds:
            prefill.step_seconds = self._behind.seconds
        pays = load <= MARGIN * prefill.compute_seconds(0, tokens)
        if not pays:
            prefill.step_seconds = None if prefill.step_seconds is None else _DOUBT * prefill.step_seconds
            self._begin.doubt()
            self._behind.doubt()
        return pays
