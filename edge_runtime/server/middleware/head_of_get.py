"""HEAD wherever GET is answered."""

from __future__ import annotations

from collections.abc import Iterable

from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class HeadOfGet:
    """Answers HEAD wherever GET is answered, with the same status and headers and without the body (RFC 9110, 9.3.2).

    FastAPI's routes answer the methods they name, and naming HEAD beside GET would list every operation twice in the
    description of the API. Health checks use HEAD, and Ollama answers it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] == "http" and scope["method"] == "HEAD":
            as_get = {**scope, "method": "GET"}
            routes = scope["app"].routes
            if not _is_answered(scope, routes) and _is_answered(as_get, routes):
                scope, send = as_get, _without_body(send)
        await self._app(scope, receive, send)


def _is_answered(scope: Scope, routes: Iterable[BaseRoute]) -> bool:
    return any(route.matches(scope)[0] is Match.FULL for route in routes)


def _without_body(send: Send) -> Send:
    async def head(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return head
