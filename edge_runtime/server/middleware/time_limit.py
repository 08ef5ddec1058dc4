"""The time limit of a request."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge_runtime.server.errors import ServerError, ShuttingDown, TimedOut
from edge_runtime.server.middleware.gate import refuse
from edge_runtime.server.middleware.shares import background_of
from edge_runtime.server.settings import Settings

SPARE_S = 5.0
"""Routes end their answers themselves, with an error in the stream; this much later they are cut off without one."""


MANY_HOURS = ("/api/pull", "/api/push", "/api/create", "/api/blobs/", "/v1/files")
"""Paths whose work may take any time as long as it makes progress."""


class RequestTimedOut(ServerError):  # noqa: N818 - as HTTP calls it
    """The body did not arrive in time."""

    status = 408


class TimeLimit:
    """Ends requests that take longer than is allowed, from the end of the body; and all, when the server ends."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._limit_s = app, settings.request_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_limited = not scope["path"].startswith(MANY_HOURS) and background_of(scope) is None
        has_begun, has_all = False, False

        async def watched_send(message: Message) -> None:
            nonlocal has_begun
            has_begun = has_begun or message["type"] == "http.response.start"
            await send(message)

        async def watched_receive() -> Message:
            nonlocal has_all
            message = await receive()
            if is_limited and not has_all:
                has_all = not message.get("more_body", False)
                limit.reschedule(self._end())
            return message

        try:
            async with asyncio.timeout_at(self._end() if is_limited else None) as limit:
                await self._app(scope, watched_receive, watched_send)
        except TimeoutError:
            if not limit.expired() or has_begun:
                raise
            error = TimedOut(f"The request took longer than {self._limit_s:g} s, which is the limit; ask for less.")
            await refuse(error, scope, receive, send)
        except asyncio.CancelledError:  # by uvicorn, which would answer with a bare 500
            if not has_begun:
                await refuse(ShuttingDown("The server is shutting down; try again later."), scope, receive, send)
            raise

    def _end(self) -> float:
        return asyncio.get_running_loop().time() + self._limit_s + SPARE_S
