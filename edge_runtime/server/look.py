"""Work on a request before it is submitted looks up at times: whether it is wanted, and for others that wait.

Knows neither requests nor what the work is.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from edge_runtime.server.errors import ShuttingDown

BUSY_S, PAUSE_S = 0.001, 0.0003
"""Work on a request before it is submitted is paused so often, and for so long."""


class Gone(Exception):  # noqa: N818 - says what is the matter
    """Nobody waits for the prepared call any more."""


class Look:
    """Stops work that nobody waits for, and lets other threads have the GIL in between.

    A thread that wants it waits 5 ms for each one that computes in Python, and a token takes it many times.
    """

    def __init__(self, gone: threading.Event, stopping: threading.Event) -> None:
        self._gone, self._stopping = gone, stopping
        self._paused = time.perf_counter()

    def __call__(self, *_: object) -> None:
        """Look; raises when nobody waits any more, or the server is ending."""
        if self._gone.is_set():
            raise Gone
        if self._stopping.is_set():
            raise ShuttingDown("The server is shutting down; try again later.")
        if time.perf_counter() - self._paused > BUSY_S:
            time.sleep(PAUSE_S)
            self._paused = time.perf_counter()

    def everywhere(self) -> dict[str, Any]:
        """Arguments with which `Model.submit` looks between pictures, pages, frames and pieces of text."""
        return {"on_image": self, "on_look": self, "on_check": self}
