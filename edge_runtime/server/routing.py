"""Routes that read JSON whatever its label says, as Ollama and llama-server do, and answer HEAD where they do GET."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response

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
