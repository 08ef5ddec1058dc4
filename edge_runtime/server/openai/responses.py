"""Routes of OpenAI's responses API; see `responses_requests`, `responses_events` and `responses_store`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from edge_runtime.answers import Answer
from edge_runtime.server import sse
from edge_runtime.server.errors import Problem, RequestError, problem_of
from edge_runtime.server.fields.constraints import fields_as_sent
from edge_runtime.server.fields.refused import with_warnings
from edge_runtime.server.inference import Answering, ChatCall, Event, Heartbeat
from edge_runtime.server.middleware.shares import background_of
from edge_runtime.server.openai import reply_types as shapes
from edge_runtime.server.openai.chunks import ProgressReport
from edge_runtime.server.openai.replies import timings
from edge_runtime.server.openai.responses_events import Response as Reply
from edge_runtime.server.openai.responses_events import ResponseEvents
from edge_runtime.server.openai.responses_items import Deleted, ItemList, listed_items, page
from edge_runtime.server.openai.responses_requests import InputTokensRequest, Item, ResponsesRequest
from edge_runtime.server.replies import AnswerStreamResponse, begin, while_connected, whole
from edge_runtime.server.responses_store import owner_of
from edge_runtime.server.routing import JSONRoute
from edge_runtime.server.state import ServerState, State

router = APIRouter(route_class=JSONRoute)
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": shapes.ErrorReply}, "5XX": {"model": shapes.ErrorReply}}


@router.post(
    "/v1/responses",
    response_model=None,
    responses={200: {"model": Reply, "content": sse.DESCRIBED}, **ERRORS},
)
async def responses(request: Request, state: State, body: ResponsesRequest) -> Response:
    """Answer a conversation in the form of the responses API, whole or as typed events."""
    background = background_of(request.scope)
    owner = (background.owner if background is not None else "") or owner_of(request.headers)
    warnings = body.all_warnings()
    before, own = _items(state, body, owner)
    messages = body.conversation_messages(before, own)
    call = ChatCall(body.model, messages, body.options(), reports_progress=body.reports_progress)
    typed = ResponseEvents(body, body.model or state.catalog.default)

    def keep(response: Mapping[str, Any]) -> None:
        if body.store is not False:
            state.responses.put(owner, response, listed_items(own), body.previous_response_id)

    with fields_as_sent(body.names()):
        if body.stream:
            answering = await begin(request, state.inference, call)
            report = ProgressReport(answering, times=bool(body.timings_per_token))
            reply = AnswerStreamResponse(
                answering, lambda events: _lines(events, typed, report, keep), "sse", "openai"
            )
            return with_warnings(reply, warnings)

        async def reply_whole(answering: Answering) -> Response:
            found = await whole_response(answering.events(), typed)
            keep(found)
            return sse.body(found)

        return with_warnings(await whole(request, state.inference, call, reply_whole), warnings)


def _items(state: ServerState, body: ResponsesRequest, owner: str) -> tuple[list[Item], list[Item]]:
    """Items of the responses that a request continues, and its own, with references to stored items resolved."""
    previous = body.previous_response_id
    before = state.responses.conversation(owner, previous) if previous else []
    own = []
    for number, item in enumerate(body.own_items()):
        if (
            item.get("type", "item_reference") in ("item_reference", None)
            and isinstance(item.get("id"), str)
            and (item.get("type") == "item_reference" or item.keys() <= {"id", "type"})
        ):
            own.append(state.responses.item(owner, item["id"], f"input[{number}]"))
        else:
            own.append(item)
    return before, own


async def whole_response(events: AsyncIterator[tuple[int, Event]], typed: ResponseEvents) -> Reply:
    """The response that a stream's last event would hold."""
    found: Reply | None = None
    async for _, event in events:
        if isinstance(event, Answer):
            *_, last = typed.end(event)
            found = last["response"]
        elif not isinstance(event, Heartbeat):
            for _ in typed.piece(event):
                pass
    assert found is not None, "events end with an answer"
    return found


async def _lines(
    events: AsyncIterator[tuple[int, Event]],
    typed: ResponseEvents,
    report: ProgressReport,
    keep: Callable[[Mapping[str, Any]], None] = lambda response: None,
) -> AsyncIterator[str]:
    """Typed events; progress fields are in the last event of a piece, as in llama-server."""
    for line in typed.begin():
        yield sse.event(line, named=True)
    try:
        async for number, event in events:
            if isinstance(event, Heartbeat):
                fields = report.of_prompt(event.progress)
                lines = [typed.of_prompt()] if fields else []
            elif isinstance(event, Answer):
                fields, lines = {"timings": timings(event)}, [*typed.end(event)]
                keep(lines[-1]["response"])  # a client that reads the last event may continue from it at once
            else:
                fields, lines = report.of_piece(number, event), [*typed.piece(event)]
            if not lines:
                yield report.beat(event.progress if isinstance(event, Heartbeat) else None)
            for i, line in enumerate(lines, 1):
                yield sse.event(line if i < len(lines) else {**line, **fields}, named=True)
    except Exception as error:  # noqa: BLE001 - this API has its own event for errors
        problem = problem_of(error)
        for line in typed.fail(problem.message, _code(problem)):
            yield sse.event(line, named=True)


def _code(problem: Problem) -> str:
    """One of the codes that openai-python knows."""
    if problem.status == 429:
        return "rate_limit_exceeded"
    return "invalid_prompt" if problem.status < 500 else "server_error"


@router.post(
    "/v1/responses/input_tokens",
    response_model=None,
    responses={200: {"model": shapes.InputTokens}, **ERRORS},
)
async def input_tokens(request: Request, state: State, body: InputTokensRequest) -> Response:
    """Count the tokens of a conversation, those of its pictures included, without answering it."""
    warnings = body.all_warnings()
    before, own = _items(state, body, owner_of(request.headers))
    call = ChatCall(body.model, body.conversation_messages(before, own), body.prompt_options())
    with fields_as_sent(body.names()):
        n = await while_connected(request, state.inference.count_tokens(call))
    return with_warnings(sse.body(shapes.input_tokens(n)), warnings)


@router.get("/v1/responses/{response_id}", response_model=None, responses={200: {"model": Reply}, **ERRORS})
async def kept(request: Request, state: State, response_id: str, stream: bool = False) -> Response:
    """Return a recent response again."""
    found = state.responses.get(owner_of(request.headers), response_id)
    if stream:
        raise RequestError(
            "stream is true, but stored responses are only returned whole here; leave it out.", "stream"
        )
    return sse.body(found)


@router.delete("/v1/responses/{response_id}", response_model=None, responses={200: {"model": Deleted}, **ERRORS})
async def forget(request: Request, state: State, response_id: str) -> Response:
    """Delete a response."""
    state.responses.delete(owner_of(request.headers), response_id)
    deleted: Deleted = {"id": response_id, "object": "response", "deleted": True}
    return sse.body(deleted)


@router.post("/v1/responses/{response_id}/cancel", response_model=None, responses={200: {"model": Reply}, **ERRORS})
async def cancel(request: Request, state: State, response_id: str) -> Response:
    """Refuse: responses are generated while their client listens, and it can hang up."""
    state.responses.get(owner_of(request.headers), response_id)
    raise RequestError(
        "Only responses requested with background: true can be cancelled, and this server has none; to "
        "stop a response, close its connection.",
        "response_id",
    )


@router.get(
    "/v1/responses/{response_id}/input_items", response_model=None, responses={200: {"model": ItemList}, **ERRORS}
)
async def input_items(
    request: Request,
    state: State,
    response_id: str,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Response:
    """List the input of a response, the conversation before it included."""
    items = state.responses.input_items(owner_of(request.headers), response_id)
    return sse.body(page(items, order=order, after=after, limit=limit))
