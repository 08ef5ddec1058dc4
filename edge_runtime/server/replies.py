"""Sending answers to clients: streams that end with an error object, and whole replies that notice a hang-up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Literal, TypeVar

from fastapi import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from edge_runtime.server.errors import Api, ServerError, error_line
from edge_runtime.server.inference import Answering, ChatCall, Event, Inference
from edge_runtime.server.sse import as_json

R = TypeVar("R")
Lines = Callable[[AsyncIterator[tuple[int, Event]]], AsyncIterator[Mapping[str, Any] | str]]
"""Translates events into JSON objects, or into finished text of the stream."""
NDJSON, SSE = "application/x-ndjson", "text/event-stream"


class ClientGone(ServerError):  # noqa: N818 - says what is the matter
    """The client hung up; nobody will read the answer."""

    status = 499


class AnswerStreamResponse(StreamingResponse):
    """A stream of JSON objects; its answer is closed when the stream ends, however that happens.

    Parameters
    ----------
    lines : from events to objects; it also writes the end, such as `[DONE]`.
    form : `ndjson`: one object per line. `sse`: server-sent events.
    """

    def __init__(self, answering: Answering, lines: Lines, form: Literal["ndjson", "sse"], api: Api) -> None:
        self._answering, self._lines, self._form, self._api = answering, lines, form, api
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies must not buffer it
        super().__init__(self._body(), media_type=NDJSON if form == "ndjson" else SSE, headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._answering.close()

    async def _body(self) -> AsyncIterator[str]:
        events = self._answering.events()
        try:
            async for line in self._lines(events):
                yield line if isinstance(line, str) else self._framed(as_json(line))
        except Exception as error:  # noqa: BLE001 - the status is already sent: report it in the stream
            yield self._framed(error_line(error, self._api), is_error=True)

    def _framed(self, line: str, *, is_error: bool = False) -> str:
        if self._form == "ndjson":
            return line + "\n"
        event = "event: error\n" if is_error and self._api == "anthropic" else ""
        return f"{event}data: {line}\n\n"


async def begin(request: Request, inference: Inference, call: ChatCall) -> Answering:
    """`Inference.begin`, cancelled when the client hangs up, even in the step in which it finishes."""
    beginning = asyncio.ensure_future(inference.begin(call))
    try:
        return await while_connected(request, beginning)
    except BaseException:
        if beginning.done() and not beginning.cancelled() and beginning.exception() is None:
            await beginning.result().close()
        raise


async def whole(
    request: Request, inference: Inference, call: ChatCall, reply: Callable[[Answering], Awaitable[R]]
) -> R:
    """Answer a call in one piece; cancelled when the client hangs up.

    Parameters
    ----------
    reply : makes the reply; `Answering.whole` and `use` have all it needs.
    """
    answering = await begin(request, inference, call)
    try:
        return await while_connected(request, reply(answering))
    finally:
        await answering.close()


async def while_connected(request: Request, work: Awaitable[R]) -> R:
    """Run work while the client is connected.

    Raises
    ------
    ClientGone
        When it hung up first; the work is cancelled then.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone("The client hung up.")
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.wait((task, gone))


async def _disconnected(request: Request) -> None:
    """Wait for the end of the connection; the body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
