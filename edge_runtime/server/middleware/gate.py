"""Which requests are allowed: those to one of the server's names, from no foreign page, with the key if one is set.

ASGI; knows no routes. See `bodies` for its place in the stack.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import MutableMapping
from hashlib import sha256
from ipaddress import ip_address
from typing import Any

from starlette.datastructures import Headers as RequestHeaders
from starlette.types import ASGIApp, Receive, Scope, Send

from edge_runtime.errors import EdgeRuntimeError
from edge_runtime.server.errors import NotAllowed, ServerError, Unauthorized, error_response
from edge_runtime.server.middleware.origins import ANY, allowed_origins
from edge_runtime.server.settings import Settings

OPEN_PATHS = frozenset({"/", "/health", "/v1/health", "/sw.js", "/favicon.ico"})
"""Need no key: the page holds no secret, and health checks need not be able to use the server."""
OPEN_FOLDER = "/static/"
READING = ("GET", "HEAD", "OPTIONS")

LOOPBACK_NAMES = frozenset({"localhost", "host.docker.internal", "host.containers.internal"})
"""Names of this machine that no public name server can assign; the latter two are used in containers."""


async def refuse(error: EdgeRuntimeError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with an error in the form of the API that was called."""
    await error_response(error, scope["path"])(scope, receive, send)


class Gate:
    """Admits requests to one of the server's names that come from no foreign page."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings
        self._origins = allowed_origins(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http":
            headers = RequestHeaders(scope=scope)
            try:
                self._check_host(scope, headers)
                self._check_origin(scope["method"], headers)
            except ServerError as error:
                await refuse(error, scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check_host(self, scope: Scope, headers: RequestHeaders) -> None:
        """Refuse foreign Host headers: an attacker's page may reach this server by a name that resolves to it."""
        if "host" not in headers and scope.get("http_version") == "1.0":
            return  # as HTTP/1.0 allows; browsers, the ones with foreign pages, always send it
        name = headers.get("host", "")
        if not is_own_name(host_name(name), self._settings):
            raise NotAllowed(
                f"This server is not known as {name[:80]!r}; use its address, or ask its owner for --allow-host."
            )

    def _check_origin(self, method: str, headers: RequestHeaders) -> None:
        """Refuse foreign pages: browsers send their simple requests anywhere and only hide the reply from them."""
        origin = headers.get("origin")
        if ANY in self._settings.cors_origins:
            return
        if origin is None:
            # A picture or script that a foreign page includes from here, or a form that it sends. It may only link to
            # pages of this server.
            is_visit = headers.get("sec-fetch-mode") == "navigate" and method in READING
            if headers.get("sec-fetch-site") == "cross-site" and not is_visit:
                raise NotAllowed("Other sites' pages may not use this server; its owner can allow them with --cors.")
            return
        scheme, _, host = origin.partition("://")
        is_allowed = self._origins is not None and self._origins.fullmatch(origin) is not None
        if not is_allowed and not (scheme in ("http", "https") and host and host == headers.get("host")):
            raise NotAllowed(
                f"Pages of {origin[:80]!r} may not use this server; its owner can allow it with --cors {origin[:80]}"
            )


class Key:
    """Admits requests that carry the key, if the server has one."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._digest = None if settings.api_key is None else sha256(settings.api_key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http":
            try:
                self._check_key(scope, RequestHeaders(scope=scope))
            except ServerError as error:
                await refuse(error, scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check_key(self, scope: MutableMapping[str, Any], headers: RequestHeaders) -> None:
        if self._digest is None:
            return
        path = scope["path"]
        if scope["method"] in ("GET", "HEAD") and (path in OPEN_PATHS or path.startswith(OPEN_FOLDER)):
            return
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = [bearer.strip()] if scheme.lower() == "bearer" else []
        given += [headers["x-api-key"]] if "x-api-key" in headers else []
        # Digests have one length, and comparing them takes equally long however much of a guess is right.
        if not any(hmac.compare_digest(sha256(key.encode("latin-1")).digest(), self._digest) for key in given):
            raise Unauthorized(
                "The API key is wrong; expected the one the server was started with, as Authorization: Bearer KEY."
                if given
                else "This server asks for a key; expected Authorization: Bearer KEY, or x-api-key: KEY."
            )


_HOST = re.compile(
    r"(?:\[(?P<address>[0-9a-f:.]*:[0-9a-f:.]*(?:%[a-z0-9._~-]+)?)\]|(?P<name>[^\[\]:%]*))(?::[0-9]*)?"
)


def host_name(header: str) -> str:
    """The name in a Host header, without the port and in lower case; empty if there is none, or more than one.

    Brackets hold an IPv6 address, and only a port may follow them: `[127.0.0.1].evil.example` is not an address.
    """
    found = _HOST.fullmatch(header.strip().lower())
    if found is None:
        return ""
    return str(found["address"] or found["name"].rstrip("."))


def is_own_name(name: str, settings: Settings) -> bool:
    """Whether a name belongs to a server with these settings.

    An address cannot be rebound, so every address does. A server that listens beyond this machine may also have names
    of the local network: without a dot (as containers of one network use) or ending in `.local`.
    """
    allowed = {host.lower().rstrip(".") for host in (*settings.allowed_hosts, settings.host)}
    if name and ("*" in allowed or name in LOOPBACK_NAMES or name.endswith(".localhost") or name in allowed):
        return True
    if any(host.startswith("*.") and name.endswith(host[1:]) for host in allowed):
        return True
    try:
        ip_address(name)
    except ValueError:
        return not settings.is_loopback and bool(name) and ("." not in name or name.endswith(".local"))
    return True
