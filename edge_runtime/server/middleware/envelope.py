"""What is around every request, outermost: one spelling of its path, and an id for whoever looks for it later."""

from __future__ import annotations

import re
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

APIS = ("/v1/", "/api/")
ANTHROPIC = "/v1/messages"
"""Beginning of the paths whose clients look for a `request-id`."""
_ID = re.compile(r"[!-~]{1,200}")


def middleware() -> list[Middleware]:
    """Middleware of a server that stands before all other."""
    return [Middleware(RequestIds), Middleware(Paths)]


class RequestIds:
    """Gives every reply an `x-request-id`: that of the request (proxies and vLLM's clients bring one), or a new one.

    OpenAI's `X-Client-Request-Id` is not told again there, and is not here; it stands in the log of who sent it.
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

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                for spelling in spellings:
                    MutableHeaders(scope=message).setdefault(spelling, name)
            await send(message)

        await self._app(scope, receive, told)


class Paths:
    """Takes the slashes from the end of an API's path: some clients put `/models/` behind an address."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] == "http" and scope["path"].startswith(APIS) and scope["path"].endswith("/"):
            path = scope["path"].rstrip("/")
            scope = {**scope, "path": path, "raw_path": scope.get("raw_path", b"").rstrip(b"/")}
        await self._app(scope, receive, send)
