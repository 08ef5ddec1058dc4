"""Limits on bodies: their size, and how slowly they may arrive. ASGI; knows no routes.

    Headers ─ Bodies ─ TimeLimit ─ Clients ─ Gate ─ CORS ─ Key ─ HEAD as GET ─ routes

`Headers` adds security headers to every reply. `Bodies` counts what clients send, per request and in total, and
refuses those that send too much or too slowly. `TimeLimit` bounds what follows. `Clients` records whose request it
is. `Gate` refuses requests under a foreign name (DNS rebinding) or from a foreign page, `Key` those without the key,
before a byte of a body is read. CORS is between them, since browsers send preflight requests without a key.
`connections` handles what cannot be seen from here: heads that never end, and readers that never read.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from starlette.datastructures import Headers as RequestHeaders
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge_runtime.errors import EdgeRuntimeError, EngineBusy
from edge_runtime.server.errors import TooLarge
from edge_runtime.server.middleware.gate import refuse
from edge_runtime.server.middleware.pace import Pace
from edge_runtime.server.middleware.time_limit import RequestTimedOut
from edge_runtime.server.settings import MEGABYTE, Settings
from edge_runtime.system.memory import available_bytes

BODIES_TOGETHER = 4
"""Limit for the bodies of all requests in memory, as a multiple of the limit for one."""
MEMORY_SHARE = 8
"""Nor may they hold more than one part in this many of the free memory: parsing a body takes several times its
size."""
FEW_BYTES = 4 * MEGABYTE
"""Always allowed in total, so that a question without pictures is always accepted."""
MEMORY_S = 1.0
"""How long a reading of the free memory is used."""
LINGER_S, LINGER_BYTES = 2.0, 16 << 20
"""How much of a refused body is still read, so that its sender gets to see the reason."""
BLOBS, FILES = "/api/blobs/", "/v1/files"
"""Uploads, which are written to disk piece by piece."""
FORM_BYTES = 65_536
"""What a form has besides its file."""


# --- headers -------------------------------------------------------------------------------------------------------


# --- sizes ---------------------------------------------------------------------------------------------------------


@dataclass
class Held:
    """Bytes of all requests' bodies in memory."""

    limit: int
    n_bytes: int = 0
    counts_memory: bool = False
    """Whether the limit is lower while little memory is free."""
    _free: int = 0
    _looked: float = -1e9

    @property
    def max_bytes(self) -> int:
        """Bytes that may be held at present."""
        if not self.counts_memory or self.n_bytes <= FEW_BYTES:
            return self.limit
        now = time.monotonic()
        if now - self._looked > MEMORY_S:  # bytes already held are no longer free, but count towards the share
            self._looked, self._free = now, available_bytes() + self.n_bytes
        return min(self.limit, max(FEW_BYTES, self._free // MEMORY_SHARE))


class Bodies:
    """Limits what clients send."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings
        limit = settings.max_bodies_bytes
        self._held = Held(limit or BODIES_TOGETHER * settings.max_body_bytes, counts_memory=limit is None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        stored = self._most_stored(scope["path"])
        limit = self._settings.max_body_bytes if stored is None else stored
        held = self._held if stored is None else Held(limit)
        pace = Pace(self._settings.body_timeout_s, self._settings.min_bytes_per_s)
        body = _Body(scope, receive, send, limit, pace, held)
        try:
            await self._app(scope, body.receive, body.send)
        except Exception:
            if body.refusal is None or body.has_begun:  # otherwise it is a route's reaction to the refusal
                raise
        finally:
            held.n_bytes -= body.n_bytes
        if body.refusal is not None and not body.has_begun:
            await refuse(body.refusal, scope, receive, body.send_refusal)

    def _most_stored(self, path: str) -> int | None:
        """Limit of an upload that is not held in memory; None for all other bodies."""
        if path.startswith(BLOBS):
            return self._settings.max_blob_bytes
        return self._settings.max_file_bytes + FORM_BYTES if path == FILES else None


@dataclass
class _Body:
    """The body of one request, and the reply to it."""

    scope: Scope
    receive_next: Receive
    send_next: Send
    limit: int
    pace: Pace
    held: Held
    started: float = field(default_factory=time.monotonic)
    n_bytes: int = 0
    is_complete: bool = False
    has_begun: bool = False
    """The reply."""
    was_asked: bool = False
    """Whether a route asked for the body; until then a client may wait for `100 Continue`."""
    refusal: EdgeRuntimeError | None = None

    async def receive(self) -> Message:
        """The next piece.

        Raises
        ------
        ServerError
            When the body is too large or too slow. This error is the reply, whatever the routes make of it.
        """
        if self.is_complete:
            return await self.receive_next()
        self.was_asked = True
        try:
            return await self._receive()
        except EdgeRuntimeError as error:
            self.refusal = error
            raise

    async def _receive(self) -> Message:
        headers = RequestHeaders(scope=self.scope)
        announced = headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > self.limit:
            raise self._too_large()
        began = time.monotonic()
        try:
            message = await asyncio.wait_for(self.receive_next(), self.pace.left_s)
        except TimeoutError:
            raise self._too_slow() from None
        n_bytes = len(message.get("body", b""))
        is_in_time = self.pace.waited(
            time.monotonic() - began, n_bytes
        )  # only the client's time counts, not a slow disk's
        if message["type"] != "http.request":
            self.is_complete = True  # the client is gone
            return message
        self.is_complete = not message.get("more_body", False)
        self.n_bytes += n_bytes
        self.held.n_bytes += n_bytes
        if self.n_bytes > self.limit:
            raise self._too_large()
        if self.held.n_bytes > (limit := self.held.max_bytes):
            raise EngineBusy(
                f"The requests of all clients together hold more than {limit / 1e6:.0f} MB, which is the limit; try "
                "again later."
            )
        if not (is_in_time or self.is_complete):
            raise self._too_slow()
        return message

    def _too_slow(self) -> RequestTimedOut:
        return RequestTimedOut(
            f"The body did not arrive in time: {self.n_bytes} bytes in {time.monotonic() - self.started:.0f} s; "
            "expected a faster connection, or a smaller body."
        )

    def _too_large(self) -> TooLarge:
        return TooLarge(
            f"The body has more than {self.limit} bytes, which is the limit; send fewer or smaller pictures."
        )

    async def send(self, message: Message) -> None:
        """Pass the reply on, unless the body was refused: then the refusal is the reply."""
        if self.refusal is None or self.has_begun:
            await self.send_refusal(message)

    async def send_refusal(self, message: Message) -> None:
        """Pass the reply on; a client still sending is told that the connection closes, and gets time to see it."""
        if message["type"] == "http.response.start":
            self.has_begun = True
            if not self.is_complete and self._has_body():
                MutableHeaders(scope=message)["Connection"] = "close"
        elif not message.get("more_body", False) and not self.is_complete and self._has_body():
            await self.send_next({**message, "more_body": True})
            await self._linger()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self.send_next(message)

    def _has_body(self) -> bool:
        headers = RequestHeaders(scope=self.scope)
        return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"

    async def _linger(self) -> None:
        """Read on for a moment: closing a connection with unread bytes discards the reply."""
        if not self.was_asked and RequestHeaders(scope=self.scope).get("expect"):
            return
        n_bytes = 0
        try:
            async with asyncio.timeout(LINGER_S):
                while n_bytes < LINGER_BYTES:
                    message = await self.receive_next()
                    n_bytes += len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return
        except TimeoutError:
            return


# --- times ---------------------------------------------------------------------------------------------------------
