"""Tools in Anthropic's messages API by its own client, against a running server."""

from __future__ import annotations

import json
from typing import Any, Literal

import anthropic
import pytest

from server.asked import ANTHROPIC_TOOL, BLOCK, GREEDY, HELLO

CITY: Any = {
    "name": "weather",
    "description": "The weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]},
}


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_forced_call(claude, choice):
    asked: Any = {
        "model": "demo",
        "max_tokens": 200,
        "messages": HELLO,
        "tools": [CITY, ANTHROPIC_TOOL | {"name": "now"}],
    }
    asked |= {"tool_choice": choice | {"disable_parallel_tool_use": True}, "extra_body": GREEDY}
    reply = claude.messages.create(**asked)
    (call,) = [block for block in reply.content if block.type == "tool_use"]
    assert reply.stop_reason == "tool_use"
    assert call.name in ("weather", "now")
    assert choice["type"] == "any" or call.name == "weather"
    assert call.input.get("city") in ("Rome", "Oslo", None)
    with claude.messages.stream(**asked) as stream:
        final = stream.get_final_message()
    assert [(block.name, block.input) for block in final.content] == [(call.name, call.input)]
    assert final.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sunny"}, BLOCK]}
    turns = [*HELLO, {"role": "assistant", "content": reply.content}, {"role": "user", "content": [result]}]
    after = claude.messages.create(
        model="demo", max_tokens=20, messages=turns, tools=[CITY], tool_choice={"type": "none"}
    )
    assert after.stop_reason in ("end_turn", "max_tokens")


def test_tools_that_run_by_themselves(claude):
    """The package calls functions and sends their results until it has had enough."""
    asked_for = []

    @anthropic.beta_tool
    def weather(city: Literal["Rome", "Oslo"]) -> str:
        """The weather of a city.

        Args:
            city: Which one.
        """
        asked_for.append(city)
        return "sunny"

    runner = claude.beta.messages.tool_runner(
        model="demo", max_tokens=200, messages=HELLO, tools=[weather], tool_choice={"type": "any"}, max_iterations=2
    )
    replies = [*runner]
    assert [reply.stop_reason for reply in replies] == ["tool_use"] * 2
    assert len(asked_for) == 2
    assert {*asked_for} <= {"Rome", "Oslo"}


def test_a_call_or_an_answer_in_form(claude):
    form = {
        "type": "json_schema",
        "schema": {"type": "object", "properties": {"a": {"enum": ["b"]}}, "required": ["a"]},
    }
    asked: Any = {
        "model": "demo",
        "max_tokens": 100,
        "messages": HELLO,
        "tools": [CITY],
        "output_config": {"format": form},
    }
    (block,) = claude.messages.create(**asked).content
    assert block.type == "tool_use" or json.loads(block.text) == {"a": "b"}
