"""What stands before the routes: Host names, origins, keys, sizes and times. ASGI, without a route's knowledge.

    Headers ─ Bodies ─ TimeLimit ─ CORS ─ Gate ─ routes

`Headers` tells browsers to be careful with every reply. `Bodies` counts what clients send, of one request and of all
together, and ends those who send too much or too slowly. `TimeLimit` bounds what follows. `Gate` refuses who asks
under a foreign name (DNS rebinding), from a foreign page, or without the key, before a byte of a body is read.
`connections` has what cannot be seen from here: heads that never end and readers who never read.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from hashlib import sha256
from ipaddress import ip_address
from typing import Any

from starlette.datastructures import Headers as RequestHeaders
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge_runtime.errors import EdgeRuntimeError, EngineBusy
from edge_runtime.server.errors import NotAllowed, ServerError, TimedOut, TooLarge, Unauthorized, error_response
from edge_runtime.server.settings import Settings

LEAST_BYTES_PER_S = 2048
"""Slower than the slowest phone; a body that drips is ended."""
BODIES_TOGETHER = 4
"""Times the limit of one: most bytes of bodies that all requests together may hold in memory."""
LINGER_S, LINGER_BYTES = 2.0, 16 << 20
"""What is still read of a body that was refused, so that its sender gets to see why."""
SPARE_S = 5.0
"""Routes end their answers themselves, with a word in the stream; this much later it is done without one."""
MANY_HOURS = ("/api/pull", "/api/push", "/api/create", "/api/blobs/")
"""Paths whose work may take any time as long as it goes on."""
BLOBS = "/api/blobs/"

OPEN_PATHS = frozenset({"/", "/health", "/sw.js", "/favicon.ico"})
"""Need no key: the page holds no secret, and whoever watches a server need not be able to use it."""
OPEN_FOLDER = "/static/"

LOOPBACK_NAMES = frozenset({"localhost", "host.docker.internal", "host.containers.internal"})
"""Names of this machine that no public name server can give away; the latter two as containers call it."""


def middleware(settings: Settings) -> list[Middleware]:
    """Middleware of a server, the outermost first."""
    found = [Middleware(Headers), Middleware(Bodies, settings=settings), Middleware(TimeLimit, settings=settings)]
    if settings.cors_origins:
        found.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.cors_origins,
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=["Retry-After"],
                allow_private_network=True,  # the origin was named by the owner
            )
        )
    return [*found, Middleware(Gate, settings=settings)]


def warnings_for(settings: Settings) -> list[str]:
    """What an owner should know before the server starts."""
    found = []
    if not settings.is_loopback and settings.api_key is None:
        found.append(
            f"Everybody who reaches {settings.host}:{settings.port} can use this server, and no key is asked for. "
            "Give one with --api-key, or listen on this machine alone with --host 127.0.0.1."
        )
    if settings.api_key is not None and len(settings.api_key) < 16:
        found.append(
            f"The API key has {len(settings.api_key)} characters and can be guessed; take one of 16 or more, such as "
            "that of: openssl rand -hex 24"
        )
    if "*" in settings.cors_origins and settings.api_key is None:
        found.append("Every web page that is open in a browser here may use this server (--cors '*', no --api-key).")
    if "*" in settings.allow_url:
        found.append("Pictures are fetched from any public address that a request names (--allow-url '*').")
    return found


async def refuse(error: EdgeRuntimeError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with an error in the form of the API that was asked."""
    await error_response(error, scope["path"])(scope, receive, send)


# --- headers -------------------------------------------------------------------------------------------------------

_CAREFUL = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}
"""Where a route says nothing else; answers may be private, and none of them is a page."""


class Headers:
    """Adds headers under which a browser neither guesses, nor frames, nor keeps what it gets."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        asked = RequestHeaders(scope=scope)
        # Proxies and servers have disagreed on where such a body ends: what follows it is not taken for a request.
        is_ambiguous = "content-length" in asked and "transfer-encoding" in asked

        async def careful(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if is_ambiguous:
                    headers["Connection"] = "close"
                for name, value in _CAREFUL.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, careful)


# --- sizes ---------------------------------------------------------------------------------------------------------


class RequestTimedOut(ServerError):  # noqa: N818 - as HTTP calls it
    """A body that did not arrive in time."""

    status = 408


@dataclass
class Held:
    """Bytes of bodies in memory, of all requests."""

    limit: int
    n_bytes: int = 0


class Bodies:
    """Bounds what clients send."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings
        self._held = Held(BODIES_TOGETHER * settings.max_body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_blob = scope["path"].startswith(BLOBS)  # goes to the disk piece by piece
        limit = self._settings.max_blob_bytes if is_blob else self._settings.max_body_bytes
        held = Held(limit) if is_blob else self._held
        body = _Body(scope, receive, send, limit, self._settings.body_timeout_s, held)
        try:
            await self._app(scope, body.receive, body.send)
        except Exception:
            if body.refusal is None or body.has_begun:  # otherwise it is what a route made of the refusal
                raise
        finally:
            held.n_bytes -= body.n_bytes
        if body.refusal is not None and not body.has_begun:
            await refuse(body.refusal, scope, receive, body.send_refusal)


@dataclass
class _Body:
    """The body of one request, and the reply to it."""

    scope: Scope
    receive_next: Receive
    send_next: Send
    limit: int
    timeout_s: float
    held: Held
    started: float = field(default_factory=time.monotonic)
    n_bytes: int = 0
    is_complete: bool = False
    has_begun: bool = False
    """The reply."""
    was_asked: bool = False
    """Whether somebody wanted the body; until then a client may wait to be told to send it."""
    refusal: EdgeRuntimeError | None = None

    async def receive(self) -> Message:
        """The next piece.

        Raises
        ------
        ServerError
            When there is too much of it, or it does not come. Whatever becomes of it on the way, it is the reply.
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
        left = self.started + self.timeout_s + self.n_bytes / LEAST_BYTES_PER_S - time.monotonic()
        try:
            message = await asyncio.wait_for(self.receive_next(), max(0.0, min(left, self.timeout_s)))
        except TimeoutError:
            raise RequestTimedOut(
                f"The body did not arrive in time: {self.n_bytes} bytes in {time.monotonic() - self.started:.0f} s."
            ) from None
        if message["type"] != "http.request":
            self.is_complete = True  # the client is gone
            return message
        self.is_complete = not message.get("more_body", False)
        self.n_bytes += len(message.get("body", b""))
        self.held.n_bytes += len(message.get("body", b""))
        if self.n_bytes > self.limit:
            raise self._too_large()
        if self.held.n_bytes > self.held.limit:
            raise EngineBusy(
                f"The requests of all clients together hold more than {self.held.limit / 1e6:.0f} MB, which is the "
                "limit; try again later."
            )
        return message

    def _too_large(self) -> TooLarge:
        return TooLarge(
            f"The body has more than {self.limit} bytes, which is the limit; send fewer or smaller pictures."
        )

    async def send(self, message: Message) -> None:
        """Pass the reply on, unless the body is refused: then that is the reply."""
        if self.refusal is None or self.has_begun:
            await self.send_refusal(message)

    async def send_refusal(self, message: Message) -> None:
        """Pass the reply on; who is still sending is told that the connection ends, and given time to see it."""
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
        """Read on for a moment: a connection closed over unread bytes takes the reply with it."""
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


class TimeLimit:
    """Ends requests that take longer than the owner allows, counted from the end of the body."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._limit_s = app, settings.request_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http" or scope["path"].startswith(MANY_HOURS):
            await self._app(scope, receive, send)
            return
        has_begun, has_all = False, False

        async def watched_send(message: Message) -> None:
            nonlocal has_begun
            has_begun = has_begun or message["type"] == "http.response.start"
            await send(message)

        async def watched_receive() -> Message:
            nonlocal has_all
            message = await receive()
            if not has_all:
                has_all = not message.get("more_body", False)
                limit.reschedule(self._end())
            return message

        try:
            async with asyncio.timeout_at(self._end()) as limit:
                await self._app(scope, watched_receive, watched_send)
        except TimeoutError:
            if not limit.expired() or has_begun:
                raise
            error = TimedOut(f"The request took longer than {self._limit_s:g} s, which is the limit; ask for less.")
            await refuse(error, scope, receive, send)

    def _end(self) -> float:
        return asyncio.get_running_loop().time() + self._limit_s + SPARE_S


# --- who may ask ---------------------------------------------------------------------------------------------------


class Gate:
    """Lets requests in that come under one of the server's names, from no foreign page, with the key."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings
        self._digest = None if settings.api_key is None else sha256(settings.api_key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http":
            headers = RequestHeaders(scope=scope)
            try:
                self._check_host(headers)
                self._check_origin(headers)
                self._check_key(scope, headers)
            except ServerError as error:
                await refuse(error, scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check_host(self, headers: RequestHeaders) -> None:
        """A name that an attacker's name server points here brings his page with it; its Host header tells."""
        name = host_name(headers.get("host", ""))
        if not is_own_name(name, self._settings):
            raise NotAllowed(
                f"This server is not known as {name[:80]!r}; use its address, or ask its owner for --allow-host."
            )

    def _check_origin(self, headers: RequestHeaders) -> None:
        """Browsers send simple requests of any page anywhere; only the reply is kept from it, not what was done."""
        origin, allowed = headers.get("origin"), self._settings.cors_origins
        if "*" in allowed:
            return
        if origin is None:
            # A picture or script that a foreign page includes from here: no page of ours is loaded that way.
            if headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") != "navigate":
                raise NotAllowed("Other sites' pages may not use this server; its owner can allow them with --cors.")
            return
        scheme, _, host = origin.partition("://")
        if origin not in allowed and not (scheme in ("http", "https") and host and host == headers.get("host")):
            raise NotAllowed(
                f"Pages of {origin[:80]!r} may not use this server; its owner can allow it with --cors {origin[:80]}"
            )

    def _check_key(self, scope: MutableMapping[str, Any], headers: RequestHeaders) -> None:
        if self._digest is None:
            return
        path = scope["path"]
        if scope["method"] in ("GET", "HEAD") and (path in OPEN_PATHS or path.startswith(OPEN_FOLDER)):
            return
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = [bearer.strip()] if scheme.lower() == "bearer" else []
        given += [headers["x-api-key"]] if "x-api-key" in headers else []
        # Digests are of one length, and comparing them takes as long however much of a guess is right.
        if not any(hmac.compare_digest(sha256(key.encode("latin-1")).digest(), self._digest) for key in given):
            raise Unauthorized(
                "The API key is wrong; expected the one the server was started with, as Authorization: Bearer KEY."
                if given
                else "This server asks for a key; expected Authorization: Bearer KEY, or x-api-key: KEY."
            )


def host_name(header: str) -> str:
    """The name in a Host header, without the port and in small letters; empty if there is none."""
    name = header.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0].rstrip(".")


def is_own_name(name: str, settings: Settings) -> bool:
    """Whether a server with these settings can be meant by a name.

    An address cannot be rebound, so every address is. Who listens beyond this machine may be called by names of the
    local network too: without a dot (as containers of one network call each other) or ending in `.local`.
    """
    allowed = {host.lower().rstrip(".") for host in (*settings.allowed_hosts, settings.host)}
    if name and ("*" in allowed or name in LOOPBACK_NAMES or name.endswith(".localhost") or name in allowed):
        return True
    if any(host.startswith("*.") and name.endswith(host[1:]) for host in allowed):
        return True
    try:
        ip_address(name.partition("%")[0])
    except ValueError:
        return not settings.is_loopback and bool(name) and ("." not in name or name.endswith(".local"))
    return True
