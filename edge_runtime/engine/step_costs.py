"""Seconds of steps by their number of rows, as this machine takes them."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from statistics import median

SAMPLES = 5
"""Most recent steps of a number of rows that count."""
OLD = 2048
"""Steps after which a number of rows that did not occur is forgotten: the machine may have been busy."""
ROW_SHARE = 0.2
"""What a further row costs, in steps of one row, where no such step was measured yet."""


class StepCosts:
    """Learns from steps that compute nothing but next tokens and drafts."""

    def __init__(self) -> None:
        self._samples: dict[int, deque[float]] = {}
        self._known: list[int] = []
        """Measured numbers of rows, ascending."""
        self._n, self._last = 0, dict[int, int]()
        """Steps so far, and the last one of each number of rows."""

    def record(self, n_rows: int, seconds: float) -> None:
        """Learn from a step."""
        self._n += 1
        self._last[n_rows] = self._n
        self._samples.setdefault(n_rows, deque(maxlen=SAMPLES)).append(seconds)
        for n in [n for n, last in self._last.items() if self._n - last > OLD]:
            del self._samples[n], self._last[n]
        self._known = sorted(self._samples)

    def seconds(self, n_rows: int) -> float:
        """What a step of so many rows takes: measured, or between and beyond what was measured."""
        if not self._known:
            return 1 + ROW_SHARE * (n_rows - 1)
        i = bisect_left(self._known, n_rows)
        above = self._known[i] if i < len(self._known) else None
        if above == n_rows:
            return median(self._samples[n_rows])
        below = self._known[i - 1] if i else None
        if below is not None and above is not None:
            low, high = median(self._samples[below]), median(self._samples[above])
            return low + (high - low) * (n_rows - below) / (above - below)
        if below is not None:
            return median(self._samples[below]) * (1 + ROW_SHARE * (n_rows - 1)) / (1 + ROW_SHARE * (below - 1))
        assert above is not None
        return median(self._samples[above]) * (1 + ROW_SHARE * (n_rows - 1)) / (1 + ROW_SHARE * (above - 1))
