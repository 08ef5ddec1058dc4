"""Anthropic's messages API: translation both ways."""

from __future__ import annotations

import json
from typing import Any

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from edge_runtime.inputs.messages import ImagePart, parse_messages
from edge_runtime.server.anthropic.replies import MessageEvents, whole_message
from edge_runtime.server.anthropic.requests import MessagesRequest
from edge_runtime.server.errors import RequestError
from server.asked import ANTHROPIC_TOOL as TOOL
from server.asked import BLOCK
from server.made_answers import CALLING, THOUGHTFUL, made_answer
from server.test_openai_replies import unknown_fields

EVENT = TypeAdapter(RawMessageStreamEvent)


def asked(content: Any = "Hi", **fields: Any) -> MessagesRequest:
    body = {"model": "demo", "max_tokens": 9, "messages": [{"role": "user", "content": content}], **fields}
    return MessagesRequest.model_validate(body)


def test_a_conversation():
    request = asked(
        system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        messages=[
            {"role": "user", "content": [BLOCK, {"type": "text", "text": "Weather there?"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": ""},
                    {"type": "redacted_thinking", "data": "xyz"},
                    {"type": "text", "text": "Let me see."},
                    {"type": "tool_use", "id": "1", "name": "weather", "input": {"city": "Rome"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "sunny"}]},
                    {"type": "text", "text": "So?"},
                ],
            },
        ],
    )
    system, user, assistant, tool, last = parse_messages(request.conversation())
    assert system.parts == ("Be brief.",)
    assert isinstance(user.parts[0], ImagePart)
    assert user.parts[1] == "Weather there?"
    assert (assistant.reasoning, assistant.parts) == ("Hm.", ("Let me see.",))
    assert assistant.tool_calls[0]["function"] == {"name": "weather", "arguments": {"city": "Rome"}}
    assert (tool.role, tool.parts, last.role, last.parts) == ("tool", ("sunny",), "user", ("So?",))


def test_options():
    request = asked(
        temperature=0.5,
        top_k=3,
        stop_sequences=["END"],
        tools=[TOOL],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        thinking={"type": "enabled", "budget_tokens": 5},
    )
    assert request.options() == {
        "max_tokens": 9,
        "temperature": 0.5,
        "top_k": 3,
        "stop": ["END"],
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": TOOL["input_schema"]}}],
        "tool_choice": "required",
        "thinking": True,
        "thinking_budget": 5,
    }
    assert request.max_calls == 1
    named = asked(tools=[TOOL], tool_choice={"type": "tool", "name": "weather"}, thinking={"type": "disabled"})
    assert (named.options()["tool_choice"], named.options()["thinking"], named.max_calls) == ("weather", False, None)


@pytest.mark.parametrize(
    "block",
    [
        {},
        {"type": "image"},
        {"type": "image", "source": {"type": "file", "file_id": "1"}},
        {"type": "image", "source": {"type": "url", "url": "/etc/passwd"}},
        {"type": "image", "source": {"type": "base64", "media_type": "a;b", "data": "AAAA"}},
        {"type": "document", "source": {"type": "base64", "data": None}},
        {"type": "text"},
        {"type": "tool_use", "name": "a", "input": "{}"},
        {"type": "tool_result", "content": 5},
        {"type": "tool_result", "content": [5]},
        {"type": "thinking"},
        {"type": ["text"]},
    ],
)
def test_blocks_of_the_wrong_form_are_named(block):
    with pytest.raises(RequestError) as error:
        asked([{"type": "text", "text": "a"}, block]).conversation()
    assert error.value.param.startswith("messages[0].content[1]")


def test_tools_of_anthropics_own_are_refused():
    for fields in ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, {"tool_choice": {"type": "tool"}}):
        with pytest.raises(RequestError):
            asked(**fields).options()


def events_of(pieces: Any, max_calls: int | None = None) -> list[Any]:
    events = MessageEvents("demo", max_calls)
    found = [*events.begin(20, 5)]
    for piece in pieces:
        found += events.piece(piece)
    found += events.end(made_answer(pieces))
    parsed = [EVENT.validate_json(json.dumps(event), strict=True) for event in found]
    assert not unknown_fields(parsed)
    return parsed


def test_events():
    events = events_of(THOUGHTFUL)
    assert [event.type for event in events] == [
        "message_start",
        *("content_block_start", "content_block_delta", "content_block_delta", "content_block_delta"),
        "content_block_stop",
        *("content_block_start", "content_block_delta", "content_block_delta", "content_block_stop"),
        *("message_delta", "message_stop"),
    ]
    assert [event.index for event in events if hasattr(event, "index")] == [0] * 5 + [1] * 4
    assert (events[-2].delta.stop_reason, events[-2].usage.output_tokens) == ("end_turn", 9)
    called = events_of(CALLING)
    assert [event.content_block.type for event in called if event.type == "content_block_start"] == [
        "text",
        "tool_use",
        "tool_use",
    ]
    assert called[-2].delta.stop_reason == "tool_use"
    assert sum(event.type == "content_block_start" for event in events_of(CALLING, 1)) == 2


def test_a_whole_reply():
    reply = Message.model_validate_json(json.dumps(whole_message(made_answer(THOUGHTFUL), "demo")), strict=True)
    assert not unknown_fields(reply)
    assert [block.type for block in reply.content] == ["thinking", "text"]
    assert (reply.usage.input_tokens, reply.usage.cache_read_input_tokens) == (15, 5)
    called = Message.model_validate(whole_message(made_answer(CALLING), "demo", max_calls=1))
    assert [block.type for block in called.content] == ["text", "tool_use"]
    assert (called.content[1].input, called.stop_reason) == ({"city": "Örebro"}, "tool_use")
    cut = whole_message(made_answer(THOUGHTFUL, finish_reason="length"), "demo")
    assert cut["stop_reason"] == "max_tokens"
