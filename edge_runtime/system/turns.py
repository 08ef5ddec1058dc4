"""Turns at what is scarce: so many at a time, and whoever has waited longest is next.

`threading.Semaphore` lets a thread that releases it take it again at once, however long others have waited.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """Long work takes a turn for each of its pieces, so that all long works advance together.

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

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for a turn, and have it while the block lasts."""
        called: threading.Event | None = None
        with self._lock:
            if self._n_free:
                self._n_free -= 1
            else:
                called = threading.Event()
                self._waiting.append(called)
        if called is not None:
            self._wait(called)
        try:
            yield
        finally:
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
