"""Answers of the engine → the responses API, as openai-python's own types and accumulator read it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from edge_runtime.generation.text_stream import Piece
from edge_runtime.server.inference import Heartbeat
from edge_runtime.server.openai.responses import whole_response
from edge_runtime.server.openai.responses_events import ResponseEvents
from edge_runtime.server.openai.responses_requests import ResponsesRequest
from server.made_answers import CALLING, SCORED, THOUGHTFUL, made_answer
from server.test_openai_replies import read, unknown_fields

EVENT = TypeAdapter(ResponseStreamEvent)
TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}}
OURS = {"store", "bytes", "timings"}
"""Fields that its types lack: OpenAI's own of responses, and of log probabilities in events; and times."""


def request(**fields: Any) -> ResponsesRequest:
    return ResponsesRequest.model_validate({"model": "demo", "input": "Hi", **fields})


def streamed(pieces: list[Piece], asked: ResponsesRequest | None = None, **fields: Any) -> list[Any]:
    events = ResponseEvents(asked or request(), "demo")
    found = [*events.begin()]
    for piece in pieces:
        found += events.piece(piece)
    found += events.end(made_answer(pieces, **fields))
    return [checked(event) for event in found]


def checked(event: Any) -> Any:
    parsed = EVENT.validate_json(json.dumps(event), strict=True)
    assert unknown_fields(parsed) <= OURS
    return parsed


def whole(pieces: list[Piece], asked: ResponsesRequest | None = None, **fields: Any) -> dict[str, Any]:
    """The reply to a request that is not streamed."""

    async def events() -> AsyncIterator[tuple[int, Any]]:
        for piece in pieces:
            yield 0, piece
            yield 0, Heartbeat(None)
        yield 0, made_answer(pieces, **fields)

    return dict(asyncio.run(whole_response(events(), ResponseEvents(asked or request(), "demo"))))


def kinds(events: list[Any]) -> list[str]:
    return [event.type.removeprefix("response.") for event in events]


def test_events_of_reasoning_and_text():
    events = streamed(THOUGHTFUL)
    assert kinds(events) == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        "completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[2].item.content == [], "it grows only later"
    assert events[6].text == "Hmm."
    last = events[-1].response
    reasoning, message = last.output
    assert (reasoning.content[0].text, message.content[0].text, last.output_text) == ("Hmm.", "A dog.", "A dog.")
    assert [events[8].item, events[15].item] == [reasoning, message]
    assert (last.status, last.usage.total_tokens) == ("completed", 29)
    assert last.usage.output_tokens_details.reasoning_tokens == 3
    assert {event.item_id for event in events if hasattr(event, "item_id")} == {reasoning.id, message.id}


def test_events_of_calls():
    events = streamed(CALLING, request(tools=[TOOL]))
    assert (
        kinds(events)[-9:-1]
        == [
            "output_item.added",
            "function_call_arguments.delta",
            "function_call_arguments.done",
            "output_item.done",
        ]
        * 2
    )
    message, weather, now = events[-1].response.output
    assert message.content[0].text == "Let me see."
    assert (weather.name, json.loads(weather.arguments), now.name) == ("weather", {"city": "Örebro"}, "now")
    assert weather.status == "completed"
    assert len({weather.call_id, now.call_id, weather.id}) == 3
    one = streamed(CALLING, request(tools=[TOOL], parallel_tool_calls=False))
    assert [item.type for item in one[-1].response.output] == ["message", "function_call"]
    only = streamed(CALLING[1:2], request(tools=[TOOL]))
    assert [item.type for item in only[-1].response.output] == ["function_call"], "and no empty message"


def test_log_probabilities():
    events = streamed(SCORED, request(top_logprobs=2))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert [[score.token for score in event.logprobs] for event in deltas] == [["A "], ["dog", "."]]
    (text,) = events[-1].response.output[1].content
    assert [score.token for score in text.logprobs] == ["A ", "dog", "."]


@pytest.mark.parametrize("reason", ["length", "repetition"])
def test_an_answer_that_is_not_whole(reason):
    events = streamed(THOUGHTFUL, finish_reason=reason)
    last = events[-1].response
    assert (events[-1].type, last.status) == ("response.incomplete", "incomplete")
    assert last.incomplete_details.reason == "max_output_tokens"
    assert [item.status for item in last.output] == ["completed", "incomplete"]
    cut = streamed(THOUGHTFUL[:2], finish_reason=reason)[-1].response
    assert [item.type for item in cut.output] == ["reasoning"]


def test_an_empty_answer_is_an_empty_message():
    last = streamed([])[-1].response
    assert [item.type for item in last.output] == ["message"]
    assert last.output_text == ""


def test_a_failure_is_told():
    events = ResponseEvents(request(), "demo")
    found = [*events.begin(), *events.piece(THOUGHTFUL[2]), *events.fail("Too long.", "server_error")]
    last = [checked(event) for event in found][-1]
    assert (last.type, last.response.status) == ("response.failed", "failed")
    assert (last.response.error.code, last.response.error.message) == ("server_error", "Too long.")


BETWEEN_CALLS = [THOUGHTFUL[0], *CALLING[:2], Piece("And", "answer"), CALLING[2], Piece("so.", "answer")]


@pytest.mark.parametrize("reason", ["stop", "length"])
@pytest.mark.parametrize("pieces", [THOUGHTFUL, THOUGHTFUL[:2], CALLING, SCORED, [], BETWEEN_CALLS])
def test_a_whole_response_says_what_the_stream_says(pieces, reason):
    told = read_response(whole(pieces, request(tools=[TOOL]), finish_reason=reason))
    last = streamed(pieces, request(tools=[TOOL]), finish_reason=reason)[-1].response
    changing = {"id", "call_id", "created_at", "completed_at"}
    assert without(told.model_dump(), changing) == without(last.model_dump(), changing)


def read_response(reply: Any) -> Response:
    parsed = Response.model_validate_json(json.dumps(reply), strict=True)
    assert unknown_fields(parsed) <= OURS
    return parsed


def without(value: Any, keys: set[str]) -> Any:
    if isinstance(value, list):
        return [without(item, keys) for item in value]
    if isinstance(value, dict):
        return {key: without(item, keys) for key, item in value.items() if key not in keys}
    return value


SCHEMA = {"type": "object", "properties": {}, "additionalProperties": False}


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "required", "tools": [TOOL]},
        {"tool_choice": "weather", "tools": [TOOL]},
        {"tool_choice": {"type": "function", "name": "weather"}, "tools": [TOOL]},
        {"tool_choice": {"type": "function", "function": {"name": "weather"}}, "tools": [TOOL]},
        {
            "tool_choice": {
                "type": "allowed_tools",
                "mode": "auto",
                "tools": [{"type": "function", "name": "weather"}],
            }
        },
        {"text": {"format": {"type": "text"}}},
        {"text": {"format": {"type": "json_object"}}},
        {"text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}},
        {"text": {"verbosity": "low"}},
        {"reasoning": {"effort": "high", "summary": "auto"}, "truncation": "auto", "metadata": {"a": "b"}},
        {"instructions": "Be brief.", "max_output_tokens": 5, "temperature": 0, "top_p": 1, "user": "me"},
    ],
)
def test_what_was_asked_is_told_in_a_form_that_clients_read(fields):
    reply = read_response(whole(THOUGHTFUL, request(**fields)))
    assert reply.instructions == fields.get("instructions")
    assert reply.metadata == fields.get("metadata", {})
    if "text" in fields and "format" in fields["text"]:
        assert reply.text.format.type == fields["text"]["format"]["type"]
    if isinstance(fields.get("tool_choice"), dict | str) and fields["tool_choice"] != "required":
        choice = reply.tool_choice
        assert getattr(choice, "name", None) == "weather" or choice.tools == [{"type": "function", "name": "weather"}]


def test_reading_is_strict():
    """The checks above would notice a field that is missing or misspelt."""
    reply = whole(THOUGHTFUL)
    with pytest.raises(AssertionError):
        read(Response, reply | {"statuss": "completed"})
    reply.pop("output")
    with pytest.raises(ValueError, match="output"):
        read_response(reply)
