"""OpenAI's API when a request, or the engine, is not right: a sentence in its own form, before and inside streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import openai
import pytest

from edge_runtime.errors import EngineBusy, ImageError
from edge_runtime.generation.text_stream import Piece
from edge_runtime.server import sse
from edge_runtime.server.errors import TimedOut
from edge_runtime.server.inference import Answering, Heartbeat
from edge_runtime.server.openai import responses
from edge_runtime.server.openai.chunks import ProgressReport
from edge_runtime.server.openai.responses_events import ResponseEvents
from edge_runtime.server.openai.responses_requests import ResponsesRequest
from server.asked import HELLO
from server.test_responses_events import checked


def test_embeddings_are_refused(ai):
    with pytest.raises(openai.BadRequestError, match="makes no embeddings"):
        ai.embeddings.create(model="demo", input="a")


def picture(url: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"temperature": "warm"}, "temperature"),
        ({"temperature": 1000}, None),
        ({"max_tokens": 0}, None),
        ({"n": 1000}, "n"),
        (picture("/etc/passwd"), "messages[0].content[0].image_url"),
        (picture("file:///etc/passwd"), "messages[0].content[0].image_url"),
        (picture("data:image/png;base64,?"), None),
        (picture("data:image/png;base64,AAAA"), None),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, None),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "set"}}}}, None),
        ({"tools": [{"type": "custom"}]}, "tools[0]"),
        ({"tool_choice": "required"}, None),
        ({"logit_bias": {"a": 1}}, None),
    ],
)
def test_mistakes_are_told_in_openais_form(client, fields, param):
    reply = client.post("/v1/chat/completions", json={"model": "demo", "messages": HELLO, **fields})
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert {*error} == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert (error["param"] or "").startswith(param or "")
    assert len(error["message"]) > 10
    assert "passwd" not in error["message"] or "data: URI" in error["message"]


def test_other_methods_are_told_which_there_are(client):
    for method, path, allowed in (("GET", "chat/completions", "POST"), ("POST", "models", "GET")):
        reply = client.request(method, f"/v1/{path}")
        assert (reply.status_code, reply.headers["allow"]) == (405, allowed)
        assert reply.json()["error"]["type"] == "invalid_request_error"


def test_addresses_are_the_owners_to_allow(ai):
    with pytest.raises(openai.PermissionDeniedError, match="allow-url"):
        ai.chat.completions.create(model="demo", **picture("http://127.0.0.1/a.png"))


@pytest.mark.parametrize("route", ["chat/completions", "completions", "responses", "messages"])
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"a": NaN}', b"\xff", b'{"model": "\\ud800"}'])
def test_bodies_that_are_no_requests(client, route, body):
    reply = client.post(f"/v1/{route}", content=body)
    assert reply.status_code in (400, 404)
    assert reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("chat/completions", '{"messages": [{"role": "user", "content": "a"}], "logit_bias": {"\\ud800": "x"}}'),
        ("chat/completions", '{"messages": [{"role": "user", "content": "a"}], "tool_choice": "\\ud800"}'),
        ("chat/completions", '{"messages": [{"role": "user", "content": [{"type": "\\ud800"}]}]}'),
        ("chat/completions", '{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}'),
        ("responses", '{"input": "a", "metadata": {"\\ud800": "x"}, "max_output_tokens": 1}'),
        ("responses", '{"input": "a", "tools": [{"type": "function", "name": "\\ud800"}], "max_output_tokens": 1}'),
        ("responses", '{"input": "a", "max_output_tokens": 1, "temperature": NaN}'),
    ],
)
def test_half_characters_and_odd_numbers_do_no_harm(client, route, body):
    reply = client.post(f"/v1/{route}", content=body)
    assert reply.status_code in (200, 400, 404), reply.text
    assert reply.json()


class Failing:
    """Events of an answer that begins and fails."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def __aiter__(self) -> AsyncIterator[tuple[int, Any]]:
        yield 0, Piece("I am", "answer")
        yield 0, Heartbeat(None)
        raise self._error


async def collected(lines: AsyncIterator[str]) -> list[str]:
    return [line async for line in lines]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EngineBusy("Too many."), "rate_limit_exceeded"),
        (TimedOut("Too long."), "server_error"),
        (ImageError("It is no picture."), "invalid_prompt"),
        (RuntimeError("/secret/path"), "server_error"),
    ],
)
def test_a_response_that_fails_says_so(error, code, caplog):
    typed = ResponseEvents(ResponsesRequest(input="Hi"), "demo")
    report = ProgressReport(cast("Answering", SimpleNamespace(reports_progress=False)), times=False)
    lines = asyncio.run(collected(responses._lines(Failing(error).__aiter__(), typed, report)))
    assert sse.BEAT in lines
    events = [checked(json.loads(line.split("data: ", 1)[1])) for line in lines if line != sse.BEAT]
    assert [event.type for event in events[-2:]] == ["response.output_item.done", "response.failed"]
    assert events[-1].response.error.code == code
    assert "secret" not in lines[-1]


def test_a_chat_that_fails_says_so(ai, server, monkeypatch):
    """The status is sent by then: the error is the last event, and the package raises it."""

    async def failing(answering: Answering) -> AsyncIterator[tuple[int, Any]]:
        async for event in Failing(TimedOut("Too long.")).__aiter__():
            yield event

    monkeypatch.setattr(Answering, "events", failing)
    stream = ai.chat.completions.create(model="demo", messages=HELLO, stream=True)
    told = [next(stream).choices[0].delta.content for _ in range(2)]
    assert told == ["", "I am"]
    with pytest.raises(openai.APIError, match="Too long"):
        next(stream)
