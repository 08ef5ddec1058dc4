"""Connections of uvicorn, with the limits of patience that it does not have itself.

uvicorn waits for ever for the head of a request, and for ever for a client that does not read; both keep a
connection, and the second keeps an answer. Here heads have a time, readers have a time, and there are only so many
connections.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from edge_runtime.server.settings import Settings

MOST_CONNECTIONS = 512
"""Each costs a file descriptor, of which processes usually have 1024."""
KEEP_ALIVE_S = 75
"""Idle, between two requests; longer than clients and proxies keep connections, so that it is they who close."""


class _Timer:
    """One call that may come, or be called off."""

    _handle: asyncio.TimerHandle | None = None

    @property
    def runs(self) -> bool:
        return self._handle is not None

    def start(self, loop: asyncio.AbstractEventLoop, seconds: float, call: Callable[..., None], *args: Any) -> None:
        self.stop()
        self._handle = loop.call_later(seconds, call, *args)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


class GuardedConnection(H11Protocol):
    """A connection whose client has to send and to read."""

    header_timeout_s = 20.0
    write_timeout_s = 60.0

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._head, self._reader = _Timer(), _Timer()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, or turn away who is one too many."""
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()
        else:
            self._head.start(self.loop, self.header_timeout_s, transport.abort)

    def data_received(self, data: bytes) -> None:
        """Take in bytes; if they are the beginning of a head, the rest has to follow in time."""
        super().data_received(data)
        is_in_head = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        if not is_in_head:
            self._head.stop()
        elif not self._head.runs:
            self._head.start(self.loop, self.header_timeout_s, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """End, timers included."""
        self._head.stop()
        self._reader.stop()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """More is ready than the client has taken."""
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        """The client has taken enough."""
        super().resume_writing()
        self._reader.stop()

    def on_response_complete(self) -> None:
        """All is written; the client has to take what is left."""
        super().on_response_complete()
        self._expect_reading()

    def _expect_reading(self) -> None:
        """Look after a while whether anything was taken; a connection closed in the normal way would wait for it."""
        self._reader.stop()
        left = self.transport.get_write_buffer_size()
        if left:
            self._reader.start(self.loop, self.write_timeout_s, self._look, left)

    def _look(self, before: int) -> None:
        if self.transport.get_write_buffer_size() >= before:
            self.transport.abort()
        else:
            self._expect_reading()


def guarded(settings: Settings) -> type[GuardedConnection]:
    """The class of a server's connections."""
    times = {"header_timeout_s": settings.header_timeout_s, "write_timeout_s": settings.body_timeout_s}
    return type("Connection", (GuardedConnection,), times)
