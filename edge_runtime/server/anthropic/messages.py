"""Anthropic's messages API → `ChatCall`, and events → its replies; pure translation."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from edge_runtime.answers import Answer
from edge_runtime.engine.events import Progress
from edge_runtime.server import sse
from edge_runtime.server.anthropic.replies import (
    AnthropicErrorReply,
    MessageEvents,
    MessageReply,
    TokenCount,
    whole_message,
)
from edge_runtime.server.anthropic.requests import CountRequest, MessagesRequest
from edge_runtime.server.fields.constraints import fields_as_sent
from edge_runtime.server.inference import Answering, ChatCall, Event, Heartbeat
from edge_runtime.server.replies import AnswerStreamResponse, begin, while_connected, whole
from edge_runtime.server.routing import JSONRoute
from edge_runtime.server.state import State

router = APIRouter(tags=["Anthropic"], route_class=JSONRoute)
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": AnthropicErrorReply},
    "5XX": {"model": AnthropicErrorReply},
}
PING = {"type": "ping"}


@router.post(
    "/v1/messages",
    response_model=None,
    responses={
        200: {"model": MessageReply, "content": sse.DESCRIBED},
        **ERRORS,
    },
)
async def messages(request: Request, state: State, body: MessagesRequest) -> Response:
    """Answer a conversation in Anthropic's form, whole or as a stream of events."""
    call = ChatCall(body.model, body.conversation(), body.options())
    model = body.model or state.catalog.default

    async def reply(answering: Answering) -> Response:
        (answer,) = await answering.whole()
        shown = whole_message(answer, model, max_calls=body.max_calls, shows_thinking=body.shows_thinking)
        return sse.body(shown)

    with fields_as_sent(body.names()):
        if not body.stream:
            return await whole(request, state.inference, call, reply)
        answering = await begin(request, state.inference, call)
    typed = MessageEvents(model, max_calls=body.max_calls, shows_thinking=body.shows_thinking)
    return AnswerStreamResponse(answering, lambda events: _lines(events, typed, answering), "sse", "anthropic")


async def _lines(
    events: AsyncIterator[tuple[int, Event]], typed: MessageEvents, answering: Answering
) -> AsyncIterator[str]:
    """Events of a message. It starts once it is known how much of the prompt was cached.

    Until then the stream holds only comments: clients take the first event as the start.
    """
    has_begun = False
    async for _, event in events:
        known = _prompt_of(event, answering.progress)
        if not has_begun and known is not None:
            has_begun = True
            for line in typed.begin(*known):
                yield sse.event(line, named=True)
        if isinstance(event, Heartbeat):
            yield sse.event(PING, named=True) if has_begun else sse.BEAT
        else:
            for line in typed.end(event) if isinstance(event, Answer) else typed.piece(event):
                yield sse.event(line, named=True)


def _prompt_of(event: Event, progress: Progress | None) -> tuple[int, int] | None:
    """Tokens of the prompt, and those that needed no prefill; None while unknown."""
    if isinstance(event, Answer):
        return event.prompt_tokens, event.cached_tokens
    if progress is not None:
        return progress.prompt_tokens, progress.cached_tokens
    return None if isinstance(event, Heartbeat) else (0, 0)


@router.post("/v1/messages/count_tokens", response_model=None, responses={200: {"model": TokenCount}, **ERRORS})
async def count_tokens(request: Request, state: State, body: CountRequest) -> Response:
    """Count the tokens of a conversation, those of its pictures included, without answering it."""
    options = body.prompt_options()
    if options.pop("tool_choice", None) == "none":
        options["tools"] = []
    call = ChatCall(body.model, body.conversation(), options)
    counted: TokenCount = {"input_tokens": await while_connected(request, state.inference.count_tokens(call))}
    return sse.body(counted)
