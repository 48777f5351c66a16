"""Is it worth it to load a prefix to a GPU? As measured, of one model.

Invariant: with reuse a first token comes no later than without. A GPU reads a short prefix of a small model in the time that it takes to
begin a load. Always loading was the alternative: 45 ms where reading took 25.
"""

from __future__ import annotations

from kvkeep._worth import MARGIN, Prefill, believe

_DOUBT = 0.998
"""What loading took beside the bus counts for a little less each time that nothing is loaded, so that it is tried again."""

_SHORT_TOKENS = 256


class Worth:
    """What reading and loading take."""

    def __init__(self) -> None:
        self._prefill = Prefill()
        self._begin_seconds: float | None = None
        self._loads = 0

    def read(self, tokens: int, behind: int, seconds: float) -> None:
        """The model read so many tokens behind so many that were loaded, and chose the next one, in so long. The first time
        behind loaded ones says nothing: kernels are chosen for it."""
        known = self._prefill.step_seconds
        if behind == 0:
            self._prefill.computed(tokens, seconds)
        elif tokens <= _SHORT_TOKENS and self._loads > 1:
            # Not the fastest of late: a load that came out slower is not tried again at once.
            self._prefill.step_seconds = seconds if known is None else (known + seconds) / 2

    def began(self, seconds: float) -> None:
        """Beginning a load took so long. The first one also made streams and found memory on the GPU."""
        self._loads += 1
        if self._loads > 1:
            self._begin_seconds = believe(self._begin_seconds, seconds)

    def pays(self, tokens: int, size: int, bytes_per_s: float) -> bool:
        """Is loading the first tokens, of so many bytes, better than reading them?"""
        load = (self._begin_seconds or 0.0) + size / bytes_per_s
        pays = load <= MARGIN * self._prefill.compute_seconds(0, tokens)
        if not pays:
            step = self._prefill.step_seconds
            self._prefill.step_seconds = None if step is None else _DOUBT * step
            self._begin_seconds = None if self._begin_seconds is None else _DOUBT * self._begin_seconds
        return pays
