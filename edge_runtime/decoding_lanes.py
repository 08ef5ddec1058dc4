"""Who is next: places for so many at a time, given first to clients that have fewer of them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from edge_runtime.decoding_worker import LOOK_S

Check = Callable[[], None]
"""Called while somebody waits; what it raises ends the waiting."""


@dataclass(eq=False)
class _Ticket:
    """Somebody who waits for a place."""

    owner: str


class Lane:
    """Places: for clients with fewer of them first, then in the order in which they were asked for."""

    def __init__(self, n_places: int, changed: threading.Condition) -> None:
        self.n_free, self._changed = n_places, changed
        self.waiting: list[_Ticket] = []
        self._held: Counter[str] = Counter()

    def take(self, owner: str, check: Check) -> None:
        """Wait for a place. The condition's lock is not held by the caller."""
        ticket = _Ticket(owner)
        with self._changed:
            self.waiting.append(ticket)
        try:
            while True:
                check()
                with self._changed:
                    if self._is_next(ticket):
                        self._give(owner)
                        return
                    self._changed.wait(LOOK_S)
        finally:
            with self._changed:
                self.waiting.remove(ticket)
                self._changed.notify_all()

    def take_now(self, owner: str) -> bool:
        """Take a place if there is one and nobody waits."""
        with self._changed:
            if self.waiting or not self.n_free:
                return False
            self._give(owner)
            return True

    def give_back(self, owner: str) -> None:
        """Leave."""
        with self._changed:
            self.n_free += 1
            self._held[owner] -= 1
            self._held += Counter()  # drops those who hold none
            self._changed.notify_all()

    def _give(self, owner: str) -> None:
        self.n_free -= 1
        self._held[owner] += 1

    def _is_next(self, ticket: _Ticket) -> bool:
        return self.n_free > 0 and min(self.waiting, key=lambda other: self._held[other.owner]) is ticket
