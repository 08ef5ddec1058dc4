"""How many answers get their next token in one batch of llama.cpp, learnt from how long calls take.

A call costs a pass over the weights, so the more rows share it the better; but from 8 rows on llama.cpp unpacks
K-quants before it multiplies (`ggml_tiled_min_batch` in 0.3.36), so 8 rows cost more than a call of 7 and a call
of 1. Which is better depends on processor, memory and weights, so both are tried.
"""

from __future__ import annotations

from collections import deque
from statistics import median

BELOW_UNPACKING = 7
"""Up to this many rows, llama.cpp multiplies packed weights."""
SAMPLES = 3
"""Calls of each width to compare: the most recent ones."""
ASK_AGAIN = 64
"""Calls after which the slower width is tried again."""


class BatchWidth:
    """Seconds of calls by their number of rows; only of calls that just generate."""

    def __init__(self) -> None:
        self._seconds: dict[int, deque[float]] = {}
        self._since: dict[int, int] = {}
        """Calls since a width was tried."""

    def choose(self, n_running: int) -> int:
        """How many of `n_running` answers the next call serves; the ones left out are first in the call after it."""
        if n_running <= BELOW_UNPACKING:
            return n_running
        widths = (n_running, BELOW_UNPACKING)
        for width in widths:
            if len(self._seconds.get(width, ())) < SAMPLES or self._since[width] >= ASK_AGAIN:
                return width
        return min(widths, key=lambda width: median(self._seconds[width]) / width)

    def record(self, n_rows: int, seconds: float) -> None:
        """Learn from how long a call took."""
        for width in self._since:
            self._since[width] += 1
        self._since[n_rows] = 0
        self._seconds.setdefault(n_rows, deque(maxlen=SAMPLES)).append(seconds)
