"""Who is next: a limited number of places, given first to the clients that have used them least recently."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from edge_runtime.inputs.workers.worker import POLL_S

Check = Callable[[], None]
"""Called while a request waits; what it raises ends the wait."""
HALF_S = 10.0
"""Half-life of the time that a client has used a place."""
MIN_USE_S = 1e-3
"""Less used time than this is forgotten."""


@dataclass(eq=False)
class _Ticket:
    """A request that waits for a place."""

    owner: str


class Lane:
    """Places, given to the client with the least recent use first, then in the order of requests."""

    def __init__(self, n_places: int, changed: threading.Condition) -> None:
        self.n_free, self._changed = n_places, changed
        self.waiting: list[_Ticket] = []
        self._used: dict[str, float] = {}
        """Client → seconds."""
        self._seen = time.monotonic()

    def take(self, owner: str, check: Check) -> float:
        """Wait for a place; returns the time at which it was given. The caller must not hold the condition's lock."""
        ticket = _Ticket(owner)
        with self._changed:
            self.waiting.append(ticket)
        try:
            while True:
                check()
                with self._changed:
                    if self._is_next(ticket):
                        self.n_free -= 1
                        return time.monotonic()
                    self._changed.wait(POLL_S)
        finally:
            with self._changed:
                self.waiting.remove(ticket)
                self._changed.notify_all()

    def take_now(self) -> bool:
        """Take a place if one is free and nobody waits."""
        with self._changed:
            if self.waiting or not self.n_free:
                return False
            self.n_free -= 1
            return True

    def give_back(self, owner: str, since: float) -> None:
        """Give back a place that was given at the time `since`."""
        now = time.monotonic()
        with self._changed:
            self.n_free += 1
            fade = 0.5 ** ((now - self._seen) / HALF_S)
            self._seen = now
            used = {name: seconds * fade for name, seconds in self._used.items() if seconds * fade > MIN_USE_S}
            used[owner] = used.get(owner, 0.0) + now - since
            self._used = used
            self._changed.notify_all()

    def _is_next(self, ticket: _Ticket) -> bool:
        return self.n_free > 0 and min(self.waiting, key=lambda other: self._used.get(other.owner, 0.0)) is ticket
