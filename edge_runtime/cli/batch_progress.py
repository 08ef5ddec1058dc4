"""How far a batch is: one line on a terminal with rate and time left; and one sentence at the end."""

from __future__ import annotations

import sys
import time
from collections import deque

import click

from edge_runtime.batch.items import Source

SHOW_S = 0.2
WINDOW_S = 120.0
"""Time over which the rate is taken."""


class BatchProgress:
    """Counts lines, and shows them on a terminal.

    Parameters
    ----------
    source : knows how many items there are.
    """

    def __init__(self, source: Source) -> None:
        self._source, self._started = source, time.monotonic()
        self.n_before = self.n_lines = self.n_failed = 0
        self._live, self._shown_at = sys.stderr.isatty(), 0.0
        self._times: deque[tuple[float, int]] = deque([(self._started, 0)])
        self.note = ""
        """Shown at the end of the line."""

    def skip(self) -> None:
        """An item was done before."""
        self.n_before += 1

    def line(self, is_error: bool | None) -> None:
        """A line was written; with None, only time has passed."""
        now = time.monotonic()
        if is_error is not None:
            self.n_lines += 1
            self.n_failed += is_error
        if now - self._shown_at > SHOW_S:
            self._shown_at = now
            self._times.append((now, self.n_lines))
            while now - self._times[0][0] > WINDOW_S:
                self._times.popleft()
            if self._live:
                click.echo(f"\r\x1b[K\x1b[2m{self.text(now)}\x1b[0m", err=True, nl=False)

    def text(self, now: float) -> str:
        """The line."""
        done = self.n_before + self.n_lines
        more = "" if self._source.is_final else "+"
        parts = [f"{done:,} of {self._source.total:,}{more} items"]
        since, before = self._times[0]
        if self.n_lines > before and now > since:
            rate = (self.n_lines - before) / (now - since)
            parts += [rate_of(rate), f"{clock((self._source.total - done) / rate)}{more} left"]
        if self.n_failed:
            parts.append(f"{self.n_failed:,} failed")
        return ", ".join(parts) + self.note

    def clear(self) -> None:
        """Erase the line."""
        if self._live and self._shown_at:
            click.echo("\r\x1b[K", err=True, nl=False)

    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started


def rate_of(per_second: float) -> str:
    """A rate in the unit in which it is no less than one, if there is one."""
    for seconds, unit in ((1, "s"), (60, "min")):
        if per_second * seconds >= 1:
            return f"{per_second * seconds:.1f}/{unit}"
    return f"{per_second * 3600:.1f}/h"


def clock(seconds: float) -> str:
    """Seconds as `0:07`, `12:30` or `3:04:05`."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
