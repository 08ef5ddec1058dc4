"""The outermost middleware: one spelling of a request's path, and an id by which to find it later."""

from __future__ import annotations

import re
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

APIS = ("/v1/", "/api/")
ANTHROPIC = "/v1/messages"
"""Prefix of the paths whose clients expect a `request-id`."""
_ID = re.compile(r"[!-~]{1,200}")


def middleware() -> list[Middleware]:
    """The server's outermost middleware."""
    return [Middleware(RequestIds), Middleware(Paths)]


class RequestIds:
    """Gives every reply an `x-request-id`: that of the request (proxies and vLLM's clients send one), or a new one.

    OpenAI's `X-Client-Request-Id` is not echoed, as in OpenAI's API; its sender has it in its own log.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        name = given if _ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        spellings = ["x-request-id", *(["request-id"] if scope["path"].startswith(ANTHROPIC) else [])]

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                for spelling in spellings:
                    MutableHeaders(scope=message).setdefault(spelling, name)
            await send(message)

        await self._app(scope, receive, send_with_id)


class Paths:
    """Strips slashes from the end of an API's path: some clients append `/models/` to an address."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] == "http" and scope["path"].startswith(APIS) and scope["path"].endswith("/"):
            path = scope["path"].rstrip("/")
            scope = {**scope, "path": path, "raw_path": scope.get("raw_path", b"").rstrip(b"/")}
        await self._app(scope, receive, send)
