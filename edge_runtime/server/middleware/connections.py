"""uvicorn's connections, with the limits on time and number that it lacks.

uvicorn waits forever for the head of a request, and forever for a client that does not read; both hold a connection,
and the second holds an answer. Here heads have a time limit, readers a minimum rate, and the number of connections is
limited, in total and per client. When there is one too many, the connection that has been idle for longest is closed:
its client opens another when it needs one. A new connection is refused, with an error, only when all others are busy.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from edge_runtime.server.middleware.pace import Pace
from edge_runtime.server.middleware.shares import SURPLUS, client_of
from edge_runtime.server.settings import Settings

MAX_SURPLUS = 32
"""Connections beyond the limit that get an error; further ones are closed without one."""
SURPLUS_S = 3.0
"""For the head of a request that will be refused."""
KEEP_ALIVE_S = 75
"""Idle time between two requests; longer than clients and proxies keep connections, so that they close first."""
LOOKS = 4
"""How often a reader is checked within `patience_s`."""


class _Timer:
    """One delayed call that can be cancelled."""

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


def _send_at_once(transport: asyncio.Transport) -> None:
    """Switch off Nagle's algorithm, which keeps a reply's second packet until the first is acknowledged: 40 ms later.

    asyncio does so only where the listening socket names its protocol.
    """
    connection = transport.get_extra_info("socket")
    if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class GuardedConnection(H11Protocol):
    """A connection whose client has to send and read in time."""

    header_timeout_s = 20.0
    patience_s = 30.0
    min_per_s = 1024.0
    max_total, max_each = 512, 384
    surplus: ClassVar[set[GuardedConnection]] = set()

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._head, self._reader = _Timer(), _Timer()
        self.owner = ""
        """The client it belongs to."""
        self.idle_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start; if there are too many connections, close an idle one or refuse this one with a reason."""
        super().connection_made(transport)
        _send_at_once(transport)
        self.owner = client_of(self.client[0] if self.client else "")
        self.idle_since = self.loop.time()
        refusal = self._find_room()
        if refusal is None:
            self._head.start(self.loop, self.header_timeout_s, transport.abort)
        elif len(self.surplus) >= MAX_SURPLUS:
            transport.abort()
        else:
            self.surplus.add(self)
            self.app_state = {**self.app_state, SURPLUS: refusal}
            self._head.start(self.loop, min(SURPLUS_S, self.header_timeout_s), transport.abort)

    @property
    def is_idle(self) -> bool:
        """Whether no request is running, and the client has read everything."""
        is_asked = self.cycle is not None and not self.cycle.response_complete
        return not is_asked and self.transport.get_write_buffer_size() == 0

    def _find_room(self) -> str | None:
        """Make room for this connection, or return the reason why there is none."""
        others = [
            other
            for other in self.connections
            if isinstance(other, GuardedConnection) and not other.transport.is_closing()
        ]
        counted = [other for other in others if other not in self.surplus and other is not self]
        held = Counter(other.owner for other in counted)
        idle = [other for other in counted if other.is_idle]
        if held[self.owner] >= self.max_each:
            idle = [other for other in idle if other.owner == self.owner]
            reason = f"Your address has {held[self.owner]} busy connections, which is its share"
        elif len(counted) >= self.max_total:  # only of clients with at least as many connections as this one's
            idle = [other for other in idle if held[other.owner] >= held[self.owner]]
            reason = f"{len(counted)} connections are busy, which is the limit"
        else:
            return None
        if not idle:
            return f"{reason}; try again later."
        min(idle, key=lambda other: (-held[other.owner], other.idle_since)).shutdown()
        return None

    def data_received(self, data: bytes) -> None:
        """Receive bytes; if they start a head, its end has to follow in time."""
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
        self.surplus.discard(self)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """More is ready than the client has read."""
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        """The client has read enough."""
        super().resume_writing()
        self._reader.stop()

    def on_response_complete(self) -> None:
        """Everything is written; the client has to read what is left."""
        self.idle_since = self.loop.time()
        super().on_response_complete()
        self._expect_reading()

    def _expect_reading(self) -> None:
        """Check now and then how much was read; a connection closed in the normal way would wait for that forever."""
        self._reader.stop()
        if self.transport.get_write_buffer_size():
            self._look_later(Pace(self.patience_s, self.min_per_s), self._unread())

    def _look_later(self, pace: Pace, unread: int) -> None:
        self._reader.start(self.loop, self.patience_s / LOOKS, self._look, pace, unread)

    def _look(self, pace: Pace, before: int) -> None:
        unread = self._unread()
        if not self.transport.get_write_buffer_size():
            self._reader.stop()
        elif pace.waited(self.patience_s / LOOKS, max(0, before - unread)):
            self._look_later(pace, unread)
        else:
            self.transport.abort()

    def _unread(self) -> int:
        """Bytes that the client's machine has not received, those in the system's own buffer included.

        The system accepts more only when much of its buffer is free: without counting it, a reader seems to stall
        for minutes.
        """
        n_bytes = self.transport.get_write_buffer_size()
        if sys.platform != "win32":
            import fcntl
            import termios

            with contextlib.suppress(OSError, ValueError, AttributeError):
                answer = fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
                n_bytes += struct.unpack("i", answer)[0]
        return n_bytes


def guarded(settings: Settings) -> type[GuardedConnection]:
    """The class of connections with a server's limits."""
    limits = {
        "header_timeout_s": settings.header_timeout_s,
        "patience_s": settings.body_timeout_s,
        "min_per_s": settings.min_bytes_per_s,
        "max_total": settings.max_connections,
        "max_each": settings.connections_of_one,
        "surplus": set(),
    }
    return type("Connection", (GuardedConnection,), limits)
