"""Turns at what is scarce: so many at a time, and whoever has waited longest is next.

`threading.Semaphore` lets a thread that releases it take it again at once, however long others have waited.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

SLICE_S = 0.01
"""How long a thread keeps its turn while others wait."""


class Turns:
    """Long work takes a turn and passes it on at times, so that all long works advance together.

    Parameters
    ----------
    n : how many have a turn at the same time.
    """

    def __init__(self, n: int) -> None:
        self._n = n
        self._reset()
        if hasattr(os, "register_at_fork"):  # those who have a turn are not in the child
            os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._n_free = self._n
        self._waiting: deque[threading.Event] = deque()
        self._mine = threading.local()
        """`since`: when this thread got its turn, by time.monotonic(); None if it has none."""

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for a turn, unless this thread has one, and have it while the block lasts."""
        if self._has_turn:
            yield
            return
        self._take()
        try:
            yield
        finally:
            self._give()

    @contextmanager
    def without(self) -> Iterator[None]:
        """Have no turn while the block lasts, which waits for something else."""
        if not self._has_turn:
            yield
            return
        self._give()
        try:
            yield
        finally:
            self._take()

    def pass_on(self) -> None:
        """If this thread has had its turn for a while and others wait, wait for the next."""
        if self._has_turn and self._waiting and time.monotonic() - self._mine.since > SLICE_S:
            with self.without():
                pass

    @property
    def _has_turn(self) -> bool:
        return getattr(self._mine, "since", None) is not None

    def _take(self) -> None:
        called: threading.Event | None = None
        with self._lock:
            if self._n_free:
                self._n_free -= 1
            else:
                called = threading.Event()
                self._waiting.append(called)
        if called is not None:
            self._wait(called)
        self._mine.since = time.monotonic()

    def _give(self) -> None:
        if self._has_turn:  # not in a fork of a thread that had one, nor after Ctrl-C while it waited
            self._mine.since = None
            self._end()

    def _wait(self, called: threading.Event) -> None:
        try:
            called.wait()
        except BaseException:  # Ctrl-C
            with self._lock:
                has_turn = called.is_set()
                if not has_turn:
                    self._waiting.remove(called)
            if has_turn:
                self._end()
            raise

    def _end(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._n_free += 1
