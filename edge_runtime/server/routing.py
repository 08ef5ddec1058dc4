"""Routes that read JSON whatever its label says, as Ollama and llama-server do, and answer HEAD where they do GET."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge_runtime.server.middleware.json_bodies import JSONRequest
from edge_runtime.server.state import state_of


class JSONRoute(APIRoute):
    """A route whose body is JSON.

    A browser sends a form to any server without asking it first. That is why `limits` refuses origins that were not
    allowed: the label of the body is no protection here.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler of a request."""
        handle = super().get_route_handler()

        async def relabelled(request: Request) -> Response:
            headers = [(name, value) for name, value in request.scope["headers"] if name != b"content-type"]
            request.scope["headers"] = [*headers, (b"content-type", b"application/json")]
            field = None if self._embed_body_fields else self.body_field
            read = JSONRequest(request.scope, request.receive, field, state_of(request).settings)
            try:
                return await handle(read)
            except HTTPException:
                if read.refusal is None:
                    raise
            raise read.refusal

        return relabelled


class HeadOfGet:
    """Answers HEAD wherever GET is answered, with the same status and headers and without the body (RFC 9110, 9.3.2).

    FastAPI's routes answer the methods they name, and naming HEAD beside GET would list every operation twice in the
    description of the API. Health checks ask so, and Ollama answers.
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
