"""Routes that read JSON whatever the content type, as in Ollama and llama-server."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response

from edge_runtime.errors import EngineBusy
from edge_runtime.server.middleware.json_bodies import JSONRequest
from edge_runtime.server.state import state_of


class JSONRoute(APIRoute):
    """A route whose body is JSON.

    A browser sends forms to any server without a preflight request. That is why `gate` refuses origins that were not
    allowed: the content type is no protection here.
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
            except EngineBusy:
                request.state.body = await read.body()  # for `upstream`, which may hand the request over
                raise
            raise read.refusal

        return relabelled
