"""Seconds of steps by their number of rows, as this machine takes them."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
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
        self._medians: list[float] = []
        """Their seconds."""
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
        samples = [self._samples[n] for n in self._known]
        # More rows do not take less time: what looks like that was another program.
        self._medians = _ascending([median(found) for found in samples], [len(found) for found in samples])

    def seconds(self, n_rows: int) -> float:
        """What a step of so many rows takes: measured, or between and beyond what was measured."""
        if not self._known:
            return _relative(n_rows)
        i = bisect_left(self._known, n_rows)
        if 0 < i < len(self._known):
            (low, high), (below, above) = self._medians[i - 1 : i + 1], self._known[i - 1 : i + 1]
            return low + (high - low) * (n_rows - below) / (above - below)
        i = min(i, len(self._known) - 1)
        return self._medians[i] * _relative(n_rows) / _relative(self._known[i])


def _relative(n_rows: int) -> float:
    return 1 + ROW_SHARE * (n_rows - 1)


def _ascending(values: Sequence[float], weights: Sequence[int]) -> list[float]:
    """The ascending numbers nearest to `values`: where they descend, a mean of them (pool adjacent violators)."""
    pools: list[tuple[float, int, int]] = []
    for value, weight in zip(values, weights, strict=True):
        n = 1
        while pools and pools[-1][0] > value:
            other, its_weight, its_n = pools.pop()
            value = (value * weight + other * its_weight) / (weight + its_weight)
            weight, n = weight + its_weight, n + its_n
        pools.append((value, weight, n))
    return [value for value, _, n in pools for _ in range(n)]
