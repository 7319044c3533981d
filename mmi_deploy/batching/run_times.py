"""Run times: the expected seconds of a run, from those that were measured, and percentiles."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable

import numpy as np

# Weight of the newest measurement in the moving average.
NEWEST = 0.2

# Runs of each kind and size among which the longest is found.
LAST = 64

# Measurements of which `Recent` keeps the last.
KEPT = 4096


class Recent:
    """The last measurements of one quantity. One thread adds, any thread reads."""

    def __init__(self) -> None:
        self.count = 0
        self._values = np.zeros(KEPT)

    def add(self, value: float) -> None:
        """Add a measurement."""
        self._values[self.count % KEPT] = value
        self.count += 1

    def percentile(self, share: float) -> float | None:
        """Value below which `share` percent of the measurements lie; None without any."""
        if not self.count:
            return None
        return float(np.percentile(self._values[: min(self.count, KEPT)], share))


class RunTimes:
    """Moving average of the seconds of each kind of run, by its size (rows, images or tokens). One
    thread adds, any thread reads."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, dict[int, float]] = defaultdict(dict)
        self._last: defaultdict[str, dict[int, deque[float]]] = defaultdict(dict)

    def add(self, kind: str, size: int, seconds: float) -> None:
        """Add a measurement."""
        known = self._seconds[kind]
        before = known.get(size, seconds)
        known[size] = before + NEWEST * (seconds - before)
        self._last[kind].setdefault(size, deque(maxlen=LAST)).append(seconds)

    def expected(self, kind: str, size: int) -> float:
        """Expected seconds of a run: interpolated between the sizes that were measured, in
        proportion beyond the largest; 0 if none was."""
        known = self._seconds.get(kind, {}).copy()  # at once: it may grow meanwhile
        if not known:
            return 0.0
        below = max((s for s in known if s <= size), default=None)
        above = min((s for s in known if s >= size), default=None)
        if below is None:
            assert above is not None
            return known[above]
        if above is None:
            return known[below] * size / below
        if above == below:
            return known[below]
        share = (size - below) / (above - below)
        return known[below] + share * (known[above] - known[below])

    def worst(self, kind: str, size: int) -> float:
        """Longest of the last runs of at most this size; 0 if none was measured."""
        last = self._last.get(kind, {}).copy()
        return max((max(last[known].copy()) for known in last if known <= size), default=0.0)

    def largest(self, kind: str, sizes: Iterable[int], seconds: float) -> int:
        """Largest of `sizes`, in ascending order, that is expected to take at most `seconds`; the
        first if none is."""
        first, *others = sizes
        found = first
        for size in others:
            if self.expected(kind, size) > seconds:
                break
            found = size
        return found
