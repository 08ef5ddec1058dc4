"""Returns memory that requests leave behind in the C library to the system, once no request is open.

A megabyte of text becomes token lists of a hundred times its size. They are freed when the request is refused,
but glibc keeps their pages, in one arena per thread. Returning them takes milliseconds, so it is done only after
large bodies.
"""

from __future__ import annotations

import asyncio
import time

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge_runtime.system.memory import give_back

LARGE_BYTES = 256 << 10
"""Total of bodies since the last release."""
IDLE_AFTER_S = 1.0
"""Without a request."""
MUCH_BYTES, MAX_WAIT_S = 64 << 20, 30.0
"""Bodies and time after which memory is released even while requests are open."""


class ReleaseIdleMemory:
    """ASGI middleware: counts request bodies, and releases memory after large ones."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._n_open = self._n_bytes = 0
        self._last = time.monotonic()
        self._timer: asyncio.Handle | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted() -> Message:
            message = await receive()
            self._n_bytes += len(message.get("body", b""))
            return message

        self._n_open += 1
        try:
            await self._app(scope, counted, send)
        finally:
            self._n_open -= 1
            self._end()

    def _end(self) -> None:
        if self._n_bytes < LARGE_BYTES:
            return
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        if self._n_bytes > MUCH_BYTES and time.monotonic() - self._last > MAX_WAIT_S:
            self._timer = loop.call_soon(self._give_back, True)
        else:
            self._timer = loop.call_later(IDLE_AFTER_S, self._give_back, False)

    def _give_back(self, anyway: bool) -> None:
        if self._n_open and not anyway:
            return  # the last of them calls this again
        self._n_bytes, self._last = 0, time.monotonic()
        asyncio.get_running_loop().run_in_executor(None, give_back)


def middleware() -> list[Middleware]:
    """The outermost middleware: refused bodies count, too."""
    return [Middleware(ReleaseIdleMemory)]
