"""Bodies of OpenAI's responses API → conversations and options of the engine."""

from __future__ import annotations

import pytest

from edge_runtime.inputs.messages import parse_messages
from edge_runtime.server.errors import RequestError
from server.openai_bodies import FLAT_TOOL, SCHEMA, TOOL, responses


def test_items_of_a_responses_request_become_messages():
    request = responses(
        [
            {"role": "user", "content": "Weather?"},
            {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
            {"type": "function_call", "call_id": "1", "name": "weather", "arguments": '{"city": "Rome"}'},
            {"type": "function_call", "call_id": "2", "name": "other", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "sunny"},
            {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "yes"}]},
            {"type": "reasoning", "id": "rs2", "summary": [{"type": "summary_text", "text": "So."}]},
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "Sunny.", "annotations": []}],
            },
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Thanks"}]},
        ],
        instructions="Be brief.",
    )
    messages = request.conversation_messages()
    roles = ["system", "user", "assistant", "tool", "tool", "assistant", "user"]
    assert [message["role"] for message in messages] == roles
    assert messages[2]["reasoning_content"] == "Hm."
    assert [call["function"]["name"] for call in messages[2]["tool_calls"]] == ["weather", "other"]
    assert messages[5]["reasoning_content"] == "So."
    assert len(parse_messages(messages)) == 7


@pytest.mark.parametrize(
    "item",
    [
        {},
        {"type": "item_reference", "id": "a"},
        {"type": "web_search_call"},
        {"role": "tool", "content": "a"},
        {"type": "function_call", "arguments": "{}"},
        {"type": "function_call", "name": "a", "arguments": {}},
        {"type": "function_call_output", "output": 5},
        {"type": "reasoning", "content": "Hm."},
        {"type": ["message"]},
    ],
)
def test_items_that_cannot_be_used_are_named(item):
    with pytest.raises(RequestError) as error:
        responses([{"role": "user", "content": "Hi"}, item]).conversation_messages()
    assert error.value.param.startswith("input[1]")


@pytest.mark.parametrize("field", ["conversation", "prompt", "background"])
def test_what_needs_a_memory_is_refused(field):
    value = True if field == "background" else "id_1"
    with pytest.raises(RequestError) as error:
        responses(**{field: value}).conversation_messages()
    assert error.value.param == field


def test_options_of_a_responses_request():
    request = responses(
        max_output_tokens=9,
        tools=[FLAT_TOOL],
        tool_choice={"type": "function", "name": "weather"},
        reasoning={"effort": "high"},
        include=["message.output_text.logprobs"],
        truncation="auto",
        text={"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}},
    )
    assert request.options() == {
        "max_tokens": 9,
        "tools": [TOOL],
        "tool_choice": "weather",
        "thinking": True,
        "logprobs": True,
        "context_shift": True,
        "schema": SCHEMA,
    }
    assert responses(top_logprobs=2).options() == {"thinking": False, "logprobs": True, "top_logprobs": 2}
