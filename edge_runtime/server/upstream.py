"""A request that this server has no place for → the server that its owner named, if one was named.

The body and the route go on as they came, without the client's key and headers; the reply comes back as it is,
streams piece by piece, with `X-Answered-By: upstream`. Whatever the other server cannot do now (no connection, no
such route or model, a refused key, its own queue is full) leaves the answer at this server's own sentence. A request
that was handed over says so, and is never handed over again, so two servers that name each other do not send it back
and forth.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable

import httpx2
from fastapi import FastAPI, Request
from starlette.responses import Response, StreamingResponse

from edge_runtime.errors import EngineBusy
from edge_runtime.remote.address import parse_address
from edge_runtime.server.errors import error_response
from edge_runtime.server.middleware.shares import Places
from edge_runtime.server.settings import Settings

KEY_VARIABLE = "EDGE_RUNTIME_UPSTREAM_KEY"
HANDED_OVER = "X-Edge-Runtime-Handed-Over"
ANSWERED_BY = "X-Answered-By"
ROUTES = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/messages", "/api/chat", "/api/generate"})
ITS_OWN_TROUBLE = frozenset({401, 403, 404, 405, 408, 425, 429})
"""Statuses that, like those from 500, say nothing about the request."""
CONNECT_S = 5.0

logger = logging.getLogger("edge_runtime.server")


class Upstream:
    """Hands requests over.

    Raises
    ------
    MessageError
        When the address or the key cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        assert settings.upstream is not None
        self._address = parse_address(settings.upstream, os.environ.get(KEY_VARIABLE, ""))
        for warning in self._address.warnings():
            logger.warning(warning)
        self._client = httpx2.AsyncClient(
            timeout=httpx2.Timeout(settings.request_timeout_s, connect=CONNECT_S),
            limits=httpx2.Limits(max_connections=None),
            follow_redirects=False,
            trust_env=not self._address.is_loopback,
        )
        self._places = Places(settings.max_queue, settings.max_queue, "requests are handed over")

    async def answer(self, request: Request, error: Exception) -> Response:
        """The other server's answer, or this server's own error."""
        path, own = request.url.path, error_response(error, request.url.path)
        body: bytes | None = getattr(request.state, "body", None)
        if request.method != "POST" or path not in ROUTES or HANDED_OVER in request.headers or body is None:
            return own
        try:
            leave = self._places.take("")
        except EngineBusy:
            return own
        try:
            response = await self._send(path, body)
        except httpx2.HTTPError as trouble:
            host, what = self._address.host, type(trouble).__name__
            logger.warning("%s, to which requests are handed over, fails: %s", host, what)
            leave()
            return own
        except BaseException:
            leave()
            raise
        if not 200 <= response.status_code < 500 or response.status_code in ITS_OWN_TROUBLE or response.is_redirect:
            await response.aclose()
            leave()
            return own

        async def passed_on() -> AsyncIterator[bytes]:
            try:
                async for piece in response.aiter_raw():
                    yield piece
            finally:
                leave()
                await response.aclose()

        kind = response.headers.get("content-type", "application/json")
        headers = {ANSWERED_BY: "upstream", "Content-Type": kind}
        return StreamingResponse(passed_on(), response.status_code, headers)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _send(self, path: str, body: bytes) -> httpx2.Response:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", HANDED_OVER: "1"}
        if self._address.key is not None:
            headers["Authorization"] = f"Bearer {self._address.key}"
        request = self._client.build_request("POST", f"{self._address.root}{path}", content=body, headers=headers)
        return await self._client.send(request, stream=True)


def install(app: FastAPI, settings: Settings) -> Callable[[], Awaitable[None]]:
    """Let the other server answer what finds no place here, if there is one; returns what closes its connections."""
    if settings.upstream is None:
        return _nothing
    found = Upstream(settings)
    app.add_exception_handler(EngineBusy, found.answer)
    return found.close


async def _nothing() -> None:
    """There is nothing to close."""
