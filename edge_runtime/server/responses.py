"""Route of OpenAI's responses API; see `responses_requests` and `responses_events`."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fastapi import APIRouter, Request
from starlette.responses import Response

from edge_runtime.answers import Answer
from edge_runtime.server import openai_shapes as shapes
from edge_runtime.server import sse
from edge_runtime.server.errors import Problem, problem_of
from edge_runtime.server.inference import Answering, ChatCall, Event, Heartbeat
from edge_runtime.server.replies import AnswerStreamResponse, begin, whole
from edge_runtime.server.responses_events import Response as Reply
from edge_runtime.server.responses_events import ResponseEvents, whole_response
from edge_runtime.server.responses_requests import ResponsesRequest
from edge_runtime.server.routing import JSONRoute
from edge_runtime.server.state import State

router = APIRouter(route_class=JSONRoute)


@router.post(
    "/v1/responses",
    response_model=None,
    responses={
        200: {"model": Reply, "content": sse.DESCRIBED},
        "4XX": {"model": shapes.ErrorReply},
        "5XX": {"model": shapes.ErrorReply},
    },
)
async def responses(request: Request, state: State, body: ResponsesRequest) -> Response:
    """Answer a conversation in the form of the responses API, whole or as typed events; nothing is stored."""
    call = ChatCall(body.model, body.conversation_messages(), body.options())
    model = body.model or state.catalog.default
    if body.stream:
        answering = await begin(request, state.inference, call)
        typed = ResponseEvents(body, model)
        return AnswerStreamResponse(answering, lambda events: _lines(events, typed), "sse", "openai")

    async def reply(answering: Answering) -> Response:
        (answer,) = await answering.whole()
        return sse.body(whole_response(body, model, answer))

    return await whole(request, state.inference, call, reply)


async def _lines(events: AsyncIterator[tuple[int, Event]], typed: ResponseEvents) -> AsyncIterator[str]:
    for line in typed.begin():
        yield sse.event(line, named=True)
    try:
        async for _, event in events:
            if isinstance(event, Heartbeat):
                yield sse.BEAT
                continue
            for line in typed.end(event) if isinstance(event, Answer) else typed.piece(event):
                yield sse.event(line, named=True)
    except Exception as error:  # noqa: BLE001 - this API has an event of its own for it
        problem = problem_of(error)
        for line in typed.fail(problem.message, _code(problem)):
            yield sse.event(line, named=True)


def _code(problem: Problem) -> str:
    """One of the codes that openai-python knows."""
    if problem.status == 429:
        return "rate_limit_exceeded"
    return "invalid_prompt" if problem.status < 500 else "server_error"
